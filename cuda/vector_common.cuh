// What the two kernels behind vector_product share: how a block walks over weights, streams them
// into shared memory and finishes what its warps have summed.
#pragma once

#include <cstdint>

#include "cuda/attn_mma.cuh"
#include "cuda/chain.cuh"
#include "cuda/kv.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.h"

namespace engine {

constexpr int vector_warps = 16;  // that multiply
constexpr int vector_workers = vector_warps * 32;
constexpr int vector_finishers = 128;  // threads that add up what the workers leave
constexpr int vector_threads = vector_workers + vector_finishers;
constexpr int vector_max_slices = 8;

template <class T>
struct VectorWeight {
  const unsigned char* data;       // records, or rows of T
  const unsigned char* row_units;  // group 0: coefficients by row tile
  std::int64_t stride;             // dense: elements between rows
  std::int64_t rows;
  int tiles;
  void* out;
  std::int64_t out_stride, position_stride;
};

template <class T>
struct VectorArgs {
  VectorWeight<T> weight[3];
  const T* x;
  const T* norm;
  const std::int32_t* permutation;
  const float* book;
  const float* cos;
  const float* sin;
  const std::int32_t* position;
  int positions;  // positions at or beyond are ignored
  float* partials;
  std::int32_t* counters;
  std::int64_t x_stride, cos_stride, sin_stride;
  float eps;
  int rows;  // of x
  int cols;
  int blocks;  // column blocks of a row tile
  int slices;
  int stages;                              // of a warp's ring, at most the kernel's own
  int slice_start[vector_max_slices + 1];  // first block of each slice
  int units;                               // pairs of row tiles, over all segments
  int segment_units[2];                    // of segments 0 and 1
  int half_shift;                          // qkv: log2 of the row tiles of half a head
  int team_shift;                          // log2 of the threads that load one row of x together
  int record_bytes;
  int unit_bytes;
  int units_per_record;               // 0: coefficients by row
  int scale_kind;                     // 0 f32, 1 f16, 2 bf16
  int zero_offset;                    // bytes from a unit's scales to its zeros; 0: no zeros
  float constant_zero;                // where there are none
  int x_row_bytes;                    // of a row of x in shared memory
  int sum_cols, sum_row, sum_offset;  // columns of a sum of x; sums of a row
  int factor_row, factor_offset;      // integers: factors of a row
  int red_offset, ring_offset, stage_bytes;
  bool wide;  // x and norm can be read 16 bytes at a time
  bool out_f32;
  VectorEpilogue epilogue;
};

__device__ inline void copy_async_16(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ inline void copy_async_8(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

// The words of a plane of B bits that the steps of columns 32 u .. 32 u + 31 need beyond those of
// the steps before: chunks of 512 bytes, then one of 256 if B is odd. A plane of 4 bits comes in
// halves, which saves registers. `at` is the lane's place in the first chunk.
template <int B>
__device__ void load_code_plane(const unsigned char* at, int lane, int u,
                                std::uint32_t (&w)[2 * B]) {
  if (B == 4 ? u % 2 != 0 : u != 0) return;
#pragma unroll
  for (int c = 0; c < B / 2; ++c) {
    if (B == 4 && c != u / 2) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(at + c * 512);
    w[4 * c] = v.x;
    w[4 * c + 1] = v.y;
    w[4 * c + 2] = v.z;
    w[4 * c + 3] = v.w;
  }
  if constexpr (B % 2 == 1) {
    const uint2 v = *reinterpret_cast<const uint2*>(at + B / 2 * 512 - lane * 8);
    w[2 * B - 2] = v.x;
    w[2 * B - 1] = v.y;
  }
}
template <int B>
__device__ void request_plane(std::uint32_t to, const unsigned char* from, int lane) {
#pragma unroll
  for (int c = 0; c < B / 2; ++c) copy_async_16(to + c * 512, from + c * 512);
  if constexpr (B % 2 == 1) {
    copy_async_8(to + B / 2 * 512 - lane * 8, from + B / 2 * 512 - lane * 8);
  }
}

// Two scales (rows g and g + 8) at `unit`, as f32.
__device__ inline float2 load_scale_pair(const unsigned char* unit, int kind, int place) {
  if (kind == 0) return *reinterpret_cast<const float2*>(unit + place * 4);
  const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(unit + place * 2);
  if (kind == 1) return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000U)};
}

// Scale and zero of rows g and g + 8 of one term of a unit, whose bytes are at `unit`.
template <class T>
__device__ void load_unit(const VectorArgs<T>& args, const unsigned char* unit, int place,
                          float2& scale, float2& zero) {
  scale = load_scale_pair(unit, args.scale_kind, place);
  zero = {args.constant_zero, args.constant_zero};
  if (args.zero_offset != 0) {
    const uchar2 z = *reinterpret_cast<const uchar2*>(unit + args.zero_offset + place);
    zero = {static_cast<float>(z.x), static_cast<float>(z.y)};
  }
}

// Eight values of a row of x (or of the norm's weights) from column c, zeros beyond the columns.
template <class T>
__device__ Pack<T, 8> load_x(const VectorArgs<T>& args, const T* row, int c) {
  Pack<T, 8> out{};
  if (args.wide) {
    if (c < args.cols) out = *reinterpret_cast<const Pack<T, 8>*>(row + c);
    return out;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (c + e < args.cols) {
      out.v[e] = row[args.permutation == nullptr ? c + e : args.permutation[c + e]];
    }
  }
  return out;
}

// The part of a row of x that a thread stages: eight columns of each `step`. The first four, or two
// and the norm's weights for them, it keeps in registers: their loads are on their way while the
// warp asks for weights.
template <class T>
struct XPart {
  Pack<T, 8> held[4];
  const T* row;
  int r, step, first, base;
  int kept;  // columns of x in `held`; 0 where single loads would be needed
  bool mine;

  // Before chain_wait(): the norm's weights do not change.
  __device__ void begin(const VectorArgs<T>& args, int c0) {
    r = static_cast<int>(threadIdx.x) >> args.team_shift;
    step = 8 << args.team_shift;
    first = (static_cast<int>(threadIdx.x) * 8) & (step - 1);
    mine = r < args.rows && threadIdx.x < vector_workers;
    row = args.x + r * args.x_stride;
    base = args.norm != nullptr ? 0 : c0 & -step;
    kept = !args.wide ? 0 : args.norm != nullptr ? 2 : 4;
    if (mine && kept == 2) {
      held[2] = load_wide(args, args.norm, first);
      held[3] = load_wide(args, args.norm, first + step);
    }
  }
  __device__ void load(const VectorArgs<T>& args) {
    if (!mine || kept == 0) return;
    held[0] = load_wide(args, row, base + first);
    held[1] = load_wide(args, row, base + first + step);
    if (kept == 2) return;
    held[2] = load_wide(args, row, base + first + 2 * step);
    held[3] = load_wide(args, row, base + first + 3 * step);
  }
  // The columns from c on; k = (c - base - first) / step.
  __device__ Pack<T, 8> x_at(const VectorArgs<T>& args, int k, int c) const {
    if (k >= kept) return load_x(args, row, c);
    return k < 2 ? (k == 0 ? held[0] : held[1]) : (k == 2 ? held[2] : held[3]);
  }
  __device__ Pack<T, 8> w_at(const VectorArgs<T>& args, int k, int c) const {
    if (k >= kept) return load_x(args, args.norm, c);
    return k == 0 ? held[2] : held[3];
  }

  // 1 / rms of the row. Called by all threads of the block; has a barrier.
  __device__ float inverse_rms(const VectorArgs<T>& args) {
    __shared__ float squares[vector_threads / 32];
    float sum = 0;
    if (mine) {
      const auto add = [&](const Pack<T, 8>& p) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_f32(p.v[e]) * to_f32(p.v[e]);
      };
      if (kept > 0) {
        add(held[0]);  // zeros beyond the columns
        add(held[1]);
      }
#pragma unroll 1
      for (int c = first + kept * step; c < args.cols; c += step) add(load_x(args, row, c));
    }
    sum = warp_reduce(sum, SumOp{});
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
    const int warps = 1 << (args.team_shift - 5);
    sum = 0;
    if (mine) {
      for (int i = 0; i < warps; ++i) sum += squares[r * warps + i];
    }
    return 1.0F / sqrtf(sum / static_cast<float>(args.cols) + args.eps);
  }

 private:
  __device__ static Pack<T, 8> load_wide(const VectorArgs<T>& args, const T* from, int c) {
    Pack<T, 8> out{};
    if (c < args.cols) out = *reinterpret_cast<const Pack<T, 8>*>(from + c);
    return out;
  }
};

// The pair of row tiles that is unit u: tile of its first (half 0) or second half, in which
// segment. A tile at or beyond weight[segment].tiles does not exist.
template <class T>
__device__ void find_tile(const VectorArgs<T>& args, int u, int half, int& segment, int& tile) {
  if (args.epilogue == VectorEpilogue::silu) {
    segment = half;
    tile = u;
    return;
  }
  segment = 0;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    if (segment == s && u >= args.segment_units[s]) {
      u -= args.segment_units[s];
      ++segment;
    }
  }
  if (args.epilogue == VectorEpilogue::qkv && segment < 2) {
    // Rows j and j + head_dim / 2 of a head are rotated together.
    const int low = (1 << args.half_shift) - 1;
    tile = ((u & ~low) << 1) + (u & low) + (half << args.half_shift);
  } else {
    tile = 2 * u + half;
  }
}

// What out held, for the add epilogue; 0 for others.
template <class T>
__device__ float old_out(const VectorArgs<T>& args, const VectorWeight<T>& w, int n,
                         std::int64_t row) {
  if (args.epilogue != VectorEpilogue::add || row >= w.rows) return 0.0F;
  const std::int64_t at = n * w.out_stride + row;
  return args.out_f32 ? static_cast<const float*>(w.out)[at]
                      : to_f32(static_cast<const T*>(w.out)[at]);
}

template <class T>
__device__ void put_out(const VectorArgs<T>& args, const VectorWeight<T>& w, int n,
                        std::int64_t row, float v) {
  if (row >= w.rows) return;
  const std::int64_t at = n * w.out_stride + row;
  if (args.out_f32) {
    static_cast<float*>(w.out)[at] = v;
  } else {
    static_cast<T*>(w.out)[at] = from_f32<T>(v);
  }
}

// Products v0, v1 of row `row` of the unit's two tiles with row n of x; old_out() added already.
template <class T>
__device__ void finish(const VectorArgs<T>& args, int unit, int row, int n, float v0, float v1) {
  int segment = 0;
  int tile = 0;
  find_tile(args, unit, 0, segment, tile);
  const VectorWeight<T>& w = args.weight[segment];
  const std::int64_t first = std::int64_t{tile} * 16 + row;
  if (args.epilogue == VectorEpilogue::silu) {
    const float gate = round_through<T>(v0);
    const float act = round_through<T>(gate / (1.0F + expf(-gate)));
    put_out(args, w, n, first, act * round_through<T>(v1));
    return;
  }
  if (args.epilogue != VectorEpilogue::qkv) {
    put_out(args, w, n, first, v0);
    put_out(args, w, n, first + 16, v1);
    return;
  }
  const std::int64_t position = *args.position;
  const bool inside = position >= 0 && position < args.positions;
  T* out = static_cast<T*>(w.out) + n * w.out_stride;
  if (segment == 0 && !inside) {  // as rope_step: nothing is rotated
    out[first] = from_f32<T>(v0);
    out[first + (16 << args.half_shift)] = from_f32<T>(v1);
    return;
  }
  if (!inside) return;  // as kv_append_step: nothing is stored
  out += position * w.position_stride;
  if (segment == 2) {
    if (first < w.rows) out[first] = from_f32<T>(v0);
    if (first + 16 < w.rows) out[first + 16] = from_f32<T>(v1);
    return;
  }
  const int j = (tile & ((2 << args.half_shift) - 1)) * 16 + row;
  T low = from_f32<T>(v0);
  T high = from_f32<T>(v1);
  rotate(low, high, args.cos[position * args.cos_stride + j],
         args.sin[position * args.sin_stride + j]);
  out[first] = low;
  out[first + (16 << args.half_shift)] = high;
}

// Copies of whole records by the copy engine (sm_90): one lane asks, a barrier in shared memory
// counts the bytes that arrive. A layer takes a fifth longer
// with cp.async (docs/kernels.md).
#if __CUDA_ARCH__ >= 900
__device__ inline void bulk_init(std::uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void bulk_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void bulk_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_copy(std::uint32_t to, const void* from, int bytes,
                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ inline void bulk_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

// What a warp streams: the records (or rows) of its row tiles, one block of columns after another.
template <class T, class C, int kTiles = C::kTiles>
struct VectorSource {
  const unsigned char* from[kTiles];  // the lane's place in the next block
  int unit;                           // of which it is; beyond args.units: no more
  int left = 0;                       // blocks left in the unit
  std::int64_t row_bytes = 0;         // dense: from row g to row g + 8
  int columns_left = 0;               // dense: from the lane's first column
  bool valid[2] = {false, false};     // dense: rows g and g + 8 exist

  __device__ void aim(const VectorArgs<T>& args, int half, int begin, int end, int lane) {
    if (unit >= args.units) return;
    left = end - begin;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      int segment = 0;
      int tile = 0;
      find_tile(args, unit, kTiles == 2 ? i : half, segment, tile);
      const VectorWeight<T>& w = args.weight[segment];
      if constexpr (C::kDense) {
        const int row = tile * 16 + lane / 4;
        const int column = begin * C::kBlockCols + lane % 4 * 8;
        valid[0] = row < w.rows;
        valid[1] = row + 8 < w.rows;
        row_bytes = 8 * w.stride * 2;
        columns_left = args.cols - column;
        from[i] = w.data + (row * w.stride + column) * 2;
      } else {
        // A tile beyond the last is read as the last; finish() drops its rows.
        from[i] = w.data +
                  (std::int64_t{min(tile, w.tiles - 1)} * args.blocks + begin) * args.record_bytes +
                  lane * 16;
      }
    }
  }

  __device__ void advance(const VectorArgs<T>& args, int record_bytes, int half, int begin, int end,
                          int lane) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) from[i] += record_bytes;
    if (--left == 0) {
      unit += static_cast<int>(gridDim.x);
      aim(args, half, begin, end, lane);
    }
  }

  // Queues the copies of one stage to the lane's place `to` of it, as one group.
  __device__ void request(const VectorArgs<T>& args, int record_bytes, std::uint32_t to, int half,
                          int begin, int end, int lane) {
    if (unit < args.units) {
      if constexpr (C::kDense) {
#pragma unroll
        for (int u = 0; u < C::kBlockCols / 32; ++u) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const bool inside = valid[h] && columns_left > 32 * u;
            copy_async(to + (2 * u + h) * 512,
                       inside ? from[0] + h * row_bytes + 64 * u : args.weight[0].data, inside);
          }
        }
        columns_left -= C::kBlockCols;
        advance(args, C::kBlockCols * 2, half, begin, end, lane);
      } else {
        // Coefficients: at most 512 bytes, twice that for two terms.
        const int rest = record_bytes - C::kCodeBytes - lane * 16;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const std::uint32_t place = to + i * record_bytes;
          const unsigned char* mine = from[i];
          request_plane<C::kLow>(place, mine, lane);
          if constexpr (C::kHigh > 0) {
            request_plane<C::kHigh>(place + 256 * C::kLow, mine + 256 * C::kLow, lane);
          }
          if (rest > 0) copy_async_16(place + C::kCodeBytes, mine + C::kCodeBytes);
          if (C::kTerms == 2 && rest > 512) {
            copy_async_16(place + C::kCodeBytes + 512, mine + C::kCodeBytes + 512);
          }
        }
        advance(args, record_bytes, half, begin, end, lane);
      }
    }
    copy_commit();
  }
};

// Barriers between the working warps and the finishing ones: partial sums of a buffer are there; a
// buffer is free again; the finishing warps among themselves.
constexpr int barrier_full = 1;  // + buffer
constexpr int barrier_free = 3;  // + buffer
constexpr int barrier_finish = 5;
// A diverged warp would be counted once for each of its parts, so it meets first.
__device__ inline void barrier_sync(int id) {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(vector_threads) : "memory");
}
__device__ inline void barrier_arrive(int id) {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(vector_threads) : "memory");
}
__device__ inline void barrier_finishers() {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"n"(barrier_finish), "n"(vector_finishers) : "memory");
}

// old_out() of item i = 16 n + row of a unit, for both of its tiles.
template <class T>
__device__ void old_pair(const VectorArgs<T>& args, int unit, int i, float (&out)[2]) {
  int segment = 0;
  int tile = 0;
  find_tile(args, unit, 0, segment, tile);
  const std::int64_t row = std::int64_t{tile} * 16 + i % 16;
  out[0] = old_out(args, args.weight[segment], i / 16, row);
  out[1] = old_out(args, args.weight[segment], i / 16, row + 16);
}

// The finishing warps: add the partial sums [part][tile][n][row] of each unit, do what follows.
template <class T, int kParts>
__device__ void finish_units(const VectorArgs<T>& args, const unsigned char* shared) {
  __shared__ int arrived;
  const int thread = static_cast<int>(threadIdx.x) - vector_workers;
  const int slice = static_cast<int>(blockIdx.y);
  const int items = 16 * args.rows;
  const int buffer_floats = kParts * 2 * items;
  int buffer = 0;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < args.units;
       unit += static_cast<int>(gridDim.x)) {
    const float* red =
        reinterpret_cast<const float*>(shared + args.red_offset) + buffer * buffer_floats;
    // Partial sums of slices: [unit][slice][n][row][2].
    float2* parts =
        reinterpret_cast<float2*>(args.partials) + std::int64_t{unit} * args.slices * items;
    // Sums start from what they are added to, which is read while the workers multiply.
    float first[2] = {0.0F, 0.0F};
    if (args.epilogue == VectorEpilogue::add && slice == 0 && thread < items) {
      old_pair(args, unit, thread, first);
    }
    barrier_sync(barrier_full + buffer);
#pragma unroll 1
    for (int i = thread; i < items; i += vector_finishers) {
      if (i != thread) {
        first[0] = first[1] = 0.0F;
        if (args.epilogue == VectorEpilogue::add && slice == 0) old_pair(args, unit, i, first);
      }
      float v0 = first[0];
      float v1 = first[1];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        v0 += red[2 * p * items + i];
        v1 += red[(2 * p + 1) * items + i];
      }
      if (args.slices == 1) {
        finish(args, unit, i % 16, i / 16, v0, v1);
      } else {
        parts[slice * items + i] = {v0, v1};
      }
    }
    barrier_arrive(barrier_free + buffer);
    buffer ^= 1;
    if (args.slices == 1) continue;
    __threadfence();
    barrier_finishers();
    if (thread == 0) {
      arrived = atomicAdd(args.counters + unit, 1);
      if (arrived == args.slices - 1) args.counters[unit] = 0;
    }
    barrier_finishers();
    if (arrived == args.slices - 1) {
      __threadfence();
#pragma unroll 1
      for (int i = thread; i < items; i += vector_finishers) {
        float v0 = 0;
        float v1 = 0;
        for (int s = 0; s < args.slices; ++s) {
          const float2 v = __ldcg(parts + s * items + i);
          v0 += v.x;
          v1 += v.y;
        }
        finish(args, unit, i % 16, i / 16, v0, v1);
      }
    }
    barrier_finishers();  // `arrived` may be written again
  }
}

template <class T>
using VectorKernel = void (*)(const VectorArgs<T>);

}  // namespace engine
