// The kernel behind vector_product for dense weights and for codes that become 16-bit numbers: 1,
// 5, 6 and 7 bits, codebooks, pairs of one-bit terms.
#pragma once

#include "cuda/vector_finish.cuh"
#include "cuda/vector_x.cuh"

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
  static constexpr int kParts = vector_warps / 2;
  static constexpr int stages(int row_tiles) { return row_tiles == 1 ? 5 : 2; }
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

// What a warp streams: the records (or rows) of its row tiles, one block of columns after
// another.
template <class T, class C>
struct VectorSource {
  const unsigned char* from;       // the lane's place in the next block
  int unit;                        // of which it is; beyond args.units: no more
  int left = 0;                    // blocks left in the unit
  std::int64_t row_bytes = 0;      // dense: from row g to row g + 8
  int columns_left = 0;            // dense: from the lane's first column
  bool valid[2] = {false, false};  // dense: rows g and g + 8 exist

  __device__ void aim(const VectorArgs<T>& args, int half, int begin, int end, int lane) {
    if (unit >= args.units) return;
    left = end - begin;
    int segment = 0;
    int tile = 0;
    find_tile(args, unit, half, segment, tile);
    const VectorWeight<T>& w = args.weight[segment];
    if constexpr (C::kDense) {
      const int row = tile * 16 + lane / 4;
      const int column = begin * C::kBlockCols + lane % 4 * 8;
      valid[0] = row < w.rows;
      valid[1] = row + 8 < w.rows;
      row_bytes = 8 * w.stride * 2;
      columns_left = args.cols - column;
      from = w.data + (row * w.stride + column) * 2;
    } else {
      // A tile beyond the last is read as the last; finish() drops its rows.
      from = w.data +
             (std::int64_t{min(tile, w.tiles - 1)} * args.blocks + begin) * args.record_bytes +
             lane * 16;
    }
  }

  __device__ void advance(const VectorArgs<T>& args, int record_bytes, int half, int begin, int end,
                          int lane) {
    from += record_bytes;
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
                       inside ? from + h * row_bytes + 64 * u : args.weight[0].data, inside);
          }
        }
        columns_left -= C::kBlockCols;
        advance(args, C::kBlockCols * 2, half, begin, end, lane);
      } else {
        // Coefficients: at most 512 bytes, twice that for two terms.
        const int rest = record_bytes - C::kCodeBytes - lane * 16;
        request_plane<C::kLow>(to, from, lane);
        if constexpr (C::kHigh > 0) {
          request_plane<C::kHigh>(to + 256 * C::kLow, from + 256 * C::kLow, lane);
        }
        if (rest > 0) copy_async_16(to + C::kCodeBytes, from + C::kCodeBytes);
        if (C::kTerms == 2 && rest > 512) {
          copy_async_16(to + C::kCodeBytes + 512, from + C::kCodeBytes + 512);
        }
        advance(args, record_bytes, half, begin, end, lane);
      }
    }
    copy_commit();
  }
};

// Columns [c0, c1) of x, normalized if asked, into shared memory, and their sums over the columns
// of each unit of a record (each record if coefficients are by row). Called by all workers; ends
// with a barrier of theirs.
template <class T, bool kSums>
__device__ void stage_x(const VectorArgs<T>& args, XPart<T>& part, unsigned char* shared, int c0,
                        int c1) {
  constexpr unsigned lanes = 0xffffffffU;  // each 16 of them hold 128 columns
  const bool normed = args.norm != nullptr;
  const float inverse = normed ? part.inverse_rms(args) : 1.0F;
  part.each(args, c0, c1, [&](int c, bool inside, Pack<T, 8> x, const Pack<T, 8>& w) {
    if (normed) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x.v[e] = from_f32<T>(round_through<T>(to_f32(x.v[e]) * inverse) * to_f32(w.v[e]));
      }
    }
    const unsigned local = static_cast<unsigned>(c - c0);
    if (inside) {
      *reinterpret_cast<Pack<T, 8>*>(shared + part.r * args.x_row_bytes + local * 2) = x;
    }
    if constexpr (kSums) {
      float sum = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += to_f32(x.v[e]);
      sum += __shfl_xor_sync(lanes, sum, 1);
      sum += __shfl_xor_sync(lanes, sum, 2);
      if (args.sum_shift > 5) sum += __shfl_xor_sync(lanes, sum, 4);
      if (args.sum_shift > 6) sum += __shfl_xor_sync(lanes, sum, 8);
      if (inside && (local & ((1U << args.sum_shift) - 1U)) == 0) {
        float* sums = reinterpret_cast<float*>(shared + args.sum_offset);
        sums[part.r * args.sum_row + (local >> args.sum_shift)] = sum;
      }
    }
  });
  barrier_workers();
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
    vector_half_kernel(const __grid_constant__ VectorPhases<T> all) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::uint32_t pairs[C::kBook ? 256 : 1];
  using M = HalfMagic<T>;
  constexpr int stages = C::stages(NT);
  constexpr int parts = C::kParts;
  constexpr bool sums_used = !C::kDense && !C::kBook;
  chain_trigger();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const VectorArgs<T>& args = all.phase[0];  // the only one
  __shared__ VectorMeeting meeting;
  if (threadIdx.x == 0) meeting_begin(meeting);
  if (warp >= vector_warps) {
    if constexpr (C::kBook) {
      for (int i = lane; i < 256; i += 32)
        pairs[i] = pack2<T>(args.book[i % 16], args.book[i / 16]);
    }
    return finish_phases<T, parts>(all, shared, meeting);
  }
  const int g = lane / 4;
  const int t = lane % 4;
  const int half = warp % 2;
  const int part_of = warp / 2;

  const int ring = args.ring_offset + warp * args.stages * args.stage_bytes + lane * 16;
  const std::uint32_t base = kept_address(shared);
  const std::uint32_t ring_address = base + static_cast<std::uint32_t>(ring);
  const auto ring_end = static_cast<std::uint32_t>(args.stages * args.stage_bytes);
  const int slice_begin = args.slice_start[blockIdx.y];
  const ColumnRange<T> range(args, part_of, parts);
  VectorSource<T, C> source;
  source.unit = range.begin < range.end ? static_cast<int>(blockIdx.x) : args.units;
  source.aim(args, half, range.begin, range.end, lane);
  std::uint32_t fill = 0;  // the stage to fill next, in bytes
  const auto request = [&] {
    source.request(args, args.record_bytes, ring_address + fill, half, range.begin, range.end,
                   lane);
    fill += static_cast<std::uint32_t>(args.stage_bytes);
    if (fill == ring_end) fill = 0;
  };
  std::uint32_t use = 0;  // the stage to use next, in bytes
  int round = 0;
  XPart<T> x_part;
  x_part.begin(args, slice_begin * C::kBlockCols);
  // Two stages before x, which would wait behind more.
  const int early = min(2, args.stages - 1);
#pragma unroll 1
  for (int s = 0; s < early; ++s) request();
  chain_wait();
  __syncthreads();  // the meeting has begun
  x_part.load(args);
#pragma unroll 1
  for (int s = early; s < args.stages - 1; ++s) request();
  stage_x<T, sums_used>(args, x_part, shared, slice_begin * C::kBlockCols,
                        args.slice_start[blockIdx.y + 1] * C::kBlockCols);

  // The lane's rows of x: those of its columns of B and, for the sums, of C.
  // Their offsets in shared memory for n = 0; those of the others follow in even steps, as there
  // is room for all 8 NT rows. With NT = 1 there may be less.
  const int last = NT == 1 ? args.rows - 1 : 7;
  const std::uint32_t x_row = base + min(g, last) * args.x_row_bytes + 16 * t;
  [[maybe_unused]] std::uint32_t sum_row[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    sum_row[e] = base + args.sum_offset + min(2 * t + e, last) * args.sum_row * 4;
  }
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
    for (int block = range.begin; block < range.end; ++block) {
      if (args.stages == stages) {
        copy_wait<stages - 2>();
      } else {
        copy_wait<0>();  // a shorter ring waits for all that is on its way
      }
      __syncwarp();
      request();
      const std::uint32_t at = ring_address + use;
      [[maybe_unused]] const unsigned char* record = shared + ring - lane * 16 + use;
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
          const uint4 v = shared_16(x_row + n * 8 * args.x_row_bytes + x_offset + 64 * u);
          b[n][0] = v.x;
          b[n][1] = v.y;
          b[n][2] = v.z;
          b[n][3] = v.w;
        }
        if constexpr (C::kDense) {
          const uint4 top = shared_16(at + 2 * u * 512);
          const uint4 bottom = shared_16(at + (2 * u + 1) * 512);
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
          // Fine groups: the coefficients of the unit that these 32 columns belong to, the sums
          // of x for groups of 64 counted at its second half only.
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
                                ? shared_float(sum_row[e] + (n * 8 * args.sum_row + sum_index) * 4)
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
              load_unit(args, record + C::kCodeBytes + index * args.unit_bytes, place, scale, zero);
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
    if (round >= 2) meeting_wait(meeting.free[buffer], round / 2 - 1);
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
    meeting_arrive(meeting.full[buffer]);
  }
}

template <class T, class C>
VectorKernel<T> pick_half(bool two_tiles, bool fine) {
  if (two_tiles)
    return fine ? vector_half_kernel<T, C, 2, true> : vector_half_kernel<T, C, 2, false>;
  return fine ? vector_half_kernel<T, C, 1, true> : vector_half_kernel<T, C, 1, false>;
}

}  // namespace engine
