// CudaOps: the salience of SliM-LLM's column groups and the weights of its bit search
// (docs/methods/slimllm.md).
#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/slim.cuh"

namespace engine {
namespace {

constexpr int threads = 256;
constexpr int salience_threads = 1024;
constexpr std::int64_t panel_columns = 256;  // of U at a time
constexpr int square_lanes = 32;             // columns per block of the squares' kernel

__device__ double as_double(float v) { return static_cast<double>(v); }
__device__ double as_double(double v) { return v; }

// out[j] = 1 / r[j][j]. One thread per column.
template <class T>
__global__ void __launch_bounds__(threads)
    reciprocal_kernel(const T* r, std::int64_t stride, std::int64_t d, double* out) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (j < d) out[j] = 1.0 / as_double(r[j * (stride + 1)]);
}

// x [rows, panel_columns] becomes columns [first, first + panel_columns) of the unit matrix.
template <class T>
__global__ void __launch_bounds__(panel_columns) unit_columns_kernel(T* x, std::int64_t first) {
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const auto column = static_cast<std::int64_t>(threadIdx.x);
  x[row * panel_columns + column] = row == first + column ? T{1} : T{0};
}

// out[c] = sum of the squares in column c of x [rows, panel_columns]. A block of 8 warps takes 32
// columns; a lane is a column, the warps share the rows.
template <class T>
__global__ void __launch_bounds__(threads)
    column_squares_kernel(const T* x, std::int64_t rows, std::int64_t columns, double* out) {
  constexpr int warps = threads / square_lanes;
  __shared__ double parts[warps][square_lanes];
  const int lane = static_cast<int>(threadIdx.x) % square_lanes;
  const int warp = static_cast<int>(threadIdx.x) / square_lanes;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * square_lanes + lane;
  double sum = 0.0;
  for (std::int64_t r = warp; r < rows; r += warps) {
    const double v = as_double(x[r * panel_columns + column]);
    sum += v * v;
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int i = 1; i < warps; ++i) sum += parts[i][lane];
  out[column] = sum;
}

// out[g]: one block per group; a lane is a column, the 32 warps share the rows. Reads w once.
template <class T>
__global__ void __launch_bounds__(salience_threads)
    salience_kernel(const T* w, std::int64_t stride, std::int64_t rows, std::int64_t group,
                    const double* divisors, double* out) {
  __shared__ double scratch[32];
  constexpr int warps = salience_threads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * group;
  double sum = 0.0;
  for (std::int64_t k = lane; k < group; k += 32) {
    const double factor = 1.0 / divisors[first + k];
    const T* column = w + first + k;
#pragma unroll 8
    for (std::int64_t r = warp; r < rows; r += warps) {
      const double v = static_cast<double>(to_f32(column[r * stride])) * factor;
      sum += v * v;
    }
  }
  sum = block_reduce(sum, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class T>
struct CandidateRows {
  const T* w;
  T *base, *lower, *higher;
  std::int64_t w_stride, base_stride, lower_stride, higher_stride;
};

// One warp per group of a row: one reading for the range (and the mean), one for the values.
template <class T>
__global__ void __launch_bounds__(threads)
    candidates_kernel(const CandidateRows<T> v, std::int64_t groups, std::int64_t group,
                      std::int64_t units, int bits, GridParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t unit =
      static_cast<std::int64_t>(blockIdx.x) * (threads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (unit >= units) return;  // whole warps
  const std::int64_t row = unit / groups;
  const std::int64_t first = unit % groups * group;
  const T* w = v.w + row * v.w_stride + first;

  float negated_lo = -INFINITY, hi = -INFINITY;
  double sum = 0.0, absolute = 0.0;
  for (std::int64_t i = lane; i < group; i += 32) {
    const float x = to_f32(w[i]);
    negated_lo = fmaxf(negated_lo, -x);
    hi = fmaxf(hi, x);
    sum += static_cast<double>(x);
    absolute += static_cast<double>(fabsf(x));
  }
  const DeviceRange range{-warp_reduce(negated_lo, MaxOp{}), warp_reduce(hi, MaxOp{})};
  SlimGrid grids[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) grids[k] = plain_grid(range, bits - 1 + k, p);
  if (bits == 2) {
    grids[0] = sign_grid(warp_reduce(sum, SumOp{}), warp_reduce(absolute, SumOp{}), group, p);
  }
  T* base = v.base + row * v.base_stride + first;
  T* lower = v.lower + row * v.lower_stride + first;
  T* higher = v.higher + row * v.higher_stride + first;
  for (std::int64_t i = lane; i < group; i += 32) {
    const float x = to_f32(w[i]);
    const float middle = code_of<false>(x, grids[1]).value;
    const float narrow =
        bits == 2 ? code_of<true>(x, grids[0]).value : code_of<false>(x, grids[0]).value;
    base[i] = from_f32<T>(middle);
    lower[i] = from_f32<T>(__fsub_rn(narrow, middle));
    higher[i] = from_f32<T>(__fsub_rn(code_of<false>(x, grids[2]).value, middle));
  }
}

struct CodedRows {
  const std::uint8_t *bits, *codes;
  const float *scales, *means;
  const std::int32_t* zeros;
  std::int64_t code_stride, scale_stride, mean_stride, zero_stride;
};

// One thread per column; it walks down rows gridDim.y apart. Bound by memory.
template <class T>
__global__ void __launch_bounds__(threads)
    decode_kernel(const CodedRows v, std::int64_t group, T* out, std::int64_t stride,
                  std::int64_t rows, std::int64_t cols) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (c >= cols) return;
  const std::int64_t g = c / group;
  const bool sign = v.bits[g] == 1;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const std::uint8_t code = v.codes[r * v.code_stride + c];
    const float scale = v.scales[r * v.scale_stride + g];
    const float value =
        sign ? __fadd_rn(v.means[r * v.mean_stride + g], code != 0 ? scale : -scale)
             : dequantize_on_grid(static_cast<float>(code), scale,
                                  static_cast<float>(v.zeros[r * v.zero_stride + g]), false);
    out[r * stride + c] = from_f32<T>(value);
  }
}

bool is_factor(const View& r) {
  return (r.dtype == DType::f32 || r.dtype == DType::f64) && r.rows == r.cols;
}

void check_group(std::int64_t d, std::int64_t group) {
  REQUIRE(group >= 1 && group <= d && d % group == 0,
          "groups of " + std::to_string(group) + " in " + std::to_string(d) + " columns");
}

unsigned blocks(std::int64_t n) { return static_cast<unsigned>(n); }

// [H^-1]_jj is the square sum of column j of U: panels of U from R U = I.
template <class T>
void inverse_diagonal(cublasHandle_t cublas, cudaStream_t stream, const View& r, T* panel,
                      double* out) {
  const std::int64_t d = r.cols;
  const std::int64_t stride = d > 1 ? r.stride : 1;
  for (std::int64_t first = 0; first < d; first += panel_columns) {
    const std::int64_t last = std::min(first + panel_columns, d);  // U is zero from this row on
    launch("slim_divisors", unit_columns_kernel<T>, dim3(blocks(last)), dim3(panel_columns), 0,
           stream, panel, first);
    // The library reads columns first: there x^T r^T = I, and r^T is lower triangular.
    const T one{1};
    const auto solve = [&](auto call) {
      LIBRARY_TRY(call(cublas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N,
                       CUBLAS_DIAG_NON_UNIT, panel_columns, last, &one, r.as<T>(), stride, panel,
                       panel_columns));
    };
    if constexpr (std::is_same_v<T, double>) {
      solve(cublasDtrsm_64);
    } else {
      solve(cublasStrsm_64);
    }
    launch("slim_divisors", column_squares_kernel<T>, dim3(panel_columns / square_lanes),
           dim3(threads), 0, stream, panel, last, last - first, out + first);
  }
}

}  // namespace

std::int64_t CudaOps::slim_divisors_bytes(std::int64_t d, bool inverse, DType factor) {
  return inverse ? d * panel_columns * static_cast<std::int64_t>(dtype_bytes(factor)) : 0;
}

void CudaOps::slim_divisors(View r, bool inverse, View out, View workspace) {
  const std::int64_t d = r.cols;
  REQUIRE(is_factor(r) && d > 0, "factor " + r.shape());
  REQUIRE(out.dtype == DType::f64 && out.rows == 1 && out.cols == d, "divisors " + out.shape());
  require_cuda("slim_divisors", {r, out});
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (!inverse) {
      launch("slim_divisors", reciprocal_kernel<T>, dim3(blocks(ceil_div(d, threads))),
             dim3(threads), 0, stream_, r.as<T>(), r.stride, d, out.as<double>());
      return;
    }
    require_cuda("slim_divisors", {workspace});
    REQUIRE(workspace.contiguous() && workspace.bytes() >= slim_divisors_bytes(d, inverse, r.dtype),
            "slim_divisors: workspace " + workspace.shape());
    inverse_diagonal(cublas_, stream_, r, reinterpret_cast<T*>(workspace.as<std::uint8_t>()),
                     out.as<double>());
  };
  if (r.dtype == DType::f64) {
    run(double{});
  } else {
    run(float{});
  }
}

void CudaOps::slim_salience(View w, View divisors, std::int64_t group, View out) {
  check_group(w.cols, group);
  REQUIRE(divisors.dtype == DType::f64 && divisors.rows == 1 && divisors.cols == w.cols,
          "divisors " + divisors.shape());
  REQUIRE(out.dtype == DType::f64 && out.rows == 1 && out.cols == w.cols / group,
          "saliences " + out.shape());
  require_cuda("slim_salience", {w, divisors, out});
  dispatch_float(w.dtype, "slim_salience", [&](auto type) {
    using T = decltype(type);
    launch("slim_salience", salience_kernel<T>, dim3(blocks(out.cols)), dim3(salience_threads), 0,
           stream_, static_cast<const T*>(w.data), w.stride, w.rows, group, divisors.as<double>(),
           out.as<double>());
  });
}

void CudaOps::slim_candidates(View w, int bits, std::int64_t group, DType scale_dtype, View base,
                              View lower, View higher) {
  check_group(w.cols, group);
  REQUIRE(bits >= 2 && bits <= 7, "candidates around " + std::to_string(bits) + " bits");
  for (const View& v : {base, lower, higher}) {
    REQUIRE(v.dtype == w.dtype && v.rows == w.rows && v.cols == w.cols, "candidate " + v.shape());
  }
  if (w.empty()) return;
  require_cuda("slim_candidates", {w, base, lower, higher});
  const std::int64_t groups = w.cols / group;
  const std::int64_t units = w.rows * groups;
  dispatch_float(w.dtype, "slim_candidates", [&](auto type) {
    using T = decltype(type);
    const auto at = [](const View& v) { return static_cast<T*>(v.data); };
    const CandidateRows<T> rows{at(w),    at(base),    at(lower),    at(higher),
                                w.stride, base.stride, lower.stride, higher.stride};
    launch("slim_candidates", candidates_kernel<T>, dim3(blocks(ceil_div(units, threads / 32))),
           dim3(threads), 0, stream_, rows, groups, group, units, bits, slim_params(scale_dtype));
  });
}

void CudaOps::slim_decode(const SlimDecode& p) {
  const std::int64_t rows = p.codes.rows, d = p.codes.cols;
  check_group(d, p.group);
  REQUIRE(p.codes.dtype == DType::u8 && p.bits.dtype == DType::u8 && p.bits.rows == 1 &&
              p.bits.cols == d / p.group,
          "bits " + p.bits.shape() + " of codes " + p.codes.shape());
  REQUIRE(p.out.rows == rows && p.out.cols == d, "decoded weights " + p.out.shape());
  for (const View& v : {p.scales, p.means, p.zeros}) {
    REQUIRE(v.rows == rows && v.cols == d / p.group, "coefficients " + v.shape());
  }
  if (p.out.empty()) return;
  require_cuda("slim_decode", {p.bits, p.codes, p.scales, p.means, p.zeros, p.out});
  const CodedRows coded{p.bits.as<std::uint8_t>(),
                        p.codes.as<std::uint8_t>(),
                        p.scales.as<float>(),
                        p.means.as<float>(),
                        p.zeros.as<std::int32_t>(),
                        p.codes.stride,
                        p.scales.stride,
                        p.means.stride,
                        p.zeros.stride};
  const dim3 grid(blocks(ceil_div(d, threads)),
                  static_cast<unsigned>(std::min<std::int64_t>(rows, 1024)));
  dispatch_float(p.out.dtype, "slim_decode", [&](auto type) {
    using T = decltype(type);
    launch("slim_decode", decode_kernel<T>, grid, dim3(threads), 0, stream_, coded, p.group,
           static_cast<T*>(p.out.data), p.out.stride, rows, d);
  });
  seal(stream_);
}

}  // namespace engine
