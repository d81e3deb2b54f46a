#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int row_threads = 512;
constexpr int flat_threads = 256;
constexpr int max_partials = 1024;  // 16 KiB of the small buffer

// One block per row, one reading of the row: each thread keeps a running maximum and the sum of
// exponentials relative to it (sums in f64), and the block merges them. N elements per access.
template <int N>
__global__ void __launch_bounds__(row_threads)
    row_nll_kernel(const float* logits, std::int64_t logits_stride, const std::int32_t* target,
                   std::int64_t target_stride, double* nll, std::int64_t nll_stride,
                   std::int64_t vocab) {
  __shared__ float max_scratch[32];
  __shared__ double sum_scratch[32];
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const std::int32_t wanted = target[r * target_stride];
  if (wanted < 0) {  // the same for the whole block
    if (threadIdx.x == 0) nll[r * nll_stride] = 0.0;
    return;
  }
  const float* row = logits + r * logits_stride;
  float peak = -INFINITY;
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < vocab / N; i += row_threads) {
    const auto p = reinterpret_cast<const Pack<float, N>*>(row)[i];
    float top = peak;
#pragma unroll
    for (int e = 0; e < N; ++e) top = fmaxf(top, p.v[e]);
    // Before the first finite value there is nothing to rescale and nothing to subtract.
    const float shift = top == -INFINITY ? 0.0F : top;
    if (top > peak) {
      sum *= static_cast<double>(expf(peak - shift));
      peak = top;
    }
    float part = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) part += expf(p.v[e] - shift);
    sum += static_cast<double>(part);
  }
  const float top = block_reduce(peak, MaxOp{}, -INFINITY, max_scratch);
  sum *= static_cast<double>(expf(peak - top));
  sum = block_reduce(sum, SumOp{}, 0.0, sum_scratch);
  if (threadIdx.x == 0) {
    nll[r * nll_stride] = log(sum) + (static_cast<double>(top) - static_cast<double>(row[wanted]));
  }
}

// One block per row. Ties go to the lower index; a row without anything above -infinity gives 0.
__global__ void __launch_bounds__(row_threads)
    row_argmax_kernel(const float* logits, std::int64_t logits_stride, std::int32_t* out,
                      std::int64_t out_stride, std::int64_t vocab) {
  __shared__ float values[row_threads];
  __shared__ std::int32_t places[row_threads];
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const float* row = logits + r * logits_stride;
  float best = -INFINITY;
  std::int32_t place = 0x7fffffff;
  for (std::int64_t i = threadIdx.x; i < vocab; i += row_threads) {
    if (row[i] > best) {
      best = row[i];
      place = static_cast<std::int32_t>(i);
    }
  }
  values[threadIdx.x] = best;
  places[threadIdx.x] = place;
  for (unsigned half = row_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    const float other = values[threadIdx.x + half];
    const std::int32_t other_place = places[threadIdx.x + half];
    const bool tie = other == values[threadIdx.x] && other_place < places[threadIdx.x];
    if (other > values[threadIdx.x] || tie) {
      values[threadIdx.x] = other;
      places[threadIdx.x] = other_place;
    }
  }
  if (threadIdx.x == 0) out[r * out_stride] = places[0] == 0x7fffffff ? 0 : places[0];
}

template <class T, int N>
__device__ int nonfinite_in(const Pack<T, N>& p) {
  int found = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (std::is_same_v<T, double>) {
      found += isfinite(p.v[e]) ? 0 : 1;
    } else {
      found += isfinite(to_f32(p.v[e])) ? 0 : 1;
    }
  }
  return found;
}

// Grid-stride over all packs, four loads in flight: this is also the measure of what reading alone
// reaches (engine/ops/peak.h). The counts are integers, so the order of the atomics is irrelevant.
template <class T, int N>
__global__ void __launch_bounds__(flat_threads)
    count_nonfinite_kernel(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t packs,
                           unsigned long long* count) {
  constexpr int in_flight = 4;
  using P = Pack<T, N>;
  __shared__ int scratch[32];
  int found = 0;
  const std::int64_t step = std::int64_t{gridDim.x} * flat_threads;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const P* row = reinterpret_cast<const P*>(x + r * stride);
    std::int64_t i = std::int64_t{blockIdx.x} * flat_threads + threadIdx.x;
    for (; i + (in_flight - 1) * step < packs; i += in_flight * step) {
      P p[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) p[k] = row[i + k * step];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) found += nonfinite_in(p[k]);
    }
    for (; i < packs; i += step) found += nonfinite_in(row[i]);
  }
  found = block_reduce(found, SumOp{}, 0, scratch);
  if (threadIdx.x == 0 && found > 0) atomicAdd(count, static_cast<unsigned long long>(found));
}

__device__ double as_double(double v) { return v; }
template <class T>
__device__ double as_double(T v) {
  return static_cast<double>(to_f32(v));
}

// Stage one: block b adds rows b, b + gridDim.x, ... in a fixed order and leaves its pair in
// partials[2 b]. Stage two: one block adds the pairs. The grid depends on the shape only.
template <class A, class B>
__global__ void __launch_bounds__(flat_threads)
    square_sums_kernel(const A* a, std::int64_t a_stride, const B* b, std::int64_t b_stride,
                       std::int64_t rows, std::int64_t cols, double* partials) {
  __shared__ double scratch[32];
  double difference = 0;
  double reference = 0;
  const std::int64_t pieces = ceil_div(cols, flat_threads);
  for (std::int64_t piece = blockIdx.x; piece < rows * pieces; piece += gridDim.x) {
    const std::int64_t r = piece / pieces;
    const std::int64_t c = piece % pieces * flat_threads + threadIdx.x;
    if (c >= cols) continue;
    const double x = as_double(a[r * a_stride + c]);
    const double d = x - as_double(b[r * b_stride + c]);
    difference += d * d;
    reference += x * x;
  }
  difference = block_reduce(difference, SumOp{}, 0.0, scratch);
  reference = block_reduce(reference, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = difference;
    partials[2 * blockIdx.x + 1] = reference;
  }
}

__global__ void __launch_bounds__(flat_threads)
    square_sums_finish_kernel(const double* partials, int count, double* out) {
  __shared__ double scratch[32];
  double difference = 0;
  double reference = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += flat_threads) {
    difference += partials[2 * i];
    reference += partials[2 * i + 1];
  }
  difference = block_reduce(difference, SumOp{}, 0.0, scratch);
  reference = block_reduce(reference, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) {
    out[0] = difference;
    out[1] = reference;
  }
}

template <class Body>
void dispatch_with_double(DType dtype, const char* op, Body&& body) {
  if (dtype == DType::f64) {
    body(double{});
  } else {
    dispatch_float(dtype, op, body);
  }
}

}  // namespace

void CudaOps::row_nll(View logits, View target, View nll) {
  REQUIRE(logits.rows == target.rows && target.cols == 1 && nll.rows == logits.rows &&
              nll.cols == 1 && logits.rows <= 0x7fffffff && (logits.rows == 0 || logits.cols > 0),
          "row_nll of " + logits.shape() + " and " + target.shape() + " into " + nll.shape());
  if (logits.empty()) return;
  require_cuda("row_nll", {logits, target, nll});
  const bool wide = aligned_rows(logits, 16, 4);
  launch("row_nll", wide ? row_nll_kernel<4> : row_nll_kernel<1>,
         static_cast<unsigned>(logits.rows), row_threads, 0, stream_, logits.as<float>(),
         logits.stride, target.as<std::int32_t>(), target.stride, nll.as<double>(), nll.stride,
         logits.cols);
}

void CudaOps::row_argmax(View logits, View out) {
  REQUIRE(out.rows == logits.rows && out.cols == 1 && logits.cols <= 0x7fffffff &&
              logits.rows <= 0x7fffffff && (logits.rows == 0 || logits.cols > 0),
          "row_argmax of " + logits.shape() + " into " + out.shape());
  if (logits.empty()) return;
  require_cuda("row_argmax", {logits, out});
  launch("row_argmax", row_argmax_kernel, static_cast<unsigned>(logits.rows), row_threads, 0,
         stream_, logits.as<float>(), logits.stride, out.as<std::int32_t>(), out.stride,
         logits.cols);
}

std::int64_t CudaOps::count_nonfinite(View x) {
  if (x.empty()) return 0;
  require_cuda("count_nonfinite", {x});
  if (x.contiguous()) x = x.reshape(1, x.count());
  auto* count = static_cast<unsigned long long*>(small_device_.view().data);
  CUDA_TRY(cudaMemsetAsync(count, 0, sizeof(*count), stream_));
  dispatch_with_double(x.dtype, "count_nonfinite", [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide = aligned_rows(x, 16, n);
    const std::int64_t packs = wide ? x.cols / n : x.cols;
    dim3 grid = grid_2d(x.rows, packs, flat_threads * 16);
    grid.x = std::min(grid.x, 16384U);
    grid.y = std::min(grid.y, std::max(1U, 16384U / grid.x));
    // A block then sees at most elements / blocks, far from the range of its int count.
    launch("count_nonfinite", wide ? count_nonfinite_kernel<T, n> : count_nonfinite_kernel<T, 1>,
           grid, flat_threads, 0, stream_, static_cast<const T*>(x.data), x.stride, x.rows, packs,
           count);
  });
  auto* host = static_cast<unsigned long long*>(small_host_.view().data);
  CUDA_TRY(cudaMemcpyAsync(host, count, sizeof(*host), cudaMemcpyDeviceToHost, stream_));
  synchronize();
  return static_cast<std::int64_t>(*host);
}

void CudaOps::square_sums(View a, View b, View out) {
  REQUIRE(a.rows == b.rows && a.cols == b.cols && out.count() == 2 && out.rows == 1,
          "square_sums of " + a.shape() + " and " + b.shape() + " into " + out.shape());
  require_cuda("square_sums", {out});
  auto* sums = out.as<double>();
  if (a.empty()) return zero(out);
  require_cuda("square_sums", {a, b});
  auto* partials = static_cast<double*>(small_device_.view().data);
  const std::int64_t pieces = a.rows * ceil_div(a.cols, flat_threads);
  const auto blocks = static_cast<int>(std::min<std::int64_t>(max_partials, ceil_div(pieces, 8)));
  dispatch_with_double(a.dtype, "square_sums", [&](auto tag_a) {
    dispatch_with_double(b.dtype, "square_sums", [&](auto tag_b) {
      using A = decltype(tag_a);
      using B = decltype(tag_b);
      launch("square_sums", square_sums_kernel<A, B>, static_cast<unsigned>(blocks), flat_threads,
             0, stream_, static_cast<const A*>(a.data), a.stride, static_cast<const B*>(b.data),
             b.stride, a.rows, a.cols, partials);
    });
  });
  launch("square_sums_finish", square_sums_finish_kernel, 1, flat_threads, 0, stream_, partials,
         blocks, sums);
}

}  // namespace engine
