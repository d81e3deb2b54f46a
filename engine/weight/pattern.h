// Patterns of the weight algebra that fast paths exist for, and names for reports.
// They look at the structure only: a plane's data may be null, and a validated weight is expected.
#pragma once

#include <optional>
#include <string>

#include "engine/weight/grid_spec.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// One affine term over everything, by row or by group, with optional permutation and column
// groups: what QuantOps::dequantize_codes computes. Plane indices; -1 means absent.
struct AffinePattern {
  // bits, group (0: one unit per row), symmetric, arithmetic (= the grid's product) and scale_dtype
  // are set; `rule` and `mse` say how a grid was found, which a weight does not know: defaults.
  GridSpec grid;
  int codes = -1;
  int scales = -1;         // [rows, grid.groups(cols)]
  int zeros = -1;          // same shape; -1: 2^(bits-1) everywhere
  int permutation = -1;    // i32 [1, cols]
  int column_groups = -1;  // i32 [1, cols]
};

// One dense term over everything, no permutation, no diagonal.
struct DensePattern {
  int dense = -1;
  DType dtype = DType::bf16;
};

// nullopt when the weight is something else.
[[nodiscard]] std::optional<AffinePattern> match_affine(const LinearWeight& weight);
[[nodiscard]] std::optional<DensePattern> match_dense(const LinearWeight& weight);

// For reports and error messages, e.g. "affine4 g128 asym f16-scale permuted", "dense bf16",
// "sign g128 f16-scale mu off-bitmap + affine8 row sym f32-scale on-bitmap compact".
[[nodiscard]] std::string scheme_name(const LinearWeight& weight);

}  // namespace engine
