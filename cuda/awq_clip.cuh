// Kernels of the search over clip bounds of AWQ, included by awq_clip.cu alone.
#pragma once

#include <cstdint>

#include "cuda/grid.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int tile_threads = 256;
constexpr int tile_rows = 64;
// Floats between columns of the errors in shared memory: the 8 rows and 4 columns that a warp
// writes at once fall into 32 banks.
constexpr int tile_pitch = tile_rows + 8;
constexpr int row_threads = 128;

// AwqClipProblem as kernels take it.
struct ClipParams {
  std::int64_t rows;
  int unit;
  int steps;
  int candidates;
  bool ends;
  double samples;
  GridParams grid;
  std::uint8_t* choice;
  std::int64_t choice_stride;
  float* loss;
  std::int64_t loss_stride;
  float* plain_loss;
  std::int64_t plain_stride;
};

// The bounds of candidate i for a unit with the smallest and largest weight `range`.
__device__ DeviceRange clip_bounds(DeviceRange range, int i, const ClipParams& p) {
  const auto shrink =
      static_cast<float>(1.0 - static_cast<double>(i) / static_cast<double>(p.steps));
  if (p.ends) {
    return {in_arithmetic(p.grid.half, __fmul_rn(range.lo, shrink)),
            in_arithmetic(p.grid.half, __fmul_rn(range.hi, shrink))};
  }
  const float most = fmaxf(fabsf(range.lo), fabsf(range.hi));
  const float bound = in_arithmetic(p.grid.half, __fmul_rn(most, shrink));
  return {-bound, bound};
}

__device__ float round_trip(float v, UnitGrid grid, const GridParams& p) {
  const auto zero = static_cast<float>(grid.zero);
  return dequantize_on_grid(quantize_on_grid(v, grid.scale, zero, p.top, p.half), grid.scale, zero,
                            p.half);
}

// All candidates of one unit for 64 rows: loss = e H e^T / n with H = moments[unit], padded with
// zeros to kUnit columns. H and the errors of one candidate lie in shared memory. 4 threads share a
// row's weights, which every candidate reads again (from the cache: 4 bytes for 2560 flops); the
// product is 4 rows by kUnit / 16 columns per thread, f32; each row's dot product ends in f64.
// Bound by multiply-adds: 20 * candidates * kUnit flops a weight.
template <class T, int kUnit>
__global__ void __launch_bounds__(tile_threads, 2)
    clip_tile_kernel(T* w, std::int64_t stride, const float* moments, ClipParams p) {
  constexpr int per_thread = kUnit / 4;
  constexpr int columns = kUnit / 16;
  constexpr int pack = columns < 4 ? columns : 4;
  extern __shared__ __align__(16) float shared[];
  __shared__ int chosen[tile_rows];
  float* moment = shared;
  float* error = shared + kUnit * kUnit;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto u = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t first_row = std::int64_t{blockIdx.y} * tile_rows;

  const float* from = moments + u * p.unit * p.unit;
  for (int i = thread; i < kUnit * kUnit; i += tile_threads) {
    const int r = i / kUnit, c = i % kUnit;
    moment[i] = r < p.unit && c < p.unit ? from[r * p.unit + c] : 0.0F;
  }
  const int row = thread / 4, part = thread % 4;  // columns part, part + 4, ..
  const bool real_row = first_row + row < p.rows;
  T* mine = w + (first_row + row) * stride + u * p.unit;
  const auto weight = [&](int c) { return c < p.unit && real_row ? to_f32(mine[c]) : 0.0F; };
  float negated_lo = -INFINITY;
  float hi = -INFINITY;
#pragma unroll 8
  for (int j = 0; j < per_thread; ++j) {
    const int c = 4 * j + part;
    if (c < p.unit) {
      const float v = weight(c);
      negated_lo = fmaxf(negated_lo, -v);
      hi = fmaxf(hi, v);
    }
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    negated_lo = fmaxf(negated_lo, __shfl_xor_sync(0xffffffffU, negated_lo, offset));
    hi = fmaxf(hi, __shfl_xor_sync(0xffffffffU, hi, offset));
  }
  const DeviceRange range{-negated_lo, hi};

  const int m = thread / 16 * 4, n = thread % 16 * pack;
  float best[4], plain[4];
  int index[4];
  for (int i = 0; i < p.candidates; ++i) {
    const DeviceRange bounds = clip_bounds(range, i, p);
    const UnitGrid grid = unit_grid(
        {clamp_float(range.lo, bounds.lo, bounds.hi), clamp_float(range.hi, bounds.lo, bounds.hi)},
        p.grid);
    __syncthreads();  // nobody reads the last candidate's errors any more
#pragma unroll 4
    for (int j = 0; j < per_thread; ++j) {
      const int c = 4 * j + part;
      const float v = weight(c);
      const float q = round_trip(clamp_float(v, bounds.lo, bounds.hi), grid, p.grid);
      error[c * tile_pitch + row] = c < p.unit ? __fsub_rn(q, v) : 0.0F;
    }
    __syncthreads();
    float sum[4][columns] = {};
#pragma unroll 4
    for (int k = 0; k < kUnit; ++k) {
      const auto e = *reinterpret_cast<const Pack<float, 4>*>(error + k * tile_pitch + m);
      float h[columns];
#pragma unroll
      for (int c = 0; c < columns; c += pack) {
        const auto part_of_h =
            *reinterpret_cast<const Pack<float, pack>*>(moment + k * kUnit + c * 16 + n);
#pragma unroll
        for (int x = 0; x < pack; ++x) h[c + x] = part_of_h.v[x];
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int c = 0; c < columns; ++c) sum[q][c] = fmaf(e.v[q], h[c], sum[q][c]);
      }
    }
    float dot[4] = {};
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int column = c / pack * pack * 16 + n + c % pack;
      const auto e = *reinterpret_cast<const Pack<float, 4>*>(error + column * tile_pitch + m);
#pragma unroll
      for (int q = 0; q < 4; ++q) dot[q] = fmaf(e.v[q], sum[q][c], dot[q]);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      auto total = static_cast<double>(dot[q]);
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(0xffffffffU, total, offset);
      }
      const auto mean = static_cast<float>(total / p.samples);
      if (i == 0) plain[q] = mean;
      if (i == 0 || mean < best[q]) {
        best[q] = mean;
        index[q] = i;
      }
    }
  }
  if (thread % 16 == 0) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const std::int64_t r = first_row + m + q;
      chosen[m + q] = index[q];
      if (r >= p.rows) continue;
      p.choice[r * p.choice_stride + u] = static_cast<std::uint8_t>(index[q]);
      p.loss[r * p.loss_stride + u] = best[q];
      p.plain_loss[r * p.plain_stride + u] = plain[q];
    }
  }
  __syncthreads();
  if (!real_row) return;
  const DeviceRange bounds = clip_bounds(range, chosen[row], p);
#pragma unroll 8
  for (int j = 0; j < per_thread; ++j) {
    const int c = 4 * j + part;
    if (c < p.unit) mine[c] = from_f32<T>(clamp_float(weight(c), bounds.lo, bounds.hi));
  }
}

// The steps below take the units of one group of columns, a chunk of rows at a time; w, choice and
// the losses start at that chunk and group.

template <class T>
__global__ void __launch_bounds__(row_threads)
    unit_range_kernel(const T* w, std::int64_t stride, int unit, DeviceRange* ranges) {
  __shared__ float scratch[32];
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  float negated_lo = -INFINITY;
  float hi = -INFINITY;
  for (int c = static_cast<int>(threadIdx.x); c < unit; c += row_threads) {
    const float v = to_f32(w[r * stride + c]);
    negated_lo = fmaxf(negated_lo, -v);
    hi = fmaxf(hi, v);
  }
  negated_lo = block_reduce(negated_lo, MaxOp{}, -INFINITY, scratch);
  hi = block_reduce(hi, MaxOp{}, -INFINITY, scratch);
  if (threadIdx.x == 0) ranges[r] = {-negated_lo, hi};
}

// out [rows, unit] = w clamped to candidate i's bounds, or to those of its choice (i < 0).
template <class T, class Out>
__global__ void __launch_bounds__(row_threads)
    clamp_kernel(const T* w, std::int64_t stride, const DeviceRange* ranges, int i, ClipParams p,
                 Out* out, std::int64_t out_stride) {
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const DeviceRange bounds = clip_bounds(ranges[r], i < 0 ? p.choice[r * p.choice_stride] : i, p);
  for (int c = static_cast<int>(threadIdx.x); c < p.unit; c += row_threads) {
    out[r * out_stride + c] =
        from_f32<Out>(clamp_float(to_f32(w[r * stride + c]), bounds.lo, bounds.hi));
  }
}

// error [rows, unit], at first the clamped weights: minus w and through the grid.
template <class T>
__global__ void __launch_bounds__(row_threads)
    clip_error_kernel(const T* w, std::int64_t stride, const float* scales,
                      const std::int32_t* zeros, ClipParams p, float* error) {
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const UnitGrid grid{scales[r], zeros[r]};
  for (int c = static_cast<int>(threadIdx.x); c < p.unit; c += row_threads) {
    float& e = error[r * p.unit + c];
    e = __fsub_rn(round_trip(e, grid, p.grid), to_f32(w[r * stride + c]));
  }
}

// Row by row, candidate i's loss = left . right / n, and whether it is the smallest so far.
__global__ void __launch_bounds__(row_threads)
    clip_decide_kernel(const float* left, const float* right, int width, int i, ClipParams p) {
  __shared__ double scratch[32];
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  double sum = 0;
  for (int c = static_cast<int>(threadIdx.x); c < width; c += row_threads) {
    sum += static_cast<double>(left[r * width + c]) * static_cast<double>(right[r * width + c]);
  }
  sum = block_reduce(sum, SumOp{}, 0.0, scratch);
  if (threadIdx.x != 0) return;
  const auto mean = static_cast<float>(sum / p.samples);
  float& best = p.loss[r * p.loss_stride];
  if (i == 0) p.plain_loss[r * p.plain_stride] = mean;
  if (i == 0 || mean < best) {
    best = mean;
    p.choice[r * p.choice_stride] = static_cast<std::uint8_t>(i);
  }
}

}  // namespace
}  // namespace engine
