// Elements whose type is known at run time only, for kernels that memory bounds anyway.
#pragma once

#include "cuda/types.cuh"

namespace engine {

// f32, f16 or bf16.
__device__ inline float load_any(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f16) return to_f32(static_cast<const __half*>(data)[i]);
  return to_f32(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ inline void store_any(void* data, DType dtype, std::int64_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = v;
  } else if (dtype == DType::f16) {
    static_cast<__half*>(data)[i] = from_f32<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = from_f32<__nv_bfloat16>(v);
  }
}

}  // namespace engine
