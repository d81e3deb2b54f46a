// CudaOps: SliM-LLM's sweep (docs/methods/slimllm.md): the look-back form of cuda/look_back.cuh in
// blocks of one group, each of its own width, whose grids are fitted when the sweep arrives.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/cuda_ops.h"
#include "cuda/look_back.cuh"
#include "cuda/slim_sweep.cuh"

namespace engine {
namespace {

constexpr std::int64_t own_bytes = 3 * most_parts * static_cast<std::int64_t>(sizeof(double));

void check_problem(const SlimProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto require_shape = [](const char* what, const View& v, DType dtype, std::int64_t r,
                                std::int64_t c) {
    REQUIRE(v.dtype == dtype && v.rows == r && v.cols == c,
            std::string("slim_sweep: ") + what + " expected " + dtype_name(dtype) + " [" +
                std::to_string(r) + ", " + std::to_string(c) + "], found " + v.shape());
    require_cuda("slim_sweep", {v});
  };
  REQUIRE(rows > 0 && d > 0 && d < (std::int64_t{1} << 31) && rows < (std::int64_t{1} << 31),
          "slim_sweep: w " + p.w.shape());
  REQUIRE(
      p.group >= 1 && p.group <= max_block && d % p.group == 0,
      "slim_sweep: groups of " + std::to_string(p.group) + " in " + std::to_string(d) + " columns");
  REQUIRE(p.r.dtype == DType::f32 || p.r.dtype == DType::f64, "slim_sweep: factor " + p.r.shape());
  REQUIRE(std::isfinite(p.lambda) && p.lambda >= 0.0, "lambda " + std::to_string(p.lambda));
  const std::int64_t groups = d / p.group;
  require_shape("w", p.w, DType::f32, rows, d);
  require_shape("factor", p.r, p.r.dtype, d, d);
  require_shape("bits", p.bits, DType::u8, 1, groups);
  if (!p.middle_zero.empty()) require_shape("middle zeros", p.middle_zero, DType::u8, 1, groups);
  require_shape("scales", p.scales, DType::f32, rows, groups);
  require_shape("zeros", p.zeros, DType::i32, rows, groups);
  require_shape("means", p.means, DType::f32, rows, groups);
  require_shape("codes", p.codes, DType::u8, rows, d);
  require_shape("loss", p.loss, DType::f64, rows, 1);
}

template <class T>
class SlimRun {
 public:
  SlimRun(CudaOps& ops, cublasHandle_t cublas, const SlimProblem& problem)
      : p_(problem),
        stream_(ops.stream()),
        look_("slim_sweep", stream_, cublas, problem.w, problem.r, problem.workspace, own_bytes),
        bits_(read(ops, problem.bits)),
        middle_(read(ops, problem.middle_zero)) {
    for (const std::uint8_t b : bits_) {
      REQUIRE(b >= 1 && b <= 8, "a group of " + std::to_string(b) + " bits");
    }
    grid_ = slim_params(problem.scale_dtype);
    const auto factors = slim_range_factors();
    std::copy(factors.begin(), factors.end(), ranges_.factor);
  }

  void run() {
    look_.run(p_.group, [&](std::int64_t b, const float* x) { take_group(b / p_.group, x); });
  }

 private:
  static std::vector<std::uint8_t> read(CudaOps& ops, const View& device) {
    std::vector<std::uint8_t> host(static_cast<std::size_t>(device.count()));
    if (!host.empty()) {
      ops.download(device, make_view(host.data(), DType::u8, DeviceKind::cpu, 1, device.cols));
    }
    return host;
  }

  void take_group(std::int64_t g, const float* x) {
    const auto at = static_cast<std::size_t>(g);
    const std::int64_t first = g * p_.group;
    SlimGroup v{};
    v.w = look_.w() + first;
    v.w_stride = look_.w_stride();
    v.x = x;
    v.inverse = look_.inverse(first);
    v.scales = p_.scales.as<float>() + g;
    v.scale_stride = p_.scales.stride;
    v.zeros = p_.zeros.as<std::int32_t>() + g;
    v.zero_stride = p_.zeros.stride;
    v.means = p_.means.as<float>() + g;
    v.mean_stride = p_.means.stride;
    v.codes = p_.codes.as<std::uint8_t>() + first;
    v.code_stride = p_.codes.stride;
    v.loss = p_.loss.as<double>();
    v.loss_stride = p_.loss.stride;
    v.rows = p_.w.rows;
    v.n = static_cast<int>(p_.group);
    v.bits = bits_[at];
    v.middle_zero = !middle_.empty() && middle_[at] != 0;
    v.first = g == 0;
    v.grid = grid_;
    v.grid.top = static_cast<float>((1 << v.bits) - 1);

    const dim3 fit_blocks(static_cast<unsigned>(ceil_div(v.rows, fit_rows)));
    const dim3 sweep_blocks(static_cast<unsigned>(ceil_div(v.rows, sweep_rows)));
    if (v.bits == 1) {
      launch("slim_sweep (means)", fit_signs_kernel, fit_blocks, dim3(group_threads), 0, stream_,
             v);
      launch("slim_sweep", sweep_group_kernel<true>, sweep_blocks, dim3(group_threads),
             sweep_shared, stream_, v);
      return;
    }
    fit_ranges(v, fit_blocks);
    launch("slim_sweep", sweep_group_kernel<false>, sweep_blocks, dim3(group_threads), sweep_shared,
           stream_, v);
  }

  void fit_ranges(const SlimGroup& v, dim3 blocks) {
    RangeSearch search = ranges_;
    search.candidates = p_.search ? slim_ranges : 1;
    // With lambda 1 it does not matter which elements are salient.
    if (!p_.search || p_.lambda == 1.0) {
      launch("slim_sweep (ranges)", fit_ranges_kernel<false>, blocks, dim3(group_threads), 0,
             stream_, v, search);
      return;
    }
    search.lambda = p_.lambda;
    SalienceParts& parts = search.parts;
    parts.count = static_cast<int>(std::min<std::int64_t>(most_parts, ceil_div(v.rows, fit_rows)));
    parts.sums = static_cast<double*>(look_.own());
    parts.squares = parts.sums + most_parts;
    parts.thresholds = parts.squares + most_parts;
    for (const auto& kernel :
         {salience_kernel<SalienceStep::mean>, salience_kernel<SalienceStep::deviation>,
          salience_kernel<SalienceStep::threshold>}) {
      launch("slim_sweep (salience)", kernel, dim3(static_cast<unsigned>(parts.count)),
             dim3(group_threads), 0, stream_, v, parts);
    }
    launch("slim_sweep (ranges)", fit_ranges_kernel<true>, blocks, dim3(group_threads), 0, stream_,
           v, search);
  }

  const SlimProblem& p_;
  cudaStream_t stream_;
  LookBack<T> look_;
  std::vector<std::uint8_t> bits_;
  std::vector<std::uint8_t> middle_;  // or empty
  GridParams grid_{};
  RangeSearch ranges_{};
};

}  // namespace

std::int64_t CudaOps::slim_workspace_bytes(std::int64_t rows, std::int64_t d,
                                           std::int64_t /*group*/, DType factor) {
  return LookBackLayout(rows, d, factor, own_bytes).total;
}

void CudaOps::slim_sweep(const SlimProblem& problem) {
  check_problem(problem);
  require_cuda("slim_sweep", {problem.workspace});
  REQUIRE(problem.workspace.contiguous() &&
              problem.workspace.bytes() >= slim_workspace_bytes(problem.w.rows, problem.w.cols,
                                                                problem.group, problem.r.dtype),
          "slim_sweep: workspace " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    SlimRun<double>(*this, cublas_, problem).run();
  } else {
    SlimRun<float>(*this, cublas_, problem).run();
  }
}

}  // namespace engine
