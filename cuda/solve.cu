// CudaOps: damping and the triangular factor of GPTQ (docs/methods/gptq.md).
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int flat_threads = 256;
constexpr int sum_threads = 1024;
constexpr int tile = 32;
constexpr int tile_rows = 8;  // threads of a tile: 32 x 8

__global__ void __launch_bounds__(flat_threads)
    diagonal_kernel(const float* h, std::int64_t stride, float* out, std::int64_t d) {
  const std::int64_t i =
      static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x);
  if (i < d) out[i] = h[i * stride + i];
}

// Dead flags, and damping = damp * mean of the scaled diagonal (1 where dead). One block: its
// fixed order of additions makes the result repeatable. d strided loads per thread / 1024.
__global__ void __launch_bounds__(sum_threads)
    damping_kernel(const float* h, std::int64_t stride, const std::int32_t* perm, std::int64_t d,
                   double scale, double damp, std::uint8_t* dead, double* damping) {
  __shared__ double scratch[32];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < d; i += sum_threads) {
    const std::int64_t p = perm != nullptr ? perm[i] : i;
    const float value = h[p * stride + p];
    dead[i] = value == 0.0F ? 1 : 0;
    sum += value == 0.0F ? 1.0 : scale * static_cast<double>(value);
  }
  sum = block_reduce(sum, SumOp{}, 0.0, scratch);
  if (threadIdx.x == 0) *damping = damp * (sum / static_cast<double>(d));
}

// Both triangles of a from the lower triangle of h. A block makes the 32 x 32 tile (y, x), x <= y,
// and its mirror image through shared memory, so both are written in whole rows. grid: tiles x
// tiles (the upper half returns at once), block 32 x 8. With perm the reads of h scatter.
template <class T>
__global__ void __launch_bounds__(tile* tile_rows)
    damp_kernel(const float* h, std::int64_t h_stride, const std::int32_t* perm,
                const std::uint8_t* dead, const double* damping, double scale, T* a,
                std::int64_t a_stride, std::int64_t d) {
  if (blockIdx.x > blockIdx.y) return;
  __shared__ T values[tile][tile + 1];
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.y) * tile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.x) * tile;
  const int tx = static_cast<int>(threadIdx.x);
  const std::int64_t j = j0 + tx;
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    const std::int64_t i = i0 + y;
    if (i >= d || j >= d) continue;
    const std::int64_t p = perm != nullptr ? perm[i] : i;
    const std::int64_t q = perm != nullptr ? perm[j] : j;
    const auto stored = static_cast<double>(h[max(p, q) * h_stride + min(p, q)]);
    double v = __dmul_rn(scale, stored);
    if (i == j) v = __dadd_rn(dead[i] != 0 ? 1.0 : v, *damping);
    values[y][tx] = static_cast<T>(v);
    a[i * a_stride + j] = static_cast<T>(v);
  }
  if (i0 == j0) return;  // that tile was written whole
  __syncthreads();
#pragma unroll
  for (int y = static_cast<int>(threadIdx.y); y < tile; y += tile_rows) {
    if (i0 + tx < d && j0 + y < d) a[(j0 + y) * a_stride + i0 + tx] = values[tx][y];
  }
}

// a[i, j] <-> a[d-1-i, d-1-j] in place, a thread per pair. kLower: of the input only the lower
// triangle counts; the output is then upper triangular with zeros below the diagonal.
// grid: x over columns, y over the first (d + 1) / 2 rows.
template <class T, bool kLower>
__global__ void __launch_bounds__(flat_threads)
    reverse_kernel(T* a, std::int64_t stride, std::int64_t d) {
  const std::int64_t i = blockIdx.y;
  const std::int64_t j =
      static_cast<std::int64_t>(blockIdx.x) * flat_threads + static_cast<int>(threadIdx.x);
  const std::int64_t mi = d - 1 - i;
  const std::int64_t mj = d - 1 - j;
  if (j >= d || (i == mi && j > mj)) return;
  T* first = a + i * stride + j;
  T* second = a + mi * stride + mj;
  const T v = !kLower || j <= i ? *first : T{};
  const T mirror = !kLower || mj <= mi ? *second : T{};
  *second = v;
  *first = mirror;  // the middle element of an odd d is its own mirror, and on the diagonal
}

// The library's parameter block, given back on every path.
class SolverParams {
 public:
  SolverParams() { LIBRARY_TRY(cusolverDnCreateParams(&params_)); }
  ~SolverParams() { (void)cusolverDnDestroyParams(params_); }
  SolverParams(const SolverParams&) = delete;
  SolverParams& operator=(const SolverParams&) = delete;
  [[nodiscard]] cusolverDnParams_t get() const { return params_; }

 private:
  cusolverDnParams_t params_ = nullptr;
};

cudaDataType library_type(DType dtype) {
  REQUIRE(dtype == DType::f32 || dtype == DType::f64,
          std::string("factor_upper takes f32 or f64, not ") + dtype_name(dtype));
  return dtype == DType::f32 ? CUDA_R_32F : CUDA_R_64F;
}

struct FactorBytes {
  std::size_t device = 0;
  std::size_t host = 0;
};

// Row-major lower is the library's column-major upper.
FactorBytes query_factor(cusolverDnHandle_t handle, const SolverParams& params, std::int64_t d,
                         DType dtype, const void* a, std::int64_t stride) {
  FactorBytes out;
  const cudaDataType type = library_type(dtype);
  LIBRARY_TRY(cusolverDnXpotrf_bufferSize(handle, params.get(), CUBLAS_FILL_MODE_UPPER, d, type, a,
                                          stride, type, &out.device, &out.host));
  return out;
}

template <class T, bool kLower>
void reverse(T* a, std::int64_t stride, std::int64_t d, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(d, flat_threads)),
                  static_cast<unsigned>((d + 1) / 2));
  launch("factor_upper (reversal)", reverse_kernel<T, kLower>, grid, dim3(flat_threads), 0, stream,
         a, stride, d);
}

template <class Body>
void dispatch_factor(DType dtype, Body&& body) {
  if (library_type(dtype) == CUDA_R_64F) return body(double{});
  return body(float{});
}

// Row counts that fit the y dimension of every grid here.
constexpr std::int64_t max_dim = 131070;

}  // namespace

void CudaOps::diagonal(View h, View out) {
  REQUIRE(h.dtype == DType::f32 && h.rows == h.cols && out.dtype == DType::f32 && out.rows == 1 &&
              out.cols == h.cols,
          "diagonal: h " + h.shape() + ", out " + out.shape());
  if (h.empty()) return;
  require_cuda("diagonal", {h, out});
  launch("diagonal", diagonal_kernel, dim3(static_cast<unsigned>(ceil_div(h.rows, flat_threads))),
         dim3(flat_threads), 0, stream_, h.as<float>(), h.stride, out.as<float>(), h.rows);
}

void CudaOps::damp_hessian(View h, View perm, double scale, double damp, View a, View dead,
                           View damping) {
  const std::int64_t d = h.rows;
  REQUIRE(h.dtype == DType::f32 && d > 0 && d <= max_dim && h.cols == d,
          "damp_hessian: h " + h.shape());
  REQUIRE(a.rows == d && a.cols == d, "damp_hessian: a " + a.shape());
  REQUIRE(dead.rows == 1 && dead.cols == d, "damp_hessian: dead " + dead.shape());
  REQUIRE(damping.count() == 1, "damp_hessian: damping " + damping.shape());
  require_cuda("damp_hessian", {h, a, dead, damping});
  const std::int32_t* order = nullptr;
  if (!perm.empty()) {
    REQUIRE(perm.rows == 1 && perm.cols == d, "damp_hessian: perm " + perm.shape());
    require_cuda("damp_hessian", {perm});
    order = perm.as<std::int32_t>();
  }
  launch("damp_hessian (mean)", damping_kernel, dim3(1), dim3(sum_threads), 0, stream_,
         h.as<float>(), h.stride, order, d, scale, damp, dead.as<std::uint8_t>(),
         damping.as<double>());
  const auto tiles = static_cast<unsigned>(ceil_div(d, tile));
  dispatch_factor(a.dtype, [&](auto type) {
    using T = decltype(type);
    launch("damp_hessian", damp_kernel<T>, dim3(tiles, tiles), dim3(tile, tile_rows), 0, stream_,
           h.as<float>(), h.stride, order, dead.as<std::uint8_t>(), damping.as<double>(), scale,
           a.as<T>(), a.stride, d);
  });
}

std::int64_t CudaOps::factor_workspace_bytes(std::int64_t d, DType dtype) {
  const SolverParams params;
  const FactorBytes bytes = query_factor(cusolver_, params, d, dtype, nullptr, d);
  // Room to start at a multiple of 256 whatever the view's address.
  return static_cast<std::int64_t>(bytes.device) + 256;
}

bool CudaOps::factor_upper(View a, View workspace) {
  const std::int64_t d = a.rows;
  REQUIRE(d > 0 && d <= max_dim && a.cols == d, "factor_upper: a " + a.shape());
  require_cuda("factor_upper", {a, workspace});
  const cudaDataType type = library_type(a.dtype);
  const SolverParams params;
  const FactorBytes bytes = query_factor(cusolver_, params, d, a.dtype, a.data, a.stride);
  auto* base = workspace.as<std::uint8_t>();
  const auto skipped = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(base) % 256);
  REQUIRE(workspace.contiguous() &&
              workspace.bytes() >= static_cast<std::int64_t>(bytes.device) + skipped,
          "factor_upper: workspace " + workspace.shape() + ", needed " +
              std::to_string(bytes.device) + " bytes");
  std::vector<std::uint8_t> host(bytes.host);
  auto* status = static_cast<int*>(small_device_.view().data);
  auto* status_host = static_cast<int*>(small_host_.view().data);

  // With J the reversal, J a J = L L^T gives a = (J L J)(J L J)^T, and J L J is upper triangular.
  dispatch_factor(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    reverse<T, false>(a.as<T>(), a.stride, d, stream_);
  });
  LIBRARY_TRY(cusolverDnXpotrf(cusolver_, params.get(), CUBLAS_FILL_MODE_UPPER, d, type, a.data,
                               a.stride, type, base + skipped, bytes.device, host.data(),
                               bytes.host, status));
  // The last pivot too: a NaN or infinity anywhere reaches it, and the library does not report it.
  const std::size_t size = dtype_bytes(a.dtype);
  const auto last = static_cast<std::size_t>((d - 1) * a.stride + d - 1) * size;
  CUDA_TRY(cudaMemcpyAsync(status_host, status, sizeof(int), cudaMemcpyDeviceToHost, stream_));
  CUDA_TRY(cudaMemcpyAsync(status_host + 2, static_cast<const char*>(a.data) + last, size,
                           cudaMemcpyDeviceToHost, stream_));
  CUDA_TRY(cudaStreamSynchronize(stream_));
  REQUIRE(*status_host >= 0, "cusolverDnXpotrf: argument " + std::to_string(-*status_host));
  bool sound = *status_host == 0;
  dispatch_factor(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    T pivot{};
    std::memcpy(&pivot, status_host + 2, sizeof(T));
    sound = sound && std::isfinite(pivot) && pivot > T{};
    if (sound) reverse<T, true>(a.as<T>(), a.stride, d, stream_);
  });
  return sound;
}

}  // namespace engine
