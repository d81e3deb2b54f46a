// Contract: what SliM-LLM adds to the GPTQ sweep (docs/methods/slimllm.md): salience of column
// groups, the weights of the bit search, its loss, and a sweep whose groups have their own widths.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "engine/core/view.h"

namespace engine {

// The factors of a group's range that the scale search tries, in its order: 1, then 50 steps up to
// 1.1, then 50 steps down to 0.9. The first of equals wins, so the plain range does unless beaten.
// Steps count from the nearer end, in f32, as torch.linspace does.
constexpr int slim_ranges = 101;
inline std::array<float, slim_ranges> slim_range_factors() {
  std::array<float, slim_ranges> p{};
  p[0] = 1.0F;
  constexpr int steps = 50;
  std::size_t at = 1;
  for (const float end : {1.1F, 0.9F}) {
    const float step = (end - 1.0F) / static_cast<float>(steps);
    for (int i = 1; i <= steps; ++i) {
      p[at++] = i <= steps / 2 ? 1.0F + step * static_cast<float>(i)
                               : end - step * static_cast<float>(steps - i);
    }
  }
  return p;
}

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

// A stored linear: codes of groups with widths of their own, and what they mean.
struct SlimDecode {
  std::int64_t group = 128;  // columns per group; divides d
  View bits;                 // u8 [1, d / group]: 1 for signs, more for affine codes
  View codes;                // u8 [rows, d], one code per byte
  View scales, means;        // f32 [rows, d / group]; means of groups of 1 bit only
  View zeros;                // i32 [rows, d / group]; of groups of 2 bits and more
  View out;                  // f32, f16 or bf16 [rows, d]: scale * (code - zero), mean +- scale
};

class SlimOps {
 public:
  virtual ~SlimOps() = default;

  // What a weight of column j is divided by to give the root of its salience: U_jj, or with
  // `inverse` [H^-1]_jj, where H^-1 = U^T U and U = R^-1. r f32 or f64 [d, d]; out f64 [1, d];
  // workspace u8 [1, slim_divisors_bytes] at a multiple of 8 bytes, empty if that is 0.
  virtual void slim_divisors(View r, bool inverse, View out, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t slim_divisors_bytes(std::int64_t d, bool inverse,
                                                         DType factor) = 0;

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

  virtual void slim_decode(const SlimDecode& problem) = 0;
};

}  // namespace engine
