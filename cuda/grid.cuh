// Uniform grids on the device: the functions of engine/weight/grid.h, operation for operation, so
// that codes, scales and zeros are the same bits on both. Every operation is an explicitly rounded
// intrinsic: the compiler may neither fuse a product into a sum nor weaken a division.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/types.cuh"
#include "engine/weight/grid.h"

namespace engine {

// GridSpec as kernels take it.
struct GridParams {
  float top;  // the largest code
  GridRule rule;
  bool symmetric;
  bool mse;
  bool half;  // arithmetic in f16, else f32
  DType scale_dtype;
  bool reciprocal;
};

inline GridParams grid_params(const GridSpec& spec) {
  check_grid_spec(spec);
  return {static_cast<float>(spec.max_code()), spec.rule,        spec.symmetric, spec.mse,
          spec.arithmetic == DType::f16,       spec.scale_dtype, spec.reciprocal};
}

struct DeviceRange {
  float lo;
  float hi;
};

// The result of one operation in the grid's arithmetic.
__device__ inline float in_arithmetic(bool half, float v) {
  return half ? round_through<__half>(v) : v;
}

// clamp(rne(w / scale) + zero, 0, top) as a whole float. NaN becomes 0.
__device__ inline float quantize_on_grid(float w, float scale, float zero, float top, bool half) {
  const float quotient = in_arithmetic(half, __fdiv_rn(in_arithmetic(half, w), scale));
  const float code = in_arithmetic(half, __fadd_rn(rintf(quotient), zero));
  return fminf(fmaxf(code, 0.0F), top);
}

// scale * (code - zero).
__device__ inline float dequantize_on_grid(float code, float scale, float zero, bool half) {
  return in_arithmetic(half, __fmul_rn(scale, in_arithmetic(half, __fsub_rn(code, zero))));
}

__device__ inline float clamp_float(float v, float lo, float hi) {
  return v < lo ? lo : (hi < v ? hi : v);
}

// The scale as it will be stored: rounded, but never 0 and never infinite.
__device__ inline float stored_scale(float scale, const GridParams& p) {
  float smallest = 0x1p-149F;
  float largest = 0x1.fffffep127F;
  if (p.half || p.scale_dtype == DType::f16) {
    smallest = 0x1p-24F;
    largest = 65504.0F;
  } else if (p.scale_dtype == DType::bf16) {
    smallest = 0x1p-133F;
    largest = 0x1.fep127F;
  }
  const float v = clamp_float(scale, smallest, largest);
  if (p.scale_dtype == DType::f16) return round_through<__half>(v);
  if (p.scale_dtype == DType::bf16) return round_through<__nv_bfloat16>(v);
  return v;
}

__device__ inline std::int32_t saturated_zero(float rounded) {
  return __float2int_rz(clamp_float(rounded, -2147483520.0F, 2147483520.0F));
}

__device__ inline float plain_step(DeviceRange range, const GridParams& p) {
  const float width = in_arithmetic(p.half, __fsub_rn(range.hi, range.lo));
  return in_arithmetic(p.half, __fdiv_rn(width, p.top));
}

// Rule gptq: zero lies in the range; symmetric and empty ranges are widened.
__device__ inline DeviceRange gptq_range(DeviceRange range, const GridParams& p) {
  float lo = fminf(range.lo, 0.0F);
  float hi = fmaxf(range.hi, 0.0F);
  if (p.symmetric) {
    hi = fmaxf(-lo, hi);
    if (lo < 0.0F) lo = -hi;
  }
  if (lo == 0.0F && hi == 0.0F) return {-1.0F, 1.0F};
  return {lo, hi};
}

__device__ inline UnitGrid gptq_grid(DeviceRange range, const GridParams& p) {
  const float scale = stored_scale(plain_step(range, p), p);
  const auto top = static_cast<std::int32_t>(p.top);
  if (p.symmetric) return {scale, (top + 1) / 2};
  const float zero = rintf(in_arithmetic(p.half, __fdiv_rn(-range.lo, scale)));
  return {scale, min(max(saturated_zero(zero), 0), top)};
}

// The grid of a unit with the smallest and largest weight `range`; without the mse search.
__device__ inline UnitGrid unit_grid(DeviceRange range, const GridParams& p) {
  // Rounding is monotone, so rounding the ends is rounding every weight first.
  range = {in_arithmetic(p.half, range.lo), in_arithmetic(p.half, range.hi)};
  switch (p.rule) {
    case GridRule::gptq:
      return gptq_grid(gptq_range(range, p), p);
    case GridRule::awq: {
      const float width =
          fmaxf(in_arithmetic(p.half, __fsub_rn(range.hi, range.lo)), in_arithmetic(p.half, 1e-5F));
      const float step =
          p.reciprocal ? __fmul_rn(width, __fdiv_rn(1.0F, p.top)) : __fdiv_rn(width, p.top);
      const float scale = stored_scale(in_arithmetic(p.half, step), p);
      const float zero = -rintf(in_arithmetic(p.half, __fdiv_rn(range.lo, scale)));
      return {scale, saturated_zero(clamp_float(zero, 0.0F, p.top))};
    }
    case GridRule::omniquant: {
      const float step = clamp_float(plain_step(range, p), in_arithmetic(p.half, 1e-5F), 1e4F);
      const float scale = stored_scale(step, p);
      const float zero = in_arithmetic(p.half, __fdiv_rn(-range.lo, scale));
      return {scale, saturated_zero(rintf(clamp_float(zero, -1e4F, 1e4F)))};
    }
    case GridRule::paper: {
      float step = plain_step(range, p);
      if (range.lo == range.hi) step = range.lo == 0.0F ? 1.0F : fabsf(range.lo);
      const float scale = stored_scale(step, p);
      return {scale, saturated_zero(-rintf(in_arithmetic(p.half, __fdiv_rn(range.lo, scale))))};
    }
  }
  return {1.0F, 0};
}

}  // namespace engine
