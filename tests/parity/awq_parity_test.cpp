// Parity of AWQ's searches (docs/methods/awq.md): scaled weights and round trips to the bit, losses
// within the rounding errors of their sums, choices up to ties of losses.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/weight/grid.h"
#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

constexpr std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

GridSpec awq_spec(int bits, std::int64_t group) {
  GridSpec spec;
  spec.rule = GridRule::awq;
  spec.bits = bits;
  spec.group = group;
  return spec;
}

std::string spec_name(const GridSpec& spec) {
  return std::string(spec.rule == GridRule::awq ? "awq" : "gptq") + "_b" +
         std::to_string(spec.bits) + "_g" + std::to_string(spec.group) +
         (spec.symmetric ? "_sym" : "") + (spec.mse ? "_mse" : "") +
         (spec.reciprocal ? "_rcp" : "") + "_" + dtype_name(spec.arithmetic) + "_s" +
         dtype_name(spec.scale_dtype);
}

// ---- add_abs_sums, scale_weights ----

struct SumCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "x" +
           std::to_string(cols) + "_" + layout_name(layout);
  }
};

std::vector<SumCase> sum_cases() {
  std::vector<SumCase> cases;
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t rows : {1, 31, 33, 300}) {
        for (const std::int64_t cols : {1, 37, 256}) cases.push_back({dtype, rows, cols, layout});
      }
    }
  }
  cases.push_back({DType::bf16, 70, 4100, Layout::tight});
  return cases;
}

class AbsSums : public ::testing::TestWithParam<SumCase> {};
INSTANTIATE_TEST_SUITE_P(Awq, AbsSums, ::testing::ValuesIn(sum_cases()), case_name<SumCase>);

// Sums of one sign in f64: each is off by at most rows * 2^-53, relatively.
TEST_P(AbsSums, AgreeInDouble) {
  const SumCase& p = GetParam();
  Operand x(Role::input, p.dtype, p.rows, p.cols, p.layout);
  x.bell(seed_of(p.name()), 3.0);
  Operand sums(Role::inout, DType::f64, 1, p.cols);
  sums.fill([](std::int64_t, std::int64_t c) { return static_cast<double>(c); });
  const Outcome o = run_both(
      {&x, &sums}, [](Ops& ops, const std::vector<View>& v) { ops.add_abs_sums(v[0], v[1]); });
  expect_close(o, 1, {.relative = 2.0 * static_cast<double>(p.rows + 1) * 0x1p-53});
}

struct ScaleCase {
  DType from = DType::f32;
  DType to = DType::f32;
  bool columns = true;
  bool divisors = true;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(from)) + "_" + dtype_name(to) + (columns ? "_columns" : "") +
           (divisors ? "_rows" : "") + "_" + layout_name(layout);
  }
};

std::vector<ScaleCase> scale_cases() {
  std::vector<ScaleCase> cases;
  for (const DType from : small_floats) {
    for (const DType to : small_floats) {
      for (const bool columns : {false, true}) {
        for (const bool divisors : {false, true}) {
          cases.push_back({from, to, columns, divisors, all_layouts[cases.size() % 3]});
        }
      }
    }
  }
  return cases;
}

// Positive factors around 1, none a power of two.
Operand factors(std::int64_t n, Layout layout = Layout::tight) {
  Operand s(Role::input, DType::f32, n == 0 ? 0 : 1, n, layout);
  return s.fill([](std::int64_t, std::int64_t c) {
    return std::exp2(std::fmod(0.37 * static_cast<double>(c), 5.0) - 2.3);
  });
}

class Scaling : public ::testing::TestWithParam<ScaleCase> {};
INSTANTIATE_TEST_SUITE_P(Awq, Scaling, ::testing::ValuesIn(scale_cases()), case_name<ScaleCase>);

TEST_P(Scaling, IsBitExact) {
  const ScaleCase& p = GetParam();
  const std::int64_t rows = 35, cols = 301;
  Operand w(Role::input, p.from, rows, cols, p.layout);
  w.bell(seed_of(p.name()), 0.05);
  const Operand s = factors(p.columns ? cols : 0), t = factors(p.divisors ? rows : 0);
  const Operand out(Role::output, p.to, rows, cols, p.layout);
  const Outcome o = run_both({&w, &s, &t, &out}, [](Ops& ops, const std::vector<View>& v) {
    ops.scale_weights(v[0], v[1], v[2], v[3]);
  });
  expect_exact(o, 3);
  if (p.from != p.to) return;
  Operand both(Role::inout, p.from, rows, cols, p.layout);
  both.bell(seed_of(p.name()), 0.05);
  const Outcome in_place = run_both({&both, &s, &t}, [](Ops& ops, const std::vector<View>& v) {
    ops.scale_weights(v[0], v[1], v[2], v[0]);
  });
  expect_exact(in_place, 0);
  EXPECT_EQ(in_place.actual[0].values(), o.actual[3].values());
}

// ---- round_trip_scaled ----

struct TripCase {
  GridSpec spec;
  DType from = DType::f32;
  DType to = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return spec_name(spec) + "_" + dtype_name(from) + "_" + dtype_name(to) + "_" +
           std::to_string(rows) + "x" + std::to_string(cols) + "_" + layout_name(layout);
  }
};

std::vector<TripCase> trip_cases() {
  std::vector<TripCase> cases;
  std::size_t turn = 0;
  const std::int64_t cols[] = {256, 131, 320, 1536};
  for (const GridRule rule : {GridRule::awq, GridRule::gptq}) {
    for (const DType arithmetic : {DType::f32, DType::f16}) {
      for (const DType scale : {DType::f32, DType::f16}) {
        for (const std::int64_t group : {0, 32, 48, 128}) {
          for (const int bits : {2, 3, 4, 8}) {
            for (const bool other : {false, true}) {
              GridSpec spec = awq_spec(bits, group);
              spec.rule = rule;
              spec.arithmetic = arithmetic;
              spec.scale_dtype = scale;
              spec.reciprocal = rule == GridRule::awq && other;
              spec.symmetric = rule == GridRule::gptq && other;
              cases.push_back({spec, small_floats[turn % 3], small_floats[turn / 3 % 3],
                               turn % 2 == 0 ? 1 : 19, cols[turn / 2 % 4],
                               all_layouts[turn / 5 % 3]});
              ++turn;
            }
          }
        }
      }
    }
  }
  GridSpec spec = awq_spec(4, 128);
  spec.reciprocal = true;
  cases.push_back({spec, DType::bf16, DType::bf16, 3, 14336, Layout::tight});
  spec.group = 0;
  cases.push_back({spec, DType::bf16, DType::f32, 3, 14336, Layout::tight});
  return cases;
}

class RoundTrip : public ::testing::TestWithParam<TripCase> {};
INSTANTIATE_TEST_SUITE_P(Awq, RoundTrip, ::testing::ValuesIn(trip_cases()), case_name<TripCase>);

Outcome trip(const TripCase& p) {
  Operand w(Role::input, p.from, p.rows, p.cols, p.layout);
  w.bell(seed_of(p.name()), 0.03);
  const Operand s = factors(p.cols, p.layout);
  const Operand out(Role::output, p.to, p.rows, p.cols, p.layout);
  return run_both({&w, &s, &out}, [&p](Ops& ops, const std::vector<View>& v) {
    ops.round_trip_scaled(v[0], v[1], p.spec, v[2]);
  });
}

TEST_P(RoundTrip, IsBitExact) { expect_exact(trip(GetParam()), 2); }

// The powers of the search differ in their last bits between backends, so of two grids with almost
// equal losses either may win: in at most 1 % of the units, or one.
TEST(AwqRoundTrip, SearchedGridsAgreeExceptForTies) {
  for (const std::int64_t group : {0, 64}) {
    TripCase p{awq_spec(3, group), DType::f32, DType::f32, 24, 1280, Layout::wide};
    p.spec.rule = GridRule::gptq;
    p.spec.mse = true;
    SCOPED_TRACE(p.name());
    const Outcome o = trip(p);
    const std::int64_t unit = p.spec.unit(p.cols), units = p.rows * p.spec.groups(p.cols);
    const std::vector<double> found = o.actual[2].values(), wanted = o.expected[2].values();
    std::int64_t different = 0;
    for (std::int64_t u = 0; u < units; ++u) {
      const auto at = u * unit;
      ASSERT_TRUE(std::isfinite(found[place(at)]));
      different +=
          std::equal(found.begin() + at, found.begin() + at + unit, wanted.begin() + at) ? 0 : 1;
    }
    EXPECT_LE(different, sides().same_backend ? 0 : std::max<std::int64_t>(1, units / 100));
  }
}

// ---- moment_loss ----

// Inputs whose columns share a part and differ in size.
Operand make_inputs(std::int64_t n, std::int64_t d, std::uint64_t seed,
                    Layout layout = Layout::tight) {
  Operand x(Role::input, DType::f32, n, d, layout);
  Operand own(Role::input, DType::f32, n, d), shared(Role::input, DType::f32, n, 1);
  own.bell(seed);
  shared.bell(seed + 1);
  return x.fill([&](std::int64_t r, std::int64_t c) {
    const double size = c % 29 == 0 ? 8.0 : 0.5 + 0.1 * static_cast<double>(c % 7);
    return size * (own.get(r, c) + 0.7 * shared.get(r, 0));
  });
}

struct MomentCase {
  DType a = DType::f32;
  DType b = DType::f32;
  std::int64_t rows = 0;
  std::int64_t d = 0;
  double size = 1.0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(a)) + "_" + dtype_name(b) + "_" + std::to_string(rows) + "x" +
           std::to_string(d) + "_size" + std::to_string(std::ilogb(size)) + "_" +
           layout_name(layout);
  }
};

std::vector<MomentCase> moment_cases() {
  std::vector<MomentCase> cases;
  for (const DType a : small_floats) {
    for (const DType b : small_floats) {
      for (const std::int64_t d : {1, 37, 256}) {
        const std::int64_t rows = d == 37 ? 1 : 65;
        cases.push_back({a, b, rows, d, 0x1p-6, all_layouts[cases.size() % 3]});
      }
    }
  }
  for (const double size : {0x1p-40, 0x1p-3, 0x1p20}) {  // the difference is scaled inside
    cases.push_back({DType::f32, DType::bf16, 40, 192, size, Layout::tight});
  }
  cases.push_back({DType::f32, DType::bf16, 40, 2120, 0x1p-6, Layout::tight});  // several panels
  return cases;
}

class MomentLoss : public ::testing::TestWithParam<MomentCase> {};
INSTANTIATE_TEST_SUITE_P(Awq, MomentLoss, ::testing::ValuesIn(moment_cases()),
                         case_name<MomentCase>);

// With e = a - b a backend may round e to f16 (u = 2^-11, independent errors) and sum in f32. Then
// the loss is off by the root of the sum of (2 u e_j (h e)_j)^2, by u^2 |e| |h| |e| in second
// order, and by the f32 sums over rows or columns: 4 sqrt(length) 2^-24 |e| |h| |e|.
TEST_P(MomentLoss, AgreesWithinTheRoundingOfTheDifference) {
  const MomentCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t n = 24, d = p.d;
  Operand a(Role::input, p.a, p.rows, d, p.layout), b(Role::input, p.b, p.rows, d, p.layout);
  a.bell(seed, p.size);
  b.bell(seed + 1, p.size);
  const std::vector<double> x = make_inputs(n, d, seed + 2).values();
  std::vector<double> full(place(d * d), 0.0);
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t j = 0; j < d; ++j) {
        full[place(i * d + j)] += x[place(t * d + i)] * x[place(t * d + j)];
      }
    }
  }
  Operand h(Role::input, DType::f32, d, d, p.layout);
  h.fill([&](std::int64_t i, std::int64_t j) {  // above the diagonal nothing is promised
    return i < j ? std::numeric_limits<double>::quiet_NaN() : full[place(i * d + j)];
  });
  const Operand out(Role::output, DType::f64, 1, 1);
  const Outcome o = run_both({&a, &b, &h, &out}, [](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.moment_loss_bytes(v[0].rows, v[0].cols));
    ops.moment_loss(v[0], v[1], v[2], v[3], workspace.view());
    ops.synchronize();
  });
  double first = 0, absolute = 0;
  for (std::int64_t r = 0; r < p.rows; ++r) {
    std::vector<double> e(place(d));
    for (std::int64_t j = 0; j < d; ++j) e[place(j)] = a.get(r, j) - b.get(r, j);
    for (std::int64_t i = 0; i < d; ++i) {
      double product = 0, size = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        product += full[place(i * d + j)] * e[place(j)];
        size += std::abs(full[place(i * d + j)] * e[place(j)]);
      }
      first += std::pow(e[place(i)] * product, 2);
      absolute += std::abs(e[place(i)]) * size;
    }
  }
  constexpr double u = 0x1p-11;
  const double length = std::sqrt(static_cast<double>(p.rows)) + std::sqrt(static_cast<double>(d));
  expect_close(o, 3,
               {.absolute = 4.0 * 2.0 * u * std::sqrt(first) + u * u * absolute +
                            4.0 * length * 0x1p-24 * absolute});
  EXPECT_GT(o.actual[3].get(0, 0), 0.0);
}

TEST(AwqMomentLoss, OfEqualWeightsIsZeroAndOfInfiniteOnesIsNotFinite) {
  Operand a(Role::input, DType::f32, 5, 20), h(Role::input, DType::f32, 20, 20);
  a.bell(1);
  h.fill([](std::int64_t i, std::int64_t j) { return i == j ? 2.0 : 0.5; });
  const Operand out(Role::output, DType::f64, 1, 1);
  const Body body = [](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.moment_loss_bytes(5, 20));
    ops.moment_loss(v[0], v[1], v[2], v[3], workspace.view());
    ops.synchronize();
  };
  const Outcome same = run_both({&a, &a, &h, &out}, body);
  EXPECT_EQ(same.actual[3].get(0, 0), 0.0);
  Operand broken = a;
  broken.put(2, 3, std::numeric_limits<double>::infinity());
  const Outcome infinite = run_both({&broken, &a, &h, &out}, body);
  EXPECT_FALSE(std::isfinite(infinite.actual[3].get(0, 0)));
  EXPECT_FALSE(std::isfinite(infinite.expected[3].get(0, 0)));
}

// ---- awq_clip ----

struct ClipCase {
  GridSpec spec;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t n = 0;
  bool ends = false;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return spec_name(spec) + "_" + dtype_name(dtype) + "_" + std::to_string(rows) + "x" +
           std::to_string(cols) + "_n" + std::to_string(n) + (ends ? "_ends" : "") + "_" +
           layout_name(layout);
  }
};

std::vector<ClipCase> clip_cases() {
  std::vector<ClipCase> cases;
  const std::int64_t rows[] = {1, 63, 64, 130};
  std::size_t turn = 0;
  for (const DType dtype : {DType::f32, DType::f16}) {
    for (const bool ends : {false, true}) {
      // Moments of short units, of units that fill no tile, of long ones, and the samples
      // themselves (n below the unit).
      for (const std::int64_t group : {32, 48, 64, 96, 128, 192, 0}) {
        for (const std::int64_t n : {40, 200}) {
          GridSpec spec = awq_spec(turn % 2 == 0 ? 3 : 4, group);
          spec.arithmetic = dtype;
          spec.reciprocal = turn % 3 != 0;
          cases.push_back({spec, dtype, rows[turn % 4], 384, n, ends, all_layouts[turn / 2 % 3]});
          ++turn;
        }
      }
    }
  }
  GridSpec spec = awq_spec(4, 128);
  spec.rule = GridRule::gptq;
  spec.symmetric = true;
  cases.push_back({spec, DType::f32, 70, 256, 150, false, Layout::tight});
  return cases;
}

class Clip : public ::testing::TestWithParam<ClipCase> {};
INSTANTIATE_TEST_SUITE_P(Awq, Clip, ::testing::ValuesIn(clip_cases()), case_name<ClipCase>);

constexpr int steps = 20;
constexpr int candidates = 10;

// The unit clamped to candidate i's bounds.
std::vector<float> clamped_unit(std::vector<float> w, const ClipCase& p, int i) {
  const auto shrink = static_cast<float>(1.0 - static_cast<double>(i) / steps);
  const auto [least, most] = std::minmax_element(w.begin(), w.end());
  float lo = in_arithmetic(p.spec, *least * shrink), hi = in_arithmetic(p.spec, *most * shrink);
  if (!p.ends) {
    hi = in_arithmetic(p.spec, std::max(std::abs(*least), std::abs(*most)) * shrink);
    lo = -hi;
  }
  for (float& v : w) v = std::clamp(v, lo, hi);
  return w;
}

// A loss is e h e / n, or |x e|^2 / n: f32 sums over n samples and over the unit on either side, so
// it may differ by 2 * 4 (sqrt(n) + sqrt(unit)) 2^-24 of the mean of (sum |e| |x|)^2 over samples.
// Where losses differ by less, either candidate may win: in at most 2 % of the units, or one.
TEST_P(Clip, LosesTheSame) {
  const ClipCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t unit = p.spec.unit(p.cols), groups = p.spec.groups(p.cols);
  Operand w(Role::inout, p.dtype, p.rows, p.cols, p.layout);
  w.bell(seed, 0.05);
  const Operand x = make_inputs(p.n, p.cols, seed + 1, p.layout);
  const Operand choice(Role::output, DType::u8, p.rows, groups, p.layout);
  const Operand loss(Role::output, DType::f32, p.rows, groups, p.layout);
  const Operand plain(Role::output, DType::f32, p.rows, groups, p.layout);
  const Outcome o =
      run_both({&w, &x, &choice, &loss, &plain}, [&p](Ops& ops, const std::vector<View>& v) {
        const Scratch workspace(ops, ops.awq_clip_bytes(p.rows, p.cols, p.spec, p.n));
        AwqClipProblem problem;
        problem.grid = p.spec;
        problem.steps = steps;
        problem.candidates = candidates;
        problem.ends = p.ends;
        problem.w = v[0];
        problem.x = v[1];
        problem.choice = v[2];
        problem.loss = v[3];
        problem.plain_loss = v[4];
        problem.workspace = workspace.view();
        ops.awq_clip(problem);
        ops.synchronize();
      });
  if (sides().same_backend) {
    for (const std::size_t i : {0, 2, 3, 4}) expect_exact(o, i);
  }
  const std::vector<double> samples = x.values();
  const double relative =
      2.0 * 4.0 * 0x1p-24 *
      (std::sqrt(static_cast<double>(p.n)) + std::sqrt(static_cast<double>(unit)));
  std::int64_t different = 0, clipped = 0;
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t u = 0; u < groups; ++u) {
      SCOPED_TRACE("row " + std::to_string(r) + ", unit " + std::to_string(u));
      std::vector<float> before(place(unit));
      for (std::int64_t j = 0; j < unit; ++j) {
        before[place(j)] = static_cast<float>(w.get(r, u * unit + j));
      }
      const auto tolerance = [&](int i) {
        std::vector<float> e = clamped_unit(before, p, i);
        const UnitGrid grid = find_unit_grid(e, p.spec);
        double sum = 0;
        for (std::int64_t t = 0; t < p.n; ++t) {
          double size = 0;
          for (std::int64_t j = 0; j < unit; ++j) {
            const float q =
                dequantize_value(quantize_value(e[place(j)], grid, p.spec), grid, p.spec);
            size += std::abs((static_cast<double>(q) - static_cast<double>(before[place(j)])) *
                             samples[place(t * p.cols + u * unit + j)]);
          }
          sum += size * size;
        }
        return relative * sum / static_cast<double>(p.n);
      };
      const auto index = static_cast<int>(o.actual[2].get(r, u));
      const auto wanted = static_cast<int>(o.expected[2].get(r, u));
      ASSERT_LT(index, candidates);
      const std::vector<float> after = clamped_unit(before, p, index);
      for (std::int64_t j = 0; j < unit; ++j) {
        ASSERT_EQ(o.actual[0].get(r, u * unit + j), static_cast<double>(after[place(j)])) << j;
      }
      EXPECT_NEAR(o.actual[4].get(r, u), o.expected[4].get(r, u), tolerance(0));
      double allowed = tolerance(index);
      if (index != wanted) allowed = std::max(allowed, tolerance(wanted));
      EXPECT_NEAR(o.actual[3].get(r, u), o.expected[3].get(r, u), allowed);
      different += index == wanted ? 0 : 1;
      clipped += index > 0 ? 1 : 0;
    }
  }
  EXPECT_LE(different, std::max<std::int64_t>(1, p.rows * groups / 50));
  if (p.rows > 32) {
    EXPECT_GT(clipped * 5, p.rows * groups);
  }
}

}  // namespace
}  // namespace engine::test
