// Contract: QuIP's rounding with linear feedback, and what prepares it (docs/methods/quip.md).
#pragma once

#include <cstdint>

#include "engine/core/view.h"

namespace engine {

// Columns one after another, each rounded to the nearest code (a tie up) after the errors so far:
//   c_j = w_j - sum over k < j of E_k R_kj / R_jj
//   code_j = clamp(floor(c_j + 1/2), 0, 2^bits - 1),  E_j = code_j - w_j
// With H = R R^T that is LDLQ from the last column to the first of an H in reversed order.
struct LdlqProblem {
  int bits = 2;    // 1..8
  View w;          // f32 [rows, d] in: targets in units of codes, columns in solving order; out: E
  View r;          // f32 or f64 [d, d], upper triangular (factor_upper)
  View codes;      // u8 [rows, d] out
  View loss;       // f64 [rows, 1] out: E H E^T, as the sum of (R_jj (code_j - c_j))^2
  View workspace;  // u8 [1, ldlq_workspace_bytes], at a multiple of 8 bytes
};

// One pass of greedy coordinate descent, in solving order: with x_j = sum over k of E_k H_kj / H_jj
//   step_j = code_j - rne(code_j - x_j);  code_j -= step_j;  E_j -= step_j
// and at the end codes are clamped to 0 .. 2^bits - 1, while E stays as it is.
struct GreedyProblem {
  int bits = 2;
  View e;          // f32 [rows, d] in and out
  View h;          // f32 [d, d], symmetric, both triangles
  View codes;      // u8 [rows, d] in and out
  View changed;    // i32 [rows, 1] out: codes that the pass left different
  View workspace;  // u8 [1, greedy_workspace_bytes], at a multiple of 8 bytes
};

class QuipOps {
 public:
  virtual ~QuipOps() = default;

  // out[j] = sum over rows of w[r, j]^2. w f32, f16 or bf16 [rows, cols]; out f64 [1, cols].
  virtual void column_squares(View w, View out) = 0;

  // out[i, j] = scale * (s[i] * s[j]) * h[max(i, j), min(i, j)], in f64, rounded once. h, out f32
  // [d, d], of h only the lower triangle is read; s f32 [1, d], empty: 1. out is not h.
  virtual void scale_moment(View h, View s, double scale, View out) = 0;

  // out[r, j] = clamp(w[r, perm[j]] / scale + zero, 0, 2^bits - 1), in f32. scales f32 [rows, 1] or
  // [1, 1]; zeros i32 of the same shape, or empty: (2^bits - 1) / 2. perm i32 [1, cols]. w, out f32
  // [rows, cols]; out is not w.
  virtual void code_targets(View w, View perm, View scales, View zeros, int bits, View out) = 0;

  virtual void ldlq_sweep(const LdlqProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t ldlq_workspace_bytes(std::int64_t rows, std::int64_t d) = 0;

  virtual void ldlq_greedy(const GreedyProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t greedy_workspace_bytes(std::int64_t rows, std::int64_t d) = 0;
};

}  // namespace engine
