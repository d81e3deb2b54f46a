// Bit accounting of one linear layer.
#pragma once

#include <cstdint>

#include "engine/weight/linear_weight.h"

namespace engine {

struct WeightBits {
  // Code bits of the terms (16 or 32 for dense ones), each weighted by the share of weights it
  // covers: what papers quote. Coefficients, supports and permutations do not count.
  double nominal = 0;
  // Raw bytes of all planes * 8 / weights: what the layer really takes before compression. A plane
  // that several layers share is counted in each.
  double stored = 0;
};

[[nodiscard]] std::int64_t stored_bytes(const LinearWeight& weight);

// Expects a validated weight. Supports with a bitmap need the bitmap's data.
[[nodiscard]] WeightBits weight_bits(const LinearWeight& weight);

}  // namespace engine
