#include "engine/ops/cpu_gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

struct Case {
  std::int64_t m, n, k;
  DType a, b, c;
  bool a_transposed, b_transposed, accumulate, lower_only;
  float alpha;

  [[nodiscard]] std::string text() const {
    return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " " +
           dtype_name(a) + (a_transposed ? "^T " : " ") + dtype_name(b) +
           (b_transposed ? "^T " : " ") + dtype_name(c) + (accumulate ? " +=" : " =") +
           (lower_only ? " lower" : "") + " alpha " + std::to_string(alpha);
  }
};

GemmInput input(Matrix& m, bool transposed) {
  const View v = m.view();
  return {v.data, v.dtype, v.stride, transposed};
}

Matrix operand(DType dtype, std::int64_t rows, std::int64_t cols, bool transposed,
               std::uint64_t seed) {
  return transposed ? Matrix::random(dtype, cols, rows, 3, seed)
                    : Matrix::random(dtype, rows, cols, 5, seed);
}

Matrix run(const Case& t, Matrix& a, Matrix& b, const Matrix& c0, Isa isa, ThreadPool* pool) {
  Matrix c = c0;
  GemmProblem p;
  p.m = t.m;
  p.n = t.n;
  p.k = t.k;
  p.a = input(a, t.a_transposed);
  p.b = input(b, t.b_transposed);
  p.c = {c.view().data, t.c, c.view().stride};
  p.alpha = t.alpha;
  p.accumulate = t.accumulate;
  p.lower_only = t.lower_only;
  gemm(pool, p, isa);
  return c;
}

void check(const Case& t, Isa isa, ThreadPool* pool) {
  SCOPED_TRACE(t.text() + " " + isa_name(isa));
  Matrix a = operand(t.a, t.m, t.k, t.a_transposed, 1);
  Matrix b = operand(t.b, t.k, t.n, t.b_transposed, 2);
  // Without accumulation what was there is NaN and must not be read.
  const Matrix c0 = t.accumulate ? Matrix::random(t.c, t.m, t.n, 7, 3) : Matrix(t.c, t.m, t.n, 7);
  const Matrix c = run(t, a, b, c0, isa, pool);
  c.expect_gaps_untouched();
  for (std::int64_t i = 0; i < t.m; ++i) {
    for (std::int64_t j = 0; j < (t.lower_only ? std::min(i + 1, t.n) : t.n); ++j) {
      double want = 0.0;
      double magnitude = 0.0;
      for (std::int64_t p = 0; p < t.k; ++p) {
        const double x = t.a_transposed ? a.get(p, i) : a.get(i, p);
        const double y = t.b_transposed ? b.get(j, p) : b.get(p, j);
        want += x * y;
        magnitude += std::abs(x * y);
      }
      want *= static_cast<double>(t.alpha);
      if (t.accumulate) want += c0.get(i, j);
      const double tolerance = 1e-6 * (magnitude + 1.0) +
                               (t.c == DType::f32 ? 0.0 : testing::roundoff(t.c) * std::abs(want));
      ASSERT_TRUE(close(c.get(i, j), want, tolerance))
          << "(" << i << ", " << j << "): " << c.get(i, j) << ", expected " << want;
    }
  }
}

TEST(CpuGemm, MatchesNaiveLoopsOnOddShapes) {
  ThreadPool pool(2);
  const std::vector<std::int64_t> ks = {0, 1, 3, 17, 64, 65, 257, 300};
  for (const Isa isa : testing::supported_isas()) {
    std::uint64_t pick = 0;
    for (std::int64_t m = 1; m <= 17; ++m) {
      for (const std::int64_t n : {1, 5, 16, 33, 71}) {
        // Every combination of the rest would take long; Philox chooses.
        const auto bits = philox(7, 7, pick++).v[0];
        const auto dtype = [&](unsigned shift) {
          return testing::float_dtypes[(bits >> shift) % 3];
        };
        check({m, n, ks[bits % ks.size()], dtype(4), dtype(8), dtype(12), (bits >> 16 & 1) != 0,
               (bits >> 17 & 1) != 0, (bits >> 18 & 1) != 0, (bits >> 19 & 3) == 0,
               (bits >> 21 & 1) != 0 ? 1.0F : -1.0F},
              isa, (bits >> 22 & 1) != 0 ? &pool : nullptr);
      }
    }
  }
}

TEST(CpuGemm, EveryDtypeAndOrderOnBlockedAndSkinnyShapes) {
  ThreadPool pool(2);
  for (const Isa isa : testing::supported_isas()) {
    for (const DType a : testing::float_dtypes) {
      for (const DType b : testing::float_dtypes) {
        for (const DType c : testing::float_dtypes) {
          for (const bool accumulate : {false, true}) {
            check({3, 37, 45, a, b, c, false, true, accumulate, false, 1.0F}, isa, &pool);
            check({19, 37, 45, a, b, c, false, true, accumulate, false, 1.0F}, isa, &pool);
            check({19, 37, 45, a, b, c, true, false, accumulate, false, -1.0F}, isa, &pool);
          }
        }
      }
    }
  }
}

TEST(CpuGemm, SeveralBlocksInEveryDirection) {
  ThreadPool pool(2);
  for (const Isa isa : testing::supported_isas()) {
    check({187, 1100, 301, DType::f32, DType::bf16, DType::bf16, false, true, true, false, 1.0F},
          isa, &pool);
    check({200, 200, 520, DType::f32, DType::f32, DType::f32, true, false, true, true, 0.5F}, isa,
          &pool);
  }
}

TEST(CpuGemm, LowerOnlySkipsTilesAboveTheDiagonal) {
  const Case t{300, 300, 8, DType::f32, DType::f32, DType::f32, false, false, false, true, 1.0F};
  Matrix a = operand(t.a, t.m, t.k, false, 1);
  Matrix b = operand(t.b, t.k, t.n, false, 2);
  for (const Isa isa : testing::supported_isas()) {
    const Matrix c = run(t, a, b, Matrix(t.c, t.m, t.n), isa, nullptr);
    EXPECT_TRUE(std::isnan(c.get(0, 299))) << isa_name(isa);
    EXPECT_FALSE(std::isnan(c.get(299, 0))) << isa_name(isa);
  }
}

TEST(CpuGemm, SameBitsForAnyNumberOfThreads) {
  ThreadPool one(1);
  ThreadPool two(2);
  ThreadPool three(3);
  for (const Isa isa : testing::supported_isas()) {
    for (const std::int64_t m : {2, 30, 400}) {
      const Case t{m,     333,  700,   DType::bf16, DType::bf16, DType::f32,
                   false, true, false, false,       1.0F};
      Matrix a = operand(t.a, t.m, t.k, false, 1);
      Matrix b = operand(t.b, t.k, t.n, true, 2);
      const Matrix c0(t.c, t.m, t.n);
      const Matrix alone = run(t, a, b, c0, isa, &one);
      EXPECT_TRUE(alone == run(t, a, b, c0, isa, nullptr));
      EXPECT_TRUE(alone == run(t, a, b, c0, isa, &two));
      EXPECT_TRUE(alone == run(t, a, b, c0, isa, &three));
      EXPECT_TRUE(alone == run(t, a, b, c0, isa, &two));
    }
  }
}

TEST(CpuGemm, NanAndInfinityReachTheResult) {
  for (const Isa isa : testing::supported_isas()) {
    for (const std::int64_t m : {1, 20}) {
      const Case t{m, 40, 33, DType::f32, DType::f32, DType::f32, false, true, false, false, 1.0F};
      Matrix a = operand(t.a, t.m, t.k, false, 1);
      Matrix b = operand(t.b, t.k, t.n, true, 2);
      b.put(7, 32, std::numeric_limits<float>::quiet_NaN());
      const Matrix c = run(t, a, b, Matrix(t.c, t.m, t.n), isa, nullptr);
      for (std::int64_t j = 0; j < t.n; ++j) EXPECT_EQ(std::isnan(c.get(0, j)), j == 7);
    }
  }
}

TEST(CpuGemm, RefusesImpossibleProblems) {
  float x[4] = {};
  GemmProblem p;
  p.m = p.n = p.k = 2;
  p.a = p.b = {x, DType::f32, 2, false};
  p.c = {x, DType::f32, 1};
  EXPECT_THROW(gemm(nullptr, p), Error);
  p.c = {x, DType::i32, 2};
  EXPECT_THROW(gemm(nullptr, p), Error);
  p.c = {x, DType::f32, 2};
  p.a.stride = 1;
  EXPECT_THROW(gemm(nullptr, p), Error);
}

TEST(ThreadPool, CoversTheRangeOnceInFixedPieces) {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const std::int64_t n : {0, 1, 7, 8, 9, 1000}) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(n));
      std::atomic<int> odd_pieces = 0;
      pool.run(n, 8, [&](std::int64_t begin, std::int64_t end) {
        if (begin % 8 != 0 || end != std::min(n, begin + 8)) ++odd_pieces;
        for (std::int64_t i = begin; i < end; ++i) ++hits[static_cast<std::size_t>(i)];
      });
      EXPECT_EQ(odd_pieces, 0);
      for (const auto& h : hits) EXPECT_EQ(h, 1);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 50; ++round) {
      EXPECT_THROW(pool.run(100, 1,
                            [](std::int64_t begin, std::int64_t) {
                              if (begin == 41) throw std::runtime_error("41");
                            }),
                   std::runtime_error);
      std::atomic<std::int64_t> sum = 0;
      pool.run(100, 1, [&](std::int64_t begin, std::int64_t) { sum += begin; });
      EXPECT_EQ(sum, 4950);
    }
  }
}

TEST(ThreadPool, RefusesToNestAndBadArguments) {
  ThreadPool pool(2);
  EXPECT_THROW(pool.run(4, 1,
                        [&](std::int64_t, std::int64_t) {
                          pool.run(4, 1, [](std::int64_t, std::int64_t) {});
                        }),
               Error);
  EXPECT_THROW(pool.run(4, 0, [](std::int64_t, std::int64_t) {}), Error);
  EXPECT_THROW(ThreadPool(-1), Error);
}

}  // namespace
}  // namespace engine
