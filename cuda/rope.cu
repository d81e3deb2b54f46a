#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/kv.cuh"
#include "cuda/types.cuh"
#include "engine/ops/runs_check.h"

namespace engine {
namespace {

constexpr int threads = 256;

// Where row r stands.
struct Periodic {
  std::int64_t start, period;
  __device__ std::int64_t operator()(std::int64_t r) const { return start + r % period; }
};
struct Listed {
  const std::int32_t* positions;
  std::int64_t stride;
  __device__ std::int64_t operator()(std::int64_t r) const { return positions[r * stride]; }
};

// One block per row; a thread turns N neighbouring pairs (j, j + half) of one head. The products
// are rounded to T before they are added, and never fused. half is a multiple of N; x rows (and the
// halves within them) are aligned for packs of N. Cost: x read and written once.
template <class T, int N, class WHERE>
__global__ void __launch_bounds__(threads)
    rope_kernel(T* x, std::int64_t stride, int heads, int half, const float* cos_table,
                std::int64_t cos_stride, const float* sin_table, std::int64_t sin_stride,
                WHERE where) {
  using P = Pack<T, N>;
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t position = where(r);
  const float* cos_row = cos_table + position * cos_stride;
  const float* sin_row = sin_table + position * sin_stride;
  const int per_head = half / N;
  for (int i = static_cast<int>(threadIdx.x); i < heads * per_head; i += threads) {
    const int j = i % per_head * N;
    T* low_at = x + r * stride + static_cast<std::int64_t>(i / per_head) * 2 * half + j;
    P low = *reinterpret_cast<const P*>(low_at);
    P high = *reinterpret_cast<const P*>(low_at + half);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      rotate(low.v[e], high.v[e], cos_row[j + e], sin_row[j + e]);
    }
    *reinterpret_cast<P*>(low_at) = low;
    *reinterpret_cast<P*>(low_at + half) = high;
  }
}

template <class WHERE>
void rotate_rows(const char* name, const View& x, std::int64_t head_dim, const View& cos,
                 const View& sin, WHERE where, cudaStream_t stream) {
  REQUIRE(x.rows <= 0x7fffffff && x.cols <= 0x7fffffff,
          std::string(name) + " of too large " + x.shape());
  dispatch_float(x.dtype, name, [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide = aligned_rows(x, 16, n) && head_dim / 2 % n == 0;
    launch(name, wide ? rope_kernel<T, n, WHERE> : rope_kernel<T, 1, WHERE>,
           static_cast<unsigned>(x.rows), threads, 0, stream, static_cast<T*>(x.data), x.stride,
           static_cast<int>(x.cols / head_dim), static_cast<int>(head_dim / 2), cos.as<float>(),
           cos.stride, sin.as<float>(), sin.stride, where);
  });
}

}  // namespace

void CudaOps::rope(View x, std::int64_t head_dim, View cos, View sin, Positions positions) {
  REQUIRE(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0,
          "rope of " + x.shape() + " with heads of " + std::to_string(head_dim));
  REQUIRE(cos.cols == head_dim / 2 && sin.cols == head_dim / 2 && cos.rows == sin.rows,
          "rope tables " + cos.shape() + " and " + sin.shape());
  if (x.empty()) return;
  REQUIRE(positions.start >= 0 && positions.period > 0 &&
              positions.start + std::min(x.rows, positions.period) <= cos.rows,
          "rope positions " + std::to_string(positions.start) + " + " +
              std::to_string(std::min(x.rows, positions.period)) + " beyond the tables " +
              cos.shape());
  require_cuda("rope", {x, cos, sin});
  rotate_rows("rope", x, head_dim, cos, sin, Periodic{positions.start, positions.period}, stream_);
}

void CudaOps::rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) {
  check_rope_rows(x, head_dim, cos, sin, positions);
  if (x.empty()) return;
  require_cuda("rope_rows", {x, cos, sin, positions});
  rotate_rows("rope_rows", x, head_dim, cos, sin,
              Listed{positions.as<std::int32_t>(), positions.stride}, stream_);
}

}  // namespace engine
