// Contract: BiLLM's sweep, which binarizes a linear in blocks of columns (docs/methods/billm.md).
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/view.h"

namespace engine {

// What salient columns are ranked by: w^2 / U_jj^2, or |w|.
enum class BillmMetric : std::uint8_t { hessian, magnitude };

// Whose reconstruction error the two searches minimise: that of the ranked values themselves
// (official code), or that of the weights (paper). With magnitudes both are the same.
enum class BillmSearch : std::uint8_t { saliency, weight };

// The binarizations of a block, in the order of BillmProblem::scales and means. The first three
// cover disjoint weights; `residual` is the second pass over the salient ones.
enum BillmGroup : std::size_t { billm_concentrated, billm_sparse, billm_salient, billm_residual };
inline constexpr std::size_t billm_groups = 4;

inline constexpr std::int64_t billm_max_block = 128;
// Candidates of the break point: the quantiles 0.10, 0.11, ..., 0.90.
inline constexpr std::int64_t billm_first_percent = 10;
inline constexpr std::int64_t billm_last_percent = 90;

// One linear; its rows share the salient columns and the break point of each block.
struct BillmProblem {
  std::int64_t block = 128;       // columns per block, 2..128, divides d
  std::int64_t max_salient = 49;  // salient columns tried: 1..min(max_salient, block - 1)
  int rest_passes = 2;            // passes over the other columns in that search: 1 or 2
  bool with_mean = true;          // false: every mean is 0
  BillmMetric metric = BillmMetric::hessian;
  BillmSearch search = BillmSearch::saliency;
  DType scale_dtype = DType::f32;  // scales and means are rounded to it before they are used
  View w;                          // f32 [rows, d] in: weights, dead columns zero; destroyed
  View r;        // f32 or f64 [d, d], upper triangular with H = R R^T (factor_upper)
  View first;    // u8 [rows, d] out: 1 where a weight is not below its group's mean, else 0
  View second;   // u8 [rows, d] out: other columns: 1 = sparse, 0 = concentrated;
                 // salient columns: the sign of the second pass, as in `first`
  View salient;  // u8 [1, d] out: 1 = salient column
  View percent;  // i32 [1, d / block] out: the break point's quantile, 10..90
  std::array<View, billm_groups> scales;  // f32 [rows, d / block] out; 0 for a group without
  std::array<View, billm_groups> means;   // members in its row
  View loss;       // f64 [rows, 1] out: sum over columns of ((w_j - q_j) / U_jj)^2
  View workspace;  // u8 [1, billm_workspace_bytes], at a multiple of 8 bytes
};

class BillmOps {
 public:
  virtual ~BillmOps() = default;

  // The sweep. sign(0) is +1 in what is stored and 0 in the searches.
  virtual void billm_sweep(const BillmProblem& problem) = 0;
  [[nodiscard]] virtual std::int64_t billm_workspace_bytes(std::int64_t rows, std::int64_t d,
                                                           std::int64_t block, DType factor) = 0;
};

}  // namespace engine
