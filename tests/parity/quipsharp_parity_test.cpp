// Parity of QuIP#'s targets and sweeps (docs/methods/quipsharp.md).
#include <algorithm>
#include <array>
#include <cmath>

#include "engine/weight/e8.h"
#include "engine/weight/e8_search.h"
#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

struct TargetsCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(d) + "_" + layout_name(layout);
  }
};

class QuipSharpTargets : public ::testing::TestWithParam<TargetsCase> {};
INSTANTIATE_TEST_SUITE_P(Solve, QuipSharpTargets,
                         ::testing::Values(TargetsCase{1, 8}, TargetsCase{33, 40, Layout::odd},
                                           TargetsCase{70, 264, Layout::wide},
                                           TargetsCase{128, 32}),
                         case_name<TargetsCase>);

// One division in f32 by a scale from the same f64 operations.
TEST_P(QuipSharpTargets, AreExact) {
  const TargetsCase& p = GetParam();
  const Operand w =
      Operand(Role::input, DType::f32, p.d, p.rows, p.layout).bell(seed_of(p.name()), 0.02);
  const Operand squares =
      Operand(Role::input, DType::f64, 1, 1).fill([](auto, auto) { return 0.731; });
  const Operand out(Role::output, DType::f32, p.rows, p.d, p.layout);
  const Operand scale(Role::output, DType::f32, 1, 1);
  const Outcome o =
      run_both({&w, &squares, &out, &scale}, [](Ops& ops, const std::vector<View>& v) {
        ops.quipsharp_targets(v[0], v[1], 1.03, v[2], v[3]);
      });
  expect_exact(o, 2);
  expect_exact(o, 3);
}

struct SweepCase {
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

void PrintTo(const SweepCase& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// Sizes around blocks, panels of 128, spans of 512, and blocks of threads.
std::vector<SweepCase> sweep_cases() {
  std::vector<SweepCase> cases;
  const std::int64_t rows[] = {1, 5, 33, 70};
  std::size_t turn = 0;
  for (const std::int64_t d : {8, 64, 120, 128, 136, 264, 512, 520, 1160}) {
    for (int bits = 2; bits <= 4; ++bits) {
      const std::int64_t n = d > 512 ? 9 : rows[turn % 4];
      cases.push_back({n, d, bits, turn % 2 == 0 ? DType::f64 : DType::f32, all_layouts[turn % 3]});
      ++turn;
    }
  }
  cases.push_back({300, 136, 2});
  return cases;
}

class QuipSharpSweep : public ::testing::TestWithParam<SweepCase> {};
INSTANTIATE_TEST_SUITE_P(Solve, QuipSharpSweep, ::testing::ValuesIn(sweep_cases()),
                         case_name<SweepCase>);

enum : std::size_t { in_w, in_r, in_h, first_outputs };
// Of each of the three sweeps.
enum : std::size_t { out_e, out_codes, out_residual, out_loss, outputs };

using Point = std::array<float, 8>;

Point first_point(double code) {
  Point p{};
  e8p_point(static_cast<std::uint16_t>(static_cast<std::int16_t>(code)), p);
  return p;
}

Point residual_point(int bits, double code) {
  if (bits == 3) return e8_byte_points()[static_cast<std::size_t>(code)];
  return bits == 4 ? first_point(code) : Point{};
}

double distance(const std::array<double, 8>& x, const Point& p) {
  double sum = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    const double e = x[i] - static_cast<double>(p[i]);
    sum += e * e;
  }
  return sum;
}

// How far from the nearest point of its book the chosen one is, in squared distance.
double excess(const std::array<double, 8>& x, const Point& chosen, bool bytes) {
  Point in{}, best{};
  for (std::size_t i = 0; i < 8; ++i) in[i] = static_cast<float>(x[i]);
  if (bytes) {
    (void)e8_byte_nearest(in, best);
  } else {
    (void)e8p_nearest(in, best);
  }
  return distance(x, chosen) - distance(x, best);
}

// A backend's own results against the definition, in f64. Errors of 1e-5 in D and P, from products
// in halves of bf16, move a target by less than 1e-4 and a squared distance by less than 1e-3; the
// second code sees that magnified by up to 3.45.
void check_side(const SweepCase& c, const std::vector<Operand>& o) {
  const auto scale = static_cast<double>(e8_residual_scale(c.bits));
  for (std::size_t pass = 0; pass < 3; ++pass) {
    SCOPED_TRACE("sweep " + std::to_string(pass));
    const std::size_t at = first_outputs + pass * outputs;
    std::int64_t best = 0;
    for (std::int64_t r = 0; r < c.rows; ++r) {
      for (std::int64_t k = 0; k < c.d / 8; ++k) {
        const std::int64_t place = c.d / 8 - 1 - k;
        const Point q = first_point(o[at + out_codes].get(r, place));
        const Point rest =
            residual_point(c.bits, c.bits > 2 ? o[at + out_residual].get(r, place) : 0);
        for (std::int64_t i = 0; i < 8; ++i) {
          const auto n = static_cast<std::size_t>(7 - i);
          const double value = static_cast<double>(q[n]) + static_cast<double>(rest[n]) / scale;
          ASSERT_NEAR(o[at + out_e].get(r, 8 * k + i), o[in_w].get(r, 8 * k + i) - value, 2e-6);
        }
        if (pass == 2) continue;  // several passes: only the last one's errors are known
        // Blocks before k have their new errors; those after it the first sweep's.
        std::array<double, 8> moved{}, t{};
        const Operand& source = pass == 0 ? o[in_r] : o[in_h];
        for (std::int64_t j = 0; j < (pass == 0 ? 8 * k : c.d); ++j) {
          if (j / 8 == k) continue;
          const double e = o[(j < 8 * k ? at : first_outputs) + out_e].get(r, j);
          for (std::int64_t i = 0; i < 8; ++i) {
            moved[static_cast<std::size_t>(i)] += e * source.get(j, 8 * k + i);
          }
        }
        // moved S^-1: elimination of the transposed system.
        std::array<std::array<double, 8>, 8> a{};
        for (std::int64_t i = 0; i < 8; ++i) {
          for (std::int64_t j = 0; j < 8; ++j) {
            a[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] =
                source.get(8 * k + j, 8 * k + i);
          }
        }
        for (std::size_t i = 0; i < 8; ++i) {
          for (std::size_t j = i + 1; j < 8; ++j) {
            const double f = a[j][i] / a[i][i];
            for (std::size_t x = i; x < 8; ++x) a[j][x] -= f * a[i][x];
            moved[j] -= f * moved[i];
          }
        }
        for (std::size_t i = 8; i-- > 0;) {
          for (std::size_t j = i + 1; j < 8; ++j) moved[i] -= a[i][j] * moved[j];
          moved[i] /= a[i][i];
        }
        std::array<double, 8> left{};
        for (std::size_t i = 0; i < 8; ++i) {
          t[7 - i] = o[in_w].get(r, 8 * k + static_cast<std::int64_t>(i)) + moved[i];
        }
        for (std::size_t i = 0; i < 8; ++i) left[i] = (t[i] - static_cast<double>(q[i])) * scale;
        const double first = excess(t, q, false);
        const double second = c.bits == 2 ? 0.0 : excess(left, rest, c.bits == 3);
        ASSERT_LE(first, 1e-3) << "row " << r << ", block " << k;
        ASSERT_LE(second, 4e-3) << "row " << r << ", block " << k;
        best += first <= 1e-9 && second <= 1e-9 ? 1 : 0;
      }
      double form = 0;
      for (std::int64_t i = 0; i < c.d; ++i) {
        double product = 0;
        for (std::int64_t j = 0; j < c.d; ++j) {
          product += o[in_h].get(i, j) * o[at + out_e].get(r, j);
        }
        form += product * o[at + out_e].get(r, i);
      }
      ASSERT_NEAR(o[at + out_loss].get(r, 0), form, 2e-3 * form);
    }
    if (pass < 2) {
      EXPECT_GE(static_cast<double>(best), 0.98 * static_cast<double>(c.rows * c.d / 8) - 1);
    }
  }
}

// A target near a border between two points may fall to either side, and all that follows in the
// row with it. So every backend is held to the definition, and the backends to each other by what
// they reach and by the rows that are equal.
TEST_P(QuipSharpSweep, TakesTheNearestPoints) {
  const SweepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand w =
      Operand(Role::input, DType::f32, p.rows, p.d, p.layout).bell(seed, p.bits == 3 ? 0.98 : 1.03);
  Operand r(Role::input, p.factor, p.d, p.d, p.layout);
  const double size =
      0.05 * std::sqrt(128.0 / static_cast<double>(std::max<std::int64_t>(p.d, 128)));
  const Operand off = Operand(Role::input, DType::f32, p.d, p.d).bell(seed / 3, size);
  r.fill([&](std::int64_t i, std::int64_t j) {
    if (i > j) return 0.0;
    return i == j ? 0.5 + 1.5 * uniform_value(seed, 4, static_cast<std::uint64_t>(j))
                  : off.get(i, j);
  });
  const std::vector<double> factor = r.values();
  Operand h(Role::input, DType::f32, p.d, p.d, p.layout);
  h.fill([&](std::int64_t i, std::int64_t j) {
    double sum = 0;
    for (std::int64_t k = std::max(i, j); k < p.d; ++k) {
      sum += factor[static_cast<std::size_t>(i * p.d + k)] *
             factor[static_cast<std::size_t>(j * p.d + k)];
    }
    return sum;
  });
  std::vector<Operand> results;
  for (int pass = 0; pass < 3; ++pass) {
    results.emplace_back(Role::output, DType::f32, p.rows, p.d, p.layout);
    results.emplace_back(Role::output, DType::i16, p.rows, p.d / 8, p.layout);
    results.emplace_back(Role::output, p.bits == 3 ? DType::u8 : DType::i16,
                         p.bits == 2 ? 0 : p.rows, p.bits == 2 ? 0 : p.d / 8, p.layout);
    results.emplace_back(Role::output, DType::f64, p.rows, 1, p.layout);
  }
  std::vector<const Operand*> operands = {&w, &r, &h};
  for (const Operand& o : results) operands.push_back(&o);
  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.quipsharp_workspace_bytes(p.rows, p.d));
    const int passes[] = {0, 1, 3};
    for (std::size_t i = 0; i < 3; ++i) {
      const std::size_t at = first_outputs + i * outputs;
      QuipSharpProblem problem;
      problem.bits = p.bits;
      problem.tuning = passes[i];
      problem.w = v[in_w];
      problem.r = v[in_r];
      problem.h = v[in_h];
      problem.e = v[at + out_e];
      problem.codes = v[at + out_codes];
      problem.residual = v[at + out_residual];
      problem.loss = v[at + out_loss];
      problem.workspace = workspace.view();
      ops.quipsharp_sweep(problem);
    }
  });
  if (sides().same_backend) {
    for (std::size_t i = first_outputs; i < o.expected.size(); ++i) {
      if (o.expected[i].rows() > 0) expect_exact(o, i);
    }
  }
  {
    SCOPED_TRACE("reference");
    check_side(p, o.expected);
  }
  SCOPED_TRACE("subject");
  check_side(p, o.actual);
  for (std::size_t pass = 0; pass < 3; ++pass) {
    const std::size_t at = first_outputs + pass * outputs;
    double actual = 0, expected = 0;
    std::int64_t equal_rows = 0;
    for (std::int64_t row = 0; row < p.rows; ++row) {
      actual += o.actual[at + out_loss].get(row, 0);
      expected += o.expected[at + out_loss].get(row, 0);
      bool same = true;
      for (std::int64_t k = 0; k < p.d / 8; ++k) {
        same =
            same && o.actual[at + out_codes].get(row, k) == o.expected[at + out_codes].get(row, k);
      }
      equal_rows += same ? 1 : 0;
    }
    EXPECT_NEAR(actual, expected, 0.05 * expected);
    if (p.d <= 136) {
      EXPECT_GE(static_cast<double>(equal_rows), 0.8 * static_cast<double>(p.rows));
    }
  }
}

}  // namespace
}  // namespace engine::test
