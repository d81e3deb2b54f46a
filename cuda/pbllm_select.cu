// CudaOps: PB-LLM's choice of salient weights (docs/methods/pbllm.md). The threshold of each group
// is an order statistic of the weights' ranks, f32 values >= 0 whose bits order as they do: three
// counts over 11, 11 and 10 of their bits find it. Counts are integers, so the order of the atomic
// additions does not matter, and ranks are computed operation for operation as on the CPU.
#include <string>
#include <type_traits>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int threads = 256;
constexpr int bins = 2048;
// Units longer than this get a whole block for their levels.
constexpr std::int64_t warp_unit = 1024;
// Weights of a group per block of the counts, at least.
constexpr std::int64_t count_grain = 16384;

// The weights of one linear and what ranks them.
struct Ranked {
  const float* w;
  std::int64_t stride;
  const float* squares;  // U_jj^2 of each column, or null: by magnitude
  std::int64_t rows;
  std::int64_t width;  // columns of a group
  std::int64_t groups;

  [[nodiscard]] __device__ std::uint32_t rank(float v, std::int64_t j) const {
    if (squares == nullptr) return __float_as_uint(fabsf(v));
    return __float_as_uint(__fdiv_rn(__fmul_rn(v, v), squares[j]));
  }
};

// What is known of a group's threshold: its high bits, and its place among the ranks that have
// them.
struct Threshold {
  std::int64_t place;
  std::uint32_t bits;
  std::uint32_t unused;
};

template <class T>
__global__ void __launch_bounds__(threads)
    squares_kernel(const T* r, std::int64_t stride, float* out, std::int64_t d) {
  const std::int64_t j =
      static_cast<std::int64_t>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (j >= d) return;
  float u = 0.0F;
  if constexpr (std::is_same_v<T, double>) {
    u = __double2float_rn(__ddiv_rn(1.0, r[j * stride + j]));
  } else {
    u = __fdiv_rn(1.0F, r[j * stride + j]);
  }
  out[j] = __fmul_rn(u, u);
}

__global__ void __launch_bounds__(threads)
    begin_kernel(Threshold* thresholds, std::uint32_t* counts, std::int64_t groups,
                 std::int64_t place) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  for (std::int64_t i = first; i < groups * bins; i += step) counts[i] = 0;
  for (std::int64_t g = first; g < groups; g += step) thresholds[g] = {place, 0, 0};
}

// Adds the weights of a group whose rank's bits above kShift + kBits are those of its threshold to
// the counts [groups, 2048] of the kBits bits from kShift on. `pieces` blocks per group of
// `rows` rows each; `across` (a power of two, at most 256) threads go along a row. One reading of
// w; counts in shared memory, of which only what occurs goes to global memory.
template <int kShift, int kBits>
__global__ void __launch_bounds__(threads, 6)
    count_kernel(const Ranked p, const Threshold* thresholds, std::uint32_t* counts, int pieces,
                 std::int64_t rows, int across) {
  static_assert(1 << kBits <= bins);
  __shared__ std::uint32_t own[1 << kBits];
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 1 << kBits; i += threads) own[i] = 0;
  __syncthreads();
  const std::int64_t group = blockIdx.x / static_cast<unsigned>(pieces);
  const std::int64_t row0 = blockIdx.x % static_cast<unsigned>(pieces) * rows;
  const std::int64_t row1 = min(row0 + rows, p.rows);
  const std::int64_t first = group * p.width;
  const std::uint32_t known = thresholds[group].bits;
  const int down = threads / across;
  for (std::int64_t c = thread % across; c < p.width; c += across) {
    const float* w = p.w + first + c;
#pragma unroll 4
    for (std::int64_t row = row0 + thread / across; row < row1; row += down) {
      const std::uint32_t bits = p.rank(w[row * p.stride], first + c);
      const bool candidate = kShift + kBits == 32 || (bits ^ known) >> ((kShift + kBits) % 32) == 0;
      if (candidate) atomicAdd(&own[(bits >> kShift) & ((1U << kBits) - 1U)], 1U);
    }
  }
  __syncthreads();
  for (int i = thread; i < 1 << kBits; i += threads) {
    if (own[i] != 0) atomicAdd(&counts[group * bins + i], own[i]);
  }
}

// The next bits of each group's threshold from its counts, which become zeros again. A block per
// group; one thread walks over 256 sums and then over the bins of one of them.
template <int kShift, int kBits>
__global__ void __launch_bounds__(threads)
    narrow_kernel(Threshold* thresholds, std::uint32_t* counts) {
  constexpr int share = (1 << kBits) / threads;
  __shared__ std::int64_t sums[threads];
  const int thread = static_cast<int>(threadIdx.x);
  std::uint32_t* own = counts + static_cast<std::int64_t>(blockIdx.x) * bins;
  std::int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < share; ++i) sum += own[thread * share + i];
  sums[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    Threshold& t = thresholds[blockIdx.x];
    std::int64_t place = t.place;
    int part = 0;
    while (part < threads - 1 && place >= sums[part]) place -= sums[part++];
    int bin = part * share;
    while (bin < part * share + share - 1 && place >= own[bin]) place -= own[bin++];
    t.place = place;
    t.bits |= static_cast<std::uint32_t>(bin) << kShift;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < share; ++i) own[thread * share + i] = 0;
}

__device__ inline float round_stored(DType dtype, float v) {
  if (dtype == DType::f16) return round_through<__half>(v);
  if (dtype == DType::bf16) return round_through<__nv_bfloat16>(v);
  return v;
}

// Mask and levels of every row and group: one block (kBlock) or one warp each. Two readings of the
// unit, the second from the cache.
template <bool kBlock>
__global__ void __launch_bounds__(threads)
    levels_kernel(const Ranked p, const Threshold* thresholds, DType scale_dtype,
                  std::uint8_t* salient, std::int64_t salient_stride, float* means,
                  std::int64_t mean_stride, float* scales, std::int64_t scale_stride) {
  __shared__ double scratch[32];
  constexpr int step = kBlock ? threads : 32;
  constexpr int per_block = threads / step;
  const int thread = static_cast<int>(threadIdx.x) % step;
  const std::int64_t unit =
      static_cast<std::int64_t>(blockIdx.x) * per_block + static_cast<int>(threadIdx.x) / step;
  if (unit >= p.rows * p.groups) return;  // whole warps, and no whole block
  const std::int64_t row = unit / p.groups;
  const std::int64_t group = unit % p.groups;
  const std::int64_t first = group * p.width;
  const float* w = p.w + row * p.stride + first;
  std::uint8_t* mask = salient + row * salient_stride + first;
  const std::uint32_t threshold = thresholds[group].bits;
  const auto total = [&](double v) {
    if constexpr (kBlock) {
      return block_reduce(v, SumOp{}, 0.0, scratch);
    } else {
      return warp_reduce(v, SumOp{});
    }
  };

  // Both averages run over the whole row of the group: salient weights count as zeros.
  const auto n = static_cast<double>(p.width);
  double sum = 0;
#pragma unroll 4
  for (std::int64_t c = thread; c < p.width; c += step) {
    const float v = w[c];
    const bool high = p.rank(v, first + c) > threshold;
    mask[c] = high ? 1 : 0;
    if (!high) sum += static_cast<double>(v);
  }
  const float mean = round_stored(scale_dtype, __double2float_rn(__ddiv_rn(total(sum), n)));
  double distance = 0;
#pragma unroll 4
  for (std::int64_t c = thread; c < p.width; c += step) {
    const float v = mask[c] == 0 ? w[c] : 0.0F;  // this thread's own byte
    distance += static_cast<double>(fabsf(__fsub_rn(v, mean)));
  }
  distance = total(distance);
  if (thread == 0) {
    means[row * mean_stride + group] = mean;
    scales[row * scale_stride + group] =
        round_stored(scale_dtype, __double2float_rn(__ddiv_rn(distance, n)));
  }
}

struct Layout {
  std::int64_t thresholds, counts, squares, total;
  Layout(std::int64_t d, std::int64_t groups)
      : thresholds(0),
        counts(groups * static_cast<std::int64_t>(sizeof(Threshold))),
        squares(counts + groups * bins * 4),
        total(squares + d * 4) {}
};

void check_select(const PbllmSelect& p, std::int64_t groups) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto require_shape = [](const char* what, const View& v, DType dtype, std::int64_t r,
                                std::int64_t c) {
    REQUIRE(v.dtype == dtype && v.rows == r && v.cols == c,
            std::string("pbllm_select: ") + what + " expected " + dtype_name(dtype) + " [" +
                std::to_string(r) + ", " + std::to_string(c) + "], found " + v.shape());
    require_cuda("pbllm_select", {v});
  };
  REQUIRE(p.low_share >= 0.0 && p.low_share < 1.0,
          "pbllm_select: low_share " + std::to_string(p.low_share));
  require_shape("w", p.w, DType::f32, rows, d);
  if (p.metric == PbllmMetric::hessian) {
    REQUIRE(p.r.dtype == DType::f32 || p.r.dtype == DType::f64,
            "pbllm_select: factor " + p.r.shape());
    require_shape("factor", p.r, p.r.dtype, d, d);
  }
  require_shape("salient", p.salient, DType::u8, rows, d);
  require_shape("means", p.means, DType::f32, rows, groups);
  require_shape("scales", p.scales, DType::f32, rows, groups);
  require_cuda("pbllm_select", {p.workspace});
  REQUIRE(p.workspace.contiguous() && p.workspace.bytes() >= Layout(d, groups).total,
          "pbllm_select: workspace " + p.workspace.shape());
}

}  // namespace

std::int64_t CudaOps::pbllm_select_bytes(std::int64_t /*rows*/, std::int64_t d,
                                         std::int64_t groups) {
  return Layout(d, groups).total;
}

void CudaOps::pbllm_select(const PbllmSelect& problem) {
  const std::int64_t rows = problem.w.rows, d = problem.w.cols;
  REQUIRE(rows > 0 && d > 0 && rows * d < (std::int64_t{1} << 31),
          "pbllm_select: w " + problem.w.shape());
  REQUIRE(problem.group >= 0 && (problem.group == 0 || d % problem.group == 0),
          "pbllm_select: groups of " + std::to_string(problem.group) + " of " + std::to_string(d) +
              " columns");
  const std::int64_t width = problem.group == 0 ? d : problem.group;
  const std::int64_t groups = d / width;
  check_select(problem, groups);
  const Layout layout(d, groups);
  auto* base = problem.workspace.as<std::uint8_t>();
  auto* thresholds = reinterpret_cast<Threshold*>(base + layout.thresholds);
  auto* counts = reinterpret_cast<std::uint32_t*>(base + layout.counts);
  Ranked ranked{problem.w.as<float>(), problem.w.stride, nullptr, rows, width, groups};
  if (problem.metric == PbllmMetric::hessian) {
    auto* squares = reinterpret_cast<float*>(base + layout.squares);
    ranked.squares = squares;
    const dim3 grid(static_cast<unsigned>(ceil_div(d, threads)));
    if (problem.r.dtype == DType::f64) {
      launch("pbllm_select (factor)", squares_kernel<double>, grid, dim3(threads), 0, stream_,
             problem.r.as<double>(), problem.r.stride, squares, d);
    } else {
      launch("pbllm_select (factor)", squares_kernel<float>, grid, dim3(threads), 0, stream_,
             problem.r.as<float>(), problem.r.stride, squares, d);
    }
  }
  const auto place =
      static_cast<std::int64_t>(static_cast<double>(rows * width) * problem.low_share);
  launch(
      "pbllm_select (begin)", begin_kernel,
      dim3(static_cast<unsigned>(std::min<std::int64_t>(ceil_div(groups * bins, threads), 1024))),
      dim3(threads), 0, stream_, thresholds, counts, groups, place);

  const std::int64_t piece_rows = std::min(rows, ceil_div(count_grain, width));
  const std::int64_t pieces = ceil_div(rows, piece_rows);
  int across = 32;
  while (across < threads && across < width) across *= 2;
  const auto pass = [&](auto shift, auto bits) {
    constexpr int kShift = decltype(shift)::value;
    constexpr int kBits = decltype(bits)::value;
    launch("pbllm_select (count)", count_kernel<kShift, kBits>,
           dim3(static_cast<unsigned>(groups * pieces)), dim3(threads), 0, stream_, ranked,
           thresholds, counts, static_cast<int>(pieces), piece_rows, across);
    launch("pbllm_select (narrow)", narrow_kernel<kShift, kBits>,
           dim3(static_cast<unsigned>(groups)), dim3(threads), 0, stream_, thresholds, counts);
  };
  pass(std::integral_constant<int, 21>{}, std::integral_constant<int, 11>{});
  pass(std::integral_constant<int, 10>{}, std::integral_constant<int, 11>{});
  pass(std::integral_constant<int, 0>{}, std::integral_constant<int, 10>{});

  const bool whole_block = width > warp_unit;
  const std::int64_t units = rows * groups;
  launch("pbllm_select (levels)", whole_block ? levels_kernel<true> : levels_kernel<false>,
         dim3(static_cast<unsigned>(whole_block ? units : ceil_div(units, threads / 32))),
         dim3(threads), 0, stream_, ranked, thresholds, problem.scale_dtype,
         problem.salient.as<std::uint8_t>(), problem.salient.stride, problem.means.as<float>(),
         problem.means.stride, problem.scales.as<float>(), problem.scales.stride);
}

}  // namespace engine
