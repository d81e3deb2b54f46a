// Parity of rotary embedding and attention.
#include <algorithm>
#include <cmath>

#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// ---- rope ----

struct RopeCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  Positions positions;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "rows_" +
           std::to_string(heads) + "x" + std::to_string(head_dim) + "_from" +
           std::to_string(positions.start) + "every" + std::to_string(positions.period) + "_" +
           layout_name(layout);
  }
};

std::vector<RopeCase> rope_cases() {
  std::vector<RopeCase> cases;
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t head_dim : {2, 6, 32, 64, 80, 128}) {
        for (const std::int64_t rows : {1, 2, 3, 4, 5, 17, 33, 129}) {
          cases.push_back({dtype, rows, 1 + rows % 4, head_dim, {0, rows}, layout});
        }
        // Two and a half sequences of 6, after a cache of 40.
        cases.push_back({dtype, 15, 2, head_dim, {40, 6}, layout});
        // One token for each of five sequences.
        cases.push_back({dtype, 5, 2, head_dim, {63, 1}, layout});
      }
    }
    cases.push_back({dtype, 3, 32, 128, {8189, 3}, Layout::tight});
  }
  return cases;
}

class Rope : public ::testing::TestWithParam<RopeCase> {};
INSTANTIATE_TEST_SUITE_P(Attention, Rope, ::testing::ValuesIn(rope_cases()), case_name<RopeCase>);

// The contract names every rounding, so the result is exact.
TEST_P(Rope, IsExact) {
  const RopeCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x =
      Operand(Role::inout, p.dtype, p.rows, p.heads * p.head_dim, p.layout).bell(seed);
  const std::int64_t half = p.head_dim / 2;
  // The table ends at the last position that is used.
  const std::int64_t positions = p.positions.start + std::min(p.rows, p.positions.period);
  const auto angle = [&](std::int64_t at, std::int64_t j) {
    return static_cast<double>(at) *
           std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(half));
  };
  Operand cos(Role::input, DType::f32, positions, half, p.layout);
  Operand sin(Role::input, DType::f32, positions, half, p.layout);
  cos.fill([&](std::int64_t at, std::int64_t j) { return std::cos(angle(at, j)); });
  sin.fill([&](std::int64_t at, std::int64_t j) { return std::sin(angle(at, j)); });
  const Outcome o = run_both({&x, &cos, &sin}, [&p](Ops& ops, const std::vector<View>& v) {
    ops.rope(v[0], p.head_dim, v[1], v[2], p.positions);
  });
  expect_exact(o, 0);
  // And it is a rotation: the pair's length stays, up to three roundings of each part.
  const std::int64_t r = p.rows - 1;
  const double a = x.get(r, 0), b = x.get(r, half);
  const double c = o.actual[0].get(r, 0), d = o.actual[0].get(r, half);
  EXPECT_NEAR(std::hypot(c, d), std::hypot(a, b), 8.0 * roundoff(p.dtype) * std::hypot(a, b));
}

// ---- attention ----

struct AttentionCase {
  DType dtype = DType::f32;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads = 0;
  std::int64_t share = 0;  // query heads per key head
  std::int64_t batch = 0;
  std::int64_t q_len = 0;
  std::int64_t past = 0;  // kv_len - q_len
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_dim" + std::to_string(head_dim) + "_kv" +
           std::to_string(kv_heads) + "x" + std::to_string(share) + "_batch" +
           std::to_string(batch) + "_q" + std::to_string(q_len) + "_past" + std::to_string(past) +
           "_" + layout_name(layout);
  }
};

// Every dtype, head size, q_len and past; sharing, batch and layout take turns with coprime
// periods, so that each meets each.
std::vector<AttentionCase> attention_cases() {
  std::vector<AttentionCase> cases;
  const std::int64_t shares[] = {1, 4, 8};
  std::size_t turn = 0;
  for (const DType dtype : small_floats) {
    for (const std::int64_t head_dim : {32, 64, 80, 128}) {
      for (const std::int64_t q_len : {1, 2, 5, 64, 127, 200}) {
        for (const std::int64_t past : {0, 1, 63, 300}) {
          const std::int64_t share = shares[turn % 3];
          const std::int64_t batch = turn / 3 % 2 == 0 ? 1 : 3;
          const bool large = q_len >= 64;
          const Layout layout = all_layouts[turn / 5 % 3];
          cases.push_back(
              {dtype, head_dim, large ? 1 : 2, share, large ? 1 : batch, q_len, past, layout});
          ++turn;
        }
      }
      cases.push_back({dtype, head_dim, 2, 4, 3, 64, 1, Layout::wide});
      cases.push_back({dtype, head_dim, 1, 8, 3, 1, 2047, Layout::tight});
      cases.push_back({dtype, head_dim, 2, 1, 1, 8, 500, Layout::wide});
      cases.push_back({dtype, head_dim, 2, 1, 1, 9, 500, Layout::wide});
    }
  }
  return cases;
}

class Attention : public ::testing::TestWithParam<AttentionCase> {};
INSTANTIATE_TEST_SUITE_P(Attention, Attention, ::testing::ValuesIn(attention_cases()),
                         case_name<AttentionCase>);

// The largest |row| over the parts of head_dim columns.
double largest_norm(const Operand& x, std::int64_t head_dim) {
  double largest = 0.0;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    for (std::int64_t c = 0; c < x.cols(); c += head_dim) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < head_dim; ++j) sum += x.get(r, c + j) * x.get(r, c + j);
      largest = std::max(largest, sum);
    }
  }
  return std::sqrt(largest);
}

Body attend(const AttnShape& shape, const AttentionCase& p) {
  return [shape, &p](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(
        ops, ops.attention_workspace_bytes(shape, p.batch, p.q_len, p.q_len + p.past));
    ops.attention(v[0], v[1], v[2], shape, p.batch, v[3], workspace.view());
    ops.synchronize();
  };
}

TEST_P(Attention, StaysWithinTheRoundingOfItsWeights) {
  const AttentionCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const AttnShape shape{p.kv_heads * p.share, p.kv_heads, p.head_dim};
  const std::int64_t kv_len = p.q_len + p.past;
  const Operand q =
      Operand(Role::input, p.dtype, p.batch * p.q_len, shape.heads * p.head_dim, p.layout)
          .bell(seed, 2.0);  // scores of deviation 2: some keys clearly win
  const Operand k =
      Operand(Role::input, p.dtype, p.batch * kv_len, p.kv_heads * p.head_dim, p.layout)
          .bell(seed / 3);
  const Operand v =
      Operand(Role::input, p.dtype, p.batch * kv_len, p.kv_heads * p.head_dim, p.layout)
          .bell(seed / 7);
  const Operand out(Role::output, p.dtype, q.rows(), q.cols(), p.layout);
  const Outcome o = run_both({&q, &k, &v, &out}, attend(shape, p));

  // sum_j p_j |v_j| of each output element, by attention itself over |v|.
  Operand magnitudes = v;
  magnitudes.fill([&](std::int64_t r, std::int64_t c) { return std::abs(v.get(r, c)); });
  const Outcome m = run_both({&q, &k, &magnitudes, &out}, attend(shape, p));

  // A score is off by the roundings of its sum and of its exponential's argument, which makes a
  // relative error of its weight. A backend may round the weights to the dtype before they meet v;
  // f32 has no such step. The sum over v rounds as any sum; the result is rounded once.
  const double score = largest_norm(q, p.head_dim) * largest_norm(k, p.head_dim) /
                       std::sqrt(static_cast<double>(p.head_dim));
  const double weight = 2.0 * sum_tolerance(p.head_dim, score) + 4.0 * roundoff(DType::f32) * score;
  const double step = p.dtype == DType::f32 ? 0.0 : roundoff(p.dtype);
  std::vector<double> each;
  const std::vector<double> values = o.expected[3].values();
  const std::vector<double> sums = m.expected[3].values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    each.push_back((weight + step) * sums[i] + sum_tolerance(kv_len, sums[i]) +
                   store_tolerance(p.dtype, std::abs(values[i])));
  }
  expect_close(o, 3, {0.0, 0.0, each});
}

// What lies behind a sequence's keys, and the keys that causality hides, must not leak: hidden keys
// and values are made huge, infinite or NaN, and the visible part of the output stays what it was.
TEST_P(Attention, HiddenKeysDoNotMatter) {
  const AttentionCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const AttnShape shape{p.kv_heads * p.share, p.kv_heads, p.head_dim};
  const std::int64_t kv_len = p.q_len + p.past;
  const Operand q =
      Operand(Role::input, p.dtype, p.batch * p.q_len, shape.heads * p.head_dim, p.layout)
          .bell(seed);
  Operand k(Role::input, p.dtype, p.batch * kv_len, p.kv_heads * p.head_dim, p.layout);
  Operand v = k;
  k.bell(seed / 3);
  v.bell(seed / 7);
  const Operand out(Role::output, p.dtype, q.rows(), q.cols(), p.layout);
  const Outcome before = run_both({&q, &k, &v, &out}, attend(shape, p));
  // The last key of each sequence is seen by its last query only.
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t c = 0; c < k.cols(); ++c) {
      k.put((b + 1) * kv_len - 1, c, c % 2 == 0 ? 60000.0 : -60000.0);
      v.put((b + 1) * kv_len - 1, c, 60000.0);
    }
  }
  const Outcome after = run_both({&q, &k, &v, &out}, attend(shape, p));
  const auto visible = [&](const Operand& x) {
    std::vector<double> values;
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      if (r % p.q_len == p.q_len - 1) continue;
      for (std::int64_t c = 0; c < x.cols(); ++c) values.push_back(x.get(r, c));
    }
    return values;
  };
  const auto last = [&](const Operand& x) {
    std::vector<double> values;
    for (std::int64_t c = 0; c < x.cols(); ++c) values.push_back(x.get(x.rows() - 1, c));
    return values;
  };
  EXPECT_TRUE(compare_close(visible(after.expected[3]), visible(before.expected[3]), {}).ok);
  const Comparison c = compare_close(visible(after.actual[3]), visible(before.actual[3]), {});
  EXPECT_TRUE(c.ok) << c.message;
  EXPECT_NE(last(after.actual[3]), last(before.actual[3])) << "the last query must see its own key";
}

}  // namespace
}  // namespace engine::test
