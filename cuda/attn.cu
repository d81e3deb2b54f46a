// CudaOps::attention: chooses the kernel, and has the one for every shape the others do not take.
#include <cmath>

#include "cuda/attn.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int warps = 4;
constexpr int threads = warps * 32;
constexpr int rows_per_warp = 4;
constexpr int tile_q = warps * rows_per_warp;
constexpr int tile_k = 32;  // one key per lane
constexpr std::int64_t max_head_dim = 256;

template <class T>
struct Args {
  const T* q;
  const T* k;
  const T* v;
  T* out;
  std::int64_t q_stride, k_stride, v_stride, out_stride;
  std::int64_t q_len, kv_len;
  int heads, group, head_dim;
  float scale;
};

// Any dtype and any head_dim <= 32 * COLUMNS, arithmetic in f32.
// Launch: grid (batch * heads, ceil(q_len / 16)), 128 threads, shared f32 q [16, head_dim],
// k [32, head_dim + 1], v [32, head_dim]. A warp takes four queries. For the scores a lane is a key
// (the odd row length of k keeps the lanes on different banks), for the sums a lane is COLUMNS
// columns of v. Cost: 4 * head_dim flops per visible pair on the plain f32 units.
template <class T, int COLUMNS>
__global__ void __launch_bounds__(threads) attn_plain_kernel(Args<T> args) {
  extern __shared__ float shared_floats[];
  const int dim = args.head_dim;
  float* q_tile = shared_floats;
  float* k_tile = q_tile + tile_q * dim;
  float* v_tile = k_tile + tile_k * (dim + 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * rows_per_warp;

  const std::int64_t sequence = blockIdx.x / static_cast<unsigned>(args.heads);
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.heads));
  const std::int64_t first_q = std::int64_t{gridDim.y - 1 - blockIdx.y} * tile_q;
  const std::int64_t past = args.kv_len - args.q_len;
  const std::int64_t left = args.q_len - first_q;
  const std::int64_t limit = past + first_q + (left < tile_q ? left : tile_q);
  const T* q =
      args.q + (sequence * args.q_len + first_q) * args.q_stride + std::int64_t{head} * dim;
  const std::int64_t kv_column = std::int64_t{head / args.group} * dim;
  const T* k = args.k + sequence * args.kv_len * args.k_stride + kv_column;
  const T* v = args.v + sequence * args.kv_len * args.v_stride + kv_column;

  for (int i = static_cast<int>(threadIdx.x); i < tile_q * dim; i += threads) {
    const int row = i / dim;
    q_tile[i] = row < left ? to_f32(q[row * args.q_stride + i % dim]) * args.scale : 0.0F;
  }
  float acc[rows_per_warp][COLUMNS] = {};
  float peak[rows_per_warp];
  float sum[rows_per_warp] = {};  // this lane's share
#pragma unroll
  for (int r = 0; r < rows_per_warp; ++r) peak[r] = -INFINITY;

  for (std::int64_t first_k = 0; first_k < limit; first_k += tile_k) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile_k * dim; i += threads) {
      const int row = i / dim;
      const int column = i % dim;
      const bool inside = first_k + row < limit;  // what lies beyond is not ours to read
      k_tile[row * (dim + 1) + column] =
          inside ? to_f32(k[(first_k + row) * args.k_stride + column]) : 0.0F;
      v_tile[i] = inside ? to_f32(v[(first_k + row) * args.v_stride + column]) : 0.0F;
    }
    __syncthreads();

    float s[rows_per_warp] = {};
    for (int d = 0; d < dim; d += 2) {
      const float k0 = k_tile[lane * (dim + 1) + d];
      const float k1 = k_tile[lane * (dim + 1) + d + 1];
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        const float2 pair = *reinterpret_cast<const float2*>(q_tile + (warp_row + r) * dim + d);
        s[r] += pair.x * k0 + pair.y * k1;
      }
    }
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      if (first_k + lane > past + first_q + warp_row + r) s[r] = -INFINITY;
      // Finite: every query sees key 0, which is in the first tile.
      const float top = fmaxf(peak[r], warp_reduce(s[r], MaxOp{}));
      const float shrink = expf(peak[r] - top);
      peak[r] = top;
      s[r] = expf(s[r] - top);
      sum[r] = sum[r] * shrink + s[r];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) acc[r][c] *= shrink;
    }
    for (int j = 0; j < tile_k; ++j) {
      float p[rows_per_warp];
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) p[r] = __shfl_sync(0xffffffffU, s[r], j);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const int column = c * 32 + lane;
        const float value = column < dim ? v_tile[j * dim + column] : 0.0F;
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r) acc[r][c] += p[r] * value;
      }
    }
  }
  T* out =
      args.out + (sequence * args.q_len + first_q) * args.out_stride + std::int64_t{head} * dim;
#pragma unroll
  for (int r = 0; r < rows_per_warp; ++r) {
    const float total = warp_reduce(sum[r], SumOp{});
    if (warp_row + r >= left) continue;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = c * 32 + lane;
      if (column < dim) {
        out[(warp_row + r) * args.out_stride + column] = from_f32<T>(acc[r][c] / total);
      }
    }
  }
}

template <class T, int COLUMNS>
void launch_plain(const AttnProblem& p, cudaStream_t stream) {
  const auto dim = p.shape.head_dim;
  const Args<T> args{static_cast<const T*>(p.q.data),
                     static_cast<const T*>(p.k.data),
                     static_cast<const T*>(p.v.data),
                     static_cast<T*>(p.out.data),
                     p.q.stride,
                     p.k.stride,
                     p.v.stride,
                     p.out.stride,
                     p.q_len,
                     p.kv_len,
                     static_cast<int>(p.shape.heads),
                     static_cast<int>(p.shape.heads / p.shape.kv_heads),
                     static_cast<int>(dim),
                     1.0F / std::sqrt(static_cast<float>(dim))};
  const std::int64_t blocks = ceil_div(p.q_len, tile_q);
  REQUIRE(p.batch * p.shape.heads <= 0x7fffffff && blocks <= 65535,
          "attention of too large " + p.q.shape());
  const auto floats = static_cast<std::size_t>(tile_q * dim + tile_k * (2 * dim + 1));
  const dim3 grid(static_cast<unsigned>(p.batch * p.shape.heads), static_cast<unsigned>(blocks));
  launch("attn_plain", attn_plain_kernel<T, COLUMNS>, grid, threads, floats * sizeof(float), stream,
         args);
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
  dispatch_float(q.dtype, "attention", [&](auto tag) {
    using T = decltype(tag);
    if (shape.head_dim <= 32) return launch_plain<T, 1>(p, stream_);
    if (shape.head_dim <= 64) return launch_plain<T, 2>(p, stream_);
    if (shape.head_dim <= 128) return launch_plain<T, 4>(p, stream_);
    launch_plain<T, 8>(p, stream_);
  });
}

// Does not know the dtype and the alignment, so it asks for what the split kernel may need.
std::int64_t CudaOps::attention_workspace_bytes(const AttnShape& shape, std::int64_t batch,
                                                std::int64_t q_len, std::int64_t kv_len) const {
  if (q_len > decode_max_queries || !has_tensor_kernel(shape.head_dim)) return 0;
  return decode_workspace_bytes(shape, batch, q_len, kv_len, properties_.multiProcessorCount);
}

}  // namespace engine
