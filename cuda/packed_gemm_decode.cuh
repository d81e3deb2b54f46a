// From the codes of a record to the A fragments of m16n8k16 products (the layout of records:
// engine/weight/packed_weight.h, docs/kernels.md). Lane = 4 g + t throughout; a lane's codes are
// those of rows g and g + 8.
//
// Each format has a Table (what is the same for the whole kernel) and is itself the state of one
// row tile of a record:
//   bits       bits of a code, all planes together
//   scaled     fragments are integers or book entries; their sums are multiplied by the unit's
//              scale afterwards. Otherwise fragments are whole weights.
//   bulky      decoding needs many registers for a moment
//   load       a lane's words of the codes for u = 0..3, columns 32 u .. 32 u + 31
//   begin      a unit's coefficients, before the first fragment in its columns
//   fragment   registers a0..a3 of k-step j = 0..7 of the record
#pragma once

#include <cstdint>

#include "cuda/attn_mma.cuh"

namespace engine {

enum class ScaleType : std::uint8_t { f32, f16, bf16 };

// How to read the coefficients of a unit.
struct UnitFormat {
  ScaleType scale;
  bool zeros;
};

// Constants by which integers become floats without a conversion: in `base` (1024 or 128, in both
// halves) the lowest bit of the mantissa counts 1, so OR-ing a code of up to 10 (f16) or 7 (bf16)
// bits in adds it. Adding as integers carries further: -base - z up to twice the base.
template <class T>
struct Magic;
template <>
struct Magic<__half> {
  static constexpr std::uint32_t base = 0x64006400U;
  static constexpr std::uint32_t one = 0x3C003C00U;
  static constexpr int bits = 10;
};
template <>
struct Magic<__nv_bfloat16> {
  static constexpr std::uint32_t base = 0x43004300U;
  static constexpr std::uint32_t one = 0x3F803F80U;
  static constexpr int bits = 7;
  static constexpr std::uint32_t base_16 = 0x45004500U;  // 2048: the lowest bit counts 16
};

// a b + c in both halves, rounded once.
template <class T>
__device__ std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c);
template <>
__device__ inline std::uint32_t fma2<__half>(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
template <>
__device__ inline std::uint32_t fma2<__nv_bfloat16>(std::uint32_t a, std::uint32_t b,
                                                    std::uint32_t c) {
  std::uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// (w & mask) | bits, in one instruction.
__device__ inline std::uint32_t masked_or(std::uint32_t w, std::uint32_t mask, std::uint32_t bits) {
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(w), "r"(mask), "r"(bits));
  return out;
}

// Four bytes out of the eight of (high, low), by the nibbles of `selector`, all below 8.
__device__ inline std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high,
                                           std::uint32_t selector) {
  std::uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// A lane's words of a plane of B bits: 2 B of them, in chunks of four, then one of two.
template <int B>
__device__ void load_plane(const std::uint8_t* plane, int lane, std::uint32_t* words) {
  constexpr int fours = 2 * B / 4;
#pragma unroll
  for (int c = 0; c < fours; ++c) {
    const uint4 v = *reinterpret_cast<const uint4*>(plane + c * 512 + lane * 16);
    words[4 * c] = v.x;
    words[4 * c + 1] = v.y;
    words[4 * c + 2] = v.z;
    words[4 * c + 3] = v.w;
  }
  if constexpr (B % 2 != 0) {
    const uint2 v = *reinterpret_cast<const uint2*>(plane + fours * 512 + lane * 8);
    words[4 * fours] = v.x;
    words[4 * fours + 1] = v.y;
  }
}

// v moved down by `down` bits, or up if it is negative.
__device__ inline std::uint32_t moved(std::uint32_t v, int down) {
  return down >= 0 ? v >> down : v << -down;
}

// The codes of pair p of a plane of B bits, moved to bits `at`.. of both halves; `at` + B <= 16.
// Other bits are arbitrary. For constant arguments at most one shift; for a quarter of the pairs of
// planes of three bits, which lie in two words, two shifts and a selection.
template <int B>
__device__ std::uint32_t pair_bits(const std::uint32_t* words, int p, int at) {
  if constexpr (B == 3) {
    const std::uint32_t* w = words + p / 16 * 3;
    const int byte = p / 2 % 2 * 8 - at;
    const int r = p / 8 % 2 * 4 + p / 4 % 2 * 2 + p % 2;
    if (r < 6) return moved(w[r / 2], byte + 3 * (r % 2));
    // The low 8 - r bits of these codes are the top ones of a byte, the others of the next word's.
    const std::uint32_t low = r == 6 ? 0x30003U << at : 0x10001U << at;
    const std::uint32_t first = moved(w[r - 6], byte + r);
    return (first & low) | (moved(w[r - 5], byte + r - 2) & ~low);
  } else {
    constexpr int per_word = 16 / B;
    return moved(words[p / per_word], B * (p % per_word) - at);
  }
}

// The scales of rows g and g + 8, at the unit's scales of one term.
__device__ inline float2 load_scales(const std::uint8_t* scales, ScaleType type, int g) {
  if (type == ScaleType::f32) return reinterpret_cast<const float2*>(scales)[g];
  const std::uint32_t both = reinterpret_cast<const std::uint32_t*>(scales)[g];
  if (type == ScaleType::bf16) {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000U)};
  }
  __half2 h;
  *reinterpret_cast<std::uint32_t*>(&h) = both;
  return __half22float2(h);
}

__device__ inline int scale_bytes(ScaleType type) { return type == ScaleType::f32 ? 4 : 2; }

// The zeros of rows g and g + 8.
__device__ inline uint2 load_zeros(const std::uint8_t* zeros, int g) {
  const std::uint32_t both = reinterpret_cast<const std::uint16_t*>(zeros)[g];
  return {both & 0xFFU, both >> 8};
}

struct NoTable {
  __device__ explicit NoTable(const float*) {}
};

// code - zero as integers of T. All of -255..255 are exact in both types; so is every step on the
// way, except that bf16 has no odd integers above 256: there zeros are subtracted up to 128, and
// what is left of greater ones is `excess` (fragments of up to 7 bits only).
template <class T, int Bits>
struct Affine {
  using Table = NoTable;
  static constexpr int bits = Bits;
  static constexpr bool scaled = true;
  static constexpr bool bulky = false;
  static constexpr int low_bits = Bits < 4 ? Bits : 4;
  static constexpr int high_bits = Bits - low_bits;
  static constexpr bool halves = Bits > Magic<T>::bits;  // the two planes become floats separately
  static constexpr bool has_excess = Magic<T>::bits == 7 && !halves;

  static constexpr bool by_half = Bits == 3;  // words of two values of u: registers are scarce

  std::uint32_t words[by_half ? 4 : 2 * Bits];
  std::uint32_t offset[2];       // rows g, g + 8: - base - zero
  std::uint32_t high_offset[2];  // halves only

  __device__ void load(const std::uint8_t* codes, int lane, int u) {
    if constexpr (by_half) {
      if (u == 0) load_plane<2>(codes, lane, words);  // the fourth is the second half's first
      if (u == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(codes + 512 + lane * 8);
        words[0] = words[3];
        words[1] = v.x;
        words[2] = v.y;
      }
      return;
    }
    if (u != 0) return;  // all at once
    load_plane<low_bits>(codes, lane, words);
    if constexpr (high_bits > 0) {
      load_plane<high_bits>(codes + 256 * low_bits, lane, words + 2 * low_bits);
    }
  }

  __device__ void begin(const std::uint8_t* unit, UnitFormat format, int g) {
    uint2 z{1U << (Bits - 1), 1U << (Bits - 1)};
    if (format.zeros) z = load_zeros(unit + 16 * scale_bytes(format.scale), g);
    if constexpr (halves) {
      high_offset[0] = (Magic<T>::base_16 | signs) + (z.x >> 4) * ones;
      high_offset[1] = (Magic<T>::base_16 | signs) + (z.y >> 4) * ones;
      z.x &= 0xFU;
      z.y &= 0xFU;
    }
    if constexpr (has_excess) z = {min(z.x, 128U), min(z.y, 128U)};
    offset[0] = (Magic<T>::base | signs) + z.x * ones;
    offset[1] = (Magic<T>::base | signs) + z.y * ones;
  }

  __device__ void fragment(int j, const Table&, std::uint32_t (&a)[4]) const {
    constexpr std::uint32_t low_mask = ((1U << low_bits) - 1) * ones;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = 4 * j + i;
      std::uint32_t v =
          masked_or(pair_bits<low_bits>(words, by_half ? p % 16 : p, 0), low_mask, Magic<T>::base);
      std::uint32_t zero = offset[i % 2];
      if constexpr (halves) {
        const std::uint32_t high = masked_or(pair_bits<high_bits>(words + 2 * low_bits, p, 0),
                                             0xFU * ones, Magic<T>::base_16);
        zero = fma2<T>(high, Magic<T>::one, high_offset[i % 2]);
        v = fma2<T>(v, Magic<T>::one, offset[i % 2]);
      } else if constexpr (high_bits > 0) {
        constexpr std::uint32_t high_mask = (((1U << high_bits) - 1) << 4) * ones;
        v = masked_or(pair_bits<high_bits>(words + 2 * low_bits, p, 4), high_mask, v);
      }
      a[i] = fma2<T>(v, Magic<T>::one, zero);
    }
  }

  // What `begin` left of the zeros of rows g and g + 8; once more from the unit, for the sake of
  // registers.
  static __device__ uint2 excess(const std::uint8_t* unit, UnitFormat format, int g) {
    if (!format.zeros) return {0, 0};
    const uint2 z = load_zeros(unit + 16 * scale_bytes(format.scale), g);
    return {max(z.x, 128U) - 128U, max(z.y, 128U) - 128U};
  }

 private:
  static constexpr std::uint32_t ones = 0x10001U;      // times a half: the half twice
  static constexpr std::uint32_t signs = 0x80008000U;  // of both halves
};

// The book's entries, rounded to T: low bytes and high bytes apart, so that four codes select four
// bytes at once.
template <class T>
struct Codebook {
  struct Table {
    std::uint32_t low[4], high[4];
    __device__ explicit Table(const float* book) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t v01 = pack2<T>(book[4 * i], book[4 * i + 1]);
        const std::uint32_t v23 = pack2<T>(book[4 * i + 2], book[4 * i + 3]);
        low[i] = pick_bytes(v01, v23, 0x6420);
        high[i] = pick_bytes(v01, v23, 0x7531);
      }
    }
  };
  static constexpr int bits = 4;
  static constexpr bool scaled = true;
  static constexpr bool bulky = true;
  static constexpr bool has_excess = false;

  std::uint32_t words[4];  // of two values of u: registers are scarce

  __device__ void load(const std::uint8_t* codes, int lane, int u) {
    if (u % 2 == 0) load_plane<2>(codes + u / 2 * 512, lane, words);
  }
  __device__ void begin(const std::uint8_t*, UnitFormat, int) {}

  // Word j holds exactly the pairs of k-step j: its low half the even columns' codes, its high half
  // the odd ones'.
  __device__ void fragment(int j, const Table& table, std::uint32_t (&a)[4]) const {
    const std::uint32_t w = words[j % 4];
    const std::uint32_t entry = w & 0x77777777U;                             // in half a table
    const std::uint32_t half = masked_or(w >> 1, 0x44444444U, 0x32103210U);  // which half
    const std::uint32_t even_low = lookup(table.low, entry, half);
    const std::uint32_t even_high = lookup(table.high, entry, half);
    const std::uint32_t odd_low = lookup(table.low, entry >> 16, half >> 16);
    const std::uint32_t odd_high = lookup(table.high, entry >> 16, half >> 16);
    const std::uint32_t even01 = pick_bytes(even_low, even_high, 0x5140);
    const std::uint32_t even23 = pick_bytes(even_low, even_high, 0x7362);
    const std::uint32_t odd01 = pick_bytes(odd_low, odd_high, 0x5140);
    const std::uint32_t odd23 = pick_bytes(odd_low, odd_high, 0x7362);
    a[0] = pick_bytes(even01, odd01, 0x5410);
    a[1] = pick_bytes(even01, odd01, 0x7632);
    a[2] = pick_bytes(even23, odd23, 0x5410);
    a[3] = pick_bytes(even23, odd23, 0x7632);
  }

 private:
  static __device__ std::uint32_t lookup(const std::uint32_t (&bytes)[4], std::uint32_t entry,
                                         std::uint32_t half) {
    return pick_bytes(pick_bytes(bytes[0], bytes[1], entry), pick_bytes(bytes[2], bytes[3], entry),
                      half);
  }
};

// Two one-bit terms: a unit's four possible weights are computed in f32, rounded once, and selected
// by the two bits.
template <class T>
struct Binary2 {
  using Table = NoTable;
  static constexpr int bits = 2;
  static constexpr bool scaled = false;
  static constexpr bool bulky = false;
  static constexpr bool has_excess = false;

  std::uint32_t words[4];      // two-bit codes: of pairs 16 i + 2 k, then of 16 i + 2 k + 1
  std::uint32_t values[2][2];  // rows g, g + 8: of codes 0 and 1, of codes 2 and 3

  __device__ void load(const std::uint8_t* codes, int lane, int u) {
    if (u != 0) return;
    std::uint32_t plane[4];
    load_plane<1>(codes, lane, plane);
    load_plane<1>(codes + 256, lane, plane + 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t p0 = plane[i];
      const std::uint32_t p1 = plane[2 + i];
      words[2 * i] = (p0 & 0x55555555U) | ((p1 << 1) & 0xAAAAAAAAU);
      words[2 * i + 1] = ((p0 >> 1) & 0x55555555U) | (p1 & 0xAAAAAAAAU);
    }
  }

  __device__ void begin(const std::uint8_t* unit, UnitFormat format, int g) {
    const int term = 16 * scale_bytes(format.scale);
    const float2 s0 = load_scales(unit, format.scale, g);
    const float2 s1 = load_scales(unit + term, format.scale, g);
    uint2 z0{1, 1};
    uint2 z1{1, 1};
    if (format.zeros) {
      z0 = load_zeros(unit + 2 * term, g);
      z1 = load_zeros(unit + 2 * term + 16, g);
    }
    fill(values[0], s0.x, z0.x, s1.x, z1.x);
    fill(values[1], s0.y, z0.y, s1.y, z1.y);
  }

  __device__ void fragment(int j, const Table&, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = 4 * j + i;
      const std::uint32_t codes = words[p / 16 * 2 + p % 2] >> (p % 16 / 2 * 2);
      // Code c selects bytes 2 c and 2 c + 1.
      const std::uint32_t twice = (codes & 0x30003U) * 0x22U;
      a[i] = pick_bytes(values[i % 2][0], values[i % 2][1], twice | (twice >> 8) | 0x1010U);
    }
  }

 private:
  static __device__ void fill(std::uint32_t (&v)[2], float s0, std::uint32_t z0, float s1,
                              std::uint32_t z1) {
    const float low0 = s0 * -static_cast<float>(z0);
    const float low1 = s0 * (1.0F - static_cast<float>(z0));
    const float high0 = s1 * -static_cast<float>(z1);
    const float high1 = s1 * (1.0F - static_cast<float>(z1));
    v[0] = pack2<T>(low0 + high0, low1 + high0);
    v[1] = pack2<T>(low0 + high1, low1 + high1);
  }
};

}  // namespace engine
