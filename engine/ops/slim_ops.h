// Contract: what SliM-LLM adds to the GPTQ sweep (docs/methods/slimllm.md): salience of column
// groups, the weights of the bit search, its loss, and a sweep whose groups have their own widths.
#pragma once

#include <cstdint>

#include "engine/core/view.h"

namespace engine {

// One solve of rows x d weights in blocks of one group. A group of 2 to 8 bits gets an affine grid
// per row, fitted to the weights as they are when the sweep arrives; a group of 1 bit gets
// mu + alpha * sign(w - mu).
struct SlimProblem {
  std::int64_t group = 128;        // columns per group, 1 to 128; divides d
  DType scale_dtype = DType::f32;  // of scales and means: they are rounded before they are used
  bool search = true;              // the scale search; false: the plain range of the group
  double lambda = 1.0;             // weight of the salient elements' error in the search
  View w;                          // f32 [rows, d] in: weights; out: error E = w^ - w
  View r;            // f32 or f64 [d, d], upper triangular with H = R R^T (factor_upper)
  View bits;         // u8 [1, d / group]: the width of each group, 1 to 8
  View middle_zero;  // u8 [1, d / group] or empty: 1 where the zero is 2^(bits-1)
  View scales;       // f32 [rows, d / group] out: scales; alpha in groups of 1 bit
  View zeros;        // i32 [rows, d / group] out; 0 in groups of 1 bit
  View means;        // f32 [rows, d / group] out: mu; 0 in groups of 2 bits and more
  View codes;        // u8 [rows, d] out, one code per byte
  View loss;         // f64 [rows, 1] out: sum over columns of err^2 as in GptqProblem
  View workspace;    // u8 [1, slim_workspace_bytes], at a multiple of 8 bytes
};

class SlimOps {
 public:
  virtual ~SlimOps() = default;

  // What a weight of column j is divided by to give the root of its salience: U_jj, or with
  // `inverse` [H^-1]_jj, where H^-1 = U^T U and U = R^-1. r f32 or f64 [d, d]; out f64 [1, d].
  virtual void slim_divisors(View r, bool inverse, View out) = 0;

  // out[g] = sum over all rows and the columns j of group g of (w_j / divisors[j])^2. w f32, f16 or
  // bf16 [rows, d]; divisors f64 [1, d]; out f64 [1, d / group].
  virtual void slim_salience(View w, View divisors, std::int64_t group, View out) = 0;

  // Rounded to nearest at three widths: base = Q_bits(w), lower = Q_(bits-1)(w) - base and higher =
  // Q_(bits+1)(w) - base, each group of each row on its own plain grid of SlimProblem. All [rows,
  // d] in w's dtype (f32, f16 or bf16); bits 2 to 7.
  virtual void slim_candidates(View w, int bits, std::int64_t group, DType scale_dtype, View base,
                               View lower, View higher) = 0;

  // kl[r] += sum_o a_o (log a_o - log b_o) with a = max(softmax(y[r]), floor) and b =
  // max(softmax(reference[r]), floor), not normalised again. y, reference f32 [rows, n]; kl f64
  // [rows, 1].
  virtual void softmax_kl(View y, View reference, double floor, View kl) = 0;

  virtual void slim_sweep(const SlimProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t slim_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                          std::int64_t group, DType factor) = 0;
};

}  // namespace engine
