// CudaOps: the search over channel scales of AWQ (docs/methods/awq.md). Clipping: awq_clip.cu.
#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/grid.cuh"
#include "cuda/mse_grid.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int flat_threads = 256;
constexpr int strip = 32;                 // columns that a block of add_abs_sums adds up
constexpr std::int64_t warp_unit = 1024;  // longer units get a whole block
constexpr std::int64_t panel_rows = 2048;
constexpr int dot_blocks = 512;
constexpr std::int64_t header_bytes = 256;

void require_shape(const char* op, const char* what, const View& v, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(op) + ": " + what + " expected " + dtype_name(dtype) + " [" +
              std::to_string(rows) + ", " + std::to_string(cols) + "], found " + v.shape());
}

// A block owns `strip` columns and its 32 warps every 32nd row each, so nothing but x is read and
// no partial sums leave the block. Bound by memory; 8 loads in flight per thread.
template <class T>
__global__ void __launch_bounds__(strip * 32)
    add_abs_sums_kernel(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t cols,
                        double* sums) {
  __shared__ double parts[32][strip + 1];
  const auto lane = static_cast<int>(threadIdx.x);
  const auto warp = static_cast<int>(threadIdx.y);
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * strip + lane;
  double sum = 0;
  if (c < cols) {
#pragma unroll 8
    for (std::int64_t r = warp; r < rows; r += 32) {
      sum += static_cast<double>(fabsf(to_f32(x[r * stride + c])));
    }
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= cols) return;
  for (int i = 1; i < 32; ++i) sum += parts[i][lane];
  sums[c] += sum;
}

template <class T, class Out>
__global__ void __launch_bounds__(flat_threads)
    scale_weights_kernel(const T* w, std::int64_t stride, const float* s, const float* t, Out* out,
                         std::int64_t out_stride, std::int64_t rows, std::int64_t cols) {
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t c = std::int64_t{blockIdx.x} * flat_threads + threadIdx.x; c < cols;
         c += std::int64_t{gridDim.x} * flat_threads) {
      float v = to_f32(w[r * stride + c]);
      if (s != nullptr) v = round_through<Out>(__fmul_rn(v, s[c]));
      if (t != nullptr) v = __fdiv_rn(v, t[r]);
      out[r * out_stride + c] = from_f32<Out>(v);
    }
  }
}

// One warp (kThreads = 32) or one block per unit, N neighbours at a time. The second reading of w
// and s comes from the cache, except in very long units. Bound by memory, nearly by instructions.
template <class T, class Out, int kThreads, int N>
__global__ void __launch_bounds__(flat_threads)
    round_trip_kernel(const T* w, std::int64_t stride, const float* s, Out* out,
                      std::int64_t out_stride, std::int64_t cols, std::int64_t unit,
                      std::int64_t groups, std::int64_t units, GridParams p) {
  __shared__ float scratch[32];
  __shared__ double loss_scratch[32];
  constexpr int per_block = flat_threads / kThreads;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  const std::int64_t index =
      std::int64_t{blockIdx.x} * per_block + static_cast<int>(threadIdx.x) / kThreads;
  if (index >= units) return;  // whole warps, and no whole block
  const std::int64_t r = index / groups;
  const std::int64_t first = index % groups * unit;
  const T* from = w + r * stride + first;
  const float* scale = s + first;
  Out* to = out + r * out_stride + first;
  const auto n = static_cast<int>(min(unit, cols - first));

  float negated_lo = -INFINITY;
  float hi = -INFINITY;
  for (int i = thread * N; i < n; i += kThreads * N) {
    const auto v = *reinterpret_cast<const Pack<T, N>*>(from + i);
    const auto f = *reinterpret_cast<const Pack<float, N>*>(scale + i);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float scaled = in_arithmetic(p.half, __fmul_rn(to_f32(v.v[e]), f.v[e]));
      negated_lo = fmaxf(negated_lo, -scaled);
      hi = fmaxf(hi, scaled);
    }
  }
  if constexpr (kThreads == 32) {
    negated_lo = warp_reduce(negated_lo, MaxOp{});
    hi = warp_reduce(hi, MaxOp{});
  } else {
    negated_lo = block_reduce(negated_lo, MaxOp{}, -INFINITY, scratch);
    hi = block_reduce(hi, MaxOp{}, -INFINITY, scratch);
  }
  const auto scaled_weight = [&](int i) {
    return in_arithmetic(p.half, __fmul_rn(to_f32(from[i]), scale[i]));
  };
  const DeviceRange range{-negated_lo, hi};
  const UnitGrid grid = p.mse ? mse_grid<kThreads>(range, thread, n, scaled_weight, p, loss_scratch)
                              : unit_grid(range, p);
  const auto zero = static_cast<float>(grid.zero);
  for (int i = thread * N; i < n; i += kThreads * N) {
    const auto v = *reinterpret_cast<const Pack<T, N>*>(from + i);
    const auto f = *reinterpret_cast<const Pack<float, N>*>(scale + i);
    Pack<Out, N> result;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float scaled = in_arithmetic(p.half, __fmul_rn(to_f32(v.v[e]), f.v[e]));
      const float code = quantize_on_grid(scaled, grid.scale, zero, p.top, p.half);
      const float value = dequantize_on_grid(code, grid.scale, zero, p.half);
      result.v[e] = from_f32<Out>(in_arithmetic(p.half, __fdiv_rn(value, f.v[e])));
    }
    *reinterpret_cast<Pack<Out, N>*>(to + i) = result;
  }
}

// The power of two that brings the largest |difference| (its bits) to 2^14 .. 2^15, as an exponent.
// Nothing is scaled if it is not finite: the loss then is not, either.
__device__ int half_exponent(std::uint32_t bits) {
  if (bits == 0 || bits >= 0x7f800000U) return 0;
  return min(14 - (static_cast<int>(bits >> 23) - 127), 100);
}

// Bits of non-negative floats order as the floats do, NaN above all; a maximum knows no order.
template <class A, class B>
__global__ void __launch_bounds__(flat_threads)
    largest_difference_kernel(const A* a, std::int64_t a_stride, const B* b, std::int64_t b_stride,
                              std::int64_t rows, std::int64_t cols, std::uint32_t* largest) {
  std::uint32_t most = 0;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t c = std::int64_t{blockIdx.x} * flat_threads + threadIdx.x; c < cols;
         c += std::int64_t{gridDim.x} * flat_threads) {
      const float d = __fsub_rn(to_f32(a[r * a_stride + c]), to_f32(b[r * b_stride + c]));
      most = max(most, __float_as_uint(fabsf(d)));
    }
  }
  most = __reduce_max_sync(0xffffffffU, most);
  if (threadIdx.x % 32 == 0 && most > 0) atomicMax(largest, most);
}

template <class A, class B>
__global__ void __launch_bounds__(flat_threads)
    half_difference_kernel(const A* a, std::int64_t a_stride, const B* b, std::int64_t b_stride,
                           std::int64_t rows, std::int64_t cols, const std::uint32_t* largest,
                           __half* out, std::int64_t out_stride) {
  const float factor =
      __uint_as_float(static_cast<std::uint32_t>(half_exponent(*largest) + 127) << 23);
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t c = std::int64_t{blockIdx.x} * flat_threads + threadIdx.x; c < cols;
         c += std::int64_t{gridDim.x} * flat_threads) {
      const float d = __fsub_rn(to_f32(a[r * a_stride + c]), to_f32(b[r * b_stride + c]));
      out[r * out_stride + c] = __float2half_rn(__fmul_rn(d, factor));
    }
  }
}

// partials[b] = sum of g h over rows b, b + gridDim.x, .. of a panel of rows of the two symmetric
// matrices, from row `first` on: left of the diagonal twice, on it once. g has pitch first + rows.
__global__ void __launch_bounds__(flat_threads)
    panel_dot_kernel(const float* g, const float* h, std::int64_t h_stride, std::int64_t first,
                     int rows, double* partials) {
  __shared__ double scratch[32];
  double sum = 0;
  for (int r = static_cast<int>(blockIdx.x); r < rows; r += static_cast<int>(gridDim.x)) {
    const std::int64_t diagonal = first + r;
    const float* left = g + r * (first + rows);
    const float* right = h + diagonal * h_stride;
    double twice = 0;
#pragma unroll 4
    for (std::int64_t c = threadIdx.x; c < diagonal; c += flat_threads) {
      twice += static_cast<double>(left[c]) * static_cast<double>(right[c]);
    }
    sum += 2.0 * twice;
    if (threadIdx.x == 0) {
      sum += static_cast<double>(left[diagonal]) * static_cast<double>(right[diagonal]);
    }
  }
  sum = block_reduce(sum, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(flat_threads)
    moment_finish_kernel(const double* partials, std::int64_t count, const std::uint32_t* largest,
                         double* out) {
  __shared__ double scratch[32];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += flat_threads) sum += partials[i];
  sum = block_reduce(sum, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) *out = ldexp(sum, -2 * half_exponent(*largest));
}

// Parts of moment_loss's workspace, in bytes from its start.
struct MomentLayout {
  std::int64_t panels, pitch, partials, difference, product, total;

  MomentLayout(std::int64_t rows, std::int64_t d) {
    const auto padded = [](std::int64_t bytes) { return ceil_div(bytes, 256) * 256; };
    panels = ceil_div(d, panel_rows);
    pitch = ceil_div(d, 8) * 8;
    partials = header_bytes;
    difference = partials + padded(panels * dot_blocks * std::int64_t{sizeof(double)});
    product = difference + padded(rows * pitch * std::int64_t{sizeof(__half)});
    total = product + std::min(d, panel_rows) * d * std::int64_t{sizeof(float)};
  }
};

}  // namespace

void CudaOps::add_abs_sums(View x, View sums) {
  require_shape("add_abs_sums", "sums", sums, DType::f64, 1, x.cols);
  if (x.empty()) return;
  require_cuda("add_abs_sums", {x, sums});
  dispatch_float(x.dtype, "add_abs_sums", [&](auto type) {
    using T = decltype(type);
    launch("add_abs_sums", add_abs_sums_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div(x.cols, strip))), dim3(strip, 32), 0, stream_,
           static_cast<const T*>(x.data), x.stride, x.rows, x.cols, sums.as<double>());
  });
}

void CudaOps::scale_weights(View w, View s, View t, View out) {
  require_shape("scale_weights", "out", out, out.dtype, w.rows, w.cols);
  if (w.empty()) return;
  require_cuda("scale_weights", {w, out});
  const float* by_column = nullptr;
  const float* by_row = nullptr;
  if (!s.empty()) {
    require_shape("scale_weights", "column scales", s, DType::f32, 1, w.cols);
    require_cuda("scale_weights", {s});
    by_column = s.as<float>();
  }
  if (!t.empty()) {
    require_shape("scale_weights", "row divisors", t, DType::f32, 1, w.rows);
    require_cuda("scale_weights", {t});
    by_row = t.as<float>();
  }
  dispatch_float(w.dtype, "scale_weights", [&](auto in_type) {
    dispatch_float(out.dtype, "scale_weights", [&](auto out_type) {
      using T = decltype(in_type);
      using Out = decltype(out_type);
      launch("scale_weights", scale_weights_kernel<T, Out>, grid_2d(w.rows, w.cols, flat_threads),
             dim3(flat_threads), 0, stream_, static_cast<const T*>(w.data), w.stride, by_column,
             by_row, static_cast<Out*>(out.data), out.stride, w.rows, w.cols);
    });
  });
  seal(stream_);
}

void CudaOps::round_trip_scaled(View w, View s, const GridSpec& spec, View out) {
  const GridParams params = grid_params(spec);
  require_shape("round_trip_scaled", "column scales", s, DType::f32, 1, w.cols);
  require_shape("round_trip_scaled", "out", out, out.dtype, w.rows, w.cols);
  if (w.empty()) return;
  require_cuda("round_trip_scaled", {w, s, out});
  const std::int64_t unit = std::min(spec.unit(w.cols), w.cols);
  const std::int64_t groups = spec.groups(w.cols), units = w.rows * groups;
  const bool whole_block = unit > warp_unit;
  const std::int64_t blocks = whole_block ? units : ceil_div(units, flat_threads / 32);
  REQUIRE(unit < (std::int64_t{1} << 31) && blocks < (std::int64_t{1} << 31),
          "round_trip_scaled: too large: " + w.shape());
  const auto pack_bytes = [](const View& v) {
    return 4 * static_cast<std::int64_t>(dtype_bytes(v.dtype));
  };
  const bool wide = unit % 4 == 0 && aligned_rows(w, pack_bytes(w), 4) &&
                    aligned_rows(out, pack_bytes(out), 4) && aligned_rows(s, 16, 4);
  dispatch_float(w.dtype, "round_trip_scaled", [&](auto in_type) {
    dispatch_float(out.dtype, "round_trip_scaled", [&](auto out_type) {
      using T = decltype(in_type);
      using Out = decltype(out_type);
      const auto kernel =
          whole_block
              ? (wide ? round_trip_kernel<T, Out, flat_threads, 4>
                      : round_trip_kernel<T, Out, flat_threads, 1>)
              : (wide ? round_trip_kernel<T, Out, 32, 4> : round_trip_kernel<T, Out, 32, 1>);
      launch("round_trip_scaled", kernel, dim3(static_cast<unsigned>(blocks)), dim3(flat_threads),
             0, stream_, static_cast<const T*>(w.data), w.stride, s.as<float>(),
             static_cast<Out*>(out.data), out.stride, w.cols, unit, groups, units, params);
    });
  });
  seal(stream_);
}

std::int64_t CudaOps::moment_loss_bytes(std::int64_t rows, std::int64_t d) {
  return MomentLayout(rows, d).total;
}

// sum over r of e_r h e_r^T = sum over i, j of (e^T e)_ij h_ij. In that order h stays as it is, and
// only e is rounded: to f16, scaled by a power of two so that its largest element lies near the top
// of the range. e^T e then has exact products and f32 sums on the tensor cores, panels of rows
// left of the diagonal only; the products with h are summed in f64, in a fixed order. The relative
// error is about 2^-11 / sqrt(rows * channels that matter): some 1e-6 at the size of a model.
void CudaOps::moment_loss(View a, View b, View h, View out, View workspace) {
  const std::int64_t rows = a.rows, d = a.cols;
  require_shape("moment_loss", "b", b, b.dtype, rows, d);
  require_shape("moment_loss", "h", h, DType::f32, d, d);
  require_shape("moment_loss", "out", out, DType::f64, 1, 1);
  require_cuda("moment_loss", {out});
  if (a.empty()) return zero(out);
  require_cuda("moment_loss", {a, b, h, workspace});
  const MomentLayout layout(rows, d);
  REQUIRE(workspace.contiguous() && workspace.bytes() >= layout.total,
          "moment_loss: workspace " + workspace.shape());
  auto* base = static_cast<std::uint8_t*>(workspace.data);
  auto* largest = reinterpret_cast<std::uint32_t*>(base);
  auto* partials = reinterpret_cast<double*>(base + layout.partials);
  auto* difference = reinterpret_cast<__half*>(base + layout.difference);
  auto* product = reinterpret_cast<float*>(base + layout.product);
  CUDA_TRY(cudaMemsetAsync(largest, 0, sizeof(*largest), stream_));
  const dim3 grid = grid_2d(rows, d, flat_threads * 4);
  dispatch_float(a.dtype, "moment_loss", [&](auto a_type) {
    dispatch_float(b.dtype, "moment_loss", [&](auto b_type) {
      using A = decltype(a_type);
      using B = decltype(b_type);
      launch("largest_difference", largest_difference_kernel<A, B>, grid, dim3(flat_threads), 0,
             stream_, static_cast<const A*>(a.data), a.stride, static_cast<const B*>(b.data),
             b.stride, rows, d, largest);
      launch("half_difference", half_difference_kernel<A, B>, grid, dim3(flat_threads), 0, stream_,
             static_cast<const A*>(a.data), a.stride, static_cast<const B*>(b.data), b.stride, rows,
             d, largest, difference, layout.pitch);
    });
  });
  for (std::int64_t panel = 0; panel < layout.panels; ++panel) {
    const std::int64_t first = panel * panel_rows, n = std::min(panel_rows, d - first);
    gemm_16(cublas_, DType::f16, true, false, n, first + n, rows, 1.0F, difference + first,
            layout.pitch, difference, layout.pitch, 0.0F, product, first + n);
    launch("panel_dot", panel_dot_kernel, dim3(dot_blocks), dim3(flat_threads), 0, stream_, product,
           h.as<float>(), h.stride, first, static_cast<int>(n), partials + panel * dot_blocks);
  }
  launch("moment_finish", moment_finish_kernel, dim3(1), dim3(flat_threads), 0, stream_, partials,
         layout.panels * dot_blocks, largest, out.as<double>());
}

}  // namespace engine
