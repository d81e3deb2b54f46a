// The frame of a sweep in its look-back form, shared by the sweeps that quantize a block of columns
// in their own way.
//
// With H = R R^T and U = R^-1, the weights that a column-by-column sweep would hold in the columns
// of a block b, when it starts, are w[:, b] - X_b with X_b = E[:, :b0] P_b, P_b = R[:b0, b] U_bb
// and U_bb = R_bb^-1, where E = w^ - w of the finished columns stands where w was. P_b depends on R
// only, so it is made in the factor's precision and several blocks share one wide product: for the
// blocks of a span that starts at s0, E[:, :s0] times all their P at once, and then per block only
// the part of E made since.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/check.h"
#include "cuda/gemm.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int max_block = 128;          // columns of a block, and row pitch of the inverses
constexpr std::int64_t max_span = 512;  // columns per wide product, and pitch of P and X

// The inverses of all diagonal blocks of r: U_bb of the block at column c0 goes to rows c0.. of
// inverse32 (and of inverse64 unless null), [d, 128] with zeros beside the triangle. A CUDA block
// per diagonal block, 128 threads, thread t back-substitutes column t alone, so nothing is
// synchronised. Dynamic shared memory: T [128, 128]. About 8000 dependent steps, once per sweep.
template <class T>
__global__ void __launch_bounds__(max_block)
    invert_blocks_kernel(const T* r, std::int64_t stride, std::int64_t d, int width,
                         float* inverse32, double* inverse64) {
  extern __shared__ double shared_words[];
  T* u = reinterpret_cast<T*>(shared_words);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * width;
  const auto n = static_cast<int>(min(static_cast<std::int64_t>(width), d - first));
  const int t = static_cast<int>(threadIdx.x);
  for (int i = n - 1; i >= 0; --i) {
    const T* row = r + (first + i) * stride + first;
    T sum = i == t ? T{1} : T{0};
#pragma unroll 8
    for (int k = i + 1; k < n; ++k) sum -= row[k] * u[k * max_block + t];
    const T value = t >= n || i > t ? T{0} : sum / row[i];
    u[i * max_block + t] = value;
    inverse32[(first + i) * max_block + t] = static_cast<float>(value);
    if (inverse64 != nullptr) {
      inverse64[(first + i) * max_block + t] = static_cast<double>(value);
    }
  }
}

// out [rows, cols], pitch max_span, from in, pitch max_block. grid: a block of 128 threads a row.
__global__ void __launch_bounds__(max_block) narrow_kernel(const double* in, float* out, int cols) {
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const int c = static_cast<int>(threadIdx.x);
  if (c < cols) out[r * max_span + c] = static_cast<float>(in[r * max_block + c]);
}

// Where everything lies in the workspace, in bytes from its first multiple of 256. `own`: bytes for
// the sweep that uses the frame.
struct LookBackLayout {
  std::int64_t inverse32, inverse64, product64, panel, compensation, own, total;

  LookBackLayout(std::int64_t rows, std::int64_t d, DType factor, std::int64_t own_bytes) {
    const std::int64_t wide = factor == DType::f64 ? d * max_block * 8 : 0;
    total = 0;
    inverse32 = take(d * max_block * 4);
    inverse64 = take(wide);
    product64 = take(wide);                    // P of one block before it is narrowed
    panel = take(d * max_span * 4);            // P of a span
    compensation = take(rows * max_span * 4);  // X of a span
    own = take(own_bytes);
    total += 256;
  }

 private:
  std::int64_t take(std::int64_t bytes) {
    const std::int64_t at = total;
    total += ceil_div(bytes, 256) * 256;
    return at;
  }
};

// One sweep on its way: everything is queued on `stream` (also the handle's), nothing waits. T: the
// factor's element type. w f32 [rows, d] holds E in the columns of finished blocks, weights
// elsewhere; r [d, d] is upper triangular. `name` is the op's, for messages.
template <class T>
class LookBack {
 public:
  // workspace: LookBackLayout(rows, d, r.dtype, own_bytes).total bytes.
  LookBack(const char* name, cudaStream_t stream, cublasHandle_t cublas, View w, View r,
           View workspace, std::int64_t own_bytes)
      : name_(name),
        stream_(stream),
        cublas_(cublas),
        rows_(w.rows),
        d_(w.cols),
        w_(w.as<float>()),
        w_stride_(rows_ > 1 ? w.stride : std::max(w.stride, d_)),
        r_(r.as<T>()),
        r_stride_(d_ > 1 ? r.stride : 1) {
    const LookBackLayout layout(rows_, d_, r.dtype, own_bytes);
    auto* base = workspace.as<std::uint8_t>();
    base += -reinterpret_cast<std::uintptr_t>(base) % 256;
    inverse32_ = reinterpret_cast<float*>(base + layout.inverse32);
    inverse64_ = reinterpret_cast<double*>(base + layout.inverse64);
    product64_ = reinterpret_cast<double*>(base + layout.product64);
    panel_ = reinterpret_cast<float*>(base + layout.panel);
    compensation_ = reinterpret_cast<float*>(base + layout.compensation);
    own_ = base + layout.own;
  }

  // Takes the sweep through all blocks of `width` columns (1 to 128), `span` columns (a multiple of
  // width, at most max_span; wide_span(width) is best) per wide product. enter_span(s0) is called
  // before anything of the span is computed; block(b, x) has to queue the quantization of columns
  // [b, b + columns(b)), whose weights are now w - x (x f32 [rows, columns], pitch max_span; null
  // in the first block: 0), and E in their place.
  template <class Span, class Block>
  void run(std::int64_t width, std::int64_t span, Span&& enter_span, Block&& block) {
    width_ = width;
    invert_blocks();
    for (std::int64_t s0 = 0; s0 < d_; s0 += span) {
      const std::int64_t s1 = std::min(s0 + span, d_);
      enter_span(s0);
      for (std::int64_t b = s0; b < s1; b += width_) make_panel(b, b - s0);
      if (s0 > 0) {
        gemm_f32(cublas_, false, false, rows_, s1 - s0, s0, 1.0F, w_, w_stride_, panel_, max_span,
                 0.0F, compensation_, max_span);
      }
      for (std::int64_t b = s0; b < s1; b += width_) {
        if (b > s0) {
          gemm_f32(cublas_, false, false, rows_, columns(b), b - s0, 1.0F, w_ + s0, w_stride_,
                   panel_ + s0 * max_span + (b - s0), max_span, s0 > 0 ? 1.0F : 0.0F,
                   compensation_ + (b - s0), max_span);
        }
        block(b, b > 0 ? compensation_ + (b - s0) : nullptr);
      }
    }
  }
  template <class Block>
  void run(std::int64_t width, Block&& block) {
    run(
        width, wide_span(width), [](std::int64_t) {}, block);
  }

  // The inverses alone, for a sweep without compensation: then inverse() is valid and nothing else.
  void invert_blocks(std::int64_t width) {
    width_ = width;
    invert_blocks();
  }

  [[nodiscard]] static std::int64_t wide_span(std::int64_t width) {
    return max_span / width * width;
  }
  // Columns of the block that starts at b.
  [[nodiscard]] std::int64_t columns(std::int64_t b) const { return std::min(width_, d_ - b); }
  // U_bb of the block that starts at b: [columns(b), 128] with zeros beside the triangle.
  [[nodiscard]] const float* inverse(std::int64_t b) const { return inverse32_ + b * max_block; }
  [[nodiscard]] float* w() const { return w_; }
  [[nodiscard]] std::int64_t w_stride() const { return w_stride_; }  // at least d, also of one row
  [[nodiscard]] void* own() const { return own_; }  // own_bytes, at a multiple of 256 bytes

  // P of the block at b into columns `at` .. of the panel [d, 512].
  void make_panel(std::int64_t b, std::int64_t at) {
    if (b == 0) return;
    const std::int64_t n = columns(b);
    if constexpr (std::is_same_v<T, double>) {
      gemm_f64(cublas_, false, false, b, n, n, 1.0, r_ + b, r_stride_, inverse64_ + b * max_block,
               max_block, 0.0, product64_, max_block);
      launch((name_ + " (panel)").c_str(), narrow_kernel, dim3(static_cast<unsigned>(b)),
             dim3(max_block), 0, stream_, product64_, panel_ + at, static_cast<int>(n));
    } else {
      gemm_f32(cublas_, false, false, b, n, n, 1.0F, r_ + b, r_stride_, inverse32_ + b * max_block,
               max_block, 0.0F, panel_ + at, max_span);
    }
  }
  [[nodiscard]] const float* panel() const { return panel_; }

 private:
  void invert_blocks() {
    launch((name_ + " (inverses)").c_str(), invert_blocks_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(d_, width_))), dim3(max_block),
           sizeof(T) * max_block * max_block, stream_, r_, r_stride_, d_, static_cast<int>(width_),
           inverse32_, std::is_same_v<T, double> ? inverse64_ : nullptr);
  }

  std::string name_;
  cudaStream_t stream_;
  cublasHandle_t cublas_;
  std::int64_t rows_;
  std::int64_t d_;
  float* w_;
  std::int64_t w_stride_;
  const T* r_;
  std::int64_t r_stride_;
  std::int64_t width_ = max_block;
  float* inverse32_ = nullptr;     // [d, 128]
  double* inverse64_ = nullptr;    // [d, 128], f64 factors only
  double* product64_ = nullptr;    // [d, 128], f64 factors only
  float* panel_ = nullptr;         // [d, 512]
  float* compensation_ = nullptr;  // [rows, 512]
  void* own_ = nullptr;
};

}  // namespace
}  // namespace engine
