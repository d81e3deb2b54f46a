// Parity of weights with mixed widths, salient weights or regions: decoding is exact, products are
// within the rounding of their sums, alone and where the decode step takes several together.
#include <cstring>

#include "tests/parity/packed_operands.h"
#include "tests/support/scheme_weights.h"

namespace engine::test {
namespace {

template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// A weight of one of the schemes as an operand, and what it decodes to.
struct SchemeOperand {
  explicit SchemeOperand(OwnedLinear owned)
      : shape(*match_scheme(owned.weight)),
        records(Role::input, DType::u8, 1, shape.records_bytes()),
        decoded(shape.rows, shape.cols) {
    const std::vector<std::byte> bytes = scheme_records(owned.weight, shape);
    std::memcpy(records.host().data, bytes.data(), bytes.size());
    decode_linear(owned.weight, host_view(decoded.value.data(), shape.rows, shape.cols));
    // A kernel may add up parts of a weight: a code and its zero, a level and the difference of a
    // salient weight to it. None is larger than four times the row's largest weight here.
    for (std::int64_t r = 0; r < shape.rows; ++r) {
      float largest = 0.0F;
      for (std::int64_t c = 0; c < shape.cols; ++c) {
        largest = std::max(largest, std::abs(value(r, c)));
      }
      std::fill_n(decoded.part.begin() + r * shape.cols, shape.cols, 4.0 * largest);
    }
  }
  [[nodiscard]] float value(std::int64_t r, std::int64_t c) const {
    return decoded.value[static_cast<std::size_t>(r * shape.cols + c)];
  }
  [[nodiscard]] Linear linear(const View& view) const {
    Linear l;
    l.packed.shape = shape;
    l.packed.records = view;
    return l;
  }
  PackedShape shape;
  Operand records;
  DecodedWeight decoded;
};

enum class Scheme { mixed, salient, regions };
const char* scheme_label(Scheme s) {
  const char* names[] = {"mixed", "salient", "regions"};
  return names[static_cast<int>(s)];
}

// `variant` turns through what a scheme leaves open.
OwnedLinear make_weight(Scheme scheme, std::int64_t rows, std::int64_t cols, DType scales,
                        std::size_t variant, std::uint64_t seed) {
  SchemeWeights make(rows, cols, scales, seed);
  if (scheme == Scheme::regions) return make.regions(variant % 2 == 0);
  if (scheme == Scheme::salient) {
    const std::int64_t groups[] = {128, 0, 256};
    const double shares[] = {0.1, 0.33, 0.005};
    return make.salient(shares[variant / 3 % 3], groups[variant % 3], variant % 4 == 3 ? 3 : 8);
  }
  const int cycle[] = {3, 0, 2, 4, 8, 5, 6, 7};
  std::vector<int> widths;
  for (std::int64_t b = 0; b < cols / 128; ++b) {
    widths.push_back(cycle[(static_cast<std::size_t>(b) + variant) % 8]);
  }
  return make.mixed(widths);
}

// mixed widths need whole blocks.
std::int64_t fitting_cols(Scheme scheme, std::int64_t cols) {
  return scheme == Scheme::mixed ? (cols + 127) / 128 * 128 : cols;
}
const std::pair<std::int64_t, std::int64_t> sizes[] = {
    {96, 1024}, {48, 384}, {272, 2048}, {17, 640}, {5, 200}, {130, 1152}, {16, 4096}};

// ---- expand ----

struct ExpandCase {
  Scheme scheme;
  std::int64_t rows, cols;
  DType scales, out;
  Layout layout;
  std::size_t variant;
  [[nodiscard]] std::string name() const {
    return std::string(scheme_label(scheme)) + std::to_string(variant) + "_" + dtype_name(scales) +
           "_" + std::to_string(rows) + "x" + std::to_string(cols) + "_to_" + dtype_name(out) +
           "_" + layout_name(layout);
  }
};
std::vector<ExpandCase> expand_cases() {
  std::vector<ExpandCase> cases;
  std::size_t turn = 0;
  for (const Scheme scheme : {Scheme::mixed, Scheme::salient, Scheme::regions}) {
    for (std::size_t i = 0; i < 12; ++i) {
      const auto& [rows, cols] = sizes[turn % 7];
      cases.push_back({scheme, rows, fitting_cols(scheme, cols), small_floats[turn / 2 % 3],
                       small_floats[turn % 3], all_layouts[turn / 3 % 3], turn});
      ++turn;
    }
  }
  return cases;
}
class SchemeExpand : public ::testing::TestWithParam<ExpandCase> {};
INSTANTIATE_TEST_SUITE_P(Scheme, SchemeExpand, ::testing::ValuesIn(expand_cases()),
                         case_name<ExpandCase>);

TEST_P(SchemeExpand, IsTheDecodedWeightRoundedOnce) {
  const ExpandCase& p = GetParam();
  const SchemeOperand w(
      make_weight(p.scheme, p.rows, p.cols, p.scales, p.variant, seed_of(p.name())));
  const Operand out(Role::output, p.out, p.rows, p.cols, p.layout);
  const Outcome o = run_both({&w.records, &out}, [&](Ops& ops, const std::vector<View>& v) {
    ops.expand(w.linear(v[0]).packed, v[1]);
  });
  expect_exact(o, 1);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t c = 0; c < p.cols; ++c) {
      ASSERT_EQ(o.actual[1].get(r, c), static_cast<double>(round_to(p.out, w.value(r, c))))
          << "row " << r << ", column " << c;
    }
  }
}

// ---- products ----

struct ProductCase {
  Scheme scheme;
  std::int64_t rows, cols;
  DType scales;
  std::int64_t m;
  PackedKernel kernel;
  DType x, out;
  bool accumulate;
  Layout layout;
  std::size_t variant;
  [[nodiscard]] std::string name() const {
    const char* kernels[] = {"automatic", "vector", "matrix", "expand"};
    return std::string(scheme_label(scheme)) + std::to_string(variant) + "_" + dtype_name(scales) +
           "_" + std::to_string(rows) + "x" + std::to_string(cols) + "_m" + std::to_string(m) +
           "_" + kernels[static_cast<int>(kernel)] + "_" + dtype_name(x) + "_to_" +
           dtype_name(out) + (accumulate ? "_acc" : "") + "_" + layout_name(layout);
  }
};
std::vector<ProductCase> product_cases() {
  std::vector<ProductCase> cases;
  std::size_t turn = 0;
  for (const Scheme scheme : {Scheme::mixed, Scheme::salient, Scheme::regions}) {
    for (const std::int64_t m : {1, 2, 3, 4, 8, 9, 16, 17, 64}) {
      for (const PackedKernel kernel :
           {PackedKernel::automatic, PackedKernel::vector, PackedKernel::matrix}) {
        for (const DType x : {DType::f16, DType::bf16}) {
          if (kernel == PackedKernel::matrix && m > 1) continue;
          const auto& [rows, cols] = sizes[turn % 7];
          cases.push_back({scheme, rows, fitting_cols(scheme, cols), small_floats[turn / 2 % 3], m,
                           kernel, x, turn / 3 % 2 == 0 ? x : DType::f32, turn / 5 % 2 == 1,
                           all_layouts[turn / 7 % 3], turn});
          ++turn;
        }
      }
      ++turn;
    }
    // Long rows, whose x leaves room for few rows at a time; more row tiles than multiprocessors.
    cases.push_back({scheme, 40, 14336, DType::f16, 1, PackedKernel::vector, DType::bf16,
                     DType::bf16, false, Layout::tight, 0});
    cases.push_back({scheme, 40, 14336, DType::f32, 7, PackedKernel::vector, DType::f16, DType::f16,
                     true, Layout::tight, 1});
    cases.push_back({scheme, 16 * 132 * 3 + 5, 256, DType::f16, 3, PackedKernel::vector,
                     DType::bf16, DType::f32, false, Layout::tight, 2});
  }
  return cases;
}

// Tolerances of out = x w^T (+ before) against the reference; and both sides against f64.
void check_product(const Operand& x, const Operand& out, const Outcome& o, std::size_t at,
                   const SchemeOperand& w, bool accumulate) {
  const std::int64_t m = x.rows(), k = x.cols(), n = w.shape.rows;
  const std::vector<double> xs = row_norms(x), inputs = x.values();
  const std::vector<WeightRow> ws = weight_rows(w.decoded);
  std::vector<double> each, exact;
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t c = 0; c < n; ++c) {
      const double before = accumulate ? out.get(r, c) : 0.0;
      const double stored = o.expected[at].get(r, c);
      double tolerance = product_tolerance(k, xs[static_cast<std::size_t>(r)],
                                           ws[static_cast<std::size_t>(c)], true, x.dtype()) +
                         sum_tolerance(1, std::abs(before)) +
                         store_tolerance(out.dtype(), std::abs(stored));
      if (accumulate) tolerance += store_tolerance(out.dtype(), std::abs(stored - before));
      each.push_back(tolerance);
      double sum = before;
      for (std::int64_t i = 0; i < k; ++i) {
        sum += inputs[static_cast<std::size_t>(r * k + i)] * static_cast<double>(w.value(c, i));
      }
      exact.push_back(sum);
    }
  }
  expect_close(o, at, {0.0, 0.0, each});
  for (const Operand* found : {&o.expected[at], &o.actual[at]}) {
    const Comparison c = compare_close(found->values(), exact, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << (found == &o.expected[at] ? "reference" : "backend") << ": " << c.message;
  }
}

class SchemeProduct : public ::testing::TestWithParam<ProductCase> {};
INSTANTIATE_TEST_SUITE_P(Scheme, SchemeProduct, ::testing::ValuesIn(product_cases()),
                         case_name<ProductCase>);

TEST_P(SchemeProduct, StaysWithinTheRoundingOfItsSums) {
  const ProductCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const SchemeOperand w(make_weight(p.scheme, p.rows, p.cols, p.scales, p.variant, seed));
  const Operand x = Operand(Role::input, p.x, p.m, p.cols, p.layout).bell(seed / 3);
  Operand out(p.accumulate ? Role::inout : Role::output, p.out, p.m, p.rows, p.layout);
  if (p.accumulate) out.bell(seed / 7, 4.0);
  const Outcome o = run_both({&x, &out, &w.records}, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.packed_workspace_bytes(w.shape, p.m, p.x, p.kernel));
    ops.linear(v[0], w.linear(v[2]), v[1], p.accumulate, workspace.view(), p.kernel);
    ops.synchronize();
  });
  check_product(x, out, o, 1, w, p.accumulate);
}

// Linears of the same input, as queries, keys and values: together they are what each is alone.
TEST(SchemeLinears, TogetherAreWhatEachIsAlone) {
  for (const Scheme scheme : {Scheme::mixed, Scheme::salient, Scheme::regions}) {
    for (const std::int64_t m : {1, 5, 12}) {
      SCOPED_TRACE(std::string(scheme_label(scheme)) + " " + std::to_string(m));
      const std::uint64_t seed = seed_of(scheme_label(scheme)) + static_cast<std::uint64_t>(m);
      const SchemeOperand q(make_weight(scheme, 256, 1024, DType::f16, 0, seed));
      const SchemeOperand k(make_weight(scheme, 64, 1024, DType::f16, 0, seed + 1));
      const SchemeOperand v(make_weight(scheme, 72, 1024, DType::f16, 9, seed + 2));
      const Operand x = Operand(Role::input, DType::bf16, m, 1024).bell(seed);
      const Operand out_q(Role::output, DType::bf16, m, 256);
      const Operand out_k(Role::output, DType::bf16, m, 64),
          out_v(Role::output, DType::bf16, m, 72);
      const Outcome o = run_both(
          {&x, &out_q, &out_k, &out_v, &q.records, &k.records, &v.records},
          [&](Ops& ops, const std::vector<View>& views) {
            std::int64_t bytes = 0;
            for (const PackedShape& s : {q.shape, k.shape, v.shape}) {
              bytes = std::max(
                  bytes, ops.packed_workspace_bytes(s, m, DType::bf16, PackedKernel::automatic));
            }
            const Scratch workspace(ops, bytes);
            const Linear lq = q.linear(views[4]), lk = k.linear(views[5]), lv = v.linear(views[6]);
            const Ops::LinearOut all[] = {{&lq, views[1]}, {&lk, views[2]}, {&lv, views[3]}};
            ops.linears(views[0], all, workspace.view());
            ops.synchronize();
          });
      check_product(x, out_q, o, 1, q, false);
      check_product(x, out_k, o, 2, k, false);
      check_product(x, out_v, o, 3, v, false);
    }
  }
}

// Each column of the weight meets its own input: x has a single 1.
TEST(SchemeEdges, EveryColumnMeetsItsInput) {
  for (const Scheme scheme : {Scheme::mixed, Scheme::salient, Scheme::regions}) {
    SCOPED_TRACE(scheme_label(scheme));
    const SchemeOperand w(make_weight(scheme, 32, 1024, DType::f16, 1, 5));
    for (std::int64_t first = 0; first < 1024; first += 16) {
      const Operand x =
          Operand(Role::input, DType::f16, 16, 1024).fill([&](std::int64_t r, std::int64_t c) {
            return c == first + r ? 1.0 : 0.0;
          });
      const Operand out(Role::output, DType::f32, 16, 32);
      const Outcome o = run_both({&x, &out, &w.records}, [&](Ops& ops, const std::vector<View>& v) {
        ops.packed_matmul(v[0], w.linear(v[2]).packed, v[1], false, PackedKernel::vector, View{});
        ops.synchronize();
      });
      for (std::int64_t r = 0; r < 16; ++r) {
        for (std::int64_t n = 0; n < 32; ++n) {
          const double expected = w.value(n, first + r);
          // One weight: rounded to f16 for regions, else off by f32 roundings of its parts.
          const double slack = 4.0 * roundoff(DType::f16) * std::abs(expected) + 1e-6;
          ASSERT_NEAR(o.actual[1].get(r, n), expected, slack)
              << "row " << n << ", column " << first + r;
        }
      }
    }
  }
}

// An infinite input reaches no other row of x.
TEST(SchemeEdges, NonfiniteInputsStayInTheirRow) {
  for (const Scheme scheme : {Scheme::mixed, Scheme::salient, Scheme::regions}) {
    SCOPED_TRACE(scheme_label(scheme));
    const SchemeOperand w(make_weight(scheme, 48, 512, DType::f16, 0, 8));
    Operand x = Operand(Role::input, DType::bf16, 5, 512).bell(3);
    x.put(2, 77, std::numeric_limits<double>::infinity());
    const Operand out(Role::output, DType::f32, 5, 48);
    const Outcome o = run_both({&x, &out, &w.records}, [&](Ops& ops, const std::vector<View>& v) {
      ops.packed_matmul(v[0], w.linear(v[2]).packed, v[1], false, PackedKernel::vector, View{});
      ops.synchronize();
    });
    for (std::int64_t r = 0; r < 5; ++r) {
      for (std::int64_t c = 0; c < 48; ++c) {
        EXPECT_EQ(std::isfinite(o.actual[1].get(r, c)), r != 2) << r << ", " << c;
      }
    }
  }
}

}  // namespace
}  // namespace engine::test
