// CudaOps::attention: chooses the kernel.
#include "cuda/attn.h"
#include "cuda/attn_plain.cuh"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr std::int64_t max_head_dim = 256;

struct SequenceKeys {
  std::int64_t first;
  __device__ std::int64_t row(std::int64_t i) const { return first + i; }
};

// Grid (batch * heads, ceil(q_len / 16)).
struct Sequences {
  std::int64_t q_len, kv_len;
  int heads;

  __device__ PlainBlock<SequenceKeys> block() const {
    const std::int64_t sequence = blockIdx.x / static_cast<unsigned>(heads);
    const std::int64_t first = std::int64_t{gridDim.y - 1 - blockIdx.y} * plain_tile_q;
    return {sequence * q_len + first,
            q_len - first,
            kv_len - q_len + first,
            static_cast<int>(blockIdx.x % static_cast<unsigned>(heads)),
            {sequence * kv_len}};
  }
};

void attention_plain(const AttnProblem& p, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(p.q_len, plain_tile_q);
  REQUIRE(p.batch * p.shape.heads <= 0x7fffffff && blocks <= 65535,
          "attention of too large " + p.q.shape());
  const Sequences where{p.q_len, p.kv_len, static_cast<int>(p.shape.heads)};
  const dim3 grid(static_cast<unsigned>(p.batch * p.shape.heads), static_cast<unsigned>(blocks));
  dispatch_float(p.q.dtype, "attention", [&](auto tag) {
    launch_plain<decltype(tag)>("attn_plain", p.q, p.k, p.v, p.out, p.shape, where, grid, stream);
  });
}

}  // namespace

// f16 and bf16 with a head_dim of 32, 64 or 128 and rows aligned to 16 bytes go to the tensor
// cores: to the split kernel for up to 8 queries a sequence, to the tiled one for more. Everything
// else (f32, other head sizes up to 256, odd alignments) goes to the plain kernel.
void CudaOps::attention(View q, View k, View v, const AttnShape& shape, std::int64_t batch,
                        View out, View workspace) {
  REQUIRE(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 &&
              shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= max_head_dim,
          "attention with " + std::to_string(shape.heads) + " heads, " +
              std::to_string(shape.kv_heads) + " kv heads of " + std::to_string(shape.head_dim) +
              " (even, at most 256)");
  REQUIRE(batch > 0 && q.rows % batch == 0 && k.rows % batch == 0 && q.rows <= k.rows &&
              q.cols == shape.heads * shape.head_dim && k.cols == shape.kv_heads * shape.head_dim &&
              v.rows == k.rows && v.cols == k.cols && out.rows == q.rows && out.cols == q.cols,
          "attention of " + q.shape() + " over " + k.shape() + " and " + v.shape() + " into " +
              out.shape());
  REQUIRE(q.dtype == k.dtype && q.dtype == v.dtype && q.dtype == out.dtype,
          "attention of several dtypes: " + q.shape() + ", " + k.shape() + ", " + v.shape() + ", " +
              out.shape());
  if (q.empty()) return;
  require_cuda("attention", {q, k, v, out});
  const AttnProblem p{q, k, v, out, shape, batch, q.rows / batch, k.rows / batch};
  const bool tensor = q.dtype != DType::f32 && has_tensor_kernel(shape.head_dim) &&
                      aligned_rows(q, 16, 8) && aligned_rows(k, 16, 8) && aligned_rows(v, 16, 8) &&
                      aligned_rows(out, 16, 8);
  if (tensor && p.q_len <= decode_max_queries) {
    return attention_decode(p, properties_.multiProcessorCount, workspace, stream_);
  }
  if (tensor) return attention_prefill(p, stream_);
  attention_plain(p, stream_);
}

// Does not know the dtype and the alignment, so it asks for what the split kernel may need.
std::int64_t CudaOps::attention_workspace_bytes(const AttnShape& shape, std::int64_t batch,
                                                std::int64_t q_len, std::int64_t kv_len) const {
  if (q_len > decode_max_queries || !has_tensor_kernel(shape.head_dim)) return 0;
  return decode_workspace_bytes(shape, batch, q_len, kv_len, properties_.multiProcessorCount);
}

}  // namespace engine
