// The kernel behind vector_product for dense weights and for codes that become 16-bit numbers: 1,
// 5, 6 and 7 bits, codebooks, pairs of one-bit terms.
#pragma once

#include "cuda/vector_common.cuh"

namespace engine {

// How weights lie in a stage and become fragments.
// Affine: planes of kLow and kHigh bits. kTerms 2: two one-bit terms. kBook: codebook.
template <int kLowBits, int kHighBits, int kTermCount, bool kIsBook>
struct HalfCodec {
  static constexpr bool kDense = false;
  static constexpr int kLow = kLowBits;
  static constexpr int kHigh = kHighBits;
  static constexpr int kTerms = kTermCount;
  static constexpr bool kBook = kIsBook;
  static constexpr int kBlockCols = 128;
  static constexpr int kCodeBytes = 256 * (kLow + kHigh);
  static constexpr int kTiles = 1;
  static constexpr int kParts = vector_warps / 2;
  // For up to eight rows of x, and for more, whose x needs the room.
  static constexpr int stages(int row_tiles) {
    // With the most that coefficients may take.
    const int n = 8 * 1024 / (kCodeBytes + 320 * kTerms);
    return n / row_tiles > 2 ? (n / row_tiles < 16 ? n / row_tiles : 16) : 2;
  }
};
struct DenseCodec {
  static constexpr bool kDense = true;
  static constexpr int kLow = 0, kHigh = 0, kTerms = 0;
  static constexpr bool kBook = false;
  static constexpr int kBlockCols = 64;
  static constexpr int kCodeBytes = 16 * 64 * 2;
  static constexpr int kTiles = 1;
  static constexpr int kParts = vector_warps / 2;
  static constexpr int stages(int row_tiles) { return row_tiles == 1 ? 4 : 2; }
};

// (a & b) | c
__device__ inline std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// The bits of pair p of a plane on top of `magic`: the code of the even column at bit kUp, of the
// odd one at bit 16 + kUp.
template <int B, int kUp>
__device__ std::uint32_t half_pair_bits(const std::uint32_t (&w)[2 * B], int p,
                                        std::uint32_t magic) {
  constexpr std::uint32_t ones = 0x00010001U << kUp;
  const auto shift = [](std::uint32_t v, int down) { return down >= 0 ? v >> down : v << -down; };
  if constexpr (B == 3) {
    // Byte fields: two codes in each byte of a word, and three words' leftover bits two more.
    const int first = p / 16 * 3;
    const int r = p / 8 % 2 * 4 + p / 4 % 2 * 2 + p % 2;
    const int down = 8 * (p / 2 % 2) - kUp;
    if (r < 6) return and_or(shift(w[first + r / 2], 3 * (r % 2) + down), 7 * ones, magic);
    if (r == 6) {
      return and_or(shift(w[first], 6 + down), 3 * ones,
                    and_or(shift(w[first + 1], 4 + down), 4 * ones, magic));
    }
    return and_or(shift(w[first + 1], 7 + down), ones,
                  and_or(shift(w[first + 2], 5 + down), 6 * ones, magic));
  } else {
    constexpr int per_word = 16 / B;
    constexpr std::uint32_t mask = ((1U << B) - 1U) * ones;
    return and_or(shift(w[p / per_word], B * (p % per_word) - kUp), mask, magic);
  }
}

// What turns code bits into numbers of T that are exact in a product:
// bf16: bits on top of an exponent whose last place is the code's: 128 + code, 2048 + 16 code.
// f16: the bits alone are the subnormal code * 2^-24, which tensor cores multiply exactly.
template <class T>
struct HalfMagic;
template <>
struct HalfMagic<__nv_bfloat16> {
  static constexpr int kHighUp = 0;
  static constexpr std::uint32_t kLow = 0x43004300U;
  static constexpr std::uint32_t kHigh = 0x45004500U;
  static constexpr float kLowOffset = 128.0F;
  static constexpr float kHighOffset = 2048.0F;
  static constexpr float kUnit = 1.0F;
};
template <>
struct HalfMagic<__half> {
  static constexpr int kHighUp = 4;
  static constexpr std::uint32_t kLow = 0;
  static constexpr std::uint32_t kHigh = 0;
  static constexpr float kLowOffset = 0.0F;
  static constexpr float kHighOffset = 0.0F;
  static constexpr float kUnit = 16777216.0F;  // 2^24
};

// acc (fragment C of 16 rows x 8 columns) += scale * (unit * part - zero * sum), rows g (x) and g +
// 8 (y); sum[n] are the sums of x for columns 2t and 2t + 1.
template <int NT>
__device__ void add_scaled(float (&acc)[NT][4], const float (&part)[NT][4],
                           const float (&sum)[NT][2], float2 scale, float2 zero, float unit) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      acc[n][e] = fmaf(scale.x, fmaf(-zero.x, sum[n][e], unit * part[n][e]), acc[n][e]);
      acc[n][e + 2] = fmaf(scale.y, fmaf(-zero.y, sum[n][e], unit * part[n][e + 2]), acc[n][e + 2]);
    }
  }
}

template <int NT>
__device__ void clear(float (&a)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) a[n][e] = 0.0F;
  }
}

// Columns [c0, c1) of x, normalized if asked, into shared memory, and their sums over the columns
// of each unit of a record (each record if coefficients are by row). Called by all threads of the
// block; ends with a barrier.
template <class T, bool kSums>
__device__ void stage_x(const VectorArgs<T>& args, XPart<T>& part, unsigned char* shared, int c0,
                        int c1) {
  const bool normed = args.norm != nullptr;
  const float inverse = normed ? part.inverse_rms(args) : 1.0F;
  if (part.mine) {
    unsigned char* to = shared + part.r * args.x_row_bytes - c0 * 2;
    // Whole groups of 16 threads, 128 columns, take part in every step.
    int k = ((c0 & -part.step) - part.base) / part.step;
#pragma unroll 1
    for (int c = (c0 & -part.step) + part.first; c < c1; c += part.step, ++k) {
      if (c < c0) continue;
      Pack<T, 8> p = part.x_at(args, k, c);
      if (normed) {
        const Pack<T, 8> w = part.w_at(args, k, c);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          p.v[e] = from_f32<T>(round_through<T>(to_f32(p.v[e]) * inverse) * to_f32(w.v[e]));
        }
      }
      *reinterpret_cast<Pack<T, 8>*>(to + c * 2) = p;
      if constexpr (kSums) {
        float sum = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_f32(p.v[e]);
        const unsigned lanes = 0xffffU << (threadIdx.x & 16);
        sum += __shfl_xor_sync(lanes, sum, 1);
        sum += __shfl_xor_sync(lanes, sum, 2);
        if (args.units_per_record < 4) sum += __shfl_xor_sync(lanes, sum, 4);
        if (args.units_per_record < 2) sum += __shfl_xor_sync(lanes, sum, 8);
        if ((c & (args.sum_cols - 1)) == 0) {
          float* sums = reinterpret_cast<float*>(shared + args.sum_offset);
          sums[part.r * args.sum_row + (c - c0) / args.sum_cols] = sum;
        }
      }
    }
  }
  __syncthreads();
}

// out[n, r] = sum over k of x[n, k] w[r, k], for up to 8 NT rows n of x.
//
// Launch: grid (columns of blocks, slices), 640 threads, one block per multiprocessor. A block
// walks over pairs of row tiles (16 rows each), working warps of even number on the first, of odd
// number on the second; the eight warps of a tile divide the columns of the slice. Weights are the
// A operand of m16n8k16 products, straight from the codes; x (B) waits in shared memory in the
// order of columns. Each lane copies exactly the codes that it will use, so its own cp.async.wait
// orders them, and a warp barrier those of the coefficients. The ring runs on over the pairs, and
// is filled while the preceding kernel of the chain is still running elsewhere. Products of a group
// are summed with the codes as integers and scaled once; the zero goes with the sum of x over the
// group. Partial sums of the warps meet in shared memory, where four other warps add them, so that
// the workers need not wait; those of slices meet in `partials`, and the last slice to arrive adds
// them in order, so that results repeat. kFine: groups of 32 or 64 columns. Preconditions:
// x_row_bytes = 64 mod 128; all sizes of VectorArgs as vector_product makes them. Cost: the weights
// read once; x once per block; 1.2 instructions per weight and lane.
template <class T, class C, int NT, bool kFine>
__global__ void __launch_bounds__(vector_threads, 1)
    vector_half_kernel(const __grid_constant__ VectorArgs<T> args) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::uint32_t pairs[C::kBook ? 256 : 1];
  using M = HalfMagic<T>;
  constexpr int stages = C::stages(NT);
  constexpr int parts = C::kParts;
  constexpr bool sums_used = !C::kDense && !C::kBook;
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int slice_begin = args.slice_start[blockIdx.y];
  const int slice_end = args.slice_start[blockIdx.y + 1];
  if (warp >= vector_warps) {
    if constexpr (C::kBook) {
      for (int i = lane; i < 256; i += 32)
        pairs[i] = pack2<T>(args.book[i % 16], args.book[i / 16]);
    }
    XPart<T> x_part;
    x_part.begin(args, slice_begin * C::kBlockCols);
    chain_wait();
    stage_x<T, sums_used>(args, x_part, shared, slice_begin * C::kBlockCols,
                          slice_end * C::kBlockCols);
    finish_units<T, parts>(args, shared);
    return;
  }
  const int g = lane / 4;
  const int t = lane % 4;
  const int half = warp % 2;
  const int part_of = warp / 2;
  const int begin = slice_begin + (slice_end - slice_begin) * part_of / parts;
  const int end = slice_begin + (slice_end - slice_begin) * (part_of + 1) / parts;

  const int ring = args.ring_offset + warp * args.stages * args.stage_bytes + lane * 16;
  const std::uint32_t ring_address = shared_address(shared) + static_cast<std::uint32_t>(ring);
  const std::uint32_t ring_end = static_cast<std::uint32_t>(args.stages * args.stage_bytes);
  VectorSource<T, C> source;
  source.unit = begin < end ? static_cast<int>(blockIdx.x) : args.units;
  source.aim(args, half, begin, end, lane);
  std::uint32_t fill = 0;  // the stage to fill next, in bytes
  XPart<T> x_part;
  x_part.begin(args, slice_begin * C::kBlockCols);
#pragma unroll 1
  for (int s = 0; s < args.stages - 1; ++s) {
    source.request(args, args.record_bytes, ring_address + fill, half, begin, end, lane);
    fill += static_cast<std::uint32_t>(args.stage_bytes);
  }
  chain_wait();
  x_part.load(args);
  stage_x<T, sums_used>(args, x_part, shared, slice_begin * C::kBlockCols,
                        slice_end * C::kBlockCols);

  // The lane's rows of x: those of its columns of B and, for the sums, of C.
  // Their offsets in shared memory for n = 0; those of the others follow in even steps, as there is
  // room for all 8 NT rows. With NT = 1 there may be less.
  const int last = NT == 1 ? args.rows - 1 : 7;
  const int x_row = min(g, last) * args.x_row_bytes + 16 * t;
  [[maybe_unused]] int sum_row[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    sum_row[e] = args.sum_offset + min(2 * t + e, last) * args.sum_row * 4;
  }
  std::uint32_t use = 0;  // the stage to use next, in bytes
  int round = 0;
  const int items = 16 * args.rows;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < args.units;
       unit += static_cast<int>(gridDim.x)) {
    [[maybe_unused]] const unsigned char* row_unit = nullptr;
    if (!C::kDense && !kFine && args.units_per_record == 0) {
      int segment = 0;
      int tile = 0;
      find_tile(args, unit, half, segment, tile);
      const VectorWeight<T>& w = args.weight[segment];
      row_unit = w.row_units + std::int64_t{min(tile, w.tiles - 1)} * args.unit_bytes;
    }
    float acc[NT][4];
    clear(acc);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      if (args.stages == stages) {
        copy_wait<stages - 2>();
      } else {
        copy_wait<0>();  // a shorter ring waits for all that is on its way
      }
      __syncwarp();
      source.request(args, args.record_bytes, ring_address + fill, half, begin, end, lane);
      fill += static_cast<std::uint32_t>(args.stage_bytes);
      if (fill == ring_end) fill = 0;
      const unsigned char* at = shared + ring + use;
      use += static_cast<std::uint32_t>(args.stage_bytes);
      if (use == ring_end) use = 0;
      const int x_offset = (block - slice_begin) * (C::kBlockCols * 2);

      [[maybe_unused]] std::uint32_t low[C::kDense ? 1 : 2 * C::kLow];
      [[maybe_unused]] std::uint32_t high[C::kHigh > 0 ? 2 * C::kHigh : 1];
      [[maybe_unused]] float part[NT][4];
      [[maybe_unused]] float part2[NT][4];
#pragma unroll
      for (int u = 0; u < C::kBlockCols / 32; ++u) {
        std::uint32_t b[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint4 v = *reinterpret_cast<const uint4*>(
              shared + x_row + n * 8 * args.x_row_bytes + x_offset + 64 * u);
          b[n][0] = v.x;
          b[n][1] = v.y;
          b[n][2] = v.z;
          b[n][3] = v.w;
        }
        if constexpr (C::kDense) {
          const uint4 top = *reinterpret_cast<const uint4*>(at + 2 * u * 512);
          const uint4 bottom = *reinterpret_cast<const uint4*>(at + (2 * u + 1) * 512);
          const std::uint32_t a0[4] = {top.x, bottom.x, top.y, bottom.y};
          const std::uint32_t a1[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma<T>(acc[n], a0, b[n][0], b[n][1]);
            mma<T>(acc[n], a1, b[n][2], b[n][3]);
          }
          continue;
        } else {
          load_code_plane<C::kLow>(at, lane, u, low);
          if constexpr (C::kHigh > 0) load_code_plane<C::kHigh>(at + 256 * C::kLow, lane, u, high);
          if (u == 0 || kFine) {
            clear(part);
            if constexpr (C::kTerms == 2) clear(part2);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const int p = (2 * u + s) * 4;
            std::uint32_t a[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              if constexpr (C::kBook) {
                const std::uint32_t bits = half_pair_bits<C::kLow, 0>(low, p + q, 0);
                a[q] = pairs[(bits | bits >> 12) & 0xffU];
              } else {
                a[q] = half_pair_bits<C::kLow, 0>(low, p + q, M::kLow);
              }
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<T>(part[n], a, b[n][2 * s], b[n][2 * s + 1]);
            if constexpr (C::kHigh > 0) {
              constexpr int up = C::kTerms == 2 ? 0 : M::kHighUp;
              constexpr std::uint32_t magic = C::kTerms == 2 ? M::kLow : M::kHigh;
#pragma unroll
              for (int q = 0; q < 4; ++q) a[q] = half_pair_bits<C::kHigh, up>(high, p + q, magic);
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                mma<T>(C::kTerms == 2 ? part2[n] : part[n], a, b[n][2 * s], b[n][2 * s + 1]);
              }
            }
          }
          if (u != 3 && !kFine) continue;
          // Fine groups: the coefficients of the unit that these 32 columns belong to, the sums of
          // x for groups of 64 counted at its second half only.
          constexpr float offset =
              C::kTerms == 2 || C::kHigh == 0 ? M::kLowOffset : M::kLowOffset + M::kHighOffset;
          int index = 0;
          bool counted = true;
          if constexpr (kFine) {
            index = args.units_per_record == 4 ? u : u / 2;
            counted = args.units_per_record == 4 || u % 2 == 1;
          }
          [[maybe_unused]] float sum[NT][2];
          if constexpr (sums_used) {
            const int sum_index =
                (block - slice_begin) * (kFine ? args.units_per_record : 1) + index;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                sum[n][e] = counted
                                ? *reinterpret_cast<const float*>(
                                      shared + sum_row[e] + (n * 8 * args.sum_row + sum_index) * 4)
                                : 0.0F;
              }
            }
          }
#pragma unroll
          for (int term = 0; term < C::kTerms; ++term) {
            float2 scale;
            float2 zero;
            const int place = term * 16 + 2 * g;
            if (!kFine && args.units_per_record == 0) {
              load_unit(args, row_unit, place, scale, zero);
            } else {
              load_unit(args, at - lane * 16 + C::kCodeBytes + index * args.unit_bytes, place,
                        scale, zero);
            }
            if constexpr (C::kBook) {
#pragma unroll
              for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  acc[n][e] = fmaf(e < 2 ? scale.x : scale.y, part[n][e], acc[n][e]);
                }
              }
            } else {
              zero.x += offset;
              zero.y += offset;
              add_scaled(acc, term == 0 ? part : part2, sum, scale, zero, M::kUnit);
            }
          }
        }
      }
    }

    const int buffer = round % 2;
    if (round >= 2) barrier_sync(barrier_free + buffer);
    ++round;
    float* red = reinterpret_cast<float*>(shared + args.red_offset) + buffer * (parts * 2) * items;
    float* mine = red + (part_of * 2 + half) * items + g;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = n * 8 + 2 * t + e % 2;
        if (column < args.rows) mine[column * 16 + e / 2 * 8] = acc[n][e];
      }
    }
    barrier_arrive(barrier_full + buffer);
  }
}

template <class T, class C>
VectorKernel<T> pick_half(bool two_tiles, bool fine) {
  if (two_tiles)
    return fine ? vector_half_kernel<T, C, 2, true> : vector_half_kernel<T, C, 2, false>;
  return fine ? vector_half_kernel<T, C, 1, true> : vector_half_kernel<T, C, 1, false>;
}

}  // namespace engine
