#include "eval/kl.h"

#include <algorithm>
#include <optional>
#include <string>

#include "engine/core/interrupt.h"

namespace engine {
namespace {

// Rows of logits of each side at a time: as Head (model_pass.h) has it, so that perplexities are
// those of engine ppl to the bit.
constexpr std::int64_t logit_bytes = 512 << 20;
constexpr std::int64_t max_chunk = 4096;

TokenWindows joined(const std::vector<TokenWindows>& texts) {
  REQUIRE(!texts.empty(), "no texts");
  TokenWindows all;
  all.seq = texts.front().seq;
  for (const TokenWindows& t : texts) {
    REQUIRE(t.seq == all.seq, "texts with different window lengths");
    all.ids.insert(all.ids.end(), t.ids.begin(), t.ids.end());
    all.windows += t.windows;
  }
  return all;
}

TokenWindows reversed(const TokenWindows& tokens) {
  TokenWindows out{.ids = {}, .windows = tokens.windows, .seq = tokens.seq};
  out.ids.reserve(tokens.ids.size());
  for (std::int64_t w = tokens.windows - 1; w >= 0; --w) {
    const auto first = tokens.ids.begin() + w * tokens.seq;
    out.ids.insert(out.ids.end(), first, first + tokens.seq);
  }
  return out;
}

// Hidden states behind the final norm, and the source of the head; null: the stored reference.
struct Side {
  WeightSource* source = nullptr;
  View hidden;
};

// The run over an arena; on a measuring arena it only takes memory.
class Pass {
 public:
  Pass(const KlJob& job, const TokenWindows& tokens, Arena& arena, Report* report)
      : job_(job),
        tokens_(tokens),
        ops_(*job.reference.ops),
        ledger_(*job.reference.ledger),
        arena_(arena),
        report_(report) {}

  void run();

  // Of compare_logits, [rows, 4]; empty: not asked for.
  std::vector<double> model_rows, noise_rows;
  std::int64_t batch = 0, other_batch = 0;  // of the reference and its second computation

 private:
  [[nodiscard]] bool dry() const { return arena_.is_measuring(); }
  [[nodiscard]] View stream(std::int64_t hidden) {
    return arena_.make(MemTag::hidden_stream, job_.reference.dtype, tokens_.rows(), hidden);
  }
  void load_head(const Side& side, View head);
  void states(const EvalModel& model, const TokenWindows& tokens, std::int64_t windows_at_once,
              const std::string& label, View hidden);
  void save(const Side& reference);
  void noise(const Side& reference);
  std::vector<double> compare(const Side& p, const Side& q);

  const KlJob& job_;
  const TokenWindows& tokens_;
  Ops& ops_;
  Ledger& ledger_;
  Arena& arena_;
  Report* report_;
};

void Pass::load_head(const Side& side, View head) {
  const Arena::Scope scope(arena_);
  if (side.source == nullptr) {
    Loader loader(ops_, ledger_, arena_, job_.stored->config());
    job_.stored->load_head(loader, head);
  } else {
    Loader loader(ops_, ledger_, arena_, side.source->config());
    side.source->load_dense("lm_head.weight", loader, head);
  }
}

void Pass::states(const EvalModel& model, const TokenWindows& tokens, std::int64_t windows_at_once,
                  const std::string& label, View hidden) {
  const Arena::Scope scope(arena_);
  const ModelConfig& config = model.source->config();
  Loader loader(ops_, ledger_, arena_, config);
  run_windows(model, loader, tokens, windows_at_once, label, hidden, report_);
  const View norm = arena_.make(MemTag::weights, model.dtype, 1, config.hidden);
  model.source->load_dense("norm.weight", loader, norm);
  if (!dry()) ops_.rmsnorm(hidden, norm, static_cast<float>(config.rms_eps), hidden);
}

void Pass::save(const Side& reference) {
  const Arena::Scope scope(arena_);
  std::optional<PhaseTimer> timer;
  if (report_ != nullptr) timer.emplace(*report_, "save");
  const ModelConfig& config = reference.source->config();
  const View head = arena_.make(MemTag::weights, job_.reference.dtype, config.vocab, config.hidden);
  load_head(reference, head);
  if (dry()) return;
  ReferenceWriter writer(job_.save,
                         {job_.reference.dtype, config.vocab, tokenizer_sha256(*reference.source)},
                         reference.source->describe(), job_.protocols, tokens_, config.hidden);
  writer.add_hidden(ops_, ledger_, reference.hidden);
  writer.add_head(ops_, ledger_, head);
  writer.commit();
}

std::vector<double> Pass::compare(const Side& p, const Side& q) {
  const Arena::Scope scope(arena_);
  std::optional<PhaseTimer> timer;
  if (report_ != nullptr) timer.emplace(*report_, "head");
  const DType dtype = job_.reference.dtype;
  const std::int64_t rows = tokens_.rows();
  const std::int64_t vocab =
      p.source != nullptr ? p.source->config().vocab : job_.stored->config().vocab;
  const std::int64_t chunk =
      std::clamp<std::int64_t>(logit_bytes / (4 * vocab), 1, std::min(rows, max_chunk));
  const View p_head = arena_.make(MemTag::weights, dtype, vocab, p.hidden.cols);
  load_head(p, p_head);
  View q_head = p_head;
  if (q.source != p.source) {
    q_head = arena_.make(MemTag::weights, dtype, vocab, q.hidden.cols);
    load_head(q, q_head);
  }
  const View p_logits = arena_.make(MemTag::activations, DType::f32, chunk, vocab);
  const View q_logits = arena_.make(MemTag::activations, DType::f32, chunk, vocab);
  const View targets = arena_.make(MemTag::activations, DType::i32, rows, 1);
  const View out = arena_.make(MemTag::activations, DType::f64, rows, 4);
  if (dry()) return {};
  // Position t predicts t + 1 inside its window; the last one predicts nothing.
  std::vector<std::int32_t> next(tokens_.ids.begin() + 1, tokens_.ids.end());
  next.push_back(-1);
  for (std::int64_t r = tokens_.seq - 1; r < rows; r += tokens_.seq) {
    next[static_cast<std::size_t>(r)] = -1;
  }
  ops_.upload(host_view(next.data(), rows, 1), targets);
  ops_.synchronize();  // an interruption below must not free what is being copied
  for (std::int64_t r = 0; r < rows; r += chunk) {
    check_interrupt();
    const std::int64_t n = std::min(chunk, rows - r);
    const View p_rows = p_logits.row_range(0, n), q_rows = q_logits.row_range(0, n);
    ops_.matmul(p.hidden.row_range(r, n), p_head, p_rows, false);
    ops_.matmul(q.hidden.row_range(r, n), q_head, q_rows, false);
    ops_.compare_logits(p_rows, q_rows, targets.row_range(r, n), out.row_range(r, n));
  }
  std::vector<double> host(static_cast<std::size_t>(out.count()));
  ops_.download(out, host_view(host.data(), rows, 4));
  return host;
}

void Pass::noise(const Side& reference) {
  const Arena::Scope scope(arena_);
  const View again = stream(reference.hidden.cols);
  const View swap =
      arena_.make(MemTag::hidden_stream, job_.reference.dtype, tokens_.seq, reference.hidden.cols);
  other_batch = batch > 1 ? batch / 2 : std::min<std::int64_t>(2, tokens_.windows);
  states(job_.reference, reversed(tokens_), other_batch, "noise floor", again);
  if (!dry()) {
    for (std::int64_t a = 0, b = tokens_.windows - 1; a < b; ++a, --b) {
      const View first = again.row_range(a * tokens_.seq, tokens_.seq);
      const View last = again.row_range(b * tokens_.seq, tokens_.seq);
      ops_.copy(first, swap);
      ops_.copy(last, first);
      ops_.copy(swap, last);
    }
  }
  noise_rows = compare(reference, {reference.source, again});
}

void Pass::run() {
  batch = job_.batch > 0 ? std::min(job_.batch, tokens_.windows)
                         : default_batch(ops_.kind(), tokens_.seq, tokens_.windows);
  Side reference;
  if (job_.stored != nullptr) {
    reference.hidden = stream(job_.stored->hidden());
    const Arena::Scope scope(arena_);
    std::optional<PhaseTimer> timer;
    if (report_ != nullptr) timer.emplace(*report_, "load");
    Loader loader(ops_, ledger_, arena_, job_.stored->config());
    job_.stored->load_hidden(loader, reference.hidden);
  } else {
    reference.source = job_.reference.source;
    reference.hidden = stream(reference.source->config().hidden);
    states(job_.reference, tokens_, batch, "reference", reference.hidden);
  }
  if (!job_.save.empty()) save(reference);
  if (job_.model.source != nullptr) {
    const Arena::Scope scope(arena_);
    const Side model{job_.model.source, stream(job_.model.source->config().hidden)};
    states(job_.model, tokens_, batch, "model", model.hidden);
    model_rows = compare(reference, model);
  }
  if (job_.noise_floor) noise(reference);
}

void check_pair(const KlJob& job, const TokenWindows& tokens) {
  if (job.model.source == nullptr) return;
  const ReferenceKey model{job.reference.dtype, job.model.source->config().vocab,
                           tokenizer_sha256(*job.model.source)};
  if (job.stored != nullptr) {
    job.stored->check(model, tokens);
    return;
  }
  const auto require = [&](const char* what, const std::string& expected,
                           const std::string& found) {
    if (expected == found) return;
    throw Error(ErrorCode::mismatch,
                job.model.source->describe().value("name", std::string("the model")) + ": " + what +
                    ": expected " + expected + " as the reference has, found " + found);
  };
  const auto hash_text = [](const std::string& hash) { return hash.empty() ? "none" : hash; };
  require("vocabulary", std::to_string(job.reference.source->config().vocab),
          std::to_string(model.vocab));
  require("tokenizer SHA-256", hash_text(tokenizer_sha256(*job.reference.source)),
          hash_text(model.tokenizer_sha256));
}

// Of the plan that the report has by now.
std::string plan_text(const Report& report) {
  std::string text;
  for (const auto& [key, bytes] : report.document()["plan"].items()) {
    text += (text.empty() ? "" : ", ") + key + " " + human_bytes(bytes.get<std::int64_t>());
  }
  return text;
}

}  // namespace

KlResult kl_divergence(const KlJob& job, Report& report) {
  REQUIRE((job.stored != nullptr) != (job.reference.source != nullptr), "one reference");
  REQUIRE(job.stored == nullptr || (job.save.empty() && !job.noise_floor),
          "a stored reference has no weights");
  const TokenWindows tokens = joined(job.texts);
  if (job.model.source != nullptr && job.model.exec == Exec::packed) {
    require_packed(*job.model.source);
  }
  check_pair(job, tokens);

  std::vector<double> model_rows;
  KlResult result;
  try {
    planned_run(job.reference, job.poison, report, [&](Arena& arena, Report* into) {
      Pass pass(job, tokens, arena, into);
      pass.run();
      if (arena.is_measuring()) return;
      model_rows = std::move(pass.model_rows);
      if (job.noise_floor) {
        result.noise = {kl_statistics(pass.noise_rows, tokens.windows, tokens.seq), pass.batch,
                        pass.other_batch};
      }
    });
  } catch (const Error& e) {
    if (e.code() != ErrorCode::out_of_memory || !report.document().contains("plan")) throw;
    throw Error(e.code(), std::string(e.what()) + "; the plan, with the hidden states of both at " +
                              "once: " + plan_text(report) + "; --limit takes fewer windows");
  }
  if (model_rows.empty()) return result;
  std::size_t at = 0;
  for (const TokenWindows& t : job.texts) {
    const auto count = static_cast<std::size_t>(4 * t.rows());
    result.texts.push_back(
        kl_statistics(std::span(model_rows).subspan(at, count), t.windows, t.seq));
    at += count;
  }
  result.all = kl_statistics(model_rows, tokens.windows, tokens.seq);
  return result;
}

}  // namespace engine
