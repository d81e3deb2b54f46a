// What the kernels of TransformOps share. Pointers are device pointers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "engine/core/view.h"
#include "engine/ops/transform_ops.h"

namespace engine {

// out[b][c][r] = in[b][r][c] for b < batch, in elements of `bytes` (2 or 4). batch at most 65535.
struct TransposeProblem {
  const void* in = nullptr;
  std::int64_t in_stride = 0, in_batch = 0;  // elements between rows, between matrices
  void* out = nullptr;
  std::int64_t out_stride = 0, out_batch = 0;
  std::int64_t rows = 0, cols = 0, batch = 1;
  std::size_t bytes = 4;
};
void transpose_batched(const TransposeProblem& p, cudaStream_t stream);

// The hadamard case of transform_rows; shared_limit: bytes of shared memory that a block may have.
void hadamard_rows(const View& x, const TransformView& q, bool inverse, const View& out,
                   std::size_t shared_limit, cudaStream_t stream);

}  // namespace engine
