// Parity of weights with transforms around their terms (QuIP, QuIP#): decoding the terms is exact,
// products are within the roundings of their steps, alone and where several go together.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "engine/ops/rotation.h"
#include "engine/weight/plane_read.h"
#include "engine/weight/row_decoder.h"
#include "tests/parity/packed_operands.h"
#include "tests/support/rotated_weights.h"
#include "tests/support/scheme_weights.h"

namespace engine::test {
namespace {

template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

struct RotatedOperand {
  explicit RotatedOperand(OwnedLinear w)
      : owned(std::move(w)),
        shape(*match_scheme(owned.weight)),
        records(Role::input, DType::u8, 1, shape.records_bytes()),
        terms(static_cast<std::size_t>(shape.rows * shape.cols)),
        diagonal(static_cast<std::size_t>(shape.cols), 1.0) {
    const std::vector<std::byte> bytes = scheme_records(owned.weight, shape);
    std::memcpy(records.host().data, bytes.data(), bytes.size());
    RowDecoder(owned.weight).decode_terms(0, host_view(terms.data(), shape.rows, shape.cols));
    for (const float v : terms) largest = std::max(largest, static_cast<double>(std::abs(v)));
    for (std::size_t j = 0; shape.diagonal && j < diagonal.size(); ++j) {
      diagonal[j] = static_cast<double>(read_float(owned.weight.plane(owned.weight.diagonal_plane),
                                                   0, static_cast<std::int64_t>(j)));
    }
  }

  // Runs body(linear) with the numbers of the transforms on the backend.
  void with_linear(Ops& ops, const View& view,
                   const std::function<void(const Linear&)>& body) const {
    Arena plan = Arena::measuring(ops.kind());
    static_cast<void>(take_rotation(plan, MemTag::weights, shape));
    Arena arena(ops.memory(), sides().ledger, std::max<std::int64_t>(plan.peak(), 256), true);
    Linear l;
    l.packed.shape = shape;
    l.packed.records = view;
    l.packed.rotation = take_rotation(arena, MemTag::weights, shape);
    fill_rotation(ops, l.packed.rotation, owned.weight, 1);
    body(l);
    ops.synchronize();
  }

  OwnedLinear owned;
  PackedShape shape;
  Operand records;
  std::vector<float> terms;
  std::vector<double> diagonal;
  double largest = 0;  // of |T|
};

const std::pair<std::int64_t, std::int64_t> quip_sizes[] = {
    {256, 768}, {17, 45}, {1024, 4096}, {96, 100}, {64, 1344}, {7, 6}, {1000, 130}};
const std::pair<std::int64_t, std::int64_t> quipsharp_sizes[] = {
    {256, 768}, {20, 640}, {1024, 4096}, {28, 56}, {160, 3584}, {36, 288}, {52, 416}, {1, 16}};

std::pair<std::int64_t, std::int64_t> size_of(RotatedMethod method, std::size_t turn) {
  return method == RotatedMethod::quip ? quip_sizes[turn % 7] : quipsharp_sizes[turn % 8];
}

// `turn` goes through what a method leaves open.
RotatedOptions options_of(RotatedMethod method, int bits, std::size_t turn) {
  RotatedOptions o{.method = method, .bits = bits};
  o.seed = turn + 1;
  if (method == RotatedMethod::quip) {
    o.shared = turn % 4 == 1;
    o.permuted = turn % 3 != 1;
    o.diagonal = turn % 5 != 2;
  }
  o.left = turn % 11 != 3;
  o.right = turn % 11 != 7;
  return o;
}

constexpr RotatedMethod methods[] = {RotatedMethod::quip, RotatedMethod::quipsharp};

// ---- expand ----

struct ExpandCase {
  RotatedOptions options;
  std::int64_t rows, cols;
  DType out;
  Layout layout;
  [[nodiscard]] std::string name() const {
    return rotated_name(options) + "_" + std::to_string(rows) + "x" + std::to_string(cols) +
           "_to_" + dtype_name(out) + "_" + layout_name(layout);
  }
};
std::vector<ExpandCase> expand_cases() {
  std::vector<ExpandCase> cases;
  std::size_t turn = 0;
  for (const RotatedMethod method : methods) {
    for (const int bits : {2, 3, 4}) {
      for (int i = 0; i < 5; ++i) {
        const auto& [rows, cols] = size_of(method, turn);
        cases.push_back({{.method = method, .bits = bits, .seed = turn + 1},
                         rows,
                         cols,
                         small_floats[turn % 3],
                         all_layouts[turn / 3 % 3]});
        ++turn;
      }
    }
  }
  return cases;
}
class RotatedExpand : public ::testing::TestWithParam<ExpandCase> {};
INSTANTIATE_TEST_SUITE_P(Rotated, RotatedExpand, ::testing::ValuesIn(expand_cases()),
                         case_name<ExpandCase>);

TEST_P(RotatedExpand, IsTheTermsRoundedOnce) {
  const ExpandCase& p = GetParam();
  const RotatedOperand w(rotated_weight(p.rows, p.cols, p.options));
  const Operand out(Role::output, p.out, p.rows, p.cols, p.layout);
  const Outcome o = run_both({&w.records, &out}, [&](Ops& ops, const std::vector<View>& v) {
    w.with_linear(ops, v[0], [&](const Linear& l) { ops.expand(l.packed, v[1]); });
  });
  expect_exact(o, 1);
  for (std::int64_t r = 0; r < p.rows; ++r) {
    for (std::int64_t c = 0; c < p.cols; ++c) {
      const float value = w.terms[static_cast<std::size_t>(r * p.cols + c)];
      ASSERT_EQ(o.actual[1].get(r, c), static_cast<double>(round_to(p.out, value)))
          << "row " << r << ", column " << c;
    }
  }
}

// ---- products ----

struct ProductCase {
  RotatedOptions options;
  std::int64_t rows, cols, m;
  PackedKernel kernel;
  DType x, out;
  bool accumulate;
  Layout layout;
  [[nodiscard]] std::string name() const {
    const char* kernels[] = {"automatic", "vector", "matrix", "expand"};
    return rotated_name(options) + "_" + std::to_string(rows) + "x" + std::to_string(cols) + "_m" +
           std::to_string(m) + "_" + kernels[static_cast<int>(kernel)] + "_" + dtype_name(x) +
           "_to_" + dtype_name(out) + (accumulate ? "_acc" : "") + "_" + layout_name(layout) + "_" +
           std::to_string(options.seed);
  }
};
std::vector<ProductCase> product_cases() {
  std::vector<ProductCase> cases;
  std::size_t turn = 0;
  for (const RotatedMethod method : methods) {
    for (const int bits : {2, 3, 4}) {
      for (const std::int64_t m : {1, 2, 3, 5, 8, 9, 16, 17, 64}) {
        for (const DType x : {DType::f16, DType::bf16}) {
          const auto& [rows, cols] = size_of(method, turn);
          const PackedKernel kernel = turn % 7 == 2   ? PackedKernel::vector
                                      : turn % 7 == 4 ? PackedKernel::expand
                                                      : PackedKernel::automatic;
          cases.push_back({options_of(method, bits, turn), rows, cols, m, kernel, x,
                           turn / 3 % 2 == 0 ? x : DType::f32, turn / 5 % 2 == 1,
                           all_layouts[turn / 2 % 3]});
          ++turn;
        }
      }
      ++turn;
    }
  }
  // Long rows, and more rows of outputs than one block of a Hadamard transform is quick with.
  const auto add = [&](const RotatedOptions& o, std::int64_t rows, std::int64_t cols,
                       std::int64_t m) {
    cases.push_back(
        {o, rows, cols, m, PackedKernel::automatic, DType::bf16, DType::bf16, true, Layout::tight});
  };
  for (const int bits : {2, 3, 4}) {
    add({.method = RotatedMethod::quipsharp, .bits = bits}, 64, 14336, bits);
    add({.method = RotatedMethod::quipsharp, .bits = bits}, 14336, 64, 1);
    add({.bits = bits}, 64, 14336, 1);
    add({.bits = bits}, 14336, 64, 3);
  }
  add({.method = RotatedMethod::quipsharp}, 64, 11008, 2);
  add({.method = RotatedMethod::quipsharp}, 64, 28672, 3);
  add({.method = RotatedMethod::quipsharp}, 16, 40960, 1);
  add({.shared = true}, 64, 11008, 2);
  return cases;
}

// What bounds the error of out = L^T (T (R (D x))):
//   - R D x rounded to x's dtype: errors of at most u of each element, independent, which T sums
//   up:
//     4 u |T|max |D x|, as R keeps lengths; f16 is scaled by 1/32 first, whose subnormals are
//     2^-24 apart; T rounded, where it is expanded: as much again;
//   - the f32 sums of the product: sum_tolerance with what the kernels add up for each weight, a
//     few times the largest;
//   - the transforms in f32: 8 sqrt(d) u of the length turned (transform_parity_test.cpp);
//   - the store.
std::vector<double> tolerances(const Operand& x, const Operand& before, const Operand& expected,
                               const RotatedOperand& w, bool accumulate) {
  const std::int64_t m = x.rows(), k = x.cols(), n = w.shape.rows;
  const double u = roundoff(DType::f32), root = std::sqrt(static_cast<double>(k));
  std::vector<double> each;
  for (std::int64_t r = 0; r < m; ++r) {
    double in = 0, out = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      const double v = x.get(r, i) * w.diagonal[static_cast<std::size_t>(i)];
      in += v * v;
    }
    for (std::int64_t c = 0; c < n; ++c) {
      const double v = expected.get(r, c) - (accumulate ? before.get(r, c) : 0.0);
      out += v * v;
    }
    in = std::sqrt(in);
    out = std::sqrt(out);
    const double rounding = 8.0 * roundoff(x.dtype()) * w.largest * in +
                            4.0 * w.largest * root * 32.0 * smallest_step(x.dtype());
    const double sums = sum_tolerance(k, in * 4.0 * w.largest * root);
    const double turns =
        8 * root * u * in * w.largest + 8 * std::sqrt(static_cast<double>(n)) * u * out;
    for (std::int64_t c = 0; c < n; ++c) {
      const double stored = std::abs(expected.get(r, c));
      const double old = accumulate ? std::abs(before.get(r, c)) : 0.0;
      each.push_back(rounding + sums + turns + sum_tolerance(1, old) +
                     store_tolerance(expected.dtype(), stored) +
                     (accumulate ? store_tolerance(expected.dtype(), stored + old) : 0.0));
    }
  }
  return each;
}

// Both sides against the weight by its definition, in f64, where that is quick. Rotations of
// butterflies in f16 have elements off by at most u each: with four stages, 4 u of what each stage
// sums up, of which no element is larger than about five times the mean.
void check_definition(const Operand& x, const Operand& before, const Outcome& o, std::size_t at,
                      const RotatedOperand& w, bool accumulate, std::vector<double> each) {
  const std::int64_t m = x.rows(), k = x.cols(), n = w.shape.rows;
  if (n * k > 250000) return;
  std::vector<float> decoded(static_cast<std::size_t>(n * k));
  decode_linear(w.owned.weight, host_view(decoded.data(), n, k));
  std::vector<double> exact;
  for (std::int64_t r = 0; r < m; ++r) {
    double in = 0, out = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      const double v = x.get(r, i) * w.diagonal[static_cast<std::size_t>(i)];
      in += v * v;
    }
    const std::size_t first = exact.size();
    for (std::int64_t c = 0; c < n; ++c) {
      double sum = 0;
      for (std::int64_t i = 0; i < k; ++i) {
        sum += x.get(r, i) * static_cast<double>(decoded[static_cast<std::size_t>(c * k + i)]);
      }
      out += sum * sum;
      exact.push_back(sum + (accumulate ? before.get(r, c) : 0.0));
    }
    const double u = roundoff(DType::f16);
    const bool left = w.shape.left.kind == TransformKind::butterfly;
    const bool right = w.shape.right.kind == TransformKind::butterfly;
    const double wide = std::min(1.0, 5.0 / std::sqrt(static_cast<double>(n)));
    for (std::size_t i = first; i < exact.size(); ++i) {
      each[i] += (right ? 8.0 * u * w.largest * std::sqrt(in) : 0.0) +
                 (left ? 8.0 * u * wide * std::sqrt(out) : 0.0);
    }
  }
  for (const Operand* found : {&o.expected[at], &o.actual[at]}) {
    const Comparison c = compare_close(found->values(), exact, {0.0, 0.0, each});
    EXPECT_TRUE(c.ok) << (found == &o.expected[at] ? "reference" : "backend") << ": " << c.message;
  }
}

class RotatedProduct : public ::testing::TestWithParam<ProductCase> {};
INSTANTIATE_TEST_SUITE_P(Rotated, RotatedProduct, ::testing::ValuesIn(product_cases()),
                         case_name<ProductCase>);

TEST_P(RotatedProduct, StaysWithinTheRoundingOfItsSteps) {
  const ProductCase& p = GetParam();
  const std::uint64_t seed = seed_of(p.name());
  const RotatedOperand w(rotated_weight(p.rows, p.cols, p.options));
  const Operand x = Operand(Role::input, p.x, p.m, p.cols, p.layout).bell(seed / 3);
  Operand out(p.accumulate ? Role::inout : Role::output, p.out, p.m, p.rows, p.layout);
  if (p.accumulate) out.bell(seed / 7, 4.0);
  const Outcome o = run_both({&x, &out, &w.records}, [&](Ops& ops, const std::vector<View>& v) {
    const Scratch workspace(ops, ops.packed_workspace_bytes(w.shape, p.m, p.x, p.kernel));
    w.with_linear(ops, v[2], [&](const Linear& l) {
      ops.linear(v[0], l, v[1], p.accumulate, workspace.view(), p.kernel);
    });
  });
  const std::vector<double> each = tolerances(x, out, o.expected[1], w, p.accumulate);
  expect_close(o, 1, {0.0, 0.0, each});
  check_definition(x, out, o, 1, w, p.accumulate, each);
}

// Linears of the same input, as queries, keys and values: together they are what each is alone.
TEST(RotatedLinears, TogetherAreWhatEachIsAlone) {
  for (const RotatedMethod method : methods) {
    for (const std::int64_t m : {1, 5, 12}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(method)) + " " + std::to_string(m));
      const auto make = [&](std::int64_t rows, std::uint64_t seed) {
        return RotatedOperand(
            rotated_weight(rows, 1024, {.method = method, .bits = 2, .seed = seed}));
      };
      const std::int64_t v_rows = m == 5 ? 640 : 80;  // 20 x 32 and 20 x 4
      const RotatedOperand q = make(256, 1), k = make(64, 2), v = make(v_rows, 3);
      const Operand x = Operand(Role::input, DType::bf16, m, 1024).bell(7);
      const Operand out_q(Role::output, DType::bf16, m, 256);
      const Operand out_k(Role::output, DType::bf16, m, 64),
          out_v(Role::output, DType::bf16, m, v_rows);
      const Outcome o = run_both(
          {&x, &out_q, &out_k, &out_v, &q.records, &k.records, &v.records},
          [&](Ops& ops, const std::vector<View>& views) {
            std::int64_t bytes = 0;
            for (const RotatedOperand* w : {&q, &k, &v}) {
              bytes = std::max(bytes, ops.packed_workspace_bytes(w->shape, m, DType::bf16,
                                                                 PackedKernel::automatic));
            }
            const Scratch workspace(ops, bytes);
            q.with_linear(ops, views[4], [&](const Linear& lq) {
              k.with_linear(ops, views[5], [&](const Linear& lk) {
                v.with_linear(ops, views[6], [&](const Linear& lv) {
                  const Ops::LinearOut all[] = {{&lq, views[1]}, {&lk, views[2]}, {&lv, views[3]}};
                  ops.linears(views[0], all, workspace.view());
                });
              });
            });
          });
      std::size_t at = 1;
      for (const auto& [w, out] : {std::pair(&q, &out_q), {&k, &out_k}, {&v, &out_v}}) {
        const std::vector<double> each = tolerances(x, *out, o.expected[at], *w, false);
        expect_close(o, at, {0.0, 0.0, each});
        check_definition(x, *out, o, at++, *w, false, each);
      }
    }
  }
}

// An infinite input reaches no other row of x.
TEST(RotatedEdges, NonfiniteInputsStayInTheirRow) {
  for (const RotatedMethod method : methods) {
    SCOPED_TRACE(static_cast<int>(method));
    const RotatedOperand w(rotated_weight(48, 768, {.method = method, .bits = 3}));
    Operand x = Operand(Role::input, DType::bf16, 5, 768).bell(3);
    x.put(2, 77, std::numeric_limits<double>::infinity());
    const Operand out(Role::output, DType::f32, 5, 48);
    const Outcome o = run_both({&x, &out, &w.records}, [&](Ops& ops, const std::vector<View>& v) {
      const Scratch workspace(
          ops, ops.packed_workspace_bytes(w.shape, 5, DType::bf16, PackedKernel::automatic));
      w.with_linear(ops, v[2], [&](const Linear& l) {
        ops.packed_matmul(v[0], l.packed, v[1], false, PackedKernel::automatic, workspace.view());
      });
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
