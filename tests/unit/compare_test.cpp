// The comparators are tested first: one that accepts garbage makes every other test worthless.
#include "tests/support/compare.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "engine/core/rng.h"

namespace engine::test {
namespace {

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();
constexpr double inf_value = std::numeric_limits<double>::infinity();

std::vector<double> bell(std::size_t n, std::uint64_t seed = 1) {
  std::vector<double> v(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = static_cast<double>(bell_value(seed, 0, i));
  return v;
}

TEST(CompareClose, AcceptsEqualAndNearlyEqualData) {
  const std::vector<double> expected = bell(1000);
  std::vector<double> actual = expected;
  EXPECT_TRUE(compare_close(actual, expected, {}).ok);
  for (double& v : actual) v *= 1.0 + 0.9e-6;
  EXPECT_TRUE(compare_close(actual, expected, {0.0, 1e-6}).ok);
  EXPECT_FALSE(compare_close(actual, expected, {0.0, 0.8e-6}).ok);
}

TEST(CompareClose, AcceptsAnErrorOfExactlyTheTolerance) {
  const std::vector<double> expected = {1.0};
  const std::vector<double> actual = {1.5};
  EXPECT_TRUE(compare_close(actual, expected, {0.5, 0.0}).ok);
  EXPECT_FALSE(compare_close(actual, expected, {0.4999, 0.0}).ok);
}

TEST(CompareClose, RejectsNanOnEitherSideAndOnBoth) {
  const std::vector<double> good = {1.0, 2.0};
  const std::vector<double> bad = {1.0, nan_value};
  const Tolerance generous{1e30, 1e30};
  EXPECT_FALSE(compare_close(bad, good, generous).ok);
  EXPECT_FALSE(compare_close(good, bad, generous).ok);
  EXPECT_FALSE(compare_close(bad, bad, generous).ok);
  EXPECT_EQ(compare_close(bad, good, generous).worst, 1);
}

TEST(CompareClose, RejectsANanOrInfiniteTolerance) {
  const std::vector<double> a = {1.0};
  const std::vector<double> b = {2.0};
  EXPECT_FALSE(compare_close(a, b, {nan_value, 0.0}).ok);
  EXPECT_FALSE(compare_close(a, b, {inf_value, 0.0}).ok);
  EXPECT_FALSE(compare_close(a, b, {-1.0, 0.0}).ok);
  const std::vector<double> each = {nan_value};
  EXPECT_FALSE(compare_close(a, a, {0.0, 0.0, each}).ok);
}

TEST(CompareClose, InfinitiesAreEqualToThemselvesOnly) {
  const std::vector<double> plus = {inf_value};
  const std::vector<double> minus = {-inf_value};
  const std::vector<double> finite = {1e300};
  const Tolerance generous{1e300, 1.0};
  EXPECT_TRUE(compare_close(plus, plus, generous).ok);
  EXPECT_TRUE(compare_close(minus, minus, generous).ok);
  EXPECT_FALSE(compare_close(plus, minus, generous).ok);
  EXPECT_FALSE(compare_close(plus, finite, generous).ok);
  EXPECT_FALSE(compare_close(finite, plus, generous).ok);
}

TEST(CompareClose, RejectsASignFlip) {
  const std::vector<double> expected = bell(1000);
  std::vector<double> actual = expected;
  actual[500] = -actual[500];
  const Comparison c = compare_close(actual, expected, {1e-6, 1e-3});
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.worst, 500);
  EXPECT_EQ(c.failures, 1);
  // Both negative and wrong: |actual| and |expected| must not stand in for the difference.
  const std::vector<double> two = {-2.0};
  const std::vector<double> three = {-3.0};
  EXPECT_FALSE(compare_close(two, three, {0.5, 0.0}).ok);
}

TEST(CompareClose, RejectsOneWrongElementInTenMillion) {
  constexpr std::size_t n = 10'000'000;
  std::vector<float> expected(n);
  for (std::size_t i = 0; i < n; ++i) expected[i] = static_cast<float>(i % 1013) - 506.0F;
  std::vector<float> actual = expected;
  EXPECT_TRUE(compare_close(actual, expected, {1e-6, 1e-6}).ok);
  actual[7'654'321] += 0.01F;
  const Comparison c = compare_close(actual, expected, {1e-6, 1e-6});
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.failures, 1);
  EXPECT_EQ(c.worst, 7'654'321);
  EXPECT_NE(c.message.find("7654321"), std::string::npos) << c.message;
}

TEST(CompareClose, RejectsTransposedData) {
  constexpr std::size_t n = 64;
  const std::vector<double> expected = bell(n * n);
  std::vector<double> actual(n * n);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) actual[j * n + i] = expected[i * n + j];
  }
  const Comparison c = compare_close(actual, expected, {1e-3, 1e-2});
  EXPECT_FALSE(c.ok);
  EXPECT_GT(c.failures, static_cast<std::int64_t>(n * n / 2));
}

TEST(CompareClose, RejectsDataShiftedByOneGroup) {
  constexpr std::size_t group = 32;
  const std::vector<double> all = bell(1024 + group);
  const std::vector<double> expected(all.begin(), all.end() - group);
  const std::vector<double> actual(all.begin() + group, all.end());
  EXPECT_FALSE(compare_close(actual, expected, {1e-3, 1e-2}).ok);
  // A single group read from its neighbour.
  std::vector<double> one = expected;
  std::copy_n(expected.begin() + 2 * group, group, one.begin() + 3 * group);
  EXPECT_FALSE(compare_close(one, expected, {1e-3, 1e-2}).ok);
}

TEST(CompareClose, RejectsOtherSizes) {
  const std::vector<double> two = {1.0, 2.0};
  const std::vector<double> three = {1.0, 2.0, 3.0};
  EXPECT_FALSE(compare_close(two, three, {1.0, 1.0}).ok);
  EXPECT_FALSE(compare_close(three, two, {1.0, 1.0}).ok);
  EXPECT_FALSE(compare_close(three, three, {1.0, 1.0, two}).ok);
}

TEST(CompareClose, ReportsTheWorstElement) {
  const std::vector<double> expected = {1.0, 2.0, 3.0};
  const std::vector<double> actual = {1.5, 2.0, 5.0};
  const Comparison c = compare_close(actual, expected, {0.25, 0.0});
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.worst, 2);
  EXPECT_DOUBLE_EQ(c.worst_ratio, 8.0);
  EXPECT_EQ(c.failures, 2);
  EXPECT_NE(c.message.find("expected 3"), std::string::npos) << c.message;
  EXPECT_NE(c.message.find("found 5"), std::string::npos) << c.message;
}

TEST(CompareClose, UsesTheToleranceOfEachElement) {
  const std::vector<double> expected = {1.0, 1.0};
  const std::vector<double> actual = {1.1, 1.1};
  const std::vector<double> each = {0.2, 0.05};
  const Comparison c = compare_close(actual, expected, {0.0, 0.0, each});
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.failures, 1);
  EXPECT_EQ(c.worst, 1);
}

TEST(CompareBytes, IsExact) {
  std::vector<std::byte> expected(1000, std::byte{0x5a});
  std::vector<std::byte> actual = expected;
  EXPECT_TRUE(compare_bytes(actual, expected).ok);
  actual[401] ^= std::byte{1};
  const Comparison c = compare_bytes(actual, expected, 4);
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.worst, 100);
  EXPECT_EQ(c.failures, 1);
  EXPECT_NE(c.message.find("0x5a5a5a5a"), std::string::npos) << c.message;
  EXPECT_NE(c.message.find("0x5a5a5b5a"), std::string::npos) << c.message;
  actual.pop_back();
  EXPECT_FALSE(compare_bytes(actual, expected).ok);
}

TEST(CompareBytes, TellsZerosOfDifferentSignApart) {
  const float zeros[2] = {0.0F, -0.0F};
  const auto bytes = std::as_bytes(std::span(zeros));
  EXPECT_FALSE(compare_bytes(bytes.subspan(0, 4), bytes.subspan(4, 4)).ok);
}

TEST(CompareIntegers, IsExact) {
  const std::vector<std::int64_t> expected = {1, -2, 3};
  std::vector<std::int64_t> actual = expected;
  EXPECT_TRUE(compare_integers(actual, expected).ok);
  actual[1] = 2;
  const Comparison c = compare_integers(actual, expected);
  EXPECT_FALSE(c.ok);
  EXPECT_EQ(c.worst, 1);
}

TEST(CompareMostly, CountsDifferences) {
  const std::vector<std::int64_t> expected(1000, 7);
  std::vector<std::int64_t> actual = expected;
  actual[10] = 8;
  actual[20] = 0;
  actual[30] = 6;
  EXPECT_TRUE(compare_mostly(actual, expected, 3).ok);
  EXPECT_FALSE(compare_mostly(actual, expected, 2).ok);
  EXPECT_EQ(compare_mostly(actual, expected, 3).failures, 3);
}

TEST(ErrorModel, CoversTwoOrdersOfOneSumAndNotAMissingTerm) {
  constexpr std::size_t n = 4096;
  const std::vector<double> a = bell(n, 2);
  const std::vector<double> b = bell(n, 3);
  float forward = 0.0F;
  double magnitude = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    forward += static_cast<float>(a[i]) * static_cast<float>(b[i]);
    magnitude += std::abs(a[i] * b[i]);
  }
  float backward = 0.0F;
  for (std::size_t i = n; i-- > 0;) {
    backward += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  }
  const double tolerance =
      sum_tolerance(static_cast<std::int64_t>(n), magnitude) + store_tolerance(DType::f32, 64.0);
  const std::vector<double> x = {static_cast<double>(forward)};
  const std::vector<double> y = {static_cast<double>(backward)};
  EXPECT_TRUE(compare_close(y, x, {tolerance}).ok) << x[0] << " " << y[0] << " " << tolerance;
  // A product of typical size left out is far outside.
  EXPECT_LT(tolerance, 0.1);
  EXPECT_GT(tolerance, 0.0);
}

TEST(ErrorModel, StoreToleranceIsOneRoundingOnEachSide) {
  // Neighbours in each dtype differ by at most the tolerance, second neighbours by more.
  EXPECT_LE(0x1p-7, store_tolerance(DType::bf16, 1.0));
  EXPECT_GT(0x1p-6, store_tolerance(DType::bf16, 1.0));
  EXPECT_LE(0x1p-10, store_tolerance(DType::f16, 1.0));
  EXPECT_GT(0x1p-9, store_tolerance(DType::f16, 1.0));
  EXPECT_LE(0x1p-23, store_tolerance(DType::f32, 1.0));
  EXPECT_GT(0x1p-22, store_tolerance(DType::f32, 1.0));
  // Also among subnormals, where the relative part vanishes.
  EXPECT_LE(0x1p-24, store_tolerance(DType::f16, 0.0));
}

}  // namespace
}  // namespace engine::test
