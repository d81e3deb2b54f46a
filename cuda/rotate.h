// Rows of a decoding step turned by the transforms around packed weights
// (engine/weight/rotation.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "engine/core/view.h"
#include "engine/weight/rotation.h"

namespace engine {

inline constexpr int rotate_max_parts = 3;

// One of several that run side by side.
struct RotatePart {
  const TransformView* q = nullptr;
  View places;    // of a butterfly: the inverse of perm_out; empty where that is
  View diagonal;  // f32 [1, d] that the input is multiplied with first, or empty
  View in, out;   // [rows, d], f32, f16 or bf16; not the same memory
};

// out = factor Q in, or out += factor Q in; `inverse`: Q^T, hadamard only. All parts have the same
// rows, and transforms of one kind, not none. In f32, rounded once; adding rounds once, too.
// Through launch_chained. scratch: of each part f32 [rows, d] one after another, for butterflies
// only, whose rotations are f16. shared_limit: bytes of shared memory that a block may have.
void rotate_rows(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                 View scratch, std::size_t shared_limit, cudaStream_t stream);

// Whether a block has room for a transform of this kind and size.
[[nodiscard]] bool rotate_fits(const RotationSide& side, std::int64_t d, std::size_t shared_limit);

// Parts of rotate_rows, by kind.
void rotate_hadamard(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                     std::size_t shared_limit, cudaStream_t stream);
void rotate_butterfly(std::span<const RotatePart> parts, bool add, float factor, View scratch,
                      cudaStream_t stream);

// out = factor in diag(diagonal) for any number of rows; diagonal may be empty.
void scale_columns(View in, View diagonal, float factor, View out, cudaStream_t stream);
// out = factor in, or out += factor in.
void put_rows(View in, float factor, bool add, View out, cudaStream_t stream);

}  // namespace engine
