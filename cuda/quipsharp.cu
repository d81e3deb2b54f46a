// CudaOps: QuIP#'s sweeps (docs/methods/quipsharp.md).
//
// Both kinds of pass have the form t_k = w_k + sum over j of D_j P_jk with a matrix P that depends
// on the moment alone (0 in block k itself): P is made once for the first pass and once for all
// others. What a panel of 128 columns gets from outside is a matrix product; columns in groups of
// 512 share one wide product with everything outside the group, and only what their own group has
// changed since is added panel by panel. The panel itself is one kernel.
//
// The products run on the tensor cores in bf16, with f32 accumulation: D = Dh + Dl and P = Ph + Pl,
// each half with 8 significant bits, and Dh Ph + Dl Ph + Dh Pl leaves a relative error of about
// 2^-16 per product. The three are one product over a threefold inner dimension: D is kept as
// [rows, panels x (Dh, Dl, Dh)] and P as [panels x (Ph; Ph; Pl), columns], so that any range of
// panels is a range of the inner dimension.
#include <algorithm>
#include <string>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/quipsharp_kernels.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

std::int64_t padded_columns(std::int64_t d) { return ceil_div(d, panel_columns) * panel_columns; }

// Where everything lies in the workspace, in bytes from its first multiple of 256.
struct SweepLayout {
  std::int64_t halves, feedback, diagonal, inverse, forms, products, total = 0;

  SweepLayout(std::int64_t rows, std::int64_t d) {
    const std::int64_t padded = padded_columns(d);
    halves = take(rows * 3 * padded * 2);
    feedback = take(3 * padded * padded * 2);
    diagonal = take(padded * panel_columns * 4);
    inverse = take(d * point_columns * 8);
    forms = take(d * point_columns * 4);
    products = take(rows * span_columns * 4);
    total += 256;
  }

 private:
  std::int64_t take(std::int64_t bytes) {
    const std::int64_t at = total;
    total += ceil_div(bytes, 256) * 256;
    return at;
  }
};

class SweepRun {
 public:
  SweepRun(cudaStream_t stream, cublasHandle_t cublas, const cudaDeviceProp& device,
           const QuipSharpProblem& problem)
      : stream_(stream),
        cublas_(cublas),
        p_(problem),
        rows_(problem.w.rows),
        d_(problem.w.cols),
        padded_(padded_columns(d_)) {
    const SweepLayout layout(rows_, d_);
    auto* base = p_.workspace.as<std::uint8_t>();
    base += -reinterpret_cast<std::uintptr_t>(base) % 256;
    halves_ = reinterpret_cast<__nv_bfloat16*>(base + layout.halves);
    feedback_ = reinterpret_cast<__nv_bfloat16*>(base + layout.feedback);
    diagonal_ = reinterpret_cast<float*>(base + layout.diagonal);
    inverse_ = reinterpret_cast<double*>(base + layout.inverse);
    forms_ = reinterpret_cast<float*>(base + layout.forms);
    products_ = reinterpret_cast<float*>(base + layout.products);
    // As few rows a block as give every multiprocessor at most one block.
    while (block_rows_ < max_block_rows &&
           ceil_div(rows_, block_rows_) > device.multiProcessorCount &&
           sweep_shared(2 * block_rows_) <= device.sharedMemPerBlockOptin) {
      block_rows_ *= 2;
    }
  }

  void run() {
    // The columns beyond d take part in the products.
    CUDA_TRY(
        cudaMemsetAsync(halves_, 0, static_cast<std::size_t>(rows_ * 3 * padded_ * 2), stream_));
    if (p_.r.dtype == DType::f64) {
      prepare<double, false>(p_.r);
    } else {
      prepare<float, false>(p_.r);
    }
    pass(0);
    if (p_.tuning > 0) prepare<float, true>(p_.h);
    for (int i = 1; i <= p_.tuning; ++i) pass(i);
  }

 private:
  template <class T, bool kTuning>
  void prepare(const View& source) {
    const std::int64_t blocks = d_ / point_columns;
    launch("quipsharp_sweep (blocks)", blocks_kernel<T, kTuning>,
           dim3(static_cast<unsigned>(ceil_div(blocks * point_columns, flat_threads))),
           dim3(flat_threads), 0, stream_, source.as<T>(), source.stride, blocks, inverse_, forms_);
    launch("quipsharp_sweep (feedback)", feedback_kernel<T, kTuning>,
           dim3(static_cast<unsigned>(padded_ / panel_columns),
                static_cast<unsigned>(padded_ / feedback_rows)),
           dim3(panel_columns), 0, stream_, source.as<T>(), source.stride, inverse_, d_, padded_,
           feedback_, diagonal_);
  }

  // products[:, at..at + columns) (+)= D[:, from..to) P[from..to, first..first + columns).
  // Returns whether the products hold anything.
  bool add_product(std::int64_t from, std::int64_t to, std::int64_t first, std::int64_t columns,
                   std::int64_t at, bool accumulate) {
    if (from >= to) return accumulate;
    gemm_16(cublas_, DType::bf16, false, false, rows_, columns, 3 * (to - from), 1.0F,
            halves_ + 3 * from, 3 * padded_, feedback_ + 3 * from * padded_ + first, padded_,
            accumulate ? 1.0F : 0.0F, products_ + at, span_columns);
    return true;
  }

  void pass(int number) {
    const bool tuning = number > 0;
    for (std::int64_t s0 = 0; s0 < padded_; s0 += span_columns) {
      const std::int64_t s1 = std::min(s0 + span_columns, padded_);
      bool wide = add_product(0, s0, s0, s1 - s0, 0, false);
      if (tuning) wide = add_product(s1, padded_, s0, s1 - s0, 0, wide);
      for (std::int64_t b = s0; b < s1; b += panel_columns) {
        bool any = add_product(s0, b, b, panel_columns, b - s0, wide);
        if (tuning) any = add_product(b + panel_columns, s1, b, panel_columns, b - s0, any);
        sweep_panel(b, any ? products_ + (b - s0) : nullptr, number);
      }
    }
  }

  void sweep_panel(std::int64_t first, const float* products, int number) {
    PanelSweep panel{};
    panel.w = p_.w.as<float>() + first;
    panel.w_stride = p_.w.stride;
    panel.products = products;
    panel.feedback = diagonal_ + first * panel_columns;
    panel.forms = forms_ + first * point_columns;
    panel.e = p_.e.as<float>() + first;
    panel.e_stride = p_.e.stride;
    panel.halves = halves_ + 3 * first;
    panel.halves_stride = 3 * padded_;
    panel.codes = p_.codes.as<std::int16_t>();
    panel.code_stride = p_.codes.stride;
    panel.residual = p_.residual.data;
    panel.residual_stride = p_.residual.stride;
    panel.loss = p_.loss.as<double>();
    panel.loss_stride = p_.loss.stride;
    panel.rows = rows_;
    panel.last_code = (d_ - first) / point_columns - 1;
    panel.n = static_cast<int>(std::min<std::int64_t>(panel_columns, d_ - first));
    panel.block_rows = block_rows_;
    panel.fresh = number == 0 && first == 0;
    panel.store = number == p_.tuning;
    const bool tuning = number > 0;
    const auto kernel = p_.bits == 2   ? (tuning ? panel_kernel<2, true> : panel_kernel<2, false>)
                        : p_.bits == 3 ? (tuning ? panel_kernel<3, true> : panel_kernel<3, false>)
                                       : (tuning ? panel_kernel<4, true> : panel_kernel<4, false>);
    launch("quipsharp_sweep", kernel, dim3(static_cast<unsigned>(ceil_div(rows_, block_rows_))),
           dim3(static_cast<unsigned>(sweep_threads(block_rows_))), sweep_shared(block_rows_),
           stream_, panel);
  }

  cudaStream_t stream_;
  cublasHandle_t cublas_;
  const QuipSharpProblem& p_;
  std::int64_t rows_;
  std::int64_t d_;
  std::int64_t padded_;
  __nv_bfloat16* halves_;
  __nv_bfloat16* feedback_;
  float* diagonal_;
  double* inverse_;
  float* forms_;
  float* products_;
  int block_rows_ = min_block_rows;
};

}  // namespace

void CudaOps::quipsharp_targets(View w, View squares, double factor, View out, View scale) {
  REQUIRE(out.rows == w.cols && out.cols == w.rows && squares.count() == 1 && scale.count() == 1 &&
              out.rows > 0 && out.cols > 0,
          "quipsharp_targets: " + w.shape() + " to " + out.shape());
  require_cuda("quipsharp_targets", {w, squares, out, scale});
  launch("quipsharp_targets", targets_kernel,
         dim3(static_cast<unsigned>(ceil_div(out.cols, tile)),
              static_cast<unsigned>(ceil_div(out.rows, tile))),
         dim3(tile, tile_rows), 0, stream_, w.as<float>(), w.stride, squares.as<double>(), factor,
         out.as<float>(), out.stride, scale.as<float>(), out.rows, out.cols);
}

std::int64_t CudaOps::quipsharp_workspace_bytes(std::int64_t rows, std::int64_t d) {
  return SweepLayout(rows, d).total;
}

void CudaOps::quipsharp_sweep(const QuipSharpProblem& problem) {
  check_quipsharp(problem, quipsharp_workspace_bytes(problem.w.rows, problem.w.cols));
  require_cuda("quipsharp_sweep", {problem.w, problem.r, problem.h, problem.e, problem.codes,
                                   problem.loss, problem.workspace});
  if (problem.bits > 2) require_cuda("quipsharp_sweep", {problem.residual});
  SweepRun(stream_, cublas_, properties_, problem).run();
}

}  // namespace engine
