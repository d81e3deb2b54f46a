#include "engine/weight/grid.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/support/quant_fixtures.h"

namespace engine {
namespace {

using test::bell_matrix;

GridSpec spec_of(GridRule rule, int bits) {
  GridSpec spec;
  spec.rule = rule;
  spec.bits = bits;
  return spec;
}

void expect_grid(const std::vector<float>& w, const GridSpec& spec, float scale,
                 std::int32_t zero) {
  const UnitGrid grid = find_unit_grid(w, spec);
  EXPECT_EQ(grid.scale, scale);
  EXPECT_EQ(grid.zero, zero);
}

std::vector<int> codes_of(const std::vector<float>& w, const GridSpec& spec) {
  const UnitGrid grid = find_unit_grid(w, spec);
  std::vector<int> codes;
  for (const float v : w) codes.push_back(quantize_value(v, grid, spec));
  return codes;
}

std::vector<float> round_trip(const std::vector<float>& w, const GridSpec& spec) {
  const UnitGrid grid = find_unit_grid(w, spec);
  std::vector<float> out;
  for (const float v : w) {
    out.push_back(dequantize_value(quantize_value(v, grid, spec), grid, spec));
  }
  return out;
}

TEST(Grid, GptqMixedSigns) {
  const GridSpec spec = spec_of(GridRule::gptq, 2);
  const std::vector<float> w{-1.0F, 0.5F, 2.0F};
  expect_grid(w, spec, 1.0F, 1);
  EXPECT_EQ(codes_of(w, spec), (std::vector<int>{0, 1, 3}));
  EXPECT_EQ(round_trip(w, spec), (std::vector<float>{-1.0F, 0.0F, 2.0F}));
}

TEST(Grid, GptqForcesZeroIntoOneSignedUnits) {
  const GridSpec spec = spec_of(GridRule::gptq, 2);
  expect_grid({1.0F, 3.0F}, spec, 1.0F, 0);
  EXPECT_EQ(codes_of({1.0F, 3.0F}, spec), (std::vector<int>{1, 3}));
  expect_grid({-3.0F, -1.0F}, spec, 1.0F, 3);
  EXPECT_EQ(codes_of({-3.0F, -1.0F}, spec), (std::vector<int>{0, 2}));
}

TEST(Grid, GptqAllZeroUnitTakesMinusOneToOne) {
  const GridSpec spec = spec_of(GridRule::gptq, 4);
  expect_grid({0.0F, -0.0F}, spec, 2.0F / 15.0F, 7);  // the f32 quotient is just below 7.5
  EXPECT_EQ(round_trip({0.0F, 0.0F}, spec), (std::vector<float>{0.0F, 0.0F}));
}

TEST(Grid, RoundsHalfToEven) {
  const GridSpec spec = spec_of(GridRule::gptq, 3);
  const UnitGrid grid{1.0F, 0};
  EXPECT_EQ(quantize_value(0.5F, grid, spec), 0);
  EXPECT_EQ(quantize_value(1.5F, grid, spec), 2);
  EXPECT_EQ(quantize_value(2.5F, grid, spec), 2);
  EXPECT_EQ(quantize_value(-9.0F, grid, spec), 0);
  EXPECT_EQ(quantize_value(99.0F, grid, spec), 7);
  EXPECT_EQ(quantize_value(std::numeric_limits<float>::quiet_NaN(), grid, spec), 0);
  EXPECT_EQ(quantize_value(std::numeric_limits<float>::infinity(), grid, spec), 7);
}

TEST(Grid, DividesInsteadOfMultiplyingByTheReciprocal) {
  const GridSpec spec = spec_of(GridRule::gptq, 8);
  int flips = 0;
  for (int i = 1; i < 400; ++i) {
    const float scale = 0.001F * static_cast<float>(i);
    for (int k = 0; k < 100; ++k) {
      const float w = scale * (static_cast<float>(k) + 0.5F);
      const float by_division = std::nearbyint(w / scale);
      EXPECT_EQ(static_cast<float>(quantize_value(w, {scale, 0}, spec)), by_division);
      flips += std::nearbyint(w * (1.0F / scale)) != by_division ? 1 : 0;
    }
  }
  EXPECT_GT(flips, 0);  // the cases can tell the two apart
}

TEST(Grid, GptqSymmetric) {
  GridSpec spec = spec_of(GridRule::gptq, 2);
  spec.symmetric = true;
  const std::vector<float> w{-1.0F, 3.0F, -3.0F};
  expect_grid(w, spec, 2.0F, 2);
  EXPECT_EQ(codes_of(w, spec), (std::vector<int>{2, 3, 0}));
  EXPECT_EQ(round_trip(w, spec), (std::vector<float>{0.0F, 2.0F, -4.0F}));
}

TEST(Grid, GptqSymmetricQuirks) {
  GridSpec spec = spec_of(GridRule::gptq, 2);
  spec.symmetric = true;
  // Nonnegative units span only half the range with a zero in the middle: the top half is lost.
  expect_grid({1.0F, 3.0F}, spec, 1.0F, 2);
  EXPECT_EQ(round_trip({1.0F, 3.0F}, spec), (std::vector<float>{1.0F, 1.0F}));
  expect_grid({-1.0F, -3.0F}, spec, 2.0F, 2);
  expect_grid({0.0F}, spec, 2.0F / 3.0F, 2);
}

TEST(Grid, AwqPlainRange) {
  expect_grid({-1.0F, 2.0F}, spec_of(GridRule::awq, 2), 1.0F, 1);
  expect_grid({0.0F, 0.0F}, spec_of(GridRule::awq, 2), 1e-5F / 3.0F, 0);
  // lo / s = -4.5 rounds to -4, whose negative is clamped to the top code.
  expect_grid({-3.0F, -1.0F}, spec_of(GridRule::awq, 2), 2.0F / 3.0F, 3);
}

TEST(Grid, AwqIsWrongOnOneSignedUnits) {
  const GridSpec spec = spec_of(GridRule::awq, 4);
  const std::vector<float> back = round_trip({0.010F, 0.012F}, spec);
  EXPECT_EQ(find_unit_grid(std::vector<float>{0.010F, 0.012F}, spec).zero, 0);
  EXPECT_NEAR((0.012F - back[1]) / 0.012F, 0.833F, 0.001F);
}

TEST(Grid, OmniquantZeroMayLeaveTheCodes) {
  const GridSpec spec = spec_of(GridRule::omniquant, 2);
  expect_grid({1.0F, 1.75F}, spec, 0.25F, -4);
  EXPECT_EQ(round_trip({1.0F, 1.75F}, spec), (std::vector<float>{1.0F, 1.75F}));
  expect_grid({0.0F, 0.0F}, spec, 1e-5F, 0);
  expect_grid({0.5F, 0.5F}, spec, 1e-5F, -10000);
  expect_grid({-1e6F, 1e6F}, spec, 1e4F, 100);
}

TEST(Grid, PaperHasNoClamps) {
  const GridSpec spec = spec_of(GridRule::paper, 2);
  expect_grid({1.0F, 1.75F}, spec, 0.25F, -4);
  expect_grid({-1e6F, 2e6F}, spec, 1e6F, 1);
  EXPECT_EQ(round_trip({0.3F, 0.3F}, spec), (std::vector<float>{0.3F, 0.3F}));
  EXPECT_EQ(round_trip({-0.3F, -0.3F}, spec), (std::vector<float>{-0.3F, -0.3F}));
  EXPECT_EQ(round_trip({0.0F, 0.0F}, spec), (std::vector<float>{0.0F, 0.0F}));
}

TEST(Grid, AllRulesAgreeOnMixedSigns) {
  const std::vector<float> w = bell_matrix(1, 128, 11);
  for (const int bits : {2, 3, 4, 8}) {
    const std::vector<int> expected = codes_of(w, spec_of(GridRule::gptq, bits));
    for (const GridRule rule : {GridRule::awq, GridRule::omniquant, GridRule::paper}) {
      EXPECT_EQ(codes_of(w, spec_of(rule, bits)), expected) << "bits " << bits;
    }
  }
}

// Every step by hand: 2.001 -> 2.001953125, width 3.001953125, / 3 -> 1.0009765625.
TEST(Grid, HalfArithmeticRoundsEveryOperation) {
  GridSpec spec = spec_of(GridRule::awq, 2);
  spec.arithmetic = DType::f16;
  const std::vector<float> w{-1.0F, 2.001F};
  expect_grid(w, spec, 1.0009765625F, 1);
  EXPECT_EQ(codes_of(w, spec), (std::vector<int>{0, 3}));
  EXPECT_EQ(round_trip(w, spec), (std::vector<float>{-1.0009765625F, 2.001953125F}));
}

TEST(Grid, HalfArithmeticChangesTheExpectedShareOfCodes) {
  std::vector<float> w = bell_matrix(400, 128, 5, 0.02F);
  for (float& v : w) v = round_to(DType::f16, v);
  const auto share = [&](int bits) {
    GridSpec wide = spec_of(GridRule::awq, bits);
    GridSpec half = wide;
    half.arithmetic = DType::f16;
    std::vector<int> a, b;
    for (std::size_t unit = 0; unit < 400; ++unit) {
      const auto first = w.begin() + static_cast<std::ptrdiff_t>(unit * 128);
      const std::vector<float> members(first, first + 128);
      for (const int code : codes_of(members, wide)) a.push_back(code);
      for (const int code : codes_of(members, half)) b.push_back(code);
    }
    return test::differing(a, b);
  };
  EXPECT_GT(share(4), 0.0005);
  EXPECT_LT(share(4), 0.006);
  EXPECT_GT(share(8), 0.03);
  EXPECT_LT(share(8), 0.10);
}

TEST(Grid, ScaleIsRoundedBeforeTheZeroFollows) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    GridSpec spec = spec_of(GridRule::gptq, 8);
    spec.scale_dtype = dtype;
    int moved = 0;
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      const std::vector<float> w = bell_matrix(1, 64, seed);
      const float lo = std::min(*std::min_element(w.begin(), w.end()), 0.0F);
      const float hi = std::max(*std::max_element(w.begin(), w.end()), 0.0F);
      const float exact = (hi - lo) / 255.0F;
      const UnitGrid grid = find_unit_grid(w, spec);
      EXPECT_EQ(grid.scale, round_to(dtype, exact));
      EXPECT_EQ(grid.zero, static_cast<std::int32_t>(std::nearbyint(-lo / grid.scale)));
      moved += grid.zero != static_cast<std::int32_t>(std::nearbyint(-lo / exact)) ? 1 : 0;
    }
    EXPECT_GT(moved, 0) << dtype_name(dtype);
  }
}

TEST(Grid, ScaleNeverVanishesNorOverflows) {
  for (const GridRule rule : {GridRule::gptq, GridRule::paper}) {
    GridSpec spec = spec_of(rule, 4);
    spec.scale_dtype = DType::f16;
    EXPECT_EQ(find_unit_grid(std::vector<float>{-1e-9F, 1e-9F}, spec).scale, 0x1p-24F);
    EXPECT_EQ(find_unit_grid(std::vector<float>{-1e9F, 1e9F}, spec).scale, 65504.0F);
  }
  GridSpec spec = spec_of(GridRule::gptq, 2);
  spec.scale_dtype = DType::f16;
  // 1.4 * 2^-24 is stored as 2^-24; the zero still fits the bits.
  const UnitGrid grid = find_unit_grid(std::vector<float>{-4.2F * 0x1p-24F, 0.0F}, spec);
  EXPECT_EQ(grid.scale, 0x1p-24F);
  EXPECT_EQ(grid.zero, 3);
}

// The search written out again, in the order of the published loop.
TEST(Grid, MseSearchMatchesItsDefinition) {
  int improved = 0;
  for (const int bits : {2, 3, 4}) {
    for (const bool symmetric : {false, true}) {
      GridSpec spec = spec_of(GridRule::gptq, bits);
      spec.symmetric = symmetric;
      GridSpec search = spec;
      search.mse = true;
      for (std::uint64_t seed = 0; seed < 5; ++seed) {
        std::vector<float> w = bell_matrix(1, 96, seed);
        w[7] = 6.0F;  // an outlier that is worth clipping
        const auto loss_of = [&](const UnitGrid& grid) {
          double sum = 0.0;
          for (const float v : w) {
            const float back = dequantize_value(quantize_value(v, grid, spec), grid, spec);
            sum += std::pow(std::fabs(static_cast<double>(back - v)), 2.4);
          }
          return sum;
        };
        const UnitGrid plain = find_unit_grid(w, spec);
        const float lo = symmetric ? -6.0F : *std::min_element(w.begin(), w.end());
        double best = std::numeric_limits<double>::infinity();
        for (int i = 0; i < 80; ++i) {
          const auto p = static_cast<float>(1.0 - i / 100.0);
          UnitGrid grid;
          grid.scale = (p * 6.0F - p * lo) / static_cast<float>(spec.max_code());
          grid.zero = symmetric ? plain.zero
                                : static_cast<std::int32_t>(std::nearbyint(-(p * lo) / grid.scale));
          best = std::min(best, loss_of(grid));
        }
        const double found = loss_of(find_unit_grid(w, search));
        EXPECT_TRUE(test::close(found, best, 1e-5)) << found << " " << best;
        EXPECT_LE(found, loss_of(plain));
        improved += found < loss_of(plain) ? 1 : 0;
      }
    }
  }
  EXPECT_GT(improved, 20);
}

TEST(Grid, MseSearchKeepsAGridWithoutError) {
  GridSpec spec = spec_of(GridRule::gptq, 2);
  spec.mse = true;
  expect_grid({-1.0F, 0.0F, 1.0F, 2.0F}, spec, 1.0F, 1);  // a tie would not replace it either
}

TEST(Grid, PowersOfTwoScaleThrough) {
  for (const GridRule rule : {GridRule::gptq, GridRule::paper}) {
    for (const int k : {-20, -3, 1, 17}) {
      const GridSpec spec = spec_of(rule, 3);
      const std::vector<float> w = bell_matrix(1, 100, 3);
      std::vector<float> scaled, expected;
      for (const float v : w) scaled.push_back(std::ldexp(v, k));
      for (const float v : round_trip(w, spec)) expected.push_back(std::ldexp(v, k));
      EXPECT_EQ(round_trip(scaled, spec), expected);
      EXPECT_EQ(codes_of(scaled, spec), codes_of(w, spec));
    }
  }
}

TEST(Grid, GptqErrorIsAtMostHalfAStep) {
  for (const int bits : {2, 3, 4, 8}) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const GridSpec spec = spec_of(GridRule::gptq, bits);
      std::vector<float> w = bell_matrix(1, 128, seed);
      w[3] = 0.0F;
      const UnitGrid grid = find_unit_grid(w, spec);
      const std::vector<float> back = round_trip(w, spec);
      float largest = 0.0F;
      for (const float v : w) largest = std::max(largest, std::fabs(v));
      const float ulp = std::nextafter(largest, INFINITY) - largest;
      for (std::size_t i = 0; i < w.size(); ++i) {
        EXPECT_LE(std::fabs(w[i] - back[i]), 0.5F * grid.scale + ulp);
      }
      EXPECT_EQ(back[3], 0.0F);
    }
  }
}

TEST(Grid, QuantizingTheResultAgainChangesNothing) {
  int both_ends = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const GridSpec spec = spec_of(GridRule::gptq, bits);
      const std::vector<float> w = bell_matrix(1, 128, seed);
      const UnitGrid grid = find_unit_grid(w, spec);
      const std::vector<float> back = round_trip(w, spec);
      const std::vector<int> codes = codes_of(w, spec);
      for (std::size_t i = 0; i < w.size(); ++i) {
        EXPECT_EQ(quantize_value(back[i], grid, spec), codes[i]);
      }
      const auto [low, high] = std::minmax_element(codes.begin(), codes.end());
      if (*low != 0 || *high != spec.max_code()) continue;
      ++both_ends;
      EXPECT_EQ(codes_of(back, spec), codes);
    }
  }
  EXPECT_GT(both_ends, 40);
}

TEST(Grid, RefusesSpecsThatMakeNoSense) {
  const std::vector<float> w{1.0F};
  const auto refused = [&](auto change) {
    GridSpec spec;
    change(spec);
    EXPECT_THROW((void)find_unit_grid(w, spec), Error);
  };
  refused([](GridSpec& s) { s.bits = 0; });
  refused([](GridSpec& s) { s.bits = 9; });
  refused([](GridSpec& s) { s.group = -1; });
  refused([](GridSpec& s) { s.arithmetic = DType::bf16; });
  refused([](GridSpec& s) { s.scale_dtype = DType::i32; });
  refused([](GridSpec& s) { s.rule = GridRule::awq, s.symmetric = true; });
  refused([](GridSpec& s) { s.rule = GridRule::paper, s.mse = true; });
  EXPECT_THROW((void)find_unit_grid({}, GridSpec{}), Error);
}

}  // namespace
}  // namespace engine
