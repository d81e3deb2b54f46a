// Contract: what a search over channel scales and clip bounds is made of (docs/methods/awq.md).
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/grid_spec.h"

namespace engine {

// For every row and unit of w, the clip bound that loses least on the sampled inputs of that unit:
//   loss_i = 1/n sum over samples x_u of (x_u . Q(clamp(w_u, lo_i, hi_i)) - x_u . w_u)^2
// where Q is a round trip through the unit's grid, and the first smallest i wins. With m = max|w_u|
// and shrink_i = 1 - i / steps: lo_i = -m shrink_i, hi_i = m shrink_i; with `ends`
// lo_i = min(w_u) shrink_i, hi_i = max(w_u) shrink_i.
struct AwqClipProblem {
  GridSpec grid;
  int steps = 20;
  int candidates = 10;  // i = 0 .. candidates - 1, at most steps and at most 255; 0 clips nothing
  bool ends = false;
  View w;           // f32 or f16 [rows, d]; out: clamped to the bounds found
  View x;           // f32 [n, d], n > 0
  View choice;      // u8 [rows, groups] out: the i found
  View loss;        // f32 [rows, groups] out: its loss
  View plain_loss;  // f32 [rows, groups] out: the loss of i = 0
  View workspace;   // u8 [1, awq_clip_bytes], at a multiple of 8 bytes
};

class AwqOps {
 public:
  virtual ~AwqOps() = default;

  // sums[j] += sum over rows of |x[r, j]|. x f32, f16 or bf16 [m, d]; sums f64 [1, d].
  virtual void add_abs_sums(View x, View sums) = 0;

  // out[r, j] = w[r, j] * s[j] / t[r], each operation rounded to out's dtype. s f32 [1, cols], t
  // f32 [1, rows]; an empty one is 1. w, out f32, f16 or bf16, one shape; out may be w.
  virtual void scale_weights(View w, View s, View t, View out) = 0;

  // out[r, j] = Q(w[r, j] * s[j]) / s[j] with the grids of the scaled weights, each operation
  // rounded to spec.arithmetic and the result to out's dtype. w, out f32, f16 or bf16 [rows, cols];
  // s f32 [1, cols], all positive.
  virtual void round_trip_scaled(View w, View s, const GridSpec& spec, View out) = 0;

  // out f64 [1, 1] = sum over rows r of (a_r - b_r) h (a_r - b_r)^T. a, b f32, f16 or bf16
  // [rows, d]; h f32 [d, d], symmetric, only its lower triangle is read. rows * d * (d + 1) flops.
  virtual void moment_loss(View a, View b, View h, View out, View workspace) = 0;
  // Bytes of its workspace, u8 [1, n] at a multiple of 8 bytes.
  [[nodiscard]] virtual std::int64_t moment_loss_bytes(std::int64_t rows, std::int64_t d) = 0;

  virtual void awq_clip(const AwqClipProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t awq_clip_bytes(std::int64_t rows, std::int64_t d,
                                                    const GridSpec& grid, std::int64_t n) = 0;
};

}  // namespace engine
