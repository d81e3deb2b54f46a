// Parity of orthogonal transforms, transpositions and what else decodes transformed weights.
#include <cmath>
#include <numeric>

#include "engine/ops/transform_view.h"
#include "tests/parity/parity_support.h"

namespace engine::test {
namespace {

struct TransformCase {
  Transform transform;
  std::int64_t d = 0, rows = 0;
  DType in = DType::f32, out = DType::f32;
  Layout layout = Layout::tight;
  DType rotations = DType::f32;
  [[nodiscard]] std::string name() const {
    const char* kind = transform.kind == TransformKind::hadamard ? "hadamard" : "butterfly";
    return std::string(kind) + (transform.shared ? "_shared" : "") +
           (transform.permuted ? "" : "_plain") + "_" + std::to_string(rows) + "x" +
           std::to_string(d) + "_" + dtype_name(in) + "_" + dtype_name(out) + "_" +
           layout_name(layout) + (rotations == DType::f16 ? "_f16rotations" : "");
  }
};

template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) { *out << c.name(); }

Transform transform_of(TransformKind kind, bool shared = false, bool permuted = true) {
  Transform t;
  t.kind = kind;
  t.shared = shared;
  t.permuted = permuted;
  t.seed = 3;
  t.stream = 4;
  return t;
}

std::vector<TransformCase> transform_cases() {
  std::vector<TransformCase> cases;
  std::size_t turn = 0;
  const auto add = [&](const Transform& t, std::int64_t d, std::int64_t rows) {
    cases.push_back({t, d, rows, small_floats[turn % 3], small_floats[turn / 2 % 3],
                     all_layouts[turn / 3 % 3]});
    ++turn;
  };
  const Transform h = transform_of(TransformKind::hadamard);
  // Every order and every number of levels after the five within a warp.
  for (const std::int64_t d :
       {1,     2,   4,    16,  32,   64, 128, 256,   512, 1024, 2048, 4096,  8192,
        16384, 12,  24,   384, 6144, 20, 640, 10240, 28,  56,   3584, 14336, 28672,
        36,    288, 4608, 52,  416,  60, 108, 116,   124, 140,  172,  344,   11008}) {
    add(h, d, d > 4096 ? 3 : 17);
  }
  for (const std::int64_t d : {1, 2, 6, 7, 45, 64, 96, 100, 256, 1000, 1024, 1344, 4096, 14336}) {
    for (const bool shared : {false, true}) {
      add(transform_of(TransformKind::butterfly, shared, turn % 3 != 0), d, d > 8192 ? 3 : 130);
    }
  }
  // Large sides, whose rotations take long to draw.
  add(transform_of(TransformKind::butterfly, true), 11008, 3);
  add(transform_of(TransformKind::butterfly, true), 28672, 3);
  // More rows than one turn of the butterfly's buffers takes, with and without vector accesses.
  const Transform b = transform_of(TransformKind::butterfly);
  cases.push_back({b, 4096, 1601});
  cases.push_back({b, 6, 33000, DType::bf16, DType::f32, Layout::odd});
  cases.push_back({b, 1024, 200, DType::f32, DType::f32, Layout::tight, DType::f16});
  cases.push_back({b, 45, 70, DType::f32, DType::f16, Layout::wide, DType::f16});
  cases.push_back({h, 4096, 200});
  cases.push_back({h, 14336, 65});
  return cases;
}

std::vector<float> signs_of(const TransformCase& c) {
  std::vector<float> signs(
      c.transform.kind == TransformKind::hadamard ? static_cast<std::size_t>(c.d) : std::size_t{0});
  for (std::size_t i = 0; i < signs.size(); ++i) {
    signs[i] = uniform_value(5, 5, i) < 0.5 ? -1.0F : 1.0F;
  }
  return signs;
}

// Runs body(view) with the transform's numbers on the backend.
void with_view(Ops& ops, const TransformCase& c,
               const std::function<void(const TransformView&)>& body) {
  Arena plan = Arena::measuring(ops.kind());
  const auto layout = [&](Arena& arena) {
    TransformView q =
        make_transform_view(ops, arena, MemTag::solver, c.transform, signs_of(c), c.d, 1);
    if (c.rotations == DType::f16) {
      const View first = arena.make(MemTag::solver, DType::f16, q.first.rows, q.first.cols);
      const View second = arena.make(MemTag::solver, DType::f16, q.second.rows, q.second.cols);
      if (!arena.is_measuring()) {
        ops.convert(q.first, first);
        ops.convert(q.second, second);
      }
      q.first = first;
      q.second = second;
    }
    if (!arena.is_measuring()) body(q);
  };
  layout(plan);
  Arena arena(ops.memory(), sides().ledger, plan.peak(), true);
  layout(arena);
  ops.synchronize();
}

class Transforms : public ::testing::TestWithParam<TransformCase> {};

// Both sides make f32 sums of d products (a butterfly: p1, then p2 products) whose coefficients
// form an orthogonal matrix: each is off by about sqrt(d) u |x|, at most 4 times that, and the
// output is rounded once.
TEST_P(Transforms, RowsAgree) {
  const TransformCase& c = GetParam();
  const std::uint64_t seed = seed_of(c.name());
  Operand x(Role::input, c.in, c.rows, c.d, c.layout);
  x.bell(seed);
  for (const bool inverse : {false, true}) {
    const Operand out(Role::output, c.out, c.rows, c.d, c.layout);
    const Outcome outcome = run_both({&x, &out}, [&](Ops& ops, const std::vector<View>& v) {
      with_view(ops, c,
                [&](const TransformView& q) { ops.transform_rows(v[0], q, inverse, v[1]); });
    });
    const std::vector<double> norms = row_norms(x);
    std::vector<double> each;
    for (std::int64_t r = 0; r < c.rows; ++r) {
      const double norm = norms[static_cast<std::size_t>(r)];
      const double error = 8 * std::sqrt(static_cast<double>(c.d)) * roundoff(DType::f32) * norm +
                           store_tolerance(c.out, norm);
      each.insert(each.end(), static_cast<std::size_t>(c.d), error);
    }
    expect_close(outcome, 1, {.each = each});
  }
}

class SmallTransforms : public ::testing::TestWithParam<TransformCase> {};

TEST_P(SmallTransforms, InPlaceIsTheSame) {
  const TransformCase& c = GetParam();
  Operand x(Role::input, c.out, c.rows, c.d, c.layout);
  x.bell(seed_of(c.name()));
  Operand placed(Role::inout, c.out, c.rows, c.d, c.layout);
  placed.bell(seed_of(c.name()));
  const Operand out(Role::output, c.out, c.rows, c.d, c.layout);
  const Outcome outcome = run_both({&x, &out, &placed}, [&](Ops& ops, const std::vector<View>& v) {
    with_view(ops, c, [&](const TransformView& q) {
      ops.transform_rows(v[0], q, true, v[1]);
      ops.transform_rows(v[2], q, true, v[2]);
    });
  });
  EXPECT_EQ(outcome.expected[1].element_bytes(), outcome.expected[2].element_bytes());
  EXPECT_EQ(outcome.actual[1].element_bytes(), outcome.actual[2].element_bytes());
}

INSTANTIATE_TEST_SUITE_P(TransformParity, Transforms, ::testing::ValuesIn(transform_cases()),
                         case_name<TransformCase>);

std::vector<TransformCase> small_cases() {
  std::vector<TransformCase> cases = transform_cases();
  std::erase_if(cases, [](const TransformCase& c) { return c.d * c.rows > 600000; });
  return cases;
}

INSTANTIATE_TEST_SUITE_P(TransformParity, SmallTransforms, ::testing::ValuesIn(small_cases()),
                         case_name<TransformCase>);

TEST(TransformDecodeParity, Transpose) {
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const auto& [rows, cols] : std::vector<std::pair<std::int64_t, std::int64_t>>{
               {1, 1}, {1, 100}, {33, 64}, {65, 31}, {256, 300}}) {
        Operand x(Role::input, dtype, rows, cols, layout);
        x.bell(1);
        const Operand out(Role::output, dtype, cols, rows, layout);
        expect_exact(
            run_both({&x, &out},
                     [](Ops& ops, const std::vector<View>& v) { ops.transpose(v[0], v[1]); }),
            1);
      }
    }
  }
}

// Products and sums are rounded one by one on both sides.
TEST(TransformDecodeParity, DecodeMidriseAndLattice) {
  for (const Layout layout : all_layouts) {
    for (const auto& [rows, cols] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 8}, {7, 2056}, {90, 512}}) {
      for (const bool by_row : {false, true}) {
        SCOPED_TRACE(std::string(layout_name(layout)) + " " + std::to_string(rows));
        Operand scales(Role::input, DType::f32, by_row ? rows : 1, 1, layout);
        scales.bell(2);
        for (const int bits : {1, 2, 3, 8}) {
          Operand codes(Role::input, DType::u8, rows, cols, layout);
          codes.uniform(3, std::int64_t{1} << bits);
          const Operand out(Role::output, DType::f32, rows, cols, layout);
          expect_exact(run_both({&codes, &scales, &out},
                                [&](Ops& ops, const std::vector<View>& v) {
                                  ops.decode_midrise(v[0], bits, v[1], v[2]);
                                }),
                       2);
        }
        Operand bytes(Role::input, DType::u8, rows, cols / 8, layout);
        bytes.uniform(4, 256);
        // Two bytes of one code each.
        Operand pairs(Role::input, DType::u8, rows, cols / 4);
        pairs.uniform(5, 256);
        const Operand out(Role::output, DType::f32, rows, cols, layout);
        expect_exact(run_both({&pairs, &bytes, &scales, &out},
                              [&](Ops& ops, const std::vector<View>& v) {
                                const View words =
                                    make_view(v[0].data, DType::i16, v[0].device, rows, cols / 8);
                                ops.decode_lattice(words, LatticeBook::e8p, v[2], false, v[3]);
                                ops.decode_lattice(v[1], LatticeBook::e8_byte, v[2], true, v[3]);
                              }),
                     3);
      }
    }
  }
}

// Every point of both books.
TEST(TransformDecodeParity, EveryLatticePoint) {
  Operand pairs(Role::input, DType::u8, 256, 512);
  pairs.fill(
      [](std::int64_t r, std::int64_t c) { return static_cast<double>(c % 2 == 0 ? r : c / 2); });
  Operand bytes(Role::input, DType::u8, 1, 256);
  bytes.fill([](std::int64_t, std::int64_t c) { return static_cast<double>(c); });
  Operand one(Role::input, DType::f32, 1, 1);
  one.put(0, 0, 1.0);
  const Operand wide(Role::output, DType::f32, 256, 2048),
      narrow(Role::output, DType::f32, 1, 2048);
  const Outcome outcome =
      run_both({&pairs, &bytes, &one, &wide, &narrow}, [](Ops& ops, const std::vector<View>& v) {
        const View words = make_view(v[0].data, DType::i16, v[0].device, 256, 256);
        ops.decode_lattice(words, LatticeBook::e8p, v[2], false, v[3]);
        ops.decode_lattice(v[1], LatticeBook::e8_byte, v[2], false, v[4]);
      });
  expect_exact(outcome, 3);
  expect_exact(outcome, 4);
}

TEST(TransformDecodeParity, PlaceColumns) {
  for (const DType dtype : small_floats) {
    for (const Layout layout : all_layouts) {
      for (const auto& [rows, cols] :
           std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 1}, {19, 300}, {70, 4096}}) {
        Operand x(Role::input, DType::f32, rows, cols, layout);
        x.bell(1);
        Operand diagonal(Role::input, DType::f32, 1, cols);
        diagonal.bell(2);
        Operand perm(Role::input, DType::i32, 1, cols);
        const std::vector<std::int32_t> order = random_order(cols, 3);
        perm.fill([&](std::int64_t, std::int64_t c) { return order[static_cast<std::size_t>(c)]; });
        for (const bool scaled : {false, true}) {
          for (const bool permuted : {false, true}) {
            const Operand out(Role::output, dtype, rows, cols, layout);
            expect_exact(run_both({&x, &perm, &diagonal, &out},
                                  [&](Ops& ops, const std::vector<View>& v) {
                                    ops.place_columns(v[0], permuted ? v[1] : View{},
                                                      scaled ? v[2] : View{}, v[3]);
                                  }),
                         3);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace engine::test
