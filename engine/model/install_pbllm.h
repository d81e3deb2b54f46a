// Decoding on the device of one pattern of the weight algebra: signs off a bitmap and affine codes
// on it, both compact, as PB-LLM stores them (docs/methods/pbllm.md).
#pragma once

#include <optional>
#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// Plane indices; -1 means absent.
struct PbllmPattern {
  int bitmap = -1;
  int signs = -1;
  int scales = -1;  // [rows, 1] or [rows, groups] of the same width
  int means = -1;   // like scales
  int high_bits = 0;
  int high_codes = -1;
  int high_scales = -1;  // [rows, 1]
  int high_zeros = -1;   // [rows, 1]; -1: 2^(high_bits-1)
};

// By structure only, like the patterns of engine/weight/pattern.h.
[[nodiscard]] std::optional<PbllmPattern> match_pbllm(const LinearWeight& weight);

// out [rows, cols], f32, f16 or bf16. Validates first; takes memory from the loader's arena within
// a scope. Waits until the host bytes are no longer needed.
void install_pbllm(const LinearWeight& weight, const PbllmPattern& pattern, const std::string& name,
                   Loader& loader, View out);

// The memory alone, for plans.
void plan_install_pbllm(const LinearWeight& weight, const PbllmPattern& pattern, Arena& arena);

}  // namespace engine
