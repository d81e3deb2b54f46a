// The grids of SliM-LLM's groups on the device, operation for operation those of cpu_slim.cpp.
#pragma once

#include <cstdint>

#include "cuda/grid.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

// A group of one row: affine, or mu + alpha * sign(w - mu) in groups of 1 bit.
struct SlimGrid {
  float scale;  // alpha
  float zero;   // mu
  float top;    // the largest code
};

struct SlimCode {
  float code;
  float value;
};

inline GridParams slim_params(DType scale_dtype) {
  GridSpec spec;
  spec.scale_dtype = scale_dtype;
  return grid_params(spec);
}

__device__ inline float top_code(int bits) { return static_cast<float>((1 << bits) - 1); }

// `p` for any width.
__device__ inline SlimGrid plain_grid(DeviceRange range, int bits, GridParams p) {
  p.top = top_code(bits);
  const UnitGrid grid = unit_grid(range, p);
  return {grid.scale, static_cast<float>(grid.zero), p.top};
}

__device__ inline SlimGrid sign_grid(double sum, double absolute, std::int64_t n,
                                     const GridParams& p) {
  const auto count = static_cast<double>(n);
  const auto rounded = [&p](double v) {
    const float f = __double2float_rn(v);
    if (p.scale_dtype == DType::f16) return round_through<__half>(f);
    if (p.scale_dtype == DType::bf16) return round_through<__nv_bfloat16>(f);
    return f;
  };
  return {rounded(absolute / count), rounded(sum / count), 1.0F};
}

template <bool kSign>
__device__ SlimCode code_of(float w, const SlimGrid& grid) {
  if constexpr (kSign) {
    const bool above = __fsub_rn(w, grid.zero) >= 0.0F;
    return {above ? 1.0F : 0.0F, __fadd_rn(grid.zero, above ? grid.scale : -grid.scale)};
  } else {
    const float code = quantize_on_grid(w, grid.scale, grid.zero, grid.top, false);
    return {code, dequantize_on_grid(code, grid.scale, grid.zero, false)};
  }
}

}  // namespace
}  // namespace engine
