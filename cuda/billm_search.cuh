// Kernels of BiLLM's two searches, included by billm.cu alone (docs/methods/billm.md).
//
// Both searches binarize every row for every candidate. A thread takes one candidate of one row and
// walks along the row, which lies in shared memory, in the order and the arithmetic of the CPU's
// reference: equal weights give equal errors to the last bit, and only their sum over the rows, in
// f64, may differ in its last places.
#pragma once

#include <cstdint>

#include "cuda/billm_kernels.cuh"

namespace engine {
namespace {

// What is left of a value after one more pass. sign(0) is 0, as everywhere in the searches.
__device__ inline float subtract_level(float value, float sum, const RowLevel& level,
                                       float& next_sum) {
  const float distance = value - sum - level.mean;
  const float step = distance > 0.0F ? level.scale : distance < 0.0F ? -level.scale : 0.0F;
  next_sum = sum + (level.mean + step);
  return value - next_sum;
}

// As the CPU's binarization_error: sum (x - B(x))^2 of n values binarized kPasses times.
template <int kPasses>
__device__ double binarization_error(const float* x, int n, bool with_mean) {
  if (n == 0) return 0.0;
  RowLevel level[kPasses];
  // What is left of a value after `passes`.
  const auto rest = [&](float value, int passes) {
    float sum = 0.0F, left = value;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (i < passes) left = subtract_level(value, sum, level[i], sum);
    }
    return left;
  };
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    level[pass].mean = 0.0F;
    if (with_mean) {
      double total = 0.0;
#pragma unroll 4
      for (int i = 0; i < n; ++i) total += static_cast<double>(rest(x[i], pass));
      level[pass].mean = static_cast<float>(total / static_cast<double>(n));
    }
    double distance = 0.0;
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      distance += static_cast<double>(fabsf(rest(x[i], pass) - level[pass].mean));
    }
    level[pass].scale = static_cast<float>(distance / static_cast<double>(n));
  }
  double error = 0.0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    const double e = static_cast<double>(rest(x[i], kPasses));
    error += e * e;
  }
  return error;
}

// Sums error_of(row's values) over the rows of a slice for each candidate: blockDim.x covers the
// candidates in whole warps, blockDim.y is tile_rows. The values of a row are its targets in the
// order of `columns`.
template <class F>
__device__ void search_slice(const BillmPass& p, const int* columns, int candidates, F&& error_of) {
  __shared__ float values[tile_rows][tile_pitch];
  __shared__ double sums[tile_rows][max_block];
  const int candidate = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.slice;
  const std::int64_t end = min(begin + p.slice, p.rows);
  double sum = 0.0;
  for (std::int64_t row0 = begin; row0 < end; row0 += tile_rows) {
    const std::int64_t row = row0 + y;
    __syncthreads();
    if (row < end) {
      for (int i = candidate; i < p.n; i += static_cast<int>(blockDim.x)) {
        values[y][i] = p.target[row * max_block + columns[i]];
      }
    }
    __syncthreads();
    if (row < end && candidate < candidates) sum += error_of(values[y]);
  }
  sums[y][candidate] = sum;
  __syncthreads();
  if (y > 0 || candidate >= candidates) return;
  for (int i = 1; i < tile_rows; ++i) sum += sums[i][candidate];
  p.partial[static_cast<std::int64_t>(blockIdx.x) * max_block + candidate] = sum;
}

// How many of the best ranked columns are salient: candidate c stands for c + 1. grid: slices.
template <int kRestPasses>
__global__ void __launch_bounds__(search_threads, 2)
    search_columns_kernel(const BillmPass p, int candidates) {
  const int count = static_cast<int>(threadIdx.x) + 1;
  search_slice(p, p.state->rank, candidates, [&](const float* x) {
    return binarization_error<2>(x, count, p.with_mean) +
           binarization_error<kRestPasses>(x + count, p.n - count, p.with_mean);
  });
}

// grid: 1. salient: the output's part for this block.
__global__ void __launch_bounds__(choose_threads)
    choose_columns_kernel(const BillmPass p, int candidates, std::uint8_t* salient) {
  __shared__ double totals[max_block];
  __shared__ int is_salient[max_block];
  __shared__ int best;
  const int c = static_cast<int>(threadIdx.x);
  const bool mine = threadIdx.y == 0 && c < p.n;
  if (mine) is_salient[c] = 0;
  add_slices(p.partial, p.slices, candidates, totals);
  if (threadIdx.y == 0 && c == 0) best = first_least(totals, candidates);
  __syncthreads();
  if (mine && c <= best) is_salient[p.state->rank[c]] = 1;
  __syncthreads();
  if (!mine) return;
  int before = 0, count = 0;  // salient columns left of this one, and all
  for (int j = 0; j < p.n; ++j) {
    before += j < c ? is_salient[j] : 0;
    count += is_salient[j];
  }
  p.state->salient[c] = is_salient[c];
  p.state->order[is_salient[c] != 0 ? before : count + c - before] = c;
  salient[c] = static_cast<std::uint8_t>(is_salient[c]);
  if (c == 0) p.state->count = count;
}

// keys [rows, n], dense: the bits of |target|, which order as the numbers do; 0 in salient columns.
// block: [tile_rows, 128].
__global__ void __launch_bounds__(load_threads) key_kernel(const BillmPass p, std::uint32_t* keys) {
  const int column = static_cast<int>(threadIdx.x);
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * tile_rows + static_cast<int>(threadIdx.y);
  if (column >= p.n || row >= p.rows) return;
  const float v = p.state->salient[column] != 0 ? 0.0F : fabsf(p.target[row * max_block + column]);
  keys[row * p.n + column] = __float_as_uint(v);
}

// The quantile at position (count - 1) * percent / 100 of sorted keys.
__device__ inline float quantile(const std::uint32_t* sorted, std::int64_t count, int percent) {
  const std::int64_t hundredths = (count - 1) * percent;
  const std::int64_t low = hundredths / 100;
  const double share = static_cast<double>(hundredths % 100) / 100.0;
  const double a = __uint_as_float(sorted[low]);
  const double b = __uint_as_float(sorted[min(low + 1, count - 1)]);
  return static_cast<float>(__dadd_rn(a, __dmul_rn(b - a, share)));
}

// sum (x - B(x))^2 of the values below v and of the others, n values together, binarized once.
__device__ inline double split_error(const float* x, int n, float v, bool with_mean,
                                     double constant) {
  double low = 0.0, high = 0.0;
  int n_low = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    if (fabsf(x[i]) < v) {
      low += static_cast<double>(x[i]);
      ++n_low;
    } else {
      high += static_cast<double>(x[i]);
    }
  }
  const int n_high = n - n_low;
  RowLevel below{0.0F, 0.0F}, above{0.0F, 0.0F};
  if (with_mean && n_low > 0) below.mean = static_cast<float>(low / static_cast<double>(n_low));
  if (with_mean && n_high > 0) above.mean = static_cast<float>(high / static_cast<double>(n_high));
  low = high = 0.0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    if (fabsf(x[i]) < v) {
      low += static_cast<double>(fabsf(x[i] - below.mean));
    } else {
      high += static_cast<double>(fabsf(x[i] - above.mean));
    }
  }
  if (n_low > 0) below.scale = static_cast<float>(low / static_cast<double>(n_low));
  if (n_high > 0) above.scale = static_cast<float>(high / static_cast<double>(n_high));
  low = high = 0.0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    const bool is_low = fabsf(x[i]) < v;
    const RowLevel level = is_low ? below : above;
    float sum;
    const double e = static_cast<double>(subtract_level(x[i], 0.0F, level, sum));
    if (is_low) {
      low += e * e;
    } else {
      high += e * e;
    }
  }
  return constant + low + high;
}

// Which quantile divides the weights off the salient columns. grid: slices.
__global__ void __launch_bounds__(search_threads, 2)
    search_break_kernel(const BillmPass p, const std::uint32_t* sorted) {
  const int candidate = min(static_cast<int>(threadIdx.x), break_points - 1);
  const float v = quantile(sorted, p.rows * p.n, static_cast<int>(billm_first_percent) + candidate);
  const int count = p.state->count;
  search_slice(p, p.state->order, break_points, [&](const float* x) {
    const double constant = binarization_error<2>(x, count, p.with_mean);
    return split_error(x + count, p.n - count, v, p.with_mean, constant);
  });
}

// grid: 1. percent: the output's place for this block.
__global__ void __launch_bounds__(choose_threads)
    choose_break_kernel(const BillmPass p, const std::uint32_t* sorted, std::int32_t* percent) {
  __shared__ double totals[max_block];
  add_slices(p.partial, p.slices, break_points, totals);
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  const int best = static_cast<int>(billm_first_percent) + first_least(totals, break_points);
  p.state->break_point = quantile(sorted, p.rows * p.n, best);
  *percent = best;
}

}  // namespace
}  // namespace engine
