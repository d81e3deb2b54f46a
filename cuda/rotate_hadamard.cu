// Hadamard transforms of few rows, each in one block: bound by how long its steps follow each
// other.
#include <algorithm>
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
    args.part[i] = {
        q.signs.as<float>(),
        q.small.empty() ? nullptr : q.small.as<float>(),
        part.diagonal.empty() ? nullptr : part.diagonal.as<float>(),
        part.in.data,
        part.out.data,
        part.in.stride,
        part.out.stride,
        part.in.dtype,
        part.out.dtype,
        static_cast<int>(q.d),
        static_cast<float>(static_cast<double>(factor) / std::sqrt(static_cast<double>(q.d)))};
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
  return side.kind != TransformKind::hadamard || shared_bytes(d, hadamard_order(d)) <= shared_limit;
}

// Parts of one order share a launch.
void rotate_hadamard(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                     std::size_t shared_limit, cudaStream_t stream) {
  for (std::size_t first = 0; first < parts.size();) {
    std::size_t n = 1;
    while (first + n < parts.size() && parts[first + n].q->order == parts[first].q->order) ++n;
    run(parts.subspan(first, n), inverse, add, factor, shared_limit, stream);
    first += n;
  }
}

}  // namespace engine
