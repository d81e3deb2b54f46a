// Codes of 1 to 8 bits, packed least significant bit first.
//
// Canonical layout (docs/packed-format.md): code i of a row of `bits`-wide codes occupies the bits
// [i*bits, (i+1)*bits) of the row, where bit k of the row is bit k%8 (0 = least significant) of
// byte k/8. A row starts at a byte boundary; the unused high bits of its last byte are zero.
// Consequence used below: eight codes always fill exactly `bits` bytes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "formats/error.h"

namespace engine {

static_assert(std::endian::native == std::endian::little, "codes are packed through words");

namespace bits_detail {

inline void require_width(unsigned bits) {
  if (bits < 1 || bits > 8) {
    throw Error(ErrorCode::usage,
                "packed codes: expected a width of 1 to 8 bits, found " + std::to_string(bits));
  }
}

inline void require_row_bytes(std::uint64_t expected, std::size_t found) {
  if (expected != found) {
    throw Error(ErrorCode::mismatch, "packed row: expected " + std::to_string(expected) +
                                         " bytes, found " + std::to_string(found));
  }
}

// Packs `count` <= 8 codes, all below 2^Bits, into one little-endian word.
template <unsigned Bits>
std::uint64_t gather(const std::uint8_t* codes, std::size_t count) {
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < count; ++i) word |= std::uint64_t{codes[i]} << (i * Bits);
  return word;
}

template <unsigned Bits>
void scatter(std::uint64_t word, std::uint8_t* codes, std::size_t count) {
  constexpr std::uint64_t mask = (1U << Bits) - 1U;
  for (std::size_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>((word >> (i * Bits)) & mask);
  }
}

template <unsigned Bits>
void pack(std::span<const std::uint8_t> codes, std::span<std::byte> row) {
  if constexpr (Bits == 8) {
    if (!codes.empty()) std::memcpy(row.data(), codes.data(), codes.size());
  } else {
    // Widths that divide a byte take one byte per step (compilers vectorise that); the others
    // take eight codes, Bits bytes, per step through a 64-bit word.
    constexpr std::size_t step = 8 % Bits == 0 ? 8 / Bits : 8;
    constexpr std::size_t step_bytes = step * Bits / 8;
    const std::size_t steps = codes.size() / step;
    for (std::size_t s = 0; s < steps; ++s) {
      const std::uint64_t word = gather<Bits>(codes.data() + s * step, step);
      std::memcpy(row.data() + s * step_bytes, &word, step_bytes);
    }
    const std::size_t tail_bytes = row.size() - steps * step_bytes;
    if (tail_bytes > 0) {
      const std::uint64_t word = gather<Bits>(codes.data() + steps * step, codes.size() % step);
      std::memcpy(row.data() + steps * step_bytes, &word, tail_bytes);
    }
  }
}

template <unsigned Bits>
void unpack(std::span<const std::byte> row, std::span<std::uint8_t> codes) {
  if constexpr (Bits == 8) {
    if (!codes.empty()) std::memcpy(codes.data(), row.data(), codes.size());
  } else {
    constexpr std::size_t step = 8 % Bits == 0 ? 8 / Bits : 8;
    constexpr std::size_t step_bytes = step * Bits / 8;
    const std::size_t steps = codes.size() / step;
    for (std::size_t s = 0; s < steps; ++s) {
      std::uint64_t word = 0;
      std::memcpy(&word, row.data() + s * step_bytes, step_bytes);
      scatter<Bits>(word, codes.data() + s * step, step);
    }
    const std::size_t tail_bytes = row.size() - steps * step_bytes;
    if (tail_bytes > 0) {
      std::uint64_t word = 0;
      std::memcpy(&word, row.data() + steps * step_bytes, tail_bytes);
      scatter<Bits>(word, codes.data() + steps * step, codes.size() % step);
    }
  }
}

// Calls f.template operator()<Bits>() for a run-time width in 1..8.
template <class F>
void with_width(unsigned bits, F&& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    case 8:
      return f.template operator()<8>();
    default:
      require_width(bits);
  }
}

}  // namespace bits_detail

// Bytes of a row of `count` codes: ceil(count * bits / 8), without overflow for any count.
// Error(usage) unless 1 <= bits <= 8.
inline std::uint64_t packed_row_bytes(std::uint64_t count, unsigned bits) {
  bits_detail::require_width(bits);
  return count / 8 * bits + (count % 8 * bits + 7) / 8;
}

// Packs one row. `row` has exactly packed_row_bytes(codes.size(), bits) bytes (else
// Error(mismatch)); a code of 2^bits or more is Error(mismatch) and leaves `row` untouched.
inline void pack_row(std::span<const std::uint8_t> codes, unsigned bits, std::span<std::byte> row) {
  bits_detail::require_row_bytes(packed_row_bytes(codes.size(), bits), row.size());
  unsigned any = 0;
  for (const std::uint8_t code : codes) any |= code;
  if ((any >> bits) != 0) {
    const auto bad = std::find_if(codes.begin(), codes.end(), [bits](std::uint8_t code) {
      return (static_cast<unsigned>(code) >> bits) != 0;
    });
    throw Error(ErrorCode::mismatch, "packed row: code " + std::to_string(bad - codes.begin()) +
                                         ": expected a value below " + std::to_string(1U << bits) +
                                         ", found " + std::to_string(*bad));
  }
  bits_detail::with_width(bits, [&]<unsigned Bits>() { bits_detail::pack<Bits>(codes, row); });
}

// The inverse of pack_row. `row` has exactly packed_row_bytes(codes.size(), bits) bytes (else
// Error(mismatch)); non-zero bits after the last code are Error(format), so that one row of codes
// has one encoding.
inline void unpack_row(std::span<const std::byte> row, unsigned bits,
                       std::span<std::uint8_t> codes) {
  bits_detail::require_row_bytes(packed_row_bytes(codes.size(), bits), row.size());
  const auto used = static_cast<unsigned>(codes.size() % 8 * bits % 8);  // bits of the last byte
  if (used != 0 && (std::to_integer<unsigned>(row.back()) >> used) != 0) {
    throw Error(ErrorCode::format, "packed row: byte " + std::to_string(row.size() - 1) +
                                       ": expected zero bits after the last code, found " +
                                       std::to_string(std::to_integer<unsigned>(row.back())));
  }
  bits_detail::with_width(bits, [&]<unsigned Bits>() { bits_detail::unpack<Bits>(row, codes); });
}

// Bit i of a bitmap packed as 1-bit codes.
inline bool bitmap_test(std::span<const std::byte> bitmap, std::uint64_t i) {
  return ((std::to_integer<unsigned>(bitmap[static_cast<std::size_t>(i / 8)]) >> (i % 8)) & 1U) !=
         0;
}

// Rank over one bitmap row: where the value of weight i sits in a compact plane that stores only
// the set positions. Keeps a count per 512 bits, so a query counts at most 64 bytes.
class BitmapRank {
 public:
  // `bitmap` holds `bit_count` bits (Error(mismatch) if its size differs) and must outlive this.
  BitmapRank(std::span<const std::byte> bitmap, std::uint64_t bit_count)
      : bitmap_(bitmap), bit_count_(bit_count) {
    bits_detail::require_row_bytes(packed_row_bytes(bit_count, 1), bitmap.size());
    before_.reserve(bitmap.size() / block_bytes + 2);
    before_.push_back(0);
    for (std::size_t at = 0; at < bitmap.size(); at += block_bytes) {
      const std::size_t bytes = std::min(block_bytes, bitmap.size() - at);
      before_.push_back(before_.back() + ones(at, bytes * 8));
    }
    if (bit_count % 8 != 0 &&
        (std::to_integer<unsigned>(bitmap.back()) >> static_cast<unsigned>(bit_count % 8)) != 0) {
      throw Error(ErrorCode::format, "bitmap: expected zero bits after bit " +
                                         std::to_string(bit_count - 1) + ", found ones");
    }
  }

  // Set bits in the whole bitmap.
  [[nodiscard]] std::uint64_t count() const { return before_.back(); }

  // Set bits among the first `i`; Error(usage) if i > bit_count.
  [[nodiscard]] std::uint64_t rank(std::uint64_t i) const {
    if (i > bit_count_) {
      throw Error(ErrorCode::usage, "bitmap: expected a position up to " +
                                        std::to_string(bit_count_) + ", found " +
                                        std::to_string(i));
    }
    const auto block = static_cast<std::size_t>(i / (block_bytes * 8));
    return before_[block] + ones(block * block_bytes, static_cast<std::size_t>(i % 512));
  }

 private:
  static constexpr std::size_t block_bytes = 64;

  // Set bits among `bits` <= 512 bits that start at byte `at`.
  [[nodiscard]] std::uint64_t ones(std::size_t at, std::size_t bits) const {
    std::uint64_t total = 0;
    while (bits > 0) {
      const std::size_t now = std::min<std::size_t>(bits, 64);
      std::uint64_t word = 0;
      std::memcpy(&word, bitmap_.data() + at, (now + 7) / 8);
      if (now < 64) word &= (std::uint64_t{1} << now) - 1;
      total += static_cast<std::uint64_t>(std::popcount(word));
      at += 8;
      bits -= now;
    }
    return total;
  }

  std::span<const std::byte> bitmap_;
  std::uint64_t bit_count_;
  std::vector<std::uint64_t> before_;  // ones before each block of 512 bits, then the total
};

}  // namespace engine
