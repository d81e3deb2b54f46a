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

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// One spacing of `d` around v: results that differ by the rounding of an intermediate value.
double spacing(DType d, double v) { return 2.0 * testing::roundoff(d) * std::abs(v) + 1e-7; }

TEST(CpuDense, EmbedCopiesRowsAndRefusesStrangers) {
  CpuOps ops(2);
  for (const DType d : testing::float_dtypes) {
    Matrix table = Matrix::random(d, 9, 37, 3, 1);
    Matrix out(d, 5, 37, 2);
    std::vector<std::int32_t> ids = {8, 0, 3, 3, 7};
    ops.embed(host_view(ids.data(), 5, 1), table.view(), out.view());
    out.expect_gaps_untouched();
    for (std::int64_t r = 0; r < 5; ++r) {
      for (std::int64_t c = 0; c < 37; ++c) {
        EXPECT_EQ(out.get(r, c), table.get(ids[static_cast<std::size_t>(r)], c));
      }
    }
    for (const std::int32_t bad : {-1, 9}) {
      ids[4] = bad;
      try {
        ops.embed(host_view(ids.data(), 5, 1), table.view(), out.view());
        ADD_FAILURE() << "accepted " << bad;
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::mismatch);
        EXPECT_NE(std::string(e.what()).find("row 4"), std::string::npos) << e.what();
      }
    }
  }
}

TEST(CpuDense, RmsnormRoundsTheInnerValue) {
  CpuOps ops(2);
  for (const DType d : testing::float_dtypes) {
    for (const std::int64_t dim : {1, 7, 16, 100, 333}) {
      Matrix x = Matrix::random(d, 5, dim, 3, 1, 3.0F);
      Matrix w = Matrix::random(d, 1, dim, 0, 2);
      Matrix out(d, 5, dim, 1);
      ops.rmsnorm(x.view(), w.view(), 1e-5F, out.view());
      out.expect_gaps_untouched();
      std::int64_t exact = 0;
      for (std::int64_t r = 0; r < 5; ++r) {
        double squares = 0.0;
        for (std::int64_t c = 0; c < dim; ++c) squares += x.get(r, c) * x.get(r, c);
        const double root = std::sqrt(squares / static_cast<double>(dim) + 1e-5);
        for (std::int64_t c = 0; c < dim; ++c) {
          const float inner = round_to(d, static_cast<float>(x.get(r, c) / root));
          const float want =
              round_to(d, static_cast<float>(static_cast<double>(inner) * w.get(0, c)));
          exact += out.get(r, c) == static_cast<double>(want) ? 1 : 0;
          ASSERT_TRUE(close(out.get(r, c), static_cast<double>(want),
                            2.0 * spacing(d, static_cast<double>(want))))
              << dtype_name(d) << " " << r << " " << c;
        }
      }
      // A missing or additional rounding of 16-bit values would show in many elements.
      if (d != DType::f32) {
        EXPECT_GE(exact * 50, 49 * 5 * dim);
      }
      ops.rmsnorm(x.view(), w.view(), 1e-5F, x.view());
      for (std::int64_t c = 0; c < dim; ++c) EXPECT_EQ(x.get(4, c), out.get(4, c));
    }
  }
}

TEST(CpuDense, SiluMulRoundsSilu) {
  CpuOps ops(2);
  for (const DType d : testing::float_dtypes) {
    Matrix gate = Matrix::random(d, 13, 91, 3, 1, 4.0F);
    Matrix up = Matrix::random(d, 13, 91, 1, 2);
    gate.put(0, 0, -200.0F);
    gate.put(0, 1, 200.0F);
    gate.put(0, 2, 0.0F);
    gate.put(0, 3, nan);
    gate.put(0, 4, inf);
    for (std::int64_t c = 0; c < 5; ++c) up.put(0, c, 1.0F);
    Matrix out(d, 13, 91, 2);
    ops.silu_mul(gate.view(), up.view(), out.view());
    out.expect_gaps_untouched();
    EXPECT_TRUE(close(out.get(0, 0), 0.0, 1e-30));
    EXPECT_EQ(out.get(0, 1), 200.0);
    EXPECT_EQ(out.get(0, 2), 0.0);
    EXPECT_TRUE(std::isnan(out.get(0, 3)));
    EXPECT_EQ(out.get(0, 4), static_cast<double>(inf));
    std::int64_t exact = 0;
    for (std::int64_t i = 91; i < 13 * 91; ++i) {
      const double g = gate.get(i / 91, i % 91);
      const float silu = round_to(d, static_cast<float>(g / (1.0 + std::exp(-g))));
      const float want =
          round_to(d, static_cast<float>(static_cast<double>(silu) * up.get(i / 91, i % 91)));
      const double got = out.get(i / 91, i % 91);
      exact += got == static_cast<double>(want) ? 1 : 0;
      ASSERT_TRUE(
          close(got, static_cast<double>(want), 2.0 * spacing(d, static_cast<double>(want))))
          << dtype_name(d) << " silu(" << g << ")";
    }
    if (d != DType::f32) {
      EXPECT_GE(exact * 100, 99 * 12 * 91);
    }
    const Matrix up_before = up;
    ops.silu_mul(gate.view(), up.view(), up.view());
    EXPECT_EQ(up.get(12, 90), out.get(12, 90));
    up = up_before;
    ops.silu_mul(gate.view(), up.view(), gate.view());
    EXPECT_EQ(gate.get(12, 90), out.get(12, 90));
  }
}

TEST(CpuDense, ConvertAmongFloats) {
  CpuOps ops(2);
  for (const DType from : testing::float_dtypes) {
    for (const DType to : testing::float_dtypes) {
      Matrix in = Matrix::random(from, 7, 601, 3, 1, 1000.0F);
      in.put(0, 0, nan);
      in.put(0, 1, -inf);
      Matrix out(to, 7, 601, 5);
      ops.convert(in.view(), out.view());
      out.expect_gaps_untouched();
      EXPECT_TRUE(std::isnan(out.get(0, 0)));
      for (std::int64_t i = 1; i < 7 * 601; ++i) {
        const auto v = static_cast<float>(in.get(i / 601, i % 601));
        ASSERT_EQ(out.get(i / 601, i % 601), static_cast<double>(round_to(to, v)));
      }
    }
  }
  std::vector<double> wide = {1.0 / 3.0, -2.5, 1e300};
  std::vector<float> thin(3);
  ops.convert(host_view(wide.data(), 3, 1), host_view(thin.data(), 3, 1));
  EXPECT_EQ(thin[0], 1.0F / 3.0F);
  EXPECT_EQ(thin[2], inf);
  ops.convert(host_view(thin.data(), 1, 3), host_view(wide.data(), 1, 3));
  EXPECT_EQ(wide[0], static_cast<double>(1.0F / 3.0F));
  std::vector<std::int32_t> a = {1, -2, 3};
  std::vector<std::int32_t> b(3);
  ops.convert(host_view(a.data(), 1, 3), host_view(b.data(), 1, 3));
  EXPECT_EQ(a, b);
  EXPECT_THROW(ops.convert(host_view(a.data(), 1, 3), host_view(thin.data(), 1, 3)), Error);
}

TEST(CpuDense, RowNllIsExactToAMillionth) {
  CpuOps ops(2);
  for (const std::int64_t vocab : {1, 2, 15, 64, 513, 2048}) {
    for (const float scale : {0.1F, 3.0F, 30.0F}) {
      Matrix logits = Matrix::random(DType::f32, 9, vocab, 3, 4, scale);
      std::vector<std::int32_t> target(9);
      for (std::size_t r = 0; r < 9; ++r) {
        target[r] = static_cast<std::int32_t>(static_cast<std::int64_t>(r) * 7919 % vocab);
      }
      target[3] = -1;
      std::vector<double> nll(9, -5.0);
      ops.row_nll(logits.view(), host_view(target.data(), 9, 1), host_view(nll.data(), 9, 1));
      for (std::size_t r = 0; r < 9; ++r) {
        const auto row = static_cast<std::int64_t>(r);
        if (r == 3) {
          EXPECT_EQ(nll[r], 0.0);
          continue;
        }
        double sum = 0.0;
        for (std::int64_t c = 0; c < vocab; ++c) {
          sum += std::exp(logits.get(row, c) - logits.get(row, 0));
        }
        const double want = std::log(sum) + logits.get(row, 0) - logits.get(row, target[r]);
        ASSERT_TRUE(close(nll[r], want, 1e-6)) << vocab << " " << nll[r] << " " << want;
      }
    }
  }
}

TEST(CpuDense, RowNllShowsNanAndRefusesTargetsBeyondTheVocabulary) {
  CpuOps ops(1);
  for (const std::int64_t at : {0, 5, 299}) {
    Matrix logits = Matrix::random(DType::f32, 1, 300, 0, 1);
    logits.put(0, at, nan);
    std::int32_t target = 7;
    double nll = 0.0;
    ops.row_nll(logits.view(), host_view(&target, 1, 1), host_view(&nll, 1, 1));
    EXPECT_TRUE(std::isnan(nll)) << at;
    target = 300;
    EXPECT_THROW(ops.row_nll(logits.view(), host_view(&target, 1, 1), host_view(&nll, 1, 1)),
                 Error);
  }
}

TEST(CpuDense, RowArgmaxTakesTheFirstOfEqualMaxima) {
  CpuOps ops(2);
  for (const std::int64_t cols : {1, 5, 16, 100}) {
    Matrix logits = Matrix::random(DType::f32, 6, cols, 2, 8);
    std::vector<std::int32_t> out(6, -1);
    for (std::int64_t r = 0; r < 6; ++r) {
      logits.put(r, (r * 31 + 4) % cols, 50.0F);
      logits.put(r, (r * 17 + 2) % cols, 50.0F);
    }
    logits.put(5, 0, nan);
    ops.row_argmax(logits.view(), host_view(out.data(), 6, 1));
    for (std::int64_t r = 0; r < 5; ++r) {
      EXPECT_EQ(out[static_cast<std::size_t>(r)],
                std::min((r * 31 + 4) % cols, (r * 17 + 2) % cols));
    }
    EXPECT_GE(out[5], 0);
    EXPECT_LT(out[5], cols);
  }
}

TEST(CpuDense, CountNonfiniteFindsEveryOne) {
  CpuOps ops(2);
  for (const DType d : testing::float_dtypes) {
    for (const std::int64_t cols : {1, 15, 16, 131}) {
      Matrix x = Matrix::random(d, 50, cols, 3, 1);  // the gaps are NaN and do not count
      EXPECT_EQ(ops.count_nonfinite(x.view()), 0);
      x.put(0, 0, nan);
      x.put(49, cols - 1, inf);
      x.put(20, cols / 2, -inf);
      EXPECT_EQ(ops.count_nonfinite(x.view()), 3);
    }
  }
  std::vector<double> wide = {1.0, std::numeric_limits<double>::quiet_NaN(), 1e300};
  EXPECT_EQ(ops.count_nonfinite(host_view(wide.data(), 1, 3)), 1);
}

TEST(CpuDense, SquareSumsInAFixedOrder) {
  CpuOps one(1);
  CpuOps two(2);
  for (const DType da : testing::float_dtypes) {
    for (const DType db : testing::float_dtypes) {
      Matrix a = Matrix::random(da, 300, 257, 3, 1);
      Matrix b = Matrix::random(db, 300, 257, 1, 2);
      double want[2] = {};
      for (std::int64_t i = 0; i < 300 * 257; ++i) {
        const double x = a.get(i / 257, i % 257);
        const double y = b.get(i / 257, i % 257);
        want[0] += (x - y) * (x - y);
        want[1] += x * x;
      }
      double first[2];
      double second[2];
      one.square_sums(a.view(), b.view(), host_view(first, 1, 2));
      two.square_sums(a.view(), b.view(), host_view(second, 1, 2));
      for (int i = 0; i < 2; ++i) {
        EXPECT_TRUE(close(first[i], want[i], 1e-11 * want[i]));
        EXPECT_EQ(first[i], second[i]);
      }
    }
  }
  std::vector<double> a = {1.0, 1.0 + 1e-12};
  std::vector<double> b = {1.0, 1.0};
  double sums[2];
  one.square_sums(host_view(a.data(), 1, 2), host_view(b.data(), 1, 2), host_view(sums, 1, 2));
  EXPECT_TRUE(close(sums[0], 1e-24, 1e-27));
}

TEST(CpuDense, FillBellCountsElementsRowMajor) {
  CpuOps ops(2);
  for (const DType d : testing::float_dtypes) {
    Matrix out(d, 9, 301, 4);
    ops.fill_bell(out.view(), 12, 34, 0.5F, 1.0F);
    out.expect_gaps_untouched();
    for (std::int64_t i = 0; i < 9 * 301; ++i) {
      const float scaled = bell_value(12, 34, static_cast<std::uint64_t>(i)) * 0.5F;
      const volatile float rounded = scaled;
      ASSERT_EQ(out.get(i / 301, i % 301), static_cast<double>(round_to(d, rounded + 1.0F)));
    }
  }
}

TEST(CpuDense, ZeroAndCopiesKeepToTheirElements) {
  CpuOps ops(2);
  Matrix x = Matrix::random(DType::bf16, 5, 33, 3, 1);
  Matrix y(DType::bf16, 5, 33, 7);
  for (int way = 0; way < 3; ++way) {
    Matrix z(DType::bf16, 5, 33, 7);
    if (way == 0) ops.upload(x.view(), z.view());
    if (way == 1) ops.download(x.view(), z.view());
    if (way == 2) ops.copy(x.view(), z.view());
    z.expect_gaps_untouched();
    for (std::int64_t i = 0; i < 5 * 33; ++i)
      ASSERT_EQ(z.get(i / 33, i % 33), x.get(i / 33, i % 33));
  }
  ops.zero(x.view());
  x.expect_gaps_untouched();
  for (std::int64_t i = 0; i < 5 * 33; ++i) ASSERT_EQ(x.get(i / 33, i % 33), 0.0);
  Matrix other(DType::f16, 5, 33);
  EXPECT_THROW(ops.copy(x.view(), other.view()), Error);
}

TEST(CpuDense, MatmulChecksAndAccumulates) {
  CpuOps ops(2);
  Matrix x = Matrix::random(DType::f32, 21, 40, 1, 1);
  Matrix w = Matrix::random(DType::bf16, 35, 40, 2, 2);
  Matrix out(DType::f32, 21, 35, 3);
  ops.matmul(x.view(), w.view(), out.view(), false);
  ops.matmul(x.view(), w.view(), out.view(), true);
  for (std::int64_t i = 0; i < 21; ++i) {
    for (std::int64_t j = 0; j < 35; ++j) {
      double want = 0.0;
      for (std::int64_t p = 0; p < 40; ++p) want += 2.0 * x.get(i, p) * w.get(j, p);
      ASSERT_TRUE(close(out.get(i, j), want, 1e-4));
    }
  }
  EXPECT_THROW(ops.matmul(x.view(), x.view(), out.view(), false), Error);
  EXPECT_THROW(ops.matmul(w.view(), w.view().row_range(0, 21), out.view(), false), Error);
}

TEST(CpuOpsDevice, DescribesItselfAndKeepsTime) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  const DeviceInfo d = ops->info();
  EXPECT_EQ(d.name, "cpu");
  EXPECT_FALSE(d.model.empty());
  EXPECT_NE(d.features.find("2 threads"), std::string::npos) << d.features;
  EXPECT_GT(d.total_bytes, 0);
  EXPECT_LE(d.free_bytes, d.total_bytes);
  EXPECT_EQ(ops->kind(), DeviceKind::cpu);
  EXPECT_EQ(ops->memory().kind(), DeviceKind::cpu);
  EXPECT_EQ(&ops->staging_memory(), &host_memory());
  const std::int64_t first = ops->mark();
  const std::int64_t second = ops->mark();
  EXPECT_GE(ops->elapsed_ms(first, second), 0.0);
  EXPECT_THROW(static_cast<void>(ops->elapsed_ms(first, second + 1)), Error);
  EXPECT_THROW(make_cpu_ops(ledger, -1), Error);
}

TEST(CpuOpsDevice, MakeOpsRefusesUnknownDevices) {
  Ledger ledger;
  EXPECT_EQ(make_ops("cpu", ledger, 1)->kind(), DeviceKind::cpu);
  for (const char* name : {"", "gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "CPU"}) {
    try {
      make_ops(name, ledger, 1);
      ADD_FAILURE() << "accepted \"" << name << '"';
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::usage) << name;
    }
  }
}

}  // namespace
}  // namespace engine
