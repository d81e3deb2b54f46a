// One BiLLM sweep through the ops, from weights and second moment to bits and coefficients, and a
// direct implementation of the method to compare it with (docs/methods/billm.md).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/ops/ops.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {

struct BillmCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::vector<float> w;  // [rows, d]
  std::vector<float> h;  // [d, d]
  BillmProblem options;  // its views stay empty
  double damp = 0.01;
  DType factor = DType::f64;
};

struct BillmRun {
  bool factored = false;
  std::vector<float> w;  // dead columns zeroed
  std::vector<std::uint8_t> dead;
  std::vector<double> r;  // [d, d]
  std::vector<std::uint8_t> first, second, salient;
  std::vector<std::int32_t> percent;
  std::array<std::vector<float>, billm_groups> scales, means;  // [rows, d / block]
  std::vector<double> loss;                                    // [rows]

  // w^ of one weight as the codec computes it.
  [[nodiscard]] float value(const BillmCase& c, std::int64_t row, std::int64_t j) const {
    const std::size_t u = index(row * (c.d / c.options.block) + j / c.options.block);
    const std::size_t at = index(row * c.d + j);
    const auto term = [&](std::size_t group, std::uint8_t bit) {
      return means[group][u] + (bit == 1 ? scales[group][u] : -scales[group][u]);
    };
    if (salient[index(j)] == 1) {
      return term(billm_salient, first[at]) + term(billm_residual, second[at]);
    }
    return term(second[at] == 1 ? billm_sparse : billm_concentrated, first[at]);
  }
};

template <class T>
BillmRun run_billm_as(Ops& ops, const BillmCase& c) {
  BillmRun run;
  const std::int64_t units = c.d / c.options.block;
  std::vector<T> factor(index(c.d * c.d));
  run.dead.resize(index(c.d));
  double damping = 0.0;
  const View r = host_view(factor.data(), c.d, c.d);
  const View dead = host_view(run.dead.data(), 1, c.d);
  ops.damp_hessian(host_view(c.h.data(), c.d, c.d), {}, 1.0, c.damp, r, dead,
                   host_view(&damping, 1, 1));
  std::vector<std::uint8_t> scratch(index(ops.factor_workspace_bytes(c.d, dtype_of<T>())));
  run.factored =
      ops.factor_upper(r, host_view(scratch.data(), 1, static_cast<std::int64_t>(scratch.size())));
  if (!run.factored) return run;
  run.r.assign(factor.begin(), factor.end());
  run.w.resize(c.w.size());
  ops.gather_columns(host_view(c.w.data(), c.rows, c.d), {}, dead,
                     host_view(run.w.data(), c.rows, c.d));

  BillmProblem p = c.options;
  std::vector<float> w(run.w);
  p.w = host_view(w.data(), c.rows, c.d);
  p.r = r;
  // Whatever was in the outputs must not matter.
  run.first.assign(w.size(), 0xFF);
  run.second.assign(w.size(), 0xFF);
  run.salient.assign(index(c.d), 0xFF);
  run.percent.assign(index(units), -1);
  run.loss.assign(index(c.rows), std::numeric_limits<double>::quiet_NaN());
  p.first = host_view(run.first.data(), c.rows, c.d);
  p.second = host_view(run.second.data(), c.rows, c.d);
  p.salient = host_view(run.salient.data(), 1, c.d);
  p.percent = host_view(run.percent.data(), 1, units);
  for (std::size_t g = 0; g < billm_groups; ++g) {
    run.scales[g].assign(index(c.rows * units), std::numeric_limits<float>::quiet_NaN());
    run.means[g] = run.scales[g];
    p.scales[g] = host_view(run.scales[g].data(), c.rows, units);
    p.means[g] = host_view(run.means[g].data(), c.rows, units);
  }
  p.loss = host_view(run.loss.data(), c.rows, 1);
  std::vector<double> workspace(
      index(ops.billm_workspace_bytes(c.rows, c.d, p.block, dtype_of<T>()) / 8 + 1));
  p.workspace = make_view(workspace.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(workspace.size() * 8));
  ops.billm_sweep(p);
  return run;
}

inline BillmRun run_billm(Ops& ops, const BillmCase& c) {
  return c.factor == DType::f64 ? run_billm_as<double>(ops, c) : run_billm_as<float>(ops, c);
}

// The method as written down: full masks, U in full, every block's error subtracted at once from
// all columns after it; in double, apart from the rounding of the coefficients.
struct BillmReference {
  std::vector<double> quantized;      // [rows, d]
  std::vector<std::uint8_t> salient;  // [d]
  std::vector<std::uint8_t> sparse;   // [rows, d]
  std::vector<std::int32_t> percent;  // [d / block]
  double loss = 0.0;
};

class BillmDirect {
 public:
  BillmDirect(const BillmCase& c, const BillmRun& run)
      : c_(c), o_(c.options), w_(run.w.begin(), run.w.end()), u_(inverse(run.r)) {
    out_.quantized.resize(w_.size());
    out_.salient.resize(index(c.d));
    out_.sparse.resize(w_.size());
  }
  BillmReference solve() {
    for (first_ = 0; first_ < c_.d; first_ += o_.block) block();
    return out_;
  }

 private:
  using Matrix = std::vector<double>;  // [rows, block]
  using Mask = std::vector<char>;      // [rows, block]

  // R^-1, upper triangular.
  [[nodiscard]] Matrix inverse(const std::vector<double>& r) const {
    const std::int64_t d = c_.d;
    Matrix u(index(d * d), 0.0);
    for (std::int64_t j = 0; j < d; ++j) {
      for (std::int64_t i = j; i >= 0; --i) {
        double sum = i == j ? 1.0 : 0.0;
        for (std::int64_t k = i + 1; k <= j; ++k) sum -= r[index(i * d + k)] * u[index(k * d + j)];
        u[index(i * d + j)] = sum / r[index(i * d + i)];
      }
    }
    return u;
  }

  // B_k(x, mask), zero outside the mask. Rounded coefficients and sign(0) = 1 when `stored`.
  [[nodiscard]] Matrix binarize(const Matrix& x, const Mask& mask, int passes, bool stored) const {
    Matrix sum(x.size(), 0.0);
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      const std::int64_t begin = row * o_.block, end = begin + o_.block;
      for (int pass = 0; pass < passes; ++pass) {
        double mean = 0.0, scale = 0.0;
        std::int64_t n = 0;
        for (std::int64_t i = begin; i < end; ++i) {
          if (mask[index(i)] == 0) continue;
          mean += x[index(i)] - sum[index(i)];
          ++n;
        }
        if (n == 0) break;
        mean = o_.with_mean ? mean / static_cast<double>(n) : 0.0;
        if (stored) mean = round_to(o_.scale_dtype, static_cast<float>(mean));
        for (std::int64_t i = begin; i < end; ++i) {
          if (mask[index(i)] != 0) scale += std::fabs(x[index(i)] - sum[index(i)] - mean);
        }
        scale /= static_cast<double>(n);
        if (stored) scale = round_to(o_.scale_dtype, static_cast<float>(scale));
        for (std::int64_t i = begin; i < end; ++i) {
          if (mask[index(i)] == 0) continue;
          const double distance = x[index(i)] - sum[index(i)] - mean;
          const double sign = distance > 0 || (stored && distance == 0) ? 1.0
                              : distance < 0                            ? -1.0
                                                                        : 0.0;
          sum[index(i)] += mean + sign * scale;
        }
      }
    }
    return sum;
  }

  [[nodiscard]] Mask columns_mask(const std::vector<std::int64_t>& columns) const {
    Mask mask(index(c_.rows * o_.block), 0);
    for (const std::int64_t k : columns) {
      for (std::int64_t row = 0; row < c_.rows; ++row) mask[index(row * o_.block + k)] = 1;
    }
    return mask;
  }

  static double square_error(const Matrix& x, const std::vector<Matrix>& parts) {
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      double e = x[i];
      for (const Matrix& part : parts) e -= part[i];
      sum += e * e;
    }
    return sum;
  }

  void block() {
    const std::int64_t b = o_.block, d = c_.d;
    Matrix w(index(c_.rows * b)), target(w.size());
    Matrix score(index(b), 0.0);
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t k = 0; k < b; ++k) {
        const double v = w_[index(row * d + first_ + k)];
        const double u = u_[index((first_ + k) * d + first_ + k)];
        const double saliency = o_.metric == BillmMetric::hessian ? v * v / (u * u) : std::fabs(v);
        w[index(row * b + k)] = v;
        target[index(row * b + k)] =
            o_.metric == BillmMetric::hessian && o_.search == BillmSearch::saliency ? saliency : v;
        score[index(k)] += saliency;
      }
    }
    std::vector<std::int64_t> rank(index(b));
    std::iota(rank.begin(), rank.end(), std::int64_t{0});
    std::stable_sort(rank.begin(), rank.end(), [&](std::int64_t x, std::int64_t y) {
      return score[index(x)] > score[index(y)];
    });

    double least = std::numeric_limits<double>::infinity();
    Mask salient;
    for (std::int64_t n = 1; n <= std::min(o_.max_salient, b - 1); ++n) {
      const Mask in = columns_mask({rank.begin(), rank.begin() + n});
      const Mask out = columns_mask({rank.begin() + n, rank.end()});
      const double error = square_error(
          target, {binarize(target, in, 2, false), binarize(target, out, o_.rest_passes, false)});
      if (error < least) {
        least = error;
        salient = in;
      }
    }

    std::vector<double> sorted;
    for (std::size_t i = 0; i < target.size(); ++i) {
      sorted.push_back(salient[i] != 0 ? 0.0 : std::fabs(target[i]));
    }
    std::sort(sorted.begin(), sorted.end());
    least = std::numeric_limits<double>::infinity();
    const Matrix fixed = binarize(target, salient, 2, false);
    Mask concentrated, sparse;
    std::int32_t best = 0;
    for (std::int32_t percent = 10; percent <= 90; ++percent) {
      const double place = static_cast<double>((sorted.size() - 1) * index(percent)) / 100.0;
      const auto low = static_cast<std::size_t>(place);
      const double v = sorted[low] + (sorted[std::min(low + 1, sorted.size() - 1)] - sorted[low]) *
                                         (place - static_cast<double>(low));
      Mask below(target.size(), 0), above(target.size(), 0);
      for (std::size_t i = 0; i < target.size(); ++i) {
        if (salient[i] == 0) (std::fabs(target[i]) < v ? below : above)[i] = 1;
      }
      const double error = square_error(
          target, {binarize(target, below, 1, false), binarize(target, above, 1, false), fixed});
      if (error < least) {
        least = error;
        concentrated = below;
        sparse = above;
        best = percent;
      }
    }
    out_.percent.push_back(best);

    const Matrix q1 = binarize(w, concentrated, 1, true), q2 = binarize(w, sparse, 1, true),
                 q3 = binarize(w, salient, 2, true);
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t k = 0; k < b; ++k) {
        const std::size_t i = index(row * b + k), at = index(row * d + first_ + k);
        out_.quantized[at] = q1[i] + q2[i] + q3[i];
        out_.sparse[at] = static_cast<std::uint8_t>(sparse[i]);
        out_.salient[index(first_ + k)] = static_cast<std::uint8_t>(salient[i]);
        const double* u = u_.data() + (first_ + k) * d;
        const double error = (w[i] - out_.quantized[at]) / u[first_ + k];
        out_.loss += error * error;
        for (std::int64_t j = first_ + b; j < d; ++j) w_[index(row * d + j)] -= error * u[j];
      }
    }
  }

  const BillmCase& c_;
  const BillmProblem& o_;
  Matrix w_;  // [rows, d]
  Matrix u_;  // [d, d]
  std::int64_t first_ = 0;
  BillmReference out_;
};

}  // namespace engine::test
