// Perplexity by the protocol of docs/protocols.md: disjoint windows, fresh context in each, the
// mean next-token loss inside a window, exp of the mean over windows. Layer-streamed.
#pragma once

#include <string>
#include <vector>

#include "eval/model_pass.h"
#include "formats/dataset.h"
#include "formats/tokenizer.h"

namespace engine {

enum class BosPolicy : std::uint8_t {
  model,         // stream_start if the model's tokenizer adds BOS, else none
  stream_start,  // one BOS in front of the whole text
  per_window,    // every window is BOS and seq - 1 tokens of text
  none,
};
[[nodiscard]] const char* bos_policy_name(BosPolicy policy);

struct EvalText {
  std::string file;  // text, FILE.safetensors:TENSOR of token ids, or "synthetic:COUNT"
  Dataset dataset = Dataset::plain;
};

// One text as windows, with everything that names the figure's protocol.
struct EvalWindows {
  TokenWindows tokens;
  Json protocol;
};

// Throws Error(usage) for a text shorter than one window.
EvalWindows load_eval_windows(const EvalText& text, const WeightSource& source,
                              const Tokenizer* tokenizer, std::int64_t seq, BosPolicy bos,
                              std::int64_t limit);

struct PplResult {
  std::vector<double> window_nll;  // mean loss of each window, nats
  double perplexity = 0;           // exp(mean of window_nll)
  double standard_error = 0;       // of the mean loss, over windows
};

struct PplJob : EvalModel {
  std::int64_t batch = 0;           // sequences at a time; 0: default_batch
  std::vector<TokenWindows> texts;  // all with one seq
  bool poison = false;              // as QuantizeJob::poison
};

// One result per text, all in one pass over the weights. Fills the report's plan and times.
// Throws Error(usage) if exec is packed and a linear has no packed kernel or none is packed,
// Error(numeric) when activations or losses are not finite.
std::vector<PplResult> perplexity(const PplJob& job, Report& report);

// Floating-point operations of one forward pass over the windows, causal attention counted once.
[[nodiscard]] double forward_flops(const ModelConfig& config, std::int64_t windows,
                                   std::int64_t seq);

}  // namespace engine
