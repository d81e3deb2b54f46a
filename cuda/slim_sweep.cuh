// Kernels of SliM-LLM's sweep, included by slim_sweep.cu alone: each takes one group of columns.
#pragma once

#include <cstdint>

#include "cuda/look_back.cuh"
#include "cuda/slim.cuh"
#include "engine/ops/slim_ops.h"

namespace engine {
namespace {

constexpr int group_threads = 256;
constexpr int group_warps = group_threads / 32;
constexpr int fit_rows = group_warps;  // a warp per row
constexpr int warp_rows = 4;           // rows of w per warp in the sweep itself
constexpr int sweep_rows = group_warps * warp_rows;
constexpr int lane_columns = max_block / 32;
constexpr std::size_t sweep_shared = sizeof(float) * max_block * max_block;
constexpr std::int64_t most_parts = group_threads;

// Pointers start at the group's first column, except loss.
struct SlimGroup {
  float* w;
  std::int64_t w_stride;
  const float* x;  // pitch max_span; null in the first group, where nothing is compensated yet
  const float* inverse;
  float* scales;
  std::int64_t scale_stride;
  std::int32_t* zeros;
  std::int64_t zero_stride;
  float* means;
  std::int64_t mean_stride;
  std::uint8_t* codes;
  std::int64_t code_stride;
  double* loss;
  std::int64_t loss_stride;
  std::int64_t rows;
  int n;  // columns of the group, at most 128
  int bits;
  bool middle_zero;
  bool first;
  GridParams grid;

  // The weight that the sweep sees when it arrives.
  __device__ float current(std::int64_t row, int column) const {
    const float v = w[row * w_stride + column];
    return x == nullptr ? v : __fsub_rn(v, x[row * max_span + column]);
  }
  __device__ void put(std::int64_t row, float scale, std::int32_t zero, float mean) const {
    scales[row * scale_stride] = scale;
    zeros[row * zero_stride] = zero;
    means[row * mean_stride] = mean;
  }
};

// Partial results over the rows of a group, one per block of the kernels below.
struct SalienceParts {
  double* sums;
  double* squares;
  double* thresholds;
  int count;  // at most most_parts
};

// Every thread gets the sum or the smallest of the parts; the order is fixed.
__device__ inline double sum_of_parts(const double* parts, int count, double* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  return block_reduce(thread < count ? parts[thread] : 0.0, SumOp{}, 0.0, scratch);
}

struct LeastOp {
  __device__ double operator()(double a, double b) const { return fmin(a, b); }
};

__device__ inline double least_of_parts(const double* parts, int count, double* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  return block_reduce(thread < count ? parts[thread] : static_cast<double>(INFINITY), LeastOp{},
                      static_cast<double>(INFINITY), scratch);
}

// w^2 / U_jj^2 in f32; `pivot` is U_jj.
__device__ inline float salience_of(float w, float pivot) {
  return __fdiv_rn(__fmul_rn(w, w), __fmul_rn(pivot, pivot));
}

enum class SalienceStep : std::uint8_t { mean, deviation, threshold };

// The three readings that find the smallest salience more than two standard deviations from the
// mean of the whole group: sums, square sums about the mean, the smallest one beyond; each needs
// all parts of the one before. A warp per row.
template <SalienceStep kStep>
__global__ void __launch_bounds__(group_threads)
    salience_kernel(const SlimGroup v, const SalienceParts parts) {
  __shared__ double scratch[32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const double count = static_cast<double>(v.rows) * v.n;
  double mean = 0.0, limit = 0.0;
  if constexpr (kStep != SalienceStep::mean) {
    mean = sum_of_parts(parts.sums, parts.count, scratch) / count;
  }
  if constexpr (kStep == SalienceStep::threshold) {
    limit = 2.0 * sqrt(sum_of_parts(parts.squares, parts.count, scratch) / (count - 1.0));
  }
  double result = kStep == SalienceStep::threshold ? static_cast<double>(INFINITY) : 0.0;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * group_warps + warp; row < v.rows;
       row += static_cast<std::int64_t>(gridDim.x) * group_warps) {
#pragma unroll 1
    for (int j = lane; j < v.n; j += 32) {
      const auto s =
          static_cast<double>(salience_of(v.current(row, j), v.inverse[j * max_block + j]));
      if constexpr (kStep == SalienceStep::mean) {
        result += s;
      } else if constexpr (kStep == SalienceStep::deviation) {
        result += (s - mean) * (s - mean);
      } else {
        if (fabs(s - mean) > limit) result = fmin(result, s);
      }
    }
  }
  double* out = kStep == SalienceStep::mean        ? parts.sums
                : kStep == SalienceStep::deviation ? parts.squares
                                                   : parts.thresholds;
  if constexpr (kStep == SalienceStep::threshold) {
    result = block_reduce(result, LeastOp{}, static_cast<double>(INFINITY), scratch);
  } else {
    result = block_reduce(result, SumOp{}, 0.0, scratch);
  }
  if (threadIdx.x == 0) out[blockIdx.x] = result;
}

struct RangeSearch {
  float factor[slim_ranges];
  int candidates;  // the first so many
  double lambda;
  SalienceParts parts;  // weighted search only
};

// Grids of a group of 2 and more bits: a warp per row, lane l tries the candidates l, l + 32, ...,
// each over the row's columns one after another, so that sums have the order of the reference.
// About 100 instructions for a candidate and a column, hence bound by issue.
template <bool kWeighted>
__global__ void __launch_bounds__(group_threads)
    fit_ranges_kernel(const SlimGroup v, const RangeSearch search) {
  constexpr int rounds = (slim_ranges + 31) / 32;
  __shared__ float weights[group_warps][max_block];
  __shared__ double scratch[32];
  double threshold = INFINITY;
  if constexpr (kWeighted) {
    threshold = least_of_parts(search.parts.thresholds, search.parts.count, scratch);
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * fit_rows + warp;
  if (row >= v.rows) return;  // whole warps; no barrier follows

  float* own = weights[warp];
  float negated_lo = -INFINITY, hi = -INFINITY;
  std::uint32_t salient[lane_columns] = {};  // a bit per column
#pragma unroll
  for (int c = 0; c < lane_columns; ++c) {
    const int j = 32 * c + lane;
    bool counts_more = false;
    if (j < v.n) {
      const float w = v.current(row, j);
      own[j] = w;
      negated_lo = fmaxf(negated_lo, -w);
      hi = fmaxf(hi, w);
      if constexpr (kWeighted) {
        counts_more =
            static_cast<double>(salience_of(w, v.inverse[j * max_block + j])) >= threshold;
      }
    }
    if constexpr (kWeighted) salient[c] = __ballot_sync(0xffffffffU, counts_more);
  }
  __syncwarp();
  const DeviceRange range =
      gptq_range({-warp_reduce(negated_lo, MaxOp{}), warp_reduce(hi, MaxOp{})}, v.grid);

  const auto grid_of = [&](int candidate) {
    const float p = search.factor[candidate];
    UnitGrid grid = unit_grid({__fmul_rn(p, range.lo), __fmul_rn(p, range.hi)}, v.grid);
    if (v.middle_zero) grid.zero = 1 << (v.bits - 1);
    return grid;
  };
  SlimGrid grids[rounds];
  double loss[rounds];
#pragma unroll
  for (int k = 0; k < rounds; ++k) {
    const UnitGrid grid = grid_of(min(lane + 32 * k, slim_ranges - 1));
    grids[k] = {grid.scale, static_cast<float>(grid.zero), v.grid.top};
    loss[k] = 0.0;
  }
  if (search.candidates > 1) {
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int end = min(32, v.n - 32 * c);
#pragma unroll 1
      for (int l = 0; l < end; ++l) {
        const float w = own[32 * c + l];
        const bool counts_more = kWeighted && (salient[c] >> l & 1U) != 0;
#pragma unroll
        for (int k = 0; k < rounds; ++k) {
          const float error = __fsub_rn(code_of<false>(w, grids[k]).value, w);
          const auto power = static_cast<double>(powf(fabsf(error), 2.4F));
          loss[k] += counts_more ? __dmul_rn(search.lambda, power) : power;
        }
      }
    }
  }
  double best_loss = loss[0];
  int best = lane;
#pragma unroll
  for (int k = 1; k < rounds; ++k) {
    if (lane + 32 * k < slim_ranges && loss[k] < best_loss) {
      best_loss = loss[k];
      best = lane + 32 * k;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other_loss = __shfl_xor_sync(0xffffffffU, best_loss, offset);
    const int other = __shfl_xor_sync(0xffffffffU, best, offset);
    if (other_loss < best_loss || (other_loss == best_loss && other < best)) {
      best_loss = other_loss;
      best = other;
    }
  }
  if (lane != 0) return;
  const UnitGrid grid = grid_of(best);  // without a search all losses are 0 and the first wins
  v.put(row, grid.scale, grid.zero, 0.0F);
}

// Grids of a group of 1 bit, a warp per row.
__global__ void __launch_bounds__(group_threads) fit_signs_kernel(const SlimGroup v) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * fit_rows + static_cast<int>(threadIdx.x) / 32;
  if (row >= v.rows) return;
  double sum = 0.0, absolute = 0.0;
  for (int j = lane; j < v.n; j += 32) {
    const auto w = static_cast<double>(v.current(row, j));
    sum += w;
    absolute += fabs(w);
  }
  const SlimGrid grid =
      sign_grid(warp_reduce(sum, SumOp{}), warp_reduce(absolute, SumOp{}), v.n, v.grid);
  if (lane == 0) v.put(row, grid.scale, 0, grid.zero);
}

// The group's columns one after another, for all rows, on the grids found before: code, error,
// compensation inside the group; E replaces w.
//
// 8 warps of 4 rows; U_bb (64 KiB) in shared memory. Lane l holds columns l, l + 32, l + 64 and
// l + 96 of each row in registers and the current column is broadcast by a shuffle, so rows never
// wait for each other and there is no barrier in the loop; the four rows of a warp hide each
// other's two divisions. U is zero left of its diagonal, hence a finished column, which holds w^,
// is not changed by later updates. About 2 * rows * n^2 flops and n dependent steps.
template <bool kSign>
__global__ void __launch_bounds__(group_threads) sweep_group_kernel(const SlimGroup v) {
  extern __shared__ float inverse[];  // [n, 128]
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < v.n * (max_block / 4); i += group_threads) {
    reinterpret_cast<float4*>(inverse)[i] = reinterpret_cast<const float4*>(v.inverse)[i];
  }
  __syncthreads();
  const int lane = thread % 32;
  const std::int64_t row0 =
      static_cast<std::int64_t>(blockIdx.x) * sweep_rows + thread / 32 * warp_rows;
  if (row0 >= v.rows) return;
  // Rows beyond the end repeat the last one and store nothing.
  const auto row_of = [&](int i) { return min(row0 + i, v.rows - 1); };

  float w[warp_rows][lane_columns], error[warp_rows][lane_columns];
  std::uint32_t codes[warp_rows];
  SlimGrid grid[warp_rows];
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    const std::int64_t row = row_of(i);
    grid[i] = {
        v.scales[row * v.scale_stride],
        kSign ? v.means[row * v.mean_stride] : static_cast<float>(v.zeros[row * v.zero_stride]),
        v.grid.top};
    codes[i] = 0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      w[i][c] = column < v.n ? v.current(row, column) : 0.0F;
      error[i][c] = 0.0F;
    }
  }
#pragma unroll
  for (int q = 0; q < lane_columns; ++q) {
    const int steps = min(32, v.n - 32 * q);
#pragma unroll 1
    for (int l = 0; l < steps; ++l) {
      const int j = 32 * q + l;
      const float* u = inverse + j * max_block;
      const float pivot = u[j];
      float u_own[lane_columns];
#pragma unroll
      for (int c = q; c < lane_columns; ++c) u_own[c] = u[32 * c + lane];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        const float current = __shfl_sync(0xffffffffU, w[i][q], l);
        const SlimCode coded = code_of<kSign>(current, grid[i]);
        const float e = __fdiv_rn(__fsub_rn(current, coded.value), pivot);
#pragma unroll
        for (int c = q; c < lane_columns; ++c) w[i][c] -= e * u_own[c];
        if (lane == l) {
          w[i][q] = coded.value;
          error[i][q] = e;
          codes[i] |= static_cast<std::uint32_t>(coded.code) << (8 * q);
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
      if (row < v.rows && column < v.n) {
        float* place = v.w + row * v.w_stride + column;
        *place = __fsub_rn(w[i][c], *place);
        v.codes[row * v.code_stride + column] = static_cast<std::uint8_t>(codes[i] >> (8 * c));
      }
    }
    loss = warp_reduce(loss, SumOp{});
    if (lane == 0 && row < v.rows) {
      double* place = v.loss + row * v.loss_stride;
      *place = v.first ? loss : *place + loss;
    }
  }
}

}  // namespace
}  // namespace engine
