// Hadamard transforms of few rows: bound by how long their steps follow each other.
#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "cuda/any_float.cuh"
#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/hadamard.cuh"
#include "cuda/rotate.h"

namespace engine {
namespace {

constexpr int warp = 32;
constexpr std::int64_t most_threads = 512;

struct HadamardPart {
  const float* signs;
  const float* small;
  const float* diagonal;  // of the input, or null
  const void* in;
  void* out;
  std::int64_t in_stride, out_stride;
  DType in_dtype, out_dtype;
  int d;
  float scale;  // of the result
};
struct HadamardArgs {
  HadamardPart part[rotate_max_parts];
  int order;
  bool inverse, add;
};

// ---- Over several blocks: d = rows of `blocks` x `power` elements ----

constexpr int spread_threads = 512;
constexpr int spread_warps = spread_threads / warp;
constexpr int most_inputs = 64;     // of a thread
constexpr int spread_blocks = 264;  // with more, a block takes several rows of x

struct SpreadPart {
  const float* signs;
  const float* small;     // H_K, or null if K is 1
  const float* diagonal;  // of the input, or null
  const void* in;
  void* out;
  std::int64_t in_stride, out_stride;
  DType in_dtype, out_dtype;
  int order;                  // K
  int blocks;                 // K 2^s
  int log_spread, log_power;  // s, and 5 to 9
  float scale;                // of the result
};
struct SpreadArgs {
  SpreadPart part[rotate_max_parts];
  int rows;
  bool inverse, add;
};

// How a transform of size d is divided, or false: by the other kernel.
struct Spread {
  bool fits = false;
  int order = 1, blocks = 1, log_spread = 0, log_power = 0;
};
Spread spread_of(std::int64_t d) {
  Spread s;
  const std::int64_t order = hadamard_order(d);
  if (order <= 0 || d > most_inputs * spread_threads) return s;
  const auto power = static_cast<std::uint64_t>(d / order);
  s.order = static_cast<int>(order);
  s.log_power = std::min(std::countr_zero(power), std::countr_zero(unsigned{spread_threads}));
  s.log_spread = std::countr_zero(power) - s.log_power;
  s.blocks = s.order << s.log_spread;
  s.fits = s.log_power >= 5;
  return s;
}

// The sum of a thread's inputs, n of them spread_threads apart, with signs, kAtOnce asked for at a
// time.
template <int kAtOnce, class T>
__device__ float sum_inputs(const T* in, const float* diagonal, int n, std::uint64_t flips) {
  float sum = 0.0F;
#pragma unroll 1
  for (int first = 0; first < n; first += kAtOnce) {
    float v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      v[j] = first + j < n ? to_f32(in[(first + j) * spread_threads]) : 0.0F;
    }
    if (diagonal != nullptr) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j < n) v[j] *= diagonal[(first + j) * spread_threads];
      }
    }
    const auto bits = static_cast<std::uint32_t>(flips >> first);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sum = __fadd_rn(sum, __uint_as_float(__float_as_uint(v[j]) ^ (bits >> j << 31)));
    }
  }
  return sum;
}
template <class T>
__device__ float sum_inputs(const void* in, std::int64_t from, const float* diagonal, int n,
                            std::uint64_t flips) {
  const T* at = static_cast<const T*>(in) + from;
  return n <= 8 ? sum_inputs<8>(at, diagonal, n, flips) : sum_inputs<32>(at, diagonal, n, flips);
}

// The signs of a thread's inputs as bits, 1 for -1: those of the transform and of row k of
// H_blocks.
template <int kAtOnce>
__device__ std::uint64_t input_signs(const SpreadPart& s, bool inverse, int k, int n) {
  const int t = static_cast<int>(threadIdx.x);
  const int first = t >> s.log_power, step = spread_threads >> s.log_power;
  const int spread = (1 << s.log_spread) - 1;
  std::uint64_t flips = 0;
#pragma unroll 1
  for (int at = 0; at < n; at += kAtOnce) {
    float sign[kAtOnce], element[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = (first + (at + j) * step) >> s.log_spread, to = k >> s.log_spread;
      sign[j] = element[j] = 1.0F;
      if (at + j < n && !inverse) sign[j] = s.signs[t + (at + j) * spread_threads];
      if (at + j < n && s.small != nullptr) {
        element[j] = s.small[inverse ? to * s.order + i : i * s.order + to];
      }
    }
    std::uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int within = (first + (at + j) * step) & k & spread;  // of a Sylvester matrix
      const std::uint32_t two = (__float_as_uint(sign[j]) ^ __float_as_uint(element[j])) >> 31;
      bits |= ((two ^ static_cast<std::uint32_t>(__popc(within))) & 1U) << j;
    }
    flips |= static_cast<std::uint64_t>(bits) << at;
  }
  return flips;
}

// H_d = H_blocks kron H_power: block k makes the k-th `power` elements of the result. It reads all
// of the input, and first takes the sums with row k of H_blocks for each of `power` columns: a
// thread has one column and every (512 / power)-th input of it, whose signs (those of the transform
// and of H_blocks) it has collected as bits before the input is there. Of H_power the first five
// levels go by exchange within a warp, the others, with the sums of the threads of one column,
// through shared memory: a thread reads all 16 warps' values and adds up its own result.
//
// Launch: blockIdx.x is k, .y the part, .z and gridDim.z rows of x. Results repeat.
__global__ void __launch_bounds__(spread_threads)
    hadamard_spread_kernel(const __grid_constant__ SpreadArgs args) {
  __shared__ float sums[spread_threads];
  chain_trigger();
  const SpreadPart& s = args.part[blockIdx.y];
  const int k = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x);
  const int power = 1 << s.log_power, step = spread_threads >> s.log_power;
  const int first = t >> s.log_power, lane = t % warp, own_warp = t / warp;
  const bool mine = k < s.blocks;
  const int n = mine ? (s.blocks - first + step - 1) / step : 0;
  const std::uint64_t flips =
      n <= 8 ? input_signs<8>(s, args.inverse, k, n) : input_signs<32>(s, args.inverse, k, n);
  float scale = s.scale;
  const int place = k * power + t;  // of the result, t < power
  if (args.inverse && mine && t < power) scale *= s.signs[place];
  chain_wait();
  if (!mine) return;
  for (int row = static_cast<int>(blockIdx.z); row < args.rows;
       row += static_cast<int>(gridDim.z)) {
    const std::int64_t from = row * s.in_stride + t;
    const float* diagonal = s.diagonal == nullptr ? nullptr : s.diagonal + t;
    float v;
    if (s.in_dtype == DType::f32) {
      v = sum_inputs<float>(s.in, from, diagonal, n, flips);
    } else if (s.in_dtype == DType::f16) {
      v = sum_inputs<__half>(s.in, from, diagonal, n, flips);
    } else {
      v = sum_inputs<__nv_bfloat16>(s.in, from, diagonal, n, flips);
    }
    const std::int64_t to = row * s.out_stride + place;
    const float old = args.add && t < power ? load_any(s.out, s.out_dtype, to) : 0.0F;
#pragma unroll
    for (int half = 1; half < warp; half *= 2) {
      const float other = __shfl_xor_sync(0xffffffffU, v, half);
      v = (lane & half) != 0 ? __fsub_rn(other, v) : __fadd_rn(v, other);
    }
    sums[t] = v;
    __syncthreads();
    if (t < power) {
      // Warps beyond `power` hold other inputs of the same columns: those bits of own_warp are 0,
      // so that they are added.
      float a[spread_warps];
#pragma unroll
      for (int w = 0; w < spread_warps; ++w) a[w] = sums[w * warp + lane];
#pragma unroll
      for (int bit = 1; bit < spread_warps; bit *= 2) {
        const bool minus = (own_warp & bit) != 0;
#pragma unroll
        for (int w = 0; w < spread_warps / 2 / bit; ++w) {
          a[w] = minus ? __fsub_rn(a[2 * w], a[2 * w + 1]) : __fadd_rn(a[2 * w], a[2 * w + 1]);
        }
      }
      const float result = a[0] * scale;
      store_any(s.out, s.out_dtype, to, args.add ? old + result : result);
    }
    __syncthreads();
  }
}

float scale_of(float factor, std::int64_t d) {
  return static_cast<float>(static_cast<double>(factor) / std::sqrt(static_cast<double>(d)));
}

void run_spread(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                cudaStream_t stream) {
  SpreadArgs args{};
  args.rows = static_cast<int>(parts[0].in.rows);
  args.inverse = inverse;
  args.add = add;
  int blocks = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const RotatePart& part = parts[i];
    const TransformView& q = *part.q;
    const Spread s = spread_of(q.d);
    REQUIRE(s.order == q.order && q.small.empty() == (s.order == 1),
            "rotate_rows: a Hadamard matrix of size " + std::to_string(q.order));
    args.part[i] = {q.signs.as<float>(),
                    q.small.empty() ? nullptr : q.small.as<float>(),
                    part.diagonal.empty() ? nullptr : part.diagonal.as<float>(),
                    part.in.data,
                    part.out.data,
                    part.in.stride,
                    part.out.stride,
                    part.in.dtype,
                    part.out.dtype,
                    s.order,
                    s.blocks,
                    s.log_spread,
                    s.log_power,
                    scale_of(factor, q.d)};
    blocks = std::max(blocks, s.blocks);
  }
  const auto n = static_cast<int>(parts.size());
  const int deep = std::clamp(spread_blocks / (blocks * n), 1, args.rows);
  launch_chained(
      "rotate_rows", hadamard_spread_kernel,
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(n), static_cast<unsigned>(deep)),
      dim3(spread_threads), 0, stream, args);
}

// ---- Other sizes: a row in one block ----

constexpr int rounded(int d) { return (d + 3) / 4 * 4; }

// As hadamard_kernel (hadamard.cu), for row blockIdx.x of part blockIdx.y. kOrder: K if it is 1,
// 12, 20, 28 or 36, else 0.
template <int kOrder>
__global__ void __launch_bounds__(most_threads)
    hadamard_step_kernel(const __grid_constant__ HadamardArgs args) {
  extern __shared__ float4 shared[];
  chain_trigger();
  const HadamardPart& s = args.part[blockIdx.y];
  float* row = reinterpret_cast<float*>(shared);
  float* result = row;
  const int d = s.d, order = args.order, power = d / order;
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const std::int64_t from = blockIdx.x * s.in_stride, to = blockIdx.x * s.out_stride;
  const auto element = [&](int i) {
    return s.small[args.inverse ? i % order * order + i / order : i];
  };
  if constexpr (kOrder > 1) {
    float* h = row + rounded(d);
    for (int i = t; i < kOrder * kOrder; i += threads) h[i] = element(i);
  }
  if constexpr (kOrder == 0) {
    auto* h = reinterpret_cast<signed char*>(row + 2 * rounded(d));
    for (int i = t; i < order * order; i += threads) h[i] = static_cast<signed char>(element(i));
  }
  chain_wait();
  for (int first = 0; first < d; first += threads) {
    const int i = first + t;
    float v = i < d ? load_any(s.in, s.in_dtype, from + i) : 0.0F;
    if (i < d && s.diagonal != nullptr) v *= s.diagonal[i];
    if (!args.inverse && i < d) v *= s.signs[i];
    for (int half = 1; half < power && half < warp; half *= 2) {
      const float other = __shfl_xor_sync(0xffffffffU, v, half);
      v = (i & half) != 0 ? __fsub_rn(other, v) : __fadd_rn(v, other);
    }
    if (i < d) row[i] = v;
  }
  __syncthreads();
  add_all_levels(row, d, power, warp);
  if constexpr (kOrder > 1) mix_small<kOrder>(row, power, row + rounded(d));
  if constexpr (kOrder == 0) {
    result = row + rounded(d);
    mix_any(row, d, order, reinterpret_cast<const signed char*>(row + 2 * rounded(d)), result);
  }
  for (int i = t; i < d; i += threads) {
    const float v = result[i] * (args.inverse ? s.scale * s.signs[i] : s.scale);
    store_any(s.out, s.out_dtype, to + i, args.add ? load_any(s.out, s.out_dtype, to + i) + v : v);
  }
}

std::size_t shared_bytes(std::int64_t d, std::int64_t order) {
  const auto row = static_cast<std::size_t>(rounded(static_cast<int>(d))) * sizeof(float);
  const auto elements = static_cast<std::size_t>(order * order);
  if (order == 1) return row;
  return order <= 36 ? row + elements * sizeof(float) : 2 * row + elements;
}

void run(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
         std::size_t shared_limit, cudaStream_t stream) {
  HadamardArgs args{};
  args.order = static_cast<int>(parts[0].q->order);
  args.inverse = inverse;
  args.add = add;
  std::int64_t widest = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const RotatePart& part = parts[i];
    const TransformView& q = *part.q;
    args.part[i] = {q.signs.as<float>(),
                    q.small.empty() ? nullptr : q.small.as<float>(),
                    part.diagonal.empty() ? nullptr : part.diagonal.as<float>(),
                    part.in.data,
                    part.out.data,
                    part.in.stride,
                    part.out.stride,
                    part.in.dtype,
                    part.out.dtype,
                    static_cast<int>(q.d),
                    scale_of(factor, q.d)};
    widest = std::max(widest, q.d);
  }
  const std::size_t shared = shared_bytes(widest, args.order);
  REQUIRE(shared <= shared_limit,
          "rotate_rows: no room for a Hadamard transform of size " + std::to_string(widest));
  const auto threads = static_cast<unsigned>(
      std::clamp<std::int64_t>(ceil_div(ceil_div(widest, 8), warp) * warp, 64, most_threads));
  const dim3 grid(static_cast<unsigned>(parts[0].in.rows), static_cast<unsigned>(parts.size()));
  const auto start = [&](auto* kernel) {
    launch_chained("rotate_rows", kernel, grid, dim3(threads), shared, stream, args);
  };
  switch (args.order) {
    case 1:
      return start(hadamard_step_kernel<1>);
    case 12:
      return start(hadamard_step_kernel<12>);
    case 20:
      return start(hadamard_step_kernel<20>);
    case 28:
      return start(hadamard_step_kernel<28>);
    case 36:
      return start(hadamard_step_kernel<36>);
    default:
      return start(hadamard_step_kernel<0>);
  }
}

}  // namespace

bool rotate_fits(const RotationSide& side, std::int64_t d, std::size_t shared_limit) {
  return side.kind != TransformKind::hadamard || spread_of(d).fits ||
         shared_bytes(d, hadamard_order(d)) <= shared_limit;
}

// One launch; where sizes are odd, one for the parts of an order.
void rotate_hadamard(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                     std::size_t shared_limit, cudaStream_t stream) {
  if (parts[0].in.rows == 0) return;
  if (std::ranges::all_of(parts, [](const RotatePart& p) { return spread_of(p.q->d).fits; })) {
    return run_spread(parts, inverse, add, factor, stream);
  }
  for (std::size_t first = 0; first < parts.size();) {
    std::size_t n = 1;
    while (first + n < parts.size() && parts[first + n].q->order == parts[first].q->order) ++n;
    run(parts.subspan(first, n), inverse, add, factor, shared_limit, stream);
    first += n;
  }
}

}  // namespace engine
