#include "eval/ppl.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "engine/core/interrupt.h"
#include "engine/core/progress.h"

namespace engine {
namespace {

// Rows of logits at a time: bounded f32 memory whatever the vocabulary.
constexpr std::int64_t logit_bytes = 512 << 20;

// The pass over an arena; on a measuring arena it only takes memory (see quant/driver.cpp).
class Pass {
 public:
  Pass(const PplJob& job, const TokenWindows& tokens, Arena& arena, Report* report)
      : job_(job),
        tokens_(tokens),
        ops_(*job.ops),
        arena_(arena),
        report_(report),
        config_(job.source->config()),
        loader_(ops_, *job.ledger, arena, job.source->config()) {}

  // Loss of every row, nats; the last row of each window has none and is 0.
  std::vector<double> run();

 private:
  [[nodiscard]] bool dry() const { return arena_.is_measuring(); }
  void blocks(View hidden);
  std::vector<double> losses(View hidden);

  const PplJob& job_;
  const TokenWindows& tokens_;
  Ops& ops_;
  Arena& arena_;
  Report* report_;
  const ModelConfig& config_;
  Loader loader_;
};

std::vector<double> Pass::run() {
  const View hidden =
      arena_.make(MemTag::hidden_stream, job_.dtype, tokens_.rows(), config_.hidden);
  if (dry()) {
    embed_stream(*job_.source, loader_, tokens_, hidden);
    blocks(hidden);
    return losses(hidden);
  }
  {
    const PhaseTimer timer(*report_, "embed");
    embed_stream(*job_.source, loader_, tokens_, hidden);
  }
  blocks(hidden);
  const PhaseTimer timer(*report_, "head");
  return losses(hidden);
}

void Pass::blocks(View hidden) {
  const Arena::Scope scope(arena_);
  const std::int64_t batch = job_.batch > 0
                                 ? std::min(job_.batch, tokens_.windows)
                                 : default_batch(ops_.kind(), tokens_.seq, tokens_.windows);
  const RopeTable rope = make_rope_table(arena_, ops_, config_, tokens_.seq);
  std::int64_t packed_bytes = 0;
  if (job_.exec == Exec::packed) {
    packed_bytes = packed_workspace_bytes(ops_, packed_shapes(*job_.source), batch * tokens_.seq,
                                          job_.dtype, job_.kernel);
  }
  StreamPass pass{.run = {.ops = ops_, .config = config_, .rope = rope, .kernel = job_.kernel},
                  .weights = {},
                  .scratch = make_block_scratch(arena_, ops_, config_, job_.dtype, batch,
                                                tokens_.seq, tokens_.seq, packed_bytes),
                  .seq = tokens_.seq,
                  .batch = batch};
  std::optional<Progress> progress;
  if (!dry()) progress.emplace("ppl", config_.layers + 1);
  // Schemes may differ from block to block, so each has its own memory and every one is planned.
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    const Arena::Scope block(arena_);
    pass.weights = job_.exec == Exec::packed
                       ? make_block_weights(arena_, *job_.source, layer, job_.dtype)
                       : make_block_weights(arena_, config_, job_.dtype);
    if (dry()) {
      load_block(*job_.source, layer, loader_, pass.weights);
      continue;
    }
    {
      const PhaseTimer timer(*report_, "load");
      load_block(*job_.source, layer, loader_, pass.weights);
      ops_.synchronize();
    }
    const PhaseTimer timer(*report_, "blocks");
    propagate(pass, hidden);
    check_stream(ops_, hidden, "layers." + std::to_string(layer));
    progress->advance(1, "block " + std::to_string(layer));
  }
}

std::vector<double> Pass::losses(View hidden) {
  const Arena::Scope scope(arena_);
  const std::int64_t rows = tokens_.rows();
  const std::int64_t chunk = std::clamp<std::int64_t>(logit_bytes / (4 * config_.vocab), 1,
                                                      std::min<std::int64_t>(rows, 4096));
  const View norm = arena_.make(MemTag::weights, job_.dtype, 1, config_.hidden);
  const View head = arena_.make(MemTag::weights, job_.dtype, config_.vocab, config_.hidden);
  const View h = arena_.make(MemTag::activations, job_.dtype, chunk, config_.hidden);
  const View logits = arena_.make(MemTag::activations, DType::f32, chunk, config_.vocab);
  const View targets = arena_.make(MemTag::activations, DType::i32, rows, 1);
  const View nll = arena_.make(MemTag::activations, DType::f64, rows, 1);
  job_.source->load_dense("norm.weight", loader_, norm);
  job_.source->load_dense("lm_head.weight", loader_, head);
  if (dry()) return {};
  // Position t predicts t + 1 inside its window; the last one predicts nothing.
  std::vector<std::int32_t> next(static_cast<std::size_t>(rows), -1);
  for (std::int64_t r = 0; r < rows; ++r) {
    if ((r + 1) % tokens_.seq != 0) {
      next[static_cast<std::size_t>(r)] = tokens_.ids[static_cast<std::size_t>(r + 1)];
    }
  }
  ops_.upload(host_view(next.data(), rows, 1), targets);
  ops_.synchronize();  // an interruption below must not free what is being copied
  for (std::int64_t r = 0; r < rows; r += chunk) {
    check_interrupt();
    const std::int64_t n = std::min(chunk, rows - r);
    const View hn = h.row_range(0, n), ln = logits.row_range(0, n);
    ops_.rmsnorm(hidden.row_range(r, n), norm, static_cast<float>(config_.rms_eps), hn);
    ops_.matmul(hn, head, ln, false);
    ops_.row_nll(ln, targets.row_range(r, n), nll.row_range(r, n));
  }
  std::vector<double> host(static_cast<std::size_t>(rows));
  ops_.download(nll, host_view(host.data(), rows, 1));
  return host;
}

PplResult summarize(std::span<const double> nll, std::int64_t windows, std::int64_t seq) {
  PplResult r;
  double mean = 0;
  for (std::int64_t w = 0; w < windows; ++w) {
    double sum = 0;
    for (std::int64_t t = 0; t < seq - 1; ++t) sum += nll[static_cast<std::size_t>(w * seq + t)];
    if (!std::isfinite(sum)) {
      throw Error(ErrorCode::numeric, "window " + std::to_string(w) +
                                          ": expected a finite loss, found NaN or infinity");
    }
    r.window_nll.push_back(sum / static_cast<double>(seq - 1));
    mean += r.window_nll.back();
  }
  mean /= static_cast<double>(windows);
  double variance = 0;
  for (const double x : r.window_nll) variance += (x - mean) * (x - mean);
  if (windows > 1) {
    r.standard_error =
        std::sqrt(variance / static_cast<double>(windows - 1) / static_cast<double>(windows));
  }
  r.perplexity = std::exp(mean);
  return r;
}

}  // namespace

std::vector<PplResult> perplexity(const PplJob& job, Report& report) {
  REQUIRE(!job.texts.empty(), "no texts");
  TokenWindows all;
  all.seq = job.texts.front().seq;
  for (const TokenWindows& t : job.texts) {
    REQUIRE(t.seq == all.seq, "texts with different window lengths");
    all.ids.insert(all.ids.end(), t.ids.begin(), t.ids.end());
    all.windows += t.windows;
  }
  if (job.exec == Exec::packed) require_packed(*job.source);
  Arena plan = Arena::measuring(job.ops->kind());
  static_cast<void>(Pass(job, all, plan, nullptr).run());
  report.add_plan(plan.peak(), plan.tag_peaks());
  std::vector<double> nll;
  {
    Arena arena(job.ops->memory(), *job.ledger, plan.peak(), job.poison);
    nll = Pass(job, all, arena, &report).run();
    REQUIRE(arena.peak() == plan.peak(), "planned " + std::to_string(plan.peak()) +
                                             " bytes, took " + std::to_string(arena.peak()));
    report["plan"]["arena_peak_bytes"] = arena.peak();
    report.add_driver_memory(*job.ops, *job.ledger);
  }
  std::vector<PplResult> results;
  std::size_t at = 0;
  for (const TokenWindows& t : job.texts) {
    const auto rows = static_cast<std::size_t>(t.rows());
    results.push_back(summarize(std::span(nll).subspan(at, rows), t.windows, t.seq));
    at += rows;
  }
  return results;
}

double forward_flops(const ModelConfig& c, std::int64_t windows, std::int64_t seq) {
  double weights = static_cast<double>(c.vocab) * static_cast<double>(c.hidden);
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(c, s);
    weights += static_cast<double>(c.layers) * static_cast<double>(shape.rows) *
               static_cast<double>(shape.cols);
  }
  const double tokens = static_cast<double>(windows * seq);
  // Scores and mixing: 2 * 2 * head_dim per head and visible key; (seq + 1) / 2 keys on average.
  const double attention = static_cast<double>(c.layers * c.heads * c.head_dim) * 4.0 *
                           static_cast<double>(seq + 1) / 2.0;
  return tokens * (2.0 * weights + attention);
}

}  // namespace engine
