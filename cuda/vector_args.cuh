// What the kernels behind vector_product are launched with, and how a block walks over weights.
#pragma once

#include <cstdint>

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
  float inverse_cols;  // 1 / cols
  int rows;            // of x
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
  int unit_step;  // bytes from a block's unit to its next one; 0: not the same everywhere
  int unit_bytes;
  int units_per_record;                // 0: coefficients by row
  int scale_kind;                      // 0 f32, 1 f16, 2 bf16
  int zero_offset;                     // bytes from a unit's scales to its zeros; 0: no zeros
  float constant_zero;                 // where there are none
  int x_row_bytes;                     // of a row of x in shared memory
  int sum_shift, sum_row, sum_offset;  // log2 of the columns of a sum of x; sums of a row
  int factor_row, factor_offset;       // integers: factors of a row
  int red_offset, ring_offset, stage_bytes;
  bool wide;  // x and norm can be read 16 bytes at a time
  bool out_f32;
  VectorEpilogue epilogue;
};

// The products of one launch: each reads what the one before wrote, and starts when all blocks are
// done with that.
template <class T>
struct VectorPhases {
  VectorArgs<T> phase[vector_max_phases];
  int phases;
  // Blocks that are done with phase 0, 1, ..; the last counts those that wait for no more.
  std::int32_t* arrivals;  // [vector_max_phases], zero, and left zero
};

// Before sm_90 a launch has one product: there is no launching ahead that the chain would compete
// with, and registers are short.
template <class T>
__device__ int phases_of(const VectorPhases<T>& all) {
#if __CUDA_ARCH__ >= 900
  return all.phases;
#else
  return 1;
#endif
}

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

// The blocks of columns, of those of the block's slice, that part `part` of `parts` takes.
template <class T>
struct ColumnRange {
  int begin, end;
  __device__ ColumnRange(const VectorArgs<T>& args, int part, int parts) {
    const int first = args.slice_start[blockIdx.y];
    const int count = args.slice_start[blockIdx.y + 1] - first;
    begin = first + count * part / parts;
    end = first + count * (part + 1) / parts;
  }
};

template <class T>
using VectorKernel = void (*)(const VectorPhases<T>);

}  // namespace engine
