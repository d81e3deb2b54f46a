// Decoding by the weight algebra against values worked out by hand, and what validate refuses.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "engine/weight/bits.h"
#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"

namespace engine {
namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::uint8_t>;
using Ints = std::vector<std::int32_t>;

template <class T>
View view_of(const std::vector<T>& v, std::int64_t rows, std::int64_t cols) {
  EXPECT_EQ(static_cast<std::int64_t>(v.size()), rows * cols);
  return host_view(v.data(), rows, cols);
}

OwnedLinear shaped(std::int64_t rows, std::int64_t cols) {
  OwnedLinear out;
  out.weight.rows = rows;
  out.weight.cols = cols;
  return out;
}

int add_codes(OwnedLinear& w, const Bytes& codes, std::int64_t rows, std::int64_t cols, int bits) {
  return w.add(pack_codes_plane(view_of(codes, rows, cols), bits));
}
int add_floats(OwnedLinear& w, const Floats& values, std::int64_t rows, std::int64_t cols,
               DType dtype = DType::f32) {
  return w.add(floats_plane(view_of(values, rows, cols), dtype, "scales"));
}

Floats decode(const OwnedLinear& w) {
  Floats out(static_cast<std::size_t>(w.weight.rows * w.weight.cols),
             std::numeric_limits<float>::quiet_NaN());
  decode_linear(w.weight, host_view(out.data(), w.weight.rows, w.weight.cols));
  return out;
}

// 2 x 3, 4 bits, by row: codes {0 7 15 / 8 1 4}, scales {0.5, 2}, zeros {3, 8}.
OwnedLinear affine_example() {
  OwnedLinear w = shaped(2, 3);
  Term t;
  t.bits = 4;
  t.codes_plane = add_codes(w, {0, 7, 15, 8, 1, 4}, 2, 3, 4);
  t.grid.scale_plane = add_floats(w, {0.5F, 2.0F}, 2, 1);
  t.grid.zero_plane = w.add(pack_zeros(view_of(Ints{3, 8}, 2, 1), 4));
  w.weight.terms = {t};
  return w;
}

TEST(DecodeLinear, AffineByRow) {
  EXPECT_EQ(decode(affine_example()), (Floats{-1.5F, 2.0F, 6.0F, 0.0F, -14.0F, -8.0F}));
}

TEST(DecodeLinear, AffineSymmetricCentre) {
  OwnedLinear w = shaped(1, 4);
  Term t;
  t.bits = 3;
  t.codes_plane = add_codes(w, {0, 4, 7, 5}, 1, 4, 3);
  t.grid.kind = GridKind::tensor;
  t.grid.scale_plane = add_floats(w, {0.25F}, 1, 1);
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{-1.0F, 0.0F, 0.75F, 0.25F}));
}

TEST(DecodeLinear, GroupsWithAShortLastOneAndColumnGroups) {
  OwnedLinear w = shaped(2, 5);
  Term t;
  t.bits = 2;
  t.codes_plane = add_codes(w, {0, 1, 2, 3, 3, 3, 2, 1, 0, 1}, 2, 5, 2);
  t.grid.kind = GridKind::group;
  t.grid.group = 2;
  t.grid.scale_plane = add_floats(w, {1, 10, 100, 2, 20, 200}, 2, 3);
  t.grid.zero_plane = w.add(zeros_plane(view_of(Ints{0, 1, 2, 3, -4, 5}, 2, 3), DType::i16));
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{0, 1, 10, 20, 100, 0, -2, 100, 80, -800}));

  const Ints groups = {2, 0, 1, 1, 0};
  w.weight.terms[0].grid.column_group_plane = w.add(indices_plane(groups, "column_groups"));
  EXPECT_EQ(decode(w), (Floats{-200, 1, 10, 20, 3, -400, -2, 100, 80, -4}));
}

TEST(DecodeLinear, LargeZerosDoNotOverflow) {
  OwnedLinear w = shaped(1, 2);
  Term t;
  t.bits = 8;
  t.codes_plane = add_codes(w, {255, 0}, 1, 2, 8);
  t.grid.scale_plane = add_floats(w, {1}, 1, 1);
  t.grid.zero_plane = w.add(zeros_plane(view_of(Ints{INT32_MIN}, 1, 1), DType::i32));
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{2147483903.0F, 2147483648.0F}));
}

TEST(DecodeLinear, CodebookTerm) {
  OwnedLinear w = shaped(2, 2);
  Term t;
  t.kind = TermKind::codebook;
  t.bits = 2;
  t.codes_plane = add_codes(w, {0, 3, 2, 1}, 2, 2, 2);
  t.codebook_plane = add_floats(w, {-1.0F, -0.25F, 0.5F, 1.0F}, 1, 4);
  t.grid.scale_plane = add_floats(w, {4.0F, 8.0F}, 2, 1, DType::bf16);
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{-4, 4, 4, -2}));
}

TEST(DecodeLinear, SignTermWithAndWithoutMu) {
  OwnedLinear w = shaped(2, 3);
  Term t;
  t.kind = TermKind::sign;
  t.bits = 1;
  t.codes_plane = add_codes(w, {1, 0, 1, 0, 0, 1}, 2, 3, 1);
  t.grid.scale_plane = add_floats(w, {0.5F, 3.0F}, 2, 1, DType::f16);
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{0.5F, -0.5F, 0.5F, -3, -3, 3}));
  w.weight.terms[0].mu_plane = add_floats(w, {0.25F, -1.0F}, 2, 1, DType::f16);
  EXPECT_EQ(decode(w), (Floats{0.75F, -0.25F, 0.75F, -4, -4, 2}));
}

TEST(DecodeLinear, DenseTermIsExactInItsDtype) {
  // 2^-24 is the smallest f16; -0 must keep its sign; the stride of the source is honoured.
  const Floats values = {0x1p-24F, -0.0F, 65504.0F, 9, 1.0F, -2.5F, 0.333251953125F, 9};
  View source = host_view(values.data(), 2, 4).col_range(0, 3);
  const OwnedLinear f32 = dense_linear(source);
  std::vector<f16> half(6);
  decode_linear(f32.weight, host_view(half.data(), 2, 3));
  const OwnedLinear again = dense_linear(host_view(half.data(), 2, 3));
  const Floats out = decode(again);
  EXPECT_EQ(out, (Floats{0x1p-24F, 0.0F, 65504.0F, 1.0F, -2.5F, 0.333251953125F}));
  EXPECT_TRUE(std::signbit(out[1]));
  EXPECT_EQ(scheme_name(again.weight), "dense f16");
}

TEST(DecodeLinear, ProductAndOutputRounding) {
  // 3 * (1 + 2^-10) = 3.0029296875 lies between the f16 values 3.001953125 and 3.00390625 (spacing
  // 2^-9), exactly half way: even mantissa wins, 3.00390625.
  OwnedLinear w = shaped(1, 1);
  Term t;
  t.bits = 4;
  t.codes_plane = add_codes(w, {11}, 1, 1, 4);
  t.grid.scale_plane = add_floats(w, {1.0009765625F}, 1, 1, DType::f16);
  w.weight.terms = {t};
  EXPECT_EQ(decode(w)[0], 3.0029296875F);
  w.weight.terms[0].grid.product = DType::f16;
  EXPECT_EQ(decode(w)[0], 3.00390625F);

  // bf16 has 8 bits: 3.0029296875 rounds to 3; a padded row stays untouched.
  std::vector<bf16> out(3, bf16{0x1234});
  decode_linear(w.weight, View{out.data(), DType::bf16, DeviceKind::cpu, 1, 1, 3});
  EXPECT_EQ(to_float(out[0]), 3.0F);
  EXPECT_EQ(out[1].bits, 0x1234);
}

TEST(DecodeLinear, PermutationThenDiagonal) {
  OwnedLinear w = affine_example();  // -1.5 2 6 / 0 -14 -8
  const Ints perm = {2, 0, 1};
  w.weight.permutation_plane = w.add(indices_plane(perm, "permutation"));
  EXPECT_EQ(decode(w), (Floats{2, 6, -1.5F, -14, -8, 0}));
  // The diagonal is indexed by columns of the weight, after the permutation.
  w.weight.diagonal_plane = add_floats(w, {10, 100, 1000}, 1, 3);
  EXPECT_EQ(decode(w), (Floats{20, 600, -1500, -140, -800, 0}));
}

// All bit widths, odd columns, against a formula that does not go through the codec's reader.
TEST(DecodeLinear, EveryWidthAndOddColumns) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const std::int64_t cols : {1, 3, 7, 8, 13, 65}) {
      const std::int64_t rows = 3;
      Bytes codes(static_cast<std::size_t>(rows * cols));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint8_t>((i * 151 + 77) % (std::size_t{1} << bits));
      }
      OwnedLinear w = shaped(rows, cols);
      Term t;
      t.bits = bits;
      t.codes_plane = add_codes(w, codes, rows, cols, bits);
      t.grid.scale_plane = add_floats(w, {1.0F, -0.5F, 4.0F}, rows, 1);
      t.grid.zero_plane = w.add(pack_zeros(view_of(Ints{0, 1, 1}, rows, 1), 1));
      w.weight.terms = {t};
      EXPECT_EQ(w.weight.planes[0].raw_bytes(), rows * ((cols * bits + 7) / 8));
      const Floats out = decode(w);
      const float scale[] = {1.0F, -0.5F, 4.0F};
      const int zero[] = {0, 1, 1};
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
          const auto at = static_cast<std::size_t>(r * cols + c);
          ASSERT_EQ(out[at], scale[r] * static_cast<float>(codes[at] - zero[r]))
              << bits << " bits, " << cols << " columns, [" << r << ", " << c << "]";
        }
      }
    }
  }
}

// Columns {1, 3} of 2 x 4 by an affine term, the others by a sign term.
OwnedLinear column_partition(bool compact) {
  OwnedLinear w = shaped(2, 4);
  const Ints ids = {1, 3};
  const int columns = w.add(indices_plane(ids, "columns"));
  Term a;
  a.bits = 8;
  a.support = {Select::in, columns, Select::all, -1, compact};
  a.codes_plane = compact ? add_codes(w, {200, 100, 128, 0}, 2, 2, 8)
                          : add_codes(w, {9, 200, 9, 100, 9, 128, 9, 0}, 2, 4, 8);
  a.grid.scale_plane = add_floats(w, {1, 2}, 2, 1);
  Term s;
  s.kind = TermKind::sign;
  s.bits = 1;
  s.support = {Select::not_in, columns, Select::all, -1, compact};
  s.codes_plane = compact ? add_codes(w, {1, 0, 0, 1}, 2, 2, 1)
                          : add_codes(w, {1, 1, 0, 0, 0, 0, 1, 1}, 2, 4, 1);
  s.grid.scale_plane = add_floats(w, {0.5F, 0.25F}, 2, 1);
  w.weight.terms = {a, s};
  return w;
}

TEST(DecodeLinear, ColumnSupportsPartitionTheWeight) {
  const Floats expected = {0.5F, 72, -0.5F, -28, -0.25F, 0, 0.25F, -256};
  EXPECT_EQ(decode(column_partition(false)), expected);
  EXPECT_EQ(decode(column_partition(true)), expected);
}

// Bitmap {0 1 1 / 1 0 0}: affine on it, sign off it.
OwnedLinear bitmap_partition(bool compact) {
  OwnedLinear w = shaped(2, 3);
  const Bytes bitmap = {0, 1, 1, 1, 0, 0};
  const int bits = w.add(pack_codes_plane(view_of(bitmap, 2, 3), 1, "bitmap"));
  Term a;
  a.bits = 5;
  a.support = {Select::all, -1, Select::in, bits, compact};
  a.codes_plane =
      compact ? add_codes(w, {31, 17, 3}, 1, 3, 5) : add_codes(w, {0, 31, 17, 3, 0, 0}, 2, 3, 5);
  a.grid.scale_plane = add_floats(w, {1, 10}, 2, 1);
  Term s;
  s.kind = TermKind::sign;
  s.bits = 1;
  s.support = {Select::all, -1, Select::not_in, bits, compact};
  s.codes_plane =
      compact ? add_codes(w, {1, 0, 1}, 1, 3, 1) : add_codes(w, {1, 1, 1, 1, 0, 1}, 2, 3, 1);
  s.grid.scale_plane = add_floats(w, {0.5F, 0.25F}, 2, 1);
  w.weight.terms = {a, s};
  return w;
}

TEST(DecodeLinear, BitmapSupportsPartitionTheWeight) {
  const Floats expected = {0.5F, 15, 1, -130, -0.25F, 0.25F};
  EXPECT_EQ(decode(bitmap_partition(false)), expected);
  EXPECT_EQ(decode(bitmap_partition(true)), expected);
}

TEST(DecodeLinear, CompactOnColumnsAndBitmapTogether) {
  OwnedLinear w = shaped(2, 3);
  const Ints ids = {0};
  Term t;
  t.kind = TermKind::dense;
  t.support.columns = Select::not_in;
  t.support.columns_plane = w.add(indices_plane(ids, "columns"));
  t.support.bitmap = Select::in;
  t.support.bitmap_plane =
      w.add(pack_codes_plane(view_of(Bytes{1, 1, 0, 1, 1, 1}, 2, 3), 1, "bitmap"));
  t.support.compact = true;
  t.codes_plane = add_floats(w, {5, 6, 7}, 1, 3);
  w.weight.terms = {t};
  EXPECT_EQ(decode(w), (Floats{0, 5, 0, 0, 6, 7}));
}

TEST(DecodeLinear, TermsOnTheSameWeightsAdd) {
  // Two binary planes with levels {0, a}: codebooks {0, 1}, as a sum of four levels.
  OwnedLinear w = shaped(1, 4);
  const int book = add_floats(w, {0, 1}, 1, 2);
  Term high;
  high.kind = TermKind::codebook;
  high.bits = 1;
  high.codebook_plane = book;
  Term low = high;
  high.codes_plane = add_codes(w, {0, 0, 1, 1}, 1, 4, 1);
  high.grid.scale_plane = add_floats(w, {2.0F}, 1, 1);
  low.codes_plane = add_codes(w, {0, 1, 0, 1}, 1, 4, 1);
  low.grid.scale_plane = add_floats(w, {-1.0F}, 1, 1);
  w.weight.terms = {high, low};
  EXPECT_EQ(decode(w), (Floats{0, -1, 2, 1}));
  EXPECT_DOUBLE_EQ(weight_bits(w.weight).nominal, 2.0);
}

TEST(Encode, RefusesWhatWouldNotSurvive) {
  EXPECT_THROW((void)pack_codes_plane(view_of(Bytes{4}, 1, 1), 2), Error);
  EXPECT_THROW((void)pack_zeros(view_of(Ints{16}, 1, 1), 4), Error);
  EXPECT_THROW((void)pack_zeros(view_of(Ints{-1}, 1, 1), 4), Error);
  EXPECT_THROW((void)zeros_plane(view_of(Ints{32768}, 1, 1), DType::i16), Error);
  EXPECT_THROW((void)scales_plane(view_of(Floats{0.1F}, 1, 1), DType::f16), Error);
  EXPECT_THROW((void)scales_plane(view_of(Floats{std::nanf("")}, 1, 1), DType::f32), Error);
}

struct Malformed {
  const char* name;
  const char* message;  // a part of the error
  std::function<void(OwnedLinear&)> damage;
};

template <class T>
void put(OwnedLinear& w, std::size_t plane, std::size_t at, T value) {
  std::memcpy(w.bytes[plane].data() + at * sizeof(T), &value, sizeof(T));
}

void expect_refused(OwnedLinear w, const Malformed& bad) {
  bad.damage(w);
  try {
    validate(w.weight, "a.qw", "blocks.0.q");
    ADD_FAILURE() << bad.name << ": accepted";
  } catch (const FormatError& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.rfind("a.qw: blocks.0.q.", 0), 0U) << bad.name << ": " << text;
    EXPECT_NE(text.find(bad.message), std::string::npos) << bad.name << ": " << text;
  }
  Floats out(6);
  EXPECT_THROW(decode_linear(w.weight, host_view(out.data(), w.weight.rows, w.weight.cols)), Error)
      << bad.name;
}

// affine_example: planes 0 codes, 1 scales, 2 zeros; 3 permutation {2, 0, 1}.
TEST(Validate, RefusesMalformedAffine) {
  const std::vector<Malformed> list = {
      {"no terms", "terms: expected 1 to 8", [](auto& w) { w.weight.terms.clear(); }},
      {"nine terms", "terms: expected 1 to 8",
       [](auto& w) { w.weight.terms.resize(9, w.weight.terms[0]); }},
      {"too many planes", "planes: expected 1 to 64",
       [](auto& w) { w.weight.planes.resize(65, w.weight.planes[0]); }},
      {"unused plane", "planes[3]: expected a plane that something refers to",
       [](auto& w) { w.weight.permutation_plane = -1; }},
      {"plane index", "terms[0].codes: expected a plane index below 4, found 4",
       [](auto& w) { w.weight.terms[0].codes_plane = 4; }},
      {"negative plane index", "found -7", [](auto& w) { w.weight.terms[0].codes_plane = -7; }},
      {"no scales", "terms[0].grid.scales: expected a plane index",
       [](auto& w) { w.weight.terms[0].grid.scale_plane = -1; }},
      {"plane width", "planes[0].bits: expected 0 to 8",
       [](auto& w) { w.weight.planes[0].bits = 9; }},
      {"packed floats", "planes[0].dtype: expected u8",
       [](auto& w) { w.weight.planes[0].dtype = DType::f32; }},
      {"plane rows", "planes[0].rows", [](auto& w) { w.weight.planes[0].rows = 0; }},
      {"plane columns", "planes[0].cols", [](auto& w) { w.weight.planes[0].cols = INT64_MAX; }},
      {"plane elements", "planes[0] elements",
       [](auto& w) { w.weight.planes[0].rows = w.weight.planes[0].cols = INT32_MAX; }},
      {"role", "planes[0].role", [](auto& w) { w.weight.planes[0].role.clear(); }},
      {"term width", "terms[0].codes: expected a plane of 3-bit codes, found 4-bit codes [2, 3]",
       [](auto& w) { w.weight.terms[0].bits = 3; }},
      {"term width 0", "terms[0].bits", [](auto& w) { w.weight.terms[0].bits = 0; }},
      {"term kind", "terms[0].kind",
       [](auto& w) { w.weight.terms[0].kind = static_cast<TermKind>(5); }},
      {"grid kind", "terms[0].grid.kind",
       [](auto& w) { w.weight.terms[0].grid.kind = static_cast<GridKind>(3); }},
      {"group of a row grid", "terms[0].grid.group: expected 0 to 0",
       [](auto& w) { w.weight.terms[0].grid.group = 128; }},
      {"group grid, row scales", "terms[0].grid.scales: expected a plane of shape [2, 2]",
       [](auto& w) {
         w.weight.terms[0].grid.kind = GridKind::group;
         w.weight.terms[0].grid.group = 2;
       }},
      {"group 0", "terms[0].grid.group",
       [](auto& w) { w.weight.terms[0].grid.kind = GridKind::group; }},
      {"tensor grid, row scales", "expected a plane of shape [1, 1]",
       [](auto& w) { w.weight.terms[0].grid.kind = GridKind::tensor; }},
      {"column groups of a row grid", "terms[0].grid.column_groups: expected no plane",
       [](auto& w) { w.weight.terms[0].grid.column_group_plane = 3; }},
      {"column group out of range", "terms[0].grid.column_groups[0]: expected 0 to 0, found 2",
       [](auto& w) {
         w.weight.terms[0].grid.kind = GridKind::group;
         w.weight.terms[0].grid.group = 3;
         w.weight.terms[0].grid.column_group_plane = 3;
       }},
      {"product", "terms[0].grid.product",
       [](auto& w) { w.weight.terms[0].grid.product = DType::bf16; }},
      {"float zeros", "terms[0].grid.zeros: expected a plane of packed codes, i16 or i32",
       [](auto& w) { w.weight.terms[0].grid.zero_plane = 1; }},
      {"integer scales", "terms[0].grid.scales: expected a plane of f32, f16 or bf16",
       [](auto& w) { w.weight.terms[0].grid.scale_plane = 2; }},
      {"codebook of an affine term", "terms[0].codebook: expected no plane",
       [](auto& w) { w.weight.terms[0].codebook_plane = 1; }},
      {"mu of an affine term", "terms[0].mu: expected no plane",
       [](auto& w) { w.weight.terms[0].mu_plane = 1; }},
      {"compact everywhere", "terms[0].support.compact",
       [](auto& w) { w.weight.terms[0].support.compact = true; }},
      {"columns without a selection", "terms[0].support.columns: expected no plane",
       [](auto& w) { w.weight.terms[0].support.columns_plane = 3; }},
      {"bitmap without a selection", "terms[0].support.bitmap: expected no plane",
       [](auto& w) { w.weight.terms[0].support.bitmap_plane = 0; }},
      {"bitmap of wide codes", "terms[0].support.bitmap: expected a plane of 1-bit codes",
       [](auto& w) {
         w.weight.terms[0].support.bitmap = Select::in;
         w.weight.terms[0].support.bitmap_plane = 0;
       }},
      {"permutation of floats", "permutation: expected a plane of i32",
       [](auto& w) { w.weight.permutation_plane = 1; }},
      {"permutation shape", "permutation: expected a plane of shape [1, 3]",
       [](auto& w) { w.weight.planes[3].cols = 2; }},
      {"permutation out of range", "permutation[1]: expected 0 to 2, found 3",
       [](auto& w) { put<std::int32_t>(w, 3, 1, 3); }},
      {"permutation repeats", "permutation[1]: expected each column once, found 2 again",
       [](auto& w) { put<std::int32_t>(w, 3, 1, 2); }},
      {"diagonal of integers", "diagonal: expected a plane of f32",
       [](auto& w) { w.weight.diagonal_plane = 3; }},
      {"no data", "planes[1]: expected 8 bytes on the host for f32 [2, 1], found none",
       [](auto& w) { w.weight.planes[1].data = View{}; }},
      {"short data", "planes[0]: expected 4 bytes",
       [](auto& w) { w.weight.planes[0].data.cols = 3; }},
      {"bits after the last code", "planes[0]: expected zero bits after the last code of row 0",
       [](auto& w) { w.bytes[0][1] |= std::byte{0x10}; }},
      {"weight rows", "rows: expected", [](auto& w) { w.weight.rows = 0; }},
      {"weight columns", "cols: expected", [](auto& w) { w.weight.cols = std::int64_t{1} << 31; }},
  };
  for (const Malformed& bad : list) {
    OwnedLinear w = affine_example();
    const Ints perm = {2, 0, 1};
    w.weight.permutation_plane = w.add(indices_plane(perm, "permutation"));
    ASSERT_NO_THROW(validate(w.weight, "a.qw", "blocks.0.q"));
    expect_refused(std::move(w), bad);
  }
}

TEST(Validate, RefusesMalformedSupports) {
  // Planes: 0 columns, 1 codes of the affine term, 2 scales, 3 codes of the sign term, 4 scales.
  const std::vector<Malformed> columns = {
      {"column twice", "terms[0].support.columns[1]: expected increasing ids, here 2 to 3, found 1",
       [](auto& w) { put<std::int32_t>(w, 0, 1, 1); }},
      {"column out of range", "terms[0].support.columns[1]",
       [](auto& w) { put<std::int32_t>(w, 0, 1, 4); }},
      {"negative column", "terms[0].support.columns[0]",
       [](auto& w) { put<std::int32_t>(w, 0, 0, -1); }},
      {"more columns than the weight has", "terms[0].support.columns: expected 1 row of at most 4",
       [](auto& w) { w.weight.planes[0].cols = 5; }},
      {"no column plane", "terms[0].support.columns: expected a plane index",
       [](auto& w) { w.weight.terms[0].support.columns_plane = -1; }},
      {"full codes of a compact size", "terms[0].codes: expected a plane of shape [2, 4]",
       [](auto& w) { w.weight.terms[0].support.compact = false; }},
      {"sign width", "terms[1].bits", [](auto& w) { w.weight.terms[1].bits = 2; }},
      {"zeros of a sign term", "terms[1].grid.zeros: expected no plane",
       [](auto& w) { w.weight.terms[1].grid.zero_plane = 3; }},
      {"mu shape", "terms[1].mu: expected a plane of f32",
       [](auto& w) { w.weight.terms[1].mu_plane = 3; }},
      {"codebook width", "terms[0].bits: expected 1 to 4",
       [](auto& w) { w.weight.terms[0].kind = TermKind::codebook; }},
      {"no codebook", "terms[1].codebook: expected a plane index",
       [](auto& w) { w.weight.terms[1].kind = TermKind::codebook; }},
      {"codebook size", "terms[1].codebook: expected a plane of shape [1, 2]",
       [](auto& w) {
         w.weight.terms[1].kind = TermKind::codebook;
         w.weight.terms[1].codebook_plane = 4;
       }},
      {"grid of a dense term", "terms[0].grid.scales: expected no plane for a dense term",
       [](auto& w) {
         w.weight.terms[0].kind = TermKind::dense;
         w.weight.terms[0].bits = 0;
       }},
  };
  for (const Malformed& bad : columns) expect_refused(column_partition(true), bad);

  // Planes: 0 bitmap, 1 codes, 2 scales, 3 signs, 4 scales; three weights on each side.
  const std::vector<Malformed> bitmaps = {
      {"one more bit than codes", "terms[0].codes: expected 4 codes, one per supported weight",
       [](auto& w) { w.bytes[0][0] |= std::byte{1}; }},
      {"one bit fewer than codes", "terms[0].codes: expected 2 codes",
       [](auto& w) { w.bytes[0][1] = std::byte{0}; }},
      {"bitmap shape", "terms[0].support.bitmap: expected a plane of shape [2, 3]",
       [](auto& w) { w.weight.planes[0].rows = 1; }},
      {"codes in two rows", "terms[0].codes: expected 1 row",
       [](auto& w) { w.weight.planes[1].rows = 2; }},
      {"more codes than weights", "terms[0].codes codes: expected 1 to 6, found 7",
       [](auto& w) { w.weight.planes[1].cols = 7; }},
  };
  for (const Malformed& bad : bitmaps) expect_refused(bitmap_partition(true), bad);
}

TEST(Pattern, MatchesAffineWithItsOptions) {
  OwnedLinear w = affine_example();
  const auto plain = match_affine(w.weight);
  ASSERT_TRUE(plain.has_value());
  EXPECT_EQ(plain->grid.bits, 4);
  EXPECT_EQ(plain->grid.group, 0);
  EXPECT_FALSE(plain->grid.symmetric);
  EXPECT_EQ(plain->codes, 0);
  EXPECT_EQ(plain->scales, 1);
  EXPECT_EQ(plain->zeros, 2);
  EXPECT_EQ(plain->permutation, -1);
  EXPECT_FALSE(match_dense(w.weight).has_value());
  EXPECT_EQ(scheme_name(w.weight), "affine4 row asym f32-scale");

  const Ints perm = {0, 2, 1};
  w.weight.permutation_plane = w.add(indices_plane(perm, "permutation"));
  ASSERT_TRUE(match_affine(w.weight).has_value());
  EXPECT_EQ(match_affine(w.weight)->permutation, 3);
  w.weight.diagonal_plane = add_floats(w, {1, 1, 1}, 1, 3);
  EXPECT_FALSE(match_affine(w.weight).has_value());
}

TEST(Pattern, ColumnGroupsMatchOnlyInTheUsualNumber) {
  for (const std::int64_t groups : {2, 3}) {  // ceil(5 / 2) = 3 is what GridSpec::groups says
    OwnedLinear w = shaped(1, 5);
    Term t;
    t.bits = 2;
    t.codes_plane = add_codes(w, Bytes(5, 1), 1, 5, 2);
    t.grid.kind = GridKind::group;
    t.grid.group = 2;
    t.grid.scale_plane = add_floats(w, Floats(static_cast<std::size_t>(groups), 1.0F), 1, groups);
    const Ints ids = {0, 1, 1, 0, 1};
    t.grid.column_group_plane = w.add(indices_plane(ids, "column_groups"));
    w.weight.terms = {t};
    EXPECT_EQ(decode(w), Floats(5, -1.0F));
    EXPECT_EQ(match_affine(w.weight).has_value(), groups == 3);
  }
}

TEST(Pattern, OtherSchemesAreNotAffine) {
  const OwnedLinear w = bitmap_partition(true);
  EXPECT_FALSE(match_affine(w.weight).has_value());
  EXPECT_EQ(scheme_name(w.weight),
            "affine5 row sym f32-scale on-bitmap compact + sign row f32-scale off-bitmap compact");
  const Floats values = {1, 2};
  const OwnedLinear dense = dense_linear(view_of(values, 1, 2));
  ASSERT_TRUE(match_dense(dense.weight).has_value());
  EXPECT_EQ(match_dense(dense.weight)->dtype, DType::f32);
  EXPECT_FALSE(match_affine(dense.weight).has_value());
}

TEST(Bits, FourBitGroupsOf128) {
  OwnedLinear w = shaped(8, 512);
  Term t;
  t.bits = 4;
  t.codes_plane = add_codes(w, Bytes(8 * 512, 9), 8, 512, 4);
  t.grid.kind = GridKind::group;
  t.grid.group = 128;
  t.grid.scale_plane = add_floats(w, Floats(8 * 4, 0.5F), 8, 4, DType::f16);
  t.grid.zero_plane = w.add(pack_zeros(view_of(Ints(8 * 4, 7), 8, 4), 4));
  w.weight.terms = {t};
  const WeightBits bits = weight_bits(w.weight);
  EXPECT_DOUBLE_EQ(bits.nominal, 4.0);
  EXPECT_DOUBLE_EQ(bits.stored, 4.15625);  // 4 + (16 + 4) / 128
  EXPECT_EQ(scheme_name(w.weight), "affine4 g128 asym f16-scale");
}

TEST(Bits, SupportsWeighTheNominalBits) {
  // Half of the weights 8 bits, half 1: 4.5. Stored: 8 (ids) + 4 + 8 + 2 + 8 bytes over 8 weights.
  const WeightBits columns = weight_bits(column_partition(true).weight);
  EXPECT_DOUBLE_EQ(columns.nominal, 4.5);
  EXPECT_DOUBLE_EQ(columns.stored, 30.0);
  // 3 of 6 weights 5 bits, 3 of 6 one bit: 3. Stored: 2 + 2 + 8 + 1 + 8 bytes over 6 weights.
  const WeightBits bitmap = weight_bits(bitmap_partition(true).weight);
  EXPECT_DOUBLE_EQ(bitmap.nominal, 3.0);
  EXPECT_DOUBLE_EQ(bitmap.stored, 28.0);
  const Floats values = {1, 2};
  EXPECT_DOUBLE_EQ(weight_bits(dense_linear(view_of(values, 1, 2)).weight).nominal, 32.0);
}

}  // namespace
}  // namespace engine
