#include "engine/ops/cpu_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

struct Case {
  std::int64_t batch, q_len, kv_len;
  AttnShape shape;
};

std::vector<double> naive_row(const Case& t, const Matrix& q, const Matrix& k, const Matrix& v,
                              std::int64_t sequence, std::int64_t query, std::int64_t head) {
  const std::int64_t hd = t.shape.head_dim;
  const std::int64_t kv_col = head / (t.shape.heads / t.shape.kv_heads) * hd;
  const std::int64_t seen = t.kv_len - t.q_len + query + 1;
  std::vector<double> p(static_cast<std::size_t>(seen));
  double peak = -1e300;
  for (std::int64_t j = 0; j < seen; ++j) {
    double s = 0.0;
    for (std::int64_t d = 0; d < hd; ++d) {
      s += q.get(sequence * t.q_len + query, head * hd + d) *
           k.get(sequence * t.kv_len + j, kv_col + d);
    }
    p[static_cast<std::size_t>(j)] = s / std::sqrt(static_cast<double>(hd));
    peak = std::max(peak, p[static_cast<std::size_t>(j)]);
  }
  double total = 0.0;
  std::vector<double> out(static_cast<std::size_t>(hd), 0.0);
  for (std::int64_t j = 0; j < seen; ++j) {
    const double e = std::exp(p[static_cast<std::size_t>(j)] - peak);
    total += e;
    for (std::int64_t d = 0; d < hd; ++d) {
      out[static_cast<std::size_t>(d)] += e * v.get(sequence * t.kv_len + j, kv_col + d);
    }
  }
  for (double& x : out) x /= total;
  return out;
}

void check(const Case& t, DType dtype, Isa isa, ThreadPool& pool) {
  SCOPED_TRACE(std::string(dtype_name(dtype)) + " " + isa_name(isa) + " q " +
               std::to_string(t.q_len) + " kv " + std::to_string(t.kv_len) + " heads " +
               std::to_string(t.shape.heads) + "/" + std::to_string(t.shape.kv_heads) + " dim " +
               std::to_string(t.shape.head_dim));
  const std::int64_t q_cols = t.shape.heads * t.shape.head_dim;
  const std::int64_t kv_cols = t.shape.kv_heads * t.shape.head_dim;
  Matrix q = Matrix::random(dtype, t.batch * t.q_len, q_cols, 3, 1, 2.0F);
  // The gaps are NaN: nothing outside the rows and columns may be used.
  Matrix k = Matrix::random(dtype, t.batch * t.kv_len, kv_cols, 5, 2, 2.0F);
  Matrix v = Matrix::random(dtype, t.batch * t.kv_len, kv_cols, 9, 3);
  Matrix out(dtype, t.batch * t.q_len, q_cols, 1);
  cpu_attention(pool, q.view(), k.view(), v.view(), t.shape, t.batch, out.view(), isa);
  out.expect_gaps_untouched();
  for (std::int64_t s = 0; s < t.batch; ++s) {
    for (std::int64_t i = 0; i < t.q_len; ++i) {
      for (std::int64_t h = 0; h < t.shape.heads; ++h) {
        const std::vector<double> want = naive_row(t, q, k, v, s, i, h);
        for (std::int64_t d = 0; d < t.shape.head_dim; ++d) {
          const double w = want[static_cast<std::size_t>(d)];
          const double tolerance =
              5e-6 + (dtype == DType::f32 ? 0.0 : testing::roundoff(dtype) * std::abs(w));
          const double got = out.get(s * t.q_len + i, h * t.shape.head_dim + d);
          ASSERT_TRUE(close(got, w, tolerance))
              << "sequence " << s << " query " << i << " head " << h << " element " << d << ": "
              << got << ", expected " << w;
        }
      }
    }
  }
}

TEST(CpuAttention, MatchesNaiveLoops) {
  ThreadPool pool(2);
  for (const Isa isa : testing::supported_isas()) {
    for (const DType dtype : testing::float_dtypes) {
      check({1, 1, 1, {1, 1, 16}}, dtype, isa, pool);
      check({2, 1, 300, {4, 2, 32}}, dtype, isa, pool);
      check({1, 5, 261, {3, 3, 18}}, dtype, isa, pool);
      check({2, 67, 67, {8, 2, 32}}, dtype, isa, pool);
      check({1, 33, 50, {6, 2, 64}}, dtype, isa, pool);
      check({1, 7, 9, {2, 1, 256}}, dtype, isa, pool);
    }
    check({1, 530, 530, {2, 1, 16}}, DType::f32, isa, pool);
    check({1, 2, 40, {300, 1, 2}}, DType::f32, isa, pool);  // more heads than lanes of a task
  }
}

// Later keys cannot matter: the first rows of a long sequence are those of a short one.
TEST(CpuAttention, IsCausal) {
  ThreadPool pool(2);
  const AttnShape shape{4, 2, 32};
  Matrix q = Matrix::random(DType::f32, 300, 128, 0, 1);
  Matrix k = Matrix::random(DType::f32, 300, 64, 0, 2);
  Matrix v = Matrix::random(DType::f32, 300, 64, 0, 3);
  Matrix before(DType::f32, 300, 128);
  Matrix after(DType::f32, 300, 128);
  cpu_attention(pool, q.view(), k.view(), v.view(), shape, 1, before.view());
  for (std::int64_t r = 200; r < 300; ++r) {
    for (std::int64_t c = 0; c < 64; ++c) {
      k.put(r, c, 9.0F);
      v.put(r, c, -7.0F);
    }
  }
  cpu_attention(pool, q.view(), k.view(), v.view(), shape, 1, after.view());
  for (std::int64_t r = 0; r < 200; ++r) {
    for (std::int64_t c = 0; c < 128; ++c) ASSERT_EQ(before.get(r, c), after.get(r, c));
  }
  EXPECT_NE(before.get(200, 0), after.get(200, 0));
}

TEST(CpuAttention, LargeScoresNeitherOverflowNorVanish) {
  ThreadPool pool(1);
  Matrix q = Matrix::random(DType::f32, 300, 32, 0, 1, 60.0F);
  Matrix k = Matrix::random(DType::f32, 300, 32, 0, 2, 60.0F);
  Matrix v = Matrix::random(DType::f32, 300, 32, 0, 3);
  const Case t{1, 300, 300, {1, 1, 32}};
  for (const Isa isa : testing::supported_isas()) {
    Matrix out(DType::f32, 300, 32);
    cpu_attention(pool, q.view(), k.view(), v.view(), t.shape, 1, out.view(), isa);
    for (std::int64_t i = 0; i < 300; ++i) {
      const std::vector<double> want = naive_row(t, q, k, v, 0, i, 0);
      for (std::int64_t d = 0; d < 32; ++d) {
        // Scores of thousands carry an absolute error of about 1e-3 into the exponent.
        ASSERT_TRUE(close(out.get(i, d), want[static_cast<std::size_t>(d)], 2e-2)) << i << " " << d;
      }
    }
  }
}

TEST(CpuAttention, SameBitsForAnyNumberOfThreads) {
  ThreadPool one(1);
  ThreadPool two(2);
  Matrix q = Matrix::random(DType::bf16, 2 * 150, 256, 0, 1);
  Matrix k = Matrix::random(DType::bf16, 2 * 400, 64, 0, 2);
  Matrix v = Matrix::random(DType::bf16, 2 * 400, 64, 0, 3);
  Matrix first(DType::bf16, 300, 256);
  Matrix second(DType::bf16, 300, 256);
  cpu_attention(one, q.view(), k.view(), v.view(), {8, 2, 32}, 2, first.view());
  cpu_attention(two, q.view(), k.view(), v.view(), {8, 2, 32}, 2, second.view());
  EXPECT_TRUE(first == second);
}

TEST(CpuAttention, RefusesWrongShapes) {
  ThreadPool pool(1);
  Matrix q(DType::f32, 4, 32);
  Matrix k(DType::f32, 2, 32);
  EXPECT_THROW(cpu_attention(pool, q.view(), k.view(), k.view(), {1, 1, 32}, 1, q.view()), Error);
  EXPECT_THROW(cpu_attention(pool, q.view(), q.view(), q.view(), {2, 1, 32}, 1, q.view()), Error);
  EXPECT_THROW(cpu_attention(pool, q.view(), q.view(), q.view(), {3, 2, 32}, 1, q.view()), Error);
}

TEST(CpuRope, RotatesHalvesWithTheContractsRoundings) {
  const std::int64_t half = 11;
  Matrix cos(DType::f32, 40, half, 2);
  Matrix sin(DType::f32, 40, half, 2);
  for (std::int64_t p = 0; p < 40; ++p) {
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle =
          static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(j) / 11.0);
      cos.put(p, j, static_cast<float>(std::cos(angle)));
      sin.put(p, j, static_cast<float>(std::sin(angle)));
    }
  }
  CpuOps ops(2);
  const Positions positions{9, 30};
  for (const DType d : testing::float_dtypes) {
    Matrix x = Matrix::random(d, 70, 3 * 2 * half, 4, 5);
    const Matrix before = x;
    ops.rope(x.view(), 2 * half, cos.view(), sin.view(), positions);
    x.expect_gaps_untouched();
    const auto r = [d](double v) { return round_to(d, static_cast<float>(v)); };
    for (std::int64_t row = 0; row < 70; ++row) {
      const std::int64_t p = 9 + row % 30;
      for (std::int64_t c = 0; c < 3 * 2 * half; c += 2 * half) {
        for (std::int64_t j = 0; j < half; ++j) {
          const float cs = r(cos.get(p, j));
          const float sn = r(sin.get(p, j));
          const auto a = static_cast<float>(before.get(row, c + j));
          const auto b = static_cast<float>(before.get(row, c + j + half));
          // Each product is formed in double, exactly, and rounded to f32 and then to the dtype.
          const auto product = [&](float u, float v) {
            return static_cast<double>(r(static_cast<double>(u) * static_cast<double>(v)));
          };
          const float lo = r(product(a, cs) - product(b, sn));
          const float hi = r(product(b, cs) + product(a, sn));
          ASSERT_EQ(x.get(row, c + j), static_cast<double>(lo)) << dtype_name(d) << " row " << row;
          ASSERT_EQ(x.get(row, c + j + half), static_cast<double>(hi)) << dtype_name(d);
        }
      }
    }
  }
}

TEST(CpuRope, RefusesPositionsBeyondTheTable) {
  CpuOps ops(1);
  Matrix table(DType::f32, 10, 8);
  Matrix x = Matrix::random(DType::f32, 8, 16, 0, 1);
  EXPECT_THROW(ops.rope(x.view(), 16, table.view(), table.view(), {3, 8}), Error);
  EXPECT_THROW(ops.rope(x.view(), 15, table.view(), table.view(), {0, 8}), Error);
}

}  // namespace
}  // namespace engine
