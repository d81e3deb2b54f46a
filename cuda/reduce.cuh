// Reductions over a warp and over a block. The order of additions is fixed, so results repeat.
#pragma once

#include <cuda_runtime.h>

namespace engine {

struct SumOp {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct MaxOp {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every lane gets the result. All 32 lanes must call it.
template <class T, class Op>
__device__ T warp_reduce(T v, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffU, v, offset));
  return v;
}

// Every thread gets the result. blockDim.x is a multiple of 32, at most 1024; `scratch` is shared
// memory for 32 values that nothing else uses meanwhile. Ends with a barrier, so it may be reused.
template <class T, class Op>
__device__ T block_reduce(T v, Op op, T identity, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  v = warp_reduce(v, op);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_reduce(lane < warps ? scratch[lane] : identity, op);
  __syncthreads();
  return v;
}

}  // namespace engine
