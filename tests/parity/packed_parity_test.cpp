// Parity of the ops on the kernel layout: moving in and out is exact, products are within the
// rounding of their sums.
#include <limits>

#include "tests/parity/packed_operands.h"

namespace engine::test {
namespace {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

// Every kind of code: eight widths, the codebook and the two bits in two terms.
struct Kind {
  PackedKind kind;
  int bits;
};
const std::vector<Kind> all_kinds = [] {
  std::vector<Kind> kinds;
  for (int bits = 1; bits <= 8; ++bits) kinds.push_back({PackedKind::affine, bits});
  kinds.push_back({PackedKind::codebook, 4});
  kinds.push_back({PackedKind::binary2, 2});
  return kinds;
}();
const std::int64_t all_groups[] = {128, 0, 32, 64, 256};

// ---- repack, unpack, expand ----

struct LayoutCase {
  PackedShape shape;
  bool permuted = false;
  DType out = DType::f32;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return shape_name(shape) + (permuted ? "_perm" : "") + "_to_" + dtype_name(out) + "_" +
           layout_name(layout);
  }
};

std::vector<LayoutCase> layout_cases() {
  std::vector<LayoutCase> cases;
  const std::pair<std::int64_t, std::int64_t> sizes[] = {{48, 160},  {5, 131}, {96, 256},
                                                         {33, 1000}, {1, 1},   {272, 384}};
  std::size_t turn = 0;
  for (const Kind& k : all_kinds) {
    for (const std::int64_t group : all_groups) {
      for (const bool zeros : {true, false}) {
        for (const DType out : small_floats) {
          const auto& [rows, cols] = sizes[turn % 6];
          cases.push_back(
              {packed_shape(rows, cols, k.kind, k.bits, group, small_floats[turn / 2 % 3], zeros),
               turn % 4 == 1, out, all_layouts[turn / 3 % 3]});
          turn += 1;
        }
        turn += 1;
      }
    }
  }
  const PackedShape large = packed_shape(512, 4096, PackedKind::affine, 4, 128, DType::f16, true);
  cases.push_back({large, false, DType::bf16, Layout::tight});
  cases.push_back({large, true, DType::f16, Layout::wide});
  return cases;
}

class KernelLayout : public ::testing::TestWithParam<LayoutCase> {};
INSTANTIATE_TEST_SUITE_P(Packed, KernelLayout, ::testing::ValuesIn(layout_cases()),
                         case_name<LayoutCase>);

TEST_P(KernelLayout, RepackUnpackAndExpandAreExact) {
  const LayoutCase& p = GetParam();
  const PackedShape& s = p.shape;
  const std::uint64_t seed = seed_of(p.name());
  const PackedOperands w(s, p.permuted, seed, p.layout, seed);
  const Operand records(Role::output, DType::u8, 1, s.records_bytes());
  const Operand row_units(Role::output, DType::u8, s.group == 0 ? 1 : 0, s.row_unit_bytes());
  const Operand codes(Role::output, DType::u8, s.rows, s.cols, p.layout);
  const Operand scales(Role::output, DType::f32, w.scales.rows(), w.scales.cols(), p.layout);
  const Operand zeros(Role::output, DType::i32, w.scales.rows(), w.scales.cols(), p.layout);
  const Operand out(Role::output, p.out, s.rows, s.cols, p.layout);
  const Outcome o = run_both({&w.codes, &w.scales, &w.zeros, &w.book, &w.permutation, &records,
                              &row_units, &codes, &scales, &zeros, &out},
                             [&](Ops& ops, const std::vector<View>& v) {
                               const PackedWeight packed{s, v[5], v[6], v[3], v[4]};
                               ops.repack(v[0], v[1], v[2], packed);
                               ops.unpack(packed, v[7], v[8], v[9]);
                               ops.expand(packed, v[10]);
                             });
  for (std::size_t i = 5; i <= 10; ++i) {
    if (o.expected[i].rows() > 0) expect_exact(o, i);
  }
  // The layout is the reference's, and what comes out is what went in.
  EXPECT_EQ(o.actual[5].element_bytes(), w.records.element_bytes());
  EXPECT_EQ(o.actual[6].element_bytes(), w.row_units.element_bytes());
  EXPECT_EQ(o.actual[7].element_bytes(), w.codes.element_bytes());
  EXPECT_EQ(o.actual[8].element_bytes(), w.scales.element_bytes());
  if (s.zeros) {
    EXPECT_EQ(o.actual[9].element_bytes(), w.zeros.element_bytes());
  } else {
    for (const std::int64_t z : o.actual[9].integers()) ASSERT_EQ(z, implicit_zero(s));
  }
  const std::vector<float> values = w.decoded().value;
  for (std::int64_t i = 0; i < s.rows * s.cols; ++i) {
    const float expected = round_to(p.out, values[static_cast<std::size_t>(i)]);
    ASSERT_EQ(o.actual[10].get(i / s.cols, i % s.cols), static_cast<double>(expected))
        << "row " << i / s.cols << ", column " << i % s.cols;
  }
}

// ---- packed_matmul, linear ----

const char* kernel_name(PackedKernel kernel) {
  const char* names[] = {"automatic", "vector", "matrix", "expand"};
  return names[static_cast<int>(kernel)];
}
const PackedKernel all_kernels[] = {PackedKernel::automatic, PackedKernel::vector,
                                    PackedKernel::matrix, PackedKernel::expand};

struct ProductCase {
  PackedShape shape;
  bool permuted = false;
  std::int64_t m = 1;
  PackedKernel kernel = PackedKernel::automatic;
  DType x = DType::bf16;
  DType out = DType::bf16;
  bool accumulate = false;
  Layout layout = Layout::tight;
  bool linear = false;  // through Ops::linear
  [[nodiscard]] std::string name() const {
    return shape_name(shape) + (permuted ? "_perm" : "") + "_m" + std::to_string(m) + "_" +
           kernel_name(kernel) + "_" + dtype_name(x) + "_to_" + dtype_name(out) +
           (accumulate ? "_acc" : "") + "_" + layout_name(layout) + (linear ? "_linear" : "");
  }
};

// Every kind, number of rows of x, kernel and type of x; the rest take turns with periods that do
// not divide each other.
std::vector<ProductCase> product_cases() {
  std::vector<ProductCase> cases;
  const std::pair<std::int64_t, std::int64_t> sizes[] = {
      {96, 256}, {48, 160}, {272, 384}, {17, 520}, {64, 128}, {130, 1000}, {16, 2048}};
  const std::int64_t rows[] = {1, 2, 3, 8, 16, 17, 64, 200};
  std::size_t turn = 0;
  for (const Kind& k : all_kinds) {
    for (const std::int64_t m : rows) {
      for (const PackedKernel kernel : all_kernels) {
        for (const DType x : {DType::f16, DType::bf16}) {
          const auto& [n, cols] = sizes[turn % 7];
          const PackedShape s = packed_shape(n, cols, k.kind, k.bits, all_groups[turn / 2 % 5],
                                             small_floats[turn / 3 % 3], turn / 4 % 3 != 0);
          cases.push_back({s, turn % 5 == 3, m, kernel, x, turn / 7 % 2 == 0 ? x : DType::f32,
                           turn / 5 % 2 == 1, all_layouts[turn / 11 % 3], turn % 6 == 0});
          turn += 1;
        }
      }
      turn += 1;
    }
  }
  // Long rows and many: by each kernel that is meant for so many rows of x.
  const auto large = [&](std::int64_t n, std::int64_t k, const Kind& kind, std::int64_t m,
                         PackedKernel kernel, DType x) {
    const PackedShape s = packed_shape(n, k, kind.kind, kind.bits, 128, DType::f16, true);
    cases.push_back({s, false, m, kernel, x, x, m == 9, Layout::tight, false});
  };
  const Kind four = {PackedKind::affine, 4}, three = {PackedKind::affine, 3};
  const Kind eight = {PackedKind::affine, 8}, book = {PackedKind::codebook, 4};
  large(512, 4096, four, 1, PackedKernel::vector, DType::bf16);
  large(512, 4096, four, 9, PackedKernel::vector, DType::f16);
  large(512, 4096, four, 200, PackedKernel::matrix, DType::bf16);
  large(512, 4096, three, 64, PackedKernel::matrix, DType::f16);
  large(512, 4096, eight, 200, PackedKernel::expand, DType::bf16);
  large(64, 14336, four, 16, PackedKernel::vector, DType::bf16);
  large(64, 14336, three, 1, PackedKernel::vector, DType::f16);
  large(64, 14336, eight, 9, PackedKernel::vector, DType::bf16);
  large(64, 14336, book, 2, PackedKernel::vector, DType::bf16);
  large(64, 14336, book, 200, PackedKernel::matrix, DType::bf16);
  // More row tiles than a GPU has blocks for at once, for every kind of kernel and number of rows.
  std::int64_t m = 1;
  for (const Kind& k : all_kinds) {
    const DType x = m % 2 == 0 ? DType::f16 : DType::bf16;
    large(32 * 132 * 3 + 17, 256, k, m, PackedKernel::vector, x);
    m = m % 16 + 5;
  }
  return cases;
}

// w [n, cols] as floats; x, out and its value before, and what both sides made of it.
struct Product {
  const Operand* x;
  const Operand* out;
  const Outcome* outcome;
  std::size_t out_index;
  bool accumulate;
  bool rounds;  // a side may round weights to x's dtype
};

void check_product(const Product& p, const DecodedWeight& w) {
  const std::int64_t m = p.x->rows(), k = p.x->cols(), n = p.out->cols();
  const DType to = p.out->dtype();
  const std::vector<double> xs = row_norms(*p.x);
  const std::vector<WeightRow> ws = weight_rows(w);
  const Operand& expected = p.outcome->expected.at(p.out_index);
  std::vector<double> each;
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t c = 0; c < n; ++c) {
      const double before = p.accumulate ? p.out->get(r, c) : 0.0;
      const double stored = expected.get(r, c);
      double tolerance =
          product_tolerance(k, xs[static_cast<std::size_t>(r)], ws[static_cast<std::size_t>(c)],
                            p.rounds, p.x->dtype()) +
          sum_tolerance(1, std::abs(before)) + store_tolerance(to, std::abs(stored));
      // The product may be rounded before it is added to a 16-bit output.
      if (p.accumulate) tolerance += store_tolerance(to, std::abs(stored - before));
      each.push_back(tolerance);
    }
  }
  expect_close(*p.outcome, p.out_index, {0.0, 0.0, each});
  if (m * n * k > 1'000'000) return;
  // Both against the sum in f64, so that a fault they share shows.
  std::vector<double> x = p.x->values();
  std::vector<double> exact;
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t c = 0; c < n; ++c) {
      double sum = p.accumulate ? p.out->get(r, c) : 0.0;
      for (std::int64_t i = 0; i < k; ++i) {
        sum += x[static_cast<std::size_t>(r * k + i)] *
               static_cast<double>(w.value[static_cast<std::size_t>(c * k + i)]);
      }
      exact.push_back(sum);
    }
  }
  for (const Operand* found : {&expected, &p.outcome->actual.at(p.out_index)}) {
    const Comparison c = compare_close(found->values(), exact, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << (found == &expected ? "reference" : "backend") << ": " << c.message;
  }
}

class PackedProduct : public ::testing::TestWithParam<ProductCase> {};
INSTANTIATE_TEST_SUITE_P(Packed, PackedProduct, ::testing::ValuesIn(product_cases()),
                         case_name<ProductCase>);

TEST_P(PackedProduct, StaysWithinTheRoundingOfItsSums) {
  const ProductCase& p = GetParam();
  const PackedShape& s = p.shape;
  const std::uint64_t seed = seed_of(p.name());
  const PackedOperands w(s, p.permuted, seed, Layout::tight, seed);
  const Operand x = Operand(Role::input, p.x, p.m, s.cols, p.layout).bell(seed / 3);
  Operand out(p.accumulate ? Role::inout : Role::output, p.out, p.m, s.rows, p.layout);
  if (p.accumulate) out.bell(seed / 7, 4.0);
  std::vector<const Operand*> operands = {&x, &out};
  w.append_to(operands);
  const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
    Linear linear;
    linear.packed = w.weight(v, 2);
    const Scratch workspace(ops, ops.packed_workspace_bytes(s, p.m, p.x, p.kernel));
    if (p.linear) {
      ops.linear(v[0], linear, v[1], p.accumulate, workspace.view(), p.kernel);
    } else {
      ops.packed_matmul(v[0], linear.packed, v[1], p.accumulate, p.kernel, workspace.view());
    }
    ops.synchronize();
  });
  // The vector kernel rounds the book only.
  const bool rounds = p.kernel != PackedKernel::vector || s.kind == PackedKind::codebook;
  check_product({&x, &out, &o, 1, p.accumulate, rounds}, w.decoded());
}

// A weight of one column that counts must reach its output and no other, whatever the kernel: each
// of the record's places in turn, over the whole matrix.
TEST(PackedEdges, EveryColumnMeetsItsInput) {
  for (const Kind& k : all_kinds) {
    for (const PackedKernel kernel : all_kernels) {
      const PackedShape s = packed_shape(32, 256, k.kind, k.bits, 32, DType::f32, false);
      // x row i is 1 at columns i, i + 16, ...: every product is a sum of 16 known weights, which
      // are multiples of 1/64 (or of the book's 1/8) and so exact in every type.
      PackedOperands w(s, false, seed_of("columns") + static_cast<std::uint64_t>(k.bits));
      w.scales.fill([](std::int64_t, std::int64_t) { return 1.0 / 64; });
      w.book.fill([](std::int64_t, std::int64_t c) { return static_cast<double>(c - 6) / 8; });
      pack_records(w.codes.host(), w.scales.host(), w.zeros.host(), w.host_weight(), 0,
                   s.row_tiles());
      const Operand x =
          Operand(Role::input, DType::bf16, 16, 256).fill([](std::int64_t r, std::int64_t c) {
            return c % 16 == (r + c / 16) % 16 ? 1.0 : 0.0;
          });
      const Operand out(Role::output, DType::f32, 16, 32);
      std::vector<const Operand*> operands = {&x, &out};
      w.append_to(operands);
      const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
        const Scratch workspace(ops, ops.packed_workspace_bytes(s, 16, DType::bf16, kernel));
        ops.packed_matmul(v[0], w.weight(v, 2), v[1], false, kernel, workspace.view());
        ops.synchronize();
      });
      const std::vector<float> values = w.decoded().value;
      for (std::int64_t r = 0; r < 16; ++r) {
        for (std::int64_t c = 0; c < 32; ++c) {
          double sum = 0.0;
          for (std::int64_t j = 0; j < 256; ++j) {
            sum += x.get(r, j) * static_cast<double>(values[static_cast<std::size_t>(c * 256 + j)]);
          }
          for (const Operand* side : {&o.expected[1], &o.actual[1]}) {
            ASSERT_EQ(side->get(r, c), sum) << kind_name(k.kind) << k.bits << " "
                                            << kernel_name(kernel) << ": " << r << ", " << c;
          }
        }
      }
    }
  }
}

// An infinite input reaches every output of its row and none of another.
TEST(PackedEdges, NonfiniteInputsStayInTheirRow) {
  for (const PackedKernel kernel : all_kernels) {
    const PackedShape s = packed_shape(48, 256, PackedKind::affine, 4, 128, DType::f16, false);
    PackedOperands w(s, false, 11);
    w.codes.fill([](std::int64_t, std::int64_t) { return 15.0; });  // no weight is 0
    pack_records(w.codes.host(), w.scales.host(), w.zeros.host(), w.host_weight(), 0,
                 s.row_tiles());
    Operand x = Operand(Role::input, DType::bf16, 5, 256).bell(3);
    x.put(2, 77, std::numeric_limits<double>::infinity());
    const Operand out(Role::output, DType::f32, 5, 48);
    std::vector<const Operand*> operands = {&x, &out};
    w.append_to(operands);
    const Outcome o = run_both(operands, [&](Ops& ops, const std::vector<View>& v) {
      const Scratch workspace(ops, ops.packed_workspace_bytes(s, 5, DType::bf16, kernel));
      ops.packed_matmul(v[0], w.weight(v, 2), v[1], false, kernel, workspace.view());
      ops.synchronize();
    });
    for (const Operand* side : {&o.expected[1], &o.actual[1]}) {
      for (std::int64_t r = 0; r < 5; ++r) {
        for (std::int64_t c = 0; c < 48; ++c) {
          ASSERT_EQ(std::isfinite(side->get(r, c)), r != 2)
              << kernel_name(kernel) << ": " << r << ", " << c;
        }
      }
    }
  }
}

// ---- linear with a dense matrix ----

struct DenseCase {
  std::int64_t m = 1, n = 1, k = 1;
  DType x = DType::bf16;
  DType out = DType::bf16;
  bool accumulate = false;
  Layout layout = Layout::tight;
  [[nodiscard]] std::string name() const {
    return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + "_" +
           dtype_name(x) + "_to_" + dtype_name(out) + (accumulate ? "_acc_" : "_") +
           layout_name(layout);
  }
};

std::vector<DenseCase> dense_cases() {
  std::vector<DenseCase> cases;
  const std::pair<std::int64_t, std::int64_t> sizes[] = {
      {96, 256}, {48, 160}, {17, 131}, {64, 2048}};
  std::size_t turn = 0;
  for (const DType x : small_floats) {
    for (const std::int64_t m : {1, 2, 3, 8, 16, 17, 64}) {
      for (const auto& [n, k] : sizes) {
        cases.push_back({m, n, k, x, turn % 3 == 1 ? DType::f32 : x, turn / 2 % 2 == 1,
                         all_layouts[turn / 5 % 3]});
        turn += 1;
      }
    }
  }
  return cases;
}

class DenseLinear : public ::testing::TestWithParam<DenseCase> {};
INSTANTIATE_TEST_SUITE_P(Packed, DenseLinear, ::testing::ValuesIn(dense_cases()),
                         case_name<DenseCase>);

TEST_P(DenseLinear, StaysWithinTheRoundingOfItsSums) {
  const DenseCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const Operand x = Operand(Role::input, p.x, p.m, p.k, p.layout).bell(seed);
  const Operand w = Operand(Role::input, p.x, p.n, p.k, p.layout).bell(seed / 3, 0.1);
  Operand out(p.accumulate ? Role::inout : Role::output, p.out, p.m, p.n, p.layout);
  if (p.accumulate) out.bell(seed / 7, 2.0);
  const Outcome o = run_both({&x, &w, &out}, [&](Ops& ops, const std::vector<View>& v) {
    Linear linear;
    linear.dense = v[1];
    ops.linear(v[0], linear, v[2], p.accumulate, {}, PackedKernel::automatic);
    ops.synchronize();
  });
  check_product({&x, &out, &o, 2, p.accumulate, false}, DecodedWeight(w));
}

}  // namespace
}  // namespace engine::test
