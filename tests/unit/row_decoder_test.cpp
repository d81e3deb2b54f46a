// The row decoder against the reference codec, bit for bit, over weights of every form.
#include "engine/weight/row_decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "engine/weight/codec.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

constexpr std::int64_t rows = 13;
constexpr std::int64_t cols = 45;  // no multiple of 8, and 12 leaves a short last group

class Maker {
 public:
  explicit Maker(std::uint64_t seed) : seed_(seed) {
    w.weight.rows = rows;
    w.weight.cols = cols;
  }
  int codes(std::int64_t r, std::int64_t c, int bits) {
    std::vector<std::uint8_t> values(index(r * c));
    for (auto& v : values) v = static_cast<std::uint8_t>(next() * (1 << bits));
    return w.add(pack_codes_plane(host_view(values.data(), r, c), bits));
  }
  int floats(std::int64_t r, std::int64_t c, DType dtype) {
    std::vector<float> values = bell_matrix(r, c, ++seed_);
    for (float& v : values) v = round_to(dtype, v);
    return w.add(floats_plane(host_view(values.data(), r, c), dtype, "values"));
  }
  int zeros(std::int64_t r, std::int64_t c, DType dtype) {
    std::vector<std::int32_t> values(index(r * c));
    for (auto& v : values) v = static_cast<std::int32_t>(next() * 600) - 300;
    return w.add(zeros_plane(host_view(values.data(), r, c), dtype));
  }
  int ids(std::vector<std::int32_t> values, const char* role) {
    return w.add(indices_plane(values, role));
  }
  // The grid's planes in the shape of its kind.
  Grid grid(GridKind kind, DType dtype, DType product = DType::f32) {
    Grid g;
    g.kind = kind;
    g.group = kind == GridKind::group ? 12 : 0;
    g.product = product;
    g.scale_plane = floats(kind == GridKind::tensor ? 1 : rows, units(kind), dtype);
    return g;
  }
  static std::int64_t units(GridKind kind) { return kind == GridKind::group ? 4 : 1; }
  double next() { return uniform_value(7, seed_, counter_++); }

  OwnedLinear w;

 private:
  std::uint64_t seed_;
  std::uint64_t counter_ = 0;
};

std::vector<std::int32_t> some_columns() { return {0, 3, 4, 17, 30, 44}; }

// How many weights a bitmap and a set of columns select.
std::int64_t count(const OwnedLinear& w, const Support& s) {
  return SupportMask(w.weight, s).count();
}

struct Case {
  std::string name;
  OwnedLinear w;
};

Term affine(Maker& m, GridKind kind, int bits, DType dtype, int zero_kind, DType product) {
  Term t;
  t.kind = TermKind::affine;
  t.bits = bits;
  t.grid = m.grid(kind, dtype, product);
  const std::int64_t r = kind == GridKind::tensor ? 1 : rows;
  if (zero_kind == 1) t.grid.zero_plane = m.codes(r, Maker::units(kind), bits);
  if (zero_kind == 2) t.grid.zero_plane = m.zeros(r, Maker::units(kind), DType::i16);
  if (zero_kind == 3) t.grid.zero_plane = m.zeros(r, Maker::units(kind), DType::i32);
  return t;
}

// A term's codes, full or only for its support.
void add_codes(Maker& m, Term& t, bool compact) {
  t.support.compact = compact;
  std::int64_t r = rows, c = cols;
  if (compact) {
    c = count(m.w, t.support);
    if (t.support.bitmap == Select::all) {
      c /= rows;
    } else {
      r = 1;
    }
  }
  t.codes_plane = t.kind == TermKind::dense ? m.floats(r, c, DType::bf16) : m.codes(r, c, t.bits);
  m.w.weight.terms.push_back(t);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  std::uint64_t seed = 100;
  // Every kind of term under every kind of support, beside a dense term that it adds to.
  for (const TermKind kind :
       {TermKind::dense, TermKind::affine, TermKind::codebook, TermKind::sign}) {
    for (const Select columns : {Select::all, Select::in, Select::not_in}) {
      for (const Select bitmap : {Select::all, Select::in, Select::not_in}) {
        for (const bool compact : {false, true}) {
          if (compact && columns == Select::all && bitmap == Select::all) continue;
          Maker m(seed += 10);
          Support s;
          s.columns = columns;
          s.bitmap = bitmap;
          if (columns != Select::all) s.columns_plane = m.ids(some_columns(), "columns");
          if (bitmap != Select::all) s.bitmap_plane = m.codes(rows, cols, 1);
          const auto grid = seed % 20 == 0 ? GridKind::group : GridKind::row;
          const DType product = seed % 40 == 0 ? DType::f16 : DType::f32;
          Term t;
          t.kind = kind;
          if (kind == TermKind::affine) t = affine(m, grid, 5, DType::f16, 1, product);
          if (kind == TermKind::codebook || kind == TermKind::sign) {
            t.bits = kind == TermKind::sign ? 1 : 3;
            t.grid = m.grid(grid, DType::f32, product);
          }
          if (kind == TermKind::codebook) t.codebook_plane = m.floats(1, 8, DType::f16);
          if (kind == TermKind::sign) t.mu_plane = m.floats(rows, Maker::units(grid), DType::bf16);
          t.support = s;
          add_codes(m, t, compact);
          Term dense;
          dense.kind = TermKind::dense;
          if (seed % 30 == 0) add_codes(m, dense, false);
          all.push_back({"case " + std::to_string(seed), std::move(m.w)});
        }
      }
    }
  }
  // Grids, zeros, permutation and diagonal.
  for (const GridKind kind : {GridKind::tensor, GridKind::row, GridKind::group}) {
    for (int zero = 0; zero <= 3; ++zero) {
      Maker m(seed += 10);
      Term t = affine(m, kind, 1 + static_cast<int>(seed / 10 % 8), DType::f32, zero,
                      zero == 2 ? DType::f16 : DType::f32);
      if (kind == GridKind::group && zero == 3) {
        std::vector<std::int32_t> group(index(cols));
        for (auto& g : group) g = static_cast<std::int32_t>(m.next() * 4);
        t.grid.column_group_plane = m.ids(group, "column groups");
      }
      if (zero >= 2) {
        std::vector<std::int32_t> perm(index(cols));
        std::iota(perm.begin(), perm.end(), 0);
        std::rotate(perm.begin(), perm.begin() + 11, perm.end());
        std::swap(perm[3], perm[20]);
        m.w.weight.permutation_plane = m.ids(perm, "permutation");
      }
      if (zero % 2 == 1) m.w.weight.diagonal_plane = m.floats(1, cols, DType::bf16);
      add_codes(m, t, false);
      all.push_back(
          {"grid " + std::to_string(static_cast<int>(kind)) + " zeros " + std::to_string(zero),
           std::move(m.w)});
    }
  }
  return all;
}

TEST(RowDecoder, EqualsTheReferenceBitForBit) {
  const std::vector<Case> all = cases();
  ASSERT_GT(all.size(), 75U);
  for (const Case& c : all) {
    SCOPED_TRACE(c.name);
    const RowDecoder decoder(c.w.weight);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      const auto bytes = index(rows * cols) * dtype_bytes(dtype);
      std::vector<std::byte> expected(bytes, std::byte{0xFF}), found(bytes, std::byte{0x7F});
      decode_linear(c.w.weight, make_view(expected.data(), dtype, DeviceKind::cpu, rows, cols));
      const View out = make_view(found.data(), dtype, DeviceKind::cpu, rows, cols);
      // In slices, not in order.
      decoder.decode(9, out.row_range(9, 4));
      decoder.decode(0, out.row_range(0, 1));
      decoder.decode(1, out.row_range(1, 8));
      EXPECT_EQ(std::memcmp(expected.data(), found.data(), bytes), 0) << dtype_name(dtype);
    }
  }
}

TEST(RowDecoder, NegativeZeroSurvivesAndUncoveredWeightsAreZero) {
  Maker m(5);
  std::vector<std::uint8_t> bits(index(rows * cols), 0);
  bits[0] = bits[1] = 1;
  Term t;
  t.kind = TermKind::dense;
  t.support.bitmap = Select::in;
  t.support.bitmap_plane = m.w.add(pack_codes_plane(host_view(bits.data(), rows, cols), 1));
  t.support.compact = true;
  std::vector<float> values = {-0.0F, 2.5F};
  t.codes_plane = m.w.add(floats_plane(host_view(values.data(), 1, 2), DType::f32, "dense"));
  m.w.weight.terms.push_back(t);
  std::vector<float> out(index(rows * cols), 7.0F);
  RowDecoder(m.w.weight).decode(0, host_view(out.data(), rows, cols));
  EXPECT_TRUE(std::signbit(out[0]));
  EXPECT_EQ(out[1], 2.5F);
  EXPECT_EQ(std::count(out.begin(), out.end(), 0.0F), rows * cols - 1);
}

TEST(RowDecoder, RefusesRowsOutsideTheWeight) {
  const std::vector<float> values = bell_matrix(4, 8, 1);
  const OwnedLinear w = dense_linear(host_view(values.data(), 4, 8));
  const RowDecoder decoder(w.weight);
  std::vector<float> out(16);
  EXPECT_THROW(decoder.decode(3, host_view(out.data(), 2, 8)), Error);
  EXPECT_THROW(decoder.decode(0, host_view(out.data(), 4, 4)), Error);
  decoder.decode(2, host_view(out.data(), 2, 8));
  EXPECT_TRUE(std::equal(out.begin(), out.end(), values.begin() + 16));
}

}  // namespace
}  // namespace engine::test
