// Every instruction set's inner loops, against plain loops.
#include "engine/ops/cpu_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

const std::vector<std::int64_t> lengths = {1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 100, 129, 300};

TEST(CpuKernels, TheBestSetIsSupportedAndNamed) {
  EXPECT_TRUE(isa_supported(Isa::portable));
  EXPECT_TRUE(isa_supported(best_isa()));
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa_supported(isa)) {
      EXPECT_LE(isa, best_isa());
    } else {
      EXPECT_THROW(static_cast<void>(cpu_kernels(isa)), Error) << isa_name(isa);
    }
  }
}

TEST(CpuKernels, ConversionsAgreeWithTheScalarOnes) {
  std::vector<float> values;
  for (std::uint32_t i = 0; i < 20000; ++i) {
    // Every exponent, both signs, and mantissas near the halfway points of both 16-bit types.
    const std::uint32_t r = philox(3, 1, i).v[0];
    const std::uint32_t u = i % 3 == 0   ? r
                            : i % 3 == 1 ? (r & 0xffff0000U) | 0x8000U
                                         : (r & 0xffffe000U) | 0x1000U;
    values.push_back(std::bit_cast<float>(u));
  }
  for (const float v :
       {0.0F, -0.0F, 65504.0F, 65519.9F, 65520.0F, 0x1p-24F, 0x1p-25F, 0x1.8p-25F,
        std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), std::bit_cast<float>(0x7f800001U)}) {
    values.push_back(v);
  }
  const auto n = static_cast<std::int64_t>(values.size());
  for (const Isa isa : testing::supported_isas()) {
    const CpuKernels& kernels = cpu_kernels(isa);
    for (const DType d : {DType::f16, DType::bf16}) {
      std::vector<std::uint16_t> half(values.size());
      std::vector<float> back(values.size());
      kernels.from_f32(d, values.data(), half.data(), n);
      kernels.to_f32(d, half.data(), back.data(), n);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint16_t want =
            d == DType::f16 ? to_f16(values[i]).bits : to_bf16(values[i]).bits;
        const float wide = d == DType::f16 ? to_float(f16{want}) : to_float(bf16{want});
        if (std::isnan(values[i])) {
          ASSERT_TRUE(std::isnan(back[i])) << isa_name(isa) << " " << dtype_name(d);
        } else {
          ASSERT_EQ(half[i], want) << isa_name(isa) << " " << dtype_name(d) << " " << values[i];
          ASSERT_EQ(std::bit_cast<std::uint32_t>(back[i]), std::bit_cast<std::uint32_t>(wide));
        }
      }
    }
  }
}

TEST(CpuKernels, ExpIsAccurateOverItsWholeRange) {
  std::vector<float> x;
  for (int i = -8700; i <= 8860; ++i) x.push_back(static_cast<float>(i) * 0.01F + 0.003F);
  std::vector<float> y(x.size());
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Isa isa : testing::supported_isas()) {
    const CpuKernels& kernels = cpu_kernels(isa);
    kernels.exp(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    double worst = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double want = std::exp(static_cast<double>(x[i]));
      const double error = std::abs(static_cast<double>(y[i]) - want) / want;
      ASSERT_TRUE(error < 3e-7) << isa_name(isa) << " exp(" << x[i] << ")";
      worst = std::max(worst, error);
    }
    EXPECT_GT(worst, 0.0);
    const float special[5] = {-inf, inf, nan, 0.0F, -200.0F};
    float out[5];
    kernels.exp(special, out, 5);
    EXPECT_EQ(out[0], 0.0F);
    EXPECT_EQ(out[1], inf);
    EXPECT_TRUE(std::isnan(out[2]));
    EXPECT_EQ(out[3], 1.0F);
    EXPECT_EQ(out[4], 0.0F);
  }
}

TEST(CpuKernels, RowsRoundWhereTheContractSays) {
  for (const Isa isa : testing::supported_isas()) {
    const CpuKernels& kernels = cpu_kernels(isa);
    for (const DType d : testing::float_dtypes) {
      for (const std::int64_t n : lengths) {
        SCOPED_TRACE(std::string(isa_name(isa)) + " " + dtype_name(d) + " " + std::to_string(n));
        Matrix x = Matrix::random(d, 1, n, 1, 1, 3.0F);
        Matrix y = Matrix::random(d, 1, n, 1, 2);
        Matrix c = Matrix::random(DType::f32, 1, n, 1, 3);
        Matrix s = Matrix::random(DType::f32, 1, n, 1, 4);
        const auto value = [](const Matrix& m, std::int64_t i) {
          return static_cast<float>(m.get(0, i));
        };
        Matrix out(d, 1, n, 1);
        kernels.scale_and_weigh(d, x.view().data, 0.3F, y.view().data, out.view().data, n);
        out.expect_gaps_untouched();
        double squares = 0.0;
        for (std::int64_t i = 0; i < n; ++i) {
          const float inner = round_to(d, value(x, i) * 0.3F);
          ASSERT_EQ(value(out, i), round_to(d, inner * value(y, i))) << i;
          squares += x.get(0, i) * x.get(0, i);
        }
        EXPECT_TRUE(close(kernels.sum_squares(d, x.view().data, n), squares, 1e-6 * squares));

        kernels.silu_mul(d, x.view().data, y.view().data, out.view().data, n);
        out.expect_gaps_untouched();
        for (std::int64_t i = 0; i < n; ++i) {
          const double g = x.get(0, i);
          const double want = g / (1.0 + std::exp(-g)) * y.get(0, i);
          const double tolerance = (2.1 * testing::roundoff(d) + 1e-6) * std::abs(want) + 1e-7;
          ASSERT_TRUE(close(out.get(0, i), want, tolerance)) << g;
        }

        Matrix lo = x;
        Matrix hi = y;
        const View cv = c.view();
        const View sv = s.view();
        kernels.rotate(d, lo.view().data, hi.view().data, cv.as<float>(), sv.as<float>(), n);
        lo.expect_gaps_untouched();
        hi.expect_gaps_untouched();
        for (std::int64_t i = 0; i < n; ++i) {
          const float cs = round_to(d, value(c, i));
          const float sn = round_to(d, value(s, i));
          // volatile: no product may be fused into the sum.
          const volatile float xc = round_to(d, value(x, i) * cs);
          const volatile float xs = round_to(d, value(x, i) * sn);
          const volatile float yc = round_to(d, value(y, i) * cs);
          const volatile float ys = round_to(d, value(y, i) * sn);
          ASSERT_EQ(value(lo, i), round_to(d, xc - ys)) << i;
          ASSERT_EQ(value(hi, i), round_to(d, yc + xs)) << i;
        }

        EXPECT_EQ(kernels.count_nonfinite(d, x.view().data, n), 0);
        x.put(0, n - 1, std::numeric_limits<float>::quiet_NaN());
        EXPECT_EQ(kernels.count_nonfinite(d, x.view().data, n), 1);
        x.put(0, 0, std::numeric_limits<float>::infinity());
        EXPECT_EQ(kernels.count_nonfinite(d, x.view().data, n), n == 1 ? 1 : 2);
      }
    }
  }
}

TEST(CpuKernels, MaximumAndSumOfExponentials) {
  for (const Isa isa : testing::supported_isas()) {
    const CpuKernels& kernels = cpu_kernels(isa);
    for (const std::int64_t n : lengths) {
      SCOPED_TRACE(std::string(isa_name(isa)) + " " + std::to_string(n));
      Matrix x = Matrix::random(DType::f32, 1, n, 1, static_cast<std::uint64_t>(n), 5.0F);
      const View v = x.view();
      double peak = x.get(0, 0);
      double sum = 0.0;
      for (std::int64_t i = 0; i < n; ++i) {
        peak = std::max(peak, x.get(0, i));
        sum += std::exp(x.get(0, i) - 2.0);
      }
      EXPECT_EQ(static_cast<double>(kernels.row_max(v.as<float>(), n)), peak);
      EXPECT_TRUE(close(kernels.sum_exp(v.as<float>(), 2.0F, n), sum, 5e-7 * sum));
      x.put(0, n / 2, std::numeric_limits<float>::quiet_NaN());
      EXPECT_TRUE(std::isnan(kernels.sum_exp(v.as<float>(), 2.0F, n)));
    }
  }
}

}  // namespace
}  // namespace engine
