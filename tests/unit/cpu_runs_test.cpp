#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/cpu_attention.h"
#include "engine/ops/cpu_ops.h"
#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

using RunRow = std::array<std::int32_t, run_columns>;

View view_of(const std::vector<RunRow>& runs) {
  return host_view(runs.data()->data(), static_cast<std::int64_t>(runs.size()), run_columns);
}

// The key rows of a run's chain, first to last.
std::vector<std::int64_t> chain_of(const RunRow& run) {
  std::vector<std::int64_t> rows;
  for (std::size_t s = 2; s < run.size(); s += 2) {
    for (std::int32_t i = 0; i < run[s + 1]; ++i) rows.push_back(run[s] + i);
  }
  return rows;
}

std::vector<double> naive_row(const RunRow& run, const AttnShape& shape, const Matrix& q,
                              const Matrix& k, const Matrix& v, std::int64_t query,
                              std::int64_t head) {
  const std::int64_t hd = shape.head_dim;
  const std::int64_t kv_col = head / (shape.heads / shape.kv_heads) * hd;
  std::vector<std::int64_t> chain = chain_of(run);
  chain.resize(chain.size() - static_cast<std::size_t>(run[1] - query - 1));
  std::vector<double> scores;
  for (const std::int64_t row : chain) {
    double s = 0.0;
    for (std::int64_t d = 0; d < hd; ++d) {
      s += q.get(run[0] + query, head * hd + d) * k.get(row, kv_col + d);
    }
    scores.push_back(s / std::sqrt(static_cast<double>(hd)));
  }
  const double peak = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  std::vector<double> out(static_cast<std::size_t>(hd), 0.0);
  for (std::size_t j = 0; j < chain.size(); ++j) {
    const double e = std::exp(scores[j] - peak);
    total += e;
    for (std::int64_t d = 0; d < hd; ++d) {
      out[static_cast<std::size_t>(d)] += e * v.get(chain[j], kv_col + d);
    }
  }
  for (double& x : out) x /= total;
  return out;
}

// Runs of 1 to 64 queries over 1 to 4 spans, with rows that belong to none between them.
std::vector<RunRow> mixed_runs() {
  return {
      RunRow{0, 1, 0, 1},                              // one query, one key
      RunRow{2, 64, 5, 64},                            // as many keys as queries
      RunRow{66, 3, 1, 2, 300, 1},                     // the last span is shorter than the queries
      RunRow{70, 7, 100, 257, 3, 33, 90, 1},           // overlapping, out of order
      RunRow{77, 33, 400, 200, 0, 1, 5, 1, 200, 100},  // four spans
      RunRow{110, 5, 7, 1, 9, 1, 11, 1, 13, 2},        // all of the spans are the queries' own
      RunRow{120, 64, 0, 600, 0, 600},                 // the same keys twice
  };
}

void check(const AttnShape& shape, DType dtype, Isa isa, ThreadPool& pool) {
  SCOPED_TRACE(std::string(dtype_name(dtype)) + " " + isa_name(isa) + " heads " +
               std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " dim " +
               std::to_string(shape.head_dim));
  std::vector<RunRow> runs = mixed_runs();
  Matrix q = Matrix::random(dtype, 190, shape.heads * shape.head_dim, 3, 1, 2.0F);
  Matrix k = Matrix::random(dtype, 600, shape.kv_heads * shape.head_dim, 5, 2, 2.0F);
  Matrix v = Matrix::random(dtype, 600, shape.kv_heads * shape.head_dim, 9, 3);
  Matrix out(dtype, 190, q.cols(), 1);
  cpu_attention_runs(pool, q.view(), k.view(), v.view(), shape, view_of(runs), out.view(), isa);
  out.expect_gaps_untouched();
  std::vector<bool> written(190, false);
  for (const RunRow& run : runs) {
    for (std::int64_t i = 0; i < run[1]; ++i) {
      written[static_cast<std::size_t>(run[0] + i)] = true;
      for (std::int64_t h = 0; h < shape.heads; ++h) {
        const std::vector<double> want = naive_row(run, shape, q, k, v, i, h);
        for (std::int64_t d = 0; d < shape.head_dim; ++d) {
          const double w = want[static_cast<std::size_t>(d)];
          const double tolerance =
              5e-6 + (dtype == DType::f32 ? 0.0 : testing::roundoff(dtype) * std::abs(w));
          const double got = out.get(run[0] + i, h * shape.head_dim + d);
          ASSERT_TRUE(close(got, w, tolerance))
              << "run from " << run[0] << " query " << i << " head " << h << " element " << d
              << ": " << got << ", expected " << w;
        }
      }
    }
  }
  // Matrices start as NaN.
  for (std::int64_t r = 0; r < 190; ++r) {
    for (std::int64_t c = 0; c < out.cols() && !written[static_cast<std::size_t>(r)]; ++c) {
      ASSERT_TRUE(std::isnan(out.get(r, c))) << "row " << r << " is in no run";
    }
  }
}

TEST(CpuRuns, MatchNaiveLoops) {
  ThreadPool pool(2);
  for (const Isa isa : testing::supported_isas()) {
    for (const DType dtype : testing::float_dtypes) {
      check({2, 2, 18}, dtype, isa, pool);
      check({8, 2, 32}, dtype, isa, pool);
    }
    // More lanes than a task has, and a run cut into 22 tasks.
    check({10, 1, 8}, DType::f32, isa, pool);
    check({80, 1, 2}, DType::f32, isa, pool);
  }
}

// A sequence in pieces of unequal length, over one span or several, gives what attention gives for
// the whole.
TEST(CpuRuns, PiecesOfOneSequenceMakeTheWhole) {
  const AttnShape shape{4, 2, 32};
  ThreadPool pool(2);
  for (const DType dtype : testing::float_dtypes) {
    Matrix q = Matrix::random(dtype, 300, 128, 0, 1, 2.0F);
    Matrix k = Matrix::random(dtype, 340, 64, 0, 2);
    Matrix v = Matrix::random(dtype, 340, 64, 0, 3);
    Matrix whole(dtype, 300, 128);
    cpu_attention(pool, q.view(), k.view(), v.view(), shape, 1, whole.view());
    std::vector<RunRow> runs;
    std::vector<RunRow> cut;
    for (std::int32_t first = 0, n = 1; first < 300; first += n, n = std::min(64, n + 7)) {
      n = std::min(n, 300 - first);
      const std::int32_t keys = 40 + first + n;
      runs.push_back({first, n, 0, keys});
      cut.push_back({first, n, 0, 13, 13, 20, 33, keys - 34, keys - 1, 1});
    }
    Matrix pieces(dtype, 300, 128);
    cpu_attention_runs(pool, q.view(), k.view(), v.view(), shape, view_of(runs), pieces.view());
    Matrix spans(dtype, 300, 128);
    cpu_attention_runs(pool, q.view(), k.view(), v.view(), shape, view_of(cut), spans.view());
    for (std::int64_t r = 0; r < 300; ++r) {
      for (std::int64_t c = 0; c < 128; ++c) {
        const double want = whole.get(r, c);
        const double tolerance = 2e-6 + 2.0 * testing::roundoff(dtype) * std::abs(want);
        ASSERT_TRUE(close(pieces.get(r, c), want, tolerance)) << r << " " << c;
        ASSERT_TRUE(close(spans.get(r, c), want, tolerance)) << r << " " << c;
      }
    }
  }
}

TEST(CpuRuns, SameBitsForAnyNumberOfThreads) {
  ThreadPool one(1);
  ThreadPool two(2);
  std::vector<RunRow> runs = mixed_runs();
  Matrix q = Matrix::random(DType::bf16, 190, 256, 0, 1);
  Matrix k = Matrix::random(DType::bf16, 600, 64, 0, 2);
  Matrix v = Matrix::random(DType::bf16, 600, 64, 0, 3);
  Matrix first(DType::bf16, 190, 256);
  Matrix second(DType::bf16, 190, 256);
  cpu_attention_runs(one, q.view(), k.view(), v.view(), {8, 2, 32}, view_of(runs), first.view());
  cpu_attention_runs(two, q.view(), k.view(), v.view(), {8, 2, 32}, view_of(runs), second.view());
  EXPECT_TRUE(first == second);
}

// What the queries of a run do not see does not matter, whatever it is: other rows, and the keys of
// later queries.
TEST(CpuRuns, HiddenKeysDoNotMatter) {
  ThreadPool pool(1);
  std::vector<RunRow> runs = {{0, 3, 4, 10, 20, 2, 30, 3}};
  const AttnShape shape{2, 1, 16};
  Matrix q = Matrix::random(DType::f32, 3, 32, 0, 1);
  Matrix k = Matrix::random(DType::f32, 40, 16, 0, 2);
  Matrix v = Matrix::random(DType::f32, 40, 16, 0, 3);
  Matrix before(DType::f32, 3, 32);
  Matrix after(DType::f32, 3, 32);
  cpu_attention_runs(pool, q.view(), k.view(), v.view(), shape, view_of(runs), before.view());
  const std::vector<std::int64_t> chain = chain_of(runs[0]);
  for (std::int64_t r = 0; r < 40; ++r) {
    const bool seen = std::find(chain.begin(), chain.end(), r) != chain.end();
    for (std::int64_t c = 0; c < 16 && (!seen || r == 32); ++c) {
      k.put(r, c, seen ? 9.0F : std::numeric_limits<float>::quiet_NaN());
      v.put(r, c, seen ? 1e4F : std::numeric_limits<float>::quiet_NaN());
    }
  }
  cpu_attention_runs(pool, q.view(), k.view(), v.view(), shape, view_of(runs), after.view());
  for (std::int64_t c = 0; c < 32; ++c) {
    EXPECT_EQ(before.get(0, c), after.get(0, c));
    EXPECT_EQ(before.get(1, c), after.get(1, c));
    EXPECT_FALSE(std::isnan(after.get(2, c)));
    EXPECT_NE(before.get(2, c), after.get(2, c)) << "the last query sees its own key";
  }
}

// The message of the error that `runs` over 100 queries and 50 keys give; empty if none.
std::string refusal(const std::vector<RunRow>& runs) {
  ThreadPool pool(1);
  Matrix q = Matrix::random(DType::f32, 100, 16, 0, 1);
  Matrix k = Matrix::random(DType::f32, 50, 16, 0, 2);
  Matrix out(DType::f32, 100, 16);
  try {
    cpu_attention_runs(pool, q.view(), k.view(), k.view(), {1, 1, 16}, view_of(runs), out.view());
  } catch (const Error& e) {
    return e.what();
  }
  return {};
}

TEST(CpuRuns, RefusesRunsThatAreNone) {
  EXPECT_EQ(refusal({{0, 64, 0, 50, 0, 14}, {64, 36, 0, 50}}), "");
  const std::vector<std::pair<std::vector<RunRow>, std::string>> wrong = {
      {{{0, 0, 0, 5}}, "1 to 64 queries within 100 rows, found 0 from 0"},
      {{{0, -1, 0, 5}}, "1 to 64 queries within 100 rows, found -1 from 0"},
      {{{0, 65, 0, 50, 0, 50}}, "found 65 from 0"},
      {{{-1, 2, 0, 5}}, "found 2 from -1"},
      {{{99, 2, 0, 5}}, "found 2 from 99"},
      {{{2147483647, 64, 0, 50, 0, 50}}, "found 64 from 2147483647"},
      {{{0, 1}}, "expected 1 to 2^30 keys, found 0"},
      {{{0, 6, 0, 5}}, "expected 6 to 2^30 keys, found 5"},
      {{{0, 1, 46, 5}}, "span 0: expected rows within 50, found 5 from 46"},
      {{{0, 1, -1, 5}}, "span 0: expected rows within 50, found 5 from -1"},
      {{{0, 1, 0, 5, 1, -3}}, "span 1: expected rows within 50, found -3 from 1"},
      {{{0, 1, 0, 5, 2147483647, 2147483647}}, "span 1: expected rows within 50"},
      {{{0, 1, 0, 5, 3, 0}}, "span 1: expected row 0 of an unused span, found 3"},
      {{{0, 1, 0, 5, 0, 0, 7, 2}}, "span 2: expected none after an unused one, found 2 keys"},
      {{{10, 5, 0, 5}, {5, 6, 0, 9}}, "two runs write row 10"},
      {{{5, 1, 0, 5}, {7, 1, 0, 5}, {5, 1, 0, 5}}, "two runs write row 5"},
  };
  for (const auto& [runs, part] : wrong) {
    const std::string found = refusal(runs);
    EXPECT_NE(found.find(part), std::string::npos) << "expected " << part << ", found " << found;
  }
}

TEST(CpuRuns, RefusesWrongShapes) {
  CpuOps ops(1);
  std::vector<RunRow> runs = {{0, 2, 0, 2}};
  Matrix q(DType::f32, 4, 64), k(DType::f32, 4, 32), half(DType::f16, 4, 32),
      out(DType::f32, 4, 64);
  const View r = view_of(runs);
  const auto run = [&](View qv, View kv, View vv, AttnShape shape, View rv, View ov) {
    ops.attention_runs(qv, kv, vv, shape, rv, ov);
  };
  const View narrow = r.col_range(0, 4);
  EXPECT_THROW(run(q.view(), k.view(), k.view(), {2, 1, 30}, r, out.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), k.view(), {2, 0, 32}, r, out.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), half.view(), {2, 1, 32}, r, out.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), k.view().row_range(0, 3), {2, 1, 32}, r, out.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), k.view(), {2, 1, 32}, r, k.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), k.view(), {2, 1, 32}, narrow, out.view()), Error);
  EXPECT_THROW(run(q.view(), k.view(), k.view(), {2, 1, 32}, k.view(), out.view()), Error);
  // Nothing to do is no error.
  run(q.view(), k.view(), k.view(), {2, 1, 32}, r.row_range(0, 0), out.view());
  EXPECT_TRUE(std::isnan(out.get(0, 0)));
}

TEST(CpuRopeRows, IsRopeAtEachRowsPosition) {
  CpuOps ops(2);
  const std::int64_t rows = 150, half = 9, head_dim = 2 * half;
  Matrix cos = Matrix::random(DType::f32, 40, half, 2, 11);
  Matrix sin = Matrix::random(DType::f32, 40, half, 3, 12);
  std::vector<std::int32_t> positions;
  for (std::int64_t r = 0; r < rows; ++r) {
    positions.push_back(static_cast<std::int32_t>(r * 17 % 40));
    positions.push_back(-1);  // a stride of two
  }
  View at = host_view(positions.data(), rows, 2);
  for (const DType d : testing::float_dtypes) {
    Matrix x = Matrix::random(d, rows, 3 * head_dim, 4, 5);
    Matrix want = x;
    ops.rope_rows(x.view(), head_dim, cos.view(), sin.view(), at.col_range(0, 1));
    for (std::int64_t r = 0; r < rows; ++r) {
      ops.rope(want.view().row_range(r, 1), head_dim, cos.view(), sin.view(), {r * 17 % 40, 1});
    }
    x.expect_gaps_untouched();
    EXPECT_TRUE(x == want) << dtype_name(d);
  }
}

TEST(CpuRopeRows, RefusesWrongPositions) {
  CpuOps ops(1);
  Matrix table = Matrix::random(DType::f32, 10, 8, 0, 1);
  Matrix x = Matrix::random(DType::f32, 2, 16, 0, 1);
  const auto refused = [&](std::vector<std::int32_t> positions) {
    const View at = host_view(positions.data(), static_cast<std::int64_t>(positions.size()), 1);
    try {
      ops.rope_rows(x.view(), 16, table.view(), table.view(), at);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(refused({0, 9}), "");
  EXPECT_NE(refused({0, 10}).find("row 1: expected a position below 10, found 10"),
            std::string::npos);
  EXPECT_NE(refused({-1, 0}).find("row 0: expected a position below 10, found -1"),
            std::string::npos);
  EXPECT_NE(refused({0, 1, 2}).find("expected positions i32 [2, 1]"), std::string::npos);
}

}  // namespace
}  // namespace engine
