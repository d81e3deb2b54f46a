// What the kernels of packed_gemm have in common whatever the format: their arguments, and how
// results are stored.
#pragma once

#include <cstdint>

#include "cuda/packed_gemm_decode.cuh"
#include "cuda/types.cuh"
#include "engine/weight/packed_weight.h"

namespace engine {

// A block makes 256 weight rows x 32 or 64 tokens, a warp 32 weight rows x all of these tokens.
constexpr int gemm_threads = 256;
constexpr int gemm_block_tiles = 16;  // row tiles per block
constexpr int gemm_block_rows = gemm_block_tiles * static_cast<int>(record_rows);

struct PackedGemmArgs {
  const std::uint8_t* records;
  const std::uint8_t* row_units;  // null unless a unit is a whole row
  const float* book;              // codebook only
  const void* x;                  // rows at multiples of 16 bytes
  void* out;
  float* partial;  // f32 [splits, m, partial_stride], if there are several splits
  std::int64_t x_stride, out_stride, partial_stride;
  int m, rows;
  int x_cols;  // a multiple of 8; beyond it x counts as 0
  int row_tiles, col_blocks, splits;
  int record_bytes, unit_bytes;
  int units;  // per record: 0, 1, 2 or 4
  UnitFormat format;
  bool out_f32, accumulate;
  bool out_packs;  // rows of out lie at multiples of four elements
};

// The block's grid: x over tiles of `tokens` tokens, y over blocks of rows, z over splits of the
// columns.
inline dim3 gemm_grid(const PackedGemmArgs& args, int tokens) {
  return {static_cast<unsigned>(ceil_div(args.m, tokens)),
          static_cast<unsigned>(ceil_div(args.row_tiles, gemm_block_tiles)),
          static_cast<unsigned>(args.splits)};
}

// The first column block of a split. Below 2^24 column blocks and 128 splits.
__host__ __device__ inline int gemm_split_begin(const PackedGemmArgs& args, unsigned split) {
  return static_cast<int>(static_cast<unsigned>(args.col_blocks) * split /
                          static_cast<unsigned>(args.splits));
}

// out[token][row .. row + 3] (+)= v, where they exist. row is a multiple of 4.
template <class T, class Out>
__device__ void store_rows(const PackedGemmArgs& args, int token, int row, const float (&v)[4]) {
  Out* out = static_cast<Out*>(args.out) + token * args.out_stride + row;
  if (args.out_packs && row + 4 <= args.rows) {
    Pack<Out, 4> pack;
    if (args.accumulate) pack = *reinterpret_cast<const Pack<Out, 4>*>(out);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pack.v[i] = from_f32<Out>(args.accumulate ? to_f32(pack.v[i]) + v[i] : v[i]);
    }
    *reinterpret_cast<Pack<Out, 4>*>(out) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i < args.rows) out[i] = from_f32<Out>(args.accumulate ? to_f32(out[i]) + v[i] : v[i]);
  }
}

template <class T>
__device__ void store_rows(const PackedGemmArgs& args, int token, int row, float4 v) {
  const float values[4] = {v.x, v.y, v.z, v.w};
  if (args.out_f32) return store_rows<T, float>(args, token, row, values);
  store_rows<T, T>(args, token, row, values);
}

// The product of args.x and the records (packed_gemm_kernel.cuh), in blocks of 32 or 64 tokens. The
// instances are spread over packed_gemm_*.cu.
template <class T, class Format>
void launch_gemm_format(const PackedGemmArgs& args, int tokens, cudaStream_t stream);

}  // namespace engine
