// CudaOps: second moments.
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

// Rows of h per product. Each product computes the rectangle left of and including its diagonal
// tile: with d / panel = n panels that is (n + 1) / 2n of the full square (57 % at d = 14336), and
// 2048 x 2048 outputs still fill the multiprocessors of the widest GPUs.
constexpr std::int64_t panel = 2048;

}  // namespace

void CudaOps::gram(View x, View h) {
  REQUIRE(h.dtype == DType::f32 && h.rows == x.cols && h.cols == x.cols,
          "gram: x " + x.shape() + ", h " + h.shape());
  REQUIRE(x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16,
          "gram: x " + x.shape());
  if (x.empty()) return;
  require_cuda("gram", {x, h});
  auto* out = h.as<float>();
  const auto* in = static_cast<const char*>(x.data);
  const auto size = static_cast<std::int64_t>(dtype_bytes(x.dtype));
  const std::int64_t ldx = x.rows > 1 ? x.stride : std::max(x.stride, x.cols);
  for (std::int64_t i = 0; i < x.cols; i += panel) {
    const std::int64_t n = std::min(panel, x.cols - i);
    const char* left = in + i * size;
    if (x.dtype == DType::f32) {
      gemm_f32(cublas_, true, false, n, i + n, x.rows, 1.0F, reinterpret_cast<const float*>(left),
               ldx, static_cast<const float*>(x.data), ldx, 1.0F, out + i * h.stride, h.stride);
    } else {
      gemm_16(cublas_, x.dtype, true, false, n, i + n, x.rows, 1.0F, left, ldx, in, ldx, 1.0F,
              out + i * h.stride, h.stride);
    }
  }
}

}  // namespace engine
