// Contract: linears in the kernel layout (engine/weight/packed_weight.h).
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// How a product with a packed weight is computed. All give the same result up to rounding.
enum class PackedKernel : std::uint8_t {
  automatic,  // by rows of x, from a measured table
  vector,     // few rows: weights streamed once per 16 rows of x (others than record kinds: 8)
  matrix,     // weights decoded tile by tile inside the product; others than record kinds: expand
  expand,     // the whole weight decoded into the workspace, then a dense product
};

class PackedOps {
 public:
  virtual ~PackedOps() = default;

  // codes u8 [rows, cols] (below 2^bits); scales f32 [rows * terms, groups], values of
  // shape.scale_dtype; zeros i32 [rows * terms, groups] in 0..255, or empty if !shape.zeros; with
  // two terms, row r of term t is row t * rows + r -> out.records and out.row_units. Columns and
  // rows beyond the matrix get code 0, scale 0 and zero 0.
  virtual void repack(View codes, View scales, View zeros, const PackedWeight& out) = 0;
  // The inverse. zeros are written whether stored or not. Both for record kinds only: other weights
  // are built on the host (engine/weight/scheme_layout.h).
  virtual void unpack(const PackedWeight& w, View codes, View scales, View zeros) = 0;

  // out[r, perm[j]] = value of code j, computed in f32 and rounded once to out's dtype (f32, f16,
  // bf16). out [rows, cols]. Of a weight with transforms: T, without what stands around it.
  virtual void expand(const PackedWeight& w, View out) = 0;

  // out = x w^T or out += x w^T. x [m, cols] f16 or bf16 (cpu: f32, too), out [m, rows] of x's
  // dtype or f32. Products and sums as if in f32: the decoded weight is not rounded, except that
  // expand (and the matrix kernel for two terms, and every kernel for `regions` on a GPU) rounds it
  // to x's dtype, and a codebook's entries are rounded to x's dtype before they are scaled. The
  // vector kernel takes x, for affine weights of 2, 3, 4 and 8 bits on a GPU, as multiples of a
  // power of two: each 128 columns of a row to 2^-15 of their largest magnitude, which keeps bf16
  // values of at least 1/64 of it; a NaN or infinity among them makes the outputs of the row NaN.
  // With transforms, y = L^T (T (R (D x))): on a GPU R (D x) is rounded to x's dtype, the other
  // intermediate results are f32, and rotations of butterflies f16 everywhere (rotation.h).
  // Rounded once on store; adding to a 16-bit out may round the product first. workspace u8 [1,
  // packed_workspace_bytes] at a multiple of 256 bytes.
  virtual void packed_matmul(View x, const PackedWeight& w, View out, bool accumulate,
                             PackedKernel kernel, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t packed_workspace_bytes(const PackedShape& shape,
                                                            std::int64_t rows, DType dtype,
                                                            PackedKernel kernel) const = 0;
};

}  // namespace engine
