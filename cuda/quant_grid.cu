// CudaOps: the grid of every unit, weights onto it and back.
#include "cuda/chain.h"
#include "cuda/cuda_ops.h"
#include "cuda/grid.cuh"
#include "cuda/mse_grid.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int grid_threads = 256;
constexpr int flat_threads = 128;
// Rows that one thread of the elementwise kernels walks, to spread the cost of finding its unit.
constexpr int rows_per_thread = 8;
// Units longer than this get a whole block.
constexpr std::int64_t warp_unit = 1024;

// Grids of all units of w [rows, cols]: one block (kBlock) or one warp per unit, 256 threads, one
// reading of w; the mse search reads its unit 80 times more, from the cache. Bound by memory.
template <class T, bool kBlock>
__global__ void __launch_bounds__(grid_threads)
    find_grid_kernel(const T* w, std::int64_t stride, std::int64_t cols, std::int64_t unit,
                     std::int64_t groups, std::int64_t units, GridParams p, float* scales,
                     std::int64_t scale_stride, std::int32_t* zeros, std::int64_t zero_stride) {
  __shared__ float scratch[32];
  __shared__ double loss_scratch[32];
  constexpr int step = kBlock ? grid_threads : 32;
  constexpr int per_block = grid_threads / step;
  const int thread = static_cast<int>(threadIdx.x) % step;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * per_block + static_cast<int>(threadIdx.x) / step;
  if (index >= units) return;  // whole warps, and no whole block
  const std::int64_t r = index / groups;
  const std::int64_t first = index % groups * unit;
  const T* from = w + r * stride + first;
  const auto n = static_cast<int>(min(unit, cols - first));

  float negated_lo = -INFINITY;
  float hi = -INFINITY;
#pragma unroll 4
  for (int i = thread; i < n; i += step) {
    const float v = to_f32(from[i]);
    negated_lo = fmaxf(negated_lo, -v);
    hi = fmaxf(hi, v);
  }
  if constexpr (kBlock) {
    negated_lo = block_reduce(negated_lo, MaxOp{}, -INFINITY, scratch);
    hi = block_reduce(hi, MaxOp{}, -INFINITY, scratch);
  } else {
    negated_lo = warp_reduce(negated_lo, MaxOp{});
    hi = warp_reduce(hi, MaxOp{});
  }
  const DeviceRange range{-negated_lo, hi};
  const UnitGrid grid =
      p.mse ? mse_grid<step>(
                  range, thread, n, [&](int i) { return to_f32(from[i]); }, p, loss_scratch)
            : unit_grid(range, p);
  if (thread == 0) {
    scales[r * scale_stride + index % groups] = grid.scale;
    zeros[r * zero_stride + index % groups] = grid.zero;
  }
}

// Where the grids lie and which of them a column uses.
struct GridTable {
  const float* scales;
  const std::int32_t* zeros;
  std::int64_t scale_stride;
  std::int64_t zero_stride;
  const std::int32_t* column_group;  // or null: column / unit
  std::uint32_t unit;

  __device__ std::int32_t unit_of(std::int64_t column) const {
    return column_group != nullptr
               ? column_group[column]
               : static_cast<std::int32_t>(static_cast<std::uint32_t>(column) / unit);
  }
};

// codes [rows, cols] of w: a thread owns N neighbouring columns and walks down rows gridDim.y
// apart. Bound by memory.
template <class T, int N>
__global__ void __launch_bounds__(flat_threads)
    quantize_kernel(const T* w, std::int64_t stride, GridTable table, GridParams p,
                    std::uint8_t* codes, std::int64_t code_stride, std::int64_t rows,
                    std::int64_t cols) {
  const std::int64_t c =
      (static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x)) * N;
  if (c >= cols) return;
  std::int32_t unit[N];
#pragma unroll
  for (int e = 0; e < N; ++e) unit[e] = table.unit_of(c + e);
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const auto in = *reinterpret_cast<const Pack<T, N>*>(w + r * stride + c);
    Pack<std::uint8_t, N> out;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float scale = table.scales[r * table.scale_stride + unit[e]];
      const auto zero = static_cast<float>(table.zeros[r * table.zero_stride + unit[e]]);
      out.v[e] =
          static_cast<std::uint8_t>(quantize_on_grid(to_f32(in.v[e]), scale, zero, p.top, p.half));
    }
    *reinterpret_cast<Pack<std::uint8_t, N>*>(codes + r * code_stride + c) = out;
  }
}

// out[r, perm[c]] (perm null: out[r, c]) from codes; geometry as above. With perm the stores of a
// warp scatter within one row, which the L2 cache gathers.
template <class T, int N>
__global__ void __launch_bounds__(flat_threads)
    dequantize_kernel(const std::uint8_t* codes, std::int64_t code_stride, GridTable table,
                      GridParams p, const std::int32_t* perm, T* out, std::int64_t stride,
                      std::int64_t rows, std::int64_t cols) {
  const std::int64_t c =
      (static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x)) * N;
  if (c >= cols) return;
  std::int32_t unit[N];
#pragma unroll
  for (int e = 0; e < N; ++e) unit[e] = table.unit_of(c + e);
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const auto in = *reinterpret_cast<const Pack<std::uint8_t, N>*>(codes + r * code_stride + c);
    Pack<T, N> values;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float scale = table.scales[r * table.scale_stride + unit[e]];
      const auto zero = static_cast<float>(table.zeros[r * table.zero_stride + unit[e]]);
      values.v[e] =
          from_f32<T>(dequantize_on_grid(static_cast<float>(in.v[e]), scale, zero, p.half));
    }
    if (perm == nullptr) {
      *reinterpret_cast<Pack<T, N>*>(out + r * stride + c) = values;
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) out[r * stride + perm[c + e]] = values.v[e];
    }
  }
}

dim3 column_grid(std::int64_t rows, std::int64_t items) {
  return {static_cast<unsigned>(ceil_div(items, flat_threads)),
          static_cast<unsigned>(std::min<std::int64_t>(ceil_div(rows, rows_per_thread), 65535)), 1};
}

void require_shape(const char* op, const char* what, const View& v, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(op) + ": " + what + " expected " + dtype_name(dtype) + " [" +
              std::to_string(rows) + ", " + std::to_string(cols) + "], found " + v.shape());
}

GridTable grid_table(const char* op, const GridSpec& spec, const View& scales, const View& zeros,
                     const View& column_group, std::int64_t rows, std::int64_t cols) {
  require_shape(op, "scales", scales, DType::f32, rows, spec.groups(cols));
  require_shape(op, "zeros", zeros, DType::i32, rows, spec.groups(cols));
  require_cuda(op, {scales, zeros});
  const std::int32_t* groups = nullptr;
  if (!column_group.empty()) {
    require_shape(op, "column groups", column_group, DType::i32, 1, cols);
    require_cuda(op, {column_group});
    groups = column_group.as<std::int32_t>();
  }
  REQUIRE(cols < (std::int64_t{1} << 31), std::string(op) + ": too many columns");
  return {scales.as<float>(),
          zeros.as<std::int32_t>(),
          scales.stride,
          zeros.stride,
          groups,
          static_cast<std::uint32_t>(std::min(spec.unit(cols), cols))};
}

}  // namespace

void CudaOps::find_grid(View w, const GridSpec& spec, View scales, View zeros) {
  const GridParams params = grid_params(spec);
  const std::int64_t groups = spec.groups(w.cols);
  require_shape("find_grid", "scales", scales, DType::f32, w.rows, groups);
  require_shape("find_grid", "zeros", zeros, DType::i32, w.rows, groups);
  if (w.empty()) return;
  require_cuda("find_grid", {w, scales, zeros});
  const std::int64_t unit = std::min(spec.unit(w.cols), w.cols);
  const std::int64_t units = w.rows * groups;
  const bool whole_block = unit > warp_unit;
  const std::int64_t blocks = whole_block ? units : ceil_div(units, grid_threads / 32);
  REQUIRE(unit < (std::int64_t{1} << 31) && blocks < (std::int64_t{1} << 31),
          "find_grid: too large: " + w.shape());
  dispatch_float(w.dtype, "find_grid", [&](auto type) {
    using T = decltype(type);
    launch("find_grid", whole_block ? find_grid_kernel<T, true> : find_grid_kernel<T, false>,
           dim3(static_cast<unsigned>(blocks)), dim3(grid_threads), 0, stream_,
           static_cast<const T*>(w.data), w.stride, w.cols, unit, groups, units, params,
           scales.as<float>(), scales.stride, zeros.as<std::int32_t>(), zeros.stride);
  });
}

void CudaOps::quantize_codes(View w, const GridSpec& spec, View scales, View zeros,
                             View column_group, View codes) {
  const GridParams params = grid_params(spec);
  require_shape("quantize_codes", "codes", codes, DType::u8, w.rows, w.cols);
  if (w.empty()) return;
  require_cuda("quantize_codes", {w, codes});
  const GridTable table =
      grid_table("quantize_codes", spec, scales, zeros, column_group, w.rows, w.cols);
  dispatch_float(w.dtype, "quantize_codes", [&](auto type) {
    using T = decltype(type);
    const bool wide =
        aligned_rows(w, static_cast<std::int64_t>(4 * sizeof(T)), 4) && aligned_rows(codes, 4, 4);
    launch("quantize_codes", wide ? quantize_kernel<T, 4> : quantize_kernel<T, 1>,
           column_grid(w.rows, wide ? w.cols / 4 : w.cols), dim3(flat_threads), 0, stream_,
           static_cast<const T*>(w.data), w.stride, table, params, codes.as<std::uint8_t>(),
           codes.stride, w.rows, w.cols);
  });
}

void CudaOps::dequantize_codes(View codes, const GridSpec& spec, View scales, View zeros,
                               View column_group, View perm, View out) {
  const GridParams params = grid_params(spec);
  require_shape("dequantize_codes", "out", out, out.dtype, codes.rows, codes.cols);
  if (codes.empty()) return;
  require_cuda("dequantize_codes", {codes, out});
  const GridTable table =
      grid_table("dequantize_codes", spec, scales, zeros, column_group, codes.rows, codes.cols);
  const std::int32_t* order = nullptr;
  if (!perm.empty()) {
    require_shape("dequantize_codes", "perm", perm, DType::i32, 1, codes.cols);
    require_cuda("dequantize_codes", {perm});
    order = perm.as<std::int32_t>();
  }
  dispatch_float(out.dtype, "dequantize_codes", [&](auto type) {
    using T = decltype(type);
    const bool wide =
        aligned_rows(out, static_cast<std::int64_t>(4 * sizeof(T)), 4) && aligned_rows(codes, 4, 4);
    launch("dequantize_codes", wide ? dequantize_kernel<T, 4> : dequantize_kernel<T, 1>,
           column_grid(codes.rows, wide ? codes.cols / 4 : codes.cols), dim3(flat_threads), 0,
           stream_, codes.as<std::uint8_t>(), codes.stride, table, params, order,
           static_cast<T*>(out.data), out.stride, codes.rows, codes.cols);
  });
  seal(stream_);
}

}  // namespace engine
