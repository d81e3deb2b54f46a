// The product kernel of packed_gemm (cuda/packed_gemm.h), for one format and one type of x. The
// formats are spread over packed_gemm_*.cu so that they compile side by side.
#pragma once

#include <cstdint>

#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/packed_gemm_args.cuh"

namespace engine {

// Steps in flight, the one being multiplied included. What fits into 163 KiB in every shape.
template <class Format>
constexpr int gemm_stages = Format::bits <= 4 ? 4 : 3;

// Shared memory: row units, rounded up; then per stage x [tokens, 128] and 16 records. All at
// multiples of 256 bytes.
__host__ __device__ inline int gemm_unit_area(const PackedGemmArgs& args) {
  return args.row_units == nullptr ? 0 : (gemm_block_tiles * args.unit_bytes + 255) / 256 * 256;
}
__host__ __device__ inline int gemm_stage_bytes(const PackedGemmArgs& args, int tokens) {
  return tokens * 256 + gemm_block_tiles * args.record_bytes;
}

// c = a b
template <class T>
__device__ void mma_first(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1) {
  c[0] = c[1] = c[2] = c[3] = 0.0F;
  mma<T>(c, a, b0, b1);
}

// The sums of a warp: 2 row tiles x NT token tiles of 8.
template <int NT>
struct GemmSums {
  float c[2][NT][4];

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < NT; ++n) c[r][n][0] = c[r][n][1] = c[r][n][2] = c[r][n][3] = 0.0F;
    }
  }
};

// A warp's view of one stage.
struct GemmStage {
  const std::uint8_t* record;  // of the warp's first row tile; the second one's follows
  const std::uint8_t* unit;    // the first unit of the first row tile
  int next_unit;               // bytes from there to the second row tile's
  const std::uint8_t* x;       // the tile of x
};

// What a thread copies into shared memory for its block: a few chunks of x and, with its warp, the
// warp's two records. Rows and tokens outside the matrices are copies of the last ones: their
// products are not stored. Columns outside are zeros.
template <class T, class Format, int Tokens>
struct GemmCopier {
  static constexpr int x_rows = gemm_threads / 16;  // at once, 16 chunks of 16 bytes each
  static constexpr int x_copies = Tokens / x_rows;

  const std::uint8_t* x;             // the block's first token, at the next column block
  std::uint32_t x_offset[x_copies];  // from there to the thread's chunks
  const std::uint8_t* record[2];     // of the warp's row tiles, at the next column block
  int columns_left;                  // counted from the thread's chunk

  __device__ GemmCopier(const PackedGemmArgs& args, int k) {
    const int chunk = static_cast<int>(threadIdx.x) % 16;
    const int first = static_cast<int>(blockIdx.x) * Tokens;
    x = static_cast<const std::uint8_t*>(args.x) + (first * args.x_stride + k * 128) * 2;
#pragma unroll
    for (int i = 0; i < x_copies; ++i) {
      const int token = static_cast<int>(threadIdx.x) / 16 + i * x_rows;
      x_offset[i] = static_cast<std::uint32_t>(min(token, args.m - 1 - first)) *
                        static_cast<std::uint32_t>(args.x_stride * 2) +
                    chunk * 16;
    }
    columns_left = args.x_cols - k * 128 - chunk * 8;
    const int tile =
        static_cast<int>(blockIdx.y) * gemm_block_tiles + static_cast<int>(threadIdx.x) / 32 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      record[r] =
          args.records + (std::int64_t{min(tile + r, args.row_tiles - 1)} * args.col_blocks + k) *
                             args.record_bytes;
    }
  }

  // The next column block; asynchronous, not committed.
  __device__ void load(const PackedGemmArgs& args, std::uint32_t stage) {
    const int thread = static_cast<int>(opaque(threadIdx.x));  // as in multiply_record
    const int chunk = thread % 16;
    const int row = thread / 16;
    // Chunks of odd rows are swapped by halves of 128 bytes: see multiply_record.
    const std::uint32_t target = stage + row * 256 + (chunk ^ (row % 2 * 4)) * 16;
#pragma unroll
    for (int i = 0; i < x_copies; ++i) {
      copy_async(target + i * x_rows * 256, x + x_offset[i], columns_left > 0);
    }
    x += 256;
    columns_left -= 128;

    const int lane = thread % 32;
    const std::uint32_t records = stage + Tokens * 256 + thread / 32 * 2 * args.record_bytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::uint32_t to = records + r * args.record_bytes + lane * 16;
#pragma unroll
      for (int i = 0; i < Format::bits / 2; ++i) {
        copy_async(to + i * 512, record[r] + lane * 16 + i * 512, true);
      }
    }
    if constexpr (Format::bits % 2 != 0) {
      copy_chunk(args, records, lane / 16, Format::bits / 2 * 32 + lane % 16);
    }
    constexpr int code_chunks = 16 * Format::bits;
    const int unit_chunks = args.record_bytes / 16 - code_chunks;
#pragma unroll 1
    for (int at = lane; at < 2 * unit_chunks; at += 32) {
      const int second = at >= unit_chunks ? 1 : 0;
      copy_chunk(args, records, second, code_chunks + at - second * unit_chunks);
    }
    record[0] += args.record_bytes;
    record[1] += args.record_bytes;
  }

  __device__ void copy_chunk(const PackedGemmArgs& args, std::uint32_t records, int r, int chunk) {
    copy_async(records + r * args.record_bytes + chunk * 16,
               (r == 0 ? record[0] : record[1]) + chunk * 16, true);
  }

  // The row units of the block, once. They lie one after another; tiles outside get zeros.
  static __device__ void load_row_units(const PackedGemmArgs& args, std::uint32_t shared) {
    const int first = static_cast<int>(blockIdx.y) * gemm_block_tiles;
    const int bytes = min(gemm_block_tiles, args.row_tiles - first) * args.unit_bytes;
    const std::uint8_t* from = args.row_units + std::int64_t{first} * args.unit_bytes;
    for (int byte = static_cast<int>(threadIdx.x) * 16; byte < gemm_block_tiles * args.unit_bytes;
         byte += gemm_threads * 16) {
      copy_async(shared + byte, from + min(byte, bytes - 16), byte < bytes);
    }
  }
};

// sums += scale * part, for one unit. First what the fragments of columns [32 first_u, 32 last_u +
// 32) had too much (Affine::has_excess), which hardly any model has.
template <class T, class Format, int NT>
__device__ void add_unit(GemmSums<NT>& sums, GemmSums<NT>& part, const std::uint8_t* unit,
                         int next_unit, UnitFormat format, const std::uint8_t* x_tile, int x_lane,
                         int g, int first_u, int last_u) {
  if constexpr (Format::has_excess) {
    const uint2 e0 = Format::excess(unit, format, g);
    const uint2 e1 = Format::excess(unit + next_unit, format, g);
    if (__any_sync(0xFFFFFFFFU, (e0.x | e0.y | e1.x | e1.y) != 0)) {
      const auto both = [](std::uint32_t v) {
        return pack2<T>(-static_cast<float>(v), -static_cast<float>(v));
      };
      const std::uint32_t a[2][4] = {{both(e0.x), both(e0.y), both(e0.x), both(e0.y)},
                                     {both(e1.x), both(e1.y), both(e1.x), both(e1.y)}};
#pragma unroll 1
      for (int u = first_u; u <= last_u; ++u) {
        const std::uint8_t* x = x_tile + (x_lane ^ (u * 64));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint4 b = *reinterpret_cast<const uint4*>(x + n * 2048);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mma<T>(part.c[r][n], a[r], b.x, b.y);
            mma<T>(part.c[r][n], a[r], b.z, b.w);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float2 scale = load_scales(unit + r * next_unit, format.scale, g);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      sums.c[r][n][0] = fmaf(scale.x, part.c[r][n][0], sums.c[r][n][0]);
      sums.c[r][n][1] = fmaf(scale.x, part.c[r][n][1], sums.c[r][n][1]);
      sums.c[r][n][2] = fmaf(scale.y, part.c[r][n][2], sums.c[r][n][2]);
      sums.c[r][n][3] = fmaf(scale.y, part.c[r][n][3], sums.c[r][n][3]);
    }
  }
}

// sums += the warp's two records times the tile of x. Small: units of 32 or 64 columns.
//
// In k-steps 2 u and 2 u + 1 lane (g, t) needs, for token tile n, the columns 32 u + 8 t .. + 7 of
// token 8 n + g: one 16-byte chunk, number 4 u + t of its row. Eight neighbouring lanes read chunks
// of two neighbouring rows; with those of odd rows swapped (chunk ^ 4) they touch all 32 banks.
template <class T, class Format, bool Small, int NT>
__device__ void multiply_record(const PackedGemmArgs& args, const GemmStage& stage,
                                const typename Format::Table& table, GemmSums<NT>& sums) {
  // Recomputed for every record: registers are scarce.
  const int lane = static_cast<int>(opaque(threadIdx.x) % 32);
  const int g = lane / 4;
  const int x_lane = g * 256 + (lane % 4 + g % 2 * 4) * 16;
  const int span = Small ? 4 / args.units : 4;  // values of u per unit
  constexpr int at_once = NT / 2;               // token tiles of x in registers
  Format weights[2];
  GemmSums<NT> part;
  GemmSums<NT>& target = Format::scaled ? part : sums;
  const std::uint8_t* unit = stage.unit;
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    // Keeps the instructions of each u together where decoding needs many registers.
    if (Format::bulky && u > 0) __syncwarp();
    weights[0].load(stage.record, lane, u);
    weights[1].load(stage.record + args.record_bytes, lane, u);
    const bool first = u == 0 || (Small && u % span == 0);
    const bool last = u == 3 || (Small && (u + 1) % span == 0);
    if (first) {
      weights[0].begin(unit, args.format, g);
      weights[1].begin(unit + stage.next_unit, args.format, g);
      if (Format::scaled && u > 0) part.clear();
    }
    std::uint32_t a[2][2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      weights[0].fragment(2 * u + s, table, a[s][0]);
      weights[1].fragment(2 * u + s, table, a[s][1]);
    }
    const std::uint8_t* x = stage.x + (x_lane ^ (u * 64));
#pragma unroll
    for (int n0 = 0; n0 < NT; n0 += at_once) {
      uint4 b[at_once];
#pragma unroll
      for (int n = 0; n < at_once; ++n) b[n] = *reinterpret_cast<const uint4*>(x + (n0 + n) * 2048);
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (Format::scaled && u == 0) {
            mma_first<T>(target.c[r][n0 + n], a[0][r], b[n].x, b[n].y);
          } else {
            mma<T>(target.c[r][n0 + n], a[0][r], b[n].x, b[n].y);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) mma<T>(target.c[r][n0 + n], a[1][r], b[n].z, b[n].w);
      }
    }
    if (last) {
      if constexpr (Format::scaled) {
        add_unit<T, Format, NT>(sums, part, unit, stage.next_unit, args.format, stage.x, x_lane, g,
                                u + 1 - span, u);
      }
      unit += args.unit_bytes;
    }
  }
}

// Through shared memory, so that neighbouring threads store neighbouring rows of out: f32
// [tokens, 256 + 4]; the four columns more keep the eight rows and four tokens that a warp stores
// at once in different banks.
template <class T, int NT>
__device__ void store_block(const PackedGemmArgs& args, const GemmSums<NT>& sums, float* shared) {
  constexpr int stride = gemm_block_rows + 4;
  static_assert(stride % 4 == 0 && stride * 2 % 32 == 8);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* mine = shared + lane % 4 * 2 * stride + threadIdx.x / 32 * 32 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float* to = mine + n * 8 * stride + r * 16;
      to[0] = sums.c[r][n][0];
      to[stride] = sums.c[r][n][1];
      to[8] = sums.c[r][n][2];
      to[stride + 8] = sums.c[r][n][3];
    }
  }
  __syncthreads();

  constexpr int quads = gemm_block_rows / 4;
  const int row_in_block = static_cast<int>(threadIdx.x) % quads * 4;
  const int row = static_cast<int>(blockIdx.y) * gemm_block_rows + row_in_block;
  const int first = static_cast<int>(blockIdx.x) * NT * 8;
  const int tokens = min(NT * 8, args.m - first);
  if (row >= args.rows) return;
#pragma unroll 1
  for (int n = static_cast<int>(threadIdx.x) / quads; n < tokens; n += gemm_threads / quads) {
    const float4 v = *reinterpret_cast<const float4*>(shared + n * stride + row_in_block);
    const int token = first + n;
    if (args.splits > 1) {
      const std::int64_t line = std::int64_t{blockIdx.z} * args.m + token;
      *reinterpret_cast<float4*>(args.partial + line * args.partial_stride + row) = v;
    } else {
      store_rows<T>(args, token, row, v);
    }
  }
}

// out (+)= x w^T, or the partial sums of one split of the columns.
//
// Shapes: x [m, x_cols], out [m, rows], T f16 or bf16; w in records
// (engine/weight/packed_weight.h).
//
// Launch: gemm_grid, 256 threads, gemm_unit_area + gemm_stages * gemm_stage_bytes of shared memory;
// through launch_chained.
//
// Preconditions: every split has a column block; x's rows and the records lie at multiples of 16
// bytes; Tokens * x_stride * 2 is below 2^32. Small: args.units is 2 or 4, else it is 0 or 1.
//
// Per step of 128 columns the block copies 16 records and its tile of x, gemm_stages - 1 steps
// ahead. Every warp decodes its own two records, each once per block, straight into fragments.
// Scaled formats multiply integers exactly, sum a unit's products in f32 and scale this sum, so
// weights are not rounded at all. For 128 columns that is 32 instructions per record at 64 tokens,
// 16 at 32; scaling the weights in 16 bits would be 32 at any number of tokens.
//
// Cost per record (16 x 128) of 4 bits and 64 tokens, in instructions of a warp: 64 products, about
// 90 to decode, 16 shared loads of x, 32 to scale sums. From about 40 tokens on the products bound
// it, below the reading of records does.
template <class T, class Format, int Tokens, bool Small>
__global__ void __launch_bounds__(gemm_threads, Tokens == 32 && Format::bits <= 4 ? 2 : 1)
    packed_gemm_kernel(const __grid_constant__ PackedGemmArgs args) {
  extern __shared__ __align__(256) std::uint8_t gemm_shared[];
  constexpr int NT = Tokens / 8;
  constexpr int stages = gemm_stages<Format>;
  static_assert(stages * (Tokens * 256 + gemm_block_tiles * 256 * Format::bits) >=
                    Tokens * (gemm_block_rows + 4) * 4,
                "the stages are large enough for store_block");
  chain_trigger();
  chain_wait();

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int begin = gemm_split_begin(args, blockIdx.z);
  const int end = gemm_split_begin(args, blockIdx.z + 1);
  const int stage_bytes = gemm_stage_bytes(args, Tokens);
  const int unit_area = gemm_unit_area(args);
  const std::uint32_t ring = shared_address(gemm_shared) + unit_area;
  GemmCopier<T, Format, Tokens> copier(args, begin);
  const typename Format::Table table(args.book);

  if (unit_area > 0) copier.load_row_units(args, shared_address(gemm_shared));
#pragma unroll 1
  for (int s = 0; s < stages - 1; ++s) {
    if (begin + s < end) copier.load(args, ring + s * stage_bytes);
    copy_commit();
  }
  GemmSums<NT> sums;
  sums.clear();
  int slot = 0;                // of column block k
  int free_slot = stages - 1;  // of column block k - 1, which nobody reads after the barrier
  for (int k = begin; k < end; ++k) {
    copy_wait<stages - 2>();
    __syncthreads();
    if (k + stages - 1 < end) copier.load(args, ring + free_slot * stage_bytes);
    copy_commit();
    const std::uint8_t* base = gemm_shared + unit_area + slot * stage_bytes;
    GemmStage stage;
    stage.x = base;
    stage.record = base + Tokens * 256 + warp * 2 * args.record_bytes;
    stage.unit = unit_area > 0 ? gemm_shared + warp * 2 * args.unit_bytes
                               : stage.record + 256 * Format::bits;
    stage.next_unit = unit_area > 0 ? args.unit_bytes : args.record_bytes;
    multiply_record<T, Format, Small, NT>(args, stage, table, sums);
    free_slot = slot;
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  copy_wait<0>();
  __syncthreads();  // the stages are free
  store_block<T, NT>(args, sums, reinterpret_cast<float*>(gemm_shared));
}

template <class T, class Format, int Tokens, bool Small>
void launch_gemm_kernel(const PackedGemmArgs& args, cudaStream_t stream) {
  const int shared = gemm_unit_area(args) + gemm_stages<Format> * gemm_stage_bytes(args, Tokens);
  launch_chained("packed_gemm", packed_gemm_kernel<T, Format, Tokens, Small>,
                 gemm_grid(args, Tokens), dim3(gemm_threads), static_cast<std::size_t>(shared),
                 stream, args);
}

// tokens: 32 or 64.
template <class T, class Format>
void launch_gemm_format(const PackedGemmArgs& args, int tokens, cudaStream_t stream) {
  const bool small = args.units > 1;
  if (tokens == 32) {
    if (small) return launch_gemm_kernel<T, Format, 32, true>(args, stream);
    return launch_gemm_kernel<T, Format, 32, false>(args, stream);
  }
  if (small) return launch_gemm_kernel<T, Format, 64, true>(args, stream);
  return launch_gemm_kernel<T, Format, 64, false>(args, stream);
}

}  // namespace engine
