// The search of GridSpec::mse over one unit, by a warp or a block.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/reduce.cuh"

namespace engine {

// The grid of a unit of n weights between range.lo and range.hi that loses least in |error|^2.4
// (rule gptq). value(i) is weight i. Called by all `kThreads` threads of a warp (32) or of a block
// with one range; `scratch` is shared memory for 32 values, unused by a warp.
template <int kThreads, class Value>
__device__ UnitGrid mse_grid(DeviceRange range, int thread, int n, Value value, const GridParams& p,
                             double* scratch) {
  UnitGrid grid{1.0F, 0};
  const DeviceRange full =
      gptq_range({in_arithmetic(p.half, range.lo), in_arithmetic(p.half, range.hi)}, p);
  double best = INFINITY;
  for (int k = 0; k < 80; ++k) {
    const auto shrink = static_cast<float>(1.0 - static_cast<double>(k) / 100.0);
    const DeviceRange shrunk{in_arithmetic(p.half, __fmul_rn(shrink, full.lo)),
                             in_arithmetic(p.half, __fmul_rn(shrink, full.hi))};
    const UnitGrid candidate = gptq_grid(shrunk, p);
    const auto zero = static_cast<float>(candidate.zero);
    double loss = 0;
    for (int i = thread; i < n; i += kThreads) {
      const float v = value(i);
      const float code = quantize_on_grid(v, candidate.scale, zero, p.top, p.half);
      const float error = __fsub_rn(dequantize_on_grid(code, candidate.scale, zero, p.half), v);
      loss += static_cast<double>(powf(fabsf(error), 2.4F));
    }
    if constexpr (kThreads == 32) {
      loss = warp_reduce(loss, SumOp{});
    } else {
      loss = block_reduce(loss, SumOp{}, 0.0, scratch);
    }
    if (loss < best || k == 0) {
      best = loss;
      grid = candidate;
    }
  }
  return grid;
}

}  // namespace engine
