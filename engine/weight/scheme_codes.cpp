#include "engine/weight/scheme_codes.h"

#include <algorithm>
#include <cstring>

namespace engine {
namespace {

// Row and even column of pair p (0..31) of a lane.
struct PairAt {
  std::size_t row, col;
};
PairAt pair_at(std::size_t lane, std::size_t p) {
  return {lane / 4 + 8 * (p % 2),
          32 * (p / 8) + 8 * (lane % 4) + 4 * (p / 4 % 2) + 2 * (p / 2 % 2)};
}

// A lane's words of a plane: chunks of four words of each lane, then one of two.
std::size_t word_at(std::size_t bits, std::size_t lane, std::size_t word) {
  const std::size_t per_lane = word / 4 < bits / 2 ? 4 : 2;
  return 512 * (word / 4) + 4 * (per_lane * lane + word % 4);
}

using Words = std::array<std::uint32_t, 8>;

// Where pair p of a plane of three bits lies: the first of three words, which of the eight codes of
// a byte, and that byte.
struct ThreeAt {
  std::size_t first, r, shift;
  explicit ThreeAt(std::size_t p)
      : first(3 * (p / 16)), r(p / 8 % 2 * 4 + p / 4 % 2 * 2 + p % 2), shift(8 * (p / 2 % 2)) {}
};

// `v`: a pair's parts of codes, in the low bits of either half.
void put_pair(std::size_t bits, std::size_t p, std::uint32_t v, Words& w) {
  if (bits != 3) {
    const std::size_t per_word = 16 / bits;
    w[p / per_word] |= v << (bits * (p % per_word));
    return;
  }
  const ThreeAt at(p);
  if (at.r < 6) {
    w[at.first + at.r / 2] |= v << (3 * (at.r % 2) + at.shift);
  } else if (at.r == 6) {
    w[at.first] |= (v & 0x00030003U) << (6 + at.shift);
    w[at.first + 1] |= (v >> 2 & 0x00010001U) << (6 + at.shift);
  } else {
    w[at.first + 1] |= (v & 0x00010001U) << (7 + at.shift);
    w[at.first + 2] |= (v >> 1 & 0x00030003U) << (6 + at.shift);
  }
}
std::uint32_t get_pair(std::size_t bits, std::size_t p, const Words& w) {
  if (bits != 3) {
    const std::size_t per_word = 16 / bits;
    return w[p / per_word] >> (bits * (p % per_word)) & 0x00010001U * ((1U << bits) - 1U);
  }
  const ThreeAt at(p);
  if (at.r < 6) return w[at.first + at.r / 2] >> (3 * (at.r % 2) + at.shift) & 0x00070007U;
  if (at.r == 6) {
    return (w[at.first] >> (6 + at.shift) & 0x00030003U) |
           (w[at.first + 1] >> (6 + at.shift) & 0x00010001U) << 2;
  }
  return (w[at.first + 1] >> (7 + at.shift) & 0x00010001U) |
         (w[at.first + 2] >> (6 + at.shift) & 0x00030003U) << 1;
}

constexpr std::size_t widest_plane = 4;

}  // namespace

void pack_record_codes(int code_bits, const RecordCodes& codes, std::byte* to) {
  const auto all = static_cast<std::size_t>(code_bits);
  for (std::size_t shift = 0; shift < all; shift += widest_plane) {
    const std::size_t bits = std::min(widest_plane, all - shift);
    const std::uint32_t mask = 0x00010001U * ((1U << bits) - 1U);
    for (std::size_t lane = 0; lane < 32; ++lane) {
      Words words{};
      for (std::size_t p = 0; p < 32; ++p) {
        const auto [row, col] = pair_at(lane, p);
        const std::uint32_t v = codes[row][col] | static_cast<std::uint32_t>(codes[row][col + 1])
                                                      << 16U;
        put_pair(bits, p, v >> shift & mask, words);
      }
      for (std::size_t i = 0; i < 2 * bits; ++i) {
        std::memcpy(to + word_at(bits, lane, i), &words[i], 4);
      }
    }
    to += 256 * bits;
  }
}

void unpack_record_codes(int code_bits, const std::byte* from, RecordCodes& codes) {
  codes = {};
  const auto all = static_cast<std::size_t>(code_bits);
  for (std::size_t shift = 0; shift < all; shift += widest_plane) {
    const std::size_t bits = std::min(widest_plane, all - shift);
    for (std::size_t lane = 0; lane < 32; ++lane) {
      Words words{};
      for (std::size_t i = 0; i < 2 * bits; ++i) {
        std::memcpy(&words[i], from + word_at(bits, lane, i), 4);
      }
      for (std::size_t p = 0; p < 32; ++p) {
        const auto [row, col] = pair_at(lane, p);
        const std::uint32_t v = get_pair(bits, p, words) << shift;
        codes[row][col] = static_cast<std::uint8_t>(codes[row][col] | (v & 0xffU));
        codes[row][col + 1] = static_cast<std::uint8_t>(codes[row][col + 1] | (v >> 16U & 0xffU));
      }
    }
    from += 256 * bits;
  }
}

void pack_region_codes(const RecordCodes& codes, std::byte* to) {
  for (std::size_t lane = 0; lane < 32; ++lane) {
    Words words{};
    for (std::size_t p = 0; p < 32; ++p) {
      const auto [row, col] = pair_at(lane, p);
      const std::uint32_t v = codes[row][col] | static_cast<std::uint32_t>(codes[row][col + 1])
                                                    << 8U;
      words[p / 8] |= v << (16 * (p / 4 % 2) + 2 * (p % 4));
    }
    std::memcpy(to + 16 * lane, words.data(), 16);
  }
}

void unpack_region_codes(const std::byte* from, RecordCodes& codes) {
  for (std::size_t lane = 0; lane < 32; ++lane) {
    Words words{};
    std::memcpy(words.data(), from + 16 * lane, 16);
    for (std::size_t p = 0; p < 32; ++p) {
      const auto [row, col] = pair_at(lane, p);
      const std::uint32_t v = words[p / 8] >> (16 * (p / 4 % 2) + 2 * (p % 4));
      codes[row][col] = static_cast<std::uint8_t>(v & 3U);
      codes[row][col + 1] = static_cast<std::uint8_t>(v >> 8U & 3U);
    }
  }
}

}  // namespace engine
