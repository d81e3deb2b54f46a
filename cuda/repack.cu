// CudaOps: planes of a file into the kernel layout and back. One warp per record; this runs once
// per linear, at load.
#include "cuda/chain.h"
#include "cuda/cuda_ops.h"
#include "cuda/unpack.cuh"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / 32;

// The planes, with strides in elements.
struct Planes {
  std::uint8_t* codes;
  float* scales;
  std::int32_t* zeros;  // or null
  std::int64_t code_stride, scale_stride, zero_stride;
};

Planes planes_of(View codes, View scales, View zeros) {
  return {codes.as<std::uint8_t>(),
          scales.as<float>(),
          zeros.empty() ? nullptr : zeros.as<std::int32_t>(),
          codes.stride,
          scales.stride,
          zeros.stride};
}

// A plane of a code: `bits` bits from `first_bit` on, `offset` bytes into the record.
struct Part {
  int first_bit, bits, offset;
};
struct Parts {
  Part part[2];
  int count;
};

Parts parts_of(const PackedShape& shape) {
  const CodeParts from = code_parts(shape);
  Parts to{{{0, 1, 0}, {0, 1, 0}}, from.count};
  for (int i = 0; i < from.count; ++i) {
    const CodePart& p = from.part[static_cast<std::size_t>(i)];
    to.part[i] = {p.first_bit, p.bits, static_cast<int>(p.offset)};
  }
  return to;
}

// Where one of a unit's coefficients lies: entry `i` counts terms, then the layout's order of rows.
struct Entry {
  int row;  // of the tile
  int scale_byte, zero_byte;
  int term;
};
__device__ Entry unit_entry(const PackedDevice& p, int i) {
  constexpr int rows = static_cast<int>(record_rows);
  const int size = p.scale_dtype == DType::f32 ? 4 : 2;
  return {i % rows / 2 + i % 2 * 8, i * size, p.terms * rows * size + i, i / rows};
}

__device__ void store_scale(DType dtype, std::uint8_t* at, float v) {
  if (dtype == DType::f16) {
    *reinterpret_cast<__half*>(at) = __float2half_rn(v);
  } else if (dtype == DType::bf16) {
    *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16_rn(v);
  } else {
    *reinterpret_cast<float*>(at) = v;
  }
}

__device__ float load_scale(DType dtype, const std::uint8_t* at) {
  if (dtype == DType::f16) return __half2float(*reinterpret_cast<const __half*>(at));
  if (dtype == DType::bf16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
  return *reinterpret_cast<const float*>(at);
}

// A unit of one row tile; rows and units beyond the matrix become 0.
__device__ void pack_unit(const PackedDevice& p, const Planes& planes, std::int64_t groups,
                          std::int64_t tile, std::int64_t unit, std::uint8_t* to, int lane) {
  for (int i = lane; i < p.terms * static_cast<int>(record_rows); i += 32) {
    const Entry e = unit_entry(p, i);
    const std::int64_t row = tile * record_rows + e.row;
    const bool inside = row < p.rows && unit < groups;
    const std::int64_t plane_row = e.term * p.rows + row;
    store_scale(p.scale_dtype, to + e.scale_byte,
                inside ? planes.scales[plane_row * planes.scale_stride + unit] : 0.0F);
    if (p.zeros) {
      to[e.zero_byte] =
          inside ? static_cast<std::uint8_t>(planes.zeros[plane_row * planes.zero_stride + unit])
                 : std::uint8_t{0};
    }
  }
}

__device__ void unpack_unit(const PackedDevice& p, const Planes& planes, std::int64_t groups,
                            std::int64_t tile, std::int64_t unit, const std::uint8_t* from,
                            int lane) {
  for (int i = lane; i < p.terms * static_cast<int>(record_rows); i += 32) {
    const Entry e = unit_entry(p, i);
    const std::int64_t row = tile * record_rows + e.row;
    if (row >= p.rows || unit >= groups) continue;
    const std::int64_t plane_row = e.term * p.rows + row;
    planes.scales[plane_row * planes.scale_stride + unit] =
        load_scale(p.scale_dtype, from + e.scale_byte);
    if (planes.zeros != nullptr) {
      planes.zeros[plane_row * planes.zero_stride + unit] =
          p.zeros ? static_cast<int>(from[e.zero_byte]) : p.implicit_zero;
    }
  }
}

// Calls body(unit, bytes of the unit in the layout) for the units that this record answers for:
// its own, or, for its row tile, the one of whole rows.
template <class Body>
__device__ void for_units(const PackedDevice& p, std::int64_t record, Body&& body) {
  const std::int64_t tile = record / p.col_blocks;
  const std::int64_t block = record % p.col_blocks;
  if (p.group == 0) {
    if (block == 0) body(std::int64_t{0}, p.row_units + tile * p.unit_bytes);
    return;
  }
  for (int i = 0; i < p.record_units; ++i) {
    body(block * record_cols / p.group + i,
         p.records + record * p.record_bytes + p.code_bytes + i * p.unit_bytes);
  }
}

// Word w of a lane's share of a plane; source(pair, half) are its codes.
template <class Source>
__device__ std::uint32_t plane_word(const Source& source, int w, const Part& part) {
  const int per_word = 16 / part.bits;
  const std::uint32_t mask = (1U << part.bits) - 1;
  std::uint32_t word = 0;
  for (int half = 0; half < 2; ++half) {
    for (int q = 0; q < per_word; ++q) {
      const std::uint32_t code = source(w * per_word + q, half) >> part.first_bit & mask;
      word |= code << (16 * half + part.bits * q);
    }
  }
  return word;
}

// Of a plane of three bits: two codes in each byte, and two bits of the codes that three words
// share.
template <class Source>
__device__ std::uint32_t three_bit_word(const Source& source, int w, int first_bit) {
  std::uint32_t word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    // The code r (0..7) of those in this byte of the three words.
    const auto code = [&](int r) {
      const int pair = 16 * (w / 3) + 8 * (r / 4) + 4 * (r / 2 % 2) + 2 * (byte % 2) + r % 2;
      return source(pair, byte / 2) >> first_bit & 7U;
    };
    const int at = w % 3;
    word |= (code(2 * at) | code(2 * at + 1) << 3) << (8 * byte);
    for (int spare = 2 * at; spare < 2 * at + 2; ++spare) {
      word |= (code(6 + spare / 3) >> (spare % 3) & 1U) << (8 * byte + 6 + spare % 2);
    }
  }
  return word;
}

__global__ void __launch_bounds__(threads)
    repack_kernel(PackedDevice p, Planes planes, Parts parts, std::int64_t groups) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  for (std::int64_t record = first; record < p.record_count;
       record += static_cast<std::int64_t>(gridDim.x) * warps) {
    const std::int64_t tile = record / p.col_blocks;
    const std::int64_t block = record % p.col_blocks;
    const auto source = [&](int pair, int half) -> std::uint32_t {
      const std::int64_t row = tile * record_rows + pair_row(lane, pair);
      const std::int64_t col = block * record_cols + pair_col(lane, pair, half);
      if (row >= p.rows || col >= p.cols) return 0;
      return planes.codes[row * planes.code_stride + col];
    };
    std::uint8_t* to = p.records + record * p.record_bytes;
    for (int i = 0; i < parts.count; ++i) {
      const Part part = parts.part[i];
      for (int w = 0; w < 2 * part.bits; ++w) {
        const std::uint32_t word = part.bits == 3 ? three_bit_word(source, w, part.first_bit)
                                                  : plane_word(source, w, part);
        *reinterpret_cast<std::uint32_t*>(to + part.offset + lane_word_at(part.bits, lane, w)) =
            word;
      }
    }
    for_units(p, record, [&](std::int64_t unit, std::uint8_t* at) {
      pack_unit(p, planes, groups, tile, unit, at, lane);
    });
  }
}

template <int kLow, int kHigh>
__global__ void __launch_bounds__(threads)
    unpack_kernel(PackedDevice p, Planes planes, std::int64_t groups) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  for (std::int64_t record = first; record < p.record_count;
       record += static_cast<std::int64_t>(gridDim.x) * warps) {
    const std::int64_t tile = record / p.col_blocks;
    const std::int64_t block = record % p.col_blocks;
    LaneCodes<kLow, kHigh> codes;
    codes.load(p.records + record * p.record_bytes, lane);
#pragma unroll
    for (int pair = 0; pair < 32; ++pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t row = tile * record_rows + pair_row(lane, pair);
        const std::int64_t col = block * record_cols + pair_col(lane, pair, half);
        if (row < p.rows && col < p.cols) {
          planes.codes[row * planes.code_stride + col] =
              static_cast<std::uint8_t>(codes.code(pair, half));
        }
      }
    }
    // A group of several blocks is written by each of them: the same values.
    for_units(p, record, [&](std::int64_t unit, const std::uint8_t* at) {
      unpack_unit(p, planes, groups, tile, unit, at, lane);
    });
  }
}

dim3 record_grid(const PackedDevice& p) {
  return static_cast<unsigned>(std::min<std::int64_t>(ceil_div(p.record_count, warps), 1 << 20));
}

}  // namespace

void CudaOps::repack(View codes, View scales, View zeros, const PackedWeight& out) {
  check_packed_weight("repack", out, DeviceKind::cuda);
  check_packed_planes("repack", out.shape, codes, scales, zeros, !out.shape.zeros,
                      DeviceKind::cuda);
  const PackedDevice p = packed_device(out, implicit_zero(out.shape));
  launch("repack", repack_kernel, record_grid(p), dim3(threads), 0, stream_, p,
         planes_of(codes, scales, zeros), parts_of(out.shape), out.shape.groups());
  seal(stream_);
}

void CudaOps::unpack(const PackedWeight& w, View codes, View scales, View zeros) {
  check_packed_weight("unpack", w, DeviceKind::cuda);
  const bool no_zeros = w.shape.kind == PackedKind::codebook && zeros.empty();
  check_packed_planes("unpack", w.shape, codes, scales, zeros, no_zeros, DeviceKind::cuda);
  const PackedDevice p = packed_device(w, implicit_zero(w.shape));
  dispatch_planes(w.shape, [&](auto low, auto high) {
    launch("unpack", unpack_kernel<decltype(low)::value, decltype(high)::value>, record_grid(p),
           dim3(threads), 0, stream_, p, planes_of(codes, scales, zeros), w.shape.groups());
  });
}

}  // namespace engine
