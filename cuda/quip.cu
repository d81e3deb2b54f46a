// CudaOps: QuIP's elementwise parts, its sweep with linear feedback and its greedy passes
// (docs/methods/quip.md).
//
// The columns go in blocks of 128. What earlier columns feed back into a block is a product,
// X = E[:, :b] P with P_kj = R_kj / R_jj, of which the part before a span of 512 columns is made
// for the whole span at once; inside a block one kernel takes the columns one by one.
#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int block_columns = 128;
constexpr std::int64_t span_columns = 512;  // columns per wide product, and pitch of P and X
constexpr int flat_threads = 256;
constexpr int tile = 32;
constexpr int tile_rows = 8;   // threads of a tile: 32 x 8
constexpr int sum_warps = 32;  // of column_squares
constexpr int sweep_threads = 256;
constexpr int warp_rows = 4;  // rows of w per warp
constexpr int lane_columns = block_columns / 32;
constexpr int cta_rows = sweep_threads / 32 * warp_rows;
constexpr std::size_t sweep_shared = sizeof(float) * block_columns * block_columns;

// A CUDA block sums 32 columns, a warp every 32nd row of them, a lane its column, so that rows are
// read in whole segments and the order of additions is fixed. grid: cols / 32.
template <class T>
__global__ void __launch_bounds__(32 * sum_warps)
    column_squares_kernel(const T* w, std::int64_t stride, std::int64_t rows, std::int64_t cols,
                          double* out) {
  __shared__ double partial[sum_warps][33];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (c < cols) {
#pragma unroll 4
    for (std::int64_t r = warp; r < rows; r += sum_warps) {
      const auto v = static_cast<double>(to_f32(w[r * stride + c]));
      sum += v * v;
    }
  }
  partial[lane][warp] = sum;
  __syncthreads();
  // Warp i adds up the parts of column i.
  sum = warp_reduce(partial[warp][lane], SumOp{});
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * 32 + warp;
  if (lane == 0 && own < cols) out[own] = sum;
}

// A block makes the 32 x 32 tile (y, x), x <= y, and its mirror image through shared memory. grid:
// tiles x tiles (the upper half returns at once), block 32 x 8.
__global__ void __launch_bounds__(tile* tile_rows)
    scale_moment_kernel(const float* h, std::int64_t h_stride, const float* s, double scale,
                        float* out, std::int64_t out_stride, std::int64_t d) {
  if (blockIdx.x > blockIdx.y) return;
  __shared__ float values[tile][tile + 1];
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.y) * tile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * tile;
  const int tx = static_cast<int>(threadIdx.x);
  const std::int64_t j = j0 + tx;
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    const std::int64_t i = i0 + y;
    if (i >= d || j >= d) continue;
    const double a = s != nullptr ? static_cast<double>(s[i]) : 1.0;
    const double b = s != nullptr ? static_cast<double>(s[j]) : 1.0;
    const auto stored = static_cast<double>(h[max(i, j) * h_stride + min(i, j)]);
    const auto v = static_cast<float>(__dmul_rn(__dmul_rn(scale, __dmul_rn(a, b)), stored));
    values[y][tx] = v;
    out[i * out_stride + j] = v;
  }
  if (i0 == j0) return;  // that tile was written whole
  __syncthreads();
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    if (i0 + tx < d && j0 + y < d) out[(j0 + y) * out_stride + i0 + tx] = values[tx][y];
  }
}

struct Targets {
  const float* w;
  std::int64_t w_stride;
  const std::int32_t* perm;
  const float* scales;
  std::int64_t scale_stride;  // 0: one scale for all rows
  const std::int32_t* zeros;  // or null
  std::int64_t zero_stride;   // as scale_stride
  float* out;
  std::int64_t out_stride;
  std::int64_t rows;
  std::int64_t cols;
  float top;
};

__global__ void __launch_bounds__(flat_threads) code_targets_kernel(const Targets p) {
  for (std::int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
    const float scale = p.scales[r * p.scale_stride];
    const float zero =
        p.zeros != nullptr ? static_cast<float>(p.zeros[r * p.zero_stride]) : p.top / 2.0F;
    for (std::int64_t j =
             static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x);
         j < p.cols; j += static_cast<std::int64_t>(gridDim.x) * flat_threads) {
      const float v = __fadd_rn(__fdiv_rn(p.w[r * p.w_stride + p.perm[j]], scale), zero);
      p.out[r * p.out_stride + j] = fminf(fmaxf(v, 0.0F), p.top);
    }
  }
}

// P of the span that starts at s0, [s1, span_columns]: R_kj / R_jj for k < j, else 0. grid: x over
// columns, y over rows, about 16 of them a thread.
template <class T>
__global__ void __launch_bounds__(block_columns)
    feedback_kernel(const T* r, std::int64_t stride, std::int64_t s0, std::int64_t s1,
                    float* panel) {
  const std::int64_t c =
      static_cast<std::int64_t>(blockIdx.x) * block_columns + static_cast<int>(threadIdx.x);
  const std::int64_t j = s0 + c;
  if (j >= s1) return;
  const T pivot = r[j * stride + j];
  for (std::int64_t k = blockIdx.y; k < s1; k += gridDim.y) {
    panel[k * span_columns + c] = k < j ? static_cast<float>(r[k * stride + j] / pivot) : 0.0F;
  }
}

// Pointers start at the block's first column, except loss.
struct SweepBlock {
  float* w;  // targets in, E out
  std::int64_t w_stride;
  const float* x;      // pitch span_columns; null in the first block
  const float* panel;  // the block's own part of P [n, n], pitch span_columns
  const void* r;       // the block's own part of R, T [n, n]
  std::int64_t r_stride;
  std::uint8_t* codes;
  std::int64_t code_stride;
  double* loss;
  std::int64_t loss_stride;
  std::int64_t rows;
  int n;  // columns of the block, at most 128
  bool first;
  float top;
};

// [n, n] at pitch span_columns (or any) to [n, 128] in shared memory, zeros beside it.
__device__ void load_square(const float* from, std::int64_t pitch, int n, float* to) {
  for (int i = static_cast<int>(threadIdx.x); i < n * block_columns; i += sweep_threads) {
    const int row = i / block_columns;
    const int column = i % block_columns;
    to[i] = column < n ? from[row * pitch + column] : 0.0F;
  }
  __syncthreads();
}

// One block of columns for all rows. 8 warps of 4 rows; P (64 KiB) in shared memory. Lane l holds
// columns l, l + 32, l + 64 and l + 96 of each row in registers; the lane that owns the current
// column broadcasts its error by a shuffle, so rows never wait for each other and there is no
// barrier in the loop. P is zero on and left of its diagonal, so what a finished column holds stays
// and its code is read off again at the end. About rows * n^2 flops and n dependent steps.
template <class T>
__global__ void __launch_bounds__(sweep_threads, 3) ldlq_kernel(const SweepBlock p) {
  extern __shared__ float square[];  // [n, 128]
  load_square(p.panel, span_columns, p.n, square);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const std::int64_t row0 =
      static_cast<std::int64_t>(blockIdx.x) * cta_rows + thread / 32 * warp_rows;
  if (row0 >= p.rows) return;
  // Rows beyond the end repeat the last one and store nothing.
  const auto row_of = [&](int i) { return min(row0 + i, p.rows - 1); };
  const auto code_of = [&](float v) {
    return fminf(fmaxf(floorf(__fadd_rn(v, 0.5F)), 0.0F), p.top);
  };

  float target[warp_rows][lane_columns];
  float current[warp_rows][lane_columns];
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      const bool inside = column < p.n;
      target[i][c] = inside ? p.w[row_of(i) * p.w_stride + column] : 0.0F;
      current[i][c] = target[i][c];
      if (p.x != nullptr && inside) current[i][c] -= p.x[row_of(i) * span_columns + column];
    }
  }

#pragma unroll
  for (int q = 0; q < lane_columns; ++q) {
    const int steps = min(32, p.n - 32 * q);
#pragma unroll 1
    for (int l = 0; l < steps; ++l) {
      const float* u = square + (32 * q + l) * block_columns;
      float own[lane_columns];
#pragma unroll
      for (int c = q; c < lane_columns; ++c) own[c] = u[32 * c + lane];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        const float error = code_of(current[i][q]) - target[i][q];
        const float e = __shfl_sync(0xffffffffU, error, l);
#pragma unroll
        for (int c = q; c < lane_columns; ++c) current[i][c] -= e * own[c];
      }
    }
  }

  const auto* r = static_cast<const T*>(p.r);
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    const std::int64_t row = row0 + i;
    double loss = 0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      if (row < p.rows && column < p.n) {
        const float code = code_of(current[i][c]);
        const double lost = static_cast<double>(code - current[i][c]) *
                            static_cast<double>(r[column * p.r_stride + column]);
        loss += lost * lost;
        p.w[row * p.w_stride + column] = code - target[i][c];
        p.codes[row * p.code_stride + column] = static_cast<std::uint8_t>(code);
      }
    }
    loss = warp_reduce(loss, SumOp{});
    if (lane == 0 && row < p.rows) {
      double* place = p.loss + row * p.loss_stride;
      *place = p.first ? loss : *place + loss;
    }
  }
}

// Pointers start at the block's first column, except changed.
struct GreedyBlock {
  float* e;
  std::int64_t e_stride;
  const float* g;  // E H of the block with E as it is now, pitch span_columns
  const float* h;  // the block's own part of H [n, n]
  std::int64_t h_stride;
  float* steps;  // out: what was taken off E, pitch span_columns
  std::uint8_t* codes;
  std::int64_t code_stride;
  std::int32_t* changed;
  std::int64_t changed_stride;
  std::int64_t rows;
  int n;
  bool first;
  float top;
};

// One block of columns of a greedy pass; the same shape as ldlq_kernel. What a step changes in G
// left of its column no longer matters, so the whole row of H is applied, and the owner keeps the
// step itself.
__global__ void __launch_bounds__(sweep_threads, 3) greedy_kernel(const GreedyBlock p) {
  extern __shared__ float square[];  // [n, 128]
  load_square(p.h, p.h_stride, p.n, square);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const std::int64_t row0 =
      static_cast<std::int64_t>(blockIdx.x) * cta_rows + thread / 32 * warp_rows;
  if (row0 >= p.rows) return;
  const auto row_of = [&](int i) { return min(row0 + i, p.rows - 1); };

  float g[warp_rows][lane_columns];
  float code[warp_rows][lane_columns];
  float step[warp_rows][lane_columns];
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      const bool inside = column < p.n;
      g[i][c] = inside ? p.g[row_of(i) * span_columns + column] : 0.0F;
      code[i][c] = inside ? static_cast<float>(p.codes[row_of(i) * p.code_stride + column]) : 0.0F;
      step[i][c] = 0.0F;
    }
  }

#pragma unroll
  for (int q = 0; q < lane_columns; ++q) {
    const int steps = min(32, p.n - 32 * q);
#pragma unroll 1
    for (int l = 0; l < steps; ++l) {
      const int j = 32 * q + l;
      const float* u = square + j * block_columns;
      const float pivot = u[j];
      float own[lane_columns];
#pragma unroll
      for (int c = q; c < lane_columns; ++c) own[c] = u[32 * c + lane];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        const float k = code[i][q];
        const float mine = k - rintf(__fsub_rn(k, __fdiv_rn(g[i][q], pivot)));
        const float s = __shfl_sync(0xffffffffU, mine, l);
        if (lane == l) step[i][q] = s;
#pragma unroll
        for (int c = q; c < lane_columns; ++c) g[i][c] -= s * own[c];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    const std::int64_t row = row0 + i;
    int changed = 0;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      if (row < p.rows && column < p.n) {
        p.e[row * p.e_stride + column] -= step[i][c];
        p.steps[row * span_columns + column] = step[i][c];
        const float after = fminf(fmaxf(code[i][c] - step[i][c], 0.0F), p.top);
        changed += after == code[i][c] ? 0 : 1;
        p.codes[row * p.code_stride + column] = static_cast<std::uint8_t>(after);
      }
    }
    changed = warp_reduce(changed, SumOp{});
    if (lane == 0 && row < p.rows) {
      std::int32_t* place = p.changed + row * p.changed_stride;
      *place = p.first ? changed : *place + changed;
    }
  }
}

float top_code(const char* op, int bits) {
  REQUIRE(bits >= 1 && bits <= 8, std::string(op) + ": codes of " + std::to_string(bits) + " bits");
  return static_cast<float>((1 << bits) - 1);
}

void require_shape(const char* op, const char* what, const View& v, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(op) + ": " + what + " expected " + dtype_name(dtype) + " [" +
              std::to_string(rows) + ", " + std::to_string(cols) + "], found " + v.shape());
  require_cuda(op, {v});
}

// Elements from one row to the next, at least the columns also where there is one row.
std::int64_t pitch(const View& v) { return v.rows > 1 ? v.stride : std::max(v.stride, v.cols); }

// The two float matrices in a workspace, from its first multiple of 256 bytes on.
struct Pair {
  float* first;
  float* second;
};
std::int64_t pair_bytes(std::int64_t first, std::int64_t second) {
  return (ceil_div(first, 64) * 64 + second) * 4 + 256;
}
Pair take_pair(const char* op, const View& workspace, std::int64_t first, std::int64_t second) {
  require_cuda(op, {workspace});
  REQUIRE(workspace.contiguous() && workspace.bytes() >= pair_bytes(first, second),
          std::string(op) + ": workspace " + workspace.shape());
  auto* base = workspace.as<std::uint8_t>();
  base += -reinterpret_cast<std::uintptr_t>(base) % 256;
  auto* floats = reinterpret_cast<float*>(base);
  return {floats, floats + ceil_div(first, 64) * 64};
}

template <class T>
void sweep(const LdlqProblem& p, cublasHandle_t cublas, cudaStream_t stream) {
  const std::int64_t rows = p.w.rows;
  const std::int64_t d = p.w.cols;
  const auto [panel, x] =
      take_pair("ldlq_sweep", p.workspace, d * span_columns, rows * span_columns);
  float* w = p.w.as<float>();
  const std::int64_t w_stride = pitch(p.w);
  const T* r = p.r.as<T>();
  const std::int64_t r_stride = pitch(p.r);
  for (std::int64_t s0 = 0; s0 < d; s0 += span_columns) {
    const std::int64_t s1 = std::min(s0 + span_columns, d);
    launch("ldlq_sweep (feedback)", feedback_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(s1 - s0, block_columns)),
                static_cast<unsigned>(std::min<std::int64_t>(ceil_div(s1, 16), 65535))),
           dim3(block_columns), 0, stream, r, r_stride, s0, s1, panel);
    if (s0 > 0) {
      gemm_f32(cublas, false, false, rows, s1 - s0, s0, 1.0F, w, w_stride, panel, span_columns,
               0.0F, x, span_columns);
    }
    for (std::int64_t b = s0; b < s1; b += block_columns) {
      const std::int64_t n = std::min<std::int64_t>(block_columns, s1 - b);
      float* own = x + (b - s0);
      if (b > s0) {
        gemm_f32(cublas, false, false, rows, n, b - s0, 1.0F, w + s0, w_stride,
                 panel + s0 * span_columns + (b - s0), span_columns, s0 > 0 ? 1.0F : 0.0F, own,
                 span_columns);
      }
      SweepBlock block{};
      block.w = w + b;
      block.w_stride = w_stride;
      block.x = b > 0 ? own : nullptr;
      block.panel = panel + b * span_columns + (b - s0);
      block.r = r + b * r_stride + b;
      block.r_stride = r_stride;
      block.codes = p.codes.as<std::uint8_t>() + b;
      block.code_stride = p.codes.stride;
      block.loss = p.loss.as<double>();
      block.loss_stride = p.loss.stride;
      block.rows = rows;
      block.n = static_cast<int>(n);
      block.first = b == 0;
      block.top = top_code("ldlq_sweep", p.bits);
      launch("ldlq_sweep", ldlq_kernel<T>, dim3(static_cast<unsigned>(ceil_div(rows, cta_rows))),
             dim3(sweep_threads), sweep_shared, stream, block);
    }
  }
}

// Row counts that fit the y dimension of every grid here.
constexpr std::int64_t max_dim = 131070;

}  // namespace

void CudaOps::column_squares(View w, View out) {
  REQUIRE(!w.empty(), "column_squares: w " + w.shape());
  require_shape("column_squares", "out", out, DType::f64, 1, w.cols);
  require_cuda("column_squares", {w});
  dispatch_float(w.dtype, "column_squares", [&](auto type) {
    using T = decltype(type);
    launch("column_squares", column_squares_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(w.cols, 32))), dim3(32 * sum_warps), 0, stream_,
           static_cast<const T*>(w.data), w.stride, w.rows, w.cols, out.as<double>());
  });
}

void CudaOps::scale_moment(View h, View s, double scale, View out) {
  const std::int64_t d = h.rows;
  REQUIRE(h.dtype == DType::f32 && d > 0 && d <= max_dim && h.cols == d,
          "scale_moment: h " + h.shape());
  require_cuda("scale_moment", {h});
  require_shape("scale_moment", "out", out, DType::f32, d, d);
  if (!s.empty()) require_shape("scale_moment", "s", s, DType::f32, 1, d);
  const auto tiles = static_cast<unsigned>(ceil_div(d, tile));
  launch("scale_moment", scale_moment_kernel, dim3(tiles, tiles), dim3(tile, tile_rows), 0, stream_,
         h.as<float>(), h.stride, s.empty() ? nullptr : s.as<float>(), scale, out.as<float>(),
         out.stride, d);
}

void CudaOps::code_targets(View w, View perm, View scales, View zeros, int bits, View out) {
  constexpr const char* op = "code_targets";
  require_shape(op, "w", w, DType::f32, w.rows, w.cols);
  require_shape(op, "out", out, DType::f32, w.rows, w.cols);
  require_shape(op, "perm", perm, DType::i32, 1, w.cols);
  const bool one = scales.rows == 1;
  require_shape(op, "scales", scales, DType::f32, one ? 1 : w.rows, 1);
  if (!zeros.empty()) require_shape(op, "zeros", zeros, DType::i32, scales.rows, 1);
  Targets p{};
  p.w = w.as<float>();
  p.w_stride = w.stride;
  p.perm = perm.as<std::int32_t>();
  p.scales = scales.as<float>();
  p.scale_stride = one ? 0 : scales.stride;
  p.zeros = zeros.empty() ? nullptr : zeros.as<std::int32_t>();
  p.zero_stride = one ? 0 : zeros.stride;
  p.out = out.as<float>();
  p.out_stride = out.stride;
  p.rows = w.rows;
  p.cols = w.cols;
  p.top = top_code(op, bits);
  launch(op, code_targets_kernel, grid_2d(w.rows, w.cols, flat_threads), dim3(flat_threads), 0,
         stream_, p);
}

std::int64_t CudaOps::ldlq_workspace_bytes(std::int64_t rows, std::int64_t d) {
  return pair_bytes(d * span_columns, rows * span_columns);
}

void CudaOps::ldlq_sweep(const LdlqProblem& p) {
  constexpr const char* op = "ldlq_sweep";
  const std::int64_t rows = p.w.rows;
  const std::int64_t d = p.w.cols;
  REQUIRE(rows > 0 && d > 0 && d <= max_dim && rows < (std::int64_t{1} << 31),
          "ldlq_sweep: w " + p.w.shape());
  require_shape(op, "w", p.w, DType::f32, rows, d);
  require_shape(op, "factor", p.r, p.r.dtype, d, d);
  require_shape(op, "codes", p.codes, DType::u8, rows, d);
  require_shape(op, "loss", p.loss, DType::f64, rows, 1);
  if (p.r.dtype == DType::f64) {
    sweep<double>(p, cublas_, stream_);
  } else {
    sweep<float>(p, cublas_, stream_);
  }
}

std::int64_t CudaOps::greedy_workspace_bytes(std::int64_t rows, std::int64_t /*d*/) {
  return pair_bytes(rows * span_columns, rows * span_columns);
}

void CudaOps::ldlq_greedy(const GreedyProblem& p) {
  constexpr const char* op = "ldlq_greedy";
  const std::int64_t rows = p.e.rows;
  const std::int64_t d = p.e.cols;
  REQUIRE(rows > 0 && d > 0 && rows < (std::int64_t{1} << 31), "ldlq_greedy: e " + p.e.shape());
  require_shape(op, "e", p.e, DType::f32, rows, d);
  require_shape(op, "h", p.h, DType::f32, d, d);
  require_shape(op, "codes", p.codes, DType::u8, rows, d);
  require_shape(op, "changed", p.changed, DType::i32, rows, 1);
  const auto [g, steps] = take_pair(op, p.workspace, rows * span_columns, rows * span_columns);
  float* e = p.e.as<float>();
  const std::int64_t e_stride = pitch(p.e);
  const float* h = p.h.as<float>();
  const std::int64_t h_stride = pitch(p.h);
  for (std::int64_t s0 = 0; s0 < d; s0 += span_columns) {
    const std::int64_t s1 = std::min(s0 + span_columns, d);
    gemm_f32(cublas_, false, false, rows, s1 - s0, d, 1.0F, e, e_stride, h + s0, h_stride, 0.0F, g,
             span_columns);
    for (std::int64_t b = s0; b < s1; b += block_columns) {
      const std::int64_t n = std::min<std::int64_t>(block_columns, s1 - b);
      if (b > s0) {
        gemm_f32(cublas_, false, false, rows, n, b - s0, -1.0F, steps, span_columns,
                 h + s0 * h_stride + b, h_stride, 1.0F, g + (b - s0), span_columns);
      }
      GreedyBlock block{};
      block.e = e + b;
      block.e_stride = e_stride;
      block.g = g + (b - s0);
      block.h = h + b * h_stride + b;
      block.h_stride = h_stride;
      block.steps = steps + (b - s0);
      block.codes = p.codes.as<std::uint8_t>() + b;
      block.code_stride = p.codes.stride;
      block.changed = p.changed.as<std::int32_t>();
      block.changed_stride = p.changed.stride;
      block.rows = rows;
      block.n = static_cast<int>(n);
      block.first = b == 0;
      block.top = top_code(op, p.bits);
      launch(op, greedy_kernel, dim3(static_cast<unsigned>(ceil_div(rows, cta_rows))),
             dim3(sweep_threads), sweep_shared, stream_, block);
    }
  }
}

}  // namespace engine
