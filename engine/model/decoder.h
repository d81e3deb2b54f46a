// Generation: the whole model resident, one KV cache, a prompt pass and one step per token.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/core/report.h"
#include "engine/model/source.h"

namespace engine {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy
  double top_p = 1;
  std::uint64_t seed = 0;
};

// The next token from one row of logits. Greedy takes the lowest id among equal maxima. Sampling
// uses the counter RNG at (seed, step), so a token depends on nothing but its own step.
[[nodiscard]] std::int32_t sample_token(std::span<const float> logits,
                                        const SamplingOptions& options, std::uint64_t step);

class Decoder {
 public:
  // Loads every weight. `capacity` bounds prompt plus generated tokens.
  Decoder(WeightSource& source, Ops& ops, Ledger& ledger, DType dtype, std::int64_t capacity);

  // Feeds tokens after those already fed and returns the logits after the last one, f32 [vocab].
  // Throws Error(usage) beyond the capacity, Error(numeric) for logits that are not finite.
  std::span<const float> feed(std::span<const std::int32_t> tokens);
  // Logits of all rows of one feed, f32 [tokens, vocab]; for tests and small prompts.
  std::vector<float> feed_all_logits(std::span<const std::int32_t> tokens);

  [[nodiscard]] std::int64_t position() const { return position_; }
  [[nodiscard]] std::int64_t capacity() const { return capacity_; }
  // Forgets all tokens.
  void reset() { position_ = 0; }

 private:
  static constexpr std::int64_t max_chunk = 512;  // prompt tokens at a time
  void layout(Arena& arena);
  void load(Arena& arena);
  // Runs tokens (at most max_chunk) through all blocks; h_ then holds the normed rows.
  void forward(std::span<const std::int32_t> tokens);

  WeightSource& source_;
  Ops& ops_;
  Ledger& ledger_;
  DType dtype_;
  std::int64_t capacity_;
  std::int64_t position_ = 0;
  std::unique_ptr<Arena> arena_;
  View embedding_, final_norm_, head_;
  std::vector<BlockWeights> blocks_;
  std::vector<KvLayer> cache_;
  RopeTable rope_;
  BlockScratch scratch_;
  View ids_, x_, logits_;
  std::vector<float> host_logits_;
};

}  // namespace engine
