// Parity of rotary embedding at a position on the device, and of the key-value cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/parity/step_support.h"

namespace engine::test {
namespace {

// ---- rope_step ----

struct RopeStepCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t position = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "rows_" +
           std::to_string(heads) + "x" + std::to_string(head_dim) + "_at" +
           std::to_string(position) + "_" + layout_name(layout);
  }
};

std::vector<RopeStepCase> rope_cases() {
  std::vector<RopeStepCase> cases;
  std::size_t turn = 0;
  const std::int64_t batches[] = {1, 3, 16};
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t head_dim : {2, 32, 64, 80, 128}) {
        for (const std::int64_t position : {0, 1, 15, 200}) {
          cases.push_back({dtype, batches[turn % 3], 1 + static_cast<std::int64_t>(turn % 4),
                           head_dim, position, layout});
          ++turn;
        }
      }
    }
    cases.push_back({dtype, 2, 64, 128, 1000, Layout::tight});
  }
  return cases;
}

class RopeStep : public ::testing::TestWithParam<RopeStepCase> {};
INSTANTIATE_TEST_SUITE_P(Step, RopeStep, ::testing::ValuesIn(rope_cases()),
                         case_name<RopeStepCase>);

// The contract names every rounding, so the result is exact, and that of rope.
TEST_P(RopeStep, IsRopeAtThePosition) {
  const RopeStepCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x =
      Operand(Role::inout, p.dtype, p.rows, p.heads * p.head_dim, p.layout).bell(seed);
  const Operand plain = x;
  const std::int64_t half = p.head_dim / 2;
  const auto angle = [half](std::int64_t at, std::int64_t j) {
    return static_cast<double>(at) *
           std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(half));
  };
  // The table ends at the position.
  Operand cos(Role::input, DType::f32, p.position + 1, half, p.layout);
  Operand sin = cos;
  cos.fill([&](std::int64_t at, std::int64_t j) { return std::cos(angle(at, j)); });
  sin.fill([&](std::int64_t at, std::int64_t j) { return std::sin(angle(at, j)); });
  const Operand position = scalar(Role::input, p.position);
  const Outcome o =
      run_both({&x, &plain, &cos, &sin, &position}, [&p](Ops& ops, const std::vector<View>& v) {
        ops.rope_step(v[0], p.head_dim, v[2], v[3], v[4]);
        ops.rope(v[1], p.head_dim, v[2], v[3], {p.position, 1});
      });
  expect_exact(o, 0);
  const Comparison c = compare_bytes(o.actual[0].element_bytes(), o.actual[1].element_bytes());
  EXPECT_TRUE(c.ok) << c.message;
  if (p.position > 0) {
    EXPECT_NE(o.actual[0].values(), x.values());
  }
}

// ---- the cache ----

struct CacheCase {
  DType dtype = DType::f32;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads = 0;
  std::int64_t batch = 0;
  std::int64_t position = 0;
  std::int64_t capacity = 0;
  bool codes = false;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + (codes ? "_codes" : "_plain") + "_" +
           std::to_string(kv_heads) + "x" + std::to_string(head_dim) + "_batch" +
           std::to_string(batch) + "_at" + std::to_string(position) + "of" +
           std::to_string(capacity) + "_" + layout_name(layout);
  }
};

std::vector<CacheCase> cache_cases() {
  std::vector<CacheCase> cases;
  const std::int64_t batches[] = {1, 3, 16};
  std::size_t turn = 0;
  for (const DType dtype : small_floats) {
    for (const bool codes : {false, true}) {
      for (const std::int64_t head_dim : {2, 32, 64, 80, 128, 256}) {
        for (const Layout layout : all_layouts) {
          const std::int64_t position = turn % 4 == 0 ? 0 : static_cast<std::int64_t>(turn % 17);
          cases.push_back({dtype, head_dim, 1 + static_cast<std::int64_t>(turn / 3 % 5),
                           batches[turn / 2 % 3], position,
                           position + 1 + static_cast<std::int64_t>(turn % 3), codes, layout});
          ++turn;
        }
      }
    }
  }
  return cases;
}

class Cache : public ::testing::TestWithParam<CacheCase> {};
INSTANTIATE_TEST_SUITE_P(Step, Cache, ::testing::ValuesIn(cache_cases()), case_name<CacheCase>);

// Rows with the sizes that quantization meets: usual, huge, tiny, all zero.
Operand token_rows(const CacheCase& p, std::int64_t rows, std::uint64_t seed) {
  Operand x(Role::input, p.dtype, rows, p.kv_heads * p.head_dim, p.layout);
  x.bell(seed);
  const double sizes[] = {1.0, 0.0, 300.0, 1e-3};
  return x.fill([&](std::int64_t r, std::int64_t c) {
    return x.get(r, c) * sizes[static_cast<std::size_t>(r + c / p.head_dim) % 4];
  });
}

bool untouched(const Operand& x, std::int64_t row) {
  const std::vector<std::byte> all = x.element_bytes();
  const auto width =
      static_cast<std::ptrdiff_t>(x.cols()) * static_cast<std::ptrdiff_t>(dtype_bytes(x.dtype()));
  const auto first = all.begin() + static_cast<std::ptrdiff_t>(row) * width;
  return std::all_of(first, first + width, [](std::byte b) { return b == std::byte{0xFF}; });
}

// IEEE divisions and roundings on both sides: exact. Nothing but the position's rows changes.
TEST_P(Cache, AppendsOneTokenExactly) {
  const CacheCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand k = token_rows(p, p.batch, seed);
  const Operand v = token_rows(p, p.batch, seed / 3);
  const CacheOperands c = make_cache(Role::inout, p.dtype, p.codes, p.batch * p.capacity,
                                     p.kv_heads, p.head_dim, p.layout);
  const Operand position = scalar(Role::input, p.position);
  const Outcome o =
      run_both({&k, &v, &c.k, &c.v, &c.k_scale, &c.v_scale, &position},
               [&p](Ops& ops, const std::vector<View>& views) {
                 ops.kv_append_step(views[0], views[1], p.head_dim,
                                    cache_of(views, 2, p.batch, p.capacity), views[6]);
               });
  for (std::size_t i = 2; i < (p.codes ? 6U : 4U); ++i) {
    expect_exact(o, i);
    for (std::int64_t r = 0; r < p.batch * p.capacity; ++r) {
      ASSERT_EQ(untouched(o.actual[i], r), r % p.capacity != p.position)
          << "operand " << i << ", row " << r;
    }
  }
}

// A run of tokens for the later sequences, and one sequence read back: exact, and within half a
// step of what was appended.
TEST_P(Cache, AppendsAndReadsRunsExactly) {
  const CacheCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const std::int64_t first = p.batch / 3;
  const std::int64_t n = p.batch - first;
  const std::int64_t start = p.position / 2;
  const std::int64_t len = p.capacity - start;
  const Operand k = token_rows(p, n * len, seed);
  const Operand v = token_rows(p, n * len, seed / 3);
  CacheOperands c = make_cache(Role::inout, p.dtype, p.codes, p.batch * p.capacity, p.kv_heads,
                               p.head_dim, p.layout);
  const Operand k_out(Role::output, p.dtype, p.capacity, k.cols(), p.layout);
  const Operand v_out = k_out;
  // What stands before the run is read, too.
  const auto tokens_before = [&](Operand& x, auto value) {
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      if (r % p.capacity >= start) continue;
      for (std::int64_t col = 0; col < x.cols(); ++col) x.put(r, col, value(r, col));
    }
  };
  for (Operand* x : {&c.k, &c.v}) {
    tokens_before(*x, [](std::int64_t r, std::int64_t col) {
      return static_cast<double>((r * 7 + col) % 251);
    });
  }
  if (p.codes) {
    for (Operand* x : {&c.k_scale, &c.v_scale}) {
      tokens_before(*x, [](std::int64_t r, std::int64_t) { return 0.01 * static_cast<double>(r); });
    }
  }
  const Outcome o =
      run_both({&k, &v, &c.k, &c.v, &c.k_scale, &c.v_scale, &k_out, &v_out},
               [&](Ops& ops, const std::vector<View>& views) {
                 const KvCache cache = cache_of(views, 2, p.batch, p.capacity);
                 ops.kv_append(views[0], views[1], p.head_dim, cache, first, n, start);
                 ops.kv_read(cache, p.head_dim, p.batch - 1, views[6], views[7]);
               });
  for (std::size_t i = 2; i < 8; ++i) {
    if (p.codes || (i != 4 && i != 5)) expect_exact(o, i);
  }
  for (std::size_t half = 0; half < 2; ++half) {
    const Operand& in = half == 0 ? k : v;
    const Operand& out = o.actual[6 + half];
    for (std::int64_t r = 0; r < len; ++r) {
      for (std::int64_t col = 0; col < in.cols(); ++col) {
        double largest = 0;
        for (std::int64_t j = 0; j < p.head_dim; ++j) {
          const std::int64_t at = col / p.head_dim * p.head_dim + j;
          largest = std::max(largest, std::abs(in.get((n - 1) * len + r, at)));
        }
        // Half a step, and the roundings of the quotient, the product and the result.
        const double bound = p.codes ? largest / 254.0 + (roundoff(p.dtype) + 0x1p-20) * largest +
                                           smallest_step(p.dtype)
                                     : 0.0;
        ASSERT_LE(std::abs(out.get(start + r, col) - in.get((n - 1) * len + r, col)), bound)
            << "token " << start + r << " column " << col;
      }
    }
  }
}

// NaN and infinity show up wherever the head is read.
TEST(CacheOfBadTokens, IsNaN) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    Operand k = Operand(Role::input, DType::bf16, 1, 128).bell(5);
    const Operand v = Operand(Role::input, DType::bf16, 1, 128).bell(6);
    k.put(0, 70, bad);
    const CacheOperands c = make_cache(Role::inout, DType::bf16, true, 2, 2, 64, Layout::tight);
    const Operand k_out(Role::output, DType::bf16, 1, 128);
    const Operand v_out = k_out;
    const Outcome o = run_both({&k, &v, &c.k, &c.v, &c.k_scale, &c.v_scale, &k_out, &v_out},
                               [](Ops& ops, const std::vector<View>& views) {
                                 const KvCache cache = cache_of(views, 2, 1, 2);
                                 ops.kv_append(views[0], views[1], 64, cache, 0, 1, 0);
                                 ops.kv_read(cache, 64, 0, views[6], views[7]);
                               });
    for (const std::size_t i : {2U, 3U, 4U, 5U, 7U}) expect_exact(o, i);
    for (const Operand* out : {&o.expected[6], &o.actual[6]}) {
      for (std::int64_t col = 0; col < 128; ++col) {
        EXPECT_EQ(std::isnan(out->get(0, col)), col >= 64) << col;
      }
    }
  }
}

}  // namespace
}  // namespace engine::test
