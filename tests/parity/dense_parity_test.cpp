// Parity of the dense ops and of the copies between host and device.
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

// Remainders around every vector width, and the row and column counts of LLaMA layers.
const std::vector<std::int64_t> some_rows = {1, 2, 3, 4, 5, 17, 33, 129};
const std::vector<std::int64_t> some_cols = {1, 7, 64, 255, 768};

struct MatrixCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "x" +
           std::to_string(cols) + "_" + layout_name(layout);
  }
};

// All dtypes and row remainders; columns and layouts take turns, so that each pair of values of any
// two of the four occurs.
std::vector<MatrixCase> matrix_cases() {
  std::vector<MatrixCase> cases;
  for (std::size_t d = 0; d < small_floats.size(); ++d) {
    for (std::size_t r = 0; r < some_rows.size(); ++r) {
      for (std::size_t c = 0; c < some_cols.size(); ++c) {
        cases.push_back({small_floats[d], some_rows[r], some_cols[c],
                         all_layouts[(d + r + c) % all_layouts.size()]});
      }
    }
    for (const Layout layout : all_layouts) {
      cases.push_back({small_floats[d], 3, 4096, layout});
      cases.push_back({small_floats[d], 2, 14336, layout});
    }
  }
  return cases;
}

class OnMatrix : public ::testing::TestWithParam<MatrixCase> {
 protected:
  void SetUp() override { seed_ = seed_of(GetParam().name()); }
  [[nodiscard]] Operand make(Role role) const { return make(role, GetParam().dtype); }
  [[nodiscard]] static Operand make(Role role, DType dtype) {
    return {role, dtype, GetParam().rows, GetParam().cols, GetParam().layout};
  }
  std::uint64_t seed_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Dense, OnMatrix, ::testing::ValuesIn(matrix_cases()),
                         case_name<MatrixCase>);

// The sum of squares differs by roundings of its tree; the inner value and the product are each
// rounded to the dtype, so each may end one step apart.
Tolerance rmsnorm_tolerance(DType dtype, std::int64_t dim) {
  const double sum = (8.0 + 2.0 * std::sqrt(static_cast<double>(dim))) * roundoff(DType::f32);
  return {2.0 * smallest_step(dtype), 4.5 * roundoff(dtype) + sum};
}

TEST_P(OnMatrix, Rmsnorm) {
  const Operand x = make(Role::input).bell(seed_, 3.0);
  Operand weight(Role::input, GetParam().dtype, 1, GetParam().cols);
  weight.fill([&](std::int64_t, std::int64_t c) {
    return 0.5 + uniform_value(seed_, 3, static_cast<std::uint64_t>(c));
  });
  const Operand out = make(Role::output);
  const Outcome o = run_both({&x, &weight, &out}, [](Ops& ops, const std::vector<View>& v) {
    ops.rmsnorm(v[0], v[1], 1e-5F, v[2]);
  });
  expect_close(o, 2, rmsnorm_tolerance(GetParam().dtype, GetParam().cols));
}

TEST_P(OnMatrix, RmsnormInPlace) {
  const Operand x = make(Role::inout).bell(seed_, 0.01);
  const Operand weight = Operand(Role::input, GetParam().dtype, 1, GetParam().cols).bell(seed_ + 1);
  const Outcome o = run_both({&x, &weight}, [](Ops& ops, const std::vector<View>& v) {
    ops.rmsnorm(v[0], v[1], 1e-5F, v[0]);
  });
  expect_close(o, 0, rmsnorm_tolerance(GetParam().dtype, GetParam().cols));
}

// silu is rounded, then the product: two steps. exp itself is good to a few roundings of f32; far
// below zero it overflows and the result vanishes, which the subnormal term covers.
Tolerance silu_tolerance(DType dtype) {
  return {std::max(4.0 * smallest_step(dtype), 1e-36), 4.5 * roundoff(dtype) + 16.0 * 0x1p-24};
}

TEST_P(OnMatrix, SiluMul) {
  const Operand up = make(Role::input).bell(seed_ + 1);
  Operand gate = make(Role::input).bell(seed_, 3.0);
  const double edges[] = {0.0, -0.0, 20.0, -20.0, 90.0, -90.0, -120.0, 1e-6, -1e-6};
  for (std::int64_t c = 0; c < std::min<std::int64_t>(9, gate.cols() - 1); ++c) {
    gate.put(gate.rows() - 1, c, edges[c]);
  }
  const Operand out = make(Role::output);
  const Outcome o = run_both({&gate, &up, &out}, [](Ops& ops, const std::vector<View>& v) {
    ops.silu_mul(v[0], v[1], v[2]);
  });
  expect_close(o, 2, silu_tolerance(GetParam().dtype));
}

TEST_P(OnMatrix, SiluMulInPlaceOfEither) {
  for (const std::size_t target : {std::size_t{0}, std::size_t{1}}) {
    const Operand gate = make(target == 0 ? Role::inout : Role::input).bell(seed_, 2.0);
    const Operand up = make(target == 1 ? Role::inout : Role::input).bell(seed_ + 1);
    const Outcome o = run_both({&gate, &up}, [target](Ops& ops, const std::vector<View>& v) {
      ops.silu_mul(v[0], v[1], v[target]);
    });
    expect_close(o, target, silu_tolerance(GetParam().dtype));
  }
}

TEST_P(OnMatrix, ConvertToEveryFloat) {
  const Operand in = make(Role::input).bell(seed_, 100.0);
  for (const DType to : small_floats) {
    const Operand out = make(Role::output, to);
    const Outcome o = run_both(
        {&in, &out}, [](Ops& ops, const std::vector<View>& v) { ops.convert(v[0], v[1]); });
    expect_exact(o, 1);
  }
}

TEST_P(OnMatrix, ConvertF64BothWays) {
  const Operand in = make(Role::input, DType::f32).bell(seed_);
  const Operand wide = make(Role::output, DType::f64);
  const Outcome there =
      run_both({&in, &wide}, [](Ops& ops, const std::vector<View>& v) { ops.convert(v[0], v[1]); });
  expect_exact(there, 1);
  const Operand doubles = make(Role::input, DType::f64).fill([&](std::int64_t r, std::int64_t c) {
    return uniform_value(seed_, 4, static_cast<std::uint64_t>(r * 100000 + c)) / 3.0;
  });
  const Operand narrow = make(Role::output, DType::f32);
  const Outcome back = run_both(
      {&doubles, &narrow}, [](Ops& ops, const std::vector<View>& v) { ops.convert(v[0], v[1]); });
  expect_exact(back, 1);
}

TEST_P(OnMatrix, FillBellIsBitExact) {
  const Operand out = make(Role::output);
  const Outcome o = run_both({&out}, [this](Ops& ops, const std::vector<View>& v) {
    ops.fill_bell(v[0], seed_, 7, 0.02F, 0.3F);
  });
  expect_exact(o, 0);
}

TEST_P(OnMatrix, ZeroCopyAndEqualConversionOfEveryDtype) {
  for (const DType dtype : {GetParam().dtype, DType::f64, DType::i32, DType::i16, DType::u8}) {
    Operand in = make(Role::input, dtype);
    in.fill([](std::int64_t r, std::int64_t c) {
      return static_cast<double>((r * 31 + c * 7 + 1) % 127);
    });
    const Operand copied = make(Role::output, dtype);
    const Operand converted(Role::output, dtype, in.rows(), in.cols(), Layout::wide);
    const Operand zeroed = make(Role::output, dtype);
    const Outcome o =
        run_both({&in, &copied, &converted, &zeroed}, [](Ops& ops, const std::vector<View>& v) {
          ops.copy(v[0], v[1]);
          ops.convert(v[0], v[2]);
          ops.zero(v[3]);
        });
    for (std::size_t i = 1; i < 4; ++i) expect_exact(o, i);
    EXPECT_EQ(o.actual[1].values(), in.values());
    EXPECT_EQ(o.actual[2].values(), in.values());
    for (const double v : o.actual[3].values()) ASSERT_EQ(v, 0.0);
  }
}

TEST_P(OnMatrix, UploadAndDownloadOfStridedViews) {
  Operand source = make(Role::input).bell(seed_);
  for (TraceOps* ops : {sides().reference.get(), sides().subject.get()}) {
    Operand target = make(Role::output);
    Buffer buffer(ops->memory(), sides().ledger, MemTag::workspace, DType::u8, 1,
                  static_cast<std::int64_t>(source.bytes().size()));
    ops->memory().fill(buffer.view().data, 0xFF, source.bytes().size());
    const View device = source.view_in(buffer.view().data, ops->kind());
    ops->upload(source.host(), device);
    ops->download(device, target.host());
    EXPECT_TRUE(compare_bytes(target.bytes(), source.bytes()).ok);
    // The gaps on the device were not written either.
    std::vector<std::byte> whole(source.bytes().size());
    ops->download(buffer.view(), make_view(whole.data(), DType::u8, DeviceKind::cpu, 1,
                                           static_cast<std::int64_t>(whole.size())));
    EXPECT_TRUE(compare_bytes(whole, source.bytes()).ok);
  }
}

TEST_P(OnMatrix, CountNonfinite) {
  for (const DType dtype : {GetParam().dtype, DType::f64}) {
    Operand x = make(Role::input, dtype).bell(seed_);
    std::int64_t expected = 0;
    const double bad[] = {std::nan(""), infinity, -infinity};
    for (std::int64_t i = 0; i < x.rows() * x.cols(); i += 61) {
      x.put(i / x.cols(), i % x.cols(), bad[i % 3]);
      ++expected;
    }
    x.put(x.rows() - 1, x.cols() - 1, infinity);
    const std::int64_t last = x.rows() * x.cols() - 1;
    if (last % 61 != 0) ++expected;
    std::vector<std::int64_t> counts;
    run_both({&x}, [&counts](Ops& ops, const std::vector<View>& v) {
      counts.push_back(ops.count_nonfinite(v[0]));
    });
    EXPECT_EQ(counts, (std::vector<std::int64_t>{expected, expected}));
  }
}

TEST_P(OnMatrix, SquareSumsOfAllPairsOfDtypes) {
  for (const DType other : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    const Operand a = make(Role::input).bell(seed_);
    const Operand b = make(Role::input, other).bell(seed_ + 1);
    const Operand out(Role::output, DType::f64, 1, 2);
    const Outcome o = run_both({&a, &b, &out}, [](Ops& ops, const std::vector<View>& v) {
      ops.square_sums(v[0], v[1], v[2]);
    });
    // Sums of squares in f64: relative error of at most one rounding per addition.
    const double n = static_cast<double>(a.rows() * a.cols());
    expect_close(o, 2, {0.0, (n + 8.0) * roundoff(DType::f64)});
  }
}

// Conversions at the edges of every format: subnormals, ties, overflow, infinities, NaN.
TEST(DenseEdges, ConvertSpecialValues) {
  std::vector<double> specials = {
      0.0,        -0.0,     infinity,    -infinity,  65504.0,       65519.9,      65520.0,
      -65520.0,   1e38,     3.4e38,      -3.4e38,    0x1p-24,       0x1p-25,      0x1.8p-25,
      0x1p-26,    0x1p-14,  0x1.ffcp-15, 0x1p-126,   0x1p-127,      0x1p-133,     0x1p-134,
      0x1.8p-134, 0x1p-149, 1.00390625,  1.01171875, 1.00048828125, 1.00146484375};
  for (int i = 0; i < 65536; ++i) {
    specials.push_back(static_cast<double>(to_float(f16{static_cast<std::uint16_t>(i)})));
    specials.push_back(static_cast<double>(to_float(bf16{static_cast<std::uint16_t>(i)})));
  }
  const auto n = static_cast<std::int64_t>(specials.size());
  for (const DType from : small_floats) {
    Operand in(Role::input, from, 1, n);
    in.fill([&](std::int64_t, std::int64_t c) { return specials[static_cast<std::size_t>(c)]; });
    for (const DType to : small_floats) {
      if (from == to) continue;
      const Operand out(Role::output, to, 1, n);
      const Outcome o = run_both(
          {&in, &out}, [](Ops& ops, const std::vector<View>& v) { ops.convert(v[0], v[1]); });
      // The payload of a NaN is nobody's business; everything else is exact, signs of 0 included.
      for (std::int64_t c = 0; c < n; ++c) {
        const double e = o.expected[1].get(0, c);
        const double a = o.actual[1].get(0, c);
        const bool same =
            std::isnan(e) ? std::isnan(a) : a == e && std::signbit(a) == std::signbit(e);
        ASSERT_TRUE(same) << dtype_name(from) << " to " << dtype_name(to) << " of " << in.get(0, c)
                          << ": expected " << e << ", found " << a;
      }
    }
  }
}

// ---- embed ----

struct EmbedCase {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t vocab = 0;
  std::int64_t cols = 0;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::string(dtype_name(dtype)) + "_" + std::to_string(rows) + "of" +
           std::to_string(vocab) + "x" + std::to_string(cols) + "_" + layout_name(layout);
  }
};

std::vector<EmbedCase> embed_cases() {
  std::vector<EmbedCase> cases;
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t rows : some_rows) cases.push_back({dtype, rows, 50, 65, layout});
      cases.push_back({dtype, 5, 2048, 768, layout});
    }
    cases.push_back({dtype, 2, 128256, 32, Layout::tight});
  }
  return cases;
}

class Embed : public ::testing::TestWithParam<EmbedCase> {};
INSTANTIATE_TEST_SUITE_P(Dense, Embed, ::testing::ValuesIn(embed_cases()), case_name<EmbedCase>);

TEST_P(Embed, IsACopy) {
  const EmbedCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  Operand ids = Operand(Role::input, DType::i32, p.rows, 1, p.layout).uniform(seed, p.vocab);
  ids.put(0, 0, static_cast<double>(p.vocab - 1));
  const Operand table = Operand(Role::input, p.dtype, p.vocab, p.cols, p.layout).bell(seed);
  const Operand out(Role::output, p.dtype, p.rows, p.cols, p.layout);
  const Outcome o = run_both({&ids, &table, &out}, [](Ops& ops, const std::vector<View>& v) {
    ops.embed(v[0], v[1], v[2]);
  });
  expect_exact(o, 2);
  EXPECT_EQ(o.actual[2].get(0, p.cols - 1), table.get(p.vocab - 1, p.cols - 1));
}

// ---- row_nll, row_argmax ----

enum class Logits { plain, huge, negative_infinities, ties };

struct LogitsCase {
  std::int64_t rows = 0;
  std::int64_t vocab = 0;
  Layout layout = Layout::tight;
  Logits kind = Logits::plain;
  [[nodiscard]] std::string name() const {
    const char* kinds[] = {"plain", "huge", "infinities", "ties"};
    return std::to_string(rows) + "x" + std::to_string(vocab) + "_" + layout_name(layout) + "_" +
           kinds[static_cast<int>(kind)];
  }
};

std::vector<LogitsCase> logits_cases() {
  std::vector<LogitsCase> cases;
  for (const Logits kind :
       {Logits::plain, Logits::huge, Logits::negative_infinities, Logits::ties}) {
    for (const Layout layout : all_layouts) {
      for (const std::int64_t vocab : {1, 2, 31, 255, 1025}) {
        for (const std::int64_t rows : {1, 5, 33}) cases.push_back({rows, vocab, layout, kind});
      }
      cases.push_back({2, 2048, layout, kind});
      cases.push_back({2, 128256, layout, kind});
    }
  }
  return cases;
}

class OnLogits : public ::testing::TestWithParam<LogitsCase> {
 protected:
  void SetUp() override {
    const LogitsCase& p = GetParam();
    seed_ = seed_of(p.name());
    logits_ = Operand(Role::input, DType::f32, p.rows, p.vocab, p.layout).bell(seed_, 3.0);
    logits_.fill([&](std::int64_t r, std::int64_t c) {
      const double v = logits_.get(r, c);
      switch (p.kind) {
        case Logits::plain:
          return v;
        case Logits::huge:
          return 1000.0 * v;
        case Logits::negative_infinities:
          return (r + c) % 3 == 0 && c != p.vocab - 1 ? -infinity : v;
        case Logits::ties:
          return std::round(v);
      }
      return v;
    });
  }
  std::uint64_t seed_ = 0;
  Operand logits_;
};
INSTANTIATE_TEST_SUITE_P(Dense, OnLogits, ::testing::ValuesIn(logits_cases()),
                         case_name<LogitsCase>);

TEST_P(OnLogits, RowNll) {
  const LogitsCase& p = GetParam();
  Operand target = Operand(Role::input, DType::i32, p.rows, 1, p.layout).uniform(seed_, p.vocab);
  // Finite losses only: the last column is never -infinity.
  for (std::int64_t r = 0; r < p.rows; ++r) {
    const auto t = static_cast<std::int64_t>(target.get(r, 0));
    if (!std::isfinite(logits_.get(r, t))) target.put(r, 0, static_cast<double>(p.vocab - 1));
    if (r % 4 == 3) target.put(r, 0, r % 8 == 3 ? -1.0 : -100.0);
  }
  const Operand nll(Role::output, DType::f64, p.rows, 1, p.layout);
  const Outcome o = run_both({&logits_, &target, &nll}, [](Ops& ops, const std::vector<View>& v) {
    ops.row_nll(v[0], v[1], v[2]);
  });
  // Each exponential is off by the rounding of its argument (those that count lie within 32 of the
  // maximum), the sum by its roundings; the logarithm turns both into absolute errors.
  const double sum = 8.0 + 32.0 + 2.0 * std::sqrt(static_cast<double>(p.vocab));
  expect_close(o, 2, {2.0 * sum * roundoff(DType::f32), 4.0 * roundoff(DType::f64)});
  for (std::int64_t r = 3; r < p.rows; r += 4) EXPECT_EQ(o.actual[2].get(r, 0), 0.0) << r;
}

TEST_P(OnLogits, RowArgmaxTakesTheLowestOfEquals) {
  const LogitsCase& p = GetParam();
  if (p.kind == Logits::ties && p.rows > 2) {
    for (std::int64_t c = 0; c < p.vocab; ++c) {
      logits_.put(1, c, -2.5);
      logits_.put(2, c, -infinity);
    }
  }
  const Operand out(Role::output, DType::i32, p.rows, 1, p.layout);
  const Outcome o = run_both(
      {&logits_, &out}, [](Ops& ops, const std::vector<View>& v) { ops.row_argmax(v[0], v[1]); });
  expect_exact(o, 1);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    std::int64_t best = 0;
    for (std::int64_t c = 1; c < p.vocab; ++c) {
      if (logits_.get(r, c) > logits_.get(r, best)) best = c;
    }
    EXPECT_EQ(o.actual[1].get(r, 0), static_cast<double>(best)) << "row " << r;
  }
}

// ---- matmul ----

struct MatmulCase {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  DType in = DType::f32;
  DType out = DType::f32;
  Layout layout = Layout::tight;
  bool accumulate = false;
  [[nodiscard]] std::string name() const {
    return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + "_" +
           dtype_name(in) + "_to_" + dtype_name(out) + "_" + layout_name(layout) +
           (accumulate ? "_acc" : "");
  }
};

std::vector<MatmulCase> matmul_cases() {
  std::vector<MatmulCase> cases;
  const std::pair<DType, DType> types[] = {{DType::f32, DType::f32},
                                           {DType::f16, DType::f16},
                                           {DType::f16, DType::f32},
                                           {DType::bf16, DType::bf16},
                                           {DType::bf16, DType::f32}};
  const std::pair<std::int64_t, std::int64_t> inner[] = {{1, 1},   {3, 5},    {7, 64},
                                                         {64, 33}, {65, 255}, {256, 768}};
  std::size_t turn = 0;
  for (const auto& [in, out] : types) {
    for (const std::int64_t m : some_rows) {
      for (const auto& [n, k] : inner) {
        cases.push_back({m, n, k, in, out, all_layouts[turn % 3], turn % 2 == 1});
        turn += 1;
      }
      turn += 1;
    }
    for (const Layout layout : all_layouts) {
      for (const bool accumulate : {false, true}) {
        cases.push_back({129, 130, 131, in, out, layout, accumulate});
      }
    }
    cases.push_back({2, 768, 256, in, out, Layout::tight, false});
    cases.push_back({2, 512, 4096, in, out, Layout::wide, false});
    cases.push_back({3, 256, 14336, in, out, Layout::tight, true});
    cases.push_back({3, 14336, 256, in, out, Layout::tight, false});
    cases.push_back({2, 2048, 768, in, out, Layout::wide, false});
  }
  return cases;
}

class Matmul : public ::testing::TestWithParam<MatmulCase> {};
INSTANTIATE_TEST_SUITE_P(Dense, Matmul, ::testing::ValuesIn(matmul_cases()), case_name<MatmulCase>);

TEST_P(Matmul, StaysWithinTheRoundingOfItsSums) {
  const MatmulCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x = Operand(Role::input, p.in, p.m, p.k, p.layout).bell(seed);
  const Operand w = Operand(Role::input, p.in, p.n, p.k, p.layout).bell(seed / 3, 0.5);
  Operand out(p.accumulate ? Role::inout : Role::output, p.out, p.m, p.n, p.layout);
  if (p.accumulate) out.bell(seed / 7, 4.0);
  const Outcome o = run_both({&x, &w, &out}, [&p](Ops& ops, const std::vector<View>& v) {
    ops.matmul(v[0], v[1], v[2], p.accumulate);
  });
  // |x_r| |w_c| bounds sum |x_ri| |w_ci| (Cauchy-Schwarz).
  const std::vector<double> xs = row_norms(x);
  const std::vector<double> ws = row_norms(w);
  std::vector<double> each;
  for (std::int64_t r = 0; r < p.m; ++r) {
    for (std::int64_t c = 0; c < p.n; ++c) {
      const double before = p.accumulate ? std::abs(out.get(r, c)) : 0.0;
      const double magnitude =
          xs[static_cast<std::size_t>(r)] * ws[static_cast<std::size_t>(c)] + before;
      const double stored = o.expected[2].get(r, c);
      double tolerance = sum_tolerance(p.k, magnitude) + store_tolerance(p.out, std::abs(stored));
      // The product may be rounded before it is added to a 16-bit output.
      if (p.accumulate) tolerance += store_tolerance(p.out, std::abs(stored - out.get(r, c)));
      each.push_back(tolerance);
    }
  }
  expect_close(o, 2, {0.0, 0.0, each});
  if (p.m * p.n * p.k > 4'000'000) return;
  // Both against the sum in f64, so that a fault they share shows.
  std::vector<double> exact;
  for (std::int64_t r = 0; r < p.m; ++r) {
    for (std::int64_t c = 0; c < p.n; ++c) {
      double sum = p.accumulate ? out.get(r, c) : 0.0;
      for (std::int64_t i = 0; i < p.k; ++i) sum += x.get(r, i) * w.get(c, i);
      exact.push_back(sum);
    }
  }
  for (const Operand* found : {&o.expected[2], &o.actual[2]}) {
    const Comparison c = compare_close(found->values(), exact, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << (found == &o.actual[2] ? "backend" : "reference") << ": " << c.message;
  }
}

// An infinity in one weight row must reach its column of the output and no other.
TEST(DenseEdges, MatmulKeepsNonfiniteValuesInTheirPlace) {
  for (const DType dtype : small_floats) {
    const Operand x = Operand(Role::input, dtype, 5, 64).fill([](std::int64_t r, std::int64_t) {
      return static_cast<double>(r + 1);
    });
    Operand w =
        Operand(Role::input, dtype, 9, 64).fill([](std::int64_t, std::int64_t) { return 0.25; });
    w.put(4, 63, infinity);
    const Operand out(Role::output, dtype, 5, 9);
    const Outcome o = run_both({&x, &w, &out}, [](Ops& ops, const std::vector<View>& v) {
      ops.matmul(v[0], v[1], v[2], false);
    });
    expect_exact(o, 2);  // small integers: every sum is exact
    for (std::int64_t r = 0; r < 5; ++r) EXPECT_EQ(o.actual[2].get(r, 4), infinity);
    EXPECT_EQ(o.actual[2].get(2, 3), 48.0);
  }
}

// ---- marks and the trace itself ----

TEST(Trace, CountsCallsBytesFlopsAndTime) {
  const std::int64_t m = 256, n = 512, k = 1024;
  const Operand x = Operand(Role::input, DType::f32, m, k).bell(1);
  const Operand w = Operand(Role::input, DType::f32, n, k).bell(2);
  const Operand out(Role::output, DType::f32, m, n);
  run_both({&x, &w, &out}, [&](Ops& ops, const std::vector<View>& v) {
    TraceOps trace(ops, true);
    for (int i = 0; i < 3; ++i) trace.matmul(v[0], v[1], v[2], i > 0);
    const auto stats = trace.stats();
    EXPECT_EQ(stats.size(), TraceOps::op_names().size());
    const OpStats& s = stats.at("matmul");
    EXPECT_EQ(s.calls, 3);
    EXPECT_EQ(s.flops, 3 * 2 * m * n * k);
    EXPECT_EQ(s.bytes, 4 * (3 * (m * k + n * k + m * n) + 2 * m * n));
    EXPECT_GT(s.ms, 0.0);
    EXPECT_EQ(stats.at("embed").calls, 0);
    const Json json = trace.to_json();
    EXPECT_EQ(json.size(), 1U);
    EXPECT_EQ(json.at("matmul").at("calls"), 3);
    EXPECT_GT(json.at("matmul").at("gflop_per_s").get<double>(), 0.0);
    // More calls than a backend keeps marks.
    for (int i = 0; i < 20000; ++i) trace.zero(v[2].row_range(0, 1));
    EXPECT_GE(trace.stats().at("zero").ms, 0.0);
    EXPECT_EQ(trace.stats().at("zero").calls, 20000);
    trace.reset();
    EXPECT_TRUE(trace.to_json().empty());
    // A failing call is not counted.
    EXPECT_THROW(trace.matmul(v[0], v[1], v[0], false), Error);
    EXPECT_EQ(trace.stats().at("matmul").calls, 0);
  });
}

TEST(Marks, ElapsedTimeCoversTheWorkBetween) {
  const Operand x = Operand(Role::input, DType::f32, 512, 512).bell(1);
  const Operand out(Role::output, DType::f32, 512, 512);
  run_both({&x, &out}, [](Ops& ops, const std::vector<View>& v) {
    const std::int64_t first = ops.mark();
    ops.matmul(v[0], v[0], v[1], false);
    const std::int64_t second = ops.mark();
    ops.matmul(v[0], v[0], v[1], false);
    const std::int64_t third = ops.mark();
    const double a = ops.elapsed_ms(first, second);
    const double b = ops.elapsed_ms(second, third);
    EXPECT_GT(a, 0.0);
    EXPECT_GT(b, 0.0);
    // The clock's resolution is half a microsecond.
    EXPECT_NEAR(ops.elapsed_ms(first, third), a + b, 2e-3);
  });
}

}  // namespace
}  // namespace engine::test
