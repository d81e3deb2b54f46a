// Products of at most 16 rows of activations with linears, streaming the weights once: the decode
// step's kernel, for packed and for dense weights, with what surrounds the product fused in.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "engine/core/view.h"
#include "engine/weight/packed_weight.h"

namespace engine {

inline constexpr std::int64_t vector_max_rows = 16;
// Of affine weights of 2, 3, 4 and 8 bits; vector_fits() says no to more.
inline constexpr std::int64_t vector_max_int_rows = 8;
// Products that one launch can compute one after another.
inline constexpr int vector_max_phases = 4;

// What becomes of the products.
enum class VectorEpilogue : std::uint8_t {
  store,  // out = p
  add,    // out += p
  silu,   // out = silu(p of segment 0) * (p of segment 1), each rounded first
  qkv,    // segments 0 and 1 are rotated (rope), then all three are stored
};

// One of up to three linears that share the input.
struct VectorSegment {
  const Linear* w = nullptr;
  void* out = nullptr;          // [rows of x, rows of w]
  std::int64_t out_stride = 0;  // elements between rows of x
  // Elements by which `out` moves per position (qkv: into the cache), 0 elsewhere.
  std::int64_t position_stride = 0;
};

struct VectorProblem {
  View x;     // [m, cols], m <= vector_max_rows, f16 or bf16
  View norm;  // [1, cols]: x is rmsnorm'ed by it first; or empty
  float eps = 0;
  VectorSegment segment[3];
  int segments = 1;
  DType out_dtype = DType::bf16;  // x's dtype, or f32 (store and add)
  VectorEpilogue epilogue = VectorEpilogue::store;
  std::int64_t head_dim = 0;   // qkv: 32, 64, 128 or 256
  View cos, sin, position;     // qkv
  std::int64_t positions = 0;  // qkv: what lies at or beyond this position is not stored
};

// Device resources the kernel uses between its blocks; one launch of a stream at a time.
struct VectorResources {
  int multiprocessors = 0;
  std::int64_t shared_bytes = 0;  // the most that a block may have
  // The code that runs was compiled for sm_90 or later: vector_chain takes several products, and
  // there is vector_wide_product.
  bool sm90 = false;
  View partials;  // f32 [1, n]
  View counters;  // i32 [1, n], zero, and left zero
  View arrivals;  // i32 [1, vector_max_phases], zero, and left zero
};

// Whether the linears can share a launch: same kind, shape parameters, input and permutation.
[[nodiscard]] bool vector_compatible(const Linear& a, const Linear& b);
// Whether this kernel computes products with `w` at all for activations of `dtype`.
[[nodiscard]] bool vector_takes(const Linear& w, DType dtype);

// Whether there is shared memory enough for it.
[[nodiscard]] bool vector_fits(const VectorProblem& p, const VectorResources& r);
[[nodiscard]] bool vector_fits(const PackedShape& shape, std::int64_t rows,
                               const VectorResources& r);

void vector_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream);

// Products of which each may read what the ones before wrote, in one launch: its blocks stay and
// meet between them, while the weights of the next product are already on their way. All have the
// same rows of x and linears of one format, affine of 2, 3, 4 or 8 bits if there are several.
// Preconditions: no product writes what an earlier one reads as x (a block without work of that one
// may still be reading it); no other launch of this kind runs on the device at the same time (each
// would wait for multiprocessors that the other one holds).
[[nodiscard]] bool vector_chain_fits(std::span<const VectorProblem> problems,
                                     const VectorResources& r);
void vector_chain(std::span<const VectorProblem> problems, const VectorResources& r,
                  cudaStream_t stream);

}  // namespace engine
