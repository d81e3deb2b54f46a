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

// A stored linear, as engine/quant/methods/pbllm.cpp packs it: codes of `high_bits` bits on a
// bitmap and signs off it, both compact (one row of codes in row-major order of their weights).
struct PbllmDecode {
  int high_bits = 8;  // 1 to 8
  View bitmap;        // u8 [rows, ceil(d / 8)], 1-bit codes: 1 = salient
  View signs;         // u8 [1, ceil(low / 8)], 1-bit codes; low: zeros of the bitmap
  View high;          // u8 [1, ceil(ones * high_bits / 8)]; ones: of the bitmap
  View means;         // f32 [rows, groups] or empty (0); groups divides d
  View scales;        // f32 [rows, groups]
  View high_scales;   // f32 [rows, 1]
  View high_zeros;    // i32 [rows, 1]
  View out;           // f32, f16 or bf16 [rows, d]: scale * (code - zero), or mean + or - scale
  View workspace;     // u8 [1, pbllm_decode_bytes], at a multiple of 8 bytes
};

// Of PbllmDecode::workspace, on every device.
[[nodiscard]] inline std::int64_t pbllm_decode_bytes(std::int64_t rows) { return rows * 8; }

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

  // Codes by their mask: out u8 [1, n] holds the codes where mask is 0 and then those where it is
  // 1, each in row-major order, and ones i32 [1, 1] how many the latter are. mask (0 or 1) and
  // codes u8 [rows, d], n = rows * d below 2^31; workspace u8 [1, pbllm_split_bytes], at a multiple
  // of 8 bytes. out is neither mask nor codes.
  virtual void pbllm_split(View mask, View codes, View out, View ones, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t pbllm_split_bytes(std::int64_t rows, std::int64_t d) = 0;

  virtual void pbllm_decode(const PbllmDecode& problem) = 0;
};

}  // namespace engine
