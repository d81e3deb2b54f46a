// CudaOps: the search over clip bounds of AWQ (docs/methods/awq.md).
#include "cuda/awq_clip.cuh"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"

namespace engine {
namespace {

constexpr std::int64_t tile_unit = 128;    // the longest unit that a tile takes
constexpr std::int64_t chunk_rows = 4096;  // rows at a time where units are longer

// Where the loss is a form of the moments: they are then the smaller factors.
bool by_moments(std::int64_t unit, std::int64_t n) { return unit <= n; }
bool by_tiles(const GridSpec& grid, std::int64_t unit, std::int64_t n) {
  return by_moments(unit, n) && unit <= tile_unit && !grid.mse;
}

// Parts of the workspace, in floats from its start.
struct ClipLayout {
  std::int64_t moments = 0, error = 0, product = 0, ranges = 0, scales = 0, zeros = 0, total = 0;

  ClipLayout(std::int64_t rows, std::int64_t d, const GridSpec& grid, std::int64_t n) {
    const std::int64_t unit = grid.unit(d), m = std::min(rows, chunk_rows);
    const auto take = [this](std::int64_t floats) {
      const std::int64_t at = total;
      total += ceil_div(floats, 64) * 64;
      return at;
    };
    if (by_moments(unit, n)) moments = take(d * unit);
    if (by_tiles(grid, unit, n)) return;
    error = take(m * unit);
    product = take(m * (by_moments(unit, n) ? unit : n));
    ranges = take(2 * m);
    scales = take(m);
    zeros = take(m);
  }
};

void require_shape(const char* what, const View& v, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string("awq_clip: ") + what + " expected " + dtype_name(dtype) + " [" +
              std::to_string(rows) + ", " + std::to_string(cols) + "], found " + v.shape());
  require_cuda("awq_clip", {v});
}

void check_problem(const AwqClipProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols, n = p.x.rows;
  REQUIRE(rows > 0 && d > 0 && d % p.grid.unit(d) == 0, "awq_clip: groups divide the columns");
  REQUIRE(p.steps > 0 && p.candidates > 0 && p.candidates <= std::min(p.steps, 255) && n > 0,
          "awq_clip: 1 to min(steps, 255) candidates and at least one sample");
  REQUIRE(rows <= std::int64_t{tile_rows} * 65535 && d < (std::int64_t{1} << 31) &&
              n < (std::int64_t{1} << 31),
          "awq_clip: too large: " + p.w.shape());
  REQUIRE(p.w.dtype == DType::f32 || p.w.dtype == DType::f16, "awq_clip: w " + p.w.shape());
  const std::int64_t groups = p.grid.groups(d);
  require_shape("w", p.w, p.w.dtype, rows, d);
  require_shape("x", p.x, DType::f32, n, d);
  require_shape("choice", p.choice, DType::u8, rows, groups);
  require_shape("loss", p.loss, DType::f32, rows, groups);
  require_shape("plain loss", p.plain_loss, DType::f32, rows, groups);
}

template <class T>
class ClipRun {
 public:
  ClipRun(CudaOps& ops, cublasHandle_t cublas, const AwqClipProblem& p)
      : ops_(ops),
        cublas_(cublas),
        p_(p),
        layout_(p.w.rows, p.w.cols, p.grid, p.x.rows),
        base_(static_cast<float*>(p.workspace.data)),
        unit_(p.grid.unit(p.w.cols)),
        n_(p.x.rows) {}

  void run() {
    if (by_moments(unit_, n_)) find_moments();
    const std::int64_t rows = p_.w.rows, groups = p_.grid.groups(p_.w.cols);
    if (by_tiles(p_.grid, unit_, n_)) {
      if (unit_ <= 32) return tiles<32>();
      if (unit_ <= 64) return tiles<64>();
      return tiles<128>();
    }
    for (std::int64_t u = 0; u < groups; ++u) {
      for (std::int64_t first = 0; first < rows; first += chunk_rows) {
        chunk(u, first, std::min(chunk_rows, rows - first));
      }
    }
  }

 private:
  [[nodiscard]] T* weights(std::int64_t row, std::int64_t group) const {
    return static_cast<T*>(p_.w.data) + row * p_.w.stride + group * unit_;
  }
  [[nodiscard]] std::int64_t x_stride() const {
    return n_ > 1 ? p_.x.stride : std::max(p_.x.stride, p_.x.cols);
  }
  [[nodiscard]] ClipParams params(std::int64_t row, std::int64_t group) const {
    return {.rows = p_.w.rows,
            .unit = static_cast<int>(unit_),
            .steps = p_.steps,
            .candidates = p_.candidates,
            .ends = p_.ends,
            .samples = static_cast<double>(n_),
            .grid = grid_params(p_.grid),
            .choice = p_.choice.as<std::uint8_t>() + row * p_.choice.stride + group,
            .choice_stride = p_.choice.stride,
            .loss = p_.loss.as<float>() + row * p_.loss.stride + group,
            .loss_stride = p_.loss.stride,
            .plain_loss = p_.plain_loss.as<float>() + row * p_.plain_loss.stride + group,
            .plain_stride = p_.plain_loss.stride};
  }

  // x_u^T x_u of every unit, [groups][unit][unit]. Symmetric, so the library's reading by columns
  // changes nothing.
  void find_moments() {
    const float one = 1.0F, none = 0.0F;
    const auto* x = p_.x.as<float>();
    LIBRARY_TRY(cublasSgemmStridedBatched_64(cublas_, CUBLAS_OP_N, CUBLAS_OP_T, unit_, unit_, n_,
                                             &one, x, x_stride(), unit_, x, x_stride(), unit_,
                                             &none, base_ + layout_.moments, unit_, unit_ * unit_,
                                             p_.grid.groups(p_.w.cols)));
  }

  template <int kUnit>
  void tiles() {
    const dim3 grid(static_cast<unsigned>(p_.grid.groups(p_.w.cols)),
                    static_cast<unsigned>(ceil_div(p_.w.rows, tile_rows)));
    constexpr std::size_t bytes = sizeof(float) * kUnit * (kUnit + tile_pitch);
    launch("clip_tile", clip_tile_kernel<T, kUnit>, grid, dim3(tile_threads), bytes, ops_.stream(),
           weights(0, 0), p_.w.stride, base_ + layout_.moments, params(0, 0));
  }

  void chunk(std::int64_t u, std::int64_t first, std::int64_t m) {
    const ClipParams params = this->params(first, u);
    T* w = weights(first, u);
    auto* ranges = reinterpret_cast<DeviceRange*>(base_ + layout_.ranges);
    float* error = base_ + layout_.error;
    float* product = base_ + layout_.product;
    float* scales = base_ + layout_.scales;
    auto* zeros = reinterpret_cast<std::int32_t*>(base_ + layout_.zeros);
    GridSpec row_grid = p_.grid;
    row_grid.group = 0;
    const dim3 grid(static_cast<unsigned>(m)), block(row_threads);
    const cudaStream_t stream = ops_.stream();
    launch("unit_range", unit_range_kernel<T>, grid, block, 0, stream, w, p_.w.stride, params.unit,
           ranges);
    for (int i = 0; i < p_.candidates; ++i) {
      launch("clip_clamp", clamp_kernel<T, float>, grid, block, 0, stream, w, p_.w.stride, ranges,
             i, params, error, unit_);
      ops_.find_grid(make_view(error, DType::f32, DeviceKind::cuda, m, unit_), row_grid,
                     make_view(scales, DType::f32, DeviceKind::cuda, m, 1),
                     make_view(zeros, DType::i32, DeviceKind::cuda, m, 1));
      launch("clip_error", clip_error_kernel<T>, grid, block, 0, stream, w, p_.w.stride, scales,
             zeros, params, error);
      const bool moments = by_moments(unit_, n_);
      if (moments) {
        gemm_f32(cublas_, false, false, m, unit_, unit_, 1.0F, error, unit_,
                 base_ + layout_.moments + u * unit_ * unit_, unit_, 0.0F, product, unit_);
      } else {
        gemm_f32(cublas_, false, true, m, n_, unit_, 1.0F, error, unit_,
                 p_.x.as<float>() + u * unit_, x_stride(), 0.0F, product, n_);
      }
      launch("clip_decide", clip_decide_kernel, grid, block, 0, stream, moments ? error : product,
             product, static_cast<int>(moments ? unit_ : n_), i, params);
    }
    launch("clip_clamp", clamp_kernel<T, T>, grid, block, 0, stream, w, p_.w.stride, ranges, -1,
           params, w, p_.w.stride);
  }

  CudaOps& ops_;
  cublasHandle_t cublas_;
  const AwqClipProblem& p_;
  ClipLayout layout_;
  float* base_;
  std::int64_t unit_;
  std::int64_t n_;
};

}  // namespace

std::int64_t CudaOps::awq_clip_bytes(std::int64_t rows, std::int64_t d, const GridSpec& grid,
                                     std::int64_t n) {
  return ClipLayout(rows, d, grid, n).total * std::int64_t{sizeof(float)};
}

void CudaOps::awq_clip(const AwqClipProblem& problem) {
  check_problem(problem);
  require_cuda("awq_clip", {problem.workspace});
  REQUIRE(problem.workspace.contiguous() &&
              problem.workspace.bytes() >=
                  awq_clip_bytes(problem.w.rows, problem.w.cols, problem.grid, problem.x.rows),
          "awq_clip: workspace " + problem.workspace.shape());
  if (problem.w.dtype == DType::f16) {
    ClipRun<__half>(*this, cublas_, problem).run();
  } else {
    ClipRun<float>(*this, cublas_, problem).run();
  }
}

}  // namespace engine
