// The device side of the key-value cache and of one step's rotary embedding, for every kernel that
// writes or reads tokens.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {

// One half (keys or values) of a cache. E is the compute dtype, or u8 with scales.
template <class E>
struct CacheHalf {
  E* data;
  float* scale;  // null for a plain cache
  std::int64_t stride, scale_stride;
};

// Value of a code.
template <class T>
__device__ float code_value(std::uint8_t code, float scale) {
  return round_through<T>(__fmul_rn(scale, static_cast<float>(static_cast<int>(code) - 128)));
}

// One warp makes the n elements at `from` the head `head` of row `row` of the cache.
// Codes: scale max|x| / 127, or 1 if that is 0, and codes 128 + round(x / scale). A head with NaN
// or infinity gets the scale NaN, so that attention shows it.
template <class T, class E>
__device__ void append_head(const T* from, int n, const CacheHalf<E>& to, std::int64_t row,
                            int head, int lane) {
  E* out = to.data + row * to.stride + static_cast<std::int64_t>(head) * n;
  if constexpr (!std::is_same_v<E, std::uint8_t>) {
    for (int i = lane; i < n; i += 32) out[i] = from[i];
  } else {
    constexpr float limit = 127.0F;
    float peak = 0;
    for (int i = lane; i < n; i += 32) {
      const float x = fabsf(to_f32(from[i]));
      peak = fmaxf(peak, isfinite(x) ? x : INFINITY);  // fmaxf would pass over a NaN
    }
    peak = warp_reduce(peak, MaxOp{});
    const bool finite = peak < INFINITY;
    float scale = __fdiv_rn(peak, limit);
    if (scale == 0.0F) scale = 1.0F;
    if (!finite) scale = __uint_as_float(0x7FC00000U);
    for (int i = lane; i < n; i += 32) {
      // A subnormal scale is coarse: the quotient may then exceed the limit.
      const float code = rintf(__fdiv_rn(to_f32(from[i]), scale));
      const float bounded = finite ? fminf(fmaxf(code, -limit), limit) : 0.0F;
      out[i] = static_cast<std::uint8_t>(128 + static_cast<int>(bounded));
    }
    if (lane == 0) to.scale[row * to.scale_stride + head] = scale;
  }
}

// (low, high) -> (low cos - high sin, high cos + low sin), rounded as AttnOps::rope says.
template <class T>
__device__ void rotate(T& low, T& high, float cos, float sin) {
  const float c = round_through<T>(cos);
  const float s = round_through<T>(sin);
  const float a = to_f32(low);
  const float b = to_f32(high);
  const float ac = round_through<T>(__fmul_rn(a, c));
  const float bs = round_through<T>(__fmul_rn(b, s));
  const float bc = round_through<T>(__fmul_rn(b, c));
  const float as = round_through<T>(__fmul_rn(a, s));
  low = from_f32<T>(__fsub_rn(ac, bs));
  high = from_f32<T>(__fadd_rn(bc, as));
}

}  // namespace engine
