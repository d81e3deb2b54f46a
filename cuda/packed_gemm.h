// Products of 17 and more rows with a packed weight: the weight is decoded tile by tile inside a
// tensor core product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// out = x w^T (+ out), as PackedOps::packed_matmul with PackedKernel::matrix. Any m >= 1.
// workspace u8 [1, packed_gemm_workspace_bytes] at a multiple of 256 bytes.
void packed_gemm(View x, const PackedWeight& w, View out, bool accumulate, int multiprocessors,
                 View workspace, cudaStream_t stream);
std::int64_t packed_gemm_workspace_bytes(const PackedShape& shape, std::int64_t m,
                                         int multiprocessors);

}  // namespace engine
