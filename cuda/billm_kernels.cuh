// Kernels of BiLLM's sweep, included by billm.cu alone (docs/methods/billm.md). One block of
// columns at a time; whatever one kernel decides stays on the device for the next.
#pragma once

#include <cstdint>

#include "cuda/look_back.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "engine/ops/billm_ops.h"

namespace engine {
namespace {

constexpr int break_points = static_cast<int>(billm_last_percent - billm_first_percent) + 1;
constexpr int tile_rows = 4;                         // rows of a CUDA block side by side
constexpr int tile_pitch = max_block + 4;            // of a row in shared memory
constexpr int sum_lanes = 8;                         // threads that share the sum of one candidate
constexpr int binarize_threads = 256;                // a warp per row
constexpr int lane_columns = max_block / 32;         // columns of a lane there
constexpr int load_threads = max_block * tile_rows;  // as [4, 128]
constexpr int search_threads = max_block * tile_rows;  // at most
constexpr int choose_threads = max_block * sum_lanes;

// What is decided about the current block, on the device.
struct BlockState {
  int rank[max_block];     // columns by decreasing score
  int order[max_block];    // the salient columns from left to right, then the others
  int salient[max_block];  // 1: salient
  int count;               // salient columns
  float break_point;
};

// The current block. Matrices without a stride have a pitch of 128.
struct BillmPass {
  std::int64_t rows;
  std::int64_t slice;  // rows per CUDA block in load and in the searches, a multiple of tile_rows
  int slices;
  int n;         // columns
  bool hessian;  // the metric
  bool with_mean;
  bool first_block;
  DType scale_dtype;
  float* w;  // from the block's first column on
  std::int64_t w_stride;
  const float* x;        // as LookBack::run gives it
  const float* inverse;  // [n, 128]
  float* current;        // [rows, n]: the weights
  float* target;         // [rows, n]: what the searches reconstruct; may be `current`
  float* error;          // [rows, n]: (w - w^) / U_jj
  double* partial;       // [slices, 128]: sums of a slice
  BlockState* state;
};

// load: current weights, targets, and the sums of the columns' scores. grid: slices.
__global__ void __launch_bounds__(load_threads) load_block_kernel(const BillmPass p) {
  __shared__ double sums[tile_rows][max_block];
  const int column = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.slice;
  const std::int64_t end = min(begin + p.slice, p.rows);
  double sum = 0.0;
  if (column < p.n) {
    const float u = p.inverse[column * max_block + column];
    const float square = __fmul_rn(u, u);
    for (std::int64_t row = begin + y; row < end; row += tile_rows) {
      float w = p.w[row * p.w_stride + column];
      if (p.x != nullptr) w = __fsub_rn(w, p.x[row * max_span + column]);
      const float score = p.hessian ? __fdiv_rn(__fmul_rn(w, w), square) : fabsf(w);
      p.current[row * max_block + column] = w;
      if (p.target != p.current) p.target[row * max_block + column] = score;
      sum += static_cast<double>(score);
    }
  }
  sums[y][column] = sum;
  __syncthreads();
  if (y > 0) return;
  for (int i = 1; i < tile_rows; ++i) sum += sums[i][column];
  p.partial[static_cast<std::int64_t>(blockIdx.x) * max_block + column] = sum;
}

// totals[c] = the sum of partial[:, c] for c < n, by a CUDA block of [8, 128] threads; the rest is
// left alone. The order of additions is the same for every c. Ends with a barrier.
__device__ inline void add_slices(const double* partial, int slices, int n, double* totals) {
  __shared__ double sums[sum_lanes][max_block];
  const int c = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  double sum = 0.0;
  if (c < n) {
    for (int s = y; s < slices; s += sum_lanes) {
      sum += partial[static_cast<std::int64_t>(s) * max_block + c];
    }
  }
  sums[y][c] = sum;
  __syncthreads();
  if (y == 0 && c < n) {
    for (int i = 1; i < sum_lanes; ++i) sum += sums[i][c];
    totals[c] = sum;
  }
  __syncthreads();
}

// The first of n candidates with the least sum of errors; 0 if all are NaN or infinite.
__device__ inline int first_least(const double* totals, int n) {
  int best = 0;
  double least = INFINITY;
  for (int c = 0; c < n; ++c) {
    if (totals[c] < least) {
      least = totals[c];
      best = c;
    }
  }
  return best;
}

// grid: 1. Equal scores rank from left to right.
__global__ void __launch_bounds__(choose_threads) rank_kernel(const BillmPass p) {
  __shared__ double score[max_block];
  __shared__ int rank[max_block];
  const int c = static_cast<int>(threadIdx.x);
  const bool mine = threadIdx.y == 0 && c < p.n;
  if (mine) rank[c] = c;  // whatever NaN leaves unset is a column, too
  add_slices(p.partial, p.slices, p.n, score);
  if (mine) {
    int before = 0;
    for (int j = 0; j < p.n; ++j) {
      before += score[j] > score[c] || (score[j] == score[c] && j < c) ? 1 : 0;
    }
    rank[before] = c;
  }
  __syncthreads();
  if (mine) p.state->rank[c] = rank[c];
}

struct RowLevel {
  float mean;
  float scale;
};

__device__ inline float round_level(float v, DType dtype) {
  if (dtype == DType::f16) return round_through<__half>(v);
  if (dtype == DType::bf16) return round_through<__nv_bfloat16>(v);
  return v;
}

// Where the block's results go: bits from its first column on, coefficients from its unit on.
struct BlockResult {
  std::uint8_t* first;
  std::int64_t first_stride;
  std::uint8_t* second;
  std::int64_t second_stride;
  float* scales[billm_groups];
  std::int64_t scale_stride[billm_groups];
  float* means[billm_groups];
  std::int64_t mean_stride[billm_groups];
  double* loss;
  std::int64_t loss_stride;
};

// Codes, coefficients and errors; current - w takes the place of w. A warp per row, lane l holds
// columns l, l + 32, l + 64 and l + 96.
__global__ void __launch_bounds__(binarize_threads)
    binarize_kernel(const BillmPass p, const BlockResult out) {
  constexpr unsigned all = 0xFFFFFFFFU;
  __shared__ float pivot[max_block];
  __shared__ int is_salient[max_block];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < p.n) {
    pivot[thread] = p.inverse[thread * max_block + thread];
    is_salient[thread] = p.state->salient[thread];
  }
  __syncthreads();
  const int lane = thread % 32;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (binarize_threads / 32) + thread / 32;
  if (row >= p.rows) return;

  const float break_point = p.state->break_point;
  float x[lane_columns], sum[lane_columns];
  int group[lane_columns];
  bool first[lane_columns], second[lane_columns];
#pragma unroll
  for (int c = 0; c < lane_columns; ++c) {
    const int column = 32 * c + lane;
    const bool inside = column < p.n;
    const std::int64_t at = row * max_block + column;
    x[c] = inside ? p.current[at] : 0.0F;
    sum[c] = 0.0F;
    group[c] = -1;
    if (inside) {
      const bool low = fabsf(p.target[at]) < break_point;
      group[c] = is_salient[column] != 0
                     ? static_cast<int>(billm_salient)
                     : static_cast<int>(low ? billm_concentrated : billm_sparse);
    }
    first[c] = false;
    second[c] = group[c] == static_cast<int>(billm_sparse);
  }

#pragma unroll
  for (int g = 0; g < static_cast<int>(billm_groups); ++g) {
    const bool residual = g == static_cast<int>(billm_residual);
    const int member = residual ? static_cast<int>(billm_salient) : g;
    int n = 0;
    double total = 0.0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const bool in = group[c] == member;
      n += __popc(__ballot_sync(all, in));
      if (in) total += static_cast<double>(x[c] - sum[c]);
    }
    RowLevel level{0.0F, 0.0F};
    if (n > 0) {
      if (p.with_mean) {
        total = warp_reduce(total, SumOp{});
        level.mean = round_level(static_cast<float>(total / static_cast<double>(n)), p.scale_dtype);
      }
      double distance = 0.0;
#pragma unroll
      for (int c = 0; c < lane_columns; ++c) {
        if (group[c] == member) {
          distance += static_cast<double>(fabsf(x[c] - sum[c] - level.mean));
        }
      }
      distance = warp_reduce(distance, SumOp{});
      level.scale =
          round_level(static_cast<float>(distance / static_cast<double>(n)), p.scale_dtype);
    }
    if (lane == 0) {
      out.scales[g][row * out.scale_stride[g]] = level.scale;
      out.means[g][row * out.mean_stride[g]] = level.mean;
    }
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      if (group[c] != member) continue;
      const bool up = x[c] - sum[c] - level.mean >= 0.0F;
      (residual ? second[c] : first[c]) = up;
      // As the codec adds: mean and scale of one term, then the terms.
      sum[c] += level.mean + (up ? level.scale : -level.scale);
    }
  }

  double loss = 0.0;
#pragma unroll
  for (int c = 0; c < lane_columns; ++c) {
    const int column = 32 * c + lane;
    if (column >= p.n) continue;
    const float error = __fdiv_rn(__fsub_rn(x[c], sum[c]), pivot[column]);
    p.error[row * max_block + column] = error;
    loss += static_cast<double>(error) * static_cast<double>(error);
    out.first[row * out.first_stride + column] = first[c] ? 1 : 0;
    out.second[row * out.second_stride + column] = second[c] ? 1 : 0;
    float* place = p.w + row * p.w_stride + column;
    *place = __fsub_rn(x[c], *place);
  }
  loss = warp_reduce(loss, SumOp{});
  if (lane == 0) {
    double* place = out.loss + row * out.loss_stride;
    *place = p.first_block ? loss : *place + loss;
  }
}

}  // namespace
}  // namespace engine
