#include "eval/score.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "engine/core/interrupt.h"
#include "eval/score_plan.h"

namespace engine {
namespace {

// Tokens at a time when the user does not say.
constexpr std::int64_t cuda_batch_rows = 16384, cpu_batch_rows = 2048;
// Share of the free memory that a pass may plan for.
constexpr double usable_memory = 0.9;

void check_requests(const ScoreJob& job) {
  const ModelConfig& config = job.source->config();
  if (job.requests.empty())
    throw Error(ErrorCode::usage, "expected something to score, found no request");
  for (std::size_t i = 0; i < job.requests.size(); ++i) {
    const ScoreRequest& r = job.requests[i];
    const auto n = static_cast<std::int64_t>(r.tokens.size());
    const std::string name = "request " + std::to_string(i);
    if (r.scored < 1 || n < r.scored + 1) {
      throw Error(ErrorCode::usage,
                  name + ": expected at least one scored token after another one, found " +
                      std::to_string(n) + " tokens, " + std::to_string(r.scored) + " scored");
    }
    if (config.max_positions > 0 && n - 1 > config.max_positions) {
      throw Error(ErrorCode::usage, name + ": expected at most the model's " +
                                        std::to_string(config.max_positions) +
                                        " positions, found " + std::to_string(n - 1) +
                                        " (--max-length cuts requests)");
    }
    check_tokens(r.tokens, config, name);
  }
}

// One pass over the weights for the requests of one plan. On a measuring arena it only takes
// memory.
class Pass {
 public:
  Pass(const ScoreJob& job, const ScorePlan& plan, Arena& arena, Report* report)
      : job_(job),
        plan_(plan),
        ops_(*job.ops),
        arena_(arena),
        report_(report),
        loader_(*job.ops, *job.ledger, arena, job.source->config()) {}

  // Adds the log-likelihoods of the plan's targets to `into`, one entry per request.
  void run(std::vector<double>& into) {
    const ModelConfig& config = job_.source->config();
    const View hidden = arena_.make(MemTag::hidden_stream, job_.dtype, plan_.rows(), config.hidden);
    {
      const std::optional<PhaseTimer> timer = phase("embed");
      TokenWindows tokens;
      tokens.ids = plan_.ids;
      tokens.windows = 1;
      tokens.seq = plan_.rows();
      embed_stream(*job_.source, loader_, tokens, hidden);
    }
    blocks(hidden);
    const std::optional<PhaseTimer> timer = phase("head");
    targets(hidden, into);
  }

 private:
  [[nodiscard]] std::optional<PhaseTimer> phase(const char* name) const {
    if (report_ == nullptr) return std::nullopt;
    return std::optional<PhaseTimer>(std::in_place, *report_, name);
  }
  void blocks(View hidden);
  void run_batches(const BlockWeights& weights, const BlockScratch& scratch, const RopeTable& rope,
                   View positions, View runs, View hidden);
  void targets(View hidden, std::vector<double>& into);

  const ScoreJob& job_;
  const ScorePlan& plan_;
  Ops& ops_;
  Arena& arena_;
  Report* report_;
  Loader loader_;
};

void Pass::blocks(View hidden) {
  const Arena::Scope scope(arena_);
  const ModelConfig& config = job_.source->config();
  const RopeTable rope = make_rope_table(arena_, ops_, config, plan_.longest);
  const BlockScratch scratch =
      make_block_scratch(arena_, ops_, config, job_.dtype, 1, plan_.batch_rows, plan_.batch_rows,
                         packed_bytes(job_, plan_.batch_rows), plan_.kept);
  const auto runs = static_cast<std::int64_t>(plan_.runs.size()) / run_columns;
  const View positions = arena_.make(MemTag::activations, DType::i32, plan_.rows(), 1);
  const View run_table = arena_.make(MemTag::activations, DType::i32, runs, run_columns);
  if (!arena_.is_measuring()) {
    ops_.upload(host_view(plan_.positions.data(), plan_.rows(), 1), positions);
    ops_.upload(host_view(plan_.runs.data(), runs, run_columns), run_table);
    ops_.synchronize();
  }
  each_block(job_, loader_, "eval", hidden, report_, [&](const BlockWeights& weights) {
    run_batches(weights, scratch, rope, positions, run_table, hidden);
  });
}

void Pass::run_batches(const BlockWeights& weights, const BlockScratch& scratch,
                       const RopeTable& rope, View positions, View runs, View hidden) {
  for (const ScoreBatch& batch : plan_.batches) {
    check_interrupt();
    const RaggedBatch ragged{.positions = positions.row_range(batch.first_row, batch.rows),
                             .runs = runs.row_range(batch.first_run, batch.runs),
                             .kept = plan_.kept};
    const BlockRun run{.ops = ops_,
                       .config = job_.source->config(),
                       .rope = rope,
                       .kernel = job_.kernel,
                       .ragged = &ragged};
    llama_block(run, weights, scratch, hidden.row_range(batch.first_row, batch.rows), {});
    for (const KeptCopy& copy : batch.copies) {
      for (const View& keys : {scratch.k, scratch.v}) {
        ops_.copy(keys.row_range(copy.from, copy.rows), keys.row_range(copy.to, copy.rows));
      }
    }
  }
}

void Pass::targets(View hidden, std::vector<double>& into) {
  const Arena::Scope scope(arena_);
  const auto count = static_cast<std::int64_t>(plan_.targets.size());
  Head head(job_, loader_, count);
  const View rows = arena_.make(MemTag::activations, DType::i32, count, 1);
  const View tokens = arena_.make(MemTag::activations, DType::i32, count, 1);
  const View nll = arena_.make(MemTag::activations, DType::f64, count, 1);
  const View gathered = arena_.make(MemTag::activations, job_.dtype, head.chunk(), hidden.cols);
  if (arena_.is_measuring()) return;
  std::vector<std::int32_t> row_ids, token_ids;
  for (const ScoreTarget& t : plan_.targets) {
    row_ids.push_back(static_cast<std::int32_t>(t.row));
    token_ids.push_back(t.token);
  }
  ops_.upload(host_view(row_ids.data(), count, 1), rows);
  ops_.upload(host_view(token_ids.data(), count, 1), tokens);
  ops_.synchronize();  // an interruption below must not free what is being copied
  for (std::int64_t i = 0; i < count; i += head.chunk()) {
    check_interrupt();
    const std::int64_t n = std::min(head.chunk(), count - i);
    const View some = gathered.row_range(0, n);
    ops_.embed(rows.row_range(i, n), hidden, some);  // a row of a table for each id
    ops_.row_nll(head.logits(some), tokens.row_range(i, n), nll.row_range(i, n));
  }
  std::vector<double> host(static_cast<std::size_t>(count));
  ops_.download(nll, host_view(host.data(), count, 1));
  for (std::size_t i = 0; i < host.size(); ++i) {
    into[static_cast<std::size_t>(plan_.targets[i].request)] -= host[i];
  }
}

std::int64_t peak_of(const ScoreJob& job, const ScorePlan& plan) {
  Arena arena = Arena::measuring(job.ops->kind());
  std::vector<double> none;
  Pass(job, plan, arena, nullptr).run(none);
  return arena.peak();
}

// `order` in `parts` pieces of about equal tokens; none is empty.
std::vector<std::span<const std::int64_t>> pieces(const ScoreJob& job,
                                                  std::span<const std::int64_t> order,
                                                  std::int64_t parts) {
  const auto tokens = [&](std::int64_t r) {
    return static_cast<std::int64_t>(job.requests[static_cast<std::size_t>(r)].tokens.size());
  };
  std::int64_t total = 0;
  for (const std::int64_t r : order) total += tokens(r);
  std::vector<std::span<const std::int64_t>> out;
  std::size_t first = 0;
  std::int64_t seen = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    seen += tokens(order[i]);
    const auto cut = static_cast<std::int64_t>(out.size()) + 1;
    if (seen >= total / parts * cut + total % parts * cut / parts || i + 1 == order.size()) {
      out.push_back(order.subspan(first, i + 1 - first));
      first = i + 1;
    }
  }
  return out;
}

// As few passes over the weights as fit: the hidden states of a whole pass are in memory.
std::vector<ScorePlan> plan_passes(const ScoreJob& job, std::span<const std::int64_t> order,
                                   const ScoreOptions& options) {
  const auto limit =
      static_cast<std::int64_t>(usable_memory * static_cast<double>(job.ops->info().free_bytes));
  for (std::int64_t parts = 1;; parts *= 2) {
    std::vector<ScorePlan> plans;
    bool fits = true;
    const auto all = pieces(job, order, parts);
    for (const auto& piece : all) {
      plans.push_back(plan_scores(job.requests, piece, options));
      fits = job.pass_rows > 0 ? plans.back().rows() <= job.pass_rows
                               : peak_of(job, plans.back()) <= limit;
      if (!fits) break;
    }
    // One request by itself is all that can be done; the arena says what is missing.
    if (fits || parts >= static_cast<std::int64_t>(order.size())) {
      for (std::size_t i = plans.size(); i < all.size(); ++i) {
        plans.push_back(plan_scores(job.requests, all[i], options));
      }
      return plans;
    }
  }
}

}  // namespace

ScoreResult score(const ScoreJob& job, Report& report) {
  check_requests(job);
  if (job.exec == Exec::packed) require_packed(*job.source);
  ScoreOptions options{.share = job.share, .pack = job.pack, .batch_rows = job.batch_rows};
  if (options.batch_rows == 0) {
    options.batch_rows = job.ops->kind() == DeviceKind::cpu ? cpu_batch_rows : cuda_batch_rows;
  }
  std::vector<ScorePlan> plans;
  const std::vector<std::int64_t> order = sorted_requests(job.requests);
  {
    const PhaseTimer timer(report, "plan");
    plans = plan_passes(job, order, options);
  }
  ScoreResult result;
  result.log_likelihood.assign(job.requests.size(), 0.0);
  std::int64_t asked = 0, rows = 0, segments = 0, batches = 0, largest = 0, pairs = 0;
  for (const ScoreRequest& r : job.requests) {
    asked += static_cast<std::int64_t>(r.tokens.size()) - 1;
  }
  for (const ScorePlan& plan : plans) {
    planned_run(job, job.poison, report, [&](Arena& arena, Report* into) {
      Pass(job, plan, arena, into).run(result.log_likelihood);
    });
    rows += plan.rows();
    segments += static_cast<std::int64_t>(plan.segments.size());
    batches += static_cast<std::int64_t>(plan.batches.size());
    largest = std::max(largest, plan.batch_rows);
    pairs += plan.pairs;
  }
  for (std::size_t i = 0; i < result.log_likelihood.size(); ++i) {
    if (!std::isfinite(result.log_likelihood[i])) {
      throw Error(ErrorCode::numeric,
                  "request " + std::to_string(i) +
                      ": expected a finite log-likelihood, found NaN or infinity");
    }
  }
  Json& packing = report["packing"];
  packing["share"] = job.share;
  packing["pack"] = job.pack;
  packing["requests"] = job.requests.size();
  packing["tokens_asked"] = asked;
  packing["tokens_computed"] = rows;
  packing["segments"] = segments;
  packing["batches"] = batches;
  packing["largest_batch"] = largest;
  packing["passes"] = plans.size();
  packing["attention_pairs"] = pairs;
  return result;
}

}  // namespace engine
