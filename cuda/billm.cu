// CudaOps: BiLLM's sweep (docs/methods/billm.md) in its look-back form (cpu_billm.cpp has the
// derivation). Per block of columns: current weights and scores, the search of the salient columns,
// a sort of the magnitudes for their quantiles, the search of the break point, codes and
// coefficients, and -G. Everything is queued, nothing waits.
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <string>

#include "cuda/billm_kernels.cuh"
#include "cuda/billm_search.cuh"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/look_back.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr std::int64_t max_slices = 1056;  // CUDA blocks of a search: about 8 per multiprocessor
constexpr int key_bits = 31;               // magnitudes have no sign

using Keys = cub::DoubleBuffer<std::uint32_t>;

// How the rows are cut for the kernels that sum over them: by the rows alone, so that results do
// not depend on the device.
struct Slices {
  std::int64_t rows;  // of one slice
  std::int64_t count;

  explicit Slices(std::int64_t all) {
    const std::int64_t tiles = ceil_div(all, tile_rows);
    rows = tile_rows * ceil_div(tiles, max_slices);
    count = ceil_div(all, rows);
  }
};

std::int64_t sort_bytes(std::int64_t count) {
  std::size_t bytes = 0;
  Keys keys(nullptr, nullptr);
  CUDA_TRY(cub::DeviceRadixSort::SortKeys(nullptr, bytes, keys, count, 0, key_bits));
  return static_cast<std::int64_t>(bytes);
}

// The sweep's part of the frame's workspace.
struct SweepLayout {
  std::int64_t partial, state, current, target, error, keys, other_keys, sort, total;

  SweepLayout(std::int64_t rows, std::int64_t block) {
    total = 0;
    const std::int64_t matrix = rows * max_block * 4;
    partial = take(Slices(rows).count * max_block * 8);
    state = take(static_cast<std::int64_t>(sizeof(BlockState)));
    current = take(matrix);
    target = take(matrix);
    error = take(matrix);
    keys = take(rows * block * 4);
    other_keys = take(rows * block * 4);
    sort = take(sort_bytes(rows * block));
  }

 private:
  std::int64_t take(std::int64_t bytes) {
    const std::int64_t at = total;
    total += ceil_div(bytes, 256) * 256;
    return at;
  }
};

template <class T>
class SweepRun {
 public:
  SweepRun(cudaStream_t stream, cublasHandle_t cublas, const BillmProblem& problem)
      : stream_(stream),
        cublas_(cublas),
        p_(problem),
        rows_(problem.w.rows),
        layout_(problem.w.rows, problem.block),
        frame_("billm_sweep", stream, cublas, problem.w, problem.r, problem.workspace,
               layout_.total),
        own_(static_cast<std::uint8_t*>(frame_.own())) {
    const bool hessian = p_.metric == BillmMetric::hessian;
    const Slices slices(rows_);
    pass_.rows = rows_;
    pass_.slice = slices.rows;
    pass_.slices = static_cast<int>(slices.count);
    pass_.n = static_cast<int>(p_.block);
    pass_.hessian = hessian;
    pass_.with_mean = p_.with_mean;
    pass_.scale_dtype = p_.scale_dtype;
    pass_.w_stride = frame_.w_stride();
    pass_.current = at<float>(layout_.current);
    pass_.target =
        hessian && p_.search == BillmSearch::saliency ? at<float>(layout_.target) : pass_.current;
    pass_.error = at<float>(layout_.error);
    pass_.partial = at<double>(layout_.partial);
    pass_.state = at<BlockState>(layout_.state);
  }

  void run() {
    frame_.run(p_.block, [&](std::int64_t b, const float* x) {
      pass_.first_block = b == 0;
      pass_.w = frame_.w() + b;
      pass_.x = x;
      pass_.inverse = frame_.inverse(b);
      choose_columns(b);
      choose_break(b);
      binarize(b);
    });
  }

 private:
  template <class E>
  [[nodiscard]] E* at(std::int64_t offset) const {
    return reinterpret_cast<E*>(own_ + offset);
  }
  template <class... Params, class... Args>
  void start(void (*kernel)(Params...), std::int64_t grid, dim3 block, Args&&... args) {
    launch("billm_sweep", kernel, dim3(static_cast<unsigned>(grid)), block, 0, stream_,
           std::forward<Args>(args)...);
  }
  // Threads of a search: whole warps of candidates, and the rows of a tile.
  static dim3 search_block(std::int64_t candidates) {
    return {static_cast<unsigned>(ceil_div(candidates, 32) * 32), tile_rows, 1};
  }

  void choose_columns(std::int64_t b) {
    const std::int64_t tries = std::min(p_.max_salient, p_.block - 1);
    const int candidates = static_cast<int>(tries);
    start(load_block_kernel, pass_.slices, tile_, pass_);
    start(rank_kernel, 1, chooser_, pass_);
    start(p_.rest_passes == 1 ? search_columns_kernel<1> : search_columns_kernel<2>, pass_.slices,
          search_block(tries), pass_, candidates);
    start(choose_columns_kernel, 1, chooser_, pass_, candidates, p_.salient.as<std::uint8_t>() + b);
  }

  void choose_break(std::int64_t b) {
    Keys keys(at<std::uint32_t>(layout_.keys), at<std::uint32_t>(layout_.other_keys));
    const std::int64_t count = rows_ * p_.block;
    start(key_kernel, ceil_div(rows_, tile_rows), tile_, pass_, keys.Current());
    auto bytes = static_cast<std::size_t>(layout_.total - layout_.sort);
    CUDA_TRY(cub::DeviceRadixSort::SortKeys(at<void>(layout_.sort), bytes, keys, count, 0, key_bits,
                                            stream_));
    start(search_break_kernel, pass_.slices, search_block(break_points), pass_, keys.Current());
    start(choose_break_kernel, 1, chooser_, pass_, keys.Current(),
          p_.percent.as<std::int32_t>() + b / p_.block);
  }

  void binarize(std::int64_t b) {
    const std::int64_t unit = b / p_.block;
    BlockResult out{};
    out.first = p_.first.as<std::uint8_t>() + b;
    out.first_stride = p_.first.stride;
    out.second = p_.second.as<std::uint8_t>() + b;
    out.second_stride = p_.second.stride;
    for (std::size_t g = 0; g < billm_groups; ++g) {
      out.scales[g] = p_.scales[g].as<float>() + unit;
      out.scale_stride[g] = p_.scales[g].stride;
      out.means[g] = p_.means[g].as<float>() + unit;
      out.mean_stride[g] = p_.means[g].stride;
    }
    out.loss = p_.loss.as<double>();
    out.loss_stride = p_.loss.stride;
    start(binarize_kernel, ceil_div(rows_, binarize_threads / 32), dim3(binarize_threads), pass_,
          out);
    // -G = (current - w) - error U.
    gemm_f32(cublas_, false, false, rows_, p_.block, p_.block, -1.0F, pass_.error, max_block,
             pass_.inverse, max_block, 1.0F, pass_.w, pass_.w_stride);
  }

  const dim3 tile_{max_block, tile_rows, 1};
  const dim3 chooser_{max_block, sum_lanes, 1};
  cudaStream_t stream_;
  cublasHandle_t cublas_;
  const BillmProblem& p_;
  std::int64_t rows_;
  SweepLayout layout_;
  LookBack<T> frame_;
  std::uint8_t* own_;
  BillmPass pass_{};
};

void check_problem(const BillmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto require_shape = [](const char* what, const View& v, DType dtype, std::int64_t r,
                                std::int64_t c) {
    REQUIRE(v.dtype == dtype && v.rows == r && v.cols == c,
            std::string("billm_sweep: ") + what + " expected " + dtype_name(dtype) + " [" +
                std::to_string(r) + ", " + std::to_string(c) + "], found " + v.shape());
    require_cuda("billm_sweep", {v});
  };
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  REQUIRE(rows > 0 && d > 0 && d < limit && rows < limit / max_block,
          "billm_sweep: w " + p.w.shape());
  REQUIRE(p.block >= 2 && p.block <= billm_max_block && d % p.block == 0,
          "billm_sweep: blocks of " + std::to_string(p.block) + " in " + p.w.shape());
  REQUIRE(p.max_salient >= 1,
          "billm_sweep: at most " + std::to_string(p.max_salient) + " salient columns");
  REQUIRE(p.rest_passes == 1 || p.rest_passes == 2,
          "billm_sweep: passes " + std::to_string(p.rest_passes));
  REQUIRE(
      p.scale_dtype == DType::f32 || p.scale_dtype == DType::f16 || p.scale_dtype == DType::bf16,
      std::string("billm_sweep: scales of ") + dtype_name(p.scale_dtype));
  REQUIRE(p.r.dtype == DType::f32 || p.r.dtype == DType::f64, "billm_sweep: factor " + p.r.shape());
  require_shape("w", p.w, DType::f32, rows, d);
  require_shape("factor", p.r, p.r.dtype, d, d);
  require_shape("first bits", p.first, DType::u8, rows, d);
  require_shape("second bits", p.second, DType::u8, rows, d);
  require_shape("salient columns", p.salient, DType::u8, 1, d);
  require_shape("break points", p.percent, DType::i32, 1, d / p.block);
  for (std::size_t g = 0; g < billm_groups; ++g) {
    require_shape("scales", p.scales[g], DType::f32, rows, d / p.block);
    require_shape("means", p.means[g], DType::f32, rows, d / p.block);
  }
  require_shape("loss", p.loss, DType::f64, rows, 1);
}

}  // namespace

std::int64_t CudaOps::billm_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                            DType factor) {
  return LookBackLayout(rows, d, factor, SweepLayout(rows, block).total).total;
}

void CudaOps::billm_sweep(const BillmProblem& problem) {
  check_problem(problem);
  require_cuda("billm_sweep", {problem.workspace});
  REQUIRE(problem.workspace.contiguous() &&
              problem.workspace.bytes() >= billm_workspace_bytes(problem.w.rows, problem.w.cols,
                                                                 problem.block, problem.r.dtype),
          "billm_sweep: workspace " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    SweepRun<double>(stream_, cublas_, problem).run();
  } else {
    SweepRun<float>(stream_, cublas_, problem).run();
  }
}

}  // namespace engine
