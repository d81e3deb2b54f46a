// Products with packed weights that have transforms around them.
#pragma once

#include <span>

#include "cuda/scheme.h"

namespace engine {

// Rows of x up to which inputs and outputs are turned by kernels of the decode step.
inline constexpr std::int64_t rotated_max_rows = 16;

// Whether products with such weights can go together.
[[nodiscard]] bool rotated_compatible(const PackedShape& a, const PackedShape& b);
// Bytes that a product takes with one weight, and whether a device has room for its kernels.
[[nodiscard]] std::int64_t rotated_bytes(const PackedShape& shape, std::int64_t rows);
[[nodiscard]] bool rotated_fits(const PackedShape& shape, const SchemeDevice& device);

// out = x w^T, or out += x w^T, for 1 to scheme_max_parts compatible weights, in three steps each
// of one or two launches for all: inputs turned (rounded to x's dtype; f16: 1/32 of them, so that
// none overflows), products in f32, outputs turned. x [any, cols] f16 or bf16. workspace u8 of at
// least the sum of rotated_bytes, at a multiple of 256 bytes.
void rotated_product(View x, std::span<const SchemePart> parts, bool accumulate,
                     const SchemeDevice& device, View workspace, cudaStream_t stream);

}  // namespace engine
