// What must hold for GPTQ whatever the data (docs/methods/gptq.md), on the level of the ops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/weight/grid.h"
#include "tests/support/gptq_reference.h"
#include "tests/support/gptq_run.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

constexpr std::int64_t rows = 40;
constexpr std::int64_t d = 384;

GptqCase make_case(int bits, std::int64_t group, std::vector<std::int64_t> dead = {}) {
  GptqCase c;
  c.rows = rows;
  c.d = d;
  c.w = bell_matrix(rows, d, 101, 0.02F);
  c.h = test_hessian(d, 102, dead);
  c.grid.bits = bits;
  c.grid.group = group;
  c.block = group == 0 ? 128 : std::min<std::int64_t>(128, group);
  return c;
}

struct Mode {
  const char* name;
  int bits;
  std::int64_t group;
  std::int64_t block;
  bool symmetric;
  bool act_order;
  bool static_groups;
  DType factor;
};

// Group 256 spans two blocks and ends in a short unit.
const std::vector<Mode>& modes() {
  static const std::vector<Mode> all{
      {"row 2 bit", 2, 0, 128, false, false, false, DType::f64},
      {"row 3 bit f32", 3, 0, 128, false, false, false, DType::f32},
      {"row 4 bit symmetric", 4, 0, 128, true, false, false, DType::f64},
      {"row 8 bit act-order", 8, 0, 128, false, true, false, DType::f64},
      {"g128 4 bit", 4, 128, 128, false, false, false, DType::f64},
      {"g128 2 bit", 2, 128, 128, false, false, false, DType::f64},
      {"g128 4 bit f32", 4, 128, 128, false, false, false, DType::f32},
      {"g64 3 bit", 3, 64, 64, false, false, false, DType::f64},
      {"g32 4 bit symmetric", 4, 32, 32, true, false, false, DType::f64},
      {"g256 3 bit over blocks", 3, 256, 128, false, false, false, DType::f64},
      {"g256 4 bit small blocks", 4, 256, 64, false, false, false, DType::f32},
      {"g128 4 bit act-order", 4, 128, 128, false, true, false, DType::f64},
      {"g128 3 bit static", 3, 128, 128, false, false, true, DType::f64},
      {"g64 4 bit static act-order", 4, 64, 64, false, true, true, DType::f64},
      {"g32 2 bit static act-order", 2, 32, 32, false, true, true, DType::f32},
      {"g128 8 bit", 8, 128, 128, false, false, false, DType::f64},
  };
  return all;
}

GptqCase case_of(const Mode& mode, std::vector<std::int64_t> dead) {
  GptqCase c = make_case(mode.bits, mode.group, std::move(dead));
  c.block = mode.block;
  c.grid.symmetric = mode.symmetric;
  c.act_order = mode.act_order;
  c.static_groups = mode.static_groups;
  c.factor = mode.factor;
  return c;
}

// w^ of the codes, in solving order.
std::vector<float> dequantized(const GptqCase& c, const GptqRun& run) {
  const std::int64_t groups = c.grid.groups(d);
  std::vector<float> out(run.codes.size());
  for (std::int64_t i = 0; i < rows * d; ++i) {
    const std::int64_t row = i / d, j = i % d;
    const std::int64_t g =
        run.column_group.empty() ? j / c.grid.unit(d) : run.column_group[index(j)];
    const UnitGrid grid{run.scales[index(row * groups + g)], run.zeros[index(row * groups + g)]};
    out[index(i)] = dequantize_value(run.codes[index(i)], grid, c.grid);
  }
  return out;
}

TEST(GptqInvariants, LookBackSweepFindsTheCodesOfTheDirectReference) {
  CpuOps ops(2);
  for (const Mode& mode : modes()) {
    SCOPED_TRACE(mode.name);
    const GptqCase c = case_of(mode, {5, 200, 201});
    const GptqRun run = run_gptq(ops, c);
    ASSERT_TRUE(run.factored);
    const GptqReference reference = gptq_reference(c, run);
    EXPECT_LE(differing(run.codes, reference.codes), 0.002);
    EXPECT_TRUE(close(total(run.loss), total(reference.loss), 1e-3))
        << total(run.loss) << " " << total(reference.loss);
    if (run.grids_given) continue;
    // Grids found on the way agree up to the rounding of the weights they come from; a code that
    // falls the other way may move a later one.
    double far = 0.0;
    for (std::size_t i = 0; i < run.scales.size(); ++i) {
      far += close(run.scales[i], reference.scales[i], 1e-5) ? 0.0 : 1.0;
    }
    EXPECT_LE(far, 0.02 * static_cast<double>(run.scales.size()));
    EXPECT_LE(differing(run.zeros, reference.zeros), 0.02);
  }
}

TEST(GptqInvariants, LossIsTheQuadraticFormOfTheError) {
  CpuOps ops(2);
  for (const Mode& mode : modes()) {
    SCOPED_TRACE(mode.name);
    const GptqCase c = case_of(mode, {0, 77});
    const GptqRun run = run_gptq(ops, c);
    ASSERT_TRUE(run.factored);
    const std::vector<float> back = dequantized(c, run);
    double form = 0.0;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < d; ++j) {
        const auto at = index(r * d + j);
        ASSERT_EQ(run.error[at], back[at] - run.w[at]);
      }
      form += quadratic_loss(run.error.data() + r * d, run.damped, d);
    }
    EXPECT_TRUE(close(total(run.loss), form, 1e-5)) << total(run.loss) << " " << form;
  }
}

TEST(GptqInvariants, DeadInputsLoseTheirWeights) {
  CpuOps ops(2);
  const GptqCase c = make_case(4, 128, {3, 130});
  const GptqRun run = run_gptq(ops, c);
  ASSERT_TRUE(run.factored);
  const std::vector<float> back = dequantized(c, run);
  for (std::int64_t j = 0; j < d; ++j) {
    EXPECT_EQ(run.dead[index(j)], j == 3 || j == 130 ? 1 : 0);
    if (run.dead[index(j)] == 0) continue;
    for (std::int64_t r = 0; r < rows; ++r) EXPECT_EQ(back[index(r * d + j)], 0.0F);
  }
}

TEST(GptqInvariants, DiagonalHessianGivesRoundToNearest) {
  CpuOps ops(2);
  for (const std::int64_t group : {0, 256, 128, 64, 32}) {
    for (const int bits : {2, 3, 4, 8}) {
      for (const DType factor : {DType::f32, DType::f64}) {
        GptqCase c = make_case(bits, group);
        c.factor = factor;
        for (std::int64_t i = 0; i < d * d; ++i) {
          c.h[index(i)] = i / d == i % d ? 0.1F + 0.37F * static_cast<float>(i % 31) : 0.0F;
        }
        const GptqRun run = run_gptq(ops, c);
        ASSERT_TRUE(run.factored);
        const std::int64_t groups = c.grid.groups(d);
        std::vector<float> scales(index(rows * groups));
        std::vector<std::int32_t> zeros(scales.size());
        std::vector<std::uint8_t> codes(c.w.size());
        const View w = host_view(c.w.data(), rows, d);
        const View s = host_view(scales.data(), rows, groups);
        const View z = host_view(zeros.data(), rows, groups);
        ops.find_grid(w, c.grid, s, z);
        ops.quantize_codes(w, c.grid, s, z, {}, host_view(codes.data(), rows, d));
        EXPECT_EQ(run.scales, scales);
        EXPECT_EQ(run.zeros, zeros);
        EXPECT_EQ(run.codes, codes) << bits << " bits, group " << group;
      }
    }
  }
}

TEST(GptqInvariants, ScalingTheHessianChangesNothing) {
  CpuOps ops(2);
  for (const std::int64_t group : {0, 128}) {
    GptqCase c = make_case(3, group);
    const GptqRun plain = run_gptq(ops, c);
    std::vector<float> h = c.h;
    // A power of four scales every number on the way exactly.
    for (std::size_t i = 0; i < h.size(); ++i) c.h[i] = 1024.0F * h[i];
    const GptqRun exact = run_gptq(ops, c);
    EXPECT_EQ(exact.codes, plain.codes);
    EXPECT_TRUE(close(total(exact.loss), 1024.0 * total(plain.loss), 1e-12));
    for (std::size_t i = 0; i < h.size(); ++i) c.h[i] = 1000.0F * h[i];
    const GptqRun rounded = run_gptq(ops, c);
    EXPECT_LE(differing(rounded.codes, plain.codes), 0.002);
    EXPECT_TRUE(close(total(rounded.loss), 1000.0 * total(plain.loss), 1e-3));
  }
}

TEST(GptqInvariants, RowsAreIndependent) {
  CpuOps ops(2);
  for (const std::int64_t group : {0, 64}) {
    GptqCase c = make_case(3, group);
    const GptqRun plain = run_gptq(ops, c);
    const std::vector<float> w = c.w;
    const auto from = [](std::int64_t r) { return (r * 7 + 3) % rows; };
    for (std::int64_t r = 0; r < rows; ++r) {
      std::copy_n(w.begin() + from(r) * d, d, c.w.begin() + r * d);
    }
    const GptqRun moved = run_gptq(ops, c);
    for (std::int64_t r = 0; r < rows; ++r) {
      EXPECT_EQ(moved.loss[index(r)], plain.loss[index(from(r))]);
      EXPECT_TRUE(std::equal(moved.codes.begin() + r * d, moved.codes.begin() + (r + 1) * d,
                             plain.codes.begin() + from(r) * d));
    }
  }
}

TEST(GptqInvariants, ThreadsChangeNothing) {
  const GptqCase c = make_case(3, 128);
  CpuOps one(1), three(3);
  const GptqRun a = run_gptq(one, c), b = run_gptq(three, c);
  EXPECT_EQ(a.codes, b.codes);
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.error, b.error);
}

// Under act-order the inputs may come in any order (the diagonal has no ties).
TEST(GptqInvariants, ActOrderForgetsTheOrderOfTheInputs) {
  CpuOps ops(2);
  for (const std::int64_t group : {0, 128}) {
    GptqCase c = make_case(3, group);
    c.act_order = true;
    const GptqRun plain = run_gptq(ops, c);
    const std::vector<float> w = c.w, h = c.h;
    const auto from = [](std::int64_t j) { return (j * 5 + 11) % d; };
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t r = 0; r < rows; ++r) c.w[index(r * d + i)] = w[index(r * d + from(i))];
      for (std::int64_t j = 0; j < d; ++j) c.h[index(i * d + j)] = h[index(from(i) * d + from(j))];
    }
    const GptqRun shuffled = run_gptq(ops, c);
    EXPECT_EQ(shuffled.codes, plain.codes);
    EXPECT_EQ(shuffled.scales, plain.scales);
    for (std::int64_t j = 0; j < d; ++j) {
      EXPECT_EQ(from(shuffled.perm[index(j)]), plain.perm[index(j)]);
    }
  }
}

TEST(GptqInvariants, BlockSizeChangesNothing) {
  CpuOps ops(2);
  for (const std::int64_t group : {0, 128}) {
    GptqCase c = make_case(4, group);
    const GptqRun plain = run_gptq(ops, c);
    for (const std::int64_t block : {64, 32, 1}) {
      c.block = block;
      const GptqRun other = run_gptq(ops, c);
      EXPECT_LE(differing(other.codes, plain.codes), 0.002) << "block " << block;
      EXPECT_TRUE(close(total(other.loss), total(plain.loss), 1e-3)) << "block " << block;
    }
  }
}

// Given a grid, GPTQ's error is smaller in the norm it minimises than rounding's, row by row.
TEST(GptqInvariants, BeatsRoundToNearestOnTheSameGrid) {
  CpuOps ops(2);
  for (const int bits : {2, 3, 4, 8}) {
    const GptqCase c = make_case(bits, 0);
    const GptqRun run = run_gptq(ops, c);
    double nearest_total = 0.0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const UnitGrid grid{run.scales[index(r)], run.zeros[index(r)]};
      std::vector<float> error(d);
      for (std::int64_t j = 0; j < d; ++j) {
        const float w = run.w[index(r * d + j)];
        error[index(j)] = dequantize_value(quantize_value(w, grid, c.grid), grid, c.grid) - w;
      }
      const double nearest = quadratic_loss(error.data(), run.damped, d);
      EXPECT_LE(run.loss[index(r)], nearest) << bits << " bits, row " << r;
      nearest_total += nearest;
    }
    EXPECT_LT(total(run.loss), 0.8 * nearest_total) << bits << " bits";
  }
}

// Where no code is clamped, err_j is at most half a step over U_jj = 1 / R_jj.
TEST(GptqInvariants, LossIsBoundedWithoutClamping) {
  CpuOps ops(2);
  GptqCase c = make_case(8, 0);
  for (float& v : c.w) v = std::clamp(v, -0.03F, 0.03F);
  // One outlier per row, in its last column, widens the grid far beyond all other weights.
  for (std::int64_t r = 0; r < rows; ++r) c.w[index(r * d + d - 1)] = r % 2 == 0 ? 0.5F : -0.5F;
  c.grid.symmetric = true;
  for (std::int64_t r = 0; r < rows; ++r) c.w[index(r * d)] = -0.001F;
  const GptqRun run = run_gptq(ops, c);
  double trace = 0.0;
  for (std::int64_t j = 0; j < d; ++j) trace += std::pow(run.r[index(j * d + j)], 2);
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto first = run.codes.begin() + r * d;
    const auto [low, high] = std::minmax_element(first, first + d - 1);
    ASSERT_GT(*low, 0);
    ASSERT_LT(*high, 255);
    // The outlier itself may be clamped; its own term is left out on both sides.
    const double half = 0.5 * static_cast<double>(run.scales[index(r)]);
    const double last_r = run.r[index(d * d - 1)];
    double last = 0.0;  // err of the last column, up to sign: the last column of E R
    for (std::int64_t i = 0; i < d; ++i) {
      last += static_cast<double>(run.error[index(r * d + i)]) * run.r[index(i * d + d - 1)];
    }
    EXPECT_LE(run.loss[index(r)] - last * last,
              half * half * (trace - last_r * last_r) * (1.0 + 1e-5));
  }
}

TEST(GptqInvariants, RefusesBlocksThatDoNotDivideTheGroups) {
  CpuOps ops(2);
  GptqCase c = make_case(4, 128);
  c.block = 96;
  EXPECT_THROW((void)run_gptq(ops, c), Error);
  c.block = 0;
  EXPECT_THROW((void)run_gptq(ops, c), Error);
}

}  // namespace
}  // namespace engine::test
