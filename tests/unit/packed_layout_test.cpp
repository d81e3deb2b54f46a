// The kernel layout against places worked out by hand, and round trips.
#include "engine/weight/packed_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "engine/core/rng.h"
#include "engine/ops/ops.h"
#include "engine/weight/packed_decode.h"

namespace engine {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;
using Ints = std::vector<std::int32_t>;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

PackedShape affine(std::int64_t rows, std::int64_t cols, int bits, std::int64_t group) {
  PackedShape s;
  s.rows = rows;
  s.cols = cols;
  s.bits = bits;
  s.group = group;
  return s;
}

// A packed weight with its memory and the planes it was made of.
struct Example {
  explicit Example(const PackedShape& shape, std::uint64_t seed = 1) {
    w.shape = shape;
    records.assign(at(shape.records_bytes() / 16), {});
    units.assign(at(shape.row_unit_bytes() / 16), {});
    w.records = host_view(records.data()->byte, 1, shape.records_bytes());
    if (!units.empty()) w.row_units = host_view(units.data()->byte, 1, shape.row_unit_bytes());
    if (shape.kind == PackedKind::codebook) {
      for (int i = 0; i < 16; ++i) book.push_back(static_cast<float>(i * i) - 40.5F);
      w.book = host_view(book.data(), 1, 16);
    }
    const std::int64_t n = shape.rows * shape.terms() * shape.groups();
    for (std::int64_t i = 0; i < shape.rows * shape.cols; ++i) {
      codes.push_back(static_cast<std::uint8_t>(draw(seed, i, 1 << shape.bits)));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const float scale = 0.01F + static_cast<float>(draw(seed + 1, i, 1000)) * 1e-4F;
      scales.push_back(round_to(shape.scale_dtype, scale));
      if (shape.zeros) zeros.push_back(static_cast<std::int32_t>(draw(seed + 2, i, 256)));
    }
  }

  static std::int64_t draw(std::uint64_t seed, std::int64_t i, int limit) {
    return static_cast<std::int64_t>(uniform_value(seed, 0, static_cast<std::uint64_t>(i)) *
                                     static_cast<double>(limit));
  }
  [[nodiscard]] View codes_view() { return host_view(codes.data(), w.shape.rows, w.shape.cols); }
  [[nodiscard]] View scales_view() {
    return host_view(scales.data(), w.shape.rows * w.shape.terms(), w.shape.groups());
  }
  [[nodiscard]] View zeros_view() {
    if (zeros.empty()) return {};
    return host_view(zeros.data(), w.shape.rows * w.shape.terms(), w.shape.groups());
  }
  void pack() {
    // Whatever was there before must not show.
    std::memset(w.records.data, 0xA5, at(w.records.bytes()));
    if (!units.empty()) std::memset(w.row_units.data, 0xA5, at(w.row_units.bytes()));
    check_packed_weight("test", w, DeviceKind::cpu);
    check_packed_planes("test", w.shape, codes_view(), scales_view(), zeros_view(), !w.shape.zeros,
                        DeviceKind::cpu);
    pack_records(codes_view(), scales_view(), zeros_view(), w, 0, w.shape.row_tiles());
  }
  [[nodiscard]] const std::uint8_t* bytes() const { return w.records.as<std::uint8_t>(); }

  struct alignas(16) Block {
    std::uint8_t byte[16];
  };
  PackedWeight w;
  std::vector<Block> records, units;
  Bytes codes;
  Floats scales, book;
  Ints zeros;
};

std::uint32_t word_of(const std::uint8_t* bytes) {
  std::uint32_t word = 0;
  std::memcpy(&word, bytes, 4);
  return word;
}

TEST(PackedLayout, LanePlacesByHand) {
  const auto expect = [](std::int64_t row, std::int64_t col, int lane, int pair, int half) {
    const LanePlace p = lane_place(row, col);
    EXPECT_EQ(p.lane, lane) << row << ", " << col;
    EXPECT_EQ(p.pair, pair) << row << ", " << col;
    EXPECT_EQ(p.half, half) << row << ", " << col;
  };
  expect(0, 0, 0, 0, 0);
  expect(0, 1, 0, 0, 1);
  expect(8, 0, 0, 1, 0);
  expect(0, 2, 0, 2, 0);
  expect(8, 3, 0, 3, 1);
  expect(0, 4, 0, 4, 0);   // the second product of the first 32 columns
  expect(0, 8, 1, 0, 0);   // the next lane of the quad
  expect(0, 32, 0, 8, 0);  // u = 1: product 2
  expect(3, 0, 12, 0, 0);
  // Row 13 = 5 + 8, column 109 = 3 * 32 + 1 * 8 + 5: lane 21, product 7, e = 5: pair 28 + 1, odd.
  expect(13, 109, 21, 29, 1);
  expect(15, 127, 31, 31, 1);
}

TEST(PackedLayout, EveryBitOfEveryCodeHasAPlaceOfItsOwn) {
  for (int bits = 1; bits <= 4; ++bits) {
    std::set<std::pair<std::int64_t, int>> places;
    for (std::int64_t row = 0; row < 16; ++row) {
      for (std::int64_t col = 0; col < 128; ++col) {
        const LanePlace lane = lane_place(row, col);
        for (int k = 0; k < bits; ++k) {
          const BitPlace b = code_bit_place(bits, lane, k);
          const std::int64_t byte = lane_word_byte(bits, lane.lane, b.word);
          ASSERT_EQ(byte % 4, 0);
          ASSERT_TRUE(byte >= 0 && byte < 256 * bits && b.bit >= 0 && b.bit < 32);
          places.insert({byte, b.bit});
        }
      }
    }
    EXPECT_EQ(places.size(), 2048U * static_cast<unsigned>(bits)) << bits;
  }
}

TEST(PackedLayout, WordsByHand) {
  // Four bits: two chunks of [lane][4 words].
  EXPECT_EQ(lane_word_byte(4, 0, 3), 12);
  EXPECT_EQ(lane_word_byte(4, 5, 2), 88);
  EXPECT_EQ(lane_word_byte(4, 5, 6), 512 + 88);
  // Three: one of four words, one of two.
  EXPECT_EQ(lane_word_byte(3, 31, 3), 508);
  EXPECT_EQ(lane_word_byte(3, 31, 5), 512 + 252);
  EXPECT_EQ(lane_word_byte(2, 1, 0), 16);
  EXPECT_EQ(lane_word_byte(1, 1, 0), 8);
  EXPECT_EQ(lane_word_byte(1, 31, 1), 252);
}

TEST(PackedLayout, BitsByHand) {
  const auto expect = [](int bits, int pair, int half, int k, int word, int bit) {
    const BitPlace p = code_bit_place(bits, {0, pair, half}, k);
    EXPECT_EQ(p.word, word) << bits << " bits, pair " << pair;
    EXPECT_EQ(p.bit, bit) << bits << " bits, pair " << pair;
  };
  expect(4, 0, 0, 0, 0, 0);
  expect(4, 3, 1, 2, 0, 30);
  expect(4, 31, 0, 0, 7, 12);
  expect(2, 9, 0, 1, 1, 3);
  expect(1, 17, 1, 0, 1, 17);
  // Three bits: pairs 4 j + i, j = 0..3, lie in words 0..2, those of j = 4..7 in words 3..5. i = 2
  // and 3 go to the upper byte of each half; the order within a byte is that of j, then i % 2.
  expect(3, 0, 0, 2, 0, 2);
  expect(3, 1, 1, 0, 0, 19);
  expect(3, 2, 0, 1, 0, 9);
  expect(3, 4, 0, 2, 1, 2);
  expect(3, 7, 1, 1, 1, 28);
  expect(3, 11, 0, 2, 2, 13);  // j = 2, i = 3
  expect(3, 25, 1, 0, 5, 19);  // j = 6, i = 1
  // The last two of a byte, j = 3 and 7, are in the bits left over: 6, 7 | 6 and 7 | 6, 7.
  expect(3, 12, 0, 0, 0, 6);
  expect(3, 12, 0, 1, 0, 7);
  expect(3, 12, 1, 2, 1, 22);
  expect(3, 13, 1, 0, 1, 23);
  expect(3, 13, 0, 1, 2, 6);
  expect(3, 13, 0, 2, 2, 7);
  expect(3, 14, 0, 0, 0, 14);
  expect(3, 30, 0, 2, 4, 14);
  expect(3, 31, 1, 1, 5, 30);
}

TEST(PackedLayout, CodesOfManyBitsAreSplit) {
  const int high[] = {0, 0, 0, 0, 1, 2, 3, 4};
  for (int bits = 1; bits <= 8; ++bits) {
    const CodeParts p = code_parts(affine(16, 128, bits, 0));
    ASSERT_EQ(p.count, bits > 4 ? 2 : 1);
    EXPECT_EQ(p.part[0].bits, std::min(bits, 4));
    EXPECT_EQ(p.part[0].offset, 0);
    if (bits <= 4) continue;
    EXPECT_EQ(p.part[1].bits, high[bits - 1]);
    EXPECT_EQ(p.part[1].first_bit, 4);
    EXPECT_EQ(p.part[1].offset, 1024);
  }
  PackedShape two = affine(16, 128, 2, 0);
  two.kind = PackedKind::binary2;
  const CodeParts p = code_parts(two);
  ASSERT_EQ(p.count, 2);
  EXPECT_EQ(p.part[1].bits, 1);
  EXPECT_EQ(p.part[1].first_bit, 1);
  EXPECT_EQ(p.part[1].offset, 256);
}

TEST(PackedLayout, ARecordByHand) {
  // 17 x 130, 6 bits, groups of 64: four records of 1536 + 2 * 16 * (2 + 1) = 1632 bytes.
  PackedShape s = affine(17, 130, 6, 64);
  EXPECT_EQ(s.record_bytes(), 1632);
  EXPECT_EQ(s.records_bytes(), 4 * 1632);
  Example e(s);
  std::fill(e.codes.begin(), e.codes.end(), std::uint8_t{0});
  std::fill(e.scales.begin(), e.scales.end(), 0.0F);
  std::fill(e.zeros.begin(), e.zeros.end(), 0);
  // Row 9, column 42 = 32 + 8 + 2: lane 5, product 2, pair 8 + 3, even. 0b100110.
  e.codes[9 * 130 + 42] = 0x26;
  // Row 16, column 129: record 3 (tile 1, block 1), row 0, column 1: lane 0, pair 0, odd.
  e.codes[16 * 130 + 129] = 0x3F;
  e.scales[9 * 3 + 1] = 1.0F;  // row 9, columns 64..127: place 3 of the second unit
  e.zeros[9 * 3 + 1] = 200;
  e.scales[16 * 3 + 2] = -2.0F;  // row 16, columns 128, 129
  e.zeros[16 * 3 + 2] = 7;
  e.pack();
  Bytes expected(4 * 1632, 0);
  const auto put_word = [&](std::size_t byte, std::uint32_t word) {
    std::memcpy(expected.data() + byte, &word, 4);
  };
  put_word(16 * 5 + 4 * 2, 6U << 12);        // low plane: pair 11 is word 2, bit 12
  put_word(1024 + 16 * 5 + 4 * 1, 2U << 6);  // high plane: word 1, bit 2 * 3
  expected[1536 + 48 + 2 * 3 + 1] = 0x3C;    // 1.0 in f16 is 0x3C00
  expected[1536 + 48 + 32 + 3] = 200;
  put_word(3 * 1632, 0xFU << 16);
  put_word(3 * 1632 + 1024, 0x3U << 16);
  expected[3 * 1632 + 1536 + 1] = 0xC0;  // -2.0 is 0xC000
  expected[3 * 1632 + 1536 + 32] = 7;
  for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(e.bytes()[i], expected[i]) << i;

  Floats row(130);
  decode_packed_row(e.w, 16, row.data());
  EXPECT_EQ(row[129], -2.0F * (63.0F - 7.0F));
  EXPECT_EQ(row[128], -2.0F * (0.0F - 7.0F));
  decode_packed_row(e.w, 9, row.data());
  EXPECT_EQ(row[64], -200.0F);
  EXPECT_EQ(row[42], 0.0F);
}

TEST(PackedLayout, RowUnitsAndTwoTermsByHand) {
  PackedShape s = affine(2, 3, 2, 0);
  s.kind = PackedKind::binary2;
  s.scale_dtype = DType::f32;
  EXPECT_EQ(s.record_bytes(), 512);
  EXPECT_EQ(s.row_unit_bytes(), 2 * 16 * 5);
  Example e(s);
  e.codes = {0, 1, 2, 3, 2, 1};
  e.scales = {0.5F, 2.0F, 8.0F, 16.0F};  // term 0 of rows 0 and 1, term 1 of both
  e.zeros = {1, 2, 3, 4};
  e.pack();
  const auto* units = e.w.row_units.as<std::uint8_t>();
  // Row 1 is in place 2, the second term 16 scales later; zeros follow the scales of both terms.
  EXPECT_EQ(std::bit_cast<float>(word_of(units + 4 * (16 + 2))), 16.0F);
  EXPECT_EQ(units[128 + 2], 2);
  EXPECT_EQ(units[128 + 16], 3);
  // Row 0: pair 0 holds columns 0 and 1, pair 2 column 2. First codes 0 1 0, second 0 0 1. Row 1 is
  // lane 4: 1 0 1 and 1 1 0.
  EXPECT_EQ(word_of(e.bytes()), 1U << 16);
  EXPECT_EQ(word_of(e.bytes() + 256), 1U << 2);
  EXPECT_EQ(word_of(e.bytes() + 4 * 8), 1U | 1U << 2);
  EXPECT_EQ(word_of(e.bytes() + 256 + 4 * 8), 1U | 1U << 16);
  Floats row(3);
  decode_packed_row(e.w, 0, row.data());
  EXPECT_EQ(row, (Floats{0.5F * -1 + 8.0F * -3, 0.5F * 0 + 8.0F * -3, 0.5F * -1 + 8.0F * -2}));
  const Ints order = {2, 0, 1};
  e.w.permutation = host_view(order.data(), 1, 3);
  decode_packed_row(e.w, 0, row.data());
  EXPECT_EQ(row, (Floats{0.5F * 0 + 8.0F * -3, 0.5F * -1 + 8.0F * -2, 0.5F * -1 + 8.0F * -3}));
}

TEST(PackedLayout, ImplicitZeros) {
  PackedShape s = affine(1, 1, 5, 0);
  EXPECT_EQ(implicit_zero(s), 16);
  s.bits = 1;
  EXPECT_EQ(implicit_zero(s), 1);
  s.bits = 2;
  s.kind = PackedKind::binary2;
  EXPECT_EQ(implicit_zero(s), 1);
}

const char* kind_of(const PackedShape& s) {
  const char* names[] = {"affine ", "codebook ", "binary2 "};
  return names[static_cast<int>(s.kind)];
}

std::vector<PackedShape> all_shapes(std::int64_t rows, std::int64_t cols) {
  std::vector<PackedShape> shapes;
  for (const std::int64_t group : {0, 32, 64, 128, 256}) {
    for (const DType scales : {DType::f32, DType::f16, DType::bf16}) {
      for (const bool zeros : {false, true}) {
        for (int bits = 1; bits <= 8; ++bits) {
          PackedShape s = affine(rows, cols, bits, group);
          s.scale_dtype = scales;
          s.zeros = zeros;
          shapes.push_back(s);
          if (bits == 2) {
            s.kind = PackedKind::binary2;
            shapes.push_back(s);
          } else if (bits == 4 && !zeros) {
            s.kind = PackedKind::codebook;
            shapes.push_back(s);
          }
        }
      }
    }
  }
  return shapes;
}

TEST(PackedLayout, UnpackGivesBackWhatWasPacked) {
  // Short last tiles, blocks and groups; one row and one column.
  const std::pair<std::int64_t, std::int64_t> sizes[] = {{1, 1}, {5, 131}, {33, 300}, {16, 128}};
  for (const auto& [rows, cols] : sizes) {
    for (const PackedShape& s : all_shapes(rows, cols)) {
      Example e(s, static_cast<std::uint64_t>(rows + s.bits));
      e.pack();
      Bytes codes(e.codes.size(), 0xFF);
      Floats scales(e.scales.size(), NAN);
      Ints zeros(e.scales.size(), -1);
      unpack_records(e.w, host_view(codes.data(), rows, cols),
                     host_view(scales.data(), rows * s.terms(), s.groups()),
                     host_view(zeros.data(), rows * s.terms(), s.groups()), 0, s.row_tiles());
      const std::string name = std::to_string(rows) + "x" + std::to_string(cols) + " bits " +
                               std::to_string(s.bits) + " group " + std::to_string(s.group);
      ASSERT_EQ(codes, e.codes) << name;
      ASSERT_EQ(scales, e.scales) << name;
      if (!s.zeros) e.zeros.assign(e.scales.size(), implicit_zero(s));
      ASSERT_EQ(zeros, e.zeros) << name;
    }
  }
}

TEST(PackedLayout, DecodedRowsAreTheFormula) {
  for (const PackedShape& s : all_shapes(18, 200)) {
    Example e(s, static_cast<std::uint64_t>(s.group + s.bits));
    e.pack();
    for (const std::int64_t r : {0, 9, 17}) {
      Floats row(200, NAN);
      decode_packed_row(e.w, r, row.data());
      for (std::int64_t c = 0; c < 200; ++c) {
        const std::int64_t unit = s.group == 0 ? 0 : c / s.group;
        const int code = e.codes[at(r * 200 + c)];
        float sum = 0.0F;
        for (int t = 0; t < s.terms(); ++t) {
          const std::size_t i = at((t * 18 + r) * s.groups() + unit);
          const int zero = s.zeros ? e.zeros[i] : implicit_zero(s);
          const int part = s.kind == PackedKind::binary2 ? code >> t & 1 : code;
          sum += s.kind == PackedKind::codebook ? e.scales[i] * e.book[at(part)]
                                                : e.scales[i] * static_cast<float>(part - zero);
        }
        ASSERT_EQ(row[at(c)], sum)
            << s.bits << " bits, group " << s.group << ", " << r << ", " << c;
      }
    }
  }
}

TEST(PackedDecode, TilesHaveTheBitsOfTheReference) {
  const std::pair<std::int64_t, std::int64_t> sizes[] = {{1, 1}, {5, 131}, {33, 300}, {16, 128}};
  for (const auto& [rows, cols] : sizes) {
    Ints order(at(cols));
    std::iota(order.begin(), order.end(), 0);
    std::reverse(order.begin(), order.end());
    std::swap(order.front(), order[order.size() / 2]);
    for (const PackedShape& s : all_shapes(rows, cols)) {
      Example e(s, static_cast<std::uint64_t>(cols + s.bits));
      e.pack();
      for (const bool permuted : {false, true}) {
        if (permuted) e.w.permutation = host_view(order.data(), 1, cols);
        const std::int64_t stride = cols + 3;
        Floats decoded(at((rows + 1) * stride), 77.0F);
        for (std::int64_t tile = 0; tile < s.row_tiles(); ++tile) {
          decode_packed_tile(e.w, tile, decoded.data() + tile * record_rows * stride, stride);
        }
        for (std::int64_t r = 0; r <= rows; ++r) {
          // Gaps between rows, and what follows the last, stay as they were.
          Floats expected(at(stride), 77.0F);
          if (r < rows) decode_packed_row(e.w, r, expected.data());
          ASSERT_EQ(std::memcmp(expected.data(), decoded.data() + r * stride, expected.size() * 4),
                    0)
              << kind_of(s) << s.bits << " bits, group " << s.group << ", row " << r << " of "
              << rows << "x" << cols << (permuted ? ", permuted" : "");
        }
      }
    }
  }
}

TEST(PackedLayout, PaddingIsZero) {
  // Symmetric: padded codes of 0 are no zeros, their scale is.
  PackedShape s = affine(3, 40, 4, 32);
  s.zeros = false;
  Example e(s);
  std::fill(e.codes.begin(), e.codes.end(), std::uint8_t{15});
  e.pack();
  for (std::int64_t row = 0; row < 16; ++row) {
    for (std::int64_t col = 0; col < 128; ++col) {
      const unsigned code = read_record_code(s, packed_record(e.w, 0, 0), row, col);
      ASSERT_EQ(code, row < 3 && col < 40 ? 15U : 0U) << row << ", " << col;
    }
  }
  for (std::int64_t unit = 0; unit < 4; ++unit) {
    const std::byte* at_unit = packed_unit(e.w, 0, 0, unit);
    for (std::int64_t row = 0; row < 16; ++row) {
      std::uint16_t scale = 0;
      std::memcpy(&scale, at_unit + unit_scale_byte(s, 0, row), 2);
      ASSERT_EQ(scale != 0, row < 3 && unit < 2) << row << ", " << unit;
    }
  }
}

TEST(PackedLayout, BadShapesCodesAndZerosAreRefused) {
  const auto refused = [](auto change) {
    PackedShape s = affine(16, 128, 4, 128);
    change(s);
    EXPECT_THROW(check_packed_shape(s), Error);
  };
  refused([](PackedShape& s) { s.rows = 0; });
  refused([](PackedShape& s) { s.cols = -1; });
  refused([](PackedShape& s) { s.bits = 9; });
  refused([](PackedShape& s) { s.bits = 0; });
  refused([](PackedShape& s) { s.group = 96; });
  refused([](PackedShape& s) { s.group = 16; });
  refused([](PackedShape& s) { s.group = -128; });
  refused([](PackedShape& s) { s.scale_dtype = DType::f64; });
  refused([](PackedShape& s) { s.kind = PackedKind::codebook; });  // has zeros
  refused([](PackedShape& s) { s.kind = PackedKind::binary2; });   // of 4 bits
  EXPECT_NO_THROW(check_packed_shape(affine(16, 128, 4, 384)));

  Example e(affine(16, 128, 3, 128));
  e.codes[100] = 8;
  EXPECT_THROW(e.pack(), Error);
  e.codes[100] = 7;
  EXPECT_NO_THROW(e.pack());
  for (const int zero : {-1, 256}) {
    e.zeros[5] = zero;
    EXPECT_THROW(e.pack(), Error);
  }
  e.zeros[5] = 0;
  e.w.records.cols -= 16;
  EXPECT_THROW(e.pack(), Error);
}

// ---- the CPU's ops ----

// Small integers: every sum is exact, so all kernels and both ways of adding agree to the bit.
TEST(PackedOnCpu, ProductsInEveryFloatType) {
  PackedShape s = affine(70, 40, 3, 32);
  Example e(s);
  std::fill(e.scales.begin(), e.scales.end(), 0.5F);
  std::fill(e.zeros.begin(), e.zeros.end(), 2);
  e.pack();
  Ints order(40);
  std::iota(order.rbegin(), order.rend(), 0);  // reversed
  e.w.permutation = host_view(order.data(), 1, 40);
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  EXPECT_EQ(ops->packed_workspace_bytes(s, 3, DType::f32, PackedKernel::expand), 0);

  Floats x(3 * 40), before(3 * 70), expected(3 * 70);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 5) - 2.0F;
  for (std::size_t i = 0; i < before.size(); ++i) before[i] = static_cast<float>(i % 7);
  for (std::size_t r = 0; r < 3; ++r) {
    for (std::size_t n = 0; n < 70; ++n) {
      float sum = before[r * 70 + n];
      for (std::size_t j = 0; j < 40; ++j) {
        sum += x[r * 40 + 39 - j] * 0.5F * (static_cast<float>(e.codes[n * 40 + j]) - 2.0F);
      }
      expected[r * 70 + n] = sum;
    }
  }
  const auto as = [](const Floats& from, auto type) {
    std::vector<decltype(type)> to(from.size());
    for (std::size_t i = 0; i < from.size(); ++i) store(to[i], from[i]);
    return to;
  };
  const auto check = [&](auto x_type, auto out_type) {
    const auto input = as(x, x_type);
    for (const PackedKernel kernel : {PackedKernel::automatic, PackedKernel::vector,
                                      PackedKernel::matrix, PackedKernel::expand}) {
      auto out = as(before, out_type);
      ops->packed_matmul(host_view(input.data(), 3, 40), e.w, host_view(out.data(), 3, 70), true,
                         kernel, {});
      for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(to_float(out[i]), expected[i]) << i;
      Floats plain(3 * 70, NAN);
      Linear linear;
      linear.packed = e.w;
      ops->linear(host_view(input.data(), 3, 40), linear, host_view(plain.data(), 3, 70), false, {},
                  kernel);
      for (std::size_t i = 0; i < plain.size(); ++i) ASSERT_EQ(plain[i] + before[i], expected[i]);
    }
  };
  check(float{}, float{});
  check(f16{}, f16{});
  check(f16{}, float{});
  check(bf16{}, bf16{});
  check(bf16{}, float{});

  order[3] = order[4];
  EXPECT_THROW(ops->packed_matmul(host_view(x.data(), 3, 40), e.w, host_view(before.data(), 3, 70),
                                  false, PackedKernel::automatic, {}),
               Error);
}

}  // namespace
}  // namespace engine
