// Weights in the layouts of scheme_layout.h as dense matrices.
#include "cuda/check.h"
#include "cuda/scheme.h"
#include "cuda/unpack.cuh"
#include "cuda/vector_load.cuh"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

struct ExpandArgs {
  const unsigned char* base;
  const unsigned char* table;
  const unsigned char* records;
  const unsigned char* order;
  std::int64_t tile_bytes, rows, cols, units, tiles;
  int scale_kind, row_units, fixed, by_row;
};

constexpr float two_23 = 8388608.0F;
constexpr std::uint32_t float_2_23 = 0x4b000000U;

__device__ inline int scale_bytes(int kind) { return kind == 0 ? 4 : 2; }

// One coefficient of sixteen or eight.
__device__ inline float coefficient(const unsigned char* at, int kind, int i) {
  const float2 pair = load_scale_pair(at, kind, i & ~1);
  return i % 2 == 0 ? pair.x : pair.y;
}

// A warp's decoded record, kCols wide; rows 16 bytes apart from multiples of 128.
template <class T, int kCols>
struct Tile {
  alignas(16) T v[16][kCols + 16 / sizeof(T)];
};

// Eight neighbours.
template <class T>
__device__ void put_eight(T* to, const float (&values)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) to[e] = from_f32<T>(values[e]);
}

// All codes of a lane: body(upper, u, codes of columns 32 u + 8 t + 0..7).
template <int kLow, int kHigh, class Body>
__device__ void each_eight(const unsigned char* record, int lane, Body&& body) {
  LaneCodes<kLow, kHigh> codes;
  codes.load(record, lane);
#pragma unroll
  for (int u = 0; u < 4; ++u) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      std::uint32_t eight[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        eight[e] = codes.code(8 * u + 4 * (e / 4) + 2 * (e % 4 / 2) + upper, e % 2);
      }
      body(upper, u, eight);
    }
  }
}

template <class T, int kCols>
__device__ void put_signs(Tile<T, kCols>& tile, int first, const unsigned char* plane, float2 alpha,
                          float2 mu, int lane) {
  const float low[2] = {__fadd_rn(mu.x, -alpha.x), __fadd_rn(mu.y, -alpha.y)};
  const float high[2] = {__fadd_rn(mu.x, alpha.x), __fadd_rn(mu.y, alpha.y)};
  each_eight<1, 0>(plane, lane, [&](int upper, int u, const std::uint32_t(&codes)[8]) {
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = codes[e] != 0 ? high[upper] : low[upper];
    put_eight(&tile.v[lane / 4 + 8 * upper][first + 32 * u + 8 * (lane % 4)], values);
  });
}

template <class T>
struct ExpandMixed {
  static constexpr int kCols = 128;

  template <int kLow, int kHigh>
  __device__ static void affine(const ExpandArgs& p, const unsigned char* record,
                                Tile<T, kCols>& tile, int lane) {
    const unsigned char* unit = record + 256 * (kLow + kHigh);
    const float2 s = load_scale_pair(unit, p.scale_kind, lane / 4 * 2);
    const uchar2 z =
        *reinterpret_cast<const uchar2*>(unit + 16 * scale_bytes(p.scale_kind) + lane / 4 * 2);
    const float scale[2] = {s.x, s.y};
    const float offset[2] = {two_23 + static_cast<float>(z.x), two_23 + static_cast<float>(z.y)};
    each_eight<kLow, kHigh>(record, lane, [&](int upper, int u, const std::uint32_t(&codes)[8]) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = __fmul_rn(scale[upper], __uint_as_float(float_2_23 | codes[e]) - offset[upper]);
      }
      put_eight(&tile.v[lane / 4 + 8 * upper][32 * u + 8 * (lane % 4)], values);
    });
  }

  __device__ static void decode(const ExpandArgs& p, std::int64_t row_tile, std::int64_t unit,
                                Tile<T, kCols>& tile, int lane) {
    const std::uint32_t entry = reinterpret_cast<const unsigned*>(p.table)[unit];
    const unsigned char* record = p.records + row_tile * p.tile_bytes + (entry & ~15U);
    switch (entry % 16U) {
      case 0:
        return put_signs(tile, 0, record, load_scale_pair(record + 256, p.scale_kind, lane / 4 * 2),
                         load_scale_pair(record + 256, p.scale_kind, 16 + lane / 4 * 2), lane);
      case 1:
        return affine<1, 0>(p, record, tile, lane);
      case 2:
        return affine<2, 0>(p, record, tile, lane);
      case 3:
        return affine<3, 0>(p, record, tile, lane);
      case 4:
        return affine<4, 0>(p, record, tile, lane);
      case 5:
        return affine<4, 1>(p, record, tile, lane);
      case 6:
        return affine<4, 2>(p, record, tile, lane);
      case 7:
        return affine<4, 3>(p, record, tile, lane);
      default:
        return affine<4, 4>(p, record, tile, lane);
    }
  }
};

template <class T>
struct ExpandSalient {
  static constexpr int kCols = 256;

  __device__ static void decode(const ExpandArgs& p, std::int64_t row_tile, std::int64_t unit,
                                Tile<T, kCols>& tile, int lane) {
    const unsigned from = reinterpret_cast<const unsigned*>(p.table)[row_tile * p.units + unit];
    const unsigned char* record = p.records + std::int64_t{from} * 16;
    const unsigned char* row_unit = p.base + row_tile * p.row_units;
    const unsigned char* zeros = row_unit + 16 * scale_bytes(p.scale_kind);
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const unsigned char* levels =
          p.by_row ? zeros + 16 : record + salient_head + h * 32 * scale_bytes(p.scale_kind);
      put_signs(tile, 128 * h, record + 256 * h,
                load_scale_pair(levels, p.scale_kind, lane / 4 * 2),
                load_scale_pair(levels, p.scale_kind, 16 + lane / 4 * 2), lane);
    }
    __syncwarp();
    const int place = lane / 2 % 8 * 2 + lane / 16;
    const float scale = coefficient(row_unit, p.scale_kind, place);
    const float offset = two_23 + static_cast<float>(zeros[place]);
    const auto* entries = reinterpret_cast<const std::uint16_t*>(record + p.fixed);
    const auto* ends = reinterpret_cast<const std::uint16_t*>(record + 512);
    const int word = ends[lane];
    const int last = word / 2 * 2 - word % 2;
    for (int i = lane == 0 ? 0 : ends[lane - 1] / 2 * 2; i < last; ++i) {
      const std::uint32_t entry = entries[i];
      const float steps = __uint_as_float(float_2_23 | entry >> 8) - offset;
      tile.v[lane / 2][128 * (lane % 2) + (entry & 0xffU) / 2] =
          from_f32<T>(__fmul_rn(scale, steps));
    }
  }
};

template <class T>
struct ExpandRegions {
  static constexpr int kCols = 128;

  __device__ static void decode(const ExpandArgs& p, std::int64_t row_tile, std::int64_t unit,
                                Tile<T, kCols>& tile, int lane) {
    const unsigned char* record = p.records + row_tile * p.tile_bytes + unit * p.fixed;
    const int salient = reinterpret_cast<const int*>(p.table)[unit];
    const unsigned char* order = p.order + unit * 128;
    const uint4 v = *reinterpret_cast<const uint4*>(record + 16 * lane);
    const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const int t = lane % 4;
#pragma unroll 1
    for (int upper = 0; upper < 2; ++upper) {
      const int row = lane / 4 + 8 * upper;
      float c[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = load_scale_pair(record + 512, p.scale_kind, 8 * row + 2 * i);
        c[2 * i] = pair.x;
        c[2 * i + 1] = pair.y;
      }
      const auto level = [&](int k, bool up) {
        return __fadd_rn(c[2 * k], up ? c[2 * k + 1] : -c[2 * k + 1]);
      };
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int q = 2 * (e % 4 / 2) + upper;
          const std::uint32_t code = words[u] >> (16 * (e / 4) + 8 * (e % 2) + 2 * q) & 3U;
          const bool up = (code & 1U) != 0;
          const bool other = code > 1;
          const int rank = 32 * u + 16 * (e / 4) + 4 * t + e % 4;
          const float value = rank < salient ? __fadd_rn(level(2, up), level(3, other))
                                             : (other ? level(1, up) : level(0, up));
          tile.v[row][order[32 * u + 8 * t + e]] = from_f32<T>(value);
        }
      }
    }
  }
};

// A warp for each record, decoded in shared memory and written out by rows. wide: rows of out start
// at multiples of 16 bytes.
template <class T, class Kind>
__global__ void __launch_bounds__(128)
    scheme_expand_kernel(ExpandArgs p, T* out, std::int64_t stride, bool wide) {
  constexpr int cols = Kind::kCols;
  constexpr int warps = 512 / cols;  // 4, or 2 of twice the width
  constexpr int items = 16 / static_cast<int>(sizeof(T));
  constexpr int row_chunks = cols / items;
  using Chunk = Pack<T, items>;
  __shared__ Tile<T, cols> tiles[warps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t record = static_cast<std::int64_t>(blockIdx.x) * warps + warp;
  if (record >= p.tiles * p.units) return;
  const std::int64_t row_tile = record / p.units;
  const std::int64_t unit = record % p.units;
  Tile<T, cols>& tile = tiles[warp];
  Kind::decode(p, row_tile, unit, tile, lane);
  __syncwarp();
  for (int i = lane; i < 16 * row_chunks; i += 32) {
    const std::int64_t row = row_tile * 16 + i / row_chunks;
    const std::int64_t col = unit * cols + i % row_chunks * items;
    if (row >= p.rows) break;
    const Chunk v =
        *reinterpret_cast<const Chunk*>(&tile.v[i / row_chunks][i % row_chunks * items]);
    T* to = out + row * stride + col;
    if (wide && col + items <= p.cols) {
      *reinterpret_cast<Chunk*>(to) = v;
    } else {
#pragma unroll
      for (int e = 0; e < items; ++e) {
        if (col + e < p.cols) to[e] = v.v[e];
      }
    }
  }
}

template <class T, class Kind>
void expand_as(const ExpandArgs& p, View out, cudaStream_t stream) {
  constexpr int warps = 512 / Kind::kCols;
  const std::int64_t blocks = ceil_div(p.tiles * p.units, warps);
  REQUIRE(blocks <= INT32_MAX, "expand: " + std::to_string(p.tiles * p.units) + " records");
  launch("scheme_expand", scheme_expand_kernel<T, Kind>, dim3(static_cast<unsigned>(blocks)),
         dim3(32 * warps), 0, stream, p, static_cast<T*>(out.data), out.stride,
         aligned_rows(out, 16, 1));
}

}  // namespace

void scheme_expand(const PackedWeight& w, View out, cudaStream_t stream) {
  const PackedShape& s = w.shape;
  if (s.kind == PackedKind::midrise || s.kind == PackedKind::lattice) {
    return lattice_expand(w, out, stream);
  }
  const SchemePlaces places = scheme_places(s);
  const auto* base = static_cast<const unsigned char*>(w.records.data);
  const ExpandArgs p{base,
                     base + places.table,
                     base + places.records,
                     base + places.order,
                     places.tile_bytes,
                     s.rows,
                     s.cols,
                     places.units,
                     s.row_tiles(),
                     s.scale_dtype == DType::f32   ? 0
                     : s.scale_dtype == DType::f16 ? 1
                                                   : 2,
                     static_cast<int>(places.row_units),
                     static_cast<int>(places.fixed),
                     s.group == 0 ? 1 : 0};
  dispatch_float(out.dtype, "expand", [&](auto type) {
    using T = decltype(type);
    switch (s.kind) {
      case PackedKind::mixed:
        return expand_as<T, ExpandMixed<T>>(p, out, stream);
      case PackedKind::salient:
        return expand_as<T, ExpandSalient<T>>(p, out, stream);
      default:
        return expand_as<T, ExpandRegions<T>>(p, out, stream);
    }
  });
}

}  // namespace engine
