// Packed weights with transforms around them: what the layout and the rotations hold is the weight.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "engine/ops/ops.h"
#include "engine/ops/rotation.h"
#include "engine/weight/packed_decode.h"
#include "engine/weight/packed_layout.h"
#include "engine/weight/pattern.h"
#include "engine/weight/row_decoder.h"
#include "tests/support/compare.h"
#include "tests/support/rotated_weights.h"
#include "tests/support/scheme_weights.h"

namespace engine::test {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::vector<RotatedOptions> all_options() {
  std::vector<RotatedOptions> all;
  for (const RotatedMethod method : {RotatedMethod::quip, RotatedMethod::quipsharp}) {
    for (const int bits : {2, 3, 4}) all.push_back({.method = method, .bits = bits});
  }
  all.push_back({.shared = true, .diagonal = false});
  all.push_back({.permuted = false});
  all.push_back({.left = false});
  all.push_back({.method = RotatedMethod::quipsharp, .right = false});
  return all;
}

TEST(RotatedLayout, RecordsAreTheTerms) {
  for (const RotatedOptions& o : all_options()) {
    for (const auto& [rows, cols] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{64, 256}, {20, 384}, {12, 56}}) {
      SCOPED_TRACE(rotated_name(o) + " " + std::to_string(rows) + "x" + std::to_string(cols));
      const OwnedLinear owned = rotated_weight(rows, cols, o);
      validate(owned.weight, "memory", "w");
      const auto shape = match_scheme(owned.weight);
      ASSERT_TRUE(shape.has_value()) << scheme_name(owned.weight);
      EXPECT_EQ(shape->kind,
                o.method == RotatedMethod::quip ? PackedKind::midrise : PackedKind::lattice);
      EXPECT_EQ(shape->bits, o.bits);
      EXPECT_EQ(shape->left.kind, owned.weight.left.kind);
      EXPECT_EQ(shape->right.kind, owned.weight.right.kind);
      EXPECT_EQ(shape->diagonal, owned.weight.diagonal_plane >= 0);
      ASSERT_NO_THROW(check_packed_shape(*shape));
      std::vector<std::byte> records = scheme_records(owned.weight, *shape);
      PackedWeight packed;
      packed.shape = *shape;
      packed.records =
          make_view(records.data(), DType::u8, DeviceKind::cpu, 1, std::ssize(records));
      std::vector<float> expected(at(rows * cols)), tile(at(record_rows * cols));
      RowDecoder(owned.weight).decode_terms(0, host_view(expected.data(), rows, cols));
      for (std::int64_t t = 0; t < shape->row_tiles(); ++t) {
        decode_packed_tile(packed, t, tile.data(), cols);
        const std::int64_t n = std::min(record_rows, rows - t * record_rows);
        EXPECT_EQ(std::memcmp(tile.data(), expected.data() + t * record_rows * cols,
                              at(n * cols) * sizeof(float)),
                  0)
            << "tile " << t;
      }
    }
  }
}

TEST(RotatedLayout, TablesOfALatticeAreItsPoints) {
  const OwnedLinear w = rotated_weight(16, 64, {.method = RotatedMethod::quipsharp, .bits = 3});
  const PackedShape shape = *match_scheme(w.weight);
  const std::vector<std::byte> bytes = scheme_records(w.weight, shape);
  std::vector<std::uint32_t> table(3 * 256);
  std::memcpy(table.data(), bytes.data() + 256, table.size() * 4);
  const auto nibble = [](std::uint32_t word, int i) {
    return static_cast<float>(word >> (4 * (i / 2 + i % 2 * 4)) & 15U);
  };
  std::array<float, 8> point{};
  for (unsigned code = 0; code < 65536; ++code) {
    e8p_point(static_cast<std::uint16_t>(code), point);
    const std::uint32_t word = table[code >> 8] ^ table[256 + (code & 255U)];
    for (int i = 0; i < 8; ++i) {
      ASSERT_EQ((nibble(word, i) - 7.5F) / 2, point[at(i)]) << "code " << code;
    }
  }
  for (std::size_t code = 0; code < 256; ++code) {
    for (int i = 0; i < 8; ++i) {
      ASSERT_EQ((nibble(table[512 + code], i) - 8) / 2, e8_byte_points()[code][at(i)]);
    }
  }
}

TEST(RotatedLayout, OtherWeightsAreRefused) {
  for (const auto& [name, w] : transformed_weights(24, 48)) {
    SCOPED_TRACE(name);
    // They have a permutation, scales by row, 1 or 8 bits.
    const bool known = name == "quipsharp 2";
    EXPECT_EQ(match_scheme(w.weight).has_value(), known);
  }
  OwnedLinear wide = rotated_weight(16, 64, {.bits = 4});
  wide.weight.terms[0].bits = 5;
  EXPECT_FALSE(match_scheme(wide.weight).has_value());
  OwnedLinear diagonal = rotated_weight(16, 64, {});
  diagonal.weight.right = Transform{};
  EXPECT_FALSE(match_scheme(diagonal.weight).has_value());
  OwnedLinear swapped = rotated_weight(16, 64, {.method = RotatedMethod::quipsharp, .bits = 3});
  std::swap(swapped.weight.terms[0], swapped.weight.terms[1]);
  EXPECT_FALSE(match_scheme(swapped.weight).has_value());
}

// `in` is R, `out` is L^T: against the transforms by their definition, in f64. Rotations in f16 are
// off by 2^-12 of each element at most; two stages, and elements of unit vectors turned.
TEST(RotatedLayout, RotationsAreTheTransforms) {
  for (const RotatedOptions& o : all_options()) {
    SCOPED_TRACE(rotated_name(o));
    const std::int64_t rows = 96, cols = 112;
    const OwnedLinear owned = rotated_weight(rows, cols, o);
    const PackedShape shape = *match_scheme(owned.weight);
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 1);
    Arena plan = Arena::measuring(ops->kind());
    const Rotation planned = take_rotation(plan, MemTag::weights, shape);
    Arena arena(ops->memory(), ledger, plan.peak(), true);
    const Rotation r = take_rotation(arena, MemTag::weights, shape);
    EXPECT_EQ(arena.peak(), plan.peak());
    EXPECT_EQ(planned.bytes(), r.bytes());
    EXPECT_EQ(r.diagonal.empty(), owned.weight.diagonal_plane < 0);
    fill_rotation(*ops, r, owned.weight, 1);
    const auto check = [&](const TransformView& q, bool inverse, const Transform& transform,
                           bool of_inverse, std::int64_t d, const View& places) {
      if (q.kind == TransformKind::none) {
        EXPECT_EQ(transform.kind, TransformKind::none);
        return;
      }
      const HostTransform host(transform, read_signs(owned.weight, transform), d, 1);
      std::vector<float> x = bell_matrix(3, d, 5);
      std::vector<double> expected;
      double norm = 0;
      for (std::int64_t row = 0; row < 3; ++row) {
        std::vector<double> v(x.begin() + row * d, x.begin() + (row + 1) * d);
        for (const double e : v) norm += e * e;
        host.apply(v, of_inverse);
        expected.insert(expected.end(), v.begin(), v.end());
      }
      const View in = host_view(x.data(), 3, d);
      ops->transform_rows(in, q, inverse, in);
      EXPECT_TRUE(compare_close(std::vector<double>(x.begin(), x.end()), expected,
                                {.absolute = 8 * roundoff(DType::f16) *
                                             std::sqrt(norm / static_cast<double>(d))})
                      .ok);
      EXPECT_EQ(places.empty(), q.perm_out.empty());
      for (std::int64_t k = 0; k < places.cols; ++k) {
        EXPECT_EQ(places.host<std::int32_t>()[q.perm_out.host<std::int32_t>()[k]], k);
      }
    };
    check(r.in, false, owned.weight.right, false, cols, r.in_places);
    check(r.out, r.out_inverse(), owned.weight.left, true, rows, r.out_places);
  }
}

}  // namespace
}  // namespace engine::test
