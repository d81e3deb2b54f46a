// Which weights the kernel layout takes.
#include <gtest/gtest.h>

#include <array>

#include "engine/weight/codec.h"
#include "engine/weight/packed_layout.h"
#include "engine/weight/pattern.h"

namespace engine {
namespace {

struct Planes {
  LinearWeight w;
  int add(DType dtype, int bits, std::int64_t rows, std::int64_t cols) {
    Plane p;
    p.role = "plane";
    p.dtype = dtype;
    p.bits = bits;
    p.rows = rows;
    p.cols = cols;
    w.planes.push_back(p);
    return static_cast<int>(w.planes.size()) - 1;
  }
};

// One term of `bits` bits over 32 x 512; group 0: by row.
Term add_term(Planes& p, TermKind kind, int bits, std::int64_t group, bool zeros) {
  p.w.rows = 32;
  p.w.cols = 512;
  const std::int64_t units = group == 0 ? 1 : (512 + group - 1) / group;
  Term t;
  t.kind = kind;
  t.bits = bits;
  t.codes_plane = p.add(DType::u8, bits, 32, 512);
  t.grid.kind = group == 0 ? GridKind::row : GridKind::group;
  t.grid.group = group;
  t.grid.scale_plane = p.add(DType::f16, 0, 32, units);
  if (zeros) t.grid.zero_plane = p.add(DType::i32, 0, 32, units);
  if (kind == TermKind::codebook) t.codebook_plane = p.add(DType::f32, 0, 1, 16);
  return t;
}

TEST(MatchPackable, AffineTerms) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const std::int64_t group : {0, 32, 64, 128, 384}) {
      for (const bool zeros : {false, true}) {
        Planes p;
        p.w.terms = {add_term(p, TermKind::affine, bits, group, zeros)};
        validate_structure(p.w, "test", "weight");
        const auto m = match_packable(p.w);
        ASSERT_TRUE(m.has_value()) << bits << ", " << group;
        EXPECT_EQ(m->shape.kind, PackedKind::affine);
        EXPECT_EQ(m->shape.rows, 32);
        EXPECT_EQ(m->shape.cols, 512);
        EXPECT_EQ(m->shape.bits, bits);
        EXPECT_EQ(m->shape.group, group);
        EXPECT_EQ(m->shape.scale_dtype, DType::f16);
        EXPECT_EQ(m->shape.zeros, zeros);
        EXPECT_EQ(m->codes[0], 0);
        EXPECT_EQ(m->scales[0], 1);
        EXPECT_EQ(m->zeros[0], zeros ? 2 : -1);
        EXPECT_EQ(m->codes[1], -1);
        EXPECT_EQ(m->permutation, -1);
        EXPECT_NO_THROW(check_packed_shape(m->shape));
      }
    }
  }
  for (const std::int64_t group : {512, 513, 4096}) {  // the whole row
    Planes p;
    p.w.terms = {add_term(p, TermKind::affine, 4, group, true)};
    const auto m = match_packable(p.w);
    ASSERT_TRUE(m.has_value()) << group;
    EXPECT_EQ(m->shape.group, 0);
  }
  for (const std::int64_t group : {16, 48, 96, 200}) {
    Planes p;
    p.w.terms = {add_term(p, TermKind::affine, 4, group, true)};
    EXPECT_FALSE(match_packable(p.w).has_value()) << group;
  }
}

TEST(MatchPackable, Codebooks) {
  Planes p;
  p.w.terms = {add_term(p, TermKind::codebook, 4, 64, false)};
  validate_structure(p.w, "test", "weight");
  const auto m = match_packable(p.w);
  ASSERT_TRUE(m.has_value());
  EXPECT_EQ(m->shape.kind, PackedKind::codebook);
  EXPECT_EQ(m->book, 2);
  EXPECT_FALSE(m->shape.zeros);
  EXPECT_NO_THROW(check_packed_shape(m->shape));
  Planes three;
  three.w.terms = {add_term(three, TermKind::codebook, 3, 64, false)};
  EXPECT_FALSE(match_packable(three.w).has_value());
}

TEST(MatchPackable, TwoBinaryTermsOfOneGrid) {
  Planes p;
  const Term first = add_term(p, TermKind::affine, 1, 128, true);
  const Term second = add_term(p, TermKind::affine, 1, 128, true);
  p.w.terms = {first, second};
  validate_structure(p.w, "test", "weight");
  const auto m = match_packable(p.w);
  ASSERT_TRUE(m.has_value());
  EXPECT_EQ(m->shape.kind, PackedKind::binary2);
  EXPECT_EQ(m->shape.bits, 2);
  EXPECT_EQ(m->codes, (std::array<int, 2>{0, 3}));
  EXPECT_EQ(m->scales, (std::array<int, 2>{1, 4}));
  EXPECT_EQ(m->zeros, (std::array<int, 2>{2, 5}));
  EXPECT_NO_THROW(check_packed_shape(m->shape));

  const auto refused = [&](auto change) {
    Planes q = p;
    change(q);
    EXPECT_FALSE(match_packable(q.w).has_value());
  };
  refused([](Planes& q) { q.w.terms[1].bits = 2; });
  refused([](Planes& q) { q.w.terms[1].kind = TermKind::sign; });
  refused([](Planes& q) { q.w.terms[0].kind = TermKind::dense; });
  refused([](Planes& q) { q.w.terms[1].grid.group = 256; });
  refused([](Planes& q) { q.w.terms[1].grid.zero_plane = -1; });
  refused([](Planes& q) { q.w.planes[4].dtype = DType::f32; });
  refused([](Planes& q) { q.w.terms.push_back(q.w.terms[0]); });
}

TEST(MatchPackable, PermutationsAndWhatDoesNotFit) {
  Planes p;
  p.w.terms = {add_term(p, TermKind::affine, 4, 128, true)};
  const auto with = [&](auto change) {
    Planes q = p;
    change(q);
    return match_packable(q.w);
  };
  const auto permute = [](Planes& q) { q.w.permutation_plane = q.add(DType::i32, 0, 1, 512); };
  const auto assign = [](Planes& q) {
    q.w.terms[0].grid.column_group_plane = q.add(DType::i32, 0, 1, 512);
  };
  const auto permuted = with(permute);
  ASSERT_TRUE(permuted.has_value());
  EXPECT_EQ(permuted->permutation, 3);
  EXPECT_EQ(permuted->column_groups, -1);
  EXPECT_FALSE(with(assign).has_value());
  const auto both = with([&](Planes& q) {
    permute(q);
    assign(q);
  });
  ASSERT_TRUE(both.has_value());
  EXPECT_EQ(both->permutation, 3);
  EXPECT_EQ(both->column_groups, 4);
  // Column groups of which there are fewer than the columns make.
  EXPECT_FALSE(with([&](Planes& q) {
                 permute(q);
                 assign(q);
                 q.w.planes[1].cols = q.w.planes[2].cols = 3;
               }).has_value());
  EXPECT_FALSE(
      with([](Planes& q) { q.w.diagonal_plane = q.add(DType::f32, 0, 1, 512); }).has_value());
  EXPECT_FALSE(with([](Planes& q) { q.w.terms[0].grid.kind = GridKind::tensor; }).has_value());
  EXPECT_FALSE(with([](Planes& q) {
                 q.w.terms[0].support.bitmap = Select::in;
                 q.w.terms[0].support.bitmap_plane = q.add(DType::u8, 1, 32, 512);
               }).has_value());
  EXPECT_FALSE(with([](Planes& q) { q.w.terms[0].kind = TermKind::sign; }).has_value());
  EXPECT_TRUE(with([](Planes& q) { q.w.terms[0].grid.product = DType::f16; }).has_value());
  Planes none;
  EXPECT_FALSE(match_packable(none.w).has_value());
}

}  // namespace
}  // namespace engine
