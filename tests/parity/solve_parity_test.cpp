// Parity of second moments, the triangular factor and the GPTQ sweep.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/weight/grid.h"
#include "tests/parity/parity_support.h"
#include "tests/parity/sweep_support.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// ---- gram ----

struct GramCase {
  DType dtype = DType::f32;
  std::int64_t m = 0;
  std::int64_t k = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(m) + "x" + std::to_string(k) +
           "_" + layout_name(layout);
  }
};

std::vector<GramCase> gram_cases() {
  std::vector<GramCase> cases;
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t m : {1, 2, 3, 4, 5, 17, 33, 129}) {
        cases.push_back({dtype, m, m % 2 == 0 ? 64 : 131, layout});
      }
      cases.push_back({dtype, 1030, 96, layout});
      cases.push_back({dtype, 7, 1, layout});
    }
    cases.push_back({dtype, 33, 768, Layout::tight});
  }
  return cases;
}

class Gram : public ::testing::TestWithParam<GramCase> {};
INSTANTIATE_TEST_SUITE_P(Solve, Gram, ::testing::ValuesIn(gram_cases()), case_name<GramCase>);

TEST_P(Gram, LowerTriangleMatchesTheSumInF64) {
  const GramCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x = Operand(Role::input, p.dtype, p.m, p.k, p.layout).bell(seed);
  // Finite above the diagonal too: what happens there is unspecified, not forbidden.
  const Operand h = Operand(Role::inout, DType::f32, p.k, p.k, p.layout).bell(seed / 3, 2.0);
  const Outcome o =
      run_both({&x, &h}, [](Ops& ops, const std::vector<View>& v) { ops.gram(v[0], v[1]); });
  const std::vector<double> xs = x.values();
  std::vector<double> exact, each, reference, backend;
  std::vector<double> norms(at(p.k), 0.0);
  for (std::int64_t r = 0; r < p.m; ++r) {
    for (std::int64_t c = 0; c < p.k; ++c)
      norms[at(c)] += xs[at(r * p.k + c)] * xs[at(r * p.k + c)];
  }
  for (std::int64_t i = 0; i < p.k; ++i) {
    std::vector<double> row(at(i + 1), 0.0);
    for (std::int64_t r = 0; r < p.m; ++r) {
      const double xi = xs[at(r * p.k + i)];
      for (std::int64_t j = 0; j <= i; ++j) row[at(j)] += xi * xs[at(r * p.k + j)];
    }
    for (std::int64_t j = 0; j <= i; ++j) {
      exact.push_back(h.get(i, j) + row[at(j)]);
      const double magnitude = std::abs(h.get(i, j)) + std::sqrt(norms[at(i)] * norms[at(j)]);
      each.push_back(sum_tolerance(p.m + 1, magnitude) + store_tolerance(DType::f32, magnitude));
      reference.push_back(o.expected[1].get(i, j));
      backend.push_back(o.actual[1].get(i, j));
    }
  }
  const Tolerance tolerance{0.0, 0.0, each};
  const Comparison r = compare_close(reference, exact, tolerance);
  EXPECT_TRUE(r.ok) << "reference (lower triangle, row by row): " << r.message;
  const Comparison b = compare_close(backend, exact, tolerance);
  EXPECT_TRUE(b.ok) << "backend (lower triangle, row by row): " << b.message;
  if (sides().same_backend) {
    EXPECT_EQ(backend, reference);
  }
}

// ---- diagonal, damp_hessian, factor_upper ----

struct SquareCase {
  std::int64_t d = 0;
  DType dtype = DType::f32;
  Layout layout = Layout::tight;
  bool perm = false;
  bool dead = false;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(d) + "_" + layout_name(layout) +
           (perm ? "_perm" : "") + (dead ? "_dead" : "");
  }
  [[nodiscard]] bool is_dead(std::int64_t j) const { return dead && j % 7 == 2; }
};

std::vector<SquareCase> square_cases() {
  std::vector<SquareCase> cases;
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t d : {1, 2, 5, 33, 64, 129, 256, 385}) {
        for (const bool perm : {false, true}) {
          for (const bool dead : {false, true}) {
            if (d > 129 && perm != dead) continue;
            cases.push_back({d, dtype, layout, perm, dead});
          }
        }
      }
    }
    cases.push_back({768, dtype, Layout::tight, true, true});
  }
  return cases;
}

class OnSquare : public ::testing::TestWithParam<SquareCase> {
 protected:
  void SetUp() override {
    const SquareCase& p = GetParam();
    seed_ = seed_of(p.name());
    // Inputs of very different size that share a direction, as activations do. Above the diagonal
    // of h lies NaN: only the lower triangle is defined.
    const std::int64_t m = p.d + 16;
    const Operand x = Operand(Role::input, DType::f32, m, p.d).bell(seed_);
    std::vector<double> columns(at(m * p.d));
    for (std::int64_t j = 0; j < p.d; ++j) {
      const double size =
          p.is_dead(j) ? 0.0 : std::exp2(4.0 * uniform_value(seed_, 5, at(j)) - 2.0);
      for (std::int64_t r = 0; r < m; ++r) {
        columns[at(j * m + r)] = size * (x.get(r, j) + 0.7 * x.get(r, 0));
      }
    }
    h_ = Operand(Role::input, DType::f32, p.d, p.d, p.layout);
    h_.fill([&](std::int64_t i, std::int64_t j) {
      if (j > i) return std::numeric_limits<double>::quiet_NaN();
      double sum = 0.0;
      const double* a = columns.data() + i * m;
      const double* b = columns.data() + j * m;
      for (std::int64_t r = 0; r < m; ++r) sum += a[r] * b[r];
      return sum;
    });
    order_ = random_order(p.d, seed_);
    perm_ = Operand(Role::input, DType::i32, 1, p.perm ? p.d : 0);
    perm_.fill([&](std::int64_t, std::int64_t j) { return static_cast<double>(order_[at(j)]); });
  }
  [[nodiscard]] std::int64_t source(std::int64_t i) const {
    return GetParam().perm ? order_[at(i)] : i;
  }
  std::uint64_t seed_ = 0;
  Operand h_;
  Operand perm_;
  std::vector<std::int32_t> order_;
};
INSTANTIATE_TEST_SUITE_P(Solve, OnSquare, ::testing::ValuesIn(square_cases()),
                         case_name<SquareCase>);

TEST_P(OnSquare, DiagonalIsExact) {
  const Operand out(Role::output, DType::f32, 1, GetParam().d);
  const Outcome o =
      run_both({&h_, &out}, [](Ops& ops, const std::vector<View>& v) { ops.diagonal(v[0], v[1]); });
  expect_exact(o, 1);
  for (std::int64_t j = 0; j < GetParam().d; ++j) {
    ASSERT_EQ(o.actual[1].get(0, j), h_.get(j, j)) << j;
  }
}

TEST_P(OnSquare, DampHessianFollowsItsDefinition) {
  const SquareCase& p = GetParam();
  const double scale = 2.0 / 129.0;
  const double damp = 0.01;
  const Operand a(Role::output, p.dtype, p.d, p.d, p.layout);
  const Operand dead(Role::output, DType::u8, 1, p.d);
  const Operand damping(Role::output, DType::f64, 1, 1);
  const Outcome o =
      run_both({&h_, &perm_, &a, &dead, &damping}, [&](Ops& ops, const std::vector<View>& v) {
        ops.damp_hessian(v[0], v[1], scale, damp, v[2], v[3], v[4]);
      });
  // One product and, on the diagonal, one sum, each rounded to the dtype; the mean in f64.
  const Tolerance tolerance{0.0, 4.0 * roundoff(p.dtype) + 1e-12};
  expect_close(o, 2, tolerance);
  expect_exact(o, 3);
  expect_close(o, 4, {0.0, 1e-12});

  double mean = 0.0;
  for (std::int64_t i = 0; i < p.d; ++i) {
    mean += p.is_dead(i) ? 1.0 : scale * h_.get(i, i);
  }
  mean /= static_cast<double>(p.d);
  std::vector<double> exact;
  for (std::int64_t i = 0; i < p.d; ++i) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      const std::int64_t r = std::max(source(i), source(j)), c = std::min(source(i), source(j));
      double v = scale * h_.get(r, c);
      if (i == j) v = (p.is_dead(r) ? 1.0 : v) + damp * mean;
      exact.push_back(v);
    }
    ASSERT_EQ(o.actual[3].get(0, i), p.is_dead(source(i)) ? 1.0 : 0.0) << i;
  }
  const Comparison c = compare_close(o.actual[2].values(), exact, tolerance);
  EXPECT_TRUE(c.ok) << c.message;
  EXPECT_NEAR(o.actual[4].get(0, 0), damp * mean, 1e-12 * mean);
}

// a = scale * h + damping, in the case's dtype, as both sides get it.
Operand damped(const Operand& h, const SquareCase& p, double damp) {
  double mean = 0.0;
  for (std::int64_t i = 0; i < p.d; ++i) mean += h.get(i, i) / static_cast<double>(p.d);
  Operand a(Role::inout, p.dtype, p.d, p.d, p.layout);
  return a.fill([&](std::int64_t i, std::int64_t j) {
    return h.get(std::max(i, j), std::min(i, j)) + (i == j ? damp * mean : 0.0);
  });
}

struct Factored {
  Outcome outcome;
  std::vector<bool> sound;  // reference, backend
};

Factored factor(const Operand& a) {
  Factored f;
  f.outcome = run_both({&a}, [&f](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.factor_workspace_bytes(v[0].rows, v[0].dtype));
    f.sound.push_back(ops.factor_upper(v[0], workspace.view()));
  });
  return f;
}

TEST_P(OnSquare, FactorTimesItsTransposeIsTheMatrix) {
  const SquareCase& p = GetParam();
  const Operand a = damped(h_, p, 0.01);
  const Factored f = factor(a);
  ASSERT_EQ(f.sound, (std::vector<bool>{true, true}));
  for (const Operand* side : {&f.outcome.expected[0], &f.outcome.actual[0]}) {
    const std::vector<double> r = side->values();
    std::vector<double> product, expected, each;
    for (std::int64_t i = 0; i < p.d; ++i) {
      ASSERT_GT(r[at(i * p.d + i)], 0.0);
      for (std::int64_t j = 0; j < i; ++j) ASSERT_EQ(r[at(i * p.d + j)], 0.0) << i << ", " << j;
      for (std::int64_t j = i; j < p.d; ++j) {
        double sum = 0.0;
        for (std::int64_t k = j; k < p.d; ++k) sum += r[at(i * p.d + k)] * r[at(j * p.d + k)];
        product.push_back(sum);
        expected.push_back(a.get(i, j));
        // Each row of R has the length of the square root of a's diagonal, so the products sum to
        // at most sqrt(a_ii a_jj); their roundings behave as independent (sum_tolerance).
        each.push_back((8.0 * std::sqrt(static_cast<double>(p.d)) + 8.0) * roundoff(p.dtype) *
                       std::sqrt(a.get(i, i) * a.get(j, j)));
      }
    }
    const Comparison c = compare_close(product, expected, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << (side == &f.outcome.actual[0] ? "backend" : "reference")
                      << " (upper triangle, row by row): " << c.message;
  }
  if (sides().same_backend) expect_exact(f.outcome, 0);
}

TEST_P(OnSquare, FactorRefusesWhatIsNotPositiveDefinite) {
  const SquareCase& p = GetParam();
  const Operand good = damped(h_, p, 0.01);
  const std::vector<bool> refused{false, false};
  for (const std::int64_t i : {std::int64_t{0}, p.d / 2, p.d - 1}) {
    for (const double bad : {-1.0, 0.0, std::numeric_limits<double>::quiet_NaN()}) {
      Operand a = good;
      a.put(i, i, bad);
      EXPECT_EQ(factor(a).sound, refused) << bad << " on diagonal " << i;
    }
  }
  if (p.d == 1) return;
  // Positive on the diagonal, indefinite all the same.
  Operand a = good;
  const double large = 2.0 * std::sqrt(a.get(0, 0) * a.get(p.d - 1, p.d - 1));
  a.put(0, p.d - 1, large);
  a.put(p.d - 1, 0, large);
  EXPECT_EQ(factor(a).sound, refused) << "an indefinite matrix";
  // A NaN away from the diagonal.
  a.put(0, p.d - 1, std::numeric_limits<double>::quiet_NaN());
  a.put(p.d - 1, 0, std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(factor(a).sound, refused) << "a NaN off the diagonal";
}

// ---- gptq_sweep ----

struct SweepCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  int bits = 4;
  std::int64_t group = 128;
  std::int64_t block = 128;
  bool symmetric = false;
  bool static_groups = false;  // grids given, the unit of each column by column_group
  DType factor = DType::f32;
  DType scale = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_b" + std::to_string(bits) + "_g" +
           std::to_string(group) + "_blk" + std::to_string(block) + (symmetric ? "_sym" : "") +
           (static_groups ? "_static" : "") + "_" + dtype_name(factor) + "_s" + dtype_name(scale) +
           "_" + layout_name(layout);
  }
};

std::vector<SweepCase> sweep_cases() {
  std::vector<SweepCase> cases;
  const std::int64_t rows[] = {1, 2, 3, 4, 5, 17, 33, 129, 200};
  std::size_t turn = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const std::int64_t d : {256, 384, 768}) {
      const auto add = [&](std::int64_t group, std::int64_t block, bool symmetric, bool given) {
        cases.push_back({rows[turn % 9], d, bits, group, block, symmetric, given,
                         turn % 2 == 0 ? DType::f32 : DType::f64,
                         turn % 5 < 3 ? DType::f32 : DType::f16, all_layouts[turn / 2 % 3]});
        ++turn;
      };
      add(0, 128, false, false);
      add(0, 128, true, false);
      add(0, 64, false, true);
      add(128, 128, false, false);
      add(64, 64, false, false);
      add(32, 32, true, false);
      add(256, 128, false, false);
      add(64, 128, false, true);
      add(128, 128, true, true);
    }
  }
  // Widths that no block divides.
  cases.push_back({33, 131, 4, 0, 128, false, false, DType::f32, DType::f32, Layout::odd});
  cases.push_back({17, 300, 3, 128, 128, false, false, DType::f64, DType::f32, Layout::wide});
  cases.push_back({5, 400, 2, 256, 128, true, false, DType::f32, DType::f32, Layout::odd});
  cases.push_back({200, 768, 4, 128, 128, false, false, DType::f32, DType::f32, Layout::tight});
  return cases;
}

class Sweep : public ::testing::TestWithParam<SweepCase> {};
INSTANTIATE_TEST_SUITE_P(Solve, Sweep, ::testing::ValuesIn(sweep_cases()), case_name<SweepCase>);

// Sweep operands by position.
enum : std::size_t {
  sweep_w,
  sweep_r,
  sweep_group,
  sweep_scales,
  sweep_zeros,
  sweep_codes,
  sweep_loss
};

class SweepCheck {
 public:
  SweepCheck(const SweepCase& p, const GridSpec& spec, const Operand& w,
             const std::vector<std::int64_t>& unit, const std::vector<double>& r)
      : p_(p), spec_(spec), w_(w), unit_(unit), r_(r) {}

  // What holds for each side by itself.
  void own(const std::vector<Operand>& side, const char* name) const {
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      for (std::int64_t j = 0; j < p_.d; ++j) {
        const auto code = static_cast<std::int64_t>(side[sweep_codes].get(row, j));
        ASSERT_LE(code, spec_.max_code()) << name;
        const UnitGrid grid{static_cast<float>(side[sweep_scales].get(row, unit_[at(j)])),
                            static_cast<std::int32_t>(side[sweep_zeros].get(row, unit_[at(j)]))};
        ASSERT_EQ(grid.scale, round_to(p_.scale, grid.scale)) << name;
        const double q =
            static_cast<double>(dequantize_value(static_cast<std::uint8_t>(code), grid, spec_));
        const double w = w_.get(row, j);
        // E = w^ - w, one subtraction.
        ASSERT_NEAR(side[sweep_w].get(row, j), q - w,
                    2.0 * roundoff(DType::f32) * (std::abs(q) + std::abs(w)))
            << name << ": row " << row << ", column " << j;
      }
      // The sum of the columns' errors is the objective of the row: an identity of the method.
      const double objective = row_objective(side[sweep_w], row, r_);
      ASSERT_NEAR(side[sweep_loss].get(row, 0), objective, 1e-3 * objective)
          << name << ": row " << row;
    }
  }

  void both(const Outcome& o) const {
    const std::vector<std::int64_t> actual = o.actual[sweep_codes].integers();
    const std::vector<std::int64_t> expected = o.expected[sweep_codes].integers();
    // A weight that lies on the edge between two codes may go either way, and later columns of its
    // row follow. The current weights agree to about 1e-6 of their size, so few codes are
    // concerned. A scale that lies on the edge between two 16-bit values may go either way too,
    // which moves a whole unit of codes: such rows are counted apart (rows do not influence each
    // other).
    std::vector<std::int64_t> same_actual, same_expected;
    std::int64_t other_grid = 0;
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      if (!same_scales(o, row)) {
        ++other_grid;
        continue;
      }
      same_actual.insert(same_actual.end(), actual.begin() + row * p_.d,
                         actual.begin() + (row + 1) * p_.d);
      same_expected.insert(same_expected.end(), expected.begin() + row * p_.d,
                           expected.begin() + (row + 1) * p_.d);
    }
    // A code that went the other way moves the grids of later groups of its row as well.
    const bool dynamic = spec_.group != 0 && !p_.static_groups;
    const std::int64_t most = !dynamic ? 0 : 1 + p_.rows / (p_.scale == DType::f32 ? 20 : 5);
    EXPECT_LE(other_grid, most) << "rows with another grid";
    const auto allowed = static_cast<std::int64_t>(0.003 * static_cast<double>(expected.size()));
    const Comparison codes = compare_mostly(same_actual, same_expected, allowed);
    EXPECT_TRUE(codes.ok) << "codes: " << codes.message;

    double actual_sum = 0.0, expected_sum = 0.0, actual_loss = 0.0, expected_loss = 0.0;
    for (std::int64_t row = 0; row < p_.rows; ++row) {
      actual_sum += row_objective(o.actual[sweep_w], row, r_);
      expected_sum += row_objective(o.expected[sweep_w], row, r_);
      actual_loss += o.actual[sweep_loss].get(row, 0);
      expected_loss += o.expected[sweep_loss].get(row, 0);
      if (std::equal(actual.begin() + row * p_.d, actual.begin() + (row + 1) * p_.d,
                     expected.begin() + row * p_.d)) {
        equal_row(o, row);
      }
    }
    EXPECT_NEAR(actual_sum, expected_sum, 1e-2 * expected_sum) << "tr(E H E^T)";
    EXPECT_NEAR(actual_loss, expected_loss, 1e-2 * expected_loss) << "loss";
  }

 private:
  // Whether both sides found the same grids for a row, up to the f32 noise of the current weights.
  [[nodiscard]] bool same_scales(const Outcome& o, std::int64_t row) const {
    for (std::int64_t u = 0; u < spec_.groups(p_.d); ++u) {
      const double e = o.expected[sweep_scales].get(row, u);
      if (!(std::abs(o.actual[sweep_scales].get(row, u) - e) <= 1e-4 * e)) return false;
    }
    return true;
  }

  // A row with the same codes has the same grids: the same to the bit when they come from the
  // weights themselves, and up to the rounding of the current weights when they are found on the
  // way (a rounding of the scale's dtype may turn that into one of its steps).
  void equal_row(const Outcome& o, std::int64_t row) const {
    const bool exact = spec_.group == 0 || p_.static_groups;
    const double relative =
        exact ? 0.0 : 1e-4 + 2.0 * (p_.scale == DType::f32 ? 0.0 : roundoff(p_.scale));
    for (std::int64_t u = 0; u < spec_.groups(p_.d); ++u) {
      const double e = o.expected[sweep_scales].get(row, u);
      ASSERT_NEAR(o.actual[sweep_scales].get(row, u), e, relative * e) << row << ", " << u;
      ASSERT_EQ(o.actual[sweep_zeros].get(row, u), o.expected[sweep_zeros].get(row, u))
          << row << ", " << u;
    }
    const double e = o.expected[sweep_loss].get(row, 0);
    ASSERT_NEAR(o.actual[sweep_loss].get(row, 0), e, 1e-3 * e) << "loss of row " << row;
  }

  const SweepCase& p_;
  const GridSpec& spec_;
  const Operand& w_;
  const std::vector<std::int64_t>& unit_;
  const std::vector<double>& r_;
};

TEST_P(Sweep, AgreesUpToTiesOfRounding) {
  const SweepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  GridSpec spec;
  spec.bits = p.bits;
  spec.group = p.group;
  spec.symmetric = p.symmetric;
  spec.scale_dtype = p.scale;
  const std::int64_t groups = spec.groups(p.d);

  const Operand w = Operand(Role::inout, DType::f32, p.rows, p.d, p.layout).bell(seed, 0.02);
  const std::vector<double> moment = factor_of_moment(p.d, seed);
  Operand r(Role::input, p.factor, p.d, p.d, p.layout);
  r.fill([&](std::int64_t i, std::int64_t j) { return moment[at(i * p.d + j)]; });

  // Static groups under a changed order: column j of the sweep belongs to the unit of the original
  // column order[j], whose grid was found before.
  const std::vector<std::int32_t> order = random_order(p.d, seed);
  std::vector<std::int64_t> unit(at(p.d));
  for (std::int64_t j = 0; j < p.d; ++j) {
    unit[at(j)] = (p.static_groups ? order[at(j)] : j) / spec.unit(p.d);
  }
  Operand column_group(Role::input, DType::i32, 1, p.static_groups ? p.d : 0);
  column_group.fill([&](std::int64_t, std::int64_t j) { return static_cast<double>(unit[at(j)]); });
  const Role grids = p.static_groups ? Role::input : Role::output;
  Operand scales(grids, DType::f32, p.rows, groups, p.layout);
  Operand zeros(grids, DType::i32, p.rows, groups, p.layout);
  for (std::int64_t row = 0; row < p.rows && p.static_groups; ++row) {
    for (std::int64_t u = 0; u < groups; ++u) {
      std::vector<float> values;
      for (std::int64_t j = 0; j < p.d; ++j) {
        if (unit[at(j)] == u) values.push_back(static_cast<float>(w.get(row, j)));
      }
      const UnitGrid grid = find_unit_grid(values, spec);
      scales.put(row, u, static_cast<double>(grid.scale));
      zeros.put(row, u, static_cast<double>(grid.zero));
    }
  }
  const Operand codes(Role::output, DType::u8, p.rows, p.d, p.layout);
  const Operand loss(Role::output, DType::f64, p.rows, 1, p.layout);

  const Outcome o = run_both({&w, &r, &column_group, &scales, &zeros, &codes, &loss},
                             [&](Ops& ops, const std::vector<View>& v) {
                               const Scratch workspace(
                                   ops, ops.gptq_workspace_bytes(p.rows, p.d, p.block, p.factor));
                               GptqProblem problem;
                               problem.grid = spec;
                               problem.block = p.block;
                               problem.grids_given = p.static_groups;
                               problem.w = v[sweep_w];
                               problem.r = v[sweep_r];
                               problem.column_group = v[sweep_group];
                               problem.scales = v[sweep_scales];
                               problem.zeros = v[sweep_zeros];
                               problem.codes = v[sweep_codes];
                               problem.loss = v[sweep_loss];
                               problem.workspace = workspace.view();
                               ops.gptq_sweep(problem);
                               ops.synchronize();
                             });
  const SweepCheck check(p, spec, w, unit, moment);
  check.own(o.expected, "reference");
  check.own(o.actual, "backend");
  check.both(o);
  if (sides().same_backend) {
    for (const std::size_t i : {sweep_w, sweep_scales, sweep_zeros, sweep_codes, sweep_loss}) {
      expect_exact(o, i);
    }
  }
}

}  // namespace
}  // namespace engine::test
