// Kernels of the GPTQ sweep, included by gptq_sweep.cu alone (see there for the mathematics).
#pragma once

#include <cstdint>

#include "cuda/grid.cuh"
#include "cuda/look_back.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int sweep_threads = 256;
constexpr int warp_rows = 4;  // rows of w per warp
constexpr int lane_columns = max_block / 32;
constexpr int block_rows = sweep_threads / 32 * warp_rows;
constexpr std::size_t sweep_shared = sizeof(float) * max_block * max_block;
constexpr int flat_threads = 256;

// y [rows, cols] (pitch cols) += w.
__global__ void __launch_bounds__(flat_threads)
    add_weights_kernel(const float* w, std::int64_t stride, float* y, std::int64_t rows,
                       std::int64_t cols) {
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t c =
             static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x);
         c < cols; c += static_cast<std::int64_t>(gridDim.x) * flat_threads) {
      y[r * cols + c] += w[r * stride + c];
    }
  }
}

// Pointers start at the block's first column, except scales, zeros and loss.
struct BlockSweep {
  float* w;
  std::int64_t w_stride;
  const float* x;  // pitch max_span; null in the first block, where nothing is compensated yet
  const float* inverse;
  float* scales;
  std::int64_t scale_stride;
  std::int32_t* zeros;
  std::int64_t zero_stride;
  const std::int32_t* column_group;  // or null: column / unit
  std::uint8_t* codes;
  std::int64_t code_stride;
  double* loss;
  std::int64_t loss_stride;
  std::int64_t rows;
  std::uint32_t first;  // the block's first column
  std::uint32_t unit;   // columns per grid
  int n;                // columns of the block, at most 128
  GridParams grid;
};

// One block of columns for all rows: current weights, grids of the groups that start here
// (kDynamic), then column by column code, error and compensation inside the block; E replaces w.
//
// 8 warps of 4 rows; U_bb (64 KiB) in shared memory. Lane l holds columns l, l + 32, l + 64 and
// l + 96 of each row in registers and the current column is broadcast by a shuffle, so rows never
// wait for each other and there is no barrier in the loop; the four rows of a warp hide each
// other's two divisions. U is zero left of its diagonal, hence a finished column, which holds w^,
// is not changed by later updates. About 2 * rows * n^2 flops and n dependent steps.
// Two blocks to a multiprocessor: asked for three, sm_80 spills.
template <bool kDynamic, bool kHalf>
__global__ void __launch_bounds__(sweep_threads, 2) sweep_kernel(const BlockSweep p) {
  extern __shared__ float inverse[];  // [n, 128]
  __shared__ int unit_of[max_block];
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < p.n * (max_block / 4); i += sweep_threads) {
    reinterpret_cast<float4*>(inverse)[i] = reinterpret_cast<const float4*>(p.inverse)[i];
  }
  if (thread < p.n) {
    const auto column = static_cast<std::uint32_t>(thread);
    unit_of[thread] = p.column_group != nullptr ? p.column_group[thread]
                                                : static_cast<int>((p.first + column) / p.unit);
  }
  __syncthreads();

  const int lane = thread % 32;
  const std::int64_t row0 =
      static_cast<std::int64_t>(blockIdx.x) * block_rows + thread / 32 * warp_rows;
  if (row0 >= p.rows) return;
  // Rows beyond the end repeat the last one and store nothing.
  const auto row_of = [&](int i) { return min(row0 + i, p.rows - 1); };

  float w[warp_rows][lane_columns];
  float error[warp_rows][lane_columns];
  std::uint32_t codes[warp_rows];
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    codes[i] = 0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      w[i][c] = column < p.n ? p.w[row_of(i) * p.w_stride + column] : 0.0F;
      if (p.x != nullptr && column < p.n) w[i][c] -= p.x[row_of(i) * max_span + column];
      error[i][c] = 0.0F;
    }
  }

  float scale[warp_rows];
  float zero[warp_rows];
  int unit = -1;
#pragma unroll
  for (int q = 0; q < lane_columns; ++q) {
    const int steps = min(32, p.n - 32 * q);
#pragma unroll 1
    for (int l = 0; l < steps; ++l) {
      const int j = 32 * q + l;
      if (unit_of[j] != unit) {  // the same for the whole block
        unit = unit_of[j];
        if constexpr (kDynamic) {
          // Lane i takes the range of row i, so that the grids are computed side by side.
          const int end = min(j + static_cast<int>(p.unit), p.n);
          DeviceRange range{0.0F, 0.0F};
#pragma unroll
          for (int i = 0; i < warp_rows; ++i) {
            float negated_lo = -INFINITY;
            float hi = -INFINITY;
#pragma unroll
            for (int c = q; c < lane_columns; ++c) {
              const int column = 32 * c + lane;
              if (column >= j && column < end) {
                negated_lo = fmaxf(negated_lo, -w[i][c]);
                hi = fmaxf(hi, w[i][c]);
              }
            }
            negated_lo = warp_reduce(negated_lo, MaxOp{});
            hi = warp_reduce(hi, MaxOp{});
            if (lane == i) range = {-negated_lo, hi};
          }
          const UnitGrid grid = unit_grid(range, p.grid);
          if (lane < warp_rows && row0 + lane < p.rows) {
            p.scales[(row0 + lane) * p.scale_stride + unit] = grid.scale;
            p.zeros[(row0 + lane) * p.zero_stride + unit] = grid.zero;
          }
#pragma unroll
          for (int i = 0; i < warp_rows; ++i) {
            scale[i] = __shfl_sync(0xffffffffU, grid.scale, i);
            zero[i] = static_cast<float>(__shfl_sync(0xffffffffU, grid.zero, i));
          }
        } else {
#pragma unroll
          for (int i = 0; i < warp_rows; ++i) {
            scale[i] = p.scales[row_of(i) * p.scale_stride + unit];
            zero[i] = static_cast<float>(p.zeros[row_of(i) * p.zero_stride + unit]);
          }
        }
      }
      const float* u = inverse + j * max_block;
      const float pivot = u[j];
      float u_own[lane_columns];
#pragma unroll
      for (int c = q; c < lane_columns; ++c) u_own[c] = u[32 * c + lane];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        const float current = __shfl_sync(0xffffffffU, w[i][q], l);
        const float code = quantize_on_grid(current, scale[i], zero[i], p.grid.top, kHalf);
        const float value = dequantize_on_grid(code, scale[i], zero[i], kHalf);
        const float e = __fdiv_rn(__fsub_rn(current, value), pivot);
#pragma unroll
        for (int c = q; c < lane_columns; ++c) w[i][c] -= e * u_own[c];
        if (lane == l) {
          w[i][q] = value;
          error[i][q] = e;
          codes[i] |= static_cast<std::uint32_t>(code) << (8 * q);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    const std::int64_t row = row0 + i;
    double loss = 0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      loss += static_cast<double>(error[i][c]) * static_cast<double>(error[i][c]);
      if (row < p.rows && column < p.n) {
        float* place = p.w + row * p.w_stride + column;
        *place = __fsub_rn(w[i][c], *place);
        p.codes[row * p.code_stride + column] = static_cast<std::uint8_t>(codes[i] >> (8 * c));
      }
    }
    loss = warp_reduce(loss, SumOp{});
    if (lane == 0 && row < p.rows) {
      double* place = p.loss + row * p.loss_stride;
      *place = p.first == 0 ? loss : *place + loss;
    }
  }
}

}  // namespace
}  // namespace engine
