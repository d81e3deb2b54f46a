#include "engine/quant/driver.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <thread>
#include <utility>

#include "engine/core/interrupt.h"
#include "engine/core/progress.h"
#include "engine/model/install.h"
#include "engine/quant/model_writer.h"

namespace engine {
namespace {

// The run as one function over an arena: on a measuring arena it only takes memory, which is the
// plan; on the real one it does the work with exactly those takings.
class Run {
 public:
  Run(const QuantizeJob& job, Arena& arena, ModelWriter* writer, Report* report)
      : job_(job),
        ops_(*job.ops),
        arena_(arena),
        config_(job.source->config()),
        needs_(job.method->needs()),
        loader_(ops_, *job.ledger, arena, job.source->config()),
        writer_(writer),
        report_(report) {}

  void run();

 private:
  struct Hessians {
    std::array<View, tap_count> of{};
  };

  [[nodiscard]] bool dry() const { return arena_.is_measuring(); }
  [[nodiscard]] std::int64_t block_count() const {
    return job_.blocks > 0 ? job_.blocks : config_.layers;
  }
  View make_hessian(Tap tap) {
    const std::int64_t d = tap_width(config_, tap);
    const View h = arena_.make(MemTag::stats, DType::f32, d, d);
    if (!dry()) ops_.zero(h);
    return h;
  }
  void run_block(std::int64_t layer);
  void collect(std::span<const Tap> taps, const Hessians& hessians, bool with_output);
  void collect_and_advance(const Hessians& hessians);
  GroupPass group_pass(std::int64_t layer, Tap tap, const View& hessian);
  void study_tap(std::int64_t layer, Tap tap, const View& hessian);
  void quantize_tap(std::int64_t layer, Tap tap, const View& hessian);
  void install_results(std::int64_t layer, std::span<const SiteTask> sites,
                       std::vector<SiteResult>& results);
  void quantize_whole_block(std::int64_t layer);
  void compare_outputs(std::int64_t layer, const View& original, const View& quantized,
                       const View& sums);
  void advance_stream(std::int64_t layer, bool measure);
  void compare_with_original(std::int64_t layer);
  void resume_block(std::int64_t layer);
  StreamPass stream_pass();

  template <class F>
  void timed(const char* phase, F&& work) {
    if (dry()) {
      work();
      return;
    }
    const PhaseTimer timer(*report_, phase);
    work();
    ops_.synchronize();
  }

  const QuantizeJob& job_;
  Ops& ops_;
  Arena& arena_;
  const ModelConfig& config_;
  Needs needs_;
  Loader loader_;
  ModelWriter* writer_;
  Report* report_;

  std::int64_t batch_ = 1;
  View hidden_;     // [windows * seq, hidden]
  View reference_;  // first batch's full-precision outputs of the current block
  RopeTable rope_;
  BlockWeights weights_;
};

StreamPass Run::stream_pass() {
  StreamPass pass{.run = {.ops = ops_, .config = config_, .rope = rope_},
                  .weights = weights_,
                  .scratch = make_block_scratch(arena_, ops_, config_, job_.dtype, batch_,
                                                job_.calibration.seq, job_.calibration.seq),
                  .seq = job_.calibration.seq,
                  .batch = batch_};
  return pass;
}

void Run::run() {
  const TokenWindows& tokens = job_.calibration;
  if (needs_.data()) {
    batch_ = effective_batch(job_);
    hidden_ = arena_.make(MemTag::hidden_stream, job_.dtype, tokens.rows(), config_.hidden);
    reference_ =
        arena_.make(MemTag::hidden_stream, job_.dtype, batch_ * tokens.seq, config_.hidden);
    rope_ = make_rope_table(arena_, ops_, config_, tokens.seq);
    timed("embed", [&] { embed_stream(*job_.source, loader_, tokens, hidden_); });
  }
  weights_ = make_block_weights(arena_, config_, job_.dtype);

  if (dry()) {
    run_block(0);
    for (const std::string& name : dense_names(config_)) {
      job_.source->read_raw(name, loader_, {});
    }
    return;
  }
  Progress progress("quantize", block_count());
  for (std::int64_t layer = 0; layer < block_count(); ++layer) {
    check_interrupt();
    progress.advance(0, "block " + std::to_string(layer));
    if (layer < writer_->resumed_blocks()) {
      resume_block(layer);
    } else {
      timed("write", [&] { writer_->add_outer_tensors(layer, loader_); });
      run_block(layer);
      timed("write", [&] { writer_->finish_block(layer, loader_); });
    }
    progress.advance(1);
  }
  timed("write", [&] { writer_->add_outer_tensors(block_count(), loader_); });
}

// Accumulates x^T x of each tap from one pass over the stream.
void Run::collect(std::span<const Tap> taps, const Hessians& hessians, bool with_output) {
  const Arena::Scope scope(arena_);
  const StreamPass pass = stream_pass();
  const View copy = arena_.make(MemTag::activations, job_.dtype, batch_ * pass.seq, config_.hidden);
  if (dry()) return;
  const Tap last = taps.back();
  bool whole = with_output;  // the first batch runs to the end, for the block's reference output
  capture(
      pass, hidden_, copy,
      [&](Tap tap, const View& x) {
        if (std::find(taps.begin(), taps.end(), tap) != taps.end()) {
          ops_.gram(x, hessians.of[static_cast<std::size_t>(tap)]);
        }
        return whole || tap != last;
      },
      [&](std::int64_t first, const View& out) {
        if (first == 0 && with_output) ops_.copy(out, reference_.row_range(0, out.rows));
        whole = false;
      });
}

// As collect of all taps. The stream gets the original block's outputs, and reference_ the first
// batch's inputs.
void Run::collect_and_advance(const Hessians& hessians) {
  const Arena::Scope scope(arena_);
  const StreamPass pass = stream_pass();
  const View copy = arena_.make(MemTag::activations, job_.dtype, batch_ * pass.seq, config_.hidden);
  if (dry()) return;
  ops_.copy(hidden_.row_range(0, reference_.rows), reference_);
  capture(
      pass, hidden_, copy,
      [&](Tap tap, const View& x) {
        ops_.gram(x, hessians.of[static_cast<std::size_t>(tap)]);
        return true;
      },
      [&](std::int64_t first, const View& out) {
        ops_.copy(out, hidden_.row_range(first, out.rows));
      });
}

GroupPass Run::group_pass(std::int64_t layer, Tap tap, const View& hessian) {
  GroupPass pass{.ops = ops_,
                 .arena = arena_,
                 .ledger = *job_.ledger,
                 .config = config_,
                 .layer = layer,
                 .tap = tap,
                 .sites = {},
                 .hessian = hessian,
                 .sequences = job_.calibration.windows,
                 .input_rows = needs_.hessian ? batch_ * job_.calibration.seq : 0};
  for (const Site s : all_sites) {
    if (tap_of(s) == tap) pass.sites.push_back({s, weights_[s].dense});
  }
  return pass;
}

// Lets the method see the inputs themselves, of which the statistics are only a sum.
void Run::study_tap(std::int64_t layer, Tap tap, const View& hessian) {
  const Arena::Scope scope(arena_);
  GroupPass pass = group_pass(layer, tap, hessian);
  const InputReplay replay = [&](const std::function<void(const View& x)>& visit) {
    const Arena::Scope inner(arena_);
    const StreamPass stream = stream_pass();
    const View copy =
        arena_.make(MemTag::activations, job_.dtype, batch_ * stream.seq, config_.hidden);
    if (dry()) return;
    capture(stream, hidden_, copy,
            [&](Tap at, const View& x) {
              if (at == tap) visit(x);
              return at != tap;
            },
            {});
  };
  timed("study", [&] { job_.method->study_group(pass, replay); });
}

void Run::quantize_tap(std::int64_t layer, Tap tap, const View& hessian) {
  const Arena::Scope scope(arena_);
  GroupPass pass = group_pass(layer, tap, hessian);
  std::vector<SiteResult> results;
  {
    const Arena::Scope solver(arena_);
    timed("solve", [&] { results = job_.method->quantize_group(pass); });
  }
  install_results(layer, pass.sites, results);
}

// From here on the block uses what the planes decode to, in place of the originals.
void Run::install_results(std::int64_t layer, std::span<const SiteTask> sites,
                          std::vector<SiteResult>& results) {
  REQUIRE(results.size() == sites.size(), "one result per site");
  const View sums = arena_.make(MemTag::solver, DType::f64, 1, 2);
  for (std::size_t i = 0; i < results.size(); ++i) {
    const SiteTask& task = sites[i];
    const std::string name = linear_name(layer, task.site);
    const Arena::Scope site_scope(arena_);
    const View decoded =
        arena_.make(MemTag::solver, job_.dtype, task.weight.rows, task.weight.cols);
    timed("install",
          [&] { install_linear(results[i].weight, name, loader_, decoded, job_.threads); });
    if (dry()) continue;
    timed("install", [&] {
      ops_.square_sums(task.weight, decoded, sums);
      double host[2];
      ops_.download(sums, host_view(host, 1, 2));
      const double error = host[1] > 0 ? host[0] / host[1] : 0.0;
      if (!std::isfinite(error)) {
        throw Error(ErrorCode::numeric, name + ": the quantized weights are not finite");
      }
      if (!results[i].details.contains("relative_error")) {
        results[i].details["relative_error"] = error;
      }
      ops_.copy(decoded, task.weight);
    });
    timed("write", [&] { writer_->add_linear(name, std::move(results[i])); });
  }
}

void Run::advance_stream(std::int64_t layer, bool measure) {
  const Arena::Scope scope(arena_);
  const StreamPass pass = stream_pass();
  const View sums = arena_.make(MemTag::solver, DType::f64, 1, 2);
  if (dry()) return;
  propagate(pass, hidden_);
  check_stream(ops_, hidden_, "layers." + std::to_string(layer));
  if (!measure) return;
  compare_outputs(layer, reference_, hidden_.row_range(0, reference_.rows), sums);
}

void Run::compare_outputs(std::int64_t layer, const View& original, const View& quantized,
                          const View& sums) {
  ops_.square_sums(original, quantized, sums);
  double host[2];
  ops_.download(sums, host_view(host, 1, 2));
  writer_->note_block(layer, host[1] > 0 ? host[0] / host[1] : 0.0);
}

// The method sees the block as a whole. The original block's outputs are needed twice: the first
// batch's to measure the quantized block, and all of them if they go on to the next block.
void Run::quantize_whole_block(std::int64_t layer) {
  const Arena::Scope scope(arena_);
  const View norms = arena_.make(MemTag::solver, DType::f32, 2, config_.hidden);
  std::vector<SiteResult> results;
  bool norms_changed = false;
  {
    const Arena::Scope method_scope(arena_);
    BlockPass pass{.ops = ops_,
                   .arena = arena_,
                   .ledger = *job_.ledger,
                   .config = config_,
                   .layer = layer,
                   .stream = stream_pass(),
                   .hidden = hidden_,
                   .copy = {},
                   .attn_norm = norms.row_range(0, 1),
                   .mlp_norm = norms.row_range(1, 1)};
    pass.copy = arena_.make(MemTag::activations, job_.dtype, reference_.rows, config_.hidden);
    if (!dry()) {
      ops_.convert(weights_.attn_norm, pass.attn_norm);
      ops_.convert(weights_.mlp_norm, pass.mlp_norm);
    }
    timed("solve", [&] { results = job_.method->quantize_block(pass); });
    norms_changed = pass.norms_changed;
    timed("propagate", [&] {
      if (dry()) return;
      ops_.copy(hidden_.row_range(0, reference_.rows), reference_);
      propagate(pass.stream, needs_.original_stream ? hidden_ : reference_);
    });
  }
  std::vector<SiteTask> sites;
  for (const Site s : all_sites) sites.push_back({s, weights_[s].dense});
  install_results(layer, sites, results);
  if (norms_changed && !dry()) {
    std::vector<float> host(static_cast<std::size_t>(norms.count()));
    ops_.download(norms, host_view(host.data(), norms.rows, norms.cols));
    const auto middle = host.begin() + config_.hidden;
    writer_->replace_norms(layer, {host.begin(), middle}, {middle, host.end()});
    ops_.convert(norms.row_range(0, 1), weights_.attn_norm);
    ops_.convert(norms.row_range(1, 1), weights_.mlp_norm);
  }
  timed("propagate", [&] {
    if (needs_.original_stream) {
      compare_with_original(layer);
    } else {
      advance_stream(layer, true);
    }
  });
}

// The stream holds the original block's outputs, reference_ the first batch's inputs.
void Run::compare_with_original(std::int64_t layer) {
  const Arena::Scope scope(arena_);
  const StreamPass pass = stream_pass();
  const View sums = arena_.make(MemTag::solver, DType::f64, 1, 2);
  if (dry()) return;
  check_stream(ops_, hidden_, "layers." + std::to_string(layer));
  propagate(pass, reference_);
  compare_outputs(layer, hidden_.row_range(0, reference_.rows), reference_, sums);
}

void Run::run_block(std::int64_t layer) {
  timed("load", [&] { load_block(*job_.source, layer, loader_, weights_); });
  if (needs_.block) {
    quantize_whole_block(layer);
    return;
  }
  if (!needs_.hessian) {
    for (const Tap tap : all_taps) quantize_tap(layer, tap, View{});
    return;
  }
  REQUIRE(!needs_.original_stream || !(needs_.tap_order || needs_.study),
          "the stream cannot be advanced before the taps are seen");
  if (needs_.tap_order) {
    for (const Tap tap : all_taps) {
      const Arena::Scope scope(arena_);
      Hessians hessians;
      hessians.of[static_cast<std::size_t>(tap)] = make_hessian(tap);
      const Tap only[] = {tap};
      timed("capture", [&] { collect(only, hessians, tap == Tap::attn_in); });
      check_interrupt();
      if (needs_.study) study_tap(layer, tap, hessians.of[static_cast<std::size_t>(tap)]);
      quantize_tap(layer, tap, hessians.of[static_cast<std::size_t>(tap)]);
    }
  } else {
    const Arena::Scope scope(arena_);
    Hessians hessians;
    for (const Tap tap : all_taps) hessians.of[static_cast<std::size_t>(tap)] = make_hessian(tap);
    timed("capture", [&] {
      if (needs_.original_stream) {
        collect_and_advance(hessians);
      } else {
        collect(all_taps, hessians, true);
      }
    });
    if (needs_.study) {
      for (const Tap tap : all_taps)
        study_tap(layer, tap, hessians.of[static_cast<std::size_t>(tap)]);
    }
    for (const Tap tap : all_taps) {
      check_interrupt();
      quantize_tap(layer, tap, hessians.of[static_cast<std::size_t>(tap)]);
    }
  }
  if (needs_.original_stream) {
    timed("propagate", [&] { compare_with_original(layer); });
  } else {
    timed("propagate", [&] { advance_stream(layer, true); });
  }
}

void Run::resume_block(std::int64_t layer) {
  if (!needs_.data()) return;  // nothing flows from block to block
  timed("replay", [&] {
    load_block(*job_.source, layer, loader_, weights_);
    if (!needs_.original_stream) writer_->install(layer, loader_, weights_);
    advance_stream(layer, false);
  });
}

}  // namespace

std::int64_t effective_batch(const QuantizeJob& job) {
  const TokenWindows& tokens = job.calibration;
  return job.batch > 0 ? std::min(job.batch, tokens.windows)
                       : default_batch(job.ops->kind(), tokens.seq, tokens.windows);
}

MemoryPlan plan_quantize(const QuantizeJob& job) {
  Arena arena = Arena::measuring(job.ops->kind());
  Run(job, arena, nullptr, nullptr).run();
  return {arena.peak(), arena.tag_peaks()};
}

void quantize(const QuantizeJob& job, Report& report) {
  const MemoryPlan plan = plan_quantize(job);
  report.add_plan(plan.device_bytes, plan.by_tag);
  ModelWriter writer(job);
  try {
    Arena arena(job.ops->memory(), *job.ledger, plan.device_bytes, job.poison);
    Run(job, arena, &writer, &report).run();
    // A resumed run may have nothing left to solve and then stays below.
    REQUIRE(job.resume ? arena.peak() <= plan.device_bytes : arena.peak() == plan.device_bytes,
            "planned " + std::to_string(plan.device_bytes) + " bytes, took " +
                std::to_string(arena.peak()));
    report["plan"]["arena_peak_bytes"] = arena.peak();
    report.add_driver_memory(*job.ops, *job.ledger);
    const PhaseTimer timer(report, "write");
    writer.finish(report);
  } catch (const Error& e) {
    if (e.code() == ErrorCode::interrupted) {
      const std::int64_t kept = writer.settle_for_resume();
      if (kept > 0) {
        throw Error(ErrorCode::interrupted,
                    std::string(e.what()) + " after " + std::to_string(kept) +
                        " finished blocks; run the same command with --resume to continue");
      }
    }
    throw;
  }
}

}  // namespace engine
