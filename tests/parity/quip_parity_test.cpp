// Parity of QuIP's ops.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/parity/sweep_support.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

struct MatrixCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  DType dtype = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "x" + std::to_string(d) +
           "_" + layout_name(layout);
  }
};

std::vector<MatrixCase> matrix_cases() {
  std::vector<MatrixCase> cases;
  std::size_t turn = 0;
  for (const std::int64_t rows : {1, 2, 31, 33, 130}) {
    for (const std::int64_t d : {1, 5, 32, 129, 256, 300}) {
      cases.push_back({rows, d, small_floats[turn % 3], all_layouts[turn / 3 % 3]});
      ++turn;
    }
  }
  cases.push_back({700, 768, DType::bf16, Layout::tight});
  return cases;
}

class Elementwise : public ::testing::TestWithParam<MatrixCase> {};
INSTANTIATE_TEST_SUITE_P(Quip, Elementwise, ::testing::ValuesIn(matrix_cases()),
                         case_name<MatrixCase>);

TEST_P(Elementwise, ColumnSquares) {
  const MatrixCase& p = GetParam();
  const Operand w =
      Operand(Role::input, p.dtype, p.rows, p.d, p.layout).bell(seed_of(p.name()), 0.02);
  const Operand out(Role::output, DType::f64, 1, p.d);
  const Outcome o = run_both(
      {&w, &out}, [](Ops& ops, const std::vector<View>& v) { ops.column_squares(v[0], v[1]); });
  // Positive terms, each exact in f64, in another order.
  expect_close(o, 1, {0.0, 1e-13 * static_cast<double>(p.rows)});
  for (std::int64_t j = 0; j < p.d; ++j) {
    double sum = 0;
    for (std::int64_t r = 0; r < p.rows; ++r) sum += w.get(r, j) * w.get(r, j);
    ASSERT_NEAR(o.actual[1].get(0, j), sum, 1e-13 * static_cast<double>(p.rows) * sum) << j;
  }
}

TEST_P(Elementwise, ScaleMoment) {
  const MatrixCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  Operand h = Operand(Role::input, DType::f32, p.d, p.d, p.layout).bell(seed);
  for (std::int64_t i = 0; i < p.d; ++i) {  // only the lower triangle is defined
    for (std::int64_t j = i + 1; j < p.d; ++j)
      h.put(i, j, std::numeric_limits<double>::quiet_NaN());
  }
  const Operand s = Operand(Role::input, DType::f32, 1, p.rows % 2 == 0 ? 0 : p.d).bell(seed / 3);
  const Operand out(Role::output, DType::f32, p.d, p.d, p.layout);
  const Outcome o = run_both({&h, &s, &out}, [](Ops& ops, const std::vector<View>& v) {
    ops.scale_moment(v[0], v[1], 0.37, v[2]);
  });
  expect_exact(o, 2);
  for (std::int64_t i = 0; i < p.d; ++i) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      const double factor = s.cols() == 0 ? 1.0 : s.get(0, i) * s.get(0, j);
      const double v = 0.37 * factor * h.get(std::max(i, j), std::min(i, j));
      ASSERT_NEAR(o.actual[2].get(i, j), v, 1e-7 * std::abs(v)) << i << ", " << j;
    }
  }
}

TEST_P(Elementwise, CodeTargets) {
  const MatrixCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const int bits = 2 + static_cast<int>(seed % 3);
  const Operand w = Operand(Role::input, DType::f32, p.rows, p.d, p.layout).bell(seed, 0.02);
  const std::vector<std::int32_t> order = random_order(p.d, seed);
  Operand perm(Role::input, DType::i32, 1, p.d);
  perm.fill([&](std::int64_t, std::int64_t j) { return static_cast<double>(order[at(j)]); });
  for (const bool per_row : {false, true}) {
    Operand scales(Role::input, DType::f32, per_row ? p.rows : 1, 1, p.layout);
    scales.fill(
        [&](std::int64_t r, std::int64_t) { return 0.01 + 0.02 * uniform_value(seed, 9, at(r)); });
    const Operand zeros = Operand(Role::input, DType::i32, per_row ? p.rows : 0, 1, p.layout)
                              .uniform(seed, 1 << bits);
    const Operand out(Role::output, DType::f32, p.rows, p.d, p.layout);
    const Outcome o =
        run_both({&w, &perm, &scales, &zeros, &out}, [&](Ops& ops, const std::vector<View>& v) {
          ops.code_targets(v[0], v[1], v[2], v[3], bits, v[4]);
        });
    expect_exact(o, 4);  // IEEE division and addition
    const double top = (1 << bits) - 1;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (std::int64_t j = 0; j < p.d; ++j) {
        const std::int64_t unit = per_row ? r : 0;
        const double zero = per_row ? zeros.get(unit, 0) : top / 2;
        const double v = std::clamp(w.get(r, order[at(j)]) / scales.get(unit, 0) + zero, 0.0, top);
        ASSERT_NEAR(o.actual[4].get(r, j), v, 1e-5) << r << ", " << j;
      }
    }
  }
}

// ---- the sweep and the greedy pass ----

struct SolveCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  int bits = 2;
  DType factor = DType::f64;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_b" + std::to_string(bits) + "_" +
           dtype_name(factor) + "_" + layout_name(layout);
  }
};

std::vector<SolveCase> solve_cases() {
  std::vector<SolveCase> cases;
  const std::int64_t rows[] = {1, 2, 3, 4, 5, 17, 33, 129, 200};
  std::size_t turn = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const std::int64_t d : {1, 31, 128, 131, 300, 512, 645, 700}) {
      cases.push_back({rows[turn % 9], d, bits, turn % 2 == 0 ? DType::f64 : DType::f32,
                       all_layouts[turn / 2 % 3]});
      ++turn;
    }
  }
  return cases;
}

class Ldlq : public ::testing::TestWithParam<SolveCase> {
 protected:
  void SetUp() override {
    const SolveCase& p = GetParam();
    seed_ = seed_of(p.name());
    top_ = (1 << p.bits) - 1;
    r_ = factor_of_moment(p.d, seed_);
    w_ = Operand(Role::inout, DType::f32, p.rows, p.d, p.layout).bell(seed_, 0.25 * top_);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (std::int64_t j = 0; j < p.d; ++j) {
        w_.put(r, j, std::clamp(w_.get(r, j) + top_ / 2, 0.0, top_));
      }
    }
  }
  std::uint64_t seed_ = 0;
  double top_ = 0;
  std::vector<double> r_;
  Operand w_;
};
INSTANTIATE_TEST_SUITE_P(Quip, Ldlq, ::testing::ValuesIn(solve_cases()), case_name<SolveCase>);

enum : std::size_t { ldlq_w, ldlq_r, ldlq_codes, ldlq_loss };

// Every code of one side is the nearest to what the side's own errors before it make of the target,
// up to the rounding of that sum: E R / R_jj over j terms, whose quotients are rounded to f32 too.
void check_sweep(const std::vector<Operand>& side, const Operand& w, const Operand& r, double top,
                 const char* who) {
  const std::int64_t rows = w.rows(), d = w.cols();
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<double> value(at(d)), magnitude(at(d)), error(at(d));
    for (std::int64_t j = 0; j < d; ++j) {
      value[at(j)] = w.get(row, j);
      magnitude[at(j)] = std::abs(w.get(row, j)) + 1.0;
    }
    for (std::int64_t k = 0; k < d; ++k) {
      error[at(k)] = side[ldlq_codes].get(row, k) - w.get(row, k);
      ASSERT_NEAR(side[ldlq_w].get(row, k), error[at(k)], 1e-7 * (top + 1)) << who << row << k;
      for (std::int64_t j = k + 1; j < d; ++j) {
        const double part = error[at(k)] * r.get(k, j) / r.get(j, j);
        value[at(j)] -= part;
        magnitude[at(j)] += std::abs(part);
      }
    }
    double loss = 0;
    for (std::int64_t j = 0; j < d; ++j) {
      const double tolerance = 2 * sum_tolerance(j + 2, magnitude[at(j)]);
      const double code = side[ldlq_codes].get(row, j);
      const double least = std::clamp(std::floor(value[at(j)] - tolerance + 0.5), 0.0, top);
      const double most = std::clamp(std::floor(value[at(j)] + tolerance + 0.5), 0.0, top);
      ASSERT_GE(code, least) << who << ": row " << row << ", column " << j;
      ASSERT_LE(code, most) << who << ": row " << row << ", column " << j;
      loss += std::pow((code - value[at(j)]) * r.get(j, j), 2);
    }
    ASSERT_NEAR(side[ldlq_loss].get(row, 0), loss, 1e-4 * loss + 1e-9) << who << ": row " << row;
  }
}

TEST_P(Ldlq, SweepRoundsToTheNearest) {
  const SolveCase& p = GetParam();
  Operand r(Role::input, p.factor, p.d, p.d, p.layout);
  r.fill([&](std::int64_t i, std::int64_t j) { return r_[at(i * p.d + j)]; });
  const Operand codes(Role::output, DType::u8, p.rows, p.d, p.layout);
  const Operand loss(Role::output, DType::f64, p.rows, 1, p.layout);
  const Outcome o = run_both({&w_, &r, &codes, &loss}, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.ldlq_workspace_bytes(p.rows, p.d));
    ops.ldlq_sweep({.bits = p.bits,
                    .w = v[ldlq_w],
                    .r = v[ldlq_r],
                    .codes = v[ldlq_codes],
                    .loss = v[ldlq_loss],
                    .workspace = workspace.view()});
    ops.synchronize();
  });
  check_sweep(o.expected, w_, r, top_, "reference");
  check_sweep(o.actual, w_, r, top_, "backend");
  // A value that close to a boundary is rare: about 1e-6 of them.
  std::int64_t other_rows = 0;
  for (std::int64_t row = 0; row < p.rows; ++row) {
    bool same = true;
    for (std::int64_t j = 0; j < p.d; ++j) {
      same = same && o.actual[ldlq_codes].get(row, j) == o.expected[ldlq_codes].get(row, j);
    }
    other_rows += same ? 0 : 1;
  }
  EXPECT_LE(other_rows, 1 + p.rows / 20);
  if (sides().same_backend) {
    for (const std::size_t i : {ldlq_w, ldlq_codes, ldlq_loss}) expect_exact(o, i);
  }
}

enum : std::size_t { greedy_e, greedy_h, greedy_codes, greedy_changed };

// Each step of one side goes to the nearest integer of the minimum that its own errors say, those
// before the column as the pass left them, the others as it found them.
void check_greedy(const std::vector<Operand>& side, const Operand& e, const Operand& h,
                  const Operand& codes, double top, const char* who) {
  const std::int64_t rows = e.rows(), d = e.cols();
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<double> product(at(d), 0.0), magnitude(at(d), 0.0);
    for (std::int64_t k = 0; k < d; ++k) {
      for (std::int64_t j = 0; j < d; ++j) {
        product[at(j)] += e.get(row, k) * h.get(k, j);
        magnitude[at(j)] += std::abs(e.get(row, k) * h.get(k, j));
      }
    }
    std::int64_t changed = 0;
    for (std::int64_t j = 0; j < d; ++j) {
      const double step = std::nearbyint(e.get(row, j) - side[greedy_e].get(row, j));
      ASSERT_NEAR(side[greedy_e].get(row, j), e.get(row, j) - step, 1e-6 * (top + 1)) << who;
      const double pivot = h.get(j, j);
      const double tolerance = 2 * sum_tolerance(d + j, magnitude[at(j)] / pivot) + 1e-6;
      ASSERT_NEAR(step, product[at(j)] / pivot, 0.5 + tolerance)
          << who << ": row " << row << ", column " << j;
      const double code = codes.get(row, j);
      const double after = std::clamp(code - step, 0.0, top);
      ASSERT_EQ(side[greedy_codes].get(row, j), after) << who << ": row " << row << ", " << j;
      changed += after == code ? 0 : 1;
      for (std::int64_t k = j + 1; k < d; ++k) {
        product[at(k)] -= step * h.get(j, k);
        magnitude[at(k)] += std::abs(step * h.get(j, k));
      }
    }
    ASSERT_EQ(side[greedy_changed].get(row, 0), static_cast<double>(changed)) << who << ": " << row;
  }
}

TEST_P(Ldlq, GreedyPassGoesToTheMinimum) {
  const SolveCase& p = GetParam();
  Operand h(Role::input, DType::f32, p.d, p.d, p.layout);
  h.fill([&](std::int64_t i, std::int64_t j) {
    double sum = 0;
    for (std::int64_t k = std::max(i, j); k < p.d; ++k) {
      sum += r_[at(i * p.d + k)] * r_[at(j * p.d + k)];
    }
    return sum;
  });
  // Starting points that no sweep made, so that much changes.
  Operand codes(Role::inout, DType::u8, p.rows, p.d, p.layout);
  Operand e(Role::inout, DType::f32, p.rows, p.d, p.layout);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t j = 0; j < p.d; ++j) {
      const double target = w_.get(r, j);
      const double noise = 2.0 * uniform_value(seed_, 8, at(r * p.d + j)) - 0.5;
      const double code = std::clamp(std::floor(target + noise), 0.0, top_);
      codes.put(r, j, code);
      e.put(r, j, code - target);
    }
  }
  const Operand changed(Role::output, DType::i32, p.rows, 1, p.layout);
  const Outcome o = run_both({&e, &h, &codes, &changed}, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.greedy_workspace_bytes(p.rows, p.d));
    ops.ldlq_greedy({.bits = p.bits,
                     .e = v[greedy_e],
                     .h = v[greedy_h],
                     .codes = v[greedy_codes],
                     .changed = v[greedy_changed],
                     .workspace = workspace.view()});
    ops.synchronize();
  });
  check_greedy(o.expected, e, h, codes, top_, "reference");
  check_greedy(o.actual, e, h, codes, top_, "backend");
  if (sides().same_backend) {
    for (const std::size_t i : {greedy_e, greedy_codes, greedy_changed}) expect_exact(o, i);
  }
}

}  // namespace
}  // namespace engine::test
