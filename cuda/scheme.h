// Products with weights in the layouts of engine/weight/scheme_layout.h, and such weights as dense
// matrices: mixed widths, salient weights between signs, regions of signs, midrise grids, lattices.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "engine/core/view.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// Up to here streaming the weights once or twice is faster than expanding them.
inline constexpr std::int64_t scheme_max_rows = 16;
// Weights that one launch can take.
inline constexpr int scheme_max_parts = 3;

struct SchemeDevice {
  int multiprocessors = 0;
  std::int64_t shared_bytes = 0;  // the most that a block may have
};

struct SchemePart {
  const PackedWeight* w = nullptr;
  View out;  // [rows of x, rows of w], x's dtype or f32
  View x;  // [rows of x, cols of w]: its own input; another one than x for midrise and lattice only
};

// Whether a product with such a weight finds room in shared memory.
[[nodiscard]] bool scheme_fits(const PackedShape& shape, const SchemeDevice& device);
// Whether they can share a launch: same kind, inputs and coefficients.
[[nodiscard]] bool scheme_compatible(const PackedShape& a, const PackedShape& b);

// out = x w^T, or out += x w^T, with x of the part, for 1 to scheme_max_parts compatible weights. x
// [any, cols], f16 or bf16; as many rows at a time as find room, at most 8. No workspace; nothing
// of the host's is waited for. Products and sums in f32; `regions` rounds weights to x's dtype.
void scheme_product(View x, std::span<const SchemePart> parts, bool accumulate,
                    const SchemeDevice& device, cudaStream_t stream);

// As PackedOps::expand.
void scheme_expand(const PackedWeight& w, View out, cudaStream_t stream);
// midrise and lattice.
void lattice_expand(const PackedWeight& w, View out, cudaStream_t stream);

}  // namespace engine
