// EvalOps::compare_logits on the CPU, against the formulas in long double.
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using Result = std::array<double, 4>;

std::vector<Result> compare(Matrix& p, Matrix& q, std::vector<std::int32_t> target,
                            int threads = 2) {
  CpuOps ops(threads);
  std::vector<double> out(static_cast<std::size_t>(4 * p.rows()), -7.0);
  ops.compare_logits(p.view(), q.view(), host_view(target.data(), p.rows(), 1),
                     host_view(out.data(), p.rows(), 4));
  std::vector<Result> rows;
  for (std::size_t r = 0; r < out.size(); r += 4) {
    rows.push_back({out[r], out[r + 1], out[r + 2], out[r + 3]});
  }
  return rows;
}

long double log_sum_exp(const Matrix& x, std::int64_t r) {
  long double top = static_cast<long double>(x.get(r, 0)), sum = 0;
  for (std::int64_t c = 1; c < x.cols(); ++c) {
    top = std::max(top, static_cast<long double>(x.get(r, c)));
  }
  for (std::int64_t c = 0; c < x.cols(); ++c) {
    sum += std::exp(static_cast<long double>(x.get(r, c)) - top);
  }
  return top + std::log(sum);
}

struct Direct {
  double kl, log_p, log_q;
};

Direct direct(const Matrix& p, const Matrix& q, std::int64_t r, std::int64_t t) {
  const long double p_sum = log_sum_exp(p, r), q_sum = log_sum_exp(q, r);
  const auto log_p = [&](std::int64_t c) { return static_cast<long double>(p.get(r, c)) - p_sum; };
  const auto log_q = [&](std::int64_t c) { return static_cast<long double>(q.get(r, c)) - q_sum; };
  long double kl = 0;
  for (std::int64_t c = 0; c < p.cols(); ++c) kl += std::exp(log_p(c)) * (log_p(c) - log_q(c));
  return {static_cast<double>(kl), static_cast<double>(log_p(t)), static_cast<double>(log_q(t))};
}

std::int64_t first_maximum(const Matrix& x, std::int64_t r) {
  std::int64_t best = 0;
  for (std::int64_t c = 1; c < x.cols(); ++c) {
    if (x.get(r, c) > x.get(r, best)) best = c;
  }
  return best;
}

// Divergences from 1e-9 to thousands; the logarithms are f32 sums inside, the divergence is not.
TEST(CpuCompare, AgreesWithTheDirectFormulas) {
  for (const std::int64_t vocab : {1, 2, 5, 31, 1025, 4097}) {
    for (const float scale : {1e-4F, 0.1F, 3.0F, 1000.0F}) {
      const float size = scale > 100.0F ? 2500.0F : 3.0F;
      Matrix p = Matrix::random(DType::f32, 9, vocab, 3, 5, size);
      Matrix q(DType::f32, 9, vocab, 1);
      std::vector<std::int32_t> target;
      for (std::int64_t r = 0; r < 9; ++r) {
        for (std::int64_t c = 0; c < vocab; ++c) {
          const auto i = static_cast<std::uint64_t>(r * vocab + c);
          q.put(r, c, static_cast<float>(p.get(r, c)) + scale * bell_value(6, 0, i));
        }
        target.push_back(static_cast<std::int32_t>((r * 977) % vocab));
      }
      const std::vector<Result> found = compare(p, q, target);
      int agreements = 0;
      for (std::int64_t r = 0; r < 9; ++r) {
        const auto row = static_cast<std::size_t>(r);
        const Direct want = direct(p, q, r, target[row]);
        ASSERT_TRUE(close(found[row][0], want.kl, 1e-14 + 1e-11 * want.kl))
            << vocab << " " << scale << ": " << found[row][0] << " " << want.kl;
        ASSERT_GE(found[row][0], 0.0);
        const bool same = first_maximum(p, r) == first_maximum(q, r);
        ASSERT_EQ(found[row][1], same ? 1.0 : 0.0) << vocab << " " << scale << " " << r;
        agreements += same ? 1 : 0;
        ASSERT_TRUE(close(found[row][2], want.log_p, 1e-6)) << found[row][2] << " " << want.log_p;
        ASSERT_TRUE(close(found[row][3], want.log_q, 1e-6)) << found[row][3] << " " << want.log_q;
      }
      if (vocab == 1 || scale < 1e-3F) {
        EXPECT_EQ(agreements, 9) << vocab << " " << scale;
      }
      if (vocab > 1000 && scale > 1.0F) {
        EXPECT_LT(agreements, 9) << vocab << " " << scale;
      }
    }
  }
}

TEST(CpuCompare, ExtremeLogitsStayExact) {
  // p is certain of column 0, q of column 1: the divergence is the distance of q's logits.
  Matrix p(DType::f32, 2, 3), q(DType::f32, 2, 3);
  for (std::int64_t c = 0; c < 3; ++c) {
    p.put(0, c, c == 0 ? 1e4F : -1e4F);
    q.put(0, c, c == 1 ? 1e4F : -1e4F);
    // A common offset changes nothing.
    p.put(1, c, static_cast<float>(c));
    q.put(1, c, static_cast<float>(c) + 10000.0F);
  }
  const std::vector<Result> found = compare(p, q, {0, 2});
  EXPECT_EQ(found[0], (Result{2e4, 0.0, 0.0, -2e4}));
  EXPECT_TRUE(close(found[1][0], 0.0, 1e-14)) << found[1][0];
  EXPECT_EQ(found[1][1], 1.0);
  EXPECT_EQ(found[1][2], found[1][3]);
}

TEST(CpuCompare, EqualRowsGiveExactlyZeroAndTheLossOfRowNll) {
  CpuOps ops(2);
  for (const std::int64_t vocab : {1, 7, 300, 5000}) {
    Matrix p = Matrix::random(DType::f32, 20, vocab, 0, 3, 4.0F);
    Matrix q = Matrix::random(DType::f32, 20, vocab, 5, 3, 4.0F);
    std::vector<std::int32_t> target(20);
    for (std::size_t r = 0; r < 20; ++r) {
      target[r] = static_cast<std::int32_t>((r * 31) % static_cast<std::size_t>(vocab));
    }
    const std::vector<Result> found = compare(p, q, target);
    std::vector<double> nll(20);
    ops.row_nll(p.view(), host_view(target.data(), 20, 1), host_view(nll.data(), 20, 1));
    for (std::size_t r = 0; r < 20; ++r) {
      EXPECT_EQ(found[r], (Result{0.0, 1.0, -nll[r], -nll[r]})) << vocab << " " << r;
    }
  }
}

TEST(CpuCompare, TheFirstOfEqualMaximaCounts) {
  for (const std::int64_t vocab : {4, 40, 400}) {
    Matrix p = Matrix::random(DType::f32, 3, vocab, 0, 8);
    Matrix q = Matrix::random(DType::f32, 3, vocab, 0, 9);
    for (std::int64_t r = 0; r < 3; ++r) {
      p.put(r, 2, 50.0F);
      p.put(r, vocab - 1, 50.0F);
      q.put(r, vocab - 1, 60.0F);
    }
    q.put(1, 2, 60.0F);  // first in both rows
    q.put(2, 1, 60.0F);  // first in q only
    const std::vector<Result> found = compare(p, q, {-1, -1, -1});
    EXPECT_EQ(found[0][1], 0.0) << vocab;
    EXPECT_EQ(found[1][1], 1.0) << vocab;
    EXPECT_EQ(found[2][1], 0.0) << vocab;
  }
}

TEST(CpuCompare, NanAndInfinityAnywhereGiveNan) {
  for (const float bad : {nan, inf, -inf}) {
    for (const std::int64_t at : {0, 5, 298, 299}) {
      for (const int side : {0, 1, 2}) {  // the reference, the logits, both
        Matrix p = Matrix::random(DType::f32, 2, 300, 0, 1, 30.0F);
        Matrix q = Matrix::random(DType::f32, 2, 300, 0, 2, 30.0F);
        if (side != 1) p.put(0, at, bad);
        if (side != 0) q.put(0, at, bad);
        const std::vector<Result> found = compare(p, q, {7, 7});
        for (const double v : found[0]) EXPECT_TRUE(std::isnan(v)) << bad << at << side;
        for (const double v : found[1]) EXPECT_TRUE(std::isfinite(v)) << bad << at << side;
        // Without a target there is no probability to be unknown.
        const Result none = compare(p, q, {-1, 7})[0];
        EXPECT_TRUE(std::isnan(none[0]) && std::isnan(none[1]));
        EXPECT_EQ(none[2], 0.0);
        EXPECT_EQ(none[3], 0.0);
      }
    }
  }
}

TEST(CpuCompare, NegativeTargetsGiveNoProbabilities) {
  Matrix p = Matrix::random(DType::f32, 3, 50, 0, 1);
  Matrix q = Matrix::random(DType::f32, 3, 50, 0, 2);
  const std::vector<Result> found = compare(p, q, {-1, -100, 4});
  const std::vector<Result> all = compare(p, q, {1, 2, 4});
  for (const std::size_t r : {0U, 1U}) {
    EXPECT_EQ(found[r], (Result{all[r][0], all[r][1], 0.0, 0.0}));
    EXPECT_GT(found[r][0], 0.0);
    EXPECT_LT(all[r][2], 0.0);
  }
  EXPECT_EQ(found[2], all[2]);
}

TEST(CpuCompare, TargetsBeyondTheVocabularyAreRefused) {
  Matrix p = Matrix::random(DType::f32, 1, 50, 0, 1);
  EXPECT_THROW(compare(p, p, {50}), Error);
  EXPECT_NO_THROW(compare(p, p, {49}));
}

TEST(CpuCompare, ThreadsDoNotMatter) {
  Matrix p = Matrix::random(DType::f32, 67, 1000, 0, 1, 3.0F);
  Matrix q = Matrix::random(DType::f32, 67, 1000, 1, 2, 3.0F);
  const std::vector<std::int32_t> target(67, 5);
  EXPECT_EQ(compare(p, q, target, 1), compare(p, q, target, 2));
}

}  // namespace
}  // namespace engine
