// The two books of engine/weight/e8.h: their points, and the search against trying all of them.
#include "engine/weight/e8.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <set>
#include <vector>

#include "engine/core/rng.h"

namespace engine {
namespace {

using Point = std::array<float, 8>;

Point decode(std::uint16_t code) {
  Point p{};
  e8p_point(code, p);
  return p;
}

double square(const Point& a, const Point& b) {
  double sum = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    const double e = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += e * e;
  }
  return sum;
}

// Standard normal, Box-Muller over counters.
Point gaussian(std::uint64_t stream, std::uint64_t index, double scale) {
  Point p{};
  for (std::uint64_t i = 0; i < 4; ++i) {
    const Philox4 r = philox(17, stream, 4 * index + i);
    const double u = (static_cast<double>(r.v[0]) + 0.5) * 0x1p-32;
    const double angle = static_cast<double>(r.v[1]) * 0x1p-32 * 2.0 * M_PI;
    const double radius = scale * std::sqrt(-2.0 * std::log(u));
    p[2 * i] = static_cast<float>(radius * std::cos(angle));
    p[2 * i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return p;
}

TEST(E8, TableHasThePublishedWords) {
  const auto& words = e8p_words();
  EXPECT_EQ(words[0], 0x99999999U);
  EXPECT_EQ(words[1], 0x59999999U);
  EXPECT_EQ(words[227], 0x5B99BB9BU);
  EXPECT_EQ(words[255], 0x7B9BBB9BU);
  EXPECT_EQ(std::set<std::uint32_t>(words.begin(), words.end()).size(), 256U);
}

TEST(E8, PointsAreDistinctOddQuartersWithTheRightMeanSquare) {
  std::set<Point> seen;
  double sum = 0;
  for (unsigned code = 0; code < 65536; ++code) {
    const Point p = decode(static_cast<std::uint16_t>(code));
    for (const float v : p) {
      const float quarters = v * 4.0F;
      EXPECT_EQ(quarters, std::round(quarters));
      EXPECT_EQ(std::fmod(std::fabs(quarters), 2.0F), 1.0F);
      sum += static_cast<double>(v) * static_cast<double>(v);
    }
    seen.insert(p);
  }
  EXPECT_EQ(seen.size(), 65536U);
  EXPECT_NEAR(sum / (65536.0 * 8), 1.19629, 5e-6);
}

TEST(E8, EveryPointIsItsOwnNearest) {
  for (unsigned code = 0; code < 65536; ++code) {
    const Point p = decode(static_cast<std::uint16_t>(code));
    Point q{};
    ASSERT_EQ(e8p_nearest(p, q), code);
    ASSERT_EQ(q, p);
  }
}

// The parity of the signs' byte says which shift a point has.
TEST(E8, ParityOfTheSignsIsTheShift) {
  for (unsigned code = 0; code < 65536; ++code) {
    const bool lowered = __builtin_parity(code & 255U) != 0;
    for (const float v : decode(static_cast<std::uint16_t>(code))) {
      const float unshifted = v + (lowered ? 0.25F : -0.25F);
      ASSERT_EQ(std::fabs(std::fmod(unshifted, 1.0F)), 0.5F);
    }
  }
}

TEST(E8, NearestIsAsNearAsTheBestOfAll) {
  std::vector<Point> all(65536);
  for (unsigned code = 0; code < 65536; ++code)
    all[code] = decode(static_cast<std::uint16_t>(code));
  const double scales[] = {0.2, 1.0, 3.0};
  for (std::size_t s = 0; s < 3; ++s) {
    for (std::uint64_t n = 0; n < 150; ++n) {
      const Point x = gaussian(s, n, scales[s]);
      double best = INFINITY;
      for (const Point& p : all) best = std::min(best, square(x, p));
      Point q{};
      const std::uint16_t code = e8p_nearest(x, q);
      EXPECT_EQ(decode(code), q);
      EXPECT_LE(square(x, q), best * (1 + 1e-6)) << "scale " << scales[s] << ", vector " << n;
    }
  }
}

TEST(E8, ErrorOfGaussianWeights) {
  // 20000 vectors: the standard error of the mean is about 0.0002.
  const auto error = [](double scale) {
    double sum = 0;
    for (std::uint64_t n = 0; n < 20000; ++n) {
      const Point x = gaussian(7, n, scale);
      Point q{};
      (void)e8p_nearest(x, q);
      sum += square(x, q);
    }
    return sum / (20000 * 8 * scale * scale);
  };
  EXPECT_NEAR(error(1.03), 0.0915, 0.001);
  EXPECT_NEAR(error(0.9), 0.0991, 0.001);
}

TEST(E8, BytePointsAreInTheirOrder) {
  const auto& points = e8_byte_points();
  EXPECT_EQ(std::set<Point>(points.begin(), points.end()).size(), 256U);
  EXPECT_EQ(points[0], (Point{-1, -1}));
  EXPECT_EQ(points[56], Point{});
  EXPECT_EQ(points[112], (Point{1, 1}));
  EXPECT_EQ(points[113], (Point{-.5F, -.5F, -.5F, -.5F, -.5F, -.5F, -.5F, -.5F}));
  EXPECT_EQ(points[114], (Point{-.5F, -.5F, -.5F, -.5F, -.5F, -.5F, .5F, .5F}));
  EXPECT_EQ(points[241], Point{2});
  EXPECT_EQ(points[255], (Point{0, 0, 0, 0, 0, 0, -2, 0}));
  // Within each of the first two kinds, lexicographic; all are in E8.
  for (std::size_t i = 1; i < 241; ++i) {
    if (i != 113) {
      EXPECT_LT(points[i - 1], points[i]);
    }
  }
  for (const Point& p : points) {
    double sum = 0;
    for (const float v : p) sum += static_cast<double>(v);
    EXPECT_EQ(std::fmod(sum, 2.0), 0.0);
  }
}

TEST(E8, NearestOfTheBytesIsExact) {
  const auto& points = e8_byte_points();
  for (unsigned code = 0; code < 256; ++code) {
    Point q{};
    EXPECT_EQ(e8_byte_nearest(points[code], q), code);
    EXPECT_EQ(q, points[code]);
  }
  const double scales[] = {0.2, 0.6, 2.0};
  for (std::size_t s = 0; s < 3; ++s) {
    for (std::uint64_t n = 0; n < 5000; ++n) {
      const Point x = gaussian(20 + s, n, scales[s]);
      double best = INFINITY;
      for (const Point& p : points) best = std::min(best, square(x, p));
      Point q{};
      const std::uint8_t code = e8_byte_nearest(x, q);
      EXPECT_EQ(points[code], q);
      EXPECT_LE(square(x, q), best * (1 + 1e-6)) << "scale " << scales[s] << ", vector " << n;
    }
  }
}

}  // namespace
}  // namespace engine
