// Products of up to 16 rows of activations with packed linears (decoding at batch 9 to 16),
// streaming the weights once: clusters of thread blocks divide the columns, so that each block
// holds only its part of x. sm_90 and later.
#pragma once

#include "cuda/vector.h"

namespace engine {

// Whether vector_wide_product() computes this problem on the current device: packed weights without
// a permutation of columns, x of f16 or bf16, at most vector_max_rows rows, thread block clusters
// (sm_90), and shared memory enough. Errors of the CUDA runtime are thrown.
[[nodiscard]] bool vector_wide_fits(const VectorProblem& p, const VectorResources& r);

// The same for one linear without a norm.
[[nodiscard]] bool vector_wide_fits(const PackedShape& shape, std::int64_t rows,
                                    const VectorResources& r);

// As vector_product(), with the same meaning of all fields; uses no partials and no counters.
// Throws if the problem does not fit. Results repeat bit by bit for the same problem and device.
void vector_wide_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream);

}  // namespace engine
