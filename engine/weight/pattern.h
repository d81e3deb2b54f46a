// Patterns of the weight algebra that fast paths exist for, and names for reports.
// They look at the structure only: a plane's data may be null, and a validated weight is expected.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "engine/weight/grid_spec.h"
#include "engine/weight/linear_weight.h"
#include "engine/weight/packed_weight.h"

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

// What the kernel layout (engine/weight/packed_weight.h) holds: one affine term, one term with a
// 4-bit codebook, or two affine terms of one bit with the same grid. By row or by group,
// everywhere, with optional permutation. Plane indices; -1 means absent. Three things the structure
// leaves open:
// - Stored zeros must lie in 0..255 for the layout; only the data can tell.
// - With column groups (always together with a permutation: act-order with groups of W's columns)
//   the codes have to be brought into the order of W first, and are then only packable if column j
//   of W is in group j / shape.group. The layout then needs no permutation.
// - A grid's product in f16 is accepted; kernels do not round the product, so their weights differ
//   from decode_linear's by that rounding.
struct PackedPattern {
  PackedShape shape;                     // a group that is the whole row counts as by row (group 0)
  std::array<int, 2> codes = {-1, -1};   // of each term
  std::array<int, 2> scales = {-1, -1};  // [rows, shape.groups()]
  std::array<int, 2> zeros = {-1, -1};   // same shape; absent unless shape.zeros
  int book = -1;                         // f32, f16 or bf16 [1, 16], codebook only
  int permutation = -1;                  // i32 [1, cols]
  int column_groups = -1;                // i32 [1, cols]
};

// nullopt when the weight is something else.
[[nodiscard]] std::optional<AffinePattern> match_affine(const LinearWeight& weight);
[[nodiscard]] std::optional<DensePattern> match_dense(const LinearWeight& weight);
[[nodiscard]] std::optional<PackedPattern> match_packable(const LinearWeight& weight);

// For reports and error messages, e.g. "affine4 g128 asym f16-scale permuted", "dense bf16",
// "sign g128 f16-scale mu off-bitmap + affine8 row sym f32-scale on-bitmap compact".
[[nodiscard]] std::string scheme_name(const LinearWeight& weight);

}  // namespace engine
