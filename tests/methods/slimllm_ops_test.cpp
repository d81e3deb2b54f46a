// What must hold for SliM-LLM's ops (docs/methods/slimllm.md), against direct implementations and
// against GPTQ's sweep. Whole models are slimllm_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "tests/support/gptq_reference.h"
#include "tests/support/gptq_run.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

constexpr std::int64_t rows = 24;
constexpr std::int64_t d = 384;

struct SlimRun {
  std::vector<float> w;  // dead columns zeroed
  std::vector<float> error;
  std::vector<float> scales, means;
  std::vector<std::int32_t> zeros;
  std::vector<std::uint8_t> codes;
  std::vector<double> loss;
  std::vector<double> damped;
};

struct SlimCase {
  GptqCase base;  // rows, d, w, h, damp, factor; the group of its grid
  std::vector<std::uint8_t> bits;
  std::vector<std::uint8_t> middle_zero = {};
  bool search = true;
  double lambda = 1.0;
  DType scale_dtype = DType::f32;
};

SlimCase make_case(std::vector<std::uint8_t> bits, std::vector<std::int64_t> dead = {}) {
  SlimCase c;
  c.base.rows = rows;
  c.base.d = d;
  c.base.w = bell_matrix(rows, d, 501, 0.02F);
  c.base.h = test_hessian(d, 502, dead);
  c.base.grid.group = d / static_cast<std::int64_t>(bits.size());
  c.base.block = c.base.grid.group;
  c.bits = std::move(bits);
  return c;
}

// No correlations: nothing is compensated, and every group sees its own weights.
SlimCase diagonal_case(std::vector<std::uint8_t> bits) {
  SlimCase c = make_case(std::move(bits));
  for (std::int64_t i = 0; i < d * d; ++i) {
    if (i / d != i % d) c.base.h[index(i)] = 0.0F;
  }
  return c;
}

SlimRun run_slim(Ops& ops, const SlimCase& c) {
  GptqRun frame;
  frame.perm.resize(index(d));
  std::iota(frame.perm.begin(), frame.perm.end(), 0);
  frame.dead.resize(index(d));
  std::vector<double> a64;
  std::vector<float> a32;
  const View h = host_view(c.base.h.data(), d, d);
  if (c.base.factor == DType::f64) {
    frame.r = run_factor(ops, c.base, h, frame, a64);
  } else {
    frame.r = run_factor(ops, c.base, h, frame, a32);
  }
  REQUIRE(frame.factored, "the test's moment");
  const auto groups = static_cast<std::int64_t>(c.bits.size());
  SlimRun run;
  run.damped = frame.damped;
  run.w.resize(c.base.w.size());
  ops.gather_columns(host_view(c.base.w.data(), rows, d), View{},
                     host_view(frame.dead.data(), 1, d), host_view(run.w.data(), rows, d));
  run.error = run.w;
  run.scales.resize(index(rows * groups));
  run.means.resize(run.scales.size());
  run.zeros.resize(run.scales.size());
  run.codes.resize(run.w.size());
  run.loss.resize(index(rows));
  std::vector<std::uint8_t> workspace(
      index(ops.slim_workspace_bytes(rows, d, c.base.grid.group, c.base.factor)));
  SlimProblem p;
  p.group = c.base.grid.group;
  p.scale_dtype = c.scale_dtype;
  p.search = c.search;
  p.lambda = c.lambda;
  p.w = host_view(run.error.data(), rows, d);
  p.r = c.base.factor == DType::f64 ? host_view(a64.data(), d, d) : host_view(a32.data(), d, d);
  p.bits = host_view(c.bits.data(), 1, groups);
  if (!c.middle_zero.empty()) p.middle_zero = host_view(c.middle_zero.data(), 1, groups);
  p.scales = host_view(run.scales.data(), rows, groups);
  p.zeros = host_view(run.zeros.data(), rows, groups);
  p.means = host_view(run.means.data(), rows, groups);
  p.codes = host_view(run.codes.data(), rows, d);
  p.loss = host_view(run.loss.data(), rows, 1);
  p.workspace = host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size()));
  ops.slim_sweep(p);
  return run;
}

// The weights that the run's codes and coefficients mean.
std::vector<float> decoded(const SlimCase& c, const SlimRun& run) {
  const auto groups = static_cast<std::int64_t>(c.bits.size());
  std::vector<float> out(run.codes.size());
  for (std::int64_t i = 0; i < rows * d; ++i) {
    const std::int64_t g = i % d / c.base.grid.group;
    const auto at = index(i / d * groups + g);
    const float code = run.codes[index(i)];
    out[index(i)] = c.bits[index(g)] == 1
                        ? run.means[at] + (code > 0 ? run.scales[at] : -run.scales[at])
                        : run.scales[at] * (code - static_cast<float>(run.zeros[at]));
  }
  return out;
}

double power_error(std::span<const float> w, const UnitGrid& grid, const GridSpec& spec) {
  double sum = 0.0;
  for (const float v : w) {
    const float e = dequantize_value(quantize_value(v, grid, spec), grid, spec) - v;
    sum += std::pow(std::fabs(static_cast<double>(e)), 2.4);
  }
  return sum;
}

TEST(SlimSweep, WithoutSearchAndWithOneWidthItIsGptq) {
  CpuOps ops(2);
  for (const DType factor : {DType::f64, DType::f32}) {
    for (const int bits : {2, 3, 4}) {
      for (const std::size_t groups : {3U, 12U}) {
        SlimCase c =
            make_case(std::vector<std::uint8_t>(groups, static_cast<std::uint8_t>(bits)), {7, 300});
        c.search = false;
        c.base.factor = factor;
        c.base.grid.bits = bits;
        const GptqRun gptq = run_gptq(ops, c.base);
        ASSERT_TRUE(gptq.factored);
        const SlimRun slim = run_slim(ops, c);
        EXPECT_EQ(slim.codes, gptq.codes);
        EXPECT_EQ(slim.scales, gptq.scales);
        EXPECT_EQ(slim.zeros, gptq.zeros);
        EXPECT_EQ(slim.error, gptq.error);
        EXPECT_EQ(slim.loss, gptq.loss);
      }
    }
  }
}

TEST(SlimSweep, ErrorIsOfTheDecodedWeightsAndLossItsQuadraticForm) {
  CpuOps ops(2);
  for (const DType scale : {DType::f32, DType::f16, DType::bf16}) {
    for (const double lambda : {1.0, 5.0}) {
      SlimCase c = make_case({2, 1, 3, 2, 1, 8}, {0, 100});
      c.scale_dtype = scale;
      c.lambda = lambda;
      const SlimRun run = run_slim(ops, c);
      const std::vector<float> back = decoded(c, run);
      double form = 0.0;
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t j = 0; j < d; ++j) {
          const auto at = index(r * d + j);
          ASSERT_EQ(run.error[at], back[at] - run.w[at]);
        }
        form += quadratic_loss(run.error.data() + r * d, run.damped, d);
      }
      EXPECT_TRUE(close(total(run.loss), form, 1e-5)) << total(run.loss) << " " << form;
      for (const float s : run.scales) EXPECT_EQ(round_to(scale, s), s);
      for (const float m : run.means) EXPECT_EQ(round_to(scale, m), m);
    }
  }
}

// Against all 101 ranges, tried here in double and without the sweep.
TEST(SlimSweep, SearchFindsTheBestRangeOfEveryRow) {
  CpuOps ops(2);
  const SlimCase c = diagonal_case({2, 3, 4});
  const SlimRun run = run_slim(ops, c);
  std::int64_t moved = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t g = 0; g < 3; ++g) {
      GridSpec spec;
      spec.bits = c.bits[index(g)];
      const auto w = std::span(run.w).subspan(index(r * d + g * 128), 128);
      const auto [low, high] = std::minmax_element(w.begin(), w.end());
      double best = power_error(w, find_unit_grid(w, spec), spec);
      const double plain = best;
      for (int i = -50; i <= 50; ++i) {
        const auto p = static_cast<float>(1.0 + 0.002 * i);
        const std::vector<float> range = {p * *low, p * *high};
        best = std::min(best, power_error(w, find_unit_grid(range, spec), spec));
      }
      const auto at = index(r * 3 + g);
      const double found = power_error(w, {run.scales[at], run.zeros[at]}, spec);
      EXPECT_TRUE(close(found, best, 1e-4)) << found << " " << best;
      moved += found < plain ? 1 : 0;
    }
  }
  EXPECT_GT(moved, rows);  // the search is worth something on most of them
}

TEST(SlimSweep, SearchNeverLeavesTenPercent) {
  CpuOps ops(2);
  const SlimCase c = diagonal_case({3, 3, 3});
  SlimCase plain = c;
  plain.search = false;
  const SlimRun a = run_slim(ops, c), b = run_slim(ops, plain);
  for (std::size_t i = 0; i < a.scales.size(); ++i) {
    EXPECT_GE(a.scales[i], 0.8999F * b.scales[i]);
    EXPECT_LE(a.scales[i], 1.1001F * b.scales[i]);
  }
}

TEST(SlimSweep, LambdaWeighsTheSalientElements) {
  CpuOps ops(2);
  SlimCase c = diagonal_case({2, 2, 2});
  const SlimRun one = run_slim(ops, c);
  c.lambda = 1.0 + 1e-12;  // the split is made, and must cancel
  const SlimRun split = run_slim(ops, c);
  EXPECT_EQ(split.scales, one.scales);
  EXPECT_EQ(split.codes, one.codes);

  c.lambda = 1000.0;
  const SlimRun heavy = run_slim(ops, c);
  double salient_one = 0.0, salient_heavy = 0.0;
  for (std::int64_t g = 0; g < 3; ++g) {
    // H is diagonal, so 1 / U_jj^2 is the damped diagonal.
    std::vector<double> s;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = g * 128; j < (g + 1) * 128; ++j) {
        const double w = heavy.w[index(r * d + j)];
        s.push_back(w * w * heavy.damped[index(j * d + j)]);
      }
    }
    const double mean = total(s) / static_cast<double>(s.size());
    double variance = 0.0;
    for (const double v : s) variance += (v - mean) * (v - mean);
    const double limit = mean + 2.0 * std::sqrt(variance / static_cast<double>(s.size() - 1));
    std::int64_t salient = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t k = 0; k < 128; ++k) {
        if (s[index(r * 128 + k)] <= limit) continue;
        ++salient;
        const auto at = index(r * d + g * 128 + k);
        salient_one += std::pow(std::fabs(static_cast<double>(one.error[at])), 2.4);
        salient_heavy += std::pow(std::fabs(static_cast<double>(heavy.error[at])), 2.4);
      }
    }
    EXPECT_GT(salient, 0);
  }
  EXPECT_LT(salient_heavy, 0.9 * salient_one);
}

TEST(SlimSweep, OneBitGroupsAreSignsAroundTheirMean) {
  CpuOps ops(2);
  const SlimCase c = diagonal_case({1, 3, 1});
  const SlimRun run = run_slim(ops, c);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (const std::int64_t g : {0, 2}) {
      double mean = 0.0, absolute = 0.0;
      for (std::int64_t j = g * 128; j < (g + 1) * 128; ++j) {
        mean += run.w[index(r * d + j)] / 128.0;
        absolute += std::fabs(run.w[index(r * d + j)]) / 128.0;
      }
      const auto at = index(r * 3 + g);
      EXPECT_NEAR(run.means[at], mean, 1e-7 * absolute);
      EXPECT_NEAR(run.scales[at], absolute, 1e-6 * absolute);
      EXPECT_EQ(run.zeros[at], 0);
      for (std::int64_t j = g * 128; j < (g + 1) * 128; ++j) {
        const auto i = index(r * d + j);
        EXPECT_EQ(run.codes[i], run.w[i] >= run.means[at] ? 1 : 0);
      }
    }
    EXPECT_EQ(run.means[index(r * 3 + 1)], 0.0F);
  }
}

TEST(SlimSweep, MiddleZeroHoldsInItsGroupsOnly) {
  CpuOps ops(2);
  SlimCase c = diagonal_case({2, 3, 2});
  const SlimRun plain = run_slim(ops, c);
  c.middle_zero = {1, 0, 0};
  const SlimRun middle = run_slim(ops, c);
  std::int64_t others = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    EXPECT_EQ(middle.zeros[index(3 * r)], 2);
    others += plain.zeros[index(3 * r)] != 2 ? 1 : 0;
    for (const std::int64_t g : {1, 2}) {
      EXPECT_EQ(middle.zeros[index(3 * r + g)], plain.zeros[index(3 * r + g)]);
      EXPECT_EQ(middle.scales[index(3 * r + g)], plain.scales[index(3 * r + g)]);
    }
  }
  EXPECT_GT(others, 0);
}

TEST(SlimSweep, ThreadsChangeNothing) {
  SlimCase c = make_case({2, 1, 3});
  c.lambda = 3.0;
  CpuOps one(1), three(3);
  const SlimRun a = run_slim(one, c), b = run_slim(three, c);
  EXPECT_EQ(a.codes, b.codes);
  EXPECT_EQ(a.scales, b.scales);
  EXPECT_EQ(a.loss, b.loss);
}

TEST(SlimSweep, RefusesWidthsAndGroupsThatDoNotFit) {
  CpuOps ops(2);
  SlimCase c = make_case({2, 9, 3});
  EXPECT_THROW((void)run_slim(ops, c), Error);
  c = make_case({2, 3});  // groups of 192
  EXPECT_THROW((void)run_slim(ops, c), Error);
}

TEST(SlimSalience, DividesByTheFactorOrTheInverse) {
  CpuOps ops(2);
  const SlimCase c = make_case({2, 2, 2}, {50});
  GptqRun frame;
  frame.perm.resize(index(d));
  std::iota(frame.perm.begin(), frame.perm.end(), 0);
  frame.dead.resize(index(d));
  std::vector<double> a64;
  frame.r = run_factor(ops, c.base, host_view(c.base.h.data(), d, d), frame, a64);
  ASSERT_TRUE(frame.factored);
  const Matrix inverse = inverse_from_cholesky(cholesky_lower(frame.damped, d), d);
  const Matrix lower = cholesky_lower(inverse, d);  // U^T
  const View r = host_view(a64.data(), d, d);
  for (const bool paper : {false, true}) {
    std::vector<double> divisors(index(d)), sums(3);
    const View dv = host_view(divisors.data(), 1, d);
    ops.slim_divisors(r, paper, dv, {});
    std::vector<double> expected(3, 0.0);
    for (std::int64_t j = 0; j < d; ++j) {
      const double by = paper ? inverse[index(j * d + j)] : lower[index(j * d + j)];
      EXPECT_TRUE(close(divisors[index(j)], by, 1e-8));
      for (std::int64_t i = 0; i < rows; ++i) {
        expected[index(j / 128)] += std::pow(c.base.w[index(i * d + j)] / by, 2);
      }
    }
    ops.slim_salience(host_view(c.base.w.data(), rows, d), dv, 128, host_view(sums.data(), 1, 3));
    for (std::size_t g = 0; g < 3; ++g) EXPECT_TRUE(close(sums[g], expected[g], 1e-8));
  }
}

TEST(SlimSearch, CandidatesAreRoundToNearestAtThreeWidths) {
  CpuOps ops(2);
  const std::vector<float> w = bell_matrix(rows, d, 7, 0.02F);
  const View wv = host_view(w.data(), rows, d);
  for (const int bits : {2, 3, 4}) {
    std::vector<float> base(w.size()), lower(w.size()), higher(w.size());
    const auto view = [&](std::vector<float>& v) { return host_view(v.data(), rows, d); };
    ops.slim_candidates(wv, bits, 128, DType::f32, view(base), view(lower), view(higher));
    for (int width = bits - 1; width <= bits + 1; ++width) {
      std::vector<float> expected(w.size());
      if (width == 1) {
        for (std::int64_t u = 0; u < rows * 3; ++u) {
          double mean = 0.0, absolute = 0.0;
          for (std::int64_t i = u * 128; i < (u + 1) * 128; ++i) {
            mean += w[index(i)] / 128.0;
            absolute += std::fabs(w[index(i)]) / 128.0;
          }
          for (std::int64_t i = u * 128; i < (u + 1) * 128; ++i) {
            expected[index(i)] =
                static_cast<float>(mean + (w[index(i)] >= mean ? absolute : -absolute));
          }
        }
      } else {
        GridSpec spec;
        spec.bits = width;
        std::vector<float> scales(rows * 3);
        std::vector<std::int32_t> zeros(rows * 3);
        std::vector<std::uint8_t> codes(w.size());
        const View s = host_view(scales.data(), rows, 3), z = host_view(zeros.data(), rows, 3);
        const View c = host_view(codes.data(), rows, d);
        ops.find_grid(wv, spec, s, z);
        ops.quantize_codes(wv, spec, s, z, {}, c);
        ops.dequantize_codes(c, spec, s, z, {}, {}, view(expected));
      }
      for (std::size_t i = 0; i < w.size(); ++i) {
        const float found = width == bits  ? base[i]
                            : width < bits ? base[i] + lower[i]
                                           : base[i] + higher[i];
        EXPECT_NEAR(found, expected[i], 1e-7) << bits << " " << width;
      }
    }
  }
}

TEST(SlimSearch, DivergenceIsThatOfClampedSoftmaxes) {
  CpuOps ops(2);
  constexpr std::int64_t tokens = 19, outputs = 50;
  const std::vector<float> y = bell_matrix(tokens, outputs, 11, 6.0F);  // some below the floor
  const std::vector<float> y0 = bell_matrix(tokens, outputs, 12, 6.0F);
  std::vector<double> kl(tokens, 0.5);
  const View out = host_view(kl.data(), tokens, 1);
  ops.softmax_kl(host_view(y.data(), tokens, outputs), host_view(y0.data(), tokens, outputs), 1e-6,
                 out);
  const auto softmax = [&](const std::vector<float>& v, std::int64_t r) {
    std::vector<double> p;
    for (std::int64_t o = 0; o < outputs; ++o) {
      p.push_back(std::exp(static_cast<double>(v[index(r * outputs + o)])));
    }
    const double sum = total(p);
    for (double& x : p) x = std::max(x / sum, 1e-6);
    return p;
  };
  std::int64_t clamped = 0;
  for (std::int64_t r = 0; r < tokens; ++r) {
    const std::vector<double> a = softmax(y, r), b = softmax(y0, r);
    double expected = 0.5;  // added to what was there
    for (std::size_t o = 0; o < a.size(); ++o) {
      expected += a[o] * (std::log(a[o]) - std::log(b[o]));
      clamped += a[o] == 1e-6 ? 1 : 0;
    }
    EXPECT_NEAR(kl[index(r)], expected, 1e-5 * expected);
  }
  EXPECT_GT(clamped, 0);
  std::vector<double> none(tokens, 0.0);
  ops.softmax_kl(host_view(y.data(), tokens, outputs), host_view(y.data(), tokens, outputs), 1e-6,
                 host_view(none.data(), tokens, 1));
  EXPECT_EQ(total(none), 0.0);
}

}  // namespace
}  // namespace engine::test
