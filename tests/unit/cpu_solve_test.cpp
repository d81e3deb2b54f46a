#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "tests/support/quant_fixtures.h"

namespace engine {
namespace {

using test::bell_matrix;
using test::index;

template <class T>
void expect_gram(CpuOps& ops, std::int64_t m, std::int64_t k) {
  const std::vector<float> source = bell_matrix(m, k, 21);
  std::vector<T> x(source.size());
  for (std::size_t i = 0; i < x.size(); ++i) store(x[i], source[i]);
  const std::vector<float> before = bell_matrix(k, k, 22);
  std::vector<float> h = before;
  ops.gram(host_view(x.data(), m, k), host_view(h.data(), k, k));
  for (std::int64_t i = 0; i < k; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = before[index(i * k + j)], size = std::fabs(sum);
      for (std::int64_t r = 0; r < m; ++r) {
        const double product = static_cast<double>(to_float(x[index(r * k + i)])) *
                               static_cast<double>(to_float(x[index(r * k + j)]));
        sum += product;
        size += std::fabs(product);
      }
      // Rounding of a sum of m+1 terms in f32.
      const double bound = 0x1p-24 * static_cast<double>(m + 1) * size;
      ASSERT_LE(std::fabs(static_cast<double>(h[index(i * k + j)]) - sum), bound)
          << m << " x " << k << " at " << i << "," << j;
    }
  }
}

TEST(CpuSolve, GramAccumulatesTheLowerTriangle) {
  CpuOps ops(2);
  for (const std::int64_t m : {1, 7, 130}) {
    for (const std::int64_t k : {1, 33, 150}) {
      expect_gram<float>(ops, m, k);
      expect_gram<f16>(ops, m, k);
      expect_gram<bf16>(ops, m, k);
    }
  }
}

TEST(CpuSolve, GramDoesNotDependOnTheNumberOfThreads) {
  constexpr std::int64_t m = 300, k = 200;
  const std::vector<float> x = bell_matrix(m, k, 23);
  const auto solve = [&](int threads) {
    CpuOps ops(threads);
    std::vector<float> h(k * k, 0.0F);
    ops.gram(host_view(x.data(), m, k), host_view(h.data(), k, k));
    std::vector<float> lower;
    for (std::int64_t i = 0; i < k; ++i) {
      lower.insert(lower.end(), h.begin() + i * k, h.begin() + i * k + i + 1);
    }
    return lower;
  };
  EXPECT_EQ(solve(1), solve(3));
}

template <class T>
void expect_damped() {
  // The upper triangle is junk that must not be read. Input 1 is dead.
  const float junk = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> h{4, junk, junk, 0, 0, junk, 1, 0, 9};
  const std::vector<std::int32_t> perm{2, 0, 1};
  std::vector<T> a(9, T(-1));
  std::vector<std::uint8_t> dead(3, 7);
  double damping = -1.0;
  CpuOps ops(2);
  ops.damp_hessian(host_view(h.data(), 3, 3), host_view(perm.data(), 1, 3), 2.0, 0.5,
                   host_view(a.data(), 3, 3), host_view(dead.data(), 1, 3),
                   host_view(&damping, 1, 1));
  // Diagonal 18, 8, 1: half its mean is 4.5.
  EXPECT_EQ(damping, 4.5);
  EXPECT_EQ(dead, (std::vector<std::uint8_t>{0, 0, 1}));
  EXPECT_EQ(a, (std::vector<T>{22.5, 2, 0, 2, 12.5, 0, 0, 0, 5.5}));
}

TEST(CpuSolve, DampingFixesDeadInputsFirst) {
  expect_damped<double>();
  expect_damped<float>();
}

// A well-conditioned positive definite matrix.
template <class T>
std::vector<T> positive_matrix(std::int64_t d) {
  const std::vector<float> h = test::second_moment(bell_matrix(2 * d, d, 31), d);
  std::vector<T> a(h.begin(), h.end());
  for (std::int64_t i = 0; i < d; ++i) a[index(i * d + i)] += T(0.01) * static_cast<T>(d);
  return a;
}

template <class T>
bool factor(std::vector<T>& a, std::int64_t d, int threads = 2) {
  CpuOps ops(threads);
  std::vector<std::uint8_t> workspace(index(ops.factor_workspace_bytes(d, dtype_of<T>())));
  return ops.factor_upper(
      host_view(a.data(), d, d),
      host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size())));
}

template <class T>
void expect_factor(std::int64_t d) {
  const std::vector<T> a = positive_matrix<T>(d);
  std::vector<T> r = a;
  ASSERT_TRUE(factor(r, d));
  // |R R^T - A| <= (d + 1) eps |R| |R^T|, and the latter is at most sqrt(a_ii a_jj).
  const double eps = std::numeric_limits<T>::epsilon();
  for (std::int64_t i = 0; i < d; ++i) {
    ASSERT_GT(r[index(i * d + i)], T(0));
    for (std::int64_t j = 0; j < d; ++j) {
      if (j < i) {
        ASSERT_EQ(r[index(i * d + j)], T(0));
      }
      double sum = 0.0;
      for (std::int64_t k = std::max(i, j); k < d; ++k) {
        sum += static_cast<double>(r[index(i * d + k)]) * static_cast<double>(r[index(j * d + k)]);
      }
      const double bound = static_cast<double>(d + 1) * eps *
                           std::sqrt(static_cast<double>(a[index(i * d + i)]) *
                                     static_cast<double>(a[index(j * d + j)]));
      ASSERT_LE(std::fabs(sum - static_cast<double>(a[index(i * d + j)])), bound)
          << d << " at " << i << "," << j;
    }
  }
}

TEST(CpuSolve, FactorMultipliesBack) {
  for (const std::int64_t d : {1, 2, 5, 63, 64, 65, 200}) {
    expect_factor<double>(d);
    expect_factor<float>(d);
  }
}

TEST(CpuSolve, FactorOfARowStridedMatrix) {
  constexpr std::int64_t d = 70;
  const std::vector<double> a = positive_matrix<double>(d);
  std::vector<double> plain = a, padded(d * (d + 5), 123.0);
  for (std::int64_t i = 0; i < d; ++i) {
    std::copy_n(a.begin() + i * d, d, padded.begin() + i * (d + 5));
  }
  ASSERT_TRUE(factor(plain, d));
  CpuOps ops(2);
  std::vector<std::uint8_t> workspace(index(ops.factor_workspace_bytes(d, DType::f64)));
  ASSERT_TRUE(ops.factor_upper(
      host_view(padded.data(), d, d + 5).col_range(0, d),
      host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size()))));
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j < d + 5; ++j) {
      ASSERT_EQ(padded[index(i * (d + 5) + j)], j < d ? plain[index(i * d + j)] : 123.0);
    }
  }
}

TEST(CpuSolve, FactorDoesNotDependOnTheNumberOfThreads) {
  std::vector<double> one = positive_matrix<double>(300), three = one;
  ASSERT_TRUE(factor(one, 300, 1));
  ASSERT_TRUE(factor(three, 300, 3));
  EXPECT_EQ(one, three);
}

template <class T>
void expect_refused(std::int64_t d) {
  for (const std::int64_t at : {std::int64_t{0}, d / 2, d - 1}) {
    for (const T bad :
         {T(0), T(-3), std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
      std::vector<T> a = positive_matrix<T>(d);
      a[index(at * d + at)] = bad;
      EXPECT_FALSE(factor(a, d)) << "diagonal " << bad << " at " << at << " of " << d;
    }
    std::vector<T> a = positive_matrix<T>(d);
    a[index(at * d)] = a[index(at)] = std::numeric_limits<T>::quiet_NaN();
    EXPECT_FALSE(factor(a, d)) << "NaN beside the diagonal";
  }
}

TEST(CpuSolve, FactorRefusesWhatIsNotPositiveDefinite) {
  for (const std::int64_t d : {3, 130}) {
    expect_refused<double>(d);
    expect_refused<float>(d);
  }
  std::vector<double> indefinite{1, 2, 2, 1};  // positive diagonal, eigenvalue -1
  EXPECT_FALSE(factor(indefinite, 2));
}

TEST(CpuSolve, DiagonalAndChecks) {
  CpuOps ops(2);
  std::vector<float> h{1, 2, 3, 4}, out(2);
  ops.diagonal(host_view(h.data(), 2, 2), host_view(out.data(), 1, 2));
  EXPECT_EQ(out, (std::vector<float>{1, 4}));
  std::vector<double> a(4);
  std::vector<std::uint8_t> small(1);
  EXPECT_THROW((void)ops.factor_upper(host_view(a.data(), 2, 2), host_view(small.data(), 1, 1)),
               Error);
  EXPECT_THROW(ops.gram(host_view(h.data(), 2, 2), host_view(out.data(), 1, 2)), Error);
}

}  // namespace
}  // namespace engine
