// Contract: orthogonal transforms of rows (engine/weight/transform.h), and what else decodes
// weights that have them (docs/weights.md).
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/e8.h"
#include "engine/weight/rotation.h"

namespace engine {

class TransformOps {
 public:
  virtual ~TransformOps() = default;

  // out[r, :] = Q x[r, :], with `inverse` Q^T x[r, :], for every row. x, out [m, d], f32, f16 or
  // bf16 each; computed in f32, rounded once. out may be x if they have one dtype.
  virtual void transform_rows(View x, const TransformView& q, bool inverse, View out) = 0;

  // out[c, r] = in[r, c]; f32, f16 or bf16, one dtype. out is not in.
  virtual void transpose(View in, View out) = 0;

  // out[r, j] = scales[r] * (codes[r, j] - (2^bits - 1) / 2). codes u8 [rows, d], one per byte;
  // scales f32 [rows, 1] or [1, 1]; out f32 [rows, d].
  virtual void decode_midrise(View codes, int bits, View scales, View out) = 0;

  // out[r, 8 k + i] = scales[r] * coordinate i of the point codes[r, k], with `accumulate` added to
  // out. codes [rows, d / 8], i16 (the bits of an unsigned code, e8p) or u8 (e8_byte); scales as
  // above; out f32 [rows, d].
  virtual void decode_lattice(View codes, LatticeBook book, View scales, bool accumulate,
                              View out) = 0;

  // out[r, perm[j]] = x[r, j] * diagonal[perm[j]]. x f32, out f32, f16 or bf16 [rows, d], rounded
  // once; perm i32 [1, d] a permutation, or empty: j; diagonal f32 [1, d], or empty: 1.
  virtual void place_columns(View x, View perm, View diagonal, View out) = 0;
};

}  // namespace engine
