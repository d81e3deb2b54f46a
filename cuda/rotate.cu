// rotate_rows, and elementwise passes around transforms of many rows.
#include <string>

#include "cuda/any_float.cuh"
#include "cuda/check.h"
#include "cuda/rotate.h"

namespace engine {
namespace {

constexpr int flat_threads = 256;

// out = factor in diag(diagonal), added to out if `add`. Bound by memory.
__global__ void __launch_bounds__(flat_threads)
    scale_kernel(const void* in, DType in_dtype, std::int64_t in_stride, const float* diagonal,
                 float factor, bool add, void* out, DType out_dtype, std::int64_t out_stride,
                 std::int64_t rows, std::int64_t cols) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * flat_threads + threadIdx.x;
  if (c >= cols) return;
  const float scale = diagonal == nullptr ? factor : factor * diagonal[c];
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const float v = scale * load_any(in, in_dtype, r * in_stride + c);
    const std::int64_t to = r * out_stride + c;
    store_any(out, out_dtype, to, add ? load_any(out, out_dtype, to) + v : v);
  }
}

void scale(View in, View diagonal, float factor, bool add, View out, cudaStream_t stream) {
  REQUIRE(in.rows == out.rows && in.cols == out.cols &&
              (diagonal.empty() || (diagonal.dtype == DType::f32 && diagonal.cols == in.cols)),
          "scaling " + in.shape() + " into " + out.shape());
  if (in.empty()) return;
  launch("scale_columns", scale_kernel, grid_2d(in.rows, in.cols, flat_threads), dim3(flat_threads),
         0, stream, in.data, in.dtype, in.stride, diagonal.empty() ? nullptr : diagonal.as<float>(),
         factor, add, out.data, out.dtype, out.stride, in.rows, in.cols);
}

}  // namespace

void scale_columns(View in, View diagonal, float factor, View out, cudaStream_t stream) {
  scale(in, diagonal, factor, false, out, stream);
}

void put_rows(View in, float factor, bool add, View out, cudaStream_t stream) {
  scale(in, View{}, factor, add, out, stream);
}

void rotate_rows(std::span<const RotatePart> parts, bool inverse, bool add, float factor,
                 View scratch, std::size_t shared_limit, cudaStream_t stream) {
  REQUIRE(!parts.empty() && parts.size() <= rotate_max_parts, "rotate_rows: parts");
  const TransformKind kind = parts[0].q->kind;
  std::int64_t needed = 0;
  for (const RotatePart& part : parts) {
    const std::int64_t d = part.q->d;
    REQUIRE(part.q->kind == kind && kind != TransformKind::none && part.in.cols == d &&
                part.out.cols == d && part.in.rows == parts[0].in.rows &&
                part.out.rows == part.in.rows && part.in.data != part.out.data &&
                part.in.rows <= INT32_MAX / d,
            "rotate_rows of size " + std::to_string(d) + ": from " + part.in.shape() + " to " +
                part.out.shape());
    require_cuda("rotate_rows", {part.in, part.out});
    needed += part.in.rows * d * static_cast<std::int64_t>(sizeof(float));
  }
  if (kind == TransformKind::hadamard) {
    return rotate_hadamard(parts, inverse, add, factor, shared_limit, stream);
  }
  REQUIRE(!inverse && scratch.bytes() >= needed && scratch.device == DeviceKind::cuda,
          "rotate_rows needs " + std::to_string(needed) + " bytes, got " + scratch.shape());
  rotate_butterfly(parts, add, factor, scratch, stream);
}

}  // namespace engine
