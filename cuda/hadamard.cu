// The hadamard case of transform_rows: one block per row, which stays in shared memory.
#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/any_float.cuh"
#include "cuda/check.h"
#include "cuda/hadamard.cuh"
#include "cuda/transform.h"

namespace engine {
namespace {

constexpr int warp = 32;

// Rows of x by H^T diag(signs), or with `inverse` by diag(signs) H. kOrder: K if it is 1, 12, 20,
// 28 or 36, else 0. Shared memory: [d] the row, then H_K (its transpose if `inverse`); for kOrder 0
// [d] twice and H_K as bytes. Five levels go by exchange within a warp, the others by up to four in
// registers. Bound by memory.
template <int kOrder>
__global__ void __launch_bounds__(512)
    hadamard_kernel(const void* x, DType x_dtype, std::int64_t x_stride, const float* signs,
                    const float* small, int order, int d, bool inverse, float scale, void* out,
                    DType out_dtype, std::int64_t out_stride) {
  extern __shared__ float4 shared[];
  float* row = reinterpret_cast<float*>(shared);
  float* result = row;
  const int power = d / order;
  const int rounded = (d + 3) / 4 * 4;
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const std::int64_t from = blockIdx.x * x_stride, to = blockIdx.x * out_stride;

  for (int first = 0; first < d; first += threads) {
    const int i = first + t;
    float v = i < d ? load_any(x, x_dtype, from + i) : 0.0F;
    if (!inverse && i < d) v *= signs[i];
    for (int half = 1; half < power && half < warp; half *= 2) {
      const float other = __shfl_xor_sync(0xffffffffU, v, half);
      v = (i & half) != 0 ? __fsub_rn(other, v) : __fadd_rn(v, other);
    }
    if (i < d) row[i] = v;
  }
  if constexpr (kOrder > 1) {
    float* h = row + rounded;
    for (int i = t; i < kOrder * kOrder; i += threads) {
      h[i] = small[inverse ? i % kOrder * kOrder + i / kOrder : i];
    }
  }
  if constexpr (kOrder == 0) {
    auto* h = reinterpret_cast<signed char*>(row + 2 * rounded);
    for (int i = t; i < order * order; i += threads) {
      h[i] = static_cast<signed char>(small[inverse ? i % order * order + i / order : i]);
    }
  }
  __syncthreads();
  add_all_levels(row, d, power, warp);
  if constexpr (kOrder > 1) mix_small<kOrder>(row, power, row + rounded);
  if constexpr (kOrder == 0) {
    result = row + rounded;
    mix_any(row, d, order, reinterpret_cast<const signed char*>(row + 2 * rounded), result);
  }
  for (int i = t; i < d; i += threads) {
    const float factor = inverse ? scale * signs[i] : scale;
    store_any(out, out_dtype, to + i, result[i] * factor);
  }
}

}  // namespace

void hadamard_rows(const View& x, const TransformView& q, bool inverse, const View& out,
                   std::size_t shared_limit, cudaStream_t stream) {
  require_cuda("transform_rows", {q.signs});
  if (q.order > 1) require_cuda("transform_rows", {q.small});
  const auto row = static_cast<std::size_t>((q.d + 3) / 4 * 4) * sizeof(float);
  const auto elements = static_cast<std::size_t>(q.order * q.order);
  const bool small = q.order <= 36;
  const std::size_t shared =
      small ? row + (q.order > 1 ? elements * sizeof(float) : 0) : 2 * row + elements;
  if (shared > shared_limit) {
    throw Error(ErrorCode::device, "transform_rows: a Hadamard transform of size " +
                                       std::to_string(q.d) + " takes " + std::to_string(shared) +
                                       " bytes of shared memory, this device has " +
                                       std::to_string(shared_limit) + ": use --device cpu");
  }
  const auto threads = static_cast<unsigned>(
      std::clamp<std::int64_t>(ceil_div(ceil_div(q.d, 8), warp) * warp, 64, 512));
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.d)));
  const auto run = [&](auto* kernel) {
    constexpr std::int64_t most = std::int64_t{1} << 30;  // rows of one launch
    for (std::int64_t first = 0; first < x.rows; first += most) {
      const View in = x.row_range(first, std::min(most, x.rows - first));
      const View to = out.row_range(first, in.rows);
      launch("transform_rows", kernel, dim3(static_cast<unsigned>(in.rows)), dim3(threads), shared,
             stream, in.data, in.dtype, in.stride, q.signs.as<float>(),
             q.order > 1 ? q.small.as<float>() : nullptr, static_cast<int>(q.order),
             static_cast<int>(q.d), inverse, scale, to.data, to.dtype, to.stride);
    }
  };
  switch (q.order) {
    case 1:
      return run(hadamard_kernel<1>);
    case 12:
      return run(hadamard_kernel<12>);
    case 20:
      return run(hadamard_kernel<20>);
    case 28:
      return run(hadamard_kernel<28>);
    case 36:
      return run(hadamard_kernel<36>);
    default:
      return run(hadamard_kernel<0>);
  }
}

}  // namespace engine
