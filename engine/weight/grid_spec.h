// What a uniform quantization grid is: shared by the ops, the codec and the methods.
#pragma once

#include <cstdint>

#include "engine/core/dtype.h"
#include "engine/core/error.h"

namespace engine {

// How scale and zero follow from a unit's minimum and maximum (docs/methods/rtn.md).
enum class GridRule : std::uint8_t {
  gptq,       // V-G: zero forced into the range, no epsilon
  awq,        // V-A: plain range, step at least 1e-5/N, zero clamped into the codes
  omniquant,  // V-O: step clamped to [1e-5, 1e4], zero may leave the codes
  paper,      // V-P: the study's Eq. 1, no clamps
};

// A unit is a row (`group` == 0) or `group` consecutive columns of a row; the last unit of a row
// may be shorter. Codes are 0..2^bits-1 and w^ = scale * (code - zero).
struct GridSpec {
  int bits = 4;              // 1..8
  std::int64_t group = 128;  // 0: one unit per row
  GridRule rule = GridRule::gptq;
  bool symmetric = false;  // rule gptq only: zero = 2^(bits-1)
  bool mse = false;        // rule gptq only: shrink search on |error|^2.4
  // Rule awq only: the step is the width times 1 / N instead of the width over N. That is how
  // PyTorch divides by a number on a GPU. It decides the zero of a unit clipped at both ends, -lo /
  // s = N / 2.
  bool reciprocal = false;
  // Arithmetic of the rule, every operation rounded to it: f32, or f16 as AWQ's and OmniQuant's
  // code computes on half-precision weights.
  DType arithmetic = DType::f32;
  // The dtype the scale is stored in. It is rounded first and then used, so that what is evaluated
  // is what is stored: f32, f16 or bf16.
  DType scale_dtype = DType::f32;

  [[nodiscard]] std::int64_t groups(std::int64_t cols) const {
    return group == 0 ? 1 : (cols + group - 1) / group;
  }
  [[nodiscard]] std::int64_t unit(std::int64_t cols) const { return group == 0 ? cols : group; }
  [[nodiscard]] int max_code() const { return (1 << bits) - 1; }
};

}  // namespace engine
