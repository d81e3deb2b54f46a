#include "eval/ppl.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "engine/core/interrupt.h"

namespace engine {
namespace {

// Loss of every row, nats; the last row of each window has none and is 0. On a measuring arena it
// only takes memory.
std::vector<double> losses(const PplJob& job, const TokenWindows& tokens, Arena& arena,
                           Report* report) {
  Ops& ops = *job.ops;
  const ModelConfig& config = job.source->config();
  const std::int64_t rows = tokens.rows();
  Loader loader(ops, *job.ledger, arena, config);
  const View hidden = arena.make(MemTag::hidden_stream, job.dtype, rows, config.hidden);
  run_windows(job, loader, tokens, job.batch, "ppl", hidden, report);

  const Arena::Scope scope(arena);
  std::optional<PhaseTimer> timer;
  if (report != nullptr) timer.emplace(*report, "head");
  Head head(job, loader, rows);
  const View targets = arena.make(MemTag::activations, DType::i32, rows, 1);
  const View nll = arena.make(MemTag::activations, DType::f64, rows, 1);
  if (arena.is_measuring()) return {};
  // Position t predicts t + 1 inside its window; the last one predicts nothing.
  std::vector<std::int32_t> next(static_cast<std::size_t>(rows), -1);
  for (std::int64_t r = 0; r < rows; ++r) {
    if ((r + 1) % tokens.seq != 0) {
      next[static_cast<std::size_t>(r)] = tokens.ids[static_cast<std::size_t>(r + 1)];
    }
  }
  ops.upload(host_view(next.data(), rows, 1), targets);
  ops.synchronize();  // an interruption below must not free what is being copied
  for (std::int64_t r = 0; r < rows; r += head.chunk()) {
    check_interrupt();
    const std::int64_t n = std::min(head.chunk(), rows - r);
    ops.row_nll(head.logits(hidden.row_range(r, n)), targets.row_range(r, n), nll.row_range(r, n));
  }
  std::vector<double> host(static_cast<std::size_t>(rows));
  ops.download(nll, host_view(host.data(), rows, 1));
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
  std::vector<double> nll;
  planned_run(job, job.poison, report,
              [&](Arena& arena, Report* into) { nll = losses(job, all, arena, into); });
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
