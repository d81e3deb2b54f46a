// Packed codes: bit order, every width at every short length, refusals, bitmap ranks.
#include "formats/bits.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

namespace engine {
namespace {

std::vector<std::uint8_t> random_codes(std::size_t count, unsigned bits, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint8_t> codes(count);
  for (auto& code : codes) code = static_cast<std::uint8_t>(random() & ((1U << bits) - 1U));
  return codes;
}

// The definition, bit by bit.
std::vector<std::byte> pack_by_definition(const std::vector<std::uint8_t>& codes, unsigned bits) {
  std::vector<std::byte> row((codes.size() * bits + 7) / 8);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    for (unsigned b = 0; b < bits; ++b) {
      const std::size_t k = i * bits + b;
      if (((codes[i] >> b) & 1U) != 0) row[k / 8] |= std::byte{1} << (k % 8);
    }
  }
  return row;
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Bits, RowBytesRoundUp) {
  EXPECT_EQ(packed_row_bytes(0, 3), 0U);
  EXPECT_EQ(packed_row_bytes(1, 1), 1U);
  EXPECT_EQ(packed_row_bytes(8, 1), 1U);
  EXPECT_EQ(packed_row_bytes(9, 1), 2U);
  EXPECT_EQ(packed_row_bytes(5, 3), 2U);
  EXPECT_EQ(packed_row_bytes(4097, 4), 2049U);
  // ceil((2^64 - 1) * 7 / 8) without overflow.
  EXPECT_EQ(packed_row_bytes(~std::uint64_t{0}, 7), std::uint64_t{0xE000000000000000});
}

TEST(Bits, DocumentedExample) {
  const std::vector<std::uint8_t> codes = {5, 2, 7, 0, 1};
  std::vector<std::byte> row(2);
  pack_row(codes, 3, row);
  EXPECT_EQ(row[0], std::byte{0xD5});
  EXPECT_EQ(row[1], std::byte{0x11});
  row.resize(3);
  pack_row(codes, 4, row);
  EXPECT_EQ(row[0], std::byte{0x25});
  EXPECT_EQ(row[1], std::byte{0x07});
  EXPECT_EQ(row[2], std::byte{0x01});
}

TEST(Bits, RoundTripEveryWidthAndLength) {
  for (unsigned bits = 1; bits <= 8; ++bits) {
    for (std::size_t count = 0; count <= 130; ++count) {
      const auto codes = random_codes(count, bits, static_cast<unsigned>(count) * 8 + bits);
      std::vector<std::byte> row(packed_row_bytes(count, bits), std::byte{0xFF});
      pack_row(codes, bits, row);
      ASSERT_EQ(row, pack_by_definition(codes, bits)) << bits << " bits, " << count << " codes";
      std::vector<std::uint8_t> back(count, 0xFF);
      unpack_row(row, bits, back);
      ASSERT_EQ(back, codes) << bits << " bits, " << count << " codes";
    }
  }
}

TEST(Bits, RefusesCodesTooLarge) {
  for (unsigned bits = 1; bits < 8; ++bits) {
    std::vector<std::uint8_t> codes(11, 0);
    codes[9] = static_cast<std::uint8_t>(1U << bits);
    std::vector<std::byte> row(packed_row_bytes(codes.size(), bits), std::byte{0xAB});
    const auto untouched = row;
    const std::string message = message_of([&] { pack_row(codes, bits, row); });
    EXPECT_NE(message.find("code 9: expected a value below " + std::to_string(1U << bits)),
              std::string::npos)
        << message;
    EXPECT_EQ(row, untouched);
  }
}

TEST(Bits, RefusesOtherWidthsAndSizes) {
  std::vector<std::uint8_t> codes(3);
  std::vector<std::byte> row(2);
  EXPECT_THROW(pack_row(codes, 0, row), Error);
  EXPECT_THROW(pack_row(codes, 9, row), Error);
  EXPECT_THROW(unpack_row(row, 0, codes), Error);
  EXPECT_THROW(unpack_row(row, 9, codes), Error);
  EXPECT_THROW(pack_row(codes, 2, row), Error);    // needs 1 byte
  EXPECT_THROW(unpack_row(row, 6, codes), Error);  // needs 3
  EXPECT_NO_THROW(pack_row(codes, 5, row));
}

TEST(Bits, RefusesBitsAfterTheLastCode) {
  for (unsigned bits = 1; bits <= 7; ++bits) {
    for (std::size_t count = 1; count <= 16; ++count) {
      const std::size_t used = count * bits;
      std::vector<std::byte> row(packed_row_bytes(count, bits));
      std::vector<std::uint8_t> codes(count);
      EXPECT_NO_THROW(unpack_row(row, bits, codes));
      for (std::size_t bit = used; bit < row.size() * 8; ++bit) {
        auto damaged = row;
        damaged[bit / 8] |= std::byte{1} << (bit % 8);
        EXPECT_THROW(unpack_row(damaged, bits, codes), Error) << bits << " " << count;
      }
    }
  }
}

TEST(Bits, RankCountsTheBitsBefore) {
  for (const std::size_t count : {0U, 1U, 7U, 8U, 63U, 64U, 65U, 511U, 512U, 513U, 1024U, 2000U}) {
    const auto bits = random_codes(count, 1, static_cast<unsigned>(count));
    std::vector<std::byte> bitmap(packed_row_bytes(count, 1));
    pack_row(bits, 1, bitmap);
    const BitmapRank rank(bitmap, count);
    std::uint64_t ones = 0;
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(rank.rank(i), ones) << count << " bits, position " << i;
      ASSERT_EQ(bitmap_test(bitmap, i), bits[i] != 0);
      ones += bits[i];
    }
    EXPECT_EQ(rank.rank(count), ones);
    EXPECT_EQ(rank.count(), ones);
    EXPECT_THROW(static_cast<void>(rank.rank(count + 1)), Error);
  }
}

TEST(Bits, RankRefusesDamagedBitmaps) {
  const std::vector<std::byte> bitmap = {std::byte{0}, std::byte{0x20}};
  EXPECT_THROW(BitmapRank(bitmap, 13), Error);  // bit 13 is set
  EXPECT_THROW(BitmapRank(bitmap, 17), Error);  // needs 3 bytes
  EXPECT_EQ(BitmapRank(bitmap, 14).count(), 1U);
}

}  // namespace
}  // namespace engine
