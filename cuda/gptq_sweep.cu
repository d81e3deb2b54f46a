// CudaOps: the GPTQ sweep in its look-back form (docs/methods/gptq.md).
// Its frame is cuda/look_back.cuh; here are the grids, and one kernel that takes a block's columns
// through the sequential steps.
#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/gptq_kernels.cuh"
#include "cuda/look_back.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

// Floats of the sweep's own part of the workspace: current weights of a group, at least one row.
std::int64_t scratch_floats(std::int64_t rows, std::int64_t d) { return rows * max_block + d; }

// One problem on its way: everything is queued, nothing waits.
template <class T>
class SweepRun {
 public:
  SweepRun(CudaOps& ops, cublasHandle_t cublas, const GptqProblem& problem)
      : ops_(ops),
        cublas_(cublas),
        p_(problem),
        params_(grid_params(problem.grid)),
        rows_(problem.w.rows),
        d_(problem.w.cols),
        frame_("gptq_sweep", ops.stream(), cublas, problem.w, problem.r, problem.workspace,
               scratch_floats(rows_, d_) * 4),
        w_(frame_.w()),
        w_stride_(frame_.w_stride()),
        scratch_(static_cast<float*>(frame_.own())) {}

  void run() {
    const std::int64_t group = p_.grid.group;
    const bool per_row = group == 0 && !p_.grids_given;
    if (per_row) ops_.find_grid(p_.w, p_.grid, p_.scales, p_.zeros);
    // Blocks inside the kernel may be wider than p_.block: the codes depend on where groups start
    // but not on where blocks do, because within a block compensation is immediate.
    const bool moving = !p_.grids_given && group != 0;
    const bool in_kernel = moving && group <= max_block && !p_.grid.mse;
    const bool refit = moving && !in_kernel;
    width_ = max_block;
    if (in_kernel) width_ = max_block / group * group;
    if (refit && group % max_block != 0) width_ = group < max_block ? group : p_.block;
    const std::int64_t span = refit ? width_ : max_span / width_ * width_;

    frame_.run(
        width_, span,
        [&](std::int64_t s0) {
          if (refit && s0 % group == 0) find_group_grids(s0);
        },
        [&](std::int64_t b, const float* x) { sweep_block(b, x, in_kernel); });
  }

 private:
  // The grids of the group that starts at `first` from its current weights, for groups of several
  // blocks and for the mse search. If the group's columns were kept at their current weights, their
  // E would be -X: so X of its later blocks follows by the sweep's own formula. Rows in pieces,
  // as many as the scratch holds.
  void find_group_grids(std::int64_t first) {
    const std::int64_t last = std::min(first + p_.grid.group, d_);
    const std::int64_t n = last - first;
    const std::int64_t unit = first / p_.grid.group;
    const View scales = p_.scales.col_range(unit, 1);
    const View zeros = p_.zeros.col_range(unit, 1);
    if (first == 0) {
      ops_.find_grid(p_.w.col_range(0, n), p_.grid, scales, zeros);
      return;
    }
    const std::int64_t piece = std::min(rows_, scratch_floats(rows_, d_) / n);
    for (std::int64_t r0 = 0; r0 < rows_; r0 += piece) {
      const std::int64_t m = std::min(piece, rows_ - r0);
      const float* w = w_ + r0 * w_stride_;
      for (std::int64_t b = first; b < last; b += width_) {
        const std::int64_t done = b - first;
        frame_.make_panel(b, 0);
        gemm_f32(cublas_, false, false, m, frame_.columns(b), first, -1.0F, w, w_stride_,
                 frame_.panel(), max_span, 0.0F, scratch_ + done, n);
        if (done > 0) {
          gemm_f32(cublas_, false, false, m, frame_.columns(b), done, -1.0F, scratch_, n,
                   frame_.panel() + first * max_span, max_span, 1.0F, scratch_ + done, n);
        }
      }
      launch("gptq_sweep (group)", add_weights_kernel, grid_2d(m, n, flat_threads),
             dim3(flat_threads), 0, ops_.stream(), w + first, w_stride_, scratch_, m, n);
      ops_.find_grid(make_view(scratch_, DType::f32, DeviceKind::cuda, m, n), p_.grid,
                     scales.row_range(r0, m), zeros.row_range(r0, m));
    }
  }

  void sweep_block(std::int64_t b, const float* x, bool find_grids) {
    const std::int64_t unit = std::min(p_.grid.unit(d_), d_);
    BlockSweep block{};
    block.w = w_ + b;
    block.w_stride = w_stride_;
    block.x = x;
    block.inverse = frame_.inverse(b);
    block.scales = p_.scales.as<float>();
    block.scale_stride = p_.scales.stride;
    block.zeros = p_.zeros.as<std::int32_t>();
    block.zero_stride = p_.zeros.stride;
    block.column_group = p_.column_group.empty() ? nullptr : p_.column_group.as<std::int32_t>() + b;
    block.codes = p_.codes.as<std::uint8_t>() + b;
    block.code_stride = p_.codes.stride;
    block.loss = p_.loss.as<double>();
    block.loss_stride = p_.loss.stride;
    block.rows = rows_;
    block.first = static_cast<std::uint32_t>(b);
    block.unit = static_cast<std::uint32_t>(unit);
    block.n = static_cast<int>(frame_.columns(b));
    block.grid = params_;
    const auto kernel =
        find_grids ? (params_.half ? sweep_kernel<true, true> : sweep_kernel<true, false>)
                   : (params_.half ? sweep_kernel<false, true> : sweep_kernel<false, false>);
    launch("gptq_sweep", kernel, dim3(static_cast<unsigned>(ceil_div(rows_, block_rows))),
           dim3(sweep_threads), sweep_shared, ops_.stream(), block);
  }

  CudaOps& ops_;
  cublasHandle_t cublas_;
  const GptqProblem& p_;
  GridParams params_;
  std::int64_t rows_;
  std::int64_t d_;
  LookBack<T> frame_;
  float* w_;
  std::int64_t w_stride_;
  float* scratch_;
  std::int64_t width_ = max_block;
};

void check_problem(const GptqProblem& p) {
  check_grid_spec(p.grid);
  const std::int64_t rows = p.w.rows;
  const std::int64_t d = p.w.cols;
  const std::int64_t groups = p.grid.groups(d);
  const auto require_shape = [](const char* what, const View& v, DType dtype, std::int64_t r,
                                std::int64_t c) {
    REQUIRE(v.dtype == dtype && v.rows == r && v.cols == c,
            std::string("gptq_sweep: ") + what + " expected " + dtype_name(dtype) + " [" +
                std::to_string(r) + ", " + std::to_string(c) + "], found " + v.shape());
    require_cuda("gptq_sweep", {v});
  };
  REQUIRE(rows > 0 && d > 0 && d < (std::int64_t{1} << 31) && rows < (std::int64_t{1} << 31),
          "gptq_sweep: w " + p.w.shape());
  REQUIRE(p.block >= 1 && p.block <= max_block, "gptq_sweep: block of " + std::to_string(p.block));
  REQUIRE(p.grids_given || p.grid.group % p.block == 0,
          "gptq_sweep: blocks of " + std::to_string(p.block) + " do not divide groups of " +
              std::to_string(p.grid.group));
  REQUIRE(p.grids_given || p.column_group.empty(),
          "gptq_sweep: groups found on the way are consecutive");
  require_shape("w", p.w, DType::f32, rows, d);
  require_shape("factor", p.r, p.r.dtype, d, d);
  require_shape("scales", p.scales, DType::f32, rows, groups);
  require_shape("zeros", p.zeros, DType::i32, rows, groups);
  require_shape("codes", p.codes, DType::u8, rows, d);
  require_shape("loss", p.loss, DType::f64, rows, 1);
  if (!p.column_group.empty()) require_shape("column groups", p.column_group, DType::i32, 1, d);
}

}  // namespace

std::int64_t CudaOps::gptq_workspace_bytes(std::int64_t rows, std::int64_t d,
                                           std::int64_t /*block*/, DType factor) {
  return LookBackLayout(rows, d, factor, scratch_floats(rows, d) * 4).total;
}

void CudaOps::gptq_sweep(const GptqProblem& problem) {
  check_problem(problem);
  require_cuda("gptq_sweep", {problem.workspace});
  REQUIRE(problem.workspace.contiguous() &&
              problem.workspace.bytes() >= gptq_workspace_bytes(problem.w.rows, problem.w.cols,
                                                                problem.block, problem.r.dtype),
          "gptq_sweep: workspace " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    SweepRun<double>(*this, cublas_, problem).run();
  } else {
    SweepRun<float>(*this, cublas_, problem).run();
  }
}

}  // namespace engine
