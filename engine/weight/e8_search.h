// Exact nearest points of the two books of e8.h, the same bits on host and device.
//
// e8p without its shift is a set of 256 patterns of absolute values, each with all signs that make
// the sum of its coordinates even. For y, take the signs of y; where their number has the wrong
// parity for a pattern, one coordinate i has to be negated against y, which costs 4 |y_i| p_i: the
// cheapest. All but 29 patterns come with all their permutations, in 7 classes: of a class the best
// puts the largest values at the largest |y_i| and negates at the smallest.
//
// Scores are (2 <y, p> - |p|^2) / 2 with what all patterns share left out: with p_i = 1/2 + m_i,
//   sum of m_i |y_i| - |p|^2 / 2 - [wrong parity] min over i of 2 p_i |y_i|.
// They are sums of a few terms in a fixed order, and of equal scores the first wins, in the order:
// 0 to 4 coordinates of 3/2; one of 5/2; one of 5/2 and one of 3/2; the 29.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "engine/core/rng.h"

namespace engine {

// The patterns of five 3/2 and three 1/2 that belong to the book, bit i set: coordinate i is 3/2.
inline constexpr int e8p_extra_count = 29;
inline constexpr std::uint8_t e8p_extra[e8p_extra_count] = {
    0xF1, 0xF2, 0xF4, 0xF8, 0x37, 0x57, 0x67, 0x97, 0xA7, 0xC7, 0x3B, 0x5B, 0x6B, 0x9B, 0xAB,
    0xCB, 0x3D, 0x5D, 0x6D, 0x9D, 0xAD, 0xCE, 0x3E, 0x5E, 0x6E, 0x9E, 0xAE, 0xEC, 0x73};

// Where coordinate i is in a word and in the signs: 0, 4, 1, 5, 2, 6, 3, 7.
ENGINE_HOST_DEVICE constexpr int e8p_place(int i) { return i % 2 == 0 ? i / 2 : 4 + i / 2; }

struct E8Tables {
  std::uint32_t words[256] = {};      // e8p_words()
  std::uint8_t odd[32] = {};          // bit a % 8 of byte a / 8: the sum of pattern a is odd
  std::uint8_t of_mask[256] = {};     // the pattern with 3/2 at the bits of the index, else 1/2
  std::uint8_t of_five[64] = {};      // [8 i + j]: 5/2 at i, 3/2 at j unless i = j, else 1/2
  std::uint8_t of_pair[64 * 4] = {};  // e8_byte: [(8 i + j) 4 + 2 [e_i < 0] + [e_j < 0]], |e| = 1
};

constexpr E8Tables make_e8_tables() {
  E8Tables t;
  int count = 0;
  const auto add = [&](const int(&m)[8]) {  // a pattern 1/2 + m
    std::uint32_t word = 0;
    int sum = 0, mask = 0, five = -1, three = -1;
    for (int i = 0; i < 8; ++i) sum += m[i];
    for (int i = 0; i < 8; ++i) {
      const int twice = 2 * m[i] + 1;
      const int nibble = (i == 7 && sum % 2 != 0 ? -twice : twice) + 8;
      word |= static_cast<std::uint32_t>(nibble) << (4 * e8p_place(i));
      if (m[i] == 1) {
        mask |= 1 << i;
        three = i;
      }
      if (m[i] == 2) five = i;
    }
    const auto index = static_cast<std::uint8_t>(count);
    t.words[count] = word;
    if (sum % 2 != 0) {
      t.odd[count / 8] = static_cast<std::uint8_t>(t.odd[count / 8] | (1 << (count % 8)));
    }
    if (five < 0) {
      t.of_mask[mask] = index;
    } else {
      t.of_five[8 * five + (three < 0 ? five : three)] = index;
    }
    ++count;
  };
  // Squared norm at most 10: sum of (1/2 + m)^2 = 2 + sum of m (m + 1). In lexicographic order:
  // that of the digits of n, coordinate 0 the highest.
  for (int n = 0; n < 6561; ++n) {
    int m[8] = {};
    int norm = 2;
    for (int i = 7, rest = n; i >= 0; --i, rest /= 3) {
      m[i] = rest % 3;
      norm += m[i] * (m[i] + 1);
    }
    if (norm <= 10) add(m);
  }
  for (const std::uint8_t mask : e8p_extra) {
    int m[8] = {};
    for (int i = 0; i < 8; ++i) m[i] = (mask >> i) & 1;
    add(m);
  }
  // e8_byte: the vectors of -1, 0, 1 with an even sum and a squared norm of at most 2.
  int at = 0;
  for (int n = 0; n < 6561; ++n) {
    int first = -1, second = -1, nonzero = 0, negative[8] = {};
    for (int i = 7, rest = n; i >= 0; --i, rest /= 3) {
      if (rest % 3 == 1) continue;
      negative[i] = rest % 3 == 0 ? 1 : 0;
      (nonzero == 0 ? second : first) = i;
      ++nonzero;
    }
    if (nonzero != 0 && nonzero != 2) continue;
    if (nonzero == 2) {
      const int a = negative[first], b = negative[second];
      t.of_pair[(8 * first + second) * 4 + 2 * a + b] = static_cast<std::uint8_t>(at);
      t.of_pair[(8 * second + first) * 4 + 2 * b + a] = static_cast<std::uint8_t>(at);
    } else {
      t.of_pair[0] = static_cast<std::uint8_t>(at);  // the origin
    }
    ++at;
  }
  return t;
}

// Sums that no compiler joins with the product before them.
ENGINE_HOST_DEVICE inline float e8_add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
ENGINE_HOST_DEVICE inline float e8_multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// |y|, sorted, and the place of each coordinate in that order.
struct E8Sorted {
  float a[8];       // |y_i|
  float sorted[8];  // descending
  int rank[8];      // of equal ones the first coordinate is before
  int negative;     // bit i: y_i < 0
};

ENGINE_HOST_DEVICE inline E8Sorted e8_sort(const float (&y)[8]) {
  E8Sorted s;
  s.negative = 0;
  for (int i = 0; i < 8; ++i) {
    s.a[i] = fabsf(y[i]);
    s.sorted[i] = s.a[i];
    s.negative |= y[i] < 0 ? 1 << i : 0;
  }
  const auto order = [&](int i, int j) {
    const float high = fmaxf(s.sorted[i], s.sorted[j]), low = fminf(s.sorted[i], s.sorted[j]);
    s.sorted[i] = high;
    s.sorted[j] = low;
  };
  // 19 comparators in 6 layers.
  order(0, 2), order(1, 3), order(4, 6), order(5, 7);
  order(0, 4), order(1, 5), order(2, 6), order(3, 7);
  order(0, 1), order(2, 3), order(4, 5), order(6, 7);
  order(2, 4), order(3, 5);
  order(1, 4), order(3, 6);
  order(1, 2), order(3, 4), order(5, 6);
  for (int i = 0; i < 8; ++i) s.rank[i] = 0;
  for (int i = 0; i < 8; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      if (s.a[j] > s.a[i]) {
        ++s.rank[i];
      } else {
        ++s.rank[j];
      }
    }
  }
  return s;
}

ENGINE_HOST_DEVICE inline bool e8_odd_bits(int x) {
  x ^= x >> 4;
  x ^= x >> 2;
  x ^= x >> 1;
  return (x & 1) != 0;
}

struct E8pChoice {
  int mask;      // coordinates of 3/2
  int five;      // coordinate of 5/2, or -1
  int negative;  // bit i: coordinate i of the point is negative
  bool odd;      // the sum of the absolute values is odd
  float point[8];
};

// One of the 29: `kind` is then 7 and its mask above that.
template <int N>
ENGINE_HOST_DEVICE inline void e8p_try_extra(const E8Sorted& s, float total, bool odd_signs,
                                             float& best, int& kind) {
  constexpr int mask = e8p_extra[N];
  constexpr int others = ~mask & 0xFF;
  constexpr int i = (others & 1) != 0 ? 0 : (others & 2) != 0 ? 1 : (others & 4) != 0 ? 2 : 3;
  constexpr int after_i = others & ~((2 << i) - 1);
  constexpr int k = (others & 128) != 0  ? 7
                    : (others & 64) != 0 ? 6
                    : (others & 32) != 0 ? 5
                    : (others & 16) != 0 ? 4
                    : (others & 8) != 0  ? 3
                                         : 2;
  constexpr int middle = after_i & ~(1 << k);
  constexpr int j = middle == 2    ? 1
                    : middle == 4  ? 2
                    : middle == 8  ? 3
                    : middle == 16 ? 4
                    : middle == 32 ? 5
                                   : 6;
  static_assert(((1 << i) | (1 << j) | (1 << k)) == others);
  float score = total - (s.a[i] + s.a[j] + s.a[k]);
  if (!odd_signs) {
    score -= fminf(fminf(s.a[i], fminf(s.a[j], s.a[k])), e8_multiply(3.0F, s.sorted[7]));
  }
  if (score > best) {
    best = score;
    kind = 7 | mask << 3;
  }
}

template <int... N>
ENGINE_HOST_DEVICE inline int e8p_best_kind(const E8Sorted& s, bool odd_signs,
                                            std::integer_sequence<int, N...> /*extra*/) {
  const float last = s.sorted[7];
  const float even = odd_signs ? last : 0.0F;  // what a pattern of an even sum loses
  const float odd = odd_signs ? 0.0F : last;
  float best = -1.0F - even;
  int kind = 0;
  const auto consider = [&](int k, float score) {
    if (score > best) {
      best = score;
      kind = k;
    }
  };
  const float s1 = s.sorted[0], s2 = s1 + s.sorted[1], s3 = s2 + s.sorted[2], s4 = s3 + s.sorted[3];
  consider(1, s1 - 2.0F - odd);
  consider(2, s2 - 3.0F - even);
  consider(3, s3 - 4.0F - odd);
  consider(4, s4 - 5.0F - even);
  consider(5, s1 + s1 - 4.0F - even);
  consider(6, s1 + s2 - 5.0F - odd);
  const float total = s4 + s.sorted[4] + s.sorted[5] + s.sorted[6] + last - 6.0F;
  (e8p_try_extra<N>(s, total, odd_signs, best, kind), ...);
  return kind;
}

// The nearest point of the book before its shift.
ENGINE_HOST_DEVICE inline E8pChoice e8p_nearest_unshifted(const float (&y)[8]) {
  const E8Sorted s = e8_sort(y);
  const bool odd_signs = e8_odd_bits(s.negative);
  const int kind = e8p_best_kind(s, odd_signs, std::make_integer_sequence<int, e8p_extra_count>{});
  const bool extra = (kind & 7) == 7;
  E8pChoice c;
  c.mask = extra ? kind >> 3 : 0;
  c.five = -1;
  c.odd = kind == 1 || kind == 3 || kind == 6 || extra;
  const int threes = kind <= 4 ? kind : 0;
  int last_rank = -1, flip = 0;  // of the coordinates of 1/2, the one of the smallest |y_i|
  float flip_value = 0;
  int smallest = 0;
  for (int i = 0; i < 8; ++i) {
    const int rank = s.rank[i];
    if (rank < threes || (kind == 6 && rank == 1)) c.mask |= 1 << i;
    if ((kind == 5 || kind == 6) && rank == 0) c.five = i;
    if (rank == 7) smallest = i;
    if ((c.mask >> i & 1) == 0 && rank > last_rank) {
      last_rank = rank;
      flip = i;
      flip_value = s.a[i];
    }
  }
  if (extra && flip_value > e8_multiply(3.0F, s.sorted[7])) flip = smallest;
  c.negative = s.negative;
  if (odd_signs != c.odd) c.negative ^= 1 << flip;
  for (int i = 0; i < 8; ++i) {
    const float v = i == c.five ? 2.5F : (c.mask >> i & 1) != 0 ? 1.5F : 0.5F;
    c.point[i] = (c.negative >> i & 1) != 0 ? -v : v;
  }
  return c;
}

// The nearest of the 65536 points; of the two shifts, +1/4 if they are as near.
ENGINE_HOST_DEVICE inline std::uint16_t e8p_search(const float (&x)[8], const E8Tables& tables,
                                                   float (&point)[8]) {
  E8pChoice best{};
  float best_error = 0;
  bool lowered = false;
  for (int f = 0; f < 2; ++f) {  // f = 1: 1/4 is taken from the point
    const float shift = f != 0 ? 0.25F : -0.25F;
    float y[8];
    for (int i = 0; i < 8; ++i) y[i] = e8_add(x[i], shift);
    const E8pChoice c = e8p_nearest_unshifted(y);
    float error = 0;
    for (int i = 0; i < 8; ++i) {
      const float e = e8_add(y[i], -c.point[i]);
      error = e8_add(error, e8_multiply(e, e));
    }
    if (f == 0 || error < best_error) {
      best = c;
      best_error = error;
      lowered = f != 0;
    }
  }
  int signs = 0;
  for (int i = 0; i < 8; ++i) {
    signs |= (best.negative >> i & 1) << e8p_place(i);
    point[i] = best.point[i] + (lowered ? -0.25F : 0.25F);
  }
  signs ^= (best.odd ? 128 : 0) ^ (lowered ? 1 : 0);
  int pattern = tables.of_mask[best.mask & 255];
  if (best.five >= 0) {
    int other = best.five;
    for (int i = 0; i < 8; ++i) other = (best.mask >> i & 1) != 0 ? i : other;
    pattern = tables.of_five[8 * best.five + other];
  }
  return static_cast<std::uint16_t>(pattern << 8 | signs);
}

// The nearest of the 256 points of e8_byte: of equal ones the first of: the origin, two
// coordinates of 1, all of 1/2, one of 2.
ENGINE_HOST_DEVICE inline std::uint8_t e8_byte_search(const float (&x)[8], const E8Tables& tables,
                                                      float (&point)[8]) {
  const E8Sorted s = e8_sort(x);
  int first = 0, second = 0, last = 0;
  float total = s.sorted[0];
  for (int i = 0; i < 8; ++i) {
    if (i > 0) total = e8_add(total, s.sorted[i]);
    if (s.rank[i] == 0) first = i;
    if (s.rank[i] == 1) second = i;
    if (s.rank[i] == 7) last = i;
  }
  const bool odd_signs = e8_odd_bits(s.negative);
  // (2 <x, p> - |p|^2) / 2; the origin has 0. Halves have an even number of signs. -2 e_7 is not
  // in the book.
  float best = 0;
  int kind = 0;
  const float pair = s.sorted[0] + s.sorted[1] - 1.0F;
  if (pair > best) {
    best = pair;
    kind = 1;
  }
  const float half = total * 0.5F - 1.0F - (odd_signs ? s.sorted[7] : 0.0F);
  if (half > best) {
    best = half;
    kind = 2;
  }
  const bool missing = first == 7 && (s.negative >> 7 & 1) != 0;
  if (!missing && s.sorted[0] + s.sorted[0] - 2.0F > best) kind = 3;

  int negative = s.negative;
  if (kind == 2 && odd_signs) negative ^= 1 << last;
  int positive_digits = 0;  // coordinate 0 the highest
  for (int i = 0; i < 8; ++i) {
    positive_digits |= ((negative >> i & 1) ^ 1) << (7 - i);
    const float v = kind == 2                                  ? 0.5F
                    : kind == 1 && (i == first || i == second) ? 1.0F
                    : kind == 3 && i == first                  ? 2.0F
                                                               : 0.0F;
    point[i] = (negative >> i & 1) != 0 && v != 0 ? -v : v;
  }
  const int sign_first = negative >> first & 1, sign_second = negative >> second & 1;
  if (kind == 2) return static_cast<std::uint8_t>(113 + (positive_digits >> 1));
  if (kind == 3) return static_cast<std::uint8_t>(241 + 8 * sign_first + first);
  return tables.of_pair[kind == 0 ? 0 : (8 * first + second) * 4 + 2 * sign_first + sign_second];
}

// How codes of `bits` 2, 3 or 4 per weight are made of the books: e8p alone, or e8p and then a code
// of what it left, magnified by this: e8_byte (3) or e8p (4).
ENGINE_HOST_DEVICE constexpr float e8_residual_scale(int bits) {
  return bits == 3 ? 2.04F : bits == 4 ? 3.45F : 1.0F;
}

struct E8Codes {
  std::uint16_t first, second;
};

template <int kBits>
ENGINE_HOST_DEVICE inline E8Codes e8_quantize(const float (&x)[8], const E8Tables& tables,
                                              float (&value)[8]) {
  E8Codes codes{e8p_search(x, tables, value), 0};
  if constexpr (kBits > 2) {
    constexpr float scale = e8_residual_scale(kBits);
    float rest[8], point[8];
    for (int i = 0; i < 8; ++i) rest[i] = e8_multiply(e8_add(x[i], -value[i]), scale);
    if constexpr (kBits == 3) {
      codes.second = e8_byte_search(rest, tables, point);
    } else {
      codes.second = e8p_search(rest, tables, point);
    }
    for (int i = 0; i < 8; ++i) value[i] = e8_add(value[i], e8_multiply(point[i], 1.0F / scale));
  }
  return codes;
}

}  // namespace engine
