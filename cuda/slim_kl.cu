// CudaOps: the loss of SliM-LLM's bit search, a Kullback-Leibler divergence per row
// (docs/methods/slimllm.md).
#include <cmath>
#include <string>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int most_threads = 1024;

// The running maximum of some values and the sum of exp(value - maximum).
struct Exponentials {
  float top = -INFINITY;
  float sum = 0.0F;

  template <int N>
  __device__ void add(const Pack<float, N>& p) {
    float highest = p.v[0];
#pragma unroll
    for (int e = 1; e < N; ++e) highest = fmaxf(highest, p.v[e]);
    if (highest > top) {
      sum *= expf(top - highest);
      top = highest;
    }
#pragma unroll
    for (int e = 0; e < N; ++e) sum += expf(p.v[e] - top);
  }
};

// log(sum exp) of what all threads of the block have.
__device__ double log_sum_exp(const Exponentials& own, float* tops, double* sums) {
  const float top = block_reduce(own.top, MaxOp{}, -INFINITY, tops);
  // A thread without values has exp(-inf) * 0.
  const double part = static_cast<double>(own.sum) * static_cast<double>(expf(own.top - top));
  return static_cast<double>(top) + log(block_reduce(part, SumOp{}, 0.0, sums));
}

// kl[row] += sum over the row of a (log a - log b). One block per row, N columns per access. The
// floor depends on the sums, so both rows are read twice; two large blocks share a multiprocessor,
// few enough for the second reading to hit the caches. Three exponentials per column; bound by
// memory, 8 bytes per column.
template <int N>
__global__ void __launch_bounds__(most_threads, 2)
    kl_kernel(const float* y, std::int64_t y_stride, const float* reference,
              std::int64_t reference_stride, std::int64_t packs, float lowest, double* kl,
              std::int64_t kl_stride) {
  using P = Pack<float, N>;
  __shared__ float tops[32];
  __shared__ double sums[32];
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const P* a = reinterpret_cast<const P*>(y + row * y_stride);
  const P* b = reinterpret_cast<const P*>(reference + row * reference_stride);
  const int step = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  Exponentials a_own, b_own;
  for (std::int64_t i = thread; i < packs; i += step) {
    const P a_pack = a[i], b_pack = b[i];
    a_own.add(a_pack);
    b_own.add(b_pack);
  }
  const double a_exact = log_sum_exp(a_own, tops, sums);
  const double b_exact = log_sum_exp(b_own, tops, sums);
  const auto a_sum = static_cast<float>(a_exact), b_sum = static_cast<float>(b_exact);
  const auto shift = static_cast<float>(a_exact - b_exact);
  double sum = 0.0;
  for (std::int64_t i = thread; i < packs; i += step) {
    const P a_pack = a[i], b_pack = b[i];
    float part = 0.0F;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      float log_a = a_pack.v[e] - a_sum, log_b = b_pack.v[e] - b_sum;
      // Above the floor the logarithms are almost equal: their difference loses less this way.
      float ratio = (a_pack.v[e] - b_pack.v[e]) - shift;
      if (log_a < lowest || log_b < lowest) {
        if (log_a < lowest) log_a = lowest;
        if (log_b < lowest) log_b = lowest;
        ratio = log_a - log_b;
      }
      part += expf(log_a) * ratio;
    }
    sum += static_cast<double>(part);
  }
  sum = block_reduce(sum, SumOp{}, 0.0, sums);
  if (thread == 0) kl[row * kl_stride] += sum;
}

}  // namespace

void CudaOps::softmax_kl(View y, View reference, double floor, View kl) {
  REQUIRE(y.dtype == DType::f32 && reference.dtype == DType::f32 && y.rows == reference.rows &&
              y.cols == reference.cols && y.cols > 0,
          "outputs " + y.shape() + " and " + reference.shape());
  REQUIRE(kl.dtype == DType::f64 && kl.rows == y.rows && kl.cols == 1, "divergences " + kl.shape());
  REQUIRE(floor > 0.0 && floor < 1.0, "floor of a probability " + std::to_string(floor));
  if (y.empty()) return;
  require_cuda("softmax_kl", {y, reference, kl});
  REQUIRE(y.rows <= 0x7fffffff, "softmax_kl of too many rows: " + y.shape());
  const bool wide = aligned_rows(y, 16, 4) && aligned_rows(reference, 16, 4);
  const std::int64_t packs = wide ? y.cols / 4 : y.cols;
  // At least four accesses per thread, so that the reductions are not all there is.
  const int threads = packs <= 1024 ? 256 : packs <= 2048 ? 512 : most_threads;
  launch("softmax_kl", wide ? kl_kernel<4> : kl_kernel<1>, dim3(static_cast<unsigned>(y.rows)),
         dim3(static_cast<unsigned>(threads)), 0, stream_, y.as<float>(), y.stride,
         reference.as<float>(), reference.stride, packs, static_cast<float>(std::log(floor)),
         kl.as<double>(), kl.stride);
}

}  // namespace engine
