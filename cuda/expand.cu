// CudaOps: a packed weight as a dense matrix, at the speed of the memory it writes.
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/unpack.cuh"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / 32;
constexpr int permuted_threads = 256;

// Codes to values for one lane's two rows. 2^23 + code is the float whose low bits are the code, so
// subtracting 2^23 + zero gives code - zero exactly, without a conversion.
constexpr std::uint32_t float_2_23 = 0x4b000000U;
constexpr float two_23 = 8388608.0F;

template <PackedKind kKind>
struct LaneUnit {
  static constexpr int terms = kKind == PackedKind::binary2 ? 2 : 1;
  float scale[terms][2];   // of rows g and g + 8
  float offset[terms][2];  // 2^23 + zero

  __device__ void load(const PackedDevice& p, const std::uint8_t* unit, int g) {
#pragma unroll
    for (int t = 0; t < terms; ++t) {
      const float2 s = unit_scales(p, unit, t, g);
      scale[t][0] = s.x;
      scale[t][1] = s.y;
      if constexpr (kKind != PackedKind::codebook) {
        const int2 z = unit_zeros(p, unit, t, g);
        offset[t][0] = two_23 + static_cast<float>(z.x);
        offset[t][1] = two_23 + static_cast<float>(z.y);
      }
    }
  }

  __device__ float term(int t, int upper, std::uint32_t code) const {
    return __fmul_rn(scale[t][upper], __uint_as_float(float_2_23 | code) - offset[t][upper]);
  }
  __device__ float value(int upper, std::uint32_t code, const float* book) const {
    if constexpr (kKind == PackedKind::codebook) {
      return scale[0][upper] * book[code];
    } else if constexpr (kKind == PackedKind::binary2) {
      return __fadd_rn(term(0, upper, code & 1U), term(1, upper, code >> 1));
    } else {
      return term(0, upper, code);
    }
  }
};

// All codes of a lane's share of a record, as values: body(whether of row g + 8, u, values of the
// eight columns 32 u + 8 t on). `units` are the record's coefficients.
template <PackedKind kKind, int kLow, int kHigh, class Body>
__device__ void decode_lane(const PackedDevice& p, const std::uint8_t* record,
                            const std::uint8_t* units, const float* book, int lane, Body&& body) {
  LaneCodes<kLow, kHigh> codes;
  codes.load(record, lane);
  LaneUnit<kKind> unit;
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    // Groups of 32 and 64 columns begin anew within the record.
    if (u == 0 || (p.record_units > 1 && p.record_units * u % 4 == 0)) {
      unit.load(p, units + p.record_units * u / 4 * p.unit_bytes, lane / 4);
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int pair = 8 * u + 4 * (e / 4) + 2 * (e % 4 / 2) + upper;
        values[e] = unit.value(upper, codes.code(pair, e % 2), book);
      }
      body(upper, u, values);
    }
  }
}

__device__ const std::uint8_t* units_of(const PackedDevice& p, std::int64_t row_tile,
                                        const std::uint8_t* record) {
  return p.group == 0 ? p.row_units + row_tile * p.unit_bytes : record + p.code_bytes;
}

// Neighbours of one row of the output, at the end of a row, in rows at odd addresses, or permuted.
template <class T, int kItems>
__device__ void store_singly(const Pack<T, kItems>& v, T* row, std::int64_t col, std::int64_t cols,
                             const std::int32_t* permutation) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (col + i >= cols) return;
    row[permutation != nullptr ? permutation[col + i] : col + i] = v.v[i];
  }
}

// A warp decodes one record into its part of shared memory, and writes it out by rows of
// 128 columns. Neighbouring warps have neighbouring columns. wide: rows of out start at multiples
// of 16 bytes. Two terms have more coefficients: without a number of blocks the compiler would
// spill registers for the sake of more of them.
template <class T, PackedKind kKind, int kLow, int kHigh>
__global__ void __launch_bounds__(threads, kKind == PackedKind::binary2 ? 8 : 1)
    expand_kernel(PackedDevice p, T* out, std::int64_t stride, bool wide) {
  constexpr int items = 16 / static_cast<int>(sizeof(T));            // of a chunk
  constexpr int row_chunks = static_cast<int>(record_cols) / items;  // 16 or 32
  constexpr int lane_chunks = 8 / items;                             // of eight columns
  // Lanes of two rows write the same chunks at a time; rows of odd number have them exchanged, so
  // that both reach different banks.
  constexpr int exchange = sizeof(T) == 4 ? 1 : 4;
  using Chunk = Pack<T, items>;
  __shared__ Chunk tiles[warps][record_rows * row_chunks];
  __shared__ float book[16];
  if (kKind == PackedKind::codebook) {
    if (threadIdx.x < 16) book[threadIdx.x] = p.book[threadIdx.x];
    __syncthreads();
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Chunk* const tile = tiles[threadIdx.x / 32];
  const std::int64_t record = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  if (record >= p.record_count) return;
  const std::int64_t row_tile = record / p.col_blocks;
  const std::int64_t first_col = record % p.col_blocks * record_cols;
  const std::uint8_t* from = p.records + record * p.record_bytes;
  decode_lane<kKind, kLow, kHigh>(p, from, units_of(p, row_tile, from), book, lane,
                                  [&](int upper, int u, const float(&values)[8]) {
                                    const int row = lane / 4 + 8 * upper;
#pragma unroll
                                    for (int c = 0; c < lane_chunks; ++c) {
                                      Chunk chunk;
#pragma unroll
                                      for (int i = 0; i < items; ++i)
                                        chunk.v[i] = from_f32<T>(values[c * items + i]);
                                      const int place = (4 * u + lane % 4) * lane_chunks + c;
                                      tile[row * row_chunks + (place ^ (row % 2 * exchange))] =
                                          chunk;
                                    }
                                  });
  __syncwarp();
  const auto rows = static_cast<int>(min(p.rows - row_tile * record_rows, record_rows));
  constexpr int rounds = static_cast<int>(record_rows) * row_chunks / 32;
  const auto chunk_of = [&](int row, int place) {
    return tile[row * row_chunks + (place ^ (row % 2 * exchange))];
  };
  T* const corner = out + row_tile * record_rows * stride;
  if (wide && first_col + record_cols <= p.cols) {
#pragma unroll 4
    for (int i = 0; i < rounds; ++i) {
      const int row = (32 * i + lane) / row_chunks;
      const int place = (32 * i + lane) % row_chunks;
      if (row >= rows) break;
      *reinterpret_cast<Chunk*>(corner + row * stride + first_col + place * items) =
          chunk_of(row, place);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < rounds; ++i) {
      const int row = (32 * i + lane) / row_chunks;
      const int place = (32 * i + lane) % row_chunks;
      if (row >= rows) break;
      store_singly(chunk_of(row, place), corner + row * stride, first_col + place * items, p.cols,
                   p.permutation);
    }
  }
}

// With a permutation: a block collects rows g and g + 8 of a row tile in shared memory, where
// scattered writes are cheap, and writes them out whole. g = blockIdx.y. Dynamic shared memory: two
// rows, each of whole chunks.
template <class T, PackedKind kKind, int kLow, int kHigh>
__global__ void __launch_bounds__(permuted_threads)
    expand_permuted_kernel(PackedDevice p, T* out, std::int64_t stride, bool wide) {
  constexpr int items = 16 / static_cast<int>(sizeof(T));
  using Chunk = Pack<T, items>;
  extern __shared__ uint4 memory[];
  __shared__ float book[16];
  if (kKind == PackedKind::codebook) {
    if (threadIdx.x < 16) book[threadIdx.x] = p.book[threadIdx.x];
    __syncthreads();
  }
  T* const rows = reinterpret_cast<T*>(memory);
  const auto chunks = static_cast<int>(ceil_div(p.cols, items));
  const std::int64_t row_tile = blockIdx.x;
  const auto g = static_cast<int>(blockIdx.y);
  const auto lanes = static_cast<int>(4 * p.col_blocks);
  for (int i = static_cast<int>(threadIdx.x); i < lanes; i += permuted_threads) {
    const int block = i / 4;
    const int t = i % 4;
    const std::uint8_t* record = p.records + (row_tile * p.col_blocks + block) * p.record_bytes;
    const auto scatter = [&](int upper, int u, const float(&values)[8]) {
      const std::int64_t col = block * record_cols + 32 * u + 8 * t;
      T* const row = rows + upper * chunks * items;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e < p.cols) row[p.permutation[col + e]] = from_f32<T>(values[e]);
      }
    };
    decode_lane<kKind, kLow, kHigh>(p, record, units_of(p, row_tile, record), book, 4 * g + t,
                                    scatter);
  }
  __syncthreads();
  for (int upper = 0; upper < 2; ++upper) {
    const std::int64_t row = row_tile * record_rows + g + 8 * upper;
    if (row >= p.rows) return;
    const Chunk* from = reinterpret_cast<const Chunk*>(rows) + upper * chunks;
    for (int i = static_cast<int>(threadIdx.x); i < chunks; i += permuted_threads) {
      const std::int64_t col = static_cast<std::int64_t>(i) * items;
      T* const to = out + row * stride;
      if (wide && col + items <= p.cols) {
        *reinterpret_cast<Chunk*>(to + col) = from[i];
      } else {
        store_singly(from[i], to, col, p.cols, nullptr);
      }
    }
  }
}

}  // namespace

void CudaOps::expand(const PackedWeight& w, View out) {
  check_packed_weight("expand", w, DeviceKind::cuda);
  require_cuda("expand", {out});
  REQUIRE(out.rows == w.shape.rows && out.cols == w.shape.cols,
          "expand: weight [" + std::to_string(w.shape.rows) + ", " + std::to_string(w.shape.cols) +
              "], out " + out.shape());
  if (!is_record_kind(w.shape.kind)) return scheme_expand(w, out, stream_);
  const PackedDevice p = packed_device(w, implicit_zero(w.shape));
  const std::int64_t blocks = ceil_div(p.record_count, warps);
  REQUIRE(blocks <= INT32_MAX, "expand: " + std::to_string(p.record_count) + " records");
  const bool wide = aligned_rows(out, 16, 1);
  // Two rows as whole chunks of 16 bytes; longer ones than a block can hold are scattered directly.
  const auto two_rows = static_cast<std::size_t>(
      2 * 16 * ceil_div(out.cols * static_cast<std::int64_t>(dtype_bytes(out.dtype)), 16));
  const bool collect =
      !w.permutation.empty() && two_rows + 1024 <= properties_.sharedMemPerBlockOptin;
  const auto run = [&]<class T, PackedKind kKind, int kLow, int kHigh>() {
    auto* to = static_cast<T*>(out.data);
    if constexpr (sizeof(T) == 2) {  // products never ask for more, so f32 has no such kernel
      if (collect) {
        return launch("expand permuted", expand_permuted_kernel<T, kKind, kLow, kHigh>,
                      dim3(static_cast<unsigned>(w.shape.row_tiles()), 8), dim3(permuted_threads),
                      two_rows, stream_, p, to, out.stride, wide);
      }
    }
    launch("expand", expand_kernel<T, kKind, kLow, kHigh>, dim3(static_cast<unsigned>(blocks)),
           dim3(threads), 0, stream_, p, to, out.stride, wide && w.permutation.empty());
  };
  dispatch_float(out.dtype, "expand", [&](auto type) {
    using T = decltype(type);
    if (w.shape.kind == PackedKind::codebook) {
      return run.template operator()<T, PackedKind::codebook, 4, 0>();
    }
    dispatch_planes(w.shape, [&](auto low, auto high) {
      constexpr int kLow = decltype(low)::value;
      constexpr int kHigh = decltype(high)::value;
      // Two planes of one bit are two codes.
      constexpr bool two = kLow == 1 && kHigh == 1;
      run.template operator()<T, two ? PackedKind::binary2 : PackedKind::affine, kLow, kHigh>();
    });
  });
}

}  // namespace engine
