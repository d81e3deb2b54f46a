// Contract: uniform grids, packing, second moments, factorisation and the GPTQ sweep.
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/grid_spec.h"

namespace engine {

// One GPTQ solve (docs/methods/gptq.md). rows x d weights, columns already in solving order.
struct GptqProblem {
  GridSpec grid;
  std::int64_t block = 128;  // columns per block, at most 128; divides grid.group unless that is 0
  bool grids_given = false;  // scales and zeros are inputs (per-channel or static groups)
  View w;                    // f32 [rows, d] in: weights; out: error E = w^ - w
  View r;                    // f32 or f64 [d, d], upper triangular with H = R R^T (factor_upper)
  View column_group;  // i32 [1, d] or empty: the unit of column j (static groups under act-order);
                      // empty: j / group
  View scales;        // f32 [rows, groups]
  View zeros;         // i32 [rows, groups]
  View codes;         // u8 [rows, d] out, one code per byte
  View loss;          // f64 [rows, 1] out: sum over columns of err^2 where err = (w_j - q) / U_jj
  View workspace;     // u8 [1, gptq_workspace_bytes], at a multiple of 8 bytes
};

class QuantOps {
 public:
  virtual ~QuantOps() = default;

  // scales f32 [rows, groups] (already rounded to spec.scale_dtype) and zeros i32 [rows, groups] of
  // every unit of w (f32, f16 or bf16, [rows, cols]).
  virtual void find_grid(View w, const GridSpec& spec, View scales, View zeros) = 0;

  // codes u8 [rows, cols] = clamp(rne(w / s) + z, 0, 2^bits - 1) with an IEEE division, by
  // spec.arithmetic. column_group i32 [1, cols] or empty, as in GptqProblem.
  virtual void quantize_codes(View w, const GridSpec& spec, View scales, View zeros,
                              View column_group, View codes) = 0;

  // out[r, perm[j]] (perm empty: out[r, j]) = s * (code - z), the product rounded to
  // spec.arithmetic and then to out's dtype (f32, f16, bf16). codes u8 [rows, cols].
  virtual void dequantize_codes(View codes, const GridSpec& spec, View scales, View zeros,
                                View column_group, View perm, View out) = 0;

  // codes u8 [rows, cols] <-> LSB-first rows of ceil(cols * bits / 8) bytes (packed u8).
  virtual void pack_codes(View codes, int bits, View packed) = 0;
  virtual void unpack_codes(View packed, int bits, View codes) = 0;

  // The triangle i >= j of h += x^T x; x [m, k] f32/f16/bf16, h f32 [k, k]; products of 16-bit
  // inputs are exact, accumulation is f32. What happens above the diagonal is unspecified.
  // m * k * (k + 1) flops.
  virtual void gram(View x, View h) = 0;

  // out f32 [1, d]: the diagonal of h.
  virtual void diagonal(View h, View out) = 0;

  // The matrix to factor: a[i, j] = scale * h[perm[i], perm[j]] (perm i32 [1, d] or empty), read
  // from h's lower triangle, with dead inputs (diagonal exactly 0) given diagonal 1, and then damp
  // * mean(diagonal) added to the diagonal. a f32 or f64 [d, d], both triangles written. dead u8
  // [1, d]: 1 where dead, in the order of a. damping f64 [1, 1] out: the value added.
  virtual void damp_hessian(View h, View perm, double scale, double damp, View a, View dead,
                            View damping) = 0;

  // In place: a (symmetric) becomes upper triangular R with a = R R^T; below the diagonal zeros.
  // Returns false when a is not positive definite (a is then destroyed). workspace u8
  // [1, factor_workspace_bytes], at a multiple of 8 bytes. Synchronises.
  [[nodiscard]] virtual bool factor_upper(View a, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t factor_workspace_bytes(std::int64_t d, DType dtype) = 0;

  // out[:, j] = in[:, perm[j]], f32/f16/bf16 in -> f32 out, or u8 -> u8 (codes; no dead then). perm
  // empty: conversion only. Columns with dead[j] != 0 (dead u8 [1, d] in the order of out, or
  // empty) become 0. in is not out.
  virtual void gather_columns(View in, View perm, View dead, View out) = 0;

  virtual void gptq_sweep(const GptqProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t gptq_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                          std::int64_t block, DType factor) = 0;
};

}  // namespace engine
