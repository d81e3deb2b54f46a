// Whether what a BiLLM sweep left behind is a right answer by itself (docs/methods/billm.md), in
// double and in the plain form: U in full, every block's error subtracted from all columns after
// it. Each block is judged on the weights that the sweep's own earlier results leave in it, so a
// choice that two backends may make differently is right on both if it is as good as the best.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "tests/parity/parity_support.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {

struct BillmOutput {
  const Operand* first = nullptr;
  const Operand* second = nullptr;
  const Operand* salient = nullptr;
  const Operand* percent = nullptr;
  const Operand* loss = nullptr;
  std::array<const Operand*, billm_groups> scales{};
  std::array<const Operand*, billm_groups> means{};
};

// Tolerances. Current weights are sums of at most d products in f32: within 1e-5 of a row's largest
// weight. A candidate's error moves by as little of itself, and a wrong candidate is further away
// from the best one than 1e-4 in nearly all blocks.
class BillmCheck {
 public:
  // Options are those of `problem`, whose views are not looked at.
  BillmCheck(const BillmProblem& problem, const Operand& w, const Operand& r,
             const BillmOutput& out)
      : p_(problem), out_(out), rows_(w.rows()), d_(w.cols()), w_(w.values()), u_(inverse(r)) {}

  void run() {
    std::vector<double> loss(index(rows_), 0.0);
    for (first_ = 0; first_ < d_; first_ += p_.block) {
      SCOPED_TRACE("block at column " + std::to_string(first_));
      load();
      check_columns();
      check_break();
      for (std::int64_t row = 0; row < rows_; ++row) loss[index(row)] += check_row(row);
      if (::testing::Test::HasFailure()) return;
    }
    for (std::int64_t row = 0; row < rows_; ++row) {
      const double expected = loss[index(row)];
      EXPECT_LE(std::fabs(out_.loss->get(row, 0) - expected), 1e-3 * expected + 1e-12) << row;
    }
  }

 private:
  using Values = std::vector<double>;

  // R^-1, upper triangular.
  [[nodiscard]] static Values inverse(const Operand& r) {
    const std::int64_t d = r.rows();
    const Values a = r.values();
    Values u(a.size(), 0.0);
    for (std::int64_t i = d - 1; i >= 0; --i) {
      double* row = u.data() + i * d;
      row[i] = 1.0;
      for (std::int64_t k = i + 1; k < d; ++k) {
        for (std::int64_t j = k; j < d; ++j) row[j] -= a[index(i * d + k)] * u[index(k * d + j)];
      }
      for (std::int64_t j = i; j < d; ++j) row[j] /= a[index(i * d + i)];
    }
    return u;
  }

  [[nodiscard]] double pivot(std::int64_t k) const {
    return u_[index((first_ + k) * d_ + first_ + k)];
  }
  [[nodiscard]] double weight(std::int64_t row, std::int64_t k) const {
    return w_[index(row * d_ + first_ + k)];
  }
  [[nodiscard]] double target(std::int64_t row, std::int64_t k) const {
    return target_[index(row * p_.block + k)];
  }
  [[nodiscard]] bool salient(std::int64_t k) const {
    return out_.salient->get(0, first_ + k) == 1.0;
  }

  // sum (x - B(x))^2 after `passes`.
  [[nodiscard]] double error(const Values& x, int passes) const {
    if (x.empty()) return 0.0;
    Values rest = x;
    const auto n = static_cast<double>(x.size());
    for (int pass = 0; pass < passes; ++pass) {
      const double mean = p_.with_mean ? std::accumulate(rest.begin(), rest.end(), 0.0) / n : 0.0;
      double scale = 0.0;
      for (const double v : rest) scale += std::fabs(v - mean) / n;
      for (double& v : rest) {
        const double side = v - mean;
        v = side - (side > 0 ? scale : side < 0 ? -scale : 0.0);
      }
    }
    double sum = 0.0;
    for (const double v : rest) sum += v * v;
    return sum;
  }

  void load() {
    target_.assign(index(rows_ * p_.block), 0.0);
    score_.assign(index(p_.block), 0.0);
    squares_ = 0.0;
    const bool hessian = p_.metric == BillmMetric::hessian;
    for (std::int64_t row = 0; row < rows_; ++row) {
      for (std::int64_t k = 0; k < p_.block; ++k) {
        const double v = weight(row, k);
        const double score = hessian ? v * v / (pivot(k) * pivot(k)) : std::fabs(v);
        const double t = hessian && p_.search == BillmSearch::saliency ? score : v;
        target_[index(row * p_.block + k)] = t;
        score_[index(k)] += score;
        squares_ += t * t;
      }
    }
  }

  // The salient columns are the best ranked ones, and their number is as good as any.
  void check_columns() {
    std::vector<std::int64_t> rank(index(p_.block));
    std::iota(rank.begin(), rank.end(), std::int64_t{0});
    std::stable_sort(rank.begin(), rank.end(), [&](std::int64_t a, std::int64_t b) {
      return score_[index(a)] > score_[index(b)];
    });
    std::int64_t chosen = 0;
    double worst_in = std::numeric_limits<double>::infinity(), best_out = 0.0;
    for (std::int64_t k = 0; k < p_.block; ++k) {
      ASSERT_TRUE(salient(k) || out_.salient->get(0, first_ + k) == 0.0);
      const double score = score_[index(k)];
      if (salient(k)) {
        ++chosen;
        worst_in = std::min(worst_in, score);
      } else {
        best_out = std::max(best_out, score);
      }
    }
    const std::int64_t tries = std::min(p_.max_salient, p_.block - 1);
    ASSERT_TRUE(chosen >= 1 && chosen <= tries) << chosen << " salient columns";
    EXPECT_GE(worst_in, best_out * (1 - 1e-4));
    Values errors(index(tries), 0.0);
    for (std::int64_t row = 0; row < rows_; ++row) {
      Values x(index(p_.block));
      for (std::size_t k = 0; k < x.size(); ++k) x[k] = target(row, rank[k]);
      for (std::int64_t c = 1; c <= tries; ++c) {
        errors[index(c - 1)] +=
            error({x.begin(), x.begin() + c}, 2) + error({x.begin() + c, x.end()}, p_.rest_passes);
      }
    }
    expect_best(errors, index(chosen - 1), "salient columns");
  }

  // The break point is a quantile as good as any.
  void check_break() {
    Values sorted;
    for (std::int64_t row = 0; row < rows_; ++row) {
      for (std::int64_t k = 0; k < p_.block; ++k) {
        sorted.push_back(salient(k) ? 0.0 : std::fabs(target(row, k)));
      }
    }
    std::sort(sorted.begin(), sorted.end());
    Values thresholds, errors;
    for (std::int64_t percent = billm_first_percent; percent <= billm_last_percent; ++percent) {
      const std::int64_t place = (static_cast<std::int64_t>(sorted.size()) - 1) * percent;
      const std::size_t low = index(place / 100);
      const double a = sorted[low], b = sorted[std::min(low + 1, sorted.size() - 1)];
      const double v = a + (b - a) * (static_cast<double>(place % 100) / 100.0);
      double sum = 0.0;
      for (std::int64_t row = 0; row < rows_; ++row) {
        Values below, above, twice;
        for (std::int64_t k = 0; k < p_.block; ++k) {
          const double t = target(row, k);
          (salient(k) ? twice : std::fabs(t) < v ? below : above).push_back(t);
        }
        sum += error(twice, 2) + error(below, 1) + error(above, 1);
      }
      thresholds.push_back(v);
      errors.push_back(sum);
    }
    const double percent = out_.percent->get(0, first_ / p_.block);
    ASSERT_TRUE(percent >= billm_first_percent && percent <= billm_last_percent) << percent;
    const std::size_t chosen = index(static_cast<std::int64_t>(percent) - billm_first_percent);
    expect_best(errors, chosen, "break point");
    break_ = thresholds[chosen];
  }

  void expect_best(const Values& errors, std::size_t chosen, const char* what) const {
    const double best = *std::min_element(errors.begin(), errors.end());
    EXPECT_LE(errors[chosen], best * (1 + 1e-4) + 1e-9 * squares_)
        << what << ": " << chosen << ", the best is "
        << std::min_element(errors.begin(), errors.end()) - errors.begin();
  }

  // Groups, signs and coefficients of a row; subtracts its errors from the columns to come. Returns
  // its part of the loss.
  double check_row(std::int64_t row) {
    double largest = 0.0;
    for (std::int64_t k = 0; k < p_.block; ++k) {
      largest = std::max(largest, std::fabs(weight(row, k)));
    }
    const double near = 2e-5 * largest;
    std::vector<std::size_t> group(index(p_.block));
    for (std::int64_t k = 0; k < p_.block; ++k) {
      const double second = out_.second->get(row, first_ + k);
      EXPECT_TRUE(second == 0.0 || second == 1.0);
      group[index(k)] = salient(k)      ? billm_salient
                        : second == 1.0 ? billm_sparse
                                        : billm_concentrated;
      const double magnitude = std::fabs(target(row, k));
      if (!salient(k) && std::fabs(magnitude - break_) > 1e-4 * break_) {
        EXPECT_EQ(second == 1.0, magnitude >= break_) << row << ", " << first_ + k;
      }
    }
    Values sum(index(p_.block), 0.0);
    for (std::size_t g = 0; g < billm_groups; ++g) check_group(row, g, group, near, sum);
    double loss = 0.0;
    for (std::int64_t k = 0; k < p_.block; ++k) {
      const double e = (weight(row, k) - sum[index(k)]) / pivot(k);
      loss += e * e;
      const double* u = u_.data() + (first_ + k) * d_;
      for (std::int64_t j = first_ + p_.block; j < d_; ++j) w_[index(row * d_ + j)] -= e * u[j];
    }
    return loss;
  }

  void check_group(std::int64_t row, std::size_t g, const std::vector<std::size_t>& group,
                   double near, Values& sum) const {
    const std::int64_t unit = first_ / p_.block;
    const double mean = out_.means[g]->get(row, unit), scale = out_.scales[g]->get(row, unit);
    const std::size_t member = g == billm_residual ? billm_salient : g;
    const Operand& bits = g == billm_residual ? *out_.second : *out_.first;
    Values rest;
    for (std::int64_t k = 0; k < p_.block; ++k) {
      if (group[index(k)] == member) rest.push_back(weight(row, k) - sum[index(k)]);
    }
    double expected_mean = 0.0, expected_scale = 0.0;
    const auto n = static_cast<double>(rest.size());
    for (const double v : rest) {
      if (p_.with_mean) expected_mean += v / n;
      expected_scale += std::fabs(v - mean) / n;
    }
    const double half_ulp = p_.scale_dtype == DType::bf16  ? 0x1p-9
                            : p_.scale_dtype == DType::f16 ? 0x1p-12
                                                           : 0x1p-24;
    for (const auto& [found, expected] :
         {std::pair{mean, expected_mean}, std::pair{scale, expected_scale}}) {
      EXPECT_LE(std::fabs(found - expected), near + 2.02 * half_ulp * std::fabs(expected) + 0x1p-25)
          << "group " << g << ", row " << row << ": expected " << expected << ", found " << found;
      EXPECT_EQ(found, static_cast<double>(round_to(p_.scale_dtype, static_cast<float>(found))));
    }
    for (std::int64_t k = 0; k < p_.block; ++k) {
      if (group[index(k)] != member) continue;
      const double bit = bits.get(row, first_ + k);
      EXPECT_TRUE(bit == 0.0 || bit == 1.0);
      const double side = weight(row, k) - sum[index(k)] - mean;
      if (std::fabs(side) > near) {
        EXPECT_EQ(bit == 1.0, side > 0) << "group " << g << ", " << row << ", " << first_ + k;
      }
      sum[index(k)] += mean + (bit == 1.0 ? scale : -scale);
    }
  }

  const BillmProblem& p_;
  const BillmOutput& out_;
  std::int64_t rows_;
  std::int64_t d_;
  Values w_;  // [rows, d], compensated as far as the walk has come
  Values u_;  // [d, d]
  // Of the current block.
  std::int64_t first_ = 0;
  Values target_;  // [rows, block]
  Values score_;
  double squares_ = 0.0;  // of the targets
  double break_ = 0.0;
};

}  // namespace engine::test
