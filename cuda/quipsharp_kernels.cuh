// Kernels of QuIP#'s sweeps, included by quipsharp.cu alone (see there for how they fit together).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/types.cuh"
#include "engine/weight/e8_search.h"

namespace engine {
namespace {

constexpr int panel_columns = 128;
constexpr int point_columns = 8;  // of a block
constexpr int panel_blocks = panel_columns / point_columns;
constexpr int form_size = point_columns * point_columns;
constexpr std::int64_t span_columns = 512;  // columns per wide product, and pitch of the products
constexpr int flat_threads = 128;
constexpr int tile = 32;
constexpr int tile_rows = 8;  // threads of a tile: 32 x 8

__constant__ constexpr E8Tables device_tables = make_e8_tables();

// out[r, j] = w[d - 1 - j, r] / scale. A block turns a 32 x 32 tile through shared memory.
__global__ void __launch_bounds__(tile* tile_rows)
    targets_kernel(const float* w, std::int64_t w_stride, const double* squares, double factor,
                   float* out, std::int64_t out_stride, float* scale, std::int64_t rows,
                   std::int64_t d) {
  __shared__ float values[tile][tile + 1];
  const double mean = *squares / static_cast<double>(rows * d);
  const float s = mean > 0 ? static_cast<float>(sqrt(mean) / factor) : 1.0F;
  const int tx = static_cast<int>(threadIdx.x);
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * tile;
  const std::int64_t r0 = static_cast<std::int64_t>(blockIdx.y) * tile;
  if (j0 == 0 && r0 == 0 && tx == 0 && threadIdx.y == 0) *scale = s;
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    if (j0 + y < d && r0 + tx < rows) values[y][tx] = w[(d - 1 - j0 - y) * w_stride + r0 + tx];
  }
  __syncthreads();
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    if (r0 + y < rows && j0 + tx < d) {
      out[(r0 + y) * out_stride + j0 + tx] = __fdiv_rn(values[tx][y], s);
    }
  }
}

// For every diagonal block S of `source` (R, or H while tuning), [d / 8, 8, 8] each: its inverse,
// and the quadratic form of the loss in that block: R R^T, or H. Eight threads a block, thread t
// takes column t; the Cholesky factor of a block of H is made by all eight. A few hundred dependent
// f64 operations, twice per sweep.
template <class T, bool kTuning>
__global__ void __launch_bounds__(flat_threads)
    blocks_kernel(const T* source, std::int64_t stride, std::int64_t blocks, double* inverse,
                  float* form) {
  const std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * (flat_threads / point_columns) +
                         static_cast<int>(threadIdx.x) / point_columns;
  const int t = static_cast<int>(threadIdx.x) % point_columns;
  if (k >= blocks) return;
  const T* s = source + k * point_columns * (stride + 1);
  const auto at = [&](int i, int j) { return static_cast<double>(s[i * stride + j]); };
  double u[point_columns];
  if constexpr (kTuning) {
    double l[point_columns][point_columns];
#pragma unroll
    for (int j = 0; j < point_columns; ++j) {
#pragma unroll
      for (int i = j; i < point_columns; ++i) {
        double sum = at(i, j);
#pragma unroll
        for (int q = 0; q < j; ++q) sum -= l[i][q] * l[j][q];
        l[i][j] = i == j ? sqrt(sum) : sum / l[j][j];
      }
    }
#pragma unroll
    for (int i = 0; i < point_columns; ++i) {
      double sum = i == t ? 1.0 : 0.0;
#pragma unroll
      for (int q = 0; q < i; ++q) sum -= l[i][q] * u[q];
      u[i] = sum / l[i][i];
    }
#pragma unroll
    for (int i = point_columns - 1; i >= 0; --i) {
      double sum = u[i];
#pragma unroll
      for (int q = i + 1; q < point_columns; ++q) sum -= l[q][i] * u[q];
      u[i] = sum / l[i][i];
    }
  } else {
#pragma unroll
    for (int i = point_columns - 1; i >= 0; --i) {
      double sum = i == t ? 1.0 : 0.0;
#pragma unroll
      for (int q = i + 1; q < point_columns; ++q) sum -= at(i, q) * u[q];
      u[i] = sum / at(i, i);
    }
  }
#pragma unroll
  for (int i = 0; i < point_columns; ++i) {
    double value = 0;
    if constexpr (kTuning) {
      value = at(i, t);
    } else {
#pragma unroll
      for (int q = 0; q < point_columns; ++q) value += at(i, q) * at(t, q);
    }
    inverse[k * form_size + i * point_columns + t] = u[i];
    form[k * form_size + i * point_columns + t] = static_cast<float>(value);
  }
}

// A value as the sum of two of 8 significant bits each.
struct Halves {
  __nv_bfloat16 high, low;
};
__device__ inline Halves split(float v) {
  const __nv_bfloat16 high = __float2bfloat16_rn(v);
  return {high, __float2bfloat16_rn(__fsub_rn(v, __bfloat162float(high)))};
}

// The feedback P[j, x] = sum over c of S[j, 8 k + c] inverse_k[c, x % 8] with k = x / 8: 0 in block
// k itself and, in the first pass, below it and beyond d. Written in halves, for each panel of 128
// rows one below the other: high, high, low ([3 padded, padded] in all), and in f32 for the
// diagonal panels ([padded, 128]). A thread per column of a panel, feedback_rows rows; 8 f64
// multiply-adds an element.
constexpr int feedback_rows = 32;

template <class T, bool kTuning>
__global__ void __launch_bounds__(panel_columns)
    feedback_kernel(const T* source, std::int64_t stride, const double* inverse, std::int64_t d,
                    std::int64_t padded, __nv_bfloat16* feedback, float* diagonal) {
  const int c = static_cast<int>(threadIdx.x);
  const std::int64_t panel = blockIdx.x;
  const std::int64_t x = panel * panel_columns + c;
  const std::int64_t first = x - x % point_columns;  // of the block
  double u[point_columns];
#pragma unroll
  for (int i = 0; i < point_columns; ++i) {
    u[i] = x < d ? inverse[first * point_columns + i * point_columns + c % point_columns] : 0.0;
  }
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.y) * feedback_rows;
  for (std::int64_t j = j0; j < j0 + feedback_rows; ++j) {  // padded is a multiple of it
    const bool taken =
        x < d && j < d && (kTuning ? j < first || j >= first + point_columns : j < first);
    double sum = 0;
    if (taken) {
      const T* row = source + j * stride + first;
#pragma unroll
      for (int i = 0; i < point_columns; ++i) sum += static_cast<double>(row[i]) * u[i];
    }
    const auto value = static_cast<float>(sum);
    const Halves halves = split(value);
    const std::int64_t row = j / panel_columns * 3 * panel_columns + j % panel_columns;
    feedback[row * padded + x] = halves.high;
    feedback[(row + panel_columns) * padded + x] = halves.high;
    feedback[(row + 2 * panel_columns) * padded + x] = halves.low;
    if (j / panel_columns == panel) diagonal[j * panel_columns + c] = value;
  }
}

// Pointers start at the panel's first column, except codes, residual and loss.
struct PanelSweep {
  const float* w;
  std::int64_t w_stride;
  const float* products;  // pitch span_columns; null: 0
  const float* feedback;  // [n, 128]
  const float* forms;     // [n / 8, 8, 8]
  float* e;
  std::int64_t e_stride;
  __nv_bfloat16* halves;  // D of the panel: high, low, high
  std::int64_t halves_stride;
  std::int16_t* codes;
  std::int64_t code_stride;
  void* residual;
  std::int64_t residual_stride;
  double* loss;
  std::int64_t loss_stride;
  std::int64_t rows;
  std::int64_t last_code;  // the column of the panel's first block in the codes
  int n;                   // columns of the panel, a multiple of 8, at most 128
  int block_rows;          // rows of a thread block
  bool fresh;              // the loss starts here
  bool store;              // this pass's codes are the ones to keep
};

constexpr int min_block_rows = 32, max_block_rows = 256;
// Threads of a block; those beyond its rows only help to move data.
constexpr int sweep_threads(int block_rows) { return block_rows < 128 ? 128 : block_rows; }

// Shared memory of a block.
constexpr std::size_t sweep_shared(int block_rows) {
  return sizeof(float) * (panel_columns * panel_columns + panel_blocks * form_size) +
         sizeof(E8Tables) +
         sizeof(float) * panel_columns * static_cast<std::size_t>(block_rows + 1);
}

// One panel for all rows: blocks of 8 columns one after another, each moved by the errors of the
// other blocks of the panel and rounded to its nearest point.
//
// A thread per row: the search for a point is the longest part, some thousand instructions of f32
// without memory, and needs all 8 coordinates in one place. Errors of the panel lie in shared
// memory, [128 columns][rows + 1] (a thread reads its own column of it: no conflicts, and the
// odd pitch lets rows be written in order), the feedback [128, 128] is read at one address by the
// whole warp. Per block of 8: 1024 multiply-adds (half of it in the first pass) and the search.
template <int kBits, bool kTuning>
__global__ void __launch_bounds__(max_block_rows, 1) panel_kernel(const PanelSweep p) {
  extern __shared__ float4 shared_words[];
  auto* feedback = reinterpret_cast<float*>(shared_words);
  float* forms = feedback + panel_columns * panel_columns;
  auto* tables = reinterpret_cast<E8Tables*>(forms + panel_blocks * form_size);
  auto* error = reinterpret_cast<float*>(tables + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int pitch = p.block_rows + 1;
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.x) * p.block_rows;
  for (int i = thread; i < p.n * (panel_columns / 4); i += threads) {
    reinterpret_cast<float4*>(feedback)[i] = reinterpret_cast<const float4*>(p.feedback)[i];
  }
  for (int i = thread; i < p.n * (point_columns / 4); i += threads) {
    reinterpret_cast<float4*>(forms)[i] = reinterpret_cast<const float4*>(p.forms)[i];
  }
  for (int i = thread; i < static_cast<int>(sizeof(E8Tables) / 4); i += threads) {
    reinterpret_cast<std::uint32_t*>(tables)[i] =
        reinterpret_cast<const std::uint32_t*>(&device_tables)[i];
  }
  for (int i = thread; i < p.block_rows * panel_columns; i += threads) {
    const int r = i / panel_columns, c = i % panel_columns;
    const bool there = kTuning && row0 + r < p.rows && c < p.n;
    error[c * pitch + r] = there ? p.e[(row0 + r) * p.e_stride + c] : 0.0F;
  }
  __syncthreads();

  const std::int64_t row = row0 + thread;
  const bool live = thread < p.block_rows && row < p.rows;
  float* own = error + thread;
  double loss = 0;
#pragma unroll 1
  for (int b = 0; b < (live ? p.n : 0); b += point_columns) {
    float w[point_columns], x[point_columns], t[point_columns];
#pragma unroll
    for (int c = 0; c < point_columns; ++c) {
      w[c] = p.w[row * p.w_stride + b + c];
      x[c] = p.products != nullptr ? p.products[row * span_columns + b + c] : 0.0F;
      t[c] = 0.0F;
    }
    const int end = kTuning ? p.n : b;
#pragma unroll 4
    for (int j = 0; j < end; ++j) {
      const float v = own[j * pitch];
      const auto* f = reinterpret_cast<const float4*>(feedback + j * panel_columns + b);
      const float4 f0 = f[0], f1 = f[1];
      t[0] += v * f0.x;
      t[1] += v * f0.y;
      t[2] += v * f0.z;
      t[3] += v * f0.w;
      t[4] += v * f1.x;
      t[5] += v * f1.y;
      t[6] += v * f1.z;
      t[7] += v * f1.w;
    }
    // Inside a block the weight's own order: the reverse.
    float in[point_columns], value[point_columns];
#pragma unroll
    for (int c = 0; c < point_columns; ++c) {
      t[c] += w[c] + x[c];
      in[point_columns - 1 - c] = t[c];
    }
    const E8Codes codes = e8_quantize<kBits>(in, *tables, value);

    // As a function of w^ the loss is a quadratic form of w^ - t in this block, up to a constant:
    // the difference to before is (new - old) form (new + old).
    float change[point_columns], sum[point_columns];
#pragma unroll
    for (int c = 0; c < point_columns; ++c) {
      const float q = value[point_columns - 1 - c];
      float* place = own + (b + c) * pitch;
      const float old = kTuning ? w[c] - *place - t[c] : 0.0F;
      const float now = q - t[c];
      change[c] = now - old;
      sum[c] = now + old;
      *place = w[c] - q;
    }
    float difference = 0;
    const auto* form = reinterpret_cast<const float4*>(forms + b * point_columns);
#pragma unroll
    for (int i = 0; i < point_columns; ++i) {
      const float4 a = form[2 * i], c = form[2 * i + 1];
      const float product = a.x * sum[0] + a.y * sum[1] + a.z * sum[2] + a.w * sum[3] +
                            c.x * sum[4] + c.y * sum[5] + c.z * sum[6] + c.w * sum[7];
      difference += change[i] * product;
    }
    loss += static_cast<double>(difference);

    if (p.store) {
      const std::int64_t k = p.last_code - b / point_columns;
      p.codes[row * p.code_stride + k] = static_cast<std::int16_t>(codes.first);
      if constexpr (kBits == 3) {
        static_cast<std::uint8_t*>(p.residual)[row * p.residual_stride + k] =
            static_cast<std::uint8_t>(codes.second);
      }
      if constexpr (kBits == 4) {
        static_cast<std::int16_t*>(p.residual)[row * p.residual_stride + k] =
            static_cast<std::int16_t>(codes.second);
      }
    }
  }
  if (live) {
    double* place = p.loss + row * p.loss_stride;
    *place = p.fresh ? loss : *place + loss;
  }
  __syncthreads();
  for (int i = thread; i < p.block_rows * panel_columns; i += threads) {
    const int r = i / panel_columns, c = i % panel_columns;
    if (row0 + r >= p.rows || c >= p.n) continue;
    const float v = error[c * pitch + r];
    p.e[(row0 + r) * p.e_stride + c] = v;
    const Halves halves = split(v);
    __nv_bfloat16* out = p.halves + (row0 + r) * p.halves_stride + c;
    out[0] = halves.high;
    out[panel_columns] = halves.low;
    out[2 * panel_columns] = halves.high;
  }
}

}  // namespace
}  // namespace engine
