// CudaOps: the distance between two rows of logits.
#include <cmath>
#include <cstdint>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int row_threads = 512;
constexpr std::int32_t nowhere = 0x7fffffff;

struct MinOp {
  __device__ std::int32_t operator()(std::int32_t a, std::int32_t b) const { return a < b ? a : b; }
};

// What one thread saw of a row: its first maximum, and the sum of exponentials relative to it.
// The arithmetic is that of row_nll, so both give the same bits.
struct Seen {
  float peak = -INFINITY;
  std::int32_t place = nowhere;
  double sum = 0;

  template <int N>
  __device__ void add(const Pack<float, N>& p, std::int64_t first) {
    float top = peak;
#pragma unroll
    for (int e = 0; e < N; ++e) top = fmaxf(top, p.v[e]);
    // Before the first finite value there is nothing to rescale and nothing to subtract.
    const float shift = top == -INFINITY ? 0.0F : top;
    if (top > peak) {
      sum *= static_cast<double>(expf(peak - shift));
      peak = top;
      int at = N - 1;
#pragma unroll
      for (int e = N - 2; e >= 0; --e) at = p.v[e] == top ? e : at;
      place = static_cast<std::int32_t>(first) + at;
    }
    float part = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) part += expf(p.v[e] - shift);
    sum += static_cast<double>(part);
  }
};

// The same of the whole row, known to every thread.
struct RowMass {
  float peak;
  std::int32_t place;
  double log_sum;
};

__device__ RowMass merge(const Seen& seen, float* floats, std::int32_t* places, double* doubles) {
  RowMass row;
  row.peak = block_reduce(seen.peak, MaxOp{}, -INFINITY, floats);
  row.place = block_reduce(seen.peak == row.peak ? seen.place : nowhere, MinOp{}, nowhere, places);
  const double part = seen.sum * static_cast<double>(expf(seen.peak - row.peak));
  row.log_sum = log(block_reduce(part, SumOp{}, 0.0, doubles));
  return row;
}

// p (e^d - 1 - d) with d = log q - log p, whose sum over a row is the divergence, because p and q
// both sum to 1. No term is negative, and an error of d counts by q - p instead of by p: what
// rounding leaves in the two log-sum-exps cancels where it would hide a small divergence.
__device__ float divergence_term(float log_p, float log_q) {
  const float d = log_q - log_p;
  const float p = expf(log_p);
  if (fabsf(d) < 0.5F) {
    // sum d^k / (k + 2)!; the first term left out is below 2^-24 of the first.
    float series = 1.0F / 40320.0F;
    series = fmaf(series, d, 1.0F / 5040.0F);
    series = fmaf(series, d, 1.0F / 720.0F);
    series = fmaf(series, d, 1.0F / 120.0F);
    series = fmaf(series, d, 1.0F / 24.0F);
    series = fmaf(series, d, 1.0F / 6.0F);
    series = fmaf(series, d, 0.5F);
    return p * (d * d) * series;
  }
  return (expf(log_q) - p) - p * d;
}

// One block per row, N columns per access. Both rows are read twice, as the distance needs both
// sums: 16 bytes per column, which bound it; three or four exponentials hide behind them.
template <int N>
__global__ void __launch_bounds__(row_threads, 2)
    compare_logits_kernel(const float* reference, std::int64_t reference_stride,
                          const float* logits, std::int64_t logits_stride,
                          const std::int32_t* target, std::int64_t target_stride, double* out,
                          std::int64_t out_stride, std::int64_t vocab) {
  using P = Pack<float, N>;
  __shared__ float floats[32];
  __shared__ std::int32_t places[32];
  __shared__ double doubles[32];
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const float* p_row = reference + r * reference_stride;
  const float* q_row = logits + r * logits_stride;
  const P* p_packs = reinterpret_cast<const P*>(p_row);
  const P* q_packs = reinterpret_cast<const P*>(q_row);
  const std::int64_t packs = vocab / N;

  Seen p_seen, q_seen;
  for (std::int64_t i = threadIdx.x; i < packs; i += row_threads) {
    const P a = p_packs[i], b = q_packs[i];
    p_seen.add(a, i * N);
    q_seen.add(b, i * N);
  }
  const RowMass p = merge(p_seen, floats, places, doubles);
  const RowMass q = merge(q_seen, floats, places, doubles);

  // Relative to the maxima, so that a large common offset costs no digits.
  const auto p_log_sum = static_cast<float>(p.log_sum);
  const auto q_log_sum = static_cast<float>(q.log_sum);
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < packs; i += row_threads) {
    const P a = p_packs[i], b = q_packs[i];
    float part = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      part += divergence_term((a.v[e] - p.peak) - p_log_sum, (b.v[e] - q.peak) - q_log_sum);
    }
    sum += static_cast<double>(part);
  }
  sum = block_reduce(sum, SumOp{}, 0.0, doubles);
  if (threadIdx.x != 0) return;

  double* result = out + r * out_stride;
  const bool valid = isfinite(sum);
  const double nan = static_cast<double>(NAN);
  result[0] = valid ? fmax(sum, 0.0) : nan;
  result[1] = !valid ? nan : p.place == q.place ? 1.0 : 0.0;
  const std::int32_t t = target[r * target_stride];
  result[2] = result[3] = 0.0;
  if (t < 0) return;
  const auto log_softmax = [t](const float* row, const RowMass& mass) {
    return -(mass.log_sum + (static_cast<double>(mass.peak) - static_cast<double>(row[t])));
  };
  result[2] = valid ? log_softmax(p_row, p) : nan;
  result[3] = valid ? log_softmax(q_row, q) : nan;
}

}  // namespace

void CudaOps::compare_logits(View reference, View logits, View target, View out) {
  REQUIRE(reference.rows == logits.rows && reference.cols == logits.cols &&
              target.rows == logits.rows && target.cols == 1 && out.rows == logits.rows &&
              out.cols == 4 && logits.rows <= 0x7fffffff && logits.cols < nowhere &&
              (logits.rows == 0 || logits.cols > 0),
          "compare_logits of " + reference.shape() + ", " + logits.shape() + " and " +
              target.shape() + " into " + out.shape());
  if (logits.empty()) return;
  require_cuda("compare_logits", {reference, logits, target, out});
  const bool wide = aligned_rows(reference, 16, 4) && aligned_rows(logits, 16, 4);
  launch("compare_logits", wide ? compare_logits_kernel<4> : compare_logits_kernel<1>,
         static_cast<unsigned>(logits.rows), row_threads, 0, stream_, reference.as<float>(),
         reference.stride, logits.as<float>(), logits.stride, target.as<std::int32_t>(),
         target.stride, out.as<double>(), out.stride, logits.cols);
}

}  // namespace engine
