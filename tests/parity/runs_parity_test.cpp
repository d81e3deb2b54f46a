// Parity of rotation by row and of attention over runs.
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

// ---- rope_rows ----

struct RopeRowsCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t positions = 0;  // of the tables
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "rows_" +
           std::to_string(heads) + "x" + std::to_string(head_dim) + "_of" +
           std::to_string(positions) + "_" + layout_name(layout);
  }
};

std::vector<RopeRowsCase> rope_rows_cases() {
  std::vector<RopeRowsCase> cases;
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t head_dim : {2, 6, 64, 96, 128}) {
        cases.push_back({dtype, 1, 3, head_dim, 1, layout});
        cases.push_back({dtype, 5, 1, head_dim, 40, layout});
        cases.push_back({dtype, 33, 2, head_dim, 7, layout});
        cases.push_back({dtype, 129, 4, head_dim, 300, layout});
      }
    }
    cases.push_back({dtype, 3, 32, 128, 8192, Layout::tight});
  }
  return cases;
}

class RopeRows : public ::testing::TestWithParam<RopeRowsCase> {};
INSTANTIATE_TEST_SUITE_P(Runs, RopeRows, ::testing::ValuesIn(rope_rows_cases()),
                         case_name<RopeRowsCase>);

TEST_P(RopeRows, IsExact) {
  const RopeRowsCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x =
      Operand(Role::inout, p.dtype, p.rows, p.heads * p.head_dim, p.layout).bell(seed);
  const std::int64_t half = p.head_dim / 2;
  const auto angle = [&](std::int64_t at, std::int64_t j) {
    return static_cast<double>(at) *
           std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(half));
  };
  const Operand cos =
      Operand(Role::input, DType::f32, p.positions, half, p.layout)
          .fill([&](std::int64_t at, std::int64_t j) { return std::cos(angle(at, j)); });
  const Operand sin =
      Operand(Role::input, DType::f32, p.positions, half, p.layout)
          .fill([&](std::int64_t at, std::int64_t j) { return std::sin(angle(at, j)); });
  Operand at = Operand(Role::input, DType::i32, p.rows, 1, p.layout).uniform(seed / 3, p.positions);
  at.put(p.rows - 1, 0, static_cast<double>(p.positions - 1));  // the table's last row
  const Outcome o = run_both({&x, &cos, &sin, &at}, [&p](Ops& ops, const std::vector<View>& v) {
    ops.rope_rows(v[0], p.head_dim, v[1], v[2], v[3]);
  });
  expect_exact(o, 0);
  // On either side it is rope of the single row.
  const std::int64_t row = p.rows / 2;
  const Positions position{static_cast<std::int64_t>(at.get(row, 0)), 1};
  const Outcome single = run_both({&x, &cos, &sin}, [&](Ops& ops, const std::vector<View>& v) {
    ops.rope(v[0].row_range(row, 1), p.head_dim, v[1], v[2], position);
  });
  for (std::int64_t c = 0; c < x.cols(); ++c) {
    ASSERT_EQ(o.actual[0].get(row, c), single.actual[0].get(row, c)) << "column " << c;
  }
}

// ---- attention_runs ----

struct Span {
  std::int64_t row = 0;
  std::int64_t keys = 0;
};

struct RunPlan {
  std::int64_t first = 0;  // query row
  std::int64_t queries = 0;
  std::vector<Span> spans;
  [[nodiscard]] std::int64_t keys() const {
    std::int64_t sum = 0;
    for (const Span& s : spans) sum += s.keys;
    return sum;
  }
};

// The runs of a case and the matrices they are in.
struct Plan {
  std::vector<RunPlan> runs;
  std::int64_t query_rows = 0;
  std::int64_t key_rows = 0;

  // The op's operand; pairs that are not used are 0.
  [[nodiscard]] Operand operand(Layout layout) const {
    return Operand(Role::input, DType::i32, static_cast<std::int64_t>(runs.size()), run_columns,
                   layout)
        .fill([this](std::int64_t r, std::int64_t c) {
          const RunPlan& run = runs[static_cast<std::size_t>(r)];
          if (c < 2) return static_cast<double>(c == 0 ? run.first : run.queries);
          const auto s = static_cast<std::size_t>(c / 2 - 1);
          if (s >= run.spans.size()) return 0.0;
          return static_cast<double>(c % 2 == 0 ? run.spans[s].row : run.spans[s].keys);
        });
  }
  [[nodiscard]] std::vector<bool> written() const {
    std::vector<bool> rows(static_cast<std::size_t>(query_rows), false);
    for (const RunPlan& run : runs) {
      for (std::int64_t i = 0; i < run.queries; ++i) {
        rows[static_cast<std::size_t>(run.first + i)] = true;
      }
    }
    return rows;
  }
  [[nodiscard]] std::vector<bool> read() const {
    std::vector<bool> rows(static_cast<std::size_t>(key_rows), false);
    for (const RunPlan& run : runs) {
      for (const Span& s : run.spans) {
        for (std::int64_t i = 0; i < s.keys; ++i) rows[static_cast<std::size_t>(s.row + i)] = true;
      }
    }
    return rows;
  }
};

struct RunsCase {
  DType dtype = DType::f32;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads = 0;
  std::int64_t share = 0;  // query heads per key head
  std::int64_t queries = 0;
  std::int64_t keys = 0;
  std::int64_t spans = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_dim" + std::to_string(head_dim) + "_kv" +
           std::to_string(kv_heads) + "x" + std::to_string(share) + "_q" + std::to_string(queries) +
           "_keys" + std::to_string(keys) + "_in" + std::to_string(spans) + "_" +
           layout_name(layout);
  }
};

// `keys` in `count` pieces of odd length, except for the last.
std::vector<std::int64_t> pieces(std::int64_t keys, std::int64_t count) {
  std::vector<std::int64_t> lengths;
  for (std::int64_t left = std::min(count, keys); left > 1; --left) {
    lengths.push_back(std::min((keys / left) | 1, keys - left + 1));
    keys -= lengths.back();
  }
  lengths.push_back(keys);
  return lengths;
}

// Three runs: the case's own; one that shares all its keys but the last piece; one over a single
// piece. Query rows between the runs belong to none, key rows between the pieces to no chain, and
// later pieces lie before earlier ones.
Plan make_plan(const RunsCase& p) {
  Plan plan;
  std::vector<Span> own;
  for (const std::int64_t n : pieces(p.keys, p.spans)) own.push_back({0, n});
  const std::int64_t few = (p.queries + 1) / 2;
  Span other{0, few + 2};
  Span single{0, p.keys};
  std::int64_t row = 2;
  const auto place = [&row](Span& s) {
    s.row = row;
    row += s.keys + 3;
  };
  place(single);
  place(other);
  for (auto s = own.rbegin(); s != own.rend(); ++s) place(*s);
  plan.key_rows = row;
  std::vector<Span> shared(own.begin(), own.end() - 1);
  shared.push_back(other);
  plan.runs = {{1, p.queries, own}, {0, few, shared}, {0, p.queries, {single}}};
  plan.runs[1].first = p.queries + 3;
  plan.runs[2].first = plan.runs[1].first + few;
  plan.query_rows = plan.runs[2].first + p.queries + 2;
  return plan;
}

// Every dtype, head size, number of queries and of keys before them; pieces, sharing and layout
// take turns with coprime periods.
std::vector<RunsCase> runs_cases() {
  std::vector<RunsCase> cases;
  const std::int64_t shares[] = {1, 4, 8};
  std::size_t turn = 0;
  for (const DType dtype : small_floats) {
    for (const std::int64_t head_dim : {32, 64, 96, 128}) {
      for (const std::int64_t queries : {1, 2, 15, 17, 33, 64}) {
        for (const std::int64_t past : {0, 1, 63, 65, 257}) {
          const std::int64_t share = shares[turn % 3];
          const auto spans = static_cast<std::int64_t>(1 + turn / 7 % 4);
          const Layout layout = all_layouts[turn / 2 % 3];
          cases.push_back({dtype, head_dim, share > 1 ? 1 : 2, share, queries, queries + past,
                           std::min(spans, queries + past), layout});
          ++turn;
        }
      }
      ++turn;  // other turns for the next head size
      cases.push_back({dtype, head_dim, 2, 4, 64, 3000, 4, Layout::tight});
      cases.push_back({dtype, head_dim, 1, 8, 7, 2999, 3, Layout::wide});
      cases.push_back({dtype, head_dim, 3, 1, 64, 64, 4, Layout::wide});
      cases.push_back({dtype, head_dim, 3, 4, 1, 4, 4, Layout::tight});
      cases.push_back({dtype, head_dim, 1, 4, 64, 513, 2, Layout::odd});
    }
    cases.push_back({dtype, 6, 3, 2, 20, 50, 2, Layout::odd});
    cases.push_back({dtype, 256, 1, 2, 40, 111, 3, Layout::tight});
  }
  return cases;
}

class AttentionRuns : public ::testing::TestWithParam<RunsCase> {};
INSTANTIATE_TEST_SUITE_P(Runs, AttentionRuns, ::testing::ValuesIn(runs_cases()),
                         case_name<RunsCase>);

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

// Bell values in the rows that are used; NaN in the others, and in what they would reach.
Operand used_rows(DType dtype, const std::vector<bool>& used, std::int64_t cols, Layout layout,
                  std::uint64_t seed, double scale) {
  Operand x(Role::input, dtype, static_cast<std::int64_t>(used.size()), cols, layout);
  x.bell(seed, scale);
  for (std::size_t r = 0; r < used.size(); ++r) {
    if (used[r]) continue;
    for (std::int64_t c = 0; c < cols; ++c) x.put(static_cast<std::int64_t>(r), c, nan_value);
  }
  return x;
}

// The largest |row| over the parts of head_dim columns of the used rows.
double largest_norm(const Operand& x, const std::vector<bool>& used, std::int64_t head_dim) {
  double largest = 0.0;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    for (std::int64_t c = 0; used[static_cast<std::size_t>(r)] && c < x.cols(); c += head_dim) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < head_dim; ++j) sum += x.get(r, c + j) * x.get(r, c + j);
      largest = std::max(largest, sum);
    }
  }
  return std::sqrt(largest);
}

// Row by row, the used ones only.
std::vector<double> values_of(const Operand& x, const std::vector<bool>& used) {
  std::vector<double> values;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    for (std::int64_t c = 0; used[static_cast<std::size_t>(r)] && c < x.cols(); ++c) {
      values.push_back(x.get(r, c));
    }
  }
  return values;
}

Body attend(const AttnShape& shape) {
  return [shape](Ops& ops, const std::vector<View>& v) {
    ops.attention_runs(v[0], v[1], v[2], shape, v[3], v[4]);
  };
}

// Both sides rounded each step as they may: see the test of attention.
std::vector<double> tolerances(DType dtype, std::int64_t head_dim, double score, std::int64_t keys,
                               const std::vector<double>& values, const std::vector<double>& sums) {
  const double weight = 2.0 * sum_tolerance(head_dim, score) + 4.0 * roundoff(DType::f32) * score;
  const double step = dtype == DType::f32 ? 0.0 : roundoff(dtype);
  std::vector<double> each;
  for (std::size_t i = 0; i < values.size(); ++i) {
    each.push_back((weight + step) * sums[i] + sum_tolerance(keys, sums[i]) +
                   store_tolerance(dtype, std::abs(values[i])));
  }
  return each;
}

TEST_P(AttentionRuns, StaysWithinTheRoundingOfItsWeights) {
  const RunsCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const AttnShape shape{p.kv_heads * p.share, p.kv_heads, p.head_dim};
  const Plan plan = make_plan(p);
  const std::vector<bool> written = plan.written(), read = plan.read();
  const std::int64_t kv_cols = p.kv_heads * p.head_dim;
  // Scores of deviation 2: some keys clearly win.
  const Operand q = used_rows(p.dtype, written, kv_cols * p.share, p.layout, seed, 2.0);
  const Operand k = used_rows(p.dtype, read, kv_cols, p.layout, seed / 3, 1.0);
  const Operand v = used_rows(p.dtype, read, kv_cols, p.layout, seed / 7, 1.0);
  const Operand runs = plan.operand(p.layout);
  const Operand out(Role::output, p.dtype, q.rows(), q.cols(), p.layout);
  const Outcome o = run_both({&q, &k, &v, &runs, &out}, attend(shape));
  if (sides().same_backend) expect_exact(o, 4);

  // sum_j p_j |v_j| of each output element, by the op itself over |v|.
  Operand magnitudes = v;
  magnitudes.fill([&](std::int64_t r, std::int64_t c) { return std::abs(v.get(r, c)); });
  const Outcome m = run_both({&q, &k, &magnitudes, &runs, &out}, attend(shape));
  const double score = largest_norm(q, written, p.head_dim) * largest_norm(k, read, p.head_dim) /
                       std::sqrt(static_cast<double>(p.head_dim));
  const std::vector<double> expected = values_of(o.expected[4], written);
  const std::vector<double> each = tolerances(p.dtype, p.head_dim, score, p.keys + 2, expected,
                                              values_of(m.expected[4], written));
  const Comparison c = compare_close(values_of(o.actual[4], written), expected, {0.0, 0.0, each});
  EXPECT_TRUE(c.ok) << c.message;

  // Rows in no run stay as they were.
  const std::size_t row = static_cast<std::size_t>(q.cols()) * dtype_bytes(p.dtype);
  for (const Operand* found : {&o.expected[4], &o.actual[4]}) {
    const std::vector<std::byte> bytes = found->element_bytes();
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      ASSERT_TRUE(written[i / row] || bytes[i] == std::byte{0xFF})
          << (found == &o.actual[4] ? "backend" : "reference") << ": row " << i / row;
    }
  }
}

// A key that only the last query sees changes that query and no other, whatever it is.
TEST_P(AttentionRuns, HiddenKeysDoNotMatter) {
  const RunsCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const AttnShape shape{p.kv_heads * p.share, p.kv_heads, p.head_dim};
  const Plan plan = make_plan(p);
  std::vector<bool> visible = plan.written();
  const std::vector<bool> read = plan.read();
  const std::int64_t kv_cols = p.kv_heads * p.head_dim;
  const Operand q = used_rows(p.dtype, visible, kv_cols * p.share, p.layout, seed, 1.0);
  Operand k = used_rows(p.dtype, read, kv_cols, p.layout, seed / 3, 1.0);
  Operand v = used_rows(p.dtype, read, kv_cols, p.layout, seed / 7, 1.0);
  const Operand runs = plan.operand(p.layout);
  const Operand out(Role::output, p.dtype, q.rows(), q.cols(), p.layout);
  const Outcome before = run_both({&q, &k, &v, &runs, &out}, attend(shape));
  for (const RunPlan& run : plan.runs) {
    const std::int64_t last = run.spans.back().row + run.spans.back().keys - 1;
    for (std::int64_t c = 0; c < kv_cols; ++c) {
      k.put(last, c, c % 2 == 0 ? 60000.0 : -60000.0);
      v.put(last, c, 60000.0);
    }
  }
  const Outcome after = run_both({&q, &k, &v, &runs, &out}, attend(shape));
  for (const RunPlan& run : plan.runs) {
    const std::int64_t last = run.first + run.queries - 1;
    visible[static_cast<std::size_t>(last)] = false;
    std::vector<bool> only(visible.size(), false);
    only[static_cast<std::size_t>(last)] = true;
    if (run.keys() == 1) continue;
    EXPECT_NE(values_of(after.actual[4], only), values_of(before.actual[4], only))
        << "the last query must see its own key";
  }
  const Comparison c =
      compare_close(values_of(after.actual[4], visible), values_of(before.actual[4], visible), {});
  EXPECT_TRUE(c.ok) << c.message;
}

// A sequence cut into runs is the sequence, on each side for itself.
TEST(AttentionRunsEdges, PiecesOfASequenceMakeTheWhole) {
  for (const DType dtype : small_floats) {
    for (const std::int64_t head_dim : {64, 80, 128}) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " " + std::to_string(head_dim));
      const AttnShape shape{4, 2, head_dim};
      const std::int64_t n = 300, past = 20;
      Plan plan;
      for (std::int64_t first = 0, size = 5; first < n; first += size, size = size * 3 % 64 + 1) {
        size = std::min(size, n - first);
        const std::int64_t keys = past + first + size;
        plan.runs.push_back({first, size, {{0, 11}, {11, 7}, {18, keys - 18}}});
      }
      plan.query_rows = n;
      plan.key_rows = n + past;
      const std::vector<bool> all(static_cast<std::size_t>(n), true);
      const std::vector<bool> keys(static_cast<std::size_t>(n + past), true);
      const Operand q = used_rows(dtype, all, 4 * head_dim, Layout::tight, 11, 2.0);
      const Operand k = used_rows(dtype, keys, 2 * head_dim, Layout::tight, 12, 1.0);
      const Operand v = used_rows(dtype, keys, 2 * head_dim, Layout::tight, 13, 1.0);
      const Operand runs = plan.operand(Layout::tight);
      const Operand out(Role::output, dtype, n, 4 * head_dim);
      const Outcome o = run_both({&q, &k, &v, &runs, &out}, attend(shape));
      const Outcome w = run_both({&q, &k, &v, &out}, [&](Ops& ops, const std::vector<View>& views) {
        const Scratch workspace(ops, ops.attention_workspace_bytes(shape, 1, n, n + past));
        ops.attention(views[0], views[1], views[2], shape, 1, views[3], workspace.view());
        ops.synchronize();
      });
      const double score = largest_norm(q, all, head_dim) * largest_norm(k, keys, head_dim) /
                           std::sqrt(static_cast<double>(head_dim));
      // Every weight is at most 1 and they sum to 1, so the largest |v| bounds the sums.
      const double bound = 5.0;
      for (const auto& [whole, cut] :
           {std::pair(&w.expected[3], &o.expected[4]), std::pair(&w.actual[3], &o.actual[4])}) {
        const std::vector<double> expected = whole->values();
        const std::vector<double> each = tolerances(dtype, head_dim, score, n + past, expected,
                                                    std::vector<double>(expected.size(), bound));
        const Comparison c = compare_close(cut->values(), expected, {0.0, 0.0, each});
        EXPECT_TRUE(c.ok) << c.message;
      }
    }
  }
}

// More runs than a grid has rows: each of one query, over one to three keys with known values.
TEST(AttentionRunsEdges, ManyRuns) {
  const std::int64_t n = 70000;
  for (const DType dtype : small_floats) {
    Plan plan;
    plan.query_rows = plan.key_rows = n;
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t keys = 1 + r % 3;
      plan.runs.push_back({r, 1, {{std::min(r, n - keys), keys}}});
    }
    // Equal scores: the result is the mean of whole numbers, which repeat every 8 rows.
    const Operand q =
        Operand(Role::input, dtype, n, 32).fill([](std::int64_t, std::int64_t) { return 0.0; });
    const Operand v = Operand(Role::input, dtype, n, 32).fill([](std::int64_t r, std::int64_t c) {
      return static_cast<double>((r + c) % 8);
    });
    const Operand runs = plan.operand(Layout::tight);
    const Operand out(Role::output, dtype, n, 32);
    const Outcome o = run_both({&q, &v, &v, &runs, &out}, attend({1, 1, 32}));
    std::vector<double> expected;
    for (const RunPlan& run : plan.runs) {
      for (std::int64_t c = 0; c < 32; ++c) {
        double sum = 0.0;
        for (std::int64_t i = 0; i < run.spans[0].keys; ++i) {
          sum += static_cast<double>((run.spans[0].row + i + c) % 8);
        }
        expected.push_back(sum / static_cast<double>(run.spans[0].keys));
      }
    }
    const double tolerance = 2.0 * roundoff(dtype);
    for (const Operand* found : {&o.expected[4], &o.actual[4]}) {
      const Comparison c = compare_close(found->values(), expected, {0.0, tolerance});
      EXPECT_TRUE(c.ok) << dtype_name(dtype) << ": " << c.message;
    }
  }
}

TEST(AttentionRunsEdges, NoRunsWriteNothing) {
  const Operand q = Operand(Role::input, DType::f16, 4, 64).bell(1);
  const Operand runs(Role::input, DType::i32, 0, run_columns);
  const Operand out(Role::output, DType::f16, 4, 64);
  const Outcome o = run_both({&q, &q, &q, &runs, &out}, attend({2, 2, 32}));
  for (const std::byte b : o.actual[4].element_bytes()) ASSERT_EQ(b, std::byte{0xFF});
}

}  // namespace
}  // namespace engine::test
