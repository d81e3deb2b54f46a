// The kernel behind vector_product for codes that stay integers: 2, 3, 4 and 8 bits.
#pragma once

#include <type_traits>

#include "cuda/vector_common.cuh"

namespace engine {

constexpr int vector_plain = 0;
constexpr int vector_coarse = 1;
constexpr int vector_fine = 2;

template <int kBitCount>
struct IntCodec {
  static constexpr bool kDense = false;
  static constexpr int kBits = kBitCount;
  static constexpr int kLow = kBits < 4 ? kBits : 4;
  static constexpr int kHigh = kBits - kLow;
  static constexpr int kTerms = 1;
  static constexpr int kBlockCols = 128;
  static constexpr int kCodeBytes = 256 * kBits;
};
// Row tiles that a warp multiplies at once: two share the fragments of x, and their products hide
// each other's latency. Records of 8 bits, and 3 bits with many sums, leave no room for that.
template <int kBitCount, int NT>
struct IntPlan : IntCodec<kBitCount> {
  static constexpr int kTiles = kBitCount == 8 || (kBitCount == 3 && NT == 2) ? 1 : 2;
  static constexpr int kParts = vector_warps * kTiles / 2;
  static constexpr int kStages = NT == 1 ? (kBitCount == 2   ? 8
                                            : kBitCount == 3 ? 5
                                                             : 4)
                                         : (kBitCount == 2   ? 5
                                            : kBitCount == 3 ? 8
                                                             : 3);
};

// d = a b + c with a (16 x 32) unsigned, b (32 x 8) signed bytes.
__device__ inline void mma_bytes(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                 std::uint32_t b0, std::uint32_t b1, const std::int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// The bits of this float are those of an integer: magic_bits + n is the number magic + n, exactly,
// for |n| <= 2^22. Sums of 128 products of a byte and a signed byte stay within that.
constexpr std::int32_t magic_bits = 0x4b400000;
constexpr float magic_float = 12582912.0F;
__device__ inline float from_magic(std::int32_t v) { return __int_as_float(v) - magic_float; }

// Fragment A of columns 32 u .. 32 u + 31: registers (g, 4 columns), (g + 8, the same), (g, 4
// more), (g + 8, the same). Which columns the bytes are: byte_order().
template <int B>
__device__ void code_bytes(const std::uint32_t (&low)[2 * (B < 4 ? B : 4)],
                           const std::uint32_t (&high)[8], int u, std::uint32_t (&a)[4]) {
  if constexpr (B == 2) {
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = low[u] >> (2 * q) & 0x03030303U;
  } else if constexpr (B == 3) {
    const int first = u / 2 * 3;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int r = u % 2 * 4 + q;
      if (r < 6) {
        a[q] = low[first + r / 2] >> (3 * (r % 2)) & 0x07070707U;
      } else if (r == 6) {
        a[q] = (low[first] >> 6 & 0x03030303U) | (low[first + 1] >> 4 & 0x04040404U);
      } else {
        a[q] = (low[first + 1] >> 7 & 0x01010101U) | (low[first + 2] >> 5 & 0x06060606U);
      }
    }
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const std::uint32_t word = low[2 * u + q / 2];
      a[q] = (q % 2 == 0 ? word : word >> 4) & 0x0f0f0f0fU;
      if constexpr (B == 8) {
        const std::uint32_t up = high[2 * u + q / 2];
        a[q] |= (q % 2 == 0 ? up << 4 : up) & 0xf0f0f0f0U;
      }
    }
  }
}
// The column (0 .. 7 of a lane's eight) that byte i of B's two registers stands for.
template <int B>
__device__ constexpr int byte_column(int i) {
  constexpr int by_word[8] = {0, 2, 1, 3, 4, 6, 5, 7};  // 3, 4, 8 bits
  constexpr int by_pair[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // 2 bits
  return B == 2 ? by_pair[i] : by_word[i];
}

// Columns [c0, c1) of x, normalized if asked, as 16-bit integers relative to the largest of each
// 128 columns: x = factor * (256 high + low), two rows of bytes for each row of x. A row is, for
// each record and lane quarter t, the bytes of the record's four steps of eight columns. With them
// go the factors and the sums of the integers over each unit. Called by all threads; ends with a
// barrier.
template <class T, int B>
__device__ void stage_bytes(const VectorArgs<T>& args, XPart<T>& part, unsigned char* shared,
                            int c0, int c1) {
  const bool normed = args.norm != nullptr;
  const float inverse = normed ? part.inverse_rms(args) : 1.0F;
  if (part.mine) {
    // Whole groups of 16 threads, 128 columns, take part in every step.
    const unsigned lanes = 0xffffU << (threadIdx.x & 16);
    const int r = part.r;
    int k = ((c0 & -part.step) - part.base) / part.step;
#pragma unroll 1
    for (int c = (c0 & -part.step) + part.first; c < c1; c += part.step, ++k) {
      if (c < c0) continue;
      const Pack<T, 8> p = part.x_at(args, k, c);
      std::uint32_t top_bits = 0;  // compared as integers, so that NaN is above all
      float v[8];
      if (normed) {
        const Pack<T, 8> w = part.w_at(args, k, c);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          v[e] = round_through<T>(round_through<T>(to_f32(p.v[e]) * inverse) * to_f32(w.v[e]));
        }
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = to_f32(p.v[e]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) top_bits = max(top_bits, __float_as_uint(fabsf(v[e])));
#pragma unroll
      for (int d = 1; d < 16; d *= 2) {
        top_bits = max(top_bits, __shfl_xor_sync(lanes, top_bits, d));
      }
      const float top = __uint_as_float(top_bits);
      // A power of two by which the largest becomes 2^14 .. 2^15; exponents kept within those of
      // normal numbers.
      int exponent = max(static_cast<int>(top_bits >> 23) - 126, -100);
      float scale = __uint_as_float(static_cast<std::uint32_t>(15 - exponent + 127) << 23);
      // 32639 = 127 * 256 + 127 is the largest number of two signed bytes. bf16 goes past it by 1
      // at most, which is clamped; more than that takes the next power of two.
      if (top * scale > 32639.0F) {
        ++exponent;
        scale *= 0.5F;
      }
      float factor = __uint_as_float(static_cast<std::uint32_t>(exponent - 15 + 127) << 23);
      if (top_bits >= 0x7f800000U) factor = __uint_as_float(0x7fffffffU);  // NaN makes NaN
      std::int32_t q[8];
      std::int32_t sum = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        q[e] = __float_as_int(fmaf(v[e], scale, magic_float)) - magic_bits;
        sum += q[e];
      }
      std::uint32_t bytes[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        std::uint32_t low[4];
        std::uint32_t high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          low[i] = static_cast<std::uint32_t>(q[byte_column<B>(4 * h + i)]);
          high[i] = low[i] + 128U;
        }
        bytes[0][h] = __byte_perm(__byte_perm(high[0], high[1], 0x0051),
                                  __byte_perm(high[2], high[3], 0x0051), 0x5410);
        bytes[1][h] = __byte_perm(__byte_perm(low[0], low[1], 0x0040),
                                  __byte_perm(low[2], low[3], 0x0040), 0x5410);
      }
      const int at = (c - c0) / 128 * 128 + c / 8 % 4 * 32 + c / 32 % 4 * 8;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        *reinterpret_cast<uint2*>(shared + (2 * r + k) * args.x_row_bytes + at) = {bytes[k][0],
                                                                                   bytes[k][1]};
      }
      // Sums over 32, 64 or 128 columns.
      sum += __shfl_xor_sync(lanes, sum, 1);
      sum += __shfl_xor_sync(lanes, sum, 2);
      if (args.units_per_record < 4) sum += __shfl_xor_sync(lanes, sum, 4);
      if (args.units_per_record < 2) sum += __shfl_xor_sync(lanes, sum, 8);
      float* sums = reinterpret_cast<float*>(shared + args.sum_offset) + r * args.sum_row;
      if ((c & (args.sum_cols - 1)) == 0) {
        sums[(c - c0) / args.sum_cols] = static_cast<float>(sum);
      }
      float* factors = reinterpret_cast<float*>(shared + args.factor_offset) + r * args.factor_row;
      if ((c & 127) == 0) factors[(c - c0) / 128] = factor;
    }
  }
  __syncthreads();
}

// out[n, r] = sum over k of x[n, k] w[r, k], for up to 4 NT rows n of x.
//
// As vector_half_kernel, but the products are of integers (m16n8k32 on bytes), which halves the
// work of unpacking: codes are bytes as soon as they are masked. x is taken as 16-bit integers
// relative to the largest of each 128 columns, split into two bytes that stand in neighbouring
// columns of B, so that one lane gets both sums. Integer sums are exact; they leave the tensor
// cores as bits of floats. bf16 values of at least 1/64 of the largest are exact, others to 2^-15
// of the largest. Preconditions: x_row_bytes = 16 mod 128; the rest as vector_half_kernel. Cost:
// the weights read once; x once per block; 0.7 instructions per weight and lane at 4 bits.
template <class T, int B, int NT, int kMode>
__global__ void __launch_bounds__(vector_threads, 1)
    vector_int_kernel(const __grid_constant__ VectorArgs<T> args) {
  extern __shared__ __align__(128) unsigned char shared[];
  using C = IntPlan<B, NT>;
  constexpr int tiles = C::kTiles;
  constexpr int stages = C::kStages;
  constexpr int parts = C::kParts;
  constexpr bool kPlain = kMode == vector_plain;
  constexpr bool kFine = kMode == vector_fine;
  // Plain: sizes are constants.
  const int record_bytes = kPlain ? C::kCodeBytes + 48 : args.record_bytes;
  const int stage_size = kPlain ? tiles * (C::kCodeBytes + 48) : args.stage_bytes;
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // From one lane to all: the compiler then knows that it is the same for the whole warp.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int slice_begin = args.slice_start[blockIdx.y];
  const int slice_end = args.slice_start[blockIdx.y + 1];
  if (warp >= vector_warps) {
    XPart<T> x_part;
    x_part.begin(args, slice_begin * 128);
    chain_wait();
    stage_bytes<T, B>(args, x_part, shared, slice_begin * 128, slice_end * 128);
    finish_units<T, parts>(args, shared);
    return;
  }
  const int g = lane / 4;
  const int t = lane % 4;
  const int half = warp % 2;
  const int part_of = tiles == 2 ? warp : warp / 2;
  const int begin = slice_begin + (slice_end - slice_begin) * part_of / parts;
  const int end = slice_begin + (slice_end - slice_begin) * (part_of + 1) / parts;

  const int ring = args.ring_offset + warp * args.stages * stage_size;
  const auto ring_end = static_cast<std::uint32_t>(args.stages * stage_size);
  const std::uint32_t ring_address = shared_address(shared) + static_cast<std::uint32_t>(ring);
  VectorSource<T, C> source;
  source.unit = begin < end ? static_cast<int>(blockIdx.x) : args.units;
#if __CUDA_ARCH__ >= 900
  __shared__ std::uint64_t arrivals[vector_warps][stages];
  const std::uint32_t barriers = shared_address(arrivals[warp]);
  if (lane == 0) {
    for (int s = 0; s < stages; ++s) bulk_init(barriers + 8 * s);
    bulk_fence();
  }
  __syncwarp();
  const int place_in_record = 0;  // whole records are asked for
  std::uint32_t phase = 0;        // parity of the stages' next arrivals
#else
  const int place_in_record = lane;
#endif
  source.aim(args, half, begin, end, place_in_record);
  // The stage to use and then to fill again, in bytes.
  std::uint32_t use = 0;
  [[maybe_unused]] std::uint32_t use_barrier = 0;
  const auto request = [&] {
#if __CUDA_ARCH__ >= 900
    if (source.unit < args.units) {
      if (lane == 0) {
        bulk_expect(barriers + use_barrier, tiles * record_bytes);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          bulk_copy(ring_address + use + static_cast<std::uint32_t>(i * record_bytes),
                    source.from[i], record_bytes, barriers + use_barrier);
        }
      }
      source.advance(args, record_bytes, half, begin, end, place_in_record);
    }
    use_barrier += 8;
#else
    source.request(args, record_bytes, ring_address + use + lane * 16, half, begin, end, lane);
#endif
    use += static_cast<std::uint32_t>(stage_size);
    if (use == ring_end) use = use_barrier = 0;
  };
  XPart<T> x_part;
  x_part.begin(args, slice_begin * 128);
  request();
  chain_wait();
  x_part.load(args);
#pragma unroll 1
  for (int s = 1; s < args.stages; ++s) request();
  stage_bytes<T, B>(args, x_part, shared, slice_begin * 128, slice_end * 128);

  // The lane's columns of B: high bytes of a row of x if g is even, low ones if odd. Its columns of
  // C are those of row n * 4 + t of x.
  // Their offsets in shared memory for n = 0; those of the others follow in even steps, as there is
  // room for all 4 NT rows. With NT = 1 there may be less.
  const int last = NT == 1 ? args.rows - 1 : 3;
  const int x_row = (2 * min(g / 2, last) + g % 2) * args.x_row_bytes + 32 * t;
  const int sum_row = args.sum_offset + min(t, last) * args.sum_row * 4;
  const int factor_row = args.factor_offset + min(t, last) * args.factor_row * 4;
  const std::int32_t magic[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
  int round = 0;
  const int items = 16 * args.rows;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < args.units;
       unit += static_cast<int>(gridDim.x)) {
    [[maybe_unused]] const unsigned char* row_unit[tiles];
    if (kMode == vector_coarse && args.units_per_record == 0) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        int segment = 0;
        int tile = 0;
        find_tile(args, unit, tiles == 2 ? i : half, segment, tile);
        const VectorWeight<T>& w = args.weight[segment];
        row_unit[i] = w.row_units + std::int64_t{min(tile, w.tiles - 1)} * args.unit_bytes;
      }
    }
    float acc[tiles][NT][2];
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int n = 0; n < NT; ++n) acc[i][n][0] = acc[i][n][1] = 0.0F;
    }
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
#if __CUDA_ARCH__ >= 900
      bulk_wait(barriers + use_barrier, phase);
#else
      if (args.stages == stages) {
        copy_wait<stages - 1>();
      } else {
        copy_wait<0>();  // a shorter ring waits for all that is on its way
      }
      __syncwarp();  // what other lanes have copied
#endif
      const unsigned char* at = shared + ring + use + lane * 16;
      const int local = block - slice_begin;

      std::uint32_t low[tiles][2 * C::kLow];
      [[maybe_unused]] std::uint32_t high[tiles][8];
      std::int32_t part[tiles][NT][4];
      uint4 b[NT];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (u % 2 == 0) {
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            b[n] = *reinterpret_cast<const uint4*>(shared + x_row + n * 8 * args.x_row_bytes +
                                                   local * 128 + 8 * u);
          }
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const unsigned char* record = at + i * record_bytes;
          load_code_plane<C::kLow>(record, lane, u, low[i]);
          if constexpr (B == 8) load_code_plane<4>(record + 1024, lane, u, high[i]);
          std::uint32_t a[4];
          code_bytes<B>(low[i], high[i], u, a);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const std::uint32_t b0 = u % 2 == 0 ? b[n].x : b[n].z;
            const std::uint32_t b1 = u % 2 == 0 ? b[n].y : b[n].w;
            if (u == 0 || kFine) {
              mma_bytes(part[i][n], a, b0, b1, magic);
            } else {
              mma_bytes(part[i][n], a, b0, b1, part[i][n]);
            }
          }
        }
        if (u != 3 && !kFine) continue;
        // Fine groups: the coefficients of the unit that these 32 columns belong to, the sums of x
        // for groups of 64 counted at its second half only.
        int index = 0;
        bool counted = true;
        if constexpr (kFine) {
          index = args.units_per_record == 4 ? u : u / 2;
          counted = args.units_per_record == 4 || u % 2 == 1;
        }
        float2 scale[tiles];
        float2 zero[tiles];
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const unsigned char* record = at - lane * 16 + i * record_bytes + C::kCodeBytes;
          if constexpr (kPlain) {
            scale[i] = __half22float2(*reinterpret_cast<const __half2*>(record + 4 * g));
            const uchar2 z = *reinterpret_cast<const uchar2*>(record + 32 + 2 * g);
            zero[i] = {static_cast<float>(z.x), static_cast<float>(z.y)};
          } else if (!kFine && args.units_per_record == 0) {
            load_unit(args, row_unit[i], 2 * g, scale[i], zero[i]);
          } else {
            load_unit(args, record + index * args.unit_bytes, 2 * g, scale[i], zero[i]);
          }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float factor = *reinterpret_cast<const float*>(
              shared + factor_row + (n * 4 * args.factor_row + local) * 4);
          float sum = 0;
          if (counted) {
            const int place = local * (kFine ? args.units_per_record : 1) + index;
            sum = *reinterpret_cast<const float*>(shared + sum_row +
                                                  (n * 4 * args.sum_row + place) * 4);
          }
#pragma unroll
          for (int i = 0; i < tiles; ++i) {
            const float top = fmaf(256.0F, from_magic(part[i][n][0]), from_magic(part[i][n][1]));
            const float bottom = fmaf(256.0F, from_magic(part[i][n][2]), from_magic(part[i][n][3]));
            acc[i][n][0] = fmaf(scale[i].x * factor, fmaf(-zero[i].x, sum, top), acc[i][n][0]);
            acc[i][n][1] = fmaf(scale[i].y * factor, fmaf(-zero[i].y, sum, bottom), acc[i][n][1]);
          }
        }
      }
      __syncwarp();  // all lanes have left the stage
      request();
#if __CUDA_ARCH__ >= 900
      if (use == 0) phase ^= 1;
#endif
    }

    const int buffer = round % 2;
    if (round >= 2) barrier_sync(barrier_free + buffer);
    ++round;
    float* red = reinterpret_cast<float*>(shared + args.red_offset) + buffer * (parts * 2) * items;
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      float* mine = red + (part_of * 2 + (tiles == 2 ? i : half)) * items + g;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n * 4 + t < args.rows) {
          mine[(n * 4 + t) * 16] = acc[i][n][0];
          mine[(n * 4 + t) * 16 + 8] = acc[i][n][1];
        }
      }
    }
    barrier_arrive(barrier_full + buffer);
  }
}

// two_tiles: for five to eight rows of x.
template <class T, int B>
VectorKernel<T> pick_int(bool two_tiles, int mode) {
  const auto by_tiles = [&](auto tag) {
    constexpr int m = decltype(tag)::value;
    return two_tiles ? vector_int_kernel<T, B, 2, m> : vector_int_kernel<T, B, 1, m>;
  };
  switch (mode) {
    case vector_plain:
      return by_tiles(std::integral_constant<int, vector_plain>{});
    case vector_coarse:
      return by_tiles(std::integral_constant<int, vector_coarse>{});
    default:
      return by_tiles(std::integral_constant<int, vector_fine>{});
  }
}

}  // namespace engine
