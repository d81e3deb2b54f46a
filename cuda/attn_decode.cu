// Causal grouped-query attention of a few queries over a long cache: the keys are split over
// blocks, and a second kernel merges the parts.
#include <cmath>

#include "cuda/attn.h"
#include "cuda/attn_mma.cuh"
#include "cuda/check.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int warps = 4;
constexpr int threads = warps * 32;
constexpr int tile_rows = 16;  // (query, head of the group) pairs per block: one A fragment
constexpr int strip = 16;      // keys a warp takes at once
constexpr int stages = 3;      // strips in shared memory per warp, two of them on their way
constexpr std::int64_t split_quantum = warps * strip;

struct Splits {
  std::int64_t row_tiles;
  std::int64_t keys;   // per split, a multiple of split_quantum
  std::int64_t count;  // none is empty
};

// As many splits as give every multiprocessor two blocks.
Splits plan_splits(const AttnShape& shape, std::int64_t batch, std::int64_t q_len,
                   std::int64_t kv_len, int multiprocessors) {
  Splits out{};
  out.row_tiles = ceil_div(shape.heads / shape.kv_heads * q_len, tile_rows);
  const std::int64_t others = std::max<std::int64_t>(1, batch * shape.kv_heads * out.row_tiles);
  const std::int64_t wanted = ceil_div(2 * std::int64_t{multiprocessors}, others);
  out.keys = ceil_div(ceil_div(kv_len, wanted), split_quantum) * split_quantum;
  out.count = out.keys == 0 ? 0 : ceil_div(kv_len, out.keys);
  return out;
}

// One partial result: HD unnormalised sums, then the maximum (in log2 units) and the sum of
// weights.
__host__ __device__ constexpr std::int64_t partial_floats(std::int64_t head_dim) {
  return head_dim + 2;
}

template <class T>
struct Args {
  const T* q;
  const T* k;
  const T* v;
  float* partials;  // [batch, kv_heads, group * q_len, splits] of partial_floats
  std::int64_t q_stride, k_stride, v_stride;
  std::int64_t kv_len, split_keys;
  int q_len, kv_heads, group, splits, row_tiles;
  float scale_log2;
};

// Keys [0, valid) of a warp's strip, into its stage; the others become zeros and are not read.
template <int HD, class T>
__device__ void load_strip(std::uint32_t tile, const T* from, std::int64_t stride,
                           std::int64_t valid, int lane) {
  constexpr int chunks = HD / 8;
#pragma unroll
  for (int i = 0; i < strip * chunks / 32; ++i) {
    const int row = (i * 32 + lane) / chunks;
    const int chunk = (i * 32 + lane) % chunks;
    copy_async(tile + swizzled<HD>(row, chunk), from + row * stride + chunk * 8, row < valid);
  }
}

// Launch: grid (splits, kv_heads * row_tiles, batch), 128 threads, 3 stages x 4 warps x 2 x 16 keys
// of shared memory. Preconditions: rows aligned to 16 bytes.
// Each warp streams strips of 16 keys of the block's range through its own stages, without waiting
// for the other warps, for 16 (query, head) rows at once; row i is query i / group, head i % group
// of the group, so that a key is read once per 16 rows. The four warps merge at the end.
// Cost: k and v read once per row tile; arithmetic is far below that.
template <class T, int HD>
__global__ void __launch_bounds__(threads, 2) attn_decode_kernel(Args<T> args) {
  extern __shared__ __align__(256) unsigned char shared[];
  constexpr int strip_bytes = strip * HD * 2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::uint32_t own =
      shared_address(shared) + static_cast<std::uint32_t>(warp * stages * 2 * strip_bytes);

  const std::int64_t sequence = blockIdx.z;
  const int kv_head = static_cast<int>(blockIdx.y) / args.row_tiles;
  const int first_row = static_cast<int>(blockIdx.y) % args.row_tiles * tile_rows;
  const int rows = args.group * args.q_len;
  const std::int64_t begin = blockIdx.x * args.split_keys;
  const std::int64_t end =
      begin + args.split_keys < args.kv_len ? begin + args.split_keys : args.kv_len;
  const T* k = args.k + sequence * args.kv_len * args.k_stride + std::int64_t{kv_head} * HD;
  const T* v = args.v + sequence * args.kv_len * args.v_stride + std::int64_t{kv_head} * HD;

  // Query fragments straight from global memory: each warp needs all of them, once.
  std::uint32_t q[HD / 16][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h;
    const T* from = args.q + (sequence * args.q_len + row / args.group) * args.q_stride +
                    (std::int64_t{kv_head} * args.group + row % args.group) * HD + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < HD / 16; ++step) {
      q[step][h] = row < rows ? *reinterpret_cast<const std::uint32_t*>(from + step * 16) : 0U;
      q[step][h + 2] =
          row < rows ? *reinterpret_cast<const std::uint32_t*>(from + step * 16 + 8) : 0U;
    }
  }
  // The last key that this thread's two rows see.
  std::int64_t last[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    last[h] = args.kv_len - args.q_len + (first_row + lane / 4 + 8 * h) / args.group;
    if (last[h] >= args.kv_len) last[h] = args.kv_len - 1;
  }

  float acc[HD / 8][4];
#pragma unroll
  for (int n = 0; n < HD / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0F;
  }
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0F, 0.0F};

  const auto strips = static_cast<int>(ceil_div(end - begin, strip));
  const auto request = [&](int s, int stage) {
    if (s < strips) {
      const std::int64_t key = begin + std::int64_t{s} * strip;
      const std::uint32_t tile = own + static_cast<std::uint32_t>(stage * 2 * strip_bytes);
      load_strip<HD>(tile, k + key * args.k_stride, args.k_stride, end - key, lane);
      load_strip<HD>(tile + strip_bytes, v + key * args.v_stride, args.v_stride, end - key, lane);
    }
    copy_commit();
  };
  request(warp, 0);
  request(warp + warps, 1);
  int stage = 0;
  for (int s = warp; s < strips; s += warps) {
    copy_wait<1>();
    __syncwarp();  // every lane's copies have arrived, and every lane has left the third stage
    request(s + 2 * warps, stage == 0 ? stages - 1 : stage - 1);
    const std::uint32_t k_tile = own + static_cast<std::uint32_t>(stage * 2 * strip_bytes);
    const std::uint32_t v_tile = k_tile + strip_bytes;
    stage = stage == stages - 1 ? 0 : stage + 1;

    float score[2][4] = {};
#pragma unroll
    for (int step = 0; step < HD / 16; ++step) {
      std::uint32_t b[4];
      ldmatrix(b, k_tile + swizzled<HD>(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      mma<T>(score[0], q[step], b[0], b[1]);
      mma<T>(score[1], q[step], b[2], b[3]);
    }
    const std::int64_t key = begin + std::int64_t{s} * strip + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = peak[h];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (key + n * 8 + e > last[h]) score[n][2 * h + e] = -INFINITY;
          top = fmaxf(top, score[n][2 * h + e]);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
      // A row may see no key at all in this split: then everything stays 0.
      const float base = top == -INFINITY ? 0.0F : top * args.scale_log2;
      const float shrink = exp2_fast(peak[h] * args.scale_log2 - base);
      peak[h] = top;
      sum[h] *= shrink;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          score[n][e] = exp2_fast(fmaf(score[n][e], args.scale_log2, -base));
          sum[h] += score[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
        acc[n][2 * h] *= shrink;
        acc[n][2 * h + 1] *= shrink;
      }
    }
    const std::uint32_t a[4] = {
        pack2<T>(score[0][0], score[0][1]), pack2<T>(score[0][2], score[0][3]),
        pack2<T>(score[1][0], score[1][1]), pack2<T>(score[1][2], score[1][3])};
#pragma unroll
    for (int n = 0; n < HD / 8; n += 2) {
      std::uint32_t b[4];
      ldmatrix_transposed(b, v_tile + swizzled<HD>(lane % 16, n + lane / 16));
      mma<T>(acc[n], a, b[0], b[1]);
      mma<T>(acc[n + 1], a, b[2], b[3]);
    }
  }
  copy_wait<0>();
  __syncthreads();

  // Merge: every warp leaves 16 partial results where the stages were.
  constexpr int width = static_cast<int>(partial_floats(HD));
  static_assert(warps * tile_rows * width * 4 <= warps * stages * 2 * strip_bytes);
  float* merged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffU, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffU, sum[h], 2);
    float* row = merged + (warp * tile_rows + lane / 4 + 8 * h) * width;
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) {
      row[n * 8 + lane % 4 * 2] = acc[n][2 * h];
      row[n * 8 + lane % 4 * 2 + 1] = acc[n][2 * h + 1];
    }
    if (lane % 4 == 0) {
      row[HD] = peak[h] * args.scale_log2;
      row[HD + 1] = sum[h];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * width; i += threads) {
    const int row = i / width;
    const int column = i % width;
    if (first_row + row >= rows) break;  // later items lie in later rows
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < warps; ++w) top = fmaxf(top, merged[(w * tile_rows + row) * width + HD]);
    float total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float* part = merged + (w * tile_rows + row) * width;
      const float weight = top == -INFINITY ? 0.0F : exp2_fast(part[HD] - top);
      total += weight * part[column];
    }
    const std::int64_t place =
        ((sequence * args.kv_heads + kv_head) * rows + first_row + row) * args.splits + blockIdx.x;
    args.partials[place * width + column] = column == HD ? top : total;
  }
}

// Launch: grid (batch * kv_heads * group * q_len), HD threads, `splits` floats of shared memory;
// block i merges the splits of row i of `partials` in order. At least one split of every row has
// seen a key. Cost: the partials read once.
template <class T, int HD>
__global__ void __launch_bounds__(HD)
    attn_combine_kernel(const float* partials, int splits, T* out, std::int64_t out_stride,
                        int q_len, int kv_heads, int group) {
  extern __shared__ float weights[];
  __shared__ float scratch[32];
  constexpr int width = static_cast<int>(partial_floats(HD));
  const auto thread = static_cast<int>(threadIdx.x);
  const std::int64_t place = blockIdx.x;
  const float* parts = partials + place * splits * width;
  float top = -INFINITY;
  for (int s = thread; s < splits; s += HD) top = fmaxf(top, parts[s * width + HD]);
  top = block_reduce(top, MaxOp{}, -INFINITY, scratch);
  float sum = 0;
  for (int s = thread; s < splits; s += HD) {
    weights[s] = exp2_fast(parts[s * width + HD] - top);
    sum += weights[s] * parts[s * width + HD + 1];
  }
  sum = block_reduce(sum, SumOp{}, 0.0F, scratch);  // its barriers also publish the weights
  float value = 0;
#pragma unroll 8
  for (int s = 0; s < splits; ++s) value += weights[s] * parts[s * width + thread];
  const int rows = group * q_len;
  const auto row = static_cast<int>(place % rows);
  const std::int64_t kv_head = place / rows % kv_heads;
  const std::int64_t sequence = place / rows / kv_heads;
  out[(sequence * q_len + row / group) * out_stride + (kv_head * group + row % group) * HD +
      thread] = from_f32<T>(value / sum);
}

template <class T, int HD>
void launch_decode(const AttnProblem& p, int multiprocessors, View workspace, cudaStream_t stream) {
  const Splits splits = plan_splits(p.shape, p.batch, p.q_len, p.kv_len, multiprocessors);
  const auto group = static_cast<int>(p.shape.heads / p.shape.kv_heads);
  REQUIRE(p.batch <= 65535 && p.shape.kv_heads * splits.row_tiles <= 65535 &&
              p.batch * p.shape.heads * p.q_len <= 0x7fffffff,
          "attention of too large " + p.q.shape());
  const Args<T> args{static_cast<const T*>(p.q.data),
                     static_cast<const T*>(p.k.data),
                     static_cast<const T*>(p.v.data),
                     static_cast<float*>(workspace.data),
                     p.q.stride,
                     p.k.stride,
                     p.v.stride,
                     p.kv_len,
                     splits.keys,
                     static_cast<int>(p.q_len),
                     static_cast<int>(p.shape.kv_heads),
                     group,
                     static_cast<int>(splits.count),
                     static_cast<int>(splits.row_tiles),
                     log2_e / std::sqrt(static_cast<float>(HD))};
  const dim3 grid(static_cast<unsigned>(splits.count),
                  static_cast<unsigned>(p.shape.kv_heads * splits.row_tiles),
                  static_cast<unsigned>(p.batch));
  launch("attn_decode", attn_decode_kernel<T, HD>, grid, threads,
         warps * stages * 2 * strip * HD * sizeof(T), stream, args);
  launch("attn_combine", attn_combine_kernel<T, HD>,
         static_cast<unsigned>(p.batch * p.shape.heads * p.q_len), HD, splits.count * sizeof(float),
         stream, args.partials, args.splits, static_cast<T*>(p.out.data), p.out.stride, args.q_len,
         args.kv_heads, group);
}

template <class T>
void launch_by_head(const AttnProblem& p, int multiprocessors, View workspace,
                    cudaStream_t stream) {
  switch (p.shape.head_dim) {
    case 32:
      return launch_decode<T, 32>(p, multiprocessors, workspace, stream);
    case 64:
      return launch_decode<T, 64>(p, multiprocessors, workspace, stream);
    case 128:
      return launch_decode<T, 128>(p, multiprocessors, workspace, stream);
    default:
      REQUIRE(false, "no tensor core kernel for head_dim " + std::to_string(p.shape.head_dim));
  }
}

}  // namespace

std::int64_t decode_workspace_bytes(const AttnShape& shape, std::int64_t batch, std::int64_t q_len,
                                    std::int64_t kv_len, int multiprocessors) {
  const Splits splits = plan_splits(shape, batch, q_len, kv_len, multiprocessors);
  return batch * shape.heads * q_len * splits.count * partial_floats(shape.head_dim) *
         static_cast<std::int64_t>(sizeof(float));
}

void attention_decode(const AttnProblem& p, int multiprocessors, View workspace,
                      cudaStream_t stream) {
  REQUIRE(p.q_len <= decode_max_queries, "decode takes few queries, not " + p.q.shape());
  const std::int64_t needed =
      decode_workspace_bytes(p.shape, p.batch, p.q_len, p.kv_len, multiprocessors);
  REQUIRE(workspace.contiguous() && workspace.bytes() >= needed,
          "attention needs " + std::to_string(needed) + " bytes of workspace, got " +
              workspace.shape());
  require_cuda("attention", {workspace});
  REQUIRE(aligned_rows(workspace, 4, 1), "attention workspace is misaligned");
  if (p.q.dtype == DType::f16) {
    return launch_by_head<__half>(p, multiprocessors, workspace, stream);
  }
  REQUIRE(p.q.dtype == DType::bf16, "no tensor core kernel for " + p.q.shape());
  launch_by_head<__nv_bfloat16>(p, multiprocessors, workspace, stream);
}

}  // namespace engine
