// EvalOps on the CPU: the distance between two rows of logits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "engine/ops/cpu_kernels.h"
#include "engine/ops/cpu_ops.h"

namespace engine {
namespace {

constexpr std::int64_t piece_elements = 1 << 14;

// A row of logits with what its softmax needs. The log-sum-exp is the one of row_nll.
struct Row {
  const float* x = nullptr;
  float peak = 0;
  double log_sum = 0;  // of exp(x - peak)

  Row(const CpuKernels& kernels, const float* row, std::int64_t n)
      : x(row), peak(kernels.row_max(row, n)), log_sum(std::log(kernels.sum_exp(row, peak, n))) {}

  [[nodiscard]] double log_softmax(std::int64_t i) const {
    return (static_cast<double>(x[i]) - static_cast<double>(peak)) - log_sum;
  }
};

// NaN if an element of either row is NaN or infinite.
double divergence(const Row& p, const Row& q, std::int64_t n) {
  double sum = 0, p_total = 0, q_total = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double log_p = p.log_softmax(i), log_q = q.log_softmax(i);
    const double share = std::exp(log_p);
    p_total += share;
    q_total += std::exp(log_q);
    sum += share * (log_p - log_q);
  }
  // The sums of exponentials are f32 inside, so neither total is quite 1. Dividing by them leaves
  // an error of f64 only; equal rows have equal totals and give exactly 0.
  const double kl = sum / p_total + std::log(q_total / p_total);
  if (!std::isfinite(kl)) return std::numeric_limits<double>::quiet_NaN();
  return std::max(kl, 0.0);
}

}  // namespace

void CpuOps::compare_logits(View reference, View logits, View target, View out) {
  REQUIRE(reference.rows == logits.rows && reference.cols == logits.cols &&
              target.rows == logits.rows && target.cols == 1 && out.rows == logits.rows &&
              out.cols == 4 && (logits.rows == 0 || logits.cols > 0),
          "compare_logits: reference " + reference.shape() + ", logits " + logits.shape() +
              ", target " + target.shape() + ", out " + out.shape());
  if (logits.empty()) return;
  const float* expected = reference.host<float>();
  const float* found = logits.host<float>();
  const std::int32_t* wanted = target.host<std::int32_t>();
  double* results = out.host<double>();
  const std::int64_t n = logits.cols;
  const CpuKernels& kernels = cpu_kernels(best_isa());
  const std::int64_t grain = std::max<std::int64_t>(1, piece_elements / n);
  pool_.run(logits.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int32_t t = wanted[r * target.stride];
      if (t >= n) {
        throw Error(ErrorCode::mismatch, "targets: row " + std::to_string(r) + ": expected below " +
                                             std::to_string(n) + ", found " + std::to_string(t));
      }
      const Row p(kernels, expected + r * reference.stride, n);
      const Row q(kernels, found + r * logits.stride, n);
      double* result = results + r * out.stride;
      result[0] = divergence(p, q, n);
      const bool valid = !std::isnan(result[0]);
      result[1] = result[0];
      if (valid) {
        const auto top_p = std::find(p.x, p.x + n, p.peak) - p.x;
        const auto top_q = std::find(q.x, q.x + n, q.peak) - q.x;
        result[1] = top_p == top_q ? 1.0 : 0.0;
      }
      result[2] = t < 0 ? 0.0 : valid ? p.log_softmax(t) : result[0];
      result[3] = t < 0 ? 0.0 : valid ? q.log_softmax(t) : result[0];
    }
  });
}

}  // namespace engine
