// Parity of SliM-LLM's salience, bit search and sweep (docs/methods/slimllm.md).
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/weight/grid.h"
#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Upper triangular, with a diagonal between 0.5 and 2.
Operand make_factor(DType dtype, std::int64_t d, Layout layout, std::uint64_t seed) {
  Operand r(Role::input, dtype, d, d, layout);
  const Operand off = Operand(Role::input, DType::f32, d, d).bell(seed / 3, 0.03);
  return r.fill([&](std::int64_t i, std::int64_t j) {
    if (i > j) return 0.0;
    if (i < j) return off.get(i, j);
    return static_cast<double>(
        static_cast<float>(0.5 + 1.5 * static_cast<double>(uniform_value(seed, 4, at(j)))));
  });
}

// ---- slim_divisors, slim_salience ----

struct SalienceCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::int64_t group = 0;
  bool inverse = false;
  DType factor = DType::f64;
  DType weights = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_g" + std::to_string(group) +
           (inverse ? "_inverse_" : "_") + dtype_name(factor) + "_w" + dtype_name(weights) + "_" +
           layout_name(layout);
  }
};

std::vector<SalienceCase> salience_cases() {
  std::vector<SalienceCase> cases;
  const std::int64_t rows[] = {1, 2, 3, 5, 17, 33, 129};
  // {d, group}; panels of U are 256 columns wide.
  const std::int64_t sizes[][2] = {{1, 1},     {96, 32},  {131, 131}, {256, 128},
                                   {300, 100}, {384, 64}, {640, 640}};
  std::size_t turn = 0;
  for (const auto& [d, group] : sizes) {
    for (const bool inverse : {false, true}) {
      for (const DType factor : {DType::f64, DType::f32}) {
        cases.push_back({rows[turn % 7], d, group, inverse, factor, small_floats[turn % 3],
                         all_layouts[turn / 2 % 3]});
        ++turn;
      }
    }
  }
  return cases;
}

class SlimSalience : public ::testing::TestWithParam<SalienceCase> {};
INSTANTIATE_TEST_SUITE_P(Slim, SlimSalience, ::testing::ValuesIn(salience_cases()),
                         case_name<SalienceCase>);

// One division gives the same bits everywhere. The diagonal of the inverse is a sum of squares of
// columns that follow from each other; the reference solves them in f64 whatever the factor, the
// backend in the factor's precision, and the factors here are well conditioned: their sizes times
// the root of d roundings, with room. Saliences are sums of positive terms in f64.
TEST_P(SlimSalience, DivisorsAndSumsAgree) {
  const SalienceCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand r = make_factor(p.factor, p.d, p.layout, seed);
  const Operand divisors(Role::output, DType::f64, 1, p.d);
  const Outcome found = run_both({&r, &divisors}, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.slim_divisors_bytes(p.d, p.inverse, p.factor));
    ops.slim_divisors(v[0], p.inverse, v[1], workspace.view());
    ops.synchronize();
  });
  if (p.inverse) {
    expect_close(found, 1, {.relative = p.factor == DType::f64 ? 1e-11 : 2e-4});
  } else {
    expect_exact(found, 1);
  }

  const Operand w = Operand(Role::input, p.weights, p.rows, p.d, p.layout).bell(seed, 0.02);
  Operand known(Role::input, DType::f64, 1, p.d);
  known.fill([&](std::int64_t, std::int64_t j) { return found.expected[1].get(0, j); });
  const Operand sums(Role::output, DType::f64, 1, p.d / p.group);
  const Outcome o = run_both({&w, &known, &sums}, [&](Ops& ops, const std::vector<View>& v) {
    ops.slim_salience(v[0], v[1], p.group, v[2]);
  });
  expect_close(o, 2, {.relative = 1e-12});
}

// ---- slim_candidates ----

struct CandidateCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::int64_t group = 0;
  int bits = 3;
  DType weights = DType::f32;
  DType scale = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_g" + std::to_string(group) + "_b" +
           std::to_string(bits) + "_w" + dtype_name(weights) + "_s" + dtype_name(scale) + "_" +
           layout_name(layout);
  }
};

std::vector<CandidateCase> candidate_cases() {
  std::vector<CandidateCase> cases;
  const std::int64_t rows[] = {1, 2, 5, 17, 33};
  const std::int64_t sizes[][2] = {{128, 128}, {192, 32}, {300, 100}, {35, 7}, {384, 384}};
  std::size_t turn = 0;
  for (int bits = 2; bits <= 7; ++bits) {
    for (const DType weights : small_floats) {
      for (const DType scale : small_floats) {
        cases.push_back({rows[turn % 5], sizes[turn / 2 % 5][0], sizes[turn / 2 % 5][1], bits,
                         weights, scale, all_layouts[turn / 3 % 3]});
        ++turn;
      }
    }
  }
  return cases;
}

class SlimCandidates : public ::testing::TestWithParam<CandidateCase> {};
INSTANTIATE_TEST_SUITE_P(Slim, SlimCandidates, ::testing::ValuesIn(candidate_cases()),
                         case_name<CandidateCase>);

// Grids are exact, and so are means: sums in f64 of so few values of 24 bits differ, if at all, far
// below the rounding to f32.
TEST_P(SlimCandidates, AreExact) {
  const CandidateCase& p = GetParam();
  Operand w(Role::input, p.weights, p.rows, p.d, p.layout);
  w.bell(seed_of(p.name()), 0.02);
  w.fill([&](std::int64_t i, std::int64_t j) {
    return i % 4 == 3 && j < p.group ? 0.0 : w.get(i, j);  // groups of zeros only
  });
  const Operand out(Role::output, p.weights, p.rows, p.d, p.layout);
  const Outcome o = run_both({&w, &out, &out, &out}, [&](Ops& ops, const std::vector<View>& v) {
    ops.slim_candidates(v[0], p.bits, p.group, p.scale, v[1], v[2], v[3]);
  });
  for (const std::size_t i : {1U, 2U, 3U}) expect_exact(o, i);
}

// ---- softmax_kl ----

struct KlCase {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  double size = 1.0;        // of the outputs
  double difference = 1.0;  // between the two, 0: they are equal
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(cols) + "_size" +
           std::to_string(static_cast<int>(100 * size)) + "_diff" +
           std::to_string(static_cast<int>(100 * difference)) + "_" + layout_name(layout);
  }
};

std::vector<KlCase> kl_cases() {
  std::vector<KlCase> cases;
  const std::int64_t rows[] = {1, 3, 33};
  std::size_t turn = 0;
  for (const std::int64_t cols : {1, 2, 3, 7, 50, 131, 256, 1027, 1028, 4096}) {
    for (const Layout layout : all_layouts) {
      for (const double difference : {0.0, 0.05, 3.0}) {
        cases.push_back({rows[turn % 3], cols, turn % 2 == 0 ? 1.0 : 8.0, difference, layout});
        ++turn;
      }
    }
  }
  cases.push_back({3, 14336, 1.0, 0.05, Layout::tight});
  cases.push_back({2, 28672, 6.0, 0.5, Layout::tight});
  cases.push_back({2, 14335, 6.0, 0.5, Layout::odd});
  return cases;
}

class SoftmaxKl : public ::testing::TestWithParam<KlCase> {};
INSTANTIATE_TEST_SUITE_P(Slim, SoftmaxKl, ::testing::ValuesIn(kl_cases()), case_name<KlCase>);

// log a and log b are off by a few roundings of the outputs and by those of the two sums' f32
// terms: some 1e-7 in all, which the probabilities weigh to their sum; the exponentials by 1e-6 of
// themselves at arguments down to log(floor).
TEST_P(SoftmaxKl, AgreesWithTheFormula) {
  const KlCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  constexpr double floor = 1e-6, before = 0.5;
  const Operand reference =
      Operand(Role::input, DType::f32, p.rows, p.cols, p.layout).bell(seed, p.size);
  const Operand noise = Operand(Role::input, DType::f32, p.rows, p.cols).bell(seed / 3);
  Operand y(Role::input, DType::f32, p.rows, p.cols, p.layout);
  y.fill([&](std::int64_t i, std::int64_t j) {
    return reference.get(i, j) + p.difference * noise.get(i, j);
  });
  Operand kl(Role::inout, DType::f64, p.rows, 1, p.layout);
  kl.fill([](std::int64_t, std::int64_t) { return before; });
  const Outcome o = run_both({&y, &reference, &kl}, [&](Ops& ops, const std::vector<View>& v) {
    ops.softmax_kl(v[0], v[1], floor, v[2]);
  });

  const auto logs = [&](const Operand& v, std::int64_t row) {
    std::vector<double> out;
    for (std::int64_t j = 0; j < p.cols; ++j) out.push_back(v.get(row, j));
    const double top = *std::max_element(out.begin(), out.end());
    double sum = 0.0;
    for (const double x : out) sum += std::exp(x - top);
    for (double& x : out) x = std::max(x - top - std::log(sum), std::log(floor));
    return out;
  };
  std::vector<double> expected, tolerance;
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const std::vector<double> a = logs(y, row), b = logs(reference, row);
    double sum = 0.0, magnitude = 0.0, weight = 0.0;
    for (std::size_t j = 0; j < a.size(); ++j) {
      const double term = std::exp(a[j]) * (a[j] - b[j]);
      sum += term;
      magnitude += std::abs(term);
      weight += std::exp(a[j]);
    }
    expected.push_back(before + sum);
    tolerance.push_back(p.difference == 0.0 ? 0.0 : 4e-6 * magnitude + 2e-6 * weight);
  }
  EXPECT_TRUE(compare_close(o.actual[2].values(), expected, {.each = tolerance}));
  EXPECT_TRUE(compare_close(o.expected[2].values(), expected, {.each = tolerance}));
  if (sides().same_backend) expect_exact(o, 2);
}

TEST(SoftmaxKlOfNaN, IsNaN) {
  Operand y = Operand(Role::input, DType::f32, 2, 260).bell(1);
  y.put(1, 200, std::numeric_limits<double>::quiet_NaN());
  const Operand reference = Operand(Role::input, DType::f32, 2, 260).bell(2);
  Operand kl(Role::inout, DType::f64, 2, 1);
  kl.fill([](std::int64_t, std::int64_t) { return 0.0; });
  const Outcome o = run_both({&y, &reference, &kl}, [](Ops& ops, const std::vector<View>& v) {
    ops.softmax_kl(v[0], v[1], 1e-6, v[2]);
  });
  for (const auto* side : {&o.expected, &o.actual}) {
    EXPECT_TRUE(std::isfinite((*side)[2].get(0, 0)));
    EXPECT_TRUE(std::isnan((*side)[2].get(1, 0)));
  }
}

// ---- slim_decode ----

struct DecodeCase {
  std::int64_t rows = 0;
  std::int64_t group = 0;
  std::string bits;  // a digit per group
  DType out = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "_g" + std::to_string(group) + "_b" + bits + "_" +
           dtype_name(out) + "_" + layout_name(layout);
  }
};

std::vector<DecodeCase> decode_cases() {
  std::vector<DecodeCase> cases;
  for (const DType out : small_floats) {
    for (const Layout layout : all_layouts) {
      cases.push_back({1, 128, "213", out, layout});
      cases.push_back({33, 7, "18234567", out, layout});
      cases.push_back({129, 100, "31", out, layout});
    }
  }
  cases.push_back({1100, 32, "2341", DType::bf16, Layout::tight});
  return cases;
}

class SlimDecoding : public ::testing::TestWithParam<DecodeCase> {};
INSTANTIATE_TEST_SUITE_P(Slim, SlimDecoding, ::testing::ValuesIn(decode_cases()),
                         case_name<DecodeCase>);

TEST_P(SlimDecoding, IsExact) {
  const DecodeCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const auto groups = static_cast<std::int64_t>(p.bits.size());
  const auto width = [&](std::int64_t g) { return p.bits[at(g)] - '0'; };
  Operand bits(Role::input, DType::u8, 1, groups);
  bits.fill([&](std::int64_t, std::int64_t g) { return width(g); });
  Operand codes = Operand(Role::input, DType::u8, p.rows, groups * p.group, p.layout);
  codes.uniform(seed, 256);
  codes.fill([&](std::int64_t r, std::int64_t c) {
    return std::fmod(codes.get(r, c), std::exp2(width(c / p.group)));
  });
  const Operand scales =
      Operand(Role::input, DType::f32, p.rows, groups, p.layout).bell(seed + 1, 0.01);
  const Operand means =
      Operand(Role::input, DType::f32, p.rows, groups, p.layout).bell(seed + 2, 0.01);
  const Operand zeros =
      Operand(Role::input, DType::i32, p.rows, groups, p.layout).uniform(seed + 3, 256);
  const Operand out(Role::output, p.out, p.rows, groups * p.group, p.layout);
  const Outcome o = run_both({&bits, &codes, &scales, &means, &zeros, &out},
                             [&](Ops& ops, const std::vector<View>& v) {
                               ops.slim_decode({.group = p.group,
                                                .bits = v[0],
                                                .codes = v[1],
                                                .scales = v[2],
                                                .means = v[3],
                                                .zeros = v[4],
                                                .out = v[5]});
                             });
  expect_exact(o, 5);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t c = 0; c < groups * p.group; ++c) {
      const std::int64_t g = c / p.group;
      const double scale = scales.get(r, g), mean = means.get(r, g), code = codes.get(r, c);
      const double value =
          width(g) == 1 ? mean + (code > 0.0 ? scale : -scale) : scale * (code - zeros.get(r, g));
      ASSERT_NEAR(o.actual[5].get(r, c), value,
                  2.0 * roundoff(p.out) * (std::abs(value) + std::abs(mean)))
          << r << ", " << c;
    }
  }
}

// ---- slim_sweep ----

struct SlimCase {
  std::int64_t rows = 0;
  std::int64_t group = 128;
  std::string bits;    // a digit per group
  std::string middle;  // the same of middle zeros, or empty
  double lambda = 1.0;
  bool search = true;
  DType factor = DType::f64;
  DType scale = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::int64_t groups() const { return static_cast<std::int64_t>(bits.size()); }
  [[nodiscard]] std::int64_t d() const { return groups() * group; }
  [[nodiscard]] int width(std::int64_t g) const { return bits[at(g)] - '0'; }
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "_g" + std::to_string(group) + "_b" + bits +
           (middle.empty() ? "" : "_z" + middle) + "_l" + std::to_string(static_cast<int>(lambda)) +
           (search ? "_" : "_plain_") + dtype_name(factor) + "_s" + dtype_name(scale) + "_" +
           layout_name(layout);
  }
};

std::vector<SlimCase> slim_cases() {
  std::vector<SlimCase> cases;
  const std::int64_t rows[] = {1, 3, 5, 17, 33, 65};
  const struct {
    std::int64_t group;
    const char* bits;
    const char* middle;
  } kinds[] = {{128, "213", ""},   {128, "234", "100"},      {128, "3", ""},
               {64, "122331", ""}, {32, "23344532", "1"},    {100, "1283", ""},
               {7, "32431", ""},   {128, "232343", "110000"}};
  std::size_t turn = 0;
  for (const auto& kind : kinds) {
    for (const double lambda : {1.0, 5.0}) {
      for (const bool search : {true, false}) {
        if (!search && lambda != 1.0) continue;
        for (const DType factor : {DType::f64, DType::f32}) {
          std::string middle = kind.middle;
          if (!middle.empty()) middle.resize(std::string(kind.bits).size(), '0');
          cases.push_back({rows[turn % 6], kind.group, kind.bits, middle, lambda, search, factor,
                           turn % 4 < 2 ? DType::f32 : small_floats[turn % 3],
                           all_layouts[turn % 3]});
          ++turn;
        }
      }
    }
  }
  // More rows than one pass of the salience's blocks.
  cases.push_back({2100, 32, "232", "", 5.0, true, DType::f32, DType::f32, Layout::tight});
  return cases;
}

// Operands by position.
enum : std::size_t {
  in_w,
  in_r,
  in_bits,
  in_middle,
  out_scales,
  out_zeros,
  out_means,
  out_codes,
  out_loss
};

class SlimCheck {
 public:
  SlimCheck(const SlimCase& p, const Operand& w, const Operand& r) : p_(p), w_(w), r_(r) {}

  // What holds for each side by itself.
  void own(const std::vector<Operand>& side, const char* name) const {
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      for (std::int64_t j = 0; j < p_.d(); ++j) {
        const std::int64_t g = j / p_.group;
        const double code = side[out_codes].get(row, j), scale = side[out_scales].get(row, g);
        const double mean = side[out_means].get(row, g), zero = side[out_zeros].get(row, g);
        ASSERT_LT(code, std::exp2(p_.width(g))) << name;
        for (const double v : {scale, mean}) {
          ASSERT_EQ(v, static_cast<double>(round_to(p_.scale, static_cast<float>(v)))) << name;
        }
        ASSERT_EQ(p_.width(g) == 1 ? zero : mean, 0.0) << name;
        if (p_.width(g) > 1 && !p_.middle.empty() && p_.middle[at(g)] == '1') {
          ASSERT_EQ(zero, std::exp2(p_.width(g) - 1)) << name;
        }
        const double q =
            p_.width(g) == 1 ? mean + (code > 0.0 ? scale : -scale) : scale * (code - zero);
        const double w = w_.get(row, j);
        // E = w^ - w: w^ is rounded once, and so is the difference.
        ASSERT_NEAR(side[in_w].get(row, j), q - w,
                    2.0 * roundoff(DType::f32) * (std::abs(q) + std::abs(mean) + std::abs(w)))
            << name << ": row " << row << ", column " << j;
      }
      // The sum of the columns' errors is the objective of the row: an identity of the method.
      const double objective = row_objective(side[in_w], row);
      ASSERT_NEAR(side[out_loss].get(row, 0), objective, 1e-3 * objective)
          << name << ": row " << row;
    }
  }

  // The current weights agree to about 1e-6 of their size. A code at the edge of two, and a range
  // whose loss equals another's to that, may go either way; later groups of the row follow. Rows do
  // not influence each other, but for the few elements at the edge of the salient ones. So rows
  // with other grids are few, rows with the same grids have the same codes but for a few, and the
  // objective of all is the same.
  void both(const Outcome& o) const {
    std::vector<std::int64_t> same_actual, same_expected;
    std::int64_t other_grid = 0;
    double actual_sum = 0.0, expected_sum = 0.0;
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      actual_sum += o.actual[out_loss].get(row, 0);
      expected_sum += o.expected[out_loss].get(row, 0);
      first_group(o, row);
      if (!same_grids(o, row)) {
        ++other_grid;
        continue;
      }
      for (std::int64_t j = 0; j < p_.d(); ++j) {
        same_actual.push_back(static_cast<std::int64_t>(o.actual[out_codes].get(row, j)));
        same_expected.push_back(static_cast<std::int64_t>(o.expected[out_codes].get(row, j)));
      }
    }
    EXPECT_LE(other_grid, 1 + p_.rows / (p_.scale == DType::f32 ? 20 : 10)) << "rows";
    const Comparison codes = compare_mostly(same_actual, same_expected,
                                            static_cast<std::int64_t>(same_actual.size()) / 500);
    EXPECT_TRUE(codes.ok) << "codes: " << codes.message;
    EXPECT_NEAR(actual_sum, expected_sum, (p_.rows < 10 ? 1e-2 : 3e-3) * expected_sum) << "loss";
  }

 private:
  // |E_r R|^2.
  [[nodiscard]] double row_objective(const Operand& e, std::int64_t row) const {
    std::vector<double> product(at(p_.d()), 0.0);
    for (std::int64_t i = 0; i < p_.d(); ++i) {
      const double v = e.get(row, i);
      for (std::int64_t j = i; j < p_.d(); ++j) product[at(j)] += v * r_.get(i, j);
    }
    return std::inner_product(product.begin(), product.end(), product.begin(), 0.0);
  }

  [[nodiscard]] bool same_grids(const Outcome& o, std::int64_t row) const {
    for (std::int64_t g = 0; g < p_.groups(); ++g) {
      const double e = o.expected[out_scales].get(row, g);
      if (!(std::abs(o.actual[out_scales].get(row, g) - e) <= 1e-4 * e)) return false;
      if (o.actual[out_zeros].get(row, g) != o.expected[out_zeros].get(row, g)) return false;
      if (!(std::abs(o.actual[out_means].get(row, g) - o.expected[out_means].get(row, g)) <=
            1e-4 * e)) {
        return false;
      }
    }
    return true;
  }

  // Nothing is compensated in the first group, so the only difference is in the last bits of the
  // powers: the same grid, or one whose loss is the same to 1e-5.
  void first_group(const Outcome& o, std::int64_t row) const {
    const auto value = [row](const std::vector<Operand>& side, std::size_t what) {
      return side[what].get(row, 0);
    };
    if (p_.width(0) == 1 || !p_.search) {
      for (const std::size_t what : {out_scales, out_zeros, out_means}) {
        ASSERT_EQ(value(o.actual, what), value(o.expected, what)) << "row " << row;
      }
      return;
    }
    if (p_.lambda != 1.0) return;  // which elements count more depends on the whole group
    const double expected = power_loss(o.expected, row);
    ASSERT_NEAR(power_loss(o.actual, row), expected, 1e-5 * expected) << "row " << row;
  }

  // Sum of |w^ - w|^2.4 over the first group, each weight on its grid.
  [[nodiscard]] double power_loss(const std::vector<Operand>& side, std::int64_t row) const {
    GridSpec spec;
    spec.bits = p_.width(0);
    const UnitGrid grid{static_cast<float>(side[out_scales].get(row, 0)),
                        static_cast<std::int32_t>(side[out_zeros].get(row, 0))};
    double sum = 0.0;
    for (std::int64_t j = 0; j < p_.group; ++j) {
      const auto w = static_cast<float>(w_.get(row, j));
      const float q = dequantize_value(quantize_value(w, grid, spec), grid, spec);
      sum += std::pow(std::abs(static_cast<double>(q - w)), 2.4);
    }
    return sum;
  }

  const SlimCase& p_;
  const Operand& w_;
  const Operand& r_;
};

class SlimSweep : public ::testing::TestWithParam<SlimCase> {};
INSTANTIATE_TEST_SUITE_P(Slim, SlimSweep, ::testing::ValuesIn(slim_cases()), case_name<SlimCase>);

TEST_P(SlimSweep, AgreesUpToTiesOfRounding) {
  const SlimCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand w = Operand(Role::inout, DType::f32, p.rows, p.d(), p.layout).bell(seed, 0.02);
  const Operand r = make_factor(p.factor, p.d(), p.layout, seed);
  Operand bits(Role::input, DType::u8, 1, p.groups());
  bits.fill([&](std::int64_t, std::int64_t g) { return p.width(g); });
  Operand middle(Role::input, DType::u8, 1, static_cast<std::int64_t>(p.middle.size()));
  middle.fill([&](std::int64_t, std::int64_t g) { return p.middle[at(g)] - '0'; });
  const Operand scales(Role::output, DType::f32, p.rows, p.groups(), p.layout);
  const Operand zeros(Role::output, DType::i32, p.rows, p.groups(), p.layout);
  const Operand means(Role::output, DType::f32, p.rows, p.groups(), p.layout);
  const Operand codes(Role::output, DType::u8, p.rows, p.d(), p.layout);
  const Operand loss(Role::output, DType::f64, p.rows, 1, p.layout);
  const Outcome o = run_both({&w, &r, &bits, &middle, &scales, &zeros, &means, &codes, &loss},
                             [&](Ops& ops, const std::vector<View>& v) {
                               const Scratch workspace(
                                   ops, ops.slim_workspace_bytes(p.rows, p.d(), p.group, p.factor));
                               SlimProblem problem;
                               problem.group = p.group;
                               problem.scale_dtype = p.scale;
                               problem.search = p.search;
                               problem.lambda = p.lambda;
                               problem.w = v[in_w];
                               problem.r = v[in_r];
                               problem.bits = v[in_bits];
                               problem.middle_zero = v[in_middle];
                               problem.scales = v[out_scales];
                               problem.zeros = v[out_zeros];
                               problem.means = v[out_means];
                               problem.codes = v[out_codes];
                               problem.loss = v[out_loss];
                               problem.workspace = workspace.view();
                               ops.slim_sweep(problem);
                               ops.synchronize();
                             });
  const SlimCheck check(p, w, r);
  check.own(o.expected, "reference");
  check.own(o.actual, "backend");
  check.both(o);
  if (sides().same_backend) {
    for (const std::size_t i : {in_w, out_scales, out_zeros, out_means, out_codes, out_loss}) {
      expect_exact(o, i);
    }
  }
}

}  // namespace
}  // namespace engine::test
