// CudaOps: PB-LLM's sweep (docs/methods/pbllm.md), in the frame of cuda/look_back.cuh: one kernel
// takes a block of columns through the sequential steps.
#include <string>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
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

// Pointers start at the block's first column, except levels, grids and loss.
struct PbllmBlock {
  float* w;
  std::int64_t w_stride;
  const float* x;  // pitch max_span; null: nothing is compensated yet
  const float* inverse;
  const std::uint8_t* salient;
  std::int64_t salient_stride;
  const float* means;
  std::int64_t mean_stride;
  const float* scales;
  std::int64_t scale_stride;
  const float* high_scales;
  std::int64_t high_scale_stride;
  const std::int32_t* high_zeros;
  std::int64_t high_zero_stride;
  std::uint8_t* codes;
  std::int64_t code_stride;
  double* loss;
  std::int64_t loss_stride;
  std::int64_t rows;
  std::uint32_t first;  // the block's first column
  std::uint32_t group;  // columns per level
  int n;                // columns of the block, at most 128
  GridParams high;
};

// One block of columns for all rows: current weights, then column by column code, error and
// (kCompensate) compensation inside the block; E replaces w.
//
// 8 warps of 4 rows; U_bb (64 KiB) in shared memory. Lane l holds columns l, l + 32, l + 64 and
// l + 96 of each row in registers and the current column is broadcast by a shuffle, so rows never
// wait for each other and there is no barrier in the loop. Which of 32 columns are salient is a
// ballot per row; the wide grid is looked at only if one of the warp's rows needs it, and then the
// four rows hide each other's divisions. U is zero left of its diagonal, hence a finished column,
// which holds w^, is not changed by later updates. About 2 * rows * n^2 flops.
template <bool kCompensate, bool kHalf>
__global__ void __launch_bounds__(sweep_threads) pbllm_kernel(const PbllmBlock p) {
  extern __shared__ float inverse[];  // [n, 128]
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < p.n * (max_block / 4); i += sweep_threads) {
    reinterpret_cast<float4*>(inverse)[i] = reinterpret_cast<const float4*>(p.inverse)[i];
  }
  __syncthreads();

  const int lane = thread % 32;
  const std::int64_t row0 =
      static_cast<std::int64_t>(blockIdx.x) * block_rows + thread / 32 * warp_rows;
  if (row0 >= p.rows) return;
  // Rows beyond the end repeat the last one and store nothing.
  const auto row_of = [&](int i) { return min(row0 + i, p.rows - 1); };

  float w[warp_rows][lane_columns];
  double loss[warp_rows];
  std::uint32_t salient = 0;  // bit 4 i + c: column 32 c + lane of row i
  std::uint32_t codes[warp_rows];
  float high_scale[warp_rows];
  float high_zero[warp_rows];
#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    codes[i] = 0;
    loss[i] = 0;
    high_scale[i] = p.high_scales[row_of(i) * p.high_scale_stride];
    high_zero[i] = static_cast<float>(p.high_zeros[row_of(i) * p.high_zero_stride]);
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      w[i][c] = column < p.n ? p.w[row_of(i) * p.w_stride + column] : 0.0F;
      if (p.x != nullptr && column < p.n) w[i][c] -= p.x[row_of(i) * max_span + column];
      if (column < p.n && p.salient[row_of(i) * p.salient_stride + column] != 0) {
        salient |= 1U << (lane_columns * i + c);
      }
    }
  }

  // Lane l reads the levels of row l % 4 for all.
  const float* own_means = p.means + row_of(lane % warp_rows) * p.mean_stride;
  const float* own_scales = p.scales + row_of(lane % warp_rows) * p.scale_stride;
  float mean[warp_rows];
  float scale[warp_rows];
  std::uint32_t unit = 0xffffffffU;
#pragma unroll
  for (int q = 0; q < lane_columns; ++q) {
    const int steps = min(32, p.n - 32 * q);
    std::uint32_t high[warp_rows];  // bit l: column 32 q + l
    std::uint32_t any = 0;
    float error[warp_rows];  // of this lane's column
#pragma unroll
    for (int i = 0; i < warp_rows; ++i) {
      high[i] = __ballot_sync(0xffffffffU, (salient >> (lane_columns * i + q) & 1U) != 0);
      any |= high[i];
      error[i] = 0.0F;
    }
#pragma unroll 1
    for (int l = 0; l < steps; ++l) {
      const int j = 32 * q + l;
      const std::uint32_t now = (p.first + static_cast<std::uint32_t>(j)) / p.group;
      if (now != unit) {  // the same for the whole block
        unit = now;
        const float own_mean = own_means[unit];
        const float own_scale = own_scales[unit];
#pragma unroll
        for (int i = 0; i < warp_rows; ++i) {
          mean[i] = __shfl_sync(0xffffffffU, own_mean, i);
          scale[i] = __shfl_sync(0xffffffffU, own_scale, i);
        }
      }
      float current[warp_rows];
      float code[warp_rows];
      float value[warp_rows];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        current[i] = __shfl_sync(0xffffffffU, w[i][q], l);
        const bool up = current[i] >= mean[i];
        code[i] = up ? 1.0F : 0.0F;
        value[i] = __fadd_rn(mean[i], up ? scale[i] : -scale[i]);
      }
      if ((any >> l & 1U) != 0) {
#pragma unroll
        for (int i = 0; i < warp_rows; ++i) {
          const float wide =
              quantize_on_grid(current[i], high_scale[i], high_zero[i], p.high.top, kHalf);
          const float wide_value = dequantize_on_grid(wide, high_scale[i], high_zero[i], kHalf);
          const bool here = (high[i] >> l & 1U) != 0;
          code[i] = here ? wide : code[i];
          value[i] = here ? wide_value : value[i];
        }
      }
      const float* u = inverse + j * max_block;
      const float pivot = u[j];
      float u_own[lane_columns];
#pragma unroll
      for (int c = q; c < lane_columns; ++c) u_own[c] = u[32 * c + lane];
#pragma unroll
      for (int i = 0; i < warp_rows; ++i) {
        const float e = __fdiv_rn(__fsub_rn(current[i], value[i]), pivot);
        if constexpr (kCompensate) {
#pragma unroll
          for (int c = q; c < lane_columns; ++c) w[i][c] -= e * u_own[c];
        }
        if (lane == l) {
          w[i][q] = value[i];
          error[i] = e;
          codes[i] |= static_cast<std::uint32_t>(code[i]) << (8 * q);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < warp_rows; ++i) {
      loss[i] += static_cast<double>(error[i]) * static_cast<double>(error[i]);
    }
  }

#pragma unroll
  for (int i = 0; i < warp_rows; ++i) {
    const std::int64_t row = row0 + i;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int column = 32 * c + lane;
      if (row < p.rows && column < p.n) {
        float* place = p.w + row * p.w_stride + column;
        *place = __fsub_rn(w[i][c], *place);
        p.codes[row * p.code_stride + column] = static_cast<std::uint8_t>(codes[i] >> (8 * c));
      }
    }
    const double sum = warp_reduce(loss[i], SumOp{});
    if (lane == 0 && row < p.rows) {
      double* place = p.loss + row * p.loss_stride;
      *place = p.first == 0 ? sum : *place + sum;
    }
  }
}

// Blocks may be wider than p.block: within one, compensation is immediate.
template <class T>
void sweep(cudaStream_t stream, cublasHandle_t cublas, const PbllmProblem& p) {
  LookBack<T> frame("pbllm_sweep", stream, cublas, p.w, p.r, p.workspace, 0);
  const GridParams high = grid_params(p.high);
  const auto sweep_block = [&](std::int64_t b, const float* x) {
    PbllmBlock block{};
    block.w = frame.w() + b;
    block.w_stride = frame.w_stride();
    block.x = x;
    block.inverse = frame.inverse(b);
    block.salient = p.salient.as<std::uint8_t>() + b;
    block.salient_stride = p.salient.stride;
    block.means = p.means.as<float>();
    block.mean_stride = p.means.stride;
    block.scales = p.scales.as<float>();
    block.scale_stride = p.scales.stride;
    block.high_scales = p.high_scales.as<float>();
    block.high_scale_stride = p.high_scales.stride;
    block.high_zeros = p.high_zeros.as<std::int32_t>();
    block.high_zero_stride = p.high_zeros.stride;
    block.codes = p.codes.as<std::uint8_t>() + b;
    block.code_stride = p.codes.stride;
    block.loss = p.loss.as<double>();
    block.loss_stride = p.loss.stride;
    block.rows = p.w.rows;
    block.first = static_cast<std::uint32_t>(b);
    block.group = static_cast<std::uint32_t>(p.w.cols / p.means.cols);
    block.n = static_cast<int>(frame.columns(b));
    block.high = high;
    const auto kernel = p.compensate
                            ? (high.half ? pbllm_kernel<true, true> : pbllm_kernel<true, false>)
                            : (high.half ? pbllm_kernel<false, true> : pbllm_kernel<false, false>);
    launch("pbllm_sweep", kernel, dim3(static_cast<unsigned>(ceil_div(p.w.rows, block_rows))),
           dim3(sweep_threads), sweep_shared, stream, block);
  };
  if (p.compensate) {
    frame.run(max_block, sweep_block);
    return;
  }
  frame.invert_blocks(max_block);  // the diagonal weighs the loss
  for (std::int64_t b = 0; b < p.w.cols; b += max_block) sweep_block(b, nullptr);
}

void check_problem(const PbllmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols, groups = p.means.cols;
  const auto require_shape = [](const char* what, const View& v, DType dtype, std::int64_t r,
                                std::int64_t c) {
    REQUIRE(v.dtype == dtype && v.rows == r && v.cols == c,
            std::string("pbllm_sweep: ") + what + " expected " + dtype_name(dtype) + " [" +
                std::to_string(r) + ", " + std::to_string(c) + "], found " + v.shape());
    require_cuda("pbllm_sweep", {v});
  };
  REQUIRE(p.high.group == 0, "pbllm_sweep: salient weights have one unit per row");
  REQUIRE(p.block >= 1 && p.block <= max_block, "pbllm_sweep: block of " + std::to_string(p.block));
  REQUIRE(rows > 0 && d > 0 && d < (std::int64_t{1} << 31) && rows < (std::int64_t{1} << 31),
          "pbllm_sweep: w " + p.w.shape());
  REQUIRE(groups > 0 && d % groups == 0, "pbllm_sweep: means " + p.means.shape());
  REQUIRE(p.r.dtype == DType::f32 || p.r.dtype == DType::f64, "pbllm_sweep: factor " + p.r.shape());
  require_shape("w", p.w, DType::f32, rows, d);
  require_shape("factor", p.r, p.r.dtype, d, d);
  require_shape("salient", p.salient, DType::u8, rows, d);
  require_shape("means", p.means, DType::f32, rows, groups);
  require_shape("scales", p.scales, DType::f32, rows, groups);
  require_shape("salient scales", p.high_scales, DType::f32, rows, 1);
  require_shape("salient zeros", p.high_zeros, DType::i32, rows, 1);
  require_shape("codes", p.codes, DType::u8, rows, d);
  require_shape("loss", p.loss, DType::f64, rows, 1);
}

}  // namespace

std::int64_t CudaOps::pbllm_workspace_bytes(std::int64_t rows, std::int64_t d,
                                            std::int64_t /*block*/, DType factor) {
  return LookBackLayout(rows, d, factor, 0).total;
}

void CudaOps::pbllm_sweep(const PbllmProblem& problem) {
  check_problem(problem);
  require_cuda("pbllm_sweep", {problem.workspace});
  REQUIRE(problem.workspace.contiguous() &&
              problem.workspace.bytes() >= pbllm_workspace_bytes(problem.w.rows, problem.w.cols,
                                                                 problem.block, problem.r.dtype),
          "pbllm_sweep: workspace " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    sweep<double>(stream_, cublas_, problem);
  } else {
    sweep<float>(stream_, cublas_, problem);
  }
}

}  // namespace engine
