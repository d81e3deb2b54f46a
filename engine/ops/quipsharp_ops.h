// Contract: QuIP#'s rounding of rotated weights to lattice points (docs/methods/quipsharp.md).
#pragma once

#include <cstdint>

#include "engine/core/view.h"

namespace engine {

// Columns are in solving order, which is the weight's own order reversed: column j here is column
// d - 1 - j there. Blocks of 8 columns, one code (or two) each; inside a block the point's
// coordinates run as in the weight. With D = w - w^ and blocks k:
//   first pass, k ascending:  t = w_k + sum over j < k of D_j R_jk R_kk^-1
//   tuning, k ascending:      t = w_k + sum over j != k of D_j H_jk H_kk^-1
//   w^_k = the value of the code nearest to t (e8_search.h), D_k = w_k - w^_k
// The second t is where the loss D H D^T is least in block k with all other blocks as they are.
struct QuipSharpProblem {
  int bits = 2;     // 2, 3 or 4 per weight
  int tuning = 10;  // passes after the first
  View w;           // f32 [rows, d], in units of the points
  View r;           // f32 or f64 [d, d], upper triangular with H = R R^T (factor_upper)
  View h;           // f32 [d, d], both triangles
  View e;           // f32 [rows, d] out: D
  View codes;       // i16 [rows, d / 8] out, bits of e8p codes, in the weight's own order
  View residual;    // the same (4 bits), u8 of e8_byte (3 bits), or empty (2 bits)
  View loss;        // f64 [rows, 1] out: D H D^T
  View workspace;   // u8 [1, quipsharp_workspace_bytes], at a multiple of 8 bytes
};

// Fails (REQUIRE) on shapes and dtypes that do not fit each other, for every backend.
void check_quipsharp(const QuipSharpProblem& p, std::int64_t workspace_bytes);

class QuipSharpOps {
 public:
  virtual ~QuipSharpOps() = default;

  // out[r, j] = w[d - 1 - j, r] / scale, scale = sqrt(squares / (rows d)) / factor: the transpose,
  // in solving order, with a mean square of factor^2 (of zeros: scale 1). w f32 [d, rows]; squares
  // f64 [1, 1], the sum of its squares; out f32 [rows, d]; scale f32 [1, 1] out.
  virtual void quipsharp_targets(View w, View squares, double factor, View out, View scale) = 0;

  virtual void quipsharp_sweep(const QuipSharpProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t quipsharp_workspace_bytes(std::int64_t rows,
                                                               std::int64_t d) = 0;
};

}  // namespace engine
