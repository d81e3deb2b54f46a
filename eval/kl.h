// How far a model's predictions are from a reference's on texts (docs/protocols.md). Both run
// layer-streamed, one after the other; then both heads, chunk by chunk. The hidden states of both
// are on the device together, their weights are not.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "eval/kl_reference.h"
#include "eval/model_pass.h"

namespace engine {

// Over the scored positions of some windows: all but the last of each. p is the reference, q the
// model. Percentiles lie between order statistics, linearly. Standard errors are over windows; 0
// for one window.
struct KlStatistics {
  std::int64_t windows = 0;
  std::int64_t positions = 0;
  struct {
    double mean = 0, standard_error = 0;
    double median = 0, p90 = 0, p95 = 0, p99 = 0, p99_9 = 0, maximum = 0;
  } kl;                 // sum p (log p - log q), nats
  double same_top = 0;  // share of positions where both have the same likeliest token
  struct {
    double mean = 0, rms = 0;
    double p1 = 0, p5 = 0, median = 0, p95 = 0, p99 = 0;
  } change;  // q(t) - p(t) of the token t that follows
  double reference_perplexity = 0, perplexity = 0;
  double log_ratio = 0;  // ln(perplexity / reference_perplexity)
  double log_ratio_standard_error = 0;
};
[[nodiscard]] Json to_json(const KlStatistics& s);

// `rows`: what EvalOps::compare_logits gave for each row of the windows, f64 [windows * seq, 4].
// Throws Error(numeric) naming window and position of a scored row with NaN.
[[nodiscard]] KlStatistics kl_statistics(std::span<const double> rows, std::int64_t windows,
                                         std::int64_t seq);

// The reference against itself, computed again with the windows in reverse and another batch size:
// a model's distance means something only where it exceeds this.
struct NoiseFloor {
  KlStatistics statistics;  // over all texts
  std::int64_t batch = 0, other_batch = 0;
};
[[nodiscard]] Json to_json(const NoiseFloor& n);

struct KlJob {
  EvalModel reference;                      // ops, ledger and dtype are those of everything
  const StoredReference* stored = nullptr;  // instead of reference.source, which is then null
  EvalModel model;                          // source null: nothing is compared
  std::int64_t batch = 0;                   // sequences at a time; 0: default_batch
  std::vector<TokenWindows> texts;          // all with one seq
  bool noise_floor = false;                 // needs reference.source
  std::filesystem::path save;               // where the reference is stored; empty: nowhere
  Json protocols = Json::array();           // of the texts, for the stored reference
  bool poison = false;                      // as QuantizeJob::poison
};

struct KlResult {
  std::vector<KlStatistics> texts;  // empty without a model
  KlStatistics all;                 // over the windows of all texts
  std::optional<NoiseFloor> noise;
};

// Throws Error(mismatch) if vocabularies or tokenizers differ or the stored reference is one of
// other tokens or another dtype, Error(out_of_memory) with the plan if the hidden states of both do
// not fit, Error(usage) as perplexity(), Error(numeric) when activations or logits are not finite.
KlResult kl_divergence(const KlJob& job, Report& report);

}  // namespace engine
