// Steps of a Hadamard transform of a row in shared memory, by one block of whole warps.
#pragma once

#include <cuda_runtime.h>

namespace engine {

// kLevels additions and subtractions at distances half, 2 half, ... of row [d]. half is a power of
// two, at least 32, so that a warp's accesses are neighbours.
template <int kLevels>
__device__ void add_levels(float* row, int d, int half) {
  constexpr int n = 1 << kLevels;
  for (int w = static_cast<int>(threadIdx.x); w < d >> kLevels; w += static_cast<int>(blockDim.x)) {
    const int low = w & (half - 1);
    float* at = row + ((w - low) << kLevels) + low;
    float v[n];
#pragma unroll
    for (int e = 0; e < n; ++e) v[e] = at[e * half];
#pragma unroll
    for (int bit = 1; bit < n; bit *= 2) {
#pragma unroll
      for (int e = 0; e < n; ++e) {
        if ((e & bit) != 0) continue;
        const float a = v[e], b = v[e | bit];
        v[e] = __fadd_rn(a, b);
        v[e | bit] = __fsub_rn(a, b);
      }
    }
#pragma unroll
    for (int e = 0; e < n; ++e) at[e * half] = v[e];
  }
  __syncthreads();
}

// row[k power + r] <- sum over i of h[i, k] row[i power + r], in place: a thread owns a column r.
template <int kOrder>
__device__ void mix_small(float* row, int power, const float* h) {
  constexpr int at_once = kOrder > 28 ? 1 : 2;  // more spills registers
  for (int r = static_cast<int>(threadIdx.x); r < power; r += static_cast<int>(blockDim.x)) {
    float sum[kOrder] = {};
#pragma unroll at_once
    for (int i = 0; i < kOrder; ++i) {
      const float x = row[i * power + r];
#pragma unroll
      for (int k = 0; k < kOrder; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(h + i * kOrder + k);
        sum[k] = fmaf(four.x, x, sum[k]);  // the product is exact
        sum[k + 1] = fmaf(four.y, x, sum[k + 1]);
        sum[k + 2] = fmaf(four.z, x, sum[k + 2]);
        sum[k + 3] = fmaf(four.w, x, sum[k + 3]);
      }
    }
#pragma unroll
    for (int k = 0; k < kOrder; ++k) row[k * power + r] = sum[k];
  }
  __syncthreads();
}

// The same from row to other, for any order that is a multiple of four; h as signs, at a multiple
// of four bytes. A thread makes four neighbouring k of a column, so that it reads four signs at
// once.
__device__ inline void mix_any(const float* row, int d, int order, const signed char* h,
                               float* other) {
  const int power = d / order;
  for (int n = static_cast<int>(threadIdx.x); n < d / 4; n += static_cast<int>(blockDim.x)) {
    const int k = n / power * 4, r = n % power;
    float sum[4] = {};
    for (int i = 0; i < order; ++i) {
      const float x = row[i * power + r];
      const char4 signs = *reinterpret_cast<const char4*>(h + i * order + k);
      sum[0] = fmaf(static_cast<float>(signs.x), x, sum[0]);  // the product is exact
      sum[1] = fmaf(static_cast<float>(signs.y), x, sum[1]);
      sum[2] = fmaf(static_cast<float>(signs.z), x, sum[2]);
      sum[3] = fmaf(static_cast<float>(signs.w), x, sum[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) other[(k + e) * power + r] = sum[e];
  }
  __syncthreads();
}

// All levels from distance `half` (as add_levels takes it) up to power / 2.
__device__ inline void add_all_levels(float* row, int d, int power, int half) {
  for (; half * 8 < power; half *= 16) add_levels<4>(row, d, half);
  if (half * 4 < power) {
    add_levels<3>(row, d, half);
  } else if (half * 2 < power) {
    add_levels<2>(row, d, half);
  } else if (half < power) {
    add_levels<1>(row, d, half);
  }
}

}  // namespace engine
