// Parity of the distance between two rows of logits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

constexpr double infinity = std::numeric_limits<double>::infinity();

// How far apart the two rows are.
enum class Distance { equal, tiny, small, large, unrelated, offset, huge, ties };

struct CompareCase {
  std::int64_t rows = 0;
  std::int64_t vocab = 0;
  Layout layout = Layout::tight;
  Distance distance = Distance::small;
  [[nodiscard]] std::string name() const {
    const char* names[] = {"equal",     "tiny",   "small", "large",
                           "unrelated", "offset", "huge",  "ties"};
    return std::to_string(rows) + "x" + std::to_string(vocab) + "_" + layout_name(layout) + "_" +
           names[static_cast<int>(distance)];
  }
};

std::vector<CompareCase> compare_cases() {
  std::vector<CompareCase> cases;
  for (const Distance distance :
       {Distance::equal, Distance::tiny, Distance::small, Distance::large, Distance::unrelated,
        Distance::offset, Distance::huge, Distance::ties}) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t vocab : {1, 2, 31, 1025, 4096}) {
        for (const std::int64_t rows : {1, 7}) cases.push_back({rows, vocab, layout, distance});
      }
      cases.push_back({2, 32000, layout, distance});
      cases.push_back({3, 128256, layout, distance});
    }
  }
  return cases;
}

class CompareLogits : public ::testing::TestWithParam<CompareCase> {
 protected:
  void SetUp() override {
    const CompareCase& p = GetParam();
    const std::uint64_t seed = seed_of(p.name());
    const double size = p.distance == Distance::huge ? 2500.0 : 3.0;
    reference_ = Operand(Role::input, DType::f32, p.rows, p.vocab, p.layout).bell(seed, size);
    const Operand noise = Operand(Role::input, DType::f32, p.rows, p.vocab).bell(seed / 3);
    if (p.distance == Distance::ties) {
      const Operand plain = reference_;
      reference_.fill([&](std::int64_t r, std::int64_t c) { return std::round(plain.get(r, c)); });
    }
    logits_ = Operand(Role::input, DType::f32, p.rows, p.vocab, p.layout);
    logits_.fill([&](std::int64_t r, std::int64_t c) {
      const double v = reference_.get(r, c), n = noise.get(r, c);
      switch (p.distance) {
        case Distance::equal:
          return v;
        case Distance::tiny:
          return v + 1e-4 * n;
        case Distance::small:
          return v + 0.03 * n;
        case Distance::large:
          return v + 2.0 * n;
        case Distance::unrelated:
          return 3.0 * n;
        case Distance::offset:
          return v + 0.25 * n + 10000.0;
        case Distance::huge:
          return v + 100.0 * n;
        case Distance::ties:
          return v + std::round(0.4 * n);
      }
      return v;
    });
    target_ = Operand(Role::input, DType::i32, p.rows, 1, p.layout).uniform(seed, p.vocab);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      if (r % 4 == 3) target_.put(r, 0, r % 8 == 3 ? -1.0 : -100.0);
    }
  }

  [[nodiscard]] Outcome run() const {
    const Operand out(Role::output, DType::f64, GetParam().rows, 4, GetParam().layout);
    return run_both(
        {&reference_, &logits_, &target_, &out},
        [](Ops& ops, const std::vector<View>& v) { ops.compare_logits(v[0], v[1], v[2], v[3]); });
  }

  Operand reference_, logits_, target_;
};
INSTANTIATE_TEST_SUITE_P(Compare, CompareLogits, ::testing::ValuesIn(compare_cases()),
                         case_name<CompareCase>);

// Logarithms: as row_nll, each exponential is off by the rounding of its argument, the sum by its
// roundings. The divergence D is a sum of p (e^d - 1 - d): an error e of d counts by |q - p|, which
// adds up to at most sqrt(2 D) (Pinsker), and e is a few roundings of log p and log q. For those
// far from 0, rounding is relative to D. Errors of the sums of exponentials count by their square.
// An emulation in f32 stays below 0.15 of this bound.
TEST_P(CompareLogits, WithinTheRoundingOfItsSums) {
  const CompareCase& p = GetParam();
  const Outcome o = run();
  const double u = roundoff(DType::f32);
  const double sum = 8.0 + 32.0 + 2.0 * std::sqrt(static_cast<double>(p.vocab));
  const double log_tolerance = 2.0 * sum * u;
  std::vector<double> each;
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const double d = o.expected[3].get(r, 0);
    each.push_back(24.0 * u * std::sqrt(2.0 * d) + 16.0 * u * d + std::pow(32.0 * u, 2.0));
    each.push_back(0.0);  // agreement is exact
    for (const std::int64_t c : {2, 3}) {
      each.push_back(log_tolerance +
                     4.0 * roundoff(DType::f64) * std::abs(o.expected[3].get(r, c)));
    }
  }
  expect_close(o, 3, {0.0, 0.0, each});
  for (std::int64_t r = 0; r < p.rows; ++r) {
    EXPECT_GE(o.actual[3].get(r, 0), 0.0) << r;
    if (p.distance == Distance::equal) {
      EXPECT_EQ(o.actual[3].get(r, 0), 0.0) << r;
      EXPECT_EQ(o.actual[3].get(r, 1), 1.0) << r;
      EXPECT_EQ(o.actual[3].get(r, 2), o.actual[3].get(r, 3)) << r;
    } else if (p.vocab > 1 && p.distance != Distance::huge && p.distance != Distance::ties) {
      EXPECT_GT(o.expected[3].get(r, 0), 0.0) << r;
    }
    if (r % 4 == 3) {
      EXPECT_EQ(o.actual[3].get(r, 2), 0.0) << r;
      EXPECT_EQ(o.actual[3].get(r, 3), 0.0) << r;
    }
  }
}

// The first maximum wins, wherever the block's threads find the others.
TEST_P(CompareLogits, TiesGoToTheLowestColumn) {
  const CompareCase& p = GetParam();
  if (p.distance != Distance::ties || p.vocab < 2) GTEST_SKIP() << "rows without ties";
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const std::int64_t first = (r * 7919) % (p.vocab - 1);
    for (const std::int64_t c : {first, p.vocab / 2, p.vocab - 1}) {
      if (c >= first) reference_.put(r, c, 40.0);
    }
    // Every other row agrees.
    logits_.put(r, p.vocab - 1, 40.0);
    if (r % 2 == 0) logits_.put(r, first, 40.0);
  }
  const Outcome o = run();
  for (std::int64_t r = 0; r < p.rows; ++r) {
    EXPECT_EQ(o.actual[3].get(r, 1), r % 2 == 0 ? 1.0 : 0.0) << r;
    EXPECT_EQ(o.expected[3].get(r, 1), r % 2 == 0 ? 1.0 : 0.0) << r;
  }
}

TEST_P(CompareLogits, NanAndInfinityGiveNan) {
  const CompareCase& p = GetParam();
  if (p.rows < 7 || p.distance != Distance::large) GTEST_SKIP() << "one distance is enough";
  const double bad[] = {std::nan(""), infinity, -infinity};
  for (std::int64_t r = 0; r < 6; ++r) {
    (r < 3 ? reference_ : logits_).put(r, (r * 577) % p.vocab, bad[r % 3]);
  }
  const Outcome o = run();
  for (const std::vector<Operand>* side : {&o.expected, &o.actual}) {
    for (std::int64_t r = 0; r < 7; ++r) {
      for (std::int64_t c = 0; c < 4; ++c) {
        const double v = side->at(3).get(r, c);
        if (r == 3 && c >= 2) {
          EXPECT_EQ(v, 0.0) << "no target";
        } else {
          EXPECT_EQ(std::isnan(v), r < 6) << "row " << r << ", column " << c << ": " << v;
        }
      }
    }
  }
}

// The logarithms are those of row_nll to the bit.
TEST_P(CompareLogits, LogarithmsAreTheLossOfRowNll) {
  const CompareCase& p = GetParam();
  const Operand out(Role::output, DType::f64, p.rows, 4, p.layout);
  const Operand nll(Role::output, DType::f64, p.rows, 2, p.layout);
  const Outcome o = run_both({&reference_, &logits_, &target_, &out, &nll},
                             [](Ops& ops, const std::vector<View>& v) {
                               ops.compare_logits(v[0], v[1], v[2], v[3]);
                               ops.row_nll(v[0], v[2], v[4].col_range(0, 1));
                               ops.row_nll(v[1], v[2], v[4].col_range(1, 1));
                             });
  for (const std::vector<Operand>* side : {&o.expected, &o.actual}) {
    for (std::int64_t r = 0; r < p.rows; ++r) {
      EXPECT_EQ(side->at(3).get(r, 2), -side->at(4).get(r, 0)) << r;
      EXPECT_EQ(side->at(3).get(r, 3), -side->at(4).get(r, 1)) << r;
    }
  }
}

}  // namespace
}  // namespace engine::test
