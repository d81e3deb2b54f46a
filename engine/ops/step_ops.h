// Contract: what one decoding step needs beyond the other ops. A step's position is data on the
// device, so that the step can be recorded once and replayed.
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/ops/attn_ops.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// Keys and values of one layer for `batch` sequences of at most `capacity` tokens; token p of
// sequence b is row b * capacity + p. Plain (k and v of the compute dtype, scales empty) or 8-bit:
// u8 codes with one f32 scale per token and head; value = scale * (code - 128), rounded to the
// compute dtype when read.
struct KvCache {
  View k, v;              // [batch * capacity, kv_heads * head_dim], compute dtype or u8
  View k_scale, v_scale;  // f32 [batch * capacity, kv_heads], or empty
  std::int64_t batch = 1;
  std::int64_t capacity = 0;

  [[nodiscard]] bool quantized() const { return k.dtype == DType::u8; }
};

struct SampleOptions {
  float temperature = 0;   // 0: greedy
  float top_p = 1;         // above 0, at most 1
  std::uint64_t seed = 0;  // sequence b draws from seed + b
};

// The state of a generation on the device, advanced by sample_step.
struct StepState {
  View token;     // i32 [batch, 1]: the tokens to feed next
  View position;  // i32 [1, 1]: where they stand
  View step;      // i32 [1, 1]: tokens sampled so far
  View history;   // i32 [batch, max steps]: what was sampled
  View bad;       // i32 [1, 1]: rows of logits with NaN or infinity met so far
};

class StepOps {
 public:
  virtual ~StepOps() = default;

  // AttnOps::rope with every row of x at position[0]. position i32 [1, 1].
  virtual void rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) = 0;

  // Row b of k and v [batch, kv_heads * head_dim] becomes token position[0] of sequence b. 8-bit:
  // per head scale = max|x| / 127 in f32 (1 if that is 0), code = 128 + rne(x / scale).
  virtual void kv_append_step(View k, View v, std::int64_t head_dim, const KvCache& cache,
                              View position) = 0;
  // Rows of k and v [n * len, kv_dim] become tokens start .. start + len - 1 of sequences first ..
  // first + n - 1, quantized likewise.
  virtual void kv_append(View k, View v, std::int64_t head_dim, const KvCache& cache,
                         std::int64_t first, std::int64_t n, std::int64_t start) = 0;
  // Tokens 0 .. len - 1 of one sequence as they will be read: k, v [len, kv_dim], compute dtype.
  virtual void kv_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
                       View v) = 0;

  // Causal attention of one query per sequence: row b of q and out [batch, heads * head_dim] sees
  // tokens 0 .. position[0] of sequence b. As AttnOps::attention otherwise.
  // workspace u8 [1, attention_step_bytes], zero before its first use; what an op needs zero of it
  // is left so, and several shapes may share it. A position outside the cache is an error on the
  // cpu and taken as the nearest inside on cuda.
  virtual void attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                              View out, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t attention_step_bytes(const AttnShape& shape,
                                                          std::int64_t batch,
                                                          std::int64_t capacity) const = 0;

  // The next token of each row of logits f32 [batch, vocab]. Greedy: the lowest id among equal
  // maxima. Otherwise probabilities exp((l - max) / temperature) in f64; with top_p < 1 only the
  // smallest set of most likely tokens (ties: lower id first) that reaches top_p of the mass; the
  // token at which the running sum, in that order (top_p = 1: by id), first exceeds
  // uniform_value(seed + b, sampling_stream, step[0]) * mass. Then token, history[:, step], step,
  // position advance; a token beyond the columns of history is not kept there. A row with NaN or
  // infinity counts in `bad` and yields token 0.
  // workspace u8 [1, sample_step_bytes].
  virtual void sample_step(View logits, const SampleOptions& options, const StepState& state,
                           View workspace) = 0;
  [[nodiscard]] virtual std::int64_t sample_step_bytes(std::int64_t batch,
                                                       std::int64_t vocab) const = 0;
};

// The RNG stream of sampling (engine/core/rng.h).
inline constexpr std::uint64_t sampling_stream = 0x73616d706c65;  // "sample"

}  // namespace engine
