// Parity of attention with one query per sequence.
#include <algorithm>
#include <cmath>

#include "tests/parity/step_support.h"

namespace engine::test {
namespace {

struct AttentionStepCase {
  DType dtype = DType::f32;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads = 0;
  std::int64_t share = 0;  // query heads per key head
  std::int64_t batch = 0;
  std::int64_t position = 0;
  std::int64_t capacity = 0;
  bool codes = false;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + (codes ? "_codes" : "_plain") + "_dim" +
           std::to_string(head_dim) + "_kv" + std::to_string(kv_heads) + "x" +
           std::to_string(share) + "_batch" + std::to_string(batch) + "_at" +
           std::to_string(position) + "of" + std::to_string(capacity) + "_" + layout_name(layout);
  }
};

// Every dtype, head size, position and kind of cache; sharing, batch, capacity and layout take
// turns with coprime periods.
std::vector<AttentionStepCase> attention_cases() {
  std::vector<AttentionStepCase> cases;
  const std::int64_t shares[] = {1, 4, 8};
  const std::int64_t batches[] = {1, 3, 1, 16, 3};
  std::size_t turn = 0;
  for (const DType dtype : small_floats) {
    for (const std::int64_t head_dim : {32, 64, 80, 128}) {
      for (const bool codes : {false, true}) {
        for (const std::int64_t position : {0, 1, 15, 63, 64, 200, 1000}) {
          // The unaligned layout takes the simple kernel; most cases should not.
          const Layout layout =
              turn % 7 == 6 ? Layout::odd : (turn / 2 % 2 == 0 ? Layout::tight : Layout::wide);
          const std::int64_t batch = position > 500 ? 1 : batches[turn % 5];
          const std::int64_t capacity = turn % 4 == 0 ? position + 1 : turn % 4 == 1 ? 1500 : 1024;
          cases.push_back({dtype, head_dim, 1 + static_cast<std::int64_t>(turn % 2),
                           shares[turn % 3], batch, position,
                           batch > 3 ? std::min<std::int64_t>(capacity, 300) : capacity, codes,
                           layout});
          ++turn;
        }
      }
    }
    for (const bool codes : {false, true}) {
      if (dtype == DType::f32) continue;
      cases.push_back({dtype, 128, 8, 4, 1, 1000, 1500, codes, Layout::tight});
      cases.push_back({dtype, 128, 2, 8, 3, 1499, 1500, codes, Layout::wide});
      cases.push_back({dtype, 128, 2, 4, 16, 200, 256, codes, Layout::tight});
      cases.push_back({dtype, 64, 1, 8, 1, 1499, 1500, codes, Layout::tight});
      cases.push_back({dtype, 128, 1, 12, 1, 333, 700, codes, Layout::tight});  // two row tiles
      cases.push_back({dtype, 32, 2, 17, 2, 130, 400, codes, Layout::tight});
      cases.push_back({dtype, 256, 1, 2, 2, 100, 101, codes, Layout::tight});
    }
  }
  return cases;
}

class AttentionStep : public ::testing::TestWithParam<AttentionStepCase> {};
INSTANTIATE_TEST_SUITE_P(Step, AttentionStep, ::testing::ValuesIn(attention_cases()),
                         case_name<AttentionStepCase>);

// One half of the cache: the tokens up to the position, poison behind them. Codes never are 0, so
// that |code - 128| is a code, too.
void fill_half(const AttentionStepCase& p, std::uint64_t seed, bool magnitudes, Operand& x,
               Operand& scale) {
  Operand values = Operand(Role::input, DType::f32, x.rows(), x.cols()).bell(seed);
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    if (r % p.capacity > p.position) continue;
    for (std::int64_t c = 0; c < x.cols(); ++c) {
      double value = values.get(r, c);
      if (p.codes) value = std::clamp(std::nearbyint(value * 40.0), -127.0, 127.0);
      if (magnitudes) value = std::abs(value);
      x.put(r, c, p.codes ? 128.0 + value : value);
    }
    if (!p.codes) continue;
    for (std::int64_t h = 0; h < p.kv_heads; ++h) {
      const auto index = static_cast<std::uint64_t>(r * p.kv_heads + h);
      scale.put(r, h, (0.5 + uniform_value(seed, 9, index)) / 40.0);
    }
  }
}

CacheOperands filled_cache(const AttentionStepCase& p, std::uint64_t seed, bool magnitudes) {
  CacheOperands c = make_cache(Role::input, p.dtype, p.codes, p.batch * p.capacity, p.kv_heads,
                               p.head_dim, p.layout);
  fill_half(p, seed / 3, false, c.k, c.k_scale);
  fill_half(p, seed / 7, magnitudes, c.v, c.v_scale);
  return c;
}

// Twice with one workspace, which the first call must leave as it found it.
Outcome attend(const AttentionStepCase& p, const Operand& q, const CacheOperands& c) {
  const AttnShape shape{p.kv_heads * p.share, p.kv_heads, p.head_dim};
  const Operand out(Role::output, p.dtype, q.rows(), q.cols(), p.layout);
  const Operand again = out;
  const Operand position = scalar(Role::input, p.position);
  return run_both({&q, &c.k, &c.v, &c.k_scale, &c.v_scale, &position, &out, &again},
                  [&](Ops& ops, const std::vector<View>& v) {
                    const Scratch workspace(ops,
                                            ops.attention_step_bytes(shape, p.batch, p.capacity));
                    if (!workspace.view().empty()) ops.zero(workspace.view());
                    const KvCache cache = cache_of(v, 1, p.batch, p.capacity);
                    ops.attention_step(v[0], cache, shape, v[5], v[6], workspace.view());
                    ops.attention_step(v[0], cache, shape, v[5], v[7], workspace.view());
                    ops.synchronize();
                  });
}

double largest_norm(const Operand& x, std::int64_t head_dim, std::int64_t rows) {
  double largest = 0.0;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < x.cols(); c += head_dim) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < head_dim; ++j) sum += x.get(r, c + j) * x.get(r, c + j);
      largest = std::max(largest, sum);
    }
  }
  return std::sqrt(largest);
}

// An upper bound for the norm of a key of a filled cache.
double largest_key(const AttentionStepCase& p, const CacheOperands& c) {
  double largest = 0.0;
  for (std::int64_t r = 0; r < c.k.rows(); ++r) {
    if (r % p.capacity > p.position) continue;
    for (std::int64_t h = 0; h < p.kv_heads; ++h) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < p.head_dim; ++j) {
        const double code = c.k.get(r, h * p.head_dim + j);
        const double value = p.codes ? (code - 128.0) * c.k_scale.get(r, h) : code;
        sum += value * value;
      }
      largest = std::max(largest, sum);
    }
  }
  return std::sqrt(largest) * 1.01;  // values of codes are rounded once more
}

// The rows behind the position are NaN (codes: with scales that are NaN), so they cannot matter.
TEST_P(AttentionStep, StaysWithinTheRoundingOfItsWeights) {
  const AttentionStepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand q =
      Operand(Role::input, p.dtype, p.batch, p.kv_heads * p.share * p.head_dim, p.layout)
          .bell(seed, 2.0);  // scores of deviation 2: some keys clearly win
  const CacheOperands cache = filled_cache(p, seed, false);
  const Outcome o = attend(p, q, cache);
  const Comparison c = compare_bytes(o.actual[7].element_bytes(), o.actual[6].element_bytes());
  EXPECT_TRUE(c.ok) << "the second run differs: " << c.message;

  // sum_j p_j |v_j| of each output element, by attention itself over |v|.
  const Outcome m = attend(p, q, filled_cache(p, seed, true));

  // As for AttnOps::attention: a score is off by the roundings of its sum and of its exponential's
  // argument, which makes a relative error of its weight; a backend may round the weights to the
  // dtype before they meet v; the sum over v rounds as any sum; the result is rounded once.
  const double score = largest_norm(q, p.head_dim, q.rows()) * largest_key(p, cache) /
                       std::sqrt(static_cast<double>(p.head_dim));
  const double weight = 2.0 * sum_tolerance(p.head_dim, score) + 4.0 * roundoff(DType::f32) * score;
  const double step = p.dtype == DType::f32 ? 0.0 : roundoff(p.dtype);
  std::vector<double> each;
  const std::vector<double> values = o.expected[6].values();
  const std::vector<double> sums = m.expected[6].values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    each.push_back((weight + step) * sums[i] + sum_tolerance(p.position + 1, sums[i]) +
                   store_tolerance(p.dtype, std::abs(values[i])));
  }
  expect_close(o, 6, {0.0, 0.0, each});
}

// The newest token is seen: with a key that wins by far, the output is its value.
TEST_P(AttentionStep, SeesTheNewestToken) {
  const AttentionStepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  Operand q(Role::input, p.dtype, p.batch, p.kv_heads * p.share * p.head_dim, p.layout);
  q.fill([](std::int64_t, std::int64_t c) { return c % 2 == 0 ? 16.0 : -16.0; });
  CacheOperands cache = filled_cache(p, seed, false);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t row = b * p.capacity + p.position;
    for (std::int64_t c = 0; c < cache.k.cols(); ++c) {
      const double sign = c % 2 == 0 ? 1.0 : -1.0;
      cache.k.put(row, c, p.codes ? 128.0 + sign * 120.0 : sign * 12.0);
      if (p.codes) cache.k_scale.put(row, c / p.head_dim, 0.1);
    }
  }
  const Outcome o = attend(p, q, cache);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t row = b * p.capacity + p.position;
    for (std::int64_t c = 0; c < q.cols(); ++c) {
      const std::int64_t kv_head = c / (p.share * p.head_dim);
      const double stored = cache.v.get(row, kv_head * p.head_dim + c % p.head_dim);
      const double value = p.codes ? (stored - 128.0) * cache.v_scale.get(row, kv_head) : stored;
      // The other keys' scores are below by hundreds; the value of a code is rounded once.
      const double bound = 2.0 * store_tolerance(p.dtype, std::abs(value)) + 0x1p-20;
      ASSERT_LE(std::abs(o.actual[6].get(b, c) - value), bound) << b << ", " << c;
      ASSERT_LE(std::abs(o.expected[6].get(b, c) - value), bound) << b << ", " << c;
    }
  }
}

}  // namespace
}  // namespace engine::test
