// Attention of any dtype and head size up to 256, for whatever rows a block is given.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attn.h"
#include "cuda/check.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {

constexpr int plain_warps = 4;
constexpr int plain_threads = plain_warps * 32;
constexpr int plain_rows_per_warp = 4;
constexpr int plain_tile_q = plain_warps * plain_rows_per_warp;
constexpr int plain_tile_k = 32;  // one key per lane

template <class T>
struct PlainArgs {
  const T* q;
  const T* k;
  const T* v;
  T* out;
  std::int64_t q_stride, k_stride, v_stride, out_stride;
  int group, head_dim;
  float scale;
};

// What one thread block works on: up to 16 neighbouring queries of a head. KEYS: row(i) is the row
// of the i-th key.
template <class KEYS>
struct PlainBlock {
  std::int64_t first_q;  // row of q and out
  std::int64_t left;     // queries from there on; the block takes the first 16, none if below 1
  std::int64_t past;     // query i of the block sees keys 0 to past + i
  int head;
  KEYS keys;
};

// Any dtype and any head_dim <= 32 * COLUMNS, arithmetic in f32. WHERE: block() gives this thread
// block's PlainBlock.
// Launch: a grid as WHERE reads it, 128 threads, shared f32 q [16, head_dim], k [32, head_dim + 1],
// v [32, head_dim]. A warp takes four queries. For the scores a lane is a key (the odd row length
// of k keeps the lanes on different banks), for the sums a lane is COLUMNS columns of v. Cost: 4 *
// head_dim flops per visible pair on the plain f32 units.
template <class T, int COLUMNS, class WHERE>
__global__ void __launch_bounds__(plain_threads) attn_plain_kernel(PlainArgs<T> args, WHERE where) {
  const auto block = where.block();
  if (block.left <= 0) return;
  extern __shared__ float shared_floats[];
  const int dim = args.head_dim;
  float* q_tile = shared_floats;
  float* k_tile = q_tile + plain_tile_q * dim;
  float* v_tile = k_tile + plain_tile_k * (dim + 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * plain_rows_per_warp;

  const std::int64_t left = block.left < plain_tile_q ? block.left : plain_tile_q;
  const std::int64_t limit = block.past + left;
  const T* q = args.q + block.first_q * args.q_stride + std::int64_t{block.head} * dim;
  const std::int64_t kv_column = std::int64_t{block.head / args.group} * dim;
  const T* k = args.k + kv_column;
  const T* v = args.v + kv_column;

  for (int i = static_cast<int>(threadIdx.x); i < plain_tile_q * dim; i += plain_threads) {
    const int row = i / dim;
    q_tile[i] = row < left ? to_f32(q[row * args.q_stride + i % dim]) * args.scale : 0.0F;
  }
  float acc[plain_rows_per_warp][COLUMNS] = {};
  float peak[plain_rows_per_warp];
  float sum[plain_rows_per_warp] = {};  // this lane's share
#pragma unroll
  for (int r = 0; r < plain_rows_per_warp; ++r) peak[r] = -INFINITY;

  for (std::int64_t first_k = 0; first_k < limit; first_k += plain_tile_k) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < plain_tile_k * dim; i += plain_threads) {
      const int row = i / dim;
      const int column = i % dim;
      const bool inside = first_k + row < limit;  // what lies beyond is not ours to read
      const std::int64_t at = inside ? block.keys.row(first_k + row) : 0;
      k_tile[row * (dim + 1) + column] = inside ? to_f32(k[at * args.k_stride + column]) : 0.0F;
      v_tile[i] = inside ? to_f32(v[at * args.v_stride + column]) : 0.0F;
    }
    __syncthreads();

    float s[plain_rows_per_warp] = {};
    for (int d = 0; d < dim; d += 2) {
      const float k0 = k_tile[lane * (dim + 1) + d];
      const float k1 = k_tile[lane * (dim + 1) + d + 1];
#pragma unroll
      for (int r = 0; r < plain_rows_per_warp; ++r) {
        const float2 pair = *reinterpret_cast<const float2*>(q_tile + (warp_row + r) * dim + d);
        s[r] += pair.x * k0 + pair.y * k1;
      }
    }
#pragma unroll
    for (int r = 0; r < plain_rows_per_warp; ++r) {
      if (first_k + lane > block.past + warp_row + r) s[r] = -INFINITY;
      // Finite: every query sees key 0, which is in the first tile.
      const float top = fmaxf(peak[r], warp_reduce(s[r], MaxOp{}));
      const float shrink = expf(peak[r] - top);
      peak[r] = top;
      s[r] = expf(s[r] - top);
      sum[r] = sum[r] * shrink + s[r];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) acc[r][c] *= shrink;
    }
    for (int j = 0; j < plain_tile_k; ++j) {
      float p[plain_rows_per_warp];
#pragma unroll
      for (int r = 0; r < plain_rows_per_warp; ++r) p[r] = __shfl_sync(0xffffffffU, s[r], j);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const int column = c * 32 + lane;
        const float value = column < dim ? v_tile[j * dim + column] : 0.0F;
#pragma unroll
        for (int r = 0; r < plain_rows_per_warp; ++r) acc[r][c] += p[r] * value;
      }
    }
  }
  T* out = args.out + block.first_q * args.out_stride + std::int64_t{block.head} * dim;
#pragma unroll
  for (int r = 0; r < plain_rows_per_warp; ++r) {
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

// The launch of the kernel for `grid`.
template <class T, class WHERE>
void launch_plain(const char* name, const View& q, const View& k, const View& v, const View& out,
                  const AttnShape& shape, WHERE where, dim3 grid, cudaStream_t stream) {
  const auto dim = shape.head_dim;
  const PlainArgs<T> args{static_cast<const T*>(q.data),
                          static_cast<const T*>(k.data),
                          static_cast<const T*>(v.data),
                          static_cast<T*>(out.data),
                          q.stride,
                          k.stride,
                          v.stride,
                          out.stride,
                          static_cast<int>(shape.heads / shape.kv_heads),
                          static_cast<int>(dim),
                          1.0F / std::sqrt(static_cast<float>(dim))};
  const auto floats = static_cast<std::size_t>(plain_tile_q * dim + plain_tile_k * (2 * dim + 1));
  const auto kernel = dim <= 32    ? attn_plain_kernel<T, 1, WHERE>
                      : dim <= 64  ? attn_plain_kernel<T, 2, WHERE>
                      : dim <= 128 ? attn_plain_kernel<T, 4, WHERE>
                                   : attn_plain_kernel<T, 8, WHERE>;
  launch(name, kernel, grid, plain_threads, floats * sizeof(float), stream, args, where);
}

}  // namespace engine
