// Causal grouped-query attention of one query per sequence, whose position is read on the device:
// the keys are split over blocks, and the last block of a sequence and kv head merges the parts.
#include <cmath>

#include "cuda/attn.h"
#include "cuda/attn_strips.cuh"
#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/kv.cuh"
#include "cuda/reduce.cuh"
#include "engine/ops/step_check.h"

namespace engine {
namespace {

constexpr int warps = 4;
constexpr int threads = warps * 32;
constexpr int tile_rows = 8;            // query heads of a group per block: rows 0..7 of a fragment
constexpr int quantum = warps * strip;  // a split is a multiple of this many keys
constexpr int alone = 4 * quantum;      // keys that are never split
constexpr int max_splits = 64;
// Counters stand at the start of the workspace in a number that does not depend on the shape, so
// that a workspace may serve several shapes. Only they must be zero, and are left so.
constexpr std::int64_t max_counters = 4096;

struct Plan {
  std::int64_t row_tiles;
  std::int64_t splits;  // launched; a short context uses fewer
};

// The number of splits that keeps the multiprocessors evenly busy when the cache is full, as a
// share of the time of one block over all keys; each split makes the merge a little longer.
Plan make_plan(const AttnShape& shape, std::int64_t batch, std::int64_t capacity,
               int multiprocessors) {
  constexpr double merge_share = 0.03;
  Plan plan{ceil_div(shape.heads / shape.kv_heads, tile_rows), 1};
  const std::int64_t blocks = batch * shape.kv_heads * plan.row_tiles;
  if (blocks > max_counters) return plan;
  const std::int64_t most = std::min<std::int64_t>(max_splits, ceil_div(capacity, quantum));
  double best = INFINITY;
  for (std::int64_t splits = 1; splits <= most; ++splits) {
    const auto n = static_cast<double>(splits);
    const auto waves = static_cast<double>(ceil_div(blocks * splits, multiprocessors));
    const double time = waves / n * (1.0 + merge_share * n);
    if (time >= best) continue;
    best = time;
    plan.splits = splits;
  }
  return plan;
}

std::int64_t partial_rows(const AttnShape& shape, std::int64_t batch, const Plan& plan) {
  return plan.splits == 1 ? 0 : batch * shape.kv_heads * plan.row_tiles * plan.splits * tile_rows;
}

template <class T, class E>
struct Args {
  const T* q;
  T* out;
  const std::int32_t* position;
  StripSource<E> cache;  // of sequence 0, kv head 0
  std::int64_t q_stride, out_stride;
  int capacity, kv_heads, group, row_tiles;
  float scale;  // 1 / sqrt(head_dim), times log2(e) for the tensor cores
  int* counters;
  float* sums;    // [batch, kv_heads, row_tiles, splits, 8, HD]: unnormalised sums
  float2* stats;  // [batch, kv_heads, row_tiles, splits, 8]: maximum in log2 units, sum of weights
};

template <class E>
__device__ StripSource<E> at_head(StripSource<E> s, std::int64_t row, int head, int head_dim) {
  s.k += row * s.k_stride + static_cast<std::int64_t>(head) * head_dim;
  s.v += row * s.v_stride + static_cast<std::int64_t>(head) * head_dim;
  s.k_scale += row * s.k_scale_stride + head;
  s.v_scale += row * s.v_scale_stride + head;
  return s;
}

// The number of keys that are seen: a position outside the cache must not reach beyond it.
__device__ inline int seen_keys(const std::int32_t* position, int capacity) {
  const int p = *position;
  return p < 0 ? 1 : p < capacity ? p + 1 : capacity;
}

// Four neighbours of one output row.
template <class T>
__device__ void store_four(T* out, float4 v, float divisor) {
  Pack<T, 4> pack;
  pack.v[0] = from_f32<T>(v.x / divisor);
  pack.v[1] = from_f32<T>(v.y / divisor);
  pack.v[2] = from_f32<T>(v.z / divisor);
  pack.v[3] = from_f32<T>(v.w / divisor);
  *reinterpret_cast<Pack<T, 4>*>(out) = pack;
}

__device__ inline void add_weighed(float4& sum, float weight, float4 v) {
  sum.x += weight * v.x;
  sum.y += weight * v.y;
  sum.z += weight * v.z;
  sum.w += weight * v.w;
}

// Launch: chained; grid (splits, kv_heads * row_tiles, batch), 128 threads, Strips::stages stages
// for each of 4 warps of shared memory. Preconditions: rows aligned to 16 bytes.
// The keys seen are dealt to as many splits as have at least `quantum` keys each; the blocks of the
// other splits end at once. Each warp streams strips of 16 keys through its own stages without
// waiting for the other warps; the four warps merge, then the splits.
// Cost: k and v read once per 8 query heads of a group; arithmetic is far below that.
template <class T, int HD, class Strips>
__global__ void __launch_bounds__(threads, 2)
    attn_step_kernel(Args<T, typename Strips::Element> args) {
  extern __shared__ __align__(256) unsigned char shared[];
  __shared__ bool is_last;
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  unsigned char* own = shared + warp * Strips::stages * Strips::stage_bytes;
  const auto sequence = static_cast<std::int64_t>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / args.row_tiles;
  const int first_row = static_cast<int>(blockIdx.y) % args.row_tiles * tile_rows;
  const int rows = min(tile_rows, args.group - first_row);
  const StripSource<typename Strips::Element> cache =
      at_head(args.cache, sequence * args.capacity, kv_head, HD);
  const std::int64_t first_column = (std::int64_t{kv_head} * args.group + first_row) * HD;
  chain_wait();

  const int seen = seen_keys(args.position, args.capacity);
  const int splits = static_cast<int>(gridDim.x);
  // Merging costs more than what up to `alone` keys take in one block.
  const int wanted = seen <= alone ? 1 : splits;
  const int keys = (seen + wanted * quantum - 1) / (wanted * quantum) * quantum;
  const int used = (seen + keys - 1) / keys;
  const int begin = static_cast<int>(blockIdx.x) * keys;
  if (static_cast<int>(blockIdx.x) >= used) return;
  const int count = min(keys, seen - begin);
  const int strips = (count + strip - 1) / strip;

  const auto request = [&](int s, int stage) {
    if (s < strips) {
      Strips::request(own + stage * Strips::stage_bytes, cache, begin + s * strip,
                      count - s * strip, lane);
    }
    copy_commit();
  };
#pragma unroll
  for (int i = 0; i < Strips::stages - 1; ++i) request(warp + i * warps, i);

  // Query fragments straight from global memory: each warp needs all of them, once. Rows 8 to 15
  // of the fragment stay zero.
  std::uint32_t q[HD / 16][4];
  const T* query = args.q + sequence * args.q_stride + first_column + lane / 4 * HD;
#pragma unroll
  for (int step = 0; step < HD / 16; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* from = query + Strips::q_column(step, half, lane % 4);
      q[step][2 * half] = lane / 4 < rows ? *reinterpret_cast<const std::uint32_t*>(from) : 0U;
      q[step][2 * half + 1] = 0U;
    }
  }

  float acc[HD / 8][4];
#pragma unroll
  for (int n = 0; n < HD / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0.0F;
  }
  float peak = -INFINITY;
  float sum = 0.0F;
  int stage = 0;
  for (int s = warp; s < strips; s += warps) {
    copy_wait<Strips::stages - 2>();
    __syncwarp();  // every lane's copies have arrived, and every lane has left the stage before
    request(s + (Strips::stages - 1) * warps, stage == 0 ? Strips::stages - 1 : stage - 1);
    const unsigned char* here = own + stage * Strips::stage_bytes;
    stage = stage == Strips::stages - 1 ? 0 : stage + 1;

    float score[2][4] = {};
    {
      const typename Strips::Keys fragments(here, lane);
#pragma unroll
      for (int step = 0; step < HD / 16; ++step) {
        std::uint32_t b[4];
        fragments.get(step, b);
        mma<T>(score[0], q[step], b[0], b[1]);
        mma<T>(score[1], q[step], b[2], b[3]);
      }
    }
    const int left = count - s * strip - lane % 4 * 2;  // keys from this lane's first on
    float top = peak;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (n * 8 + e >= left) score[n][e] = -INFINITY;
        top = fmaxf(top, score[n][e]);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
    const float base = top == -INFINITY ? 0.0F : top * args.scale;
    const float shrink = exp2_fast(peak * args.scale - base);
    peak = top;
    sum *= shrink;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        score[n][e] = exp2_fast(fmaf(score[n][e], args.scale, -base));
        sum += score[n][e];
      }
    }
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) {
      acc[n][0] *= shrink;
      acc[n][1] *= shrink;
    }
    const std::uint32_t a[4] = {pack2<T>(score[0][0], score[0][1]), 0U,
                                pack2<T>(score[1][0], score[1][1]), 0U};
    const typename Strips::Values fragments(here, lane);
#pragma unroll
    for (int n = 0; n < HD / 8; n += 2) {
      std::uint32_t b[4];
      fragments.get(n, b);
      mma<T>(acc[n], a, b[0], b[1]);
      mma<T>(acc[n + 1], a, b[2], b[3]);
    }
  }
  copy_wait<0>();
  __syncthreads();

  // Every warp leaves its rows where the stages were: HD sums, maximum, sum of weights.
  constexpr int width = HD + 4;
  static_assert(warps * tile_rows * width * 4 <= warps * Strips::stages * Strips::stage_bytes);
  auto* merged = reinterpret_cast<float*>(shared);
  sum += __shfl_xor_sync(0xffffffffU, sum, 1);
  sum += __shfl_xor_sync(0xffffffffU, sum, 2);
  float* mine = merged + (warp * tile_rows + lane / 4) * width;
#pragma unroll
  for (int n = 0; n < HD / 8; ++n) {
    mine[Strips::out_column(n, 0, lane % 4)] = acc[n][0];
    mine[Strips::out_column(n, 1, lane % 4)] = acc[n][1];
  }
  if (lane % 4 == 0) {
    mine[HD] = peak * args.scale;
    mine[HD + 1] = sum;
  }
  __syncthreads();
  constexpr int pieces = HD / 4;  // of a row, four columns each
  const std::int64_t tile = sequence * gridDim.y + blockIdx.y;
  T* out = args.out + sequence * args.out_stride + first_column;
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += threads) {
    const int row = i / pieces;
    const int column = i % pieces * 4;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < warps; ++w) top = fmaxf(top, merged[(w * tile_rows + row) * width + HD]);
    float4 total{};
    float weights = 0.0F;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float* part = merged + (w * tile_rows + row) * width;
      const float weight = top == -INFINITY ? 0.0F : exp2_fast(part[HD] - top);
      add_weighed(total, weight, *reinterpret_cast<const float4*>(part + column));
      weights += weight * part[HD + 1];
    }
    if (used == 1) {
      store_four(out + row * HD + column, total, weights);
      continue;
    }
    const std::int64_t place = (tile * splits + blockIdx.x) * tile_rows + row;
    *reinterpret_cast<float4*>(args.sums + place * HD + column) = total;
    if (column == 0) args.stats[place] = make_float2(top, weights);
  }
  if (used == 1) return;

  __threadfence();  // the parts are visible before they are counted
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(args.counters + tile, 1) == used - 1;
    if (is_last) args.counters[tile] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += threads) {
    const int row = i / pieces;
    const int column = i % pieces * 4;
    const std::int64_t place = tile * splits * tile_rows + row;
    const float2* stats = args.stats + place;
    const float* sums = args.sums + place * HD + column;
    float top = -INFINITY;
#pragma unroll 8
    for (int s = 0; s < used; ++s) top = fmaxf(top, __ldcg(stats + s * tile_rows).x);
    float4 total{};
    float weights = 0.0F;
#pragma unroll 8
    for (int s = 0; s < used; ++s) {
      const float2 stat = __ldcg(stats + s * tile_rows);
      const float weight = top == -INFINITY ? 0.0F : exp2_fast(stat.x - top);
      add_weighed(total, weight,
                  __ldcg(reinterpret_cast<const float4*>(sums + s * tile_rows * HD)));
      weights += weight * stat.y;
    }
    store_four(out + row * HD + column, total, weights);
  }
}

constexpr int simple_warps = 8;
constexpr int simple_columns = 8;  // of each lane: head_dim is at most 256

template <class T, class E>
__device__ float cached_value(const E* row, int column, float scale) {
  if constexpr (std::is_same_v<E, std::uint8_t>) {
    return code_value<T>(row[column], scale);
  } else {
    return to_f32(row[column]);
  }
}

// Any dtype, head_dim and alignment, arithmetic in f32.
// Launch: chained; grid (heads, batch), 256 threads. Each warp takes every eighth key with the
// columns of the head dealt to its lanes; the warps merge at the end.
// Cost: k and v read once per query head, a warp reduction per key.
template <class T, class E>
__global__ void __launch_bounds__(simple_warps * 32)
    attn_step_simple_kernel(Args<T, E> args, int head_dim) {
  __shared__ float merged[simple_warps][simple_columns * 32];
  __shared__ float peaks[simple_warps];
  __shared__ float totals[simple_warps];
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto sequence = static_cast<std::int64_t>(blockIdx.y);
  const auto head = static_cast<std::int64_t>(blockIdx.x);
  const StripSource<E> cache =
      at_head(args.cache, sequence * args.capacity, static_cast<int>(head) / args.group, head_dim);
  chain_wait();
  const int seen = seen_keys(args.position, args.capacity);
  float q[simple_columns];
  float sums[simple_columns];
#pragma unroll
  for (int i = 0; i < simple_columns; ++i) {
    const int c = i * 32 + lane;
    q[i] = c < head_dim ? to_f32(args.q[sequence * args.q_stride + head * head_dim + c]) : 0.0F;
    sums[i] = 0.0F;
  }
  float peak = -INFINITY;
  float total = 0.0F;
  for (int key = warp; key < seen; key += simple_warps) {
    const E* k = cache.k + key * cache.k_stride;
    const E* v = cache.v + key * cache.v_stride;
    const bool codes = std::is_same_v<E, std::uint8_t>;
    const float k_scale = codes ? cache.k_scale[key * cache.k_scale_stride] : 0.0F;
    const float v_scale = codes ? cache.v_scale[key * cache.v_scale_stride] : 0.0F;
    float score = 0.0F;
    float value[simple_columns];
#pragma unroll
    for (int i = 0; i < simple_columns; ++i) {
      const int c = i * 32 + lane;
      if (c < head_dim) score += q[i] * cached_value<T>(k, c, k_scale);
      value[i] = c < head_dim ? cached_value<T>(v, c, v_scale) : 0.0F;
    }
    score = warp_reduce(score, SumOp{}) * args.scale;
    const float top = fmaxf(peak, score);
    const float base = top == -INFINITY ? 0.0F : top;
    const float shrink = expf(peak - base);
    const float weight = expf(score - base);
    peak = top;
    total = total * shrink + weight;
#pragma unroll
    for (int i = 0; i < simple_columns; ++i) sums[i] = sums[i] * shrink + weight * value[i];
  }
#pragma unroll
  for (int i = 0; i < simple_columns; ++i) merged[warp][i * 32 + lane] = sums[i];
  if (lane == 0) {
    peaks[warp] = peak;
    totals[warp] = total;
  }
  __syncthreads();
  float top = -INFINITY;
#pragma unroll
  for (int w = 0; w < simple_warps; ++w) top = fmaxf(top, peaks[w]);
  const int c = static_cast<int>(threadIdx.x);
  float value = 0.0F;
  float weights = 0.0F;
#pragma unroll
  for (int w = 0; w < simple_warps; ++w) {
    const float weight = top == -INFINITY ? 0.0F : expf(peaks[w] - top);
    value += weight * merged[w][c];
    weights += weight * totals[w];
  }
  if (c >= head_dim) return;
  args.out[sequence * args.out_stride + head * head_dim + c] = from_f32<T>(value / weights);
}

struct Problem {
  View q, position, out, workspace;
  const KvCache& cache;
  const AttnShape& shape;
  int multiprocessors;
  cudaStream_t stream;
};

template <class T, class E>
Args<T, E> make_args(const Problem& p, const Plan& plan, float scale) {
  Args<T, E> args{};
  args.q = static_cast<const T*>(p.q.data);
  args.out = static_cast<T*>(p.out.data);
  args.position = p.position.as<std::int32_t>();
  args.cache = {static_cast<const E*>(p.cache.k.data),
                static_cast<const E*>(p.cache.v.data),
                static_cast<const float*>(p.cache.k_scale.data),
                static_cast<const float*>(p.cache.v_scale.data),
                p.cache.k.stride,
                p.cache.v.stride,
                p.cache.k_scale.stride,
                p.cache.v_scale.stride};
  args.q_stride = p.q.stride;
  args.out_stride = p.out.stride;
  args.capacity = static_cast<int>(p.cache.capacity);
  args.kv_heads = static_cast<int>(p.shape.kv_heads);
  args.group = static_cast<int>(p.shape.heads / p.shape.kv_heads);
  args.row_tiles = static_cast<int>(plan.row_tiles);
  args.scale = scale;
  return args;
}

template <class T, int HD, class Strips>
void launch_tensor(const Problem& p) {
  const Plan plan = make_plan(p.shape, p.cache.batch, p.cache.capacity, p.multiprocessors);
  Args<T, typename Strips::Element> args =
      make_args<T, typename Strips::Element>(p, plan, log2_e / std::sqrt(static_cast<float>(HD)));
  const std::int64_t rows = partial_rows(p.shape, p.cache.batch, plan);
  if (rows > 0) {
    args.counters = static_cast<int*>(p.workspace.data);
    args.sums = reinterpret_cast<float*>(args.counters + max_counters);
    args.stats = reinterpret_cast<float2*>(args.sums + rows * HD);
  }
  const dim3 grid(static_cast<unsigned>(plan.splits),
                  static_cast<unsigned>(p.shape.kv_heads * plan.row_tiles),
                  static_cast<unsigned>(p.cache.batch));
  launch_chained("attention_step", attn_step_kernel<T, HD, Strips>, grid, threads,
                 warps * Strips::stages * Strips::stage_bytes, p.stream, args);
}

template <class T, int HD>
void launch_by_cache(const Problem& p) {
  if (p.cache.quantized()) {
    launch_tensor<T, HD, CodeStrips<T, HD>>(p);
  } else {
    launch_tensor<T, HD, PlainStrips<T, HD>>(p);
  }
}

template <class T>
void launch_by_head(const Problem& p) {
  switch (p.shape.head_dim) {
    case 32:
      return launch_by_cache<T, 32>(p);
    case 64:
      return launch_by_cache<T, 64>(p);
    case 128:
      return launch_by_cache<T, 128>(p);
    default:
      REQUIRE(false, "no tensor core kernel for head_dim " + std::to_string(p.shape.head_dim));
  }
}

template <class T, class E>
void launch_simple(const Problem& p) {
  const dim3 grid(static_cast<unsigned>(p.shape.heads), static_cast<unsigned>(p.cache.batch));
  launch_chained("attention_step", attn_step_simple_kernel<T, E>, grid, simple_warps * 32, 0,
                 p.stream,
                 make_args<T, E>(p, {1, 1}, 1.0F / std::sqrt(static_cast<float>(p.shape.head_dim))),
                 static_cast<int>(p.shape.head_dim));
}

bool fits_tensor_cores(const Problem& p) {
  const std::int64_t pack = p.cache.quantized() ? 16 : 8;
  return p.q.dtype != DType::f32 && has_tensor_kernel(p.shape.head_dim) &&
         aligned_rows(p.q, 16, 8) && aligned_rows(p.out, 16, 8) &&
         aligned_rows(p.cache.k, 16, pack) && aligned_rows(p.cache.v, 16, pack);
}

}  // namespace

// f16 and bf16 with a head_dim of 32, 64 or 128 and rows aligned to 16 bytes go to the tensor
// cores, everything else to the simple kernel.
void CudaOps::attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                             View out, View workspace) {
  check_attention_step(q, cache, shape, position, out);
  require_cuda("attention_step", {q, cache.k, cache.v, position, out});
  if (cache.quantized()) require_cuda("attention_step", {cache.k_scale, cache.v_scale});
  REQUIRE(cache.batch <= 65535 && shape.heads <= 65535, "attention_step of too large " + q.shape());
  const Problem p{q,      position, out, workspace, cache, shape, properties_.multiProcessorCount,
                  stream_};
  if (fits_tensor_cores(p)) {
    const std::int64_t needed = attention_step_bytes(shape, cache.batch, cache.capacity);
    REQUIRE(needed == 0 || (workspace.contiguous() && workspace.bytes() >= needed),
            "attention_step needs " + std::to_string(needed) + " bytes of workspace, got " +
                workspace.shape());
    if (needed > 0) {
      require_cuda("attention_step", {workspace});
      REQUIRE(aligned_rows(workspace, 16, 1), "attention_step: the workspace is misaligned");
    }
    return q.dtype == DType::f16 ? launch_by_head<__half>(p) : launch_by_head<__nv_bfloat16>(p);
  }
  dispatch_float(q.dtype, "attention_step", [&](auto tag) {
    using T = decltype(tag);
    if (cache.quantized()) return launch_simple<T, std::uint8_t>(p);
    launch_simple<T, T>(p);
  });
}

// Does not know the dtype and the alignment, so it asks for what the split kernel may need.
std::int64_t CudaOps::attention_step_bytes(const AttnShape& shape, std::int64_t batch,
                                           std::int64_t capacity) const {
  if (!has_tensor_kernel(shape.head_dim)) return 0;
  const std::int64_t rows = partial_rows(
      shape, batch, make_plan(shape, batch, capacity, properties_.multiProcessorCount));
  return rows == 0 ? 0 : max_counters * 4 + rows * (shape.head_dim + 2) * 4;
}

}  // namespace engine
