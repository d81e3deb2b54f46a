// The three attention kernels behind CudaOps::attention. All rows and strides are in elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "engine/core/view.h"
#include "engine/ops/attn_ops.h"

namespace engine {

struct AttnProblem {
  View q, k, v, out;
  AttnShape shape;
  std::int64_t batch = 0;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
};

// Longest query run the decode kernel takes.
inline constexpr std::int64_t decode_max_queries = 8;

// Head sizes with a tensor core kernel.
inline bool has_tensor_kernel(std::int64_t head_dim) {
  return head_dim == 32 || head_dim == 64 || head_dim == 128;
}

// f16 or bf16, head_dim 32, 64 or 128, rows of q, k, v and out aligned to 16 bytes.
void attention_prefill(const AttnProblem& p, cudaStream_t stream);

// As attention_prefill, with q_len <= decode_max_queries and `workspace` of decode_workspace_bytes.
void attention_decode(const AttnProblem& p, int multiprocessors, View workspace,
                      cudaStream_t stream);
std::int64_t decode_workspace_bytes(const AttnShape& shape, std::int64_t batch, std::int64_t q_len,
                                    std::int64_t kv_len, int multiprocessors);

}  // namespace engine
