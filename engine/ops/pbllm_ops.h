// Contract: PB-LLM's choice of salient weights and its sweep (docs/methods/pbllm.md).
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/grid_spec.h"

namespace engine {

// What weights are ranked by: w^2 / U_jj^2 (U = R^-1), or |w|.
enum class PbllmMetric : std::uint8_t { hessian, magnitude };

// One linear before its sweep: which weights are binarized, and the two levels of each row and
// group of columns.
struct PbllmSelect {
  PbllmMetric metric = PbllmMetric::hessian;
  std::int64_t group = 0;          // columns of a group, divides d; 0: all columns
  double low_share = 0.9;          // of a group's weights that are binarized, in [0, 1)
  DType scale_dtype = DType::f32;  // means and scales are rounded to it
  View w;                          // f32 [rows, d], dead columns zero
  View r;        // f32 or f64 [d, d] (factor_upper), of which the diagonal is read; metric hessian
  View salient;  // u8 [rows, d] out: 1 = salient. In a group of n weights a weight is binarized if
                 // its rank value is at most the one at place floor(n low_share), counted from 0
                 // in increasing order, so at least one is
  View means;    // f32 [rows, groups] out: sum of the binarized weights / columns of the group
  View scales;   // f32 [rows, groups] out: (sum |w - mean| of these + salient ones * |mean|) / the
                 // same number of columns
  View workspace;  // u8 [1, pbllm_select_bytes], at a multiple of 8 bytes
};

// The sweep over linears of one input, row by row: salient and scales as found before.
struct PbllmProblem {
  GridSpec high;             // of the salient weights, one unit per row (group 0)
  std::int64_t block = 128;  // columns per block, at most 128
  bool compensate = true;    // false: each weight is rounded as it is
  View w;                    // f32 [rows, d] in: weights; out: error E = w^ - w
  View r;                    // f32 or f64 [d, d], upper triangular with H = R R^T (factor_upper)
  View salient;              // u8 [rows, d]
  View means, scales;        // f32 [rows, groups]; groups divides d
  View high_scales;          // f32 [rows, 1]
  View high_zeros;           // i32 [rows, 1]
  View codes;      // u8 [rows, d] out: a code of `high`, or 1 = mean + scale, 0 = mean - scale
  View loss;       // f64 [rows, 1] out: sum over columns of err^2 where err = (w_j - q) / U_jj
  View workspace;  // u8 [1, pbllm_workspace_bytes], at a multiple of 8 bytes
};

class PbllmOps {
 public:
  virtual ~PbllmOps() = default;

  virtual void pbllm_select(const PbllmSelect& problem) = 0;
  [[nodiscard]] virtual std::int64_t pbllm_select_bytes(std::int64_t rows, std::int64_t d,
                                                        std::int64_t groups) = 0;
  // A weight equal to its mean takes the upper level.
  virtual void pbllm_sweep(const PbllmProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t pbllm_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                           std::int64_t block, DType factor) = 0;
};

}  // namespace engine
