// The kernel layout of mixed widths, salient weights and regions: what it holds is the weight.
#include "engine/weight/scheme_layout.h"

#include <gtest/gtest.h>

#include <cstring>

#include "engine/weight/packed_decode.h"
#include "engine/weight/packed_layout.h"
#include "engine/weight/pattern.h"
#include "engine/weight/scheme_codes.h"
#include "tests/support/scheme_weights.h"

namespace engine::test {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Row by row, bit for bit.
void expect_same_weight(const OwnedLinear& owned, PackedKind kind) {
  const LinearWeight& w = owned.weight;
  validate(w, "memory", "w");
  EXPECT_FALSE(match_packable(w).has_value());
  const auto shape = match_scheme(w);
  ASSERT_TRUE(shape.has_value()) << scheme_name(w);
  ASSERT_EQ(shape->kind, kind);
  EXPECT_NO_THROW(check_packed_shape(*shape));
  std::vector<float> expected(at(w.rows * w.cols)), row(at(w.cols) + 1);
  decode_linear(w, host_view(expected.data(), w.rows, w.cols));
  std::vector<std::byte> records = scheme_records(w, *shape);
  EXPECT_EQ(static_cast<std::int64_t>(records.size()), shape->records_bytes());
  PackedWeight packed;
  packed.shape = *shape;
  packed.records = make_view(records.data(), DType::u8, DeviceKind::cpu, 1, std::ssize(records));
  std::vector<float> tile(at(record_rows * (w.cols + 3)));
  for (std::int64_t t = 0; t < shape->row_tiles(); ++t) {
    std::fill(tile.begin(), tile.end(), 99.0F);
    decode_packed_tile(packed, t, tile.data(), w.cols + 3);
    for (std::int64_t r = 0; r < record_rows; ++r) {
      const std::int64_t whole = t * record_rows + r;
      const float* found = tile.data() + r * (w.cols + 3);
      if (whole < w.rows) {
        EXPECT_EQ(std::memcmp(found, expected.data() + whole * w.cols, at(w.cols) * 4), 0)
            << "row " << whole;
      }
      for (std::int64_t c = whole < w.rows ? w.cols : 0; c < w.cols + 3; ++c) {
        ASSERT_EQ(found[c], 99.0F) << "row " << whole << ", column " << c;
      }
    }
  }
}

TEST(SchemeCodes, LieWhereThePackedLayoutSays) {
  for (int bits = 1; bits <= 8; ++bits) {
    RecordCodes codes, back;
    for (std::size_t i = 0; i < 2048; ++i) {
      codes[i / 128][i % 128] = static_cast<std::uint8_t>(uniform_value(5, 1, i) * (1 << bits));
    }
    PackedShape shape;
    shape.rows = record_rows;
    shape.cols = record_cols;
    shape.bits = bits;
    std::vector<std::byte> record(at(256 * bits));
    pack_record_codes(bits, codes, record.data());
    for (std::size_t i = 0; i < 2048; ++i) {
      ASSERT_EQ(read_record_code(shape, record.data(), static_cast<std::int64_t>(i / 128),
                                 static_cast<std::int64_t>(i % 128)),
                codes[i / 128][i % 128])
          << bits << " bits, code " << i;
    }
    unpack_record_codes(bits, record.data(), back);
    EXPECT_EQ(back, codes);
  }
  RecordCodes codes, back;
  for (std::size_t i = 0; i < 2048; ++i) {
    codes[i / 128][i % 128] = static_cast<std::uint8_t>(uniform_value(6, 1, i) * 4);
  }
  std::vector<std::byte> record(512);
  pack_region_codes(codes, record.data());
  unpack_region_codes(record.data(), back);
  EXPECT_EQ(back, codes);
  // Row 8 + 1, columns 32 + 8 * 2 + 4 and its neighbour: lane 6, word 1, register 1 of the second
  // product.
  codes = {};
  codes[9][52] = 3;
  codes[9][53] = 2;
  pack_region_codes(codes, record.data());
  std::uint32_t word = 0;
  std::memcpy(&word, record.data() + 16 * 6 + 4, 4);
  EXPECT_EQ(word, (3U | 2U << 8U) << 18U);
}

TEST(SchemeLayout, RegionPlacesArePermuted) {
  std::vector<int> seen(128, 0);
  for (int rank = 0; rank < 128; ++rank) {
    const int place = region_place(rank);
    ASSERT_TRUE(place >= 0 && place < 128);
    ++seen[at(place)];
    // Of sixteen ranks each, one product: columns 4 s .. 4 s + 3 of every eight.
    EXPECT_EQ(place / 32 * 2 + place % 8 / 4, rank / 16);
  }
  for (const int n : seen) EXPECT_EQ(n, 1);
}

TEST(SchemeLayout, MixedWidthsAreTheWeight) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    expect_same_weight(SchemeWeights(48, 1152, dtype, 1).mixed({3, 0, 2, 8, 5, 6, 7, 4, 3}),
                       PackedKind::mixed);
    expect_same_weight(SchemeWeights(5, 512, dtype, 2).mixed({2, 3, 2, 1}), PackedKind::mixed);
    expect_same_weight(SchemeWeights(33, 256, dtype, 3).mixed({0, 0}), PackedKind::mixed);
  }
}

TEST(SchemeLayout, SalientWeightsAreTheWeight) {
  for (const DType dtype : {DType::f32, DType::f16}) {
    for (const std::int64_t group : {0, 128, 256}) {
      for (const int bits : {8, 3}) {
        expect_same_weight(SchemeWeights(48, 1024, dtype, 4).salient(0.1, group, bits),
                           PackedKind::salient);
      }
      expect_same_weight(SchemeWeights(21, 384, dtype, 5).salient(0.3, group, 8),
                         PackedKind::salient);
      expect_same_weight(SchemeWeights(3, 200, dtype, 6).salient(0.001, group, 8),
                         PackedKind::salient);
    }
  }
}

TEST(SchemeLayout, RegionsAreTheWeight) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool means : {true, false}) {
      expect_same_weight(SchemeWeights(48, 768, dtype, 7).regions(means), PackedKind::regions);
      expect_same_weight(SchemeWeights(19, 200, dtype, 8).regions(means), PackedKind::regions);
    }
  }
}

TEST(SchemeLayout, WhatItCannotHoldIsRefused) {
  // Columns that are no whole blocks of 128: half of one block in the place of half of another.
  OwnedLinear w = SchemeWeights(16, 512, DType::f32, 9).mixed({2, 3, 2, 3});
  const PackedShape shape = *match_scheme(w.weight);
  auto ids = [&](std::size_t term) {
    return static_cast<std::int32_t*>(
        w.weight.planes[at(w.weight.terms[term].support.columns_plane)].data.data);
  };
  for (int i = 0; i < 64; ++i) {
    ids(0)[64 + i] += 64;  // 128..191 instead of 64..127
    ids(1)[i] -= 64;
  }
  ASSERT_NO_THROW(validate(w.weight, "memory", "w"));
  std::vector<std::byte> bytes(at(scheme_bytes(shape)));
  try {
    prepare_scheme(w.weight, shape, "layers.0.w", bytes.data());
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::usage);
    EXPECT_NE(std::string(e.what()).find("layers.0.w"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("--exec decoded"), std::string::npos) << e.what();
  }
  // Other structures have no such layout.
  OwnedLinear group = SchemeWeights(16, 256, DType::f32, 10).mixed({2, 3});
  group.weight.terms[0].grid.group = 64;
  EXPECT_FALSE(match_scheme(group.weight).has_value());
  OwnedLinear product = SchemeWeights(16, 256, DType::f16, 11).salient(0.1, 0, 8);
  product.weight.terms[1].grid.product = DType::f16;
  EXPECT_FALSE(match_scheme(product.weight).has_value());
  OwnedLinear region = SchemeWeights(16, 256, DType::f16, 12).regions(true);
  region.weight.terms.pop_back();
  EXPECT_FALSE(match_scheme(region.weight).has_value());
}

}  // namespace
}  // namespace engine::test
