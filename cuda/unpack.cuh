// A lane's share of a record of the kernel layout, on the device (the host's reference is
// engine/weight/packed_layout.h; docs/kernels.md draws it). Lane 4 g + t has the codes of rows g
// and g + 8 in columns 32 u + 8 t + e, u = 0..3 and e = 0..7.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/types.cuh"
#include "engine/weight/packed_weight.h"

namespace engine {

// What kernels need of a PackedWeight.
struct PackedDevice {
  std::uint8_t* records;
  std::uint8_t* row_units;          // null unless the group is 0
  const float* book;                // null unless a codebook
  const std::int32_t* permutation;  // or null
  std::int64_t rows, cols, col_blocks, record_count, record_bytes;
  std::int64_t group;
  int code_bytes, unit_bytes;
  int record_units;  // units a record has of its own; 0 if they lie in row_units
  int terms;
  DType scale_dtype;
  bool zeros;
  int implicit_zero;
};

inline PackedDevice packed_device(const PackedWeight& w, int implicit_zero) {
  const PackedShape& s = w.shape;
  return {static_cast<std::uint8_t*>(w.records.data),
          static_cast<std::uint8_t*>(w.row_units.data),
          static_cast<const float*>(w.book.data),
          static_cast<const std::int32_t*>(w.permutation.data),
          s.rows,
          s.cols,
          s.col_blocks(),
          s.row_tiles() * s.col_blocks(),
          s.record_bytes(),
          s.group,
          static_cast<int>(s.code_bytes()),
          static_cast<int>(s.unit_bytes()),
          static_cast<int>(s.groups_per_record()),
          s.terms(),
          s.scale_dtype,
          s.zeros,
          implicit_zero};
}

// Row and column within the record of half `half` of pair `pair` of a lane.
__device__ constexpr int pair_row(int lane, int pair) { return lane / 4 + (pair % 2) * 8; }
__device__ constexpr int pair_col(int lane, int pair, int half) {
  return 32 * (pair / 8) + 8 * (lane % 4) + 4 * (pair / 4 % 2) + 2 * (pair / 2 % 2) + half;
}

// Byte within a plane of `bits` bits of a lane's word.
__device__ constexpr int lane_word_at(int bits, int lane, int word) {
  const int chunk = word / 4;
  return 512 * chunk + 4 * ((chunk < bits / 2 ? 4 : 2) * lane + word % 4);
}

// One plane's words of a lane in registers. Indices must be constants once loops are unrolled.
template <int kBits>
struct LaneWords {
  static constexpr int words = 2 * kBits;
  std::uint32_t w[words];

  __device__ void load(const std::uint8_t* plane, int lane) {
#pragma unroll
    for (int c = 0; c < words / 4; ++c) {
      const uint4 v = *reinterpret_cast<const uint4*>(plane + 512 * c + 16 * lane);
      w[4 * c] = v.x;
      w[4 * c + 1] = v.y;
      w[4 * c + 2] = v.z;
      w[4 * c + 3] = v.w;
    }
    if constexpr (words % 4 != 0) {
      const uint2 v = *reinterpret_cast<const uint2*>(plane + 512 * (words / 4) + 8 * lane);
      w[words - 2] = v.x;
      w[words - 1] = v.y;
    }
  }

  __device__ std::uint32_t code(int pair, int half) const {
    constexpr std::uint32_t mask = (1U << kBits) - 1;
    if constexpr (kBits == 3) {  // bytes of two codes each, and two more in three words' spare bits
      const int first = 3 * (pair / 16);
      const int byte = 16 * half + 8 * (pair / 2 % 2);
      const int r = pair / 8 % 2 * 4 + pair / 4 % 2 * 2 + pair % 2;
      if (r < 6) return w[first + r / 2] >> (byte + 3 * (r % 2)) & mask;
      const std::uint32_t middle = w[first + 1] >> (byte + 6);
      if (r == 6) return (w[first] >> (byte + 6) & 3U) | (middle & 1U) << 2;
      return (middle >> 1 & 1U) | (w[first + 2] >> (byte + 6) & 3U) << 1;
    } else {
      constexpr int pairs_per_word = 16 / kBits;
      return w[pair / pairs_per_word] >> (16 * half + kBits * (pair % pairs_per_word)) & mask;
    }
  }
};

// Codes of kLow + kHigh bits: the low plane, then the high one.
template <int kLow, int kHigh>
struct LaneCodes {
  LaneWords<kLow> low;
  LaneWords<kHigh> high;
  __device__ void load(const std::uint8_t* record, int lane) {
    low.load(record, lane);
    high.load(record + 256 * kLow, lane);
  }
  __device__ std::uint32_t code(int pair, int half) const {
    return low.code(pair, half) | high.code(pair, half) << kLow;
  }
};
template <int kLow>
struct LaneCodes<kLow, 0> {
  LaneWords<kLow> low;
  __device__ void load(const std::uint8_t* record, int lane) { low.load(record, lane); }
  __device__ std::uint32_t code(int pair, int half) const { return low.code(pair, half); }
};

// Calls body(integral_constant low, integral_constant high) with the widths of a code's planes.
template <class Body>
void dispatch_planes(const PackedShape& shape, Body&& body) {
  const auto call = [&]<int kLow, int kHigh>() {
    body(std::integral_constant<int, kLow>{}, std::integral_constant<int, kHigh>{});
  };
  if (shape.kind == PackedKind::binary2) return call.template operator()<1, 1>();
  switch (shape.bits) {
    case 1:
      return call.template operator()<1, 0>();
    case 2:
      return call.template operator()<2, 0>();
    case 3:
      return call.template operator()<3, 0>();
    case 4:
      return call.template operator()<4, 0>();
    case 5:
      return call.template operator()<4, 1>();
    case 6:
      return call.template operator()<4, 2>();
    case 7:
      return call.template operator()<4, 3>();
    case 8:
      return call.template operator()<4, 4>();
    default:
      REQUIRE(false, "packed codes of " + std::to_string(shape.bits) + " bits");
  }
}

// Scales and zeros of rows g (x) and g + 8 (y) of a unit: neighbours in its order of rows.
__device__ inline float2 unit_scales(const PackedDevice& p, const std::uint8_t* unit, int term,
                                     int g) {
  const int at = term * static_cast<int>(record_rows) + 2 * g;
  if (p.scale_dtype == DType::f16) {
    return __half22float2(*reinterpret_cast<const __half2*>(unit + 2 * at));
  }
  if (p.scale_dtype == DType::bf16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(unit + 2 * at));
  }
  return *reinterpret_cast<const float2*>(unit + 4 * at);
}

__device__ inline int2 unit_zeros(const PackedDevice& p, const std::uint8_t* unit, int term,
                                  int g) {
  if (!p.zeros) return {p.implicit_zero, p.implicit_zero};
  const int scale_bytes =
      p.terms * static_cast<int>(record_rows) * (p.scale_dtype == DType::f32 ? 4 : 2);
  const uchar2 z = *reinterpret_cast<const uchar2*>(unit + scale_bytes +
                                                    term * static_cast<int>(record_rows) + 2 * g);
  return {z.x, z.y};
}

}  // namespace engine
