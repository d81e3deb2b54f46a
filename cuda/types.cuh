// Element types on the device, packs for 16-byte accesses, and the checks every launcher makes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "engine/core/view.h"

namespace engine {

__device__ inline float to_f32(float v) { return v; }
__device__ inline float to_f32(__half v) { return __half2float(v); }
__device__ inline float to_f32(__nv_bfloat16 v) { return __bfloat162float(v); }

// Round to nearest even.
template <class T>
__device__ T from_f32(float v);
template <>
__device__ inline float from_f32<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_f32<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// The value that survives a round trip through T.
template <class T>
__device__ float round_through(float v) {
  return to_f32(from_f32<T>(v));
}

// N neighbours moved by one access (two if they are 32 bytes).
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// Calls body(T{}) with T the device type of f32, f16 or bf16.
template <class Body>
void dispatch_float(DType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f16:
      return body(__half{});
    case DType::bf16:
      return body(__nv_bfloat16{});
    default:
      REQUIRE(false, std::string(op) + " does not take " + dtype_name(dtype));
  }
}

inline void require_cuda(const char* op, std::initializer_list<View> views) {
  for (const View& v : views) {
    REQUIRE(v.device == DeviceKind::cuda && v.data != nullptr,
            std::string(op) + ": a view is not on the device: " + v.shape());
    REQUIRE(v.stride >= v.cols || v.rows <= 1,
            std::string(op) + ": stride below the columns of " + v.shape());
  }
}

// Rows start at multiples of `bytes`, and consist of whole packs of n elements.
inline bool aligned_rows(const View& v, std::int64_t bytes, std::int64_t n) {
  const auto size = static_cast<std::int64_t>(dtype_bytes(v.dtype));
  return reinterpret_cast<std::uintptr_t>(v.data) % static_cast<std::uintptr_t>(bytes) == 0 &&
         (v.rows <= 1 || v.stride * size % bytes == 0) && v.cols % n == 0;
}

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Grid for a two-dimensional elementwise kernel: x over columns, y over rows; kernels loop over
// what is beyond the limits.
inline dim3 grid_2d(std::int64_t rows, std::int64_t items, int threads) {
  return {static_cast<unsigned>(std::min<std::int64_t>(ceil_div(items, threads), 1 << 20)),
          static_cast<unsigned>(std::min<std::int64_t>(rows, 65535)), 1};
}

}  // namespace engine
