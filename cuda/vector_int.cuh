// The kernel behind vector_product for codes that stay integers: 2, 3, 4 and 8 bits.
#pragma once

#include <type_traits>

#include "cuda/vector_finish.cuh"
#include "cuda/vector_x.cuh"

namespace engine {

constexpr int vector_plain = 0;
constexpr int vector_coarse = 1;
constexpr int vector_fine = 2;

template <int kBits>
struct IntPlan {
  static constexpr int kLow = kBits < 4 ? kBits : 4;  // bits of the first plane
  static constexpr int kCodeBytes = 256 * kBits;
  static constexpr int kParts = vector_warps / 2;  // of the columns; a pair of row tiles is shared
  // Records of a stage, copied at once: small copies cost the copy engine time of their own.
  static constexpr int kRecords = 2;
  static constexpr int kStages = 8;  // at most; as many as there is room for
};

// d = a b + c with a (16 x 32) unsigned, b (32 x 8) signed bytes.
__device__ inline void mma_bytes(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                 std::uint32_t b0, std::uint32_t b1, const std::int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
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

// The factor by which code_bytes() leaves the codes of rows g + 8 too large: they stay where they
// are in their byte, which saves a shift.
template <int B>
constexpr int odd_factor = B == 2   ? 4
                           : B == 3 ? 8
                           : B == 4 ? 16
                                    : 1;

// Fragment A of columns 32 u .. 32 u + 31: registers (g, 4 columns), (g + 8, the same), (g, 4
// more), (g + 8, the same). Which columns the bytes are: byte_column().
template <int B>
__device__ void code_bytes(const std::uint32_t (&low)[2 * (B < 4 ? B : 4)],
                           const std::uint32_t (&high)[8], int u, std::uint32_t (&a)[4]) {
  if constexpr (B == 2) {
    const std::uint32_t more = low[u] >> 4;
    a[0] = low[u] & 0x03030303U;
    a[1] = low[u] & 0x0c0c0c0cU;
    a[2] = more & 0x03030303U;
    a[3] = more & 0x0c0c0c0cU;
  } else if constexpr (B == 3) {
    const int first = u / 2 * 3;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int r = u % 2 * 4 + q;
      if (r < 6) {
        a[q] = low[first + r / 2] & (r % 2 == 0 ? 0x07070707U : 0x38383838U);
      } else if (r == 6) {
        a[q] = (low[first] >> 6 & 0x03030303U) | (low[first + 1] >> 4 & 0x04040404U);
      } else {
        a[q] = (low[first + 1] >> 4 & 0x08080808U) | (low[first + 2] >> 2 & 0x30303030U);
      }
    }
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const std::uint32_t word = low[2 * u + q / 2];
      if constexpr (B == 4) {
        a[q] = word & (q % 2 == 0 ? 0x0f0f0f0fU : 0xf0f0f0f0U);
      } else {
        const std::uint32_t up = high[2 * u + q / 2];
        a[q] = q % 2 == 0 ? (word & 0x0f0f0f0fU) | (up << 4 & 0xf0f0f0f0U)
                          : (word >> 4 & 0x0f0f0f0fU) | (up & 0xf0f0f0f0U);
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

// Two values of T in one word, and what is done with them.
template <class T>
__device__ std::uint32_t pair_bits(const Pack<T, 8>& p, int e) {
  return reinterpret_cast<const std::uint32_t*>(p.v)[e];
}
template <class T>
__device__ float2 unpack2(std::uint32_t v);
template <>
__device__ inline float2 unpack2<__half>(std::uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
template <>
__device__ inline float2 unpack2<__nv_bfloat16>(std::uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000U)};
}
template <class T>
__device__ std::uint32_t multiply2(std::uint32_t a, std::uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 out = __hmul2(*reinterpret_cast<const T2*>(&a), *reinterpret_cast<const T2*>(&b));
  return *reinterpret_cast<const std::uint32_t*>(&out);
}

// Columns [c0, c1) of x, normalized if asked, as 16-bit integers relative to the largest of each
// 128 columns: x = factor * (256 high + low), two rows of bytes for each row of x. A row is, for
// each record and lane quarter t, the bytes of the record's four steps of eight columns. With them
// go the factors and the sums of the integers over each unit. Called by all workers; ends with a
// barrier of theirs.
template <class T, int B>
__device__ void stage_bytes(const VectorArgs<T>& args, XPart<T>& part, unsigned char* shared,
                            int c0, int c1) {
  constexpr unsigned lanes = 0xffffffffU;  // each 16 of them hold 128 columns
  const bool normed = args.norm != nullptr;
  const float inverse = normed ? part.inverse_rms(args) : 1.0F;
  part.each(args, c0, c1, [&](int c, bool inside, const Pack<T, 8>& x, const Pack<T, 8>& w) {
    std::uint32_t pair[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      pair[e] = pair_bits(x, e);
      if (normed) {
        const float2 v = unpack2<T>(pair[e]);
        // One rounding of an exact product, as round_through<T>(a * b) in f32.
        pair[e] = multiply2<T>(pack2<T>(v.x * inverse, v.y * inverse), pair_bits(w, e));
      }
    }
    // The largest, compared as integers, so that NaN is above all.
    std::uint32_t largest = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = __vmaxu2(largest, pair[e] & 0x7fff7fffU);
    largest = max(largest & 0xffffU, largest >> 16);
#pragma unroll
    for (int d = 1; d < 16; d *= 2) {
      largest = max(largest, __shfl_xor_sync(lanes, largest, d));
    }
    const float top = unpack2<T>(largest).x;
    const std::uint32_t top_bits = __float_as_uint(top);
    // A power of two by which the largest becomes 2^14 .. 2^15; exponents kept within those of
    // normal numbers.
    int exponent = max(static_cast<int>(top_bits >> 23) - 126, -100);
    float scale = __uint_as_float(static_cast<std::uint32_t>(15 - exponent + 127) << 23);
    // 32639 = 127 * 256 + 127 is the largest number of two signed bytes.
    if (top * scale > 32639.0F) {
      ++exponent;
      scale *= 0.5F;
    }
    float factor = __uint_as_float(static_cast<std::uint32_t>(exponent - 15 + 127) << 23);
    if (top_bits >= 0x7f800000U) factor = __uint_as_float(0x7fffffffU);  // NaN makes NaN
    // q + 128 in the low bits of a float: its byte 1 is `high`, byte 0 is `low` + 128.
    std::uint32_t q[8];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 v = unpack2<T>(pair[e]);
      q[2 * e] = __float_as_uint(fmaf(v.x, scale, magic_float + 128.0F));
      q[2 * e + 1] = __float_as_uint(fmaf(v.y, scale, magic_float + 128.0F));
    }
    uint2 bytes[2];  // high, low
    const auto gather = [&](int first, unsigned select) {
      const auto at = [&](int i) { return q[byte_column<B>(first + i)]; };
      return __byte_perm(__byte_perm(at(0), at(1), select), __byte_perm(at(2), at(3), select),
                         0x5410);
    };
    bytes[0] = {gather(0, 0x0051), gather(4, 0x0051)};
    bytes[1] = {gather(0, 0x0040) ^ 0x80808080U, gather(4, 0x0040) ^ 0x80808080U};
    const auto byte_sum = [](uint2 b) {
      constexpr int ones = 0x01010101;
      return __dp4a(static_cast<int>(b.y), ones, __dp4a(static_cast<int>(b.x), ones, 0));
    };
    std::int32_t sum = 256 * byte_sum(bytes[0]) + byte_sum(bytes[1]);
    // Sums over 32, 64 or 128 columns.
    sum += __shfl_xor_sync(lanes, sum, 1);
    sum += __shfl_xor_sync(lanes, sum, 2);
    if (args.sum_shift > 5) sum += __shfl_xor_sync(lanes, sum, 4);
    if (args.sum_shift > 6) sum += __shfl_xor_sync(lanes, sum, 8);
    if (!inside) return;
    const unsigned local = static_cast<unsigned>(c - c0);
    unsigned char* to = shared + 2 * part.r * args.x_row_bytes + local / 128 * 128 +
                        local / 8 % 4 * 32 + local / 32 % 4 * 8;
    *reinterpret_cast<uint2*>(to) = bytes[0];
    *reinterpret_cast<uint2*>(to + args.x_row_bytes) = bytes[1];
    if ((local & ((1U << args.sum_shift) - 1U)) == 0) {
      float* sums = reinterpret_cast<float*>(shared + args.sum_offset) + part.r * args.sum_row;
      sums[local >> args.sum_shift] = static_cast<float>(sum);
    }
    if (local % 128 == 0) {
      float* factors =
          reinterpret_cast<float*>(shared + args.factor_offset) + part.r * args.factor_row;
      factors[local / 128] = factor;
    }
  });
  barrier_workers();
}

// Where a warp's next records are: those of its row tiles, one after another, through all phases.
template <class T, class C>
struct RecordSource {
  const unsigned char* from;  // the next record
  int phase = 0;
  int unit;       // of which it is
  int left = 0;   // records left in the unit; 0: nothing is left at all
  int count = 0;  // records of a unit
  int step = 0;   // bytes from the end of a unit's records to the next unit's; 0: not regular

  // To the unit, or to the first one of a later phase.
  __device__ void aim(const VectorPhases<T>& all, int half, int part) {
    ColumnRange<T> range(all.phase[phase], part, C::kParts);
    while (unit >= all.phase[phase].units || range.begin == range.end) {
      if (++phase >= phases_of(all)) return;
      range = ColumnRange<T>(all.phase[phase], part, C::kParts);
      unit = static_cast<int>(blockIdx.x);
    }
    const VectorArgs<T>& args = all.phase[phase];
    left = count = range.end - range.begin;
    int segment = 0;
    int tile = 0;
    find_tile(args, unit, half, segment, tile);
    const VectorWeight<T>& w = args.weight[segment];
    // A tile beyond the last is read as the last; finish() drops its rows.
    tile = min(tile, w.tiles - 1);
    from = w.data + (std::int64_t{tile} * args.blocks + range.begin) * args.record_bytes;
    step = args.unit_step;
    if (step != 0) step -= count * args.record_bytes;
  }

  // Past n records of the unit, which has as many.
  __device__ void advance(const VectorPhases<T>& all, int n, int record_bytes, int half, int part) {
    const int bytes = n * record_bytes;
    from += bytes;
    left -= n;
    if (left > 0) return;
    unit += static_cast<int>(gridDim.x);
    if (step == 0 || unit >= all.phase[phase].units) return aim(all, half, part);
    from += step;
    left = count;
  }
};

// out[n, r] = sum over k of x[n, k] w[r, k], for up to 4 NT rows n of x.
//
// As vector_half_kernel, but the products are of integers (m16n8k32 on bytes), which halves the
// work of unpacking: codes are bytes as soon as they are masked. x is taken as 16-bit integers
// relative to the largest of each 128 columns, split into two bytes that stand in neighbouring
// columns of B, so that one lane gets both sums. Integer sums are exact; they leave the tensor
// cores as bits of floats. bf16 values of at least 1/64 of the largest are exact, others to 2^-15
// of the largest. Each warp has a ring of stages of kRecords records. Preconditions: x_row_bytes =
// 16 mod 128; the rest as vector_half_kernel. Cost: the weights read once; x once per block; 0.7
// instructions per weight and lane at 4 bits.
template <class T, int B, int NT, int kMode>
__global__ void __launch_bounds__(vector_threads, 1)
    vector_int_kernel(const __grid_constant__ VectorPhases<T> all) {
  extern __shared__ __align__(128) unsigned char shared[];
  using C = IntPlan<B>;
  constexpr int parts = C::kParts;
  constexpr bool kPlain = kMode == vector_plain;
  constexpr bool kFine = kMode == vector_fine;
  // Plain: sizes are constants. What concerns the ring is the same in all phases.
  const VectorArgs<T>& common = all.phase[0];
  const int record_bytes = kPlain ? C::kCodeBytes + 48 : common.record_bytes;
  const int stage_size = C::kRecords * record_bytes;
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // From one lane to all: the compiler then knows that it is the same for the whole warp.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  __shared__ VectorMeeting meeting;
  if (threadIdx.x == 0) meeting_begin(meeting);
  if (warp >= vector_warps) return finish_phases<T, parts>(all, shared, meeting);
  const int g = lane / 4;
  const int t = lane % 4;
  const int half = warp % 2;
  const int part_of = warp / 2;

  const int ring = common.ring_offset + warp * common.stages * stage_size;
  const auto ring_end = static_cast<std::uint32_t>(common.stages * stage_size);
  const std::uint32_t base = kept_address(shared);
  const std::uint32_t ring_address = base + static_cast<std::uint32_t>(ring);
  RecordSource<T, C> source;
  source.unit = static_cast<int>(blockIdx.x);
  source.aim(all, half, part_of);
  // The stage to use and then to fill again, in bytes.
  std::uint32_t use = 0;
#if __CUDA_ARCH__ >= 900
  __shared__ std::uint64_t arrivals[vector_warps][C::kStages];
  const std::uint32_t barriers = kept_address(arrivals[warp]);
  if (lane == 0) {
    for (int s = 0; s < C::kStages; ++s) bulk_init(barriers + 8 * s);
    bulk_fence();
  }
  __syncwarp();
  std::uint32_t use_barrier = 0;
  std::uint32_t parity = 0;  // of the stages' next arrivals
#endif
  const auto request = [&] {
    if (source.left > 0) {
      const int n = min(C::kRecords, source.left);
#if __CUDA_ARCH__ >= 900
      if (elect()) {
        bulk_expect(barriers + use_barrier, n * record_bytes);
        bulk_copy(ring_address + use, source.from, n * record_bytes, barriers + use_barrier);
      }
#else
      for (int i = lane * 16; i < n * record_bytes; i += 512) {
        copy_async_16(ring_address + use + i, source.from + i);
      }
#endif
      source.advance(all, n, record_bytes, half, part_of);
    }
#if __CUDA_ARCH__ >= 900
    use_barrier += 8;
    if (use + stage_size == ring_end) use_barrier = 0;
#else
    copy_commit();
#endif
    use += static_cast<std::uint32_t>(stage_size);
    if (use == ring_end) use = 0;
  };
  int round = 0;
#pragma unroll 1
  for (int p = 0; p < phases_of(all); ++p) {
    const VectorArgs<T>& args = all.phase[p];
    const int slice_begin = args.slice_start[blockIdx.y];
    const ColumnRange<T> range(args, part_of, parts);
    XPart<T> x_part;
    x_part.begin(args, slice_begin * 128);
    if (p == 0) {
      request();
      chain_wait();
    }
    __syncthreads();  // the meeting has begun, or the finishing warps have met the other blocks
    x_part.load(args);
    if (p == 0) {
      // Only now: x would wait behind them.
#pragma unroll 1
      for (int s = 1; s < common.stages; ++s) request();
    }
    stage_bytes<T, B>(args, x_part, shared, slice_begin * 128,
                      args.slice_start[blockIdx.y + 1] * 128);

    // The lane's columns of B: high bytes of a row of x if g is even, low ones if odd. Its columns
    // of C are those of row n * 4 + t of x. Their offsets in shared memory for n = 0; those of the
    // others follow in even steps, as there is room for all 4 NT rows. With NT = 1 there may be
    // less.
    const int last = NT == 1 ? args.rows - 1 : 3;
    const std::uint32_t x_row = base + (2 * min(g / 2, last) + g % 2) * args.x_row_bytes + 32 * t;
    const std::uint32_t sum_row = base + args.sum_offset + min(t, last) * args.sum_row * 4;
    const std::uint32_t factor_row = base + args.factor_offset + min(t, last) * args.factor_row * 4;
    const std::int32_t magic[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
    const int items = 16 * args.rows;
#pragma unroll 1
    for (int unit = static_cast<int>(blockIdx.x); unit < args.units;
         unit += static_cast<int>(gridDim.x)) {
      [[maybe_unused]] const unsigned char* row_unit = nullptr;
      if (kMode == vector_coarse && args.units_per_record == 0) {
        int segment = 0;
        int tile = 0;
        find_tile(args, unit, half, segment, tile);
        const VectorWeight<T>& w = args.weight[segment];
        row_unit = w.row_units + std::int64_t{min(tile, w.tiles - 1)} * args.unit_bytes;
      }
      float acc[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = 0.0F;
      // The record at `at`, columns 128 local .. of x.
      const auto multiply = [&](std::uint32_t at, const unsigned char* record, int local) {
        std::uint32_t low[2 * C::kLow];
        [[maybe_unused]] std::uint32_t high[8];
        std::int32_t part[NT][4];
        uint4 b[NT];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          if (u % 2 == 0) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              b[n] = shared_16(x_row + n * 8 * args.x_row_bytes + local * 128 + 8 * u);
            }
          }
          load_code_plane<C::kLow>(at + lane * 16, lane, u, low);
          if constexpr (B == 8) load_code_plane<4>(at + lane * 16 + 1024, lane, u, high);
          std::uint32_t a[4];
          code_bytes<B>(low, high, u, a);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const std::uint32_t b0 = u % 2 == 0 ? b[n].x : b[n].z;
            const std::uint32_t b1 = u % 2 == 0 ? b[n].y : b[n].w;
            if (u == 0 || kFine) {
              mma_bytes(part[n], a, b0, b1, magic);
            } else {
              mma_bytes(part[n], a, b0, b1, part[n]);
            }
          }
          if (u != 3 && !kFine) continue;
          // Fine groups: the coefficients of the unit that these 32 columns belong to, the sums of
          // x for groups of 64 counted at its second half only.
          int index = 0;
          bool counted = true;
          if constexpr (kFine) {
            index = args.units_per_record == 4 ? u : u / 2;
            counted = args.units_per_record == 4 || u % 2 == 1;
          }
          float2 scale;
          float2 zero;
          if constexpr (kPlain) {
            scale = unpack2<__half>(shared_4(at + C::kCodeBytes + 4 * g));
            const std::uint32_t z = shared_2(at + C::kCodeBytes + 32 + 2 * g);
            zero = {static_cast<float>(z & 0xffU), static_cast<float>(z >> 8)};
          } else if (!kFine && args.units_per_record == 0) {
            load_unit(args, row_unit, 2 * g, scale, zero);
          } else {
            load_unit(args, record + C::kCodeBytes + index * args.unit_bytes, 2 * g, scale, zero);
          }
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const float factor = shared_float(factor_row + (n * 4 * args.factor_row + local) * 4);
            float sum = 0;
            if (counted) {
              const int place = local * (kFine ? args.units_per_record : 1) + index;
              sum = shared_float(sum_row + (n * 4 * args.sum_row + place) * 4);
            }
            constexpr auto odd = static_cast<float>(odd_factor<B>);
            const float top = fmaf(256.0F, from_magic(part[n][0]), from_magic(part[n][1]));
            const float bottom = fmaf(256.0F, from_magic(part[n][2]), from_magic(part[n][3]));
            acc[n][0] = fmaf(scale.x * factor, fmaf(-zero.x, sum, top), acc[n][0]);
            acc[n][1] = fmaf(scale.y * (factor / odd), fmaf(-zero.y, sum * odd, bottom), acc[n][1]);
          }
        }
      };
#pragma unroll 1
      for (int block = range.begin; block < range.end; block += C::kRecords) {
#if __CUDA_ARCH__ >= 900
        bulk_wait(barriers + use_barrier, parity);
#else
        if (common.stages == 8) {
          copy_wait<7>();
        } else if (common.stages >= 4) {
          copy_wait<3>();
        } else {
          copy_wait<1>();
        }
        __syncwarp();  // what other lanes have copied
#endif
        const int local = block - slice_begin;
        const std::uint32_t at = ring_address + use;
        const unsigned char* record = shared + ring + use;
        // Together if there are registers for it.
        if (NT == 1 && block + C::kRecords <= range.end) {
#pragma unroll
          for (int i = 0; i < C::kRecords; ++i) {
            multiply(at + i * record_bytes, record + i * record_bytes, local + i);
          }
        } else {
          const int n = min(C::kRecords, range.end - block);
#pragma unroll 1
          for (int i = 0; i < n; ++i) {
            multiply(at + i * record_bytes, record + i * record_bytes, local + i);
          }
        }
        __syncwarp();  // all lanes have left the stage
        request();
#if __CUDA_ARCH__ >= 900
        if (use == 0) parity ^= 1;
#endif
      }

      const int buffer = round % 2;
      if (round >= 2) meeting_wait(meeting.free[buffer], round / 2 - 1);
      ++round;
      float* red =
          reinterpret_cast<float*>(shared + args.red_offset) + buffer * (parts * 2) * items;
      float* mine = red + (part_of * 2 + half) * items + g;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n * 4 + t < args.rows) {
          mine[(n * 4 + t) * 16] = acc[n][0];
          mine[(n * 4 + t) * 16 + 8] = acc[n][1];
        }
      }
      meeting_arrive(meeting.full[buffer]);
    }
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
