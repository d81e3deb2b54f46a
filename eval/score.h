// Log-likelihoods of continuations: the one computation behind all choice tasks. Layer-streamed;
// tokens that requests share at their beginning are computed once, and sequences of any length are
// packed without padding.
#pragma once

#include <cstdint>
#include <vector>

#include "eval/model_pass.h"

namespace engine {

// A sequence whose last `scored` tokens are scored, each given all tokens before it.
struct ScoreRequest {
  std::vector<std::int32_t> tokens;  // at least scored + 1
  std::int64_t scored = 0;           // at least 1
};

struct ScoreJob : EvalModel {
  std::vector<ScoreRequest> requests;
  bool share = true;            // compute common beginnings once
  bool pack = true;             // several sequences at a time
  std::int64_t batch_rows = 0;  // tokens at a time; 0: chosen from the device
  std::int64_t pass_rows = 0;   // tokens per pass over the weights; 0: as many as memory holds
  bool poison = false;          // as QuantizeJob::poison
};

struct ScoreResult {
  std::vector<double> log_likelihood;  // nats, one per request, in their order
};

// Fills the report's plan, times and "packing". Throws Error(usage) for requests that are empty or
// longer than the model's positions, Error(mismatch) for tokens outside its vocabulary,
// Error(numeric) when activations or losses are not finite.
ScoreResult score(const ScoreJob& job, Report& report);

}  // namespace engine
