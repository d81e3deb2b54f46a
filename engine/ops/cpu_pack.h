// Packing of matrix panels for the register tiles, and scratch memory for it.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/ops/cpu_kernels.h"

namespace engine {

// A grow-only f32 area, 64-byte aligned. Meant to be thread_local: it holds a few panels or rows,
// bounded by the blocking and the length of a row, so that calls do not allocate each time.
class Scratch {
 public:
  // At least n floats; what was there is lost.
  float* floats(std::int64_t n);

 private:
  std::vector<float> memory_;
};

// A matrix seen as lanes x depth: element (lane, p) lies at data[lane * stride + p], or at
// data[p * stride + lane] when `lanes_adjacent`. f32, f16 or bf16.
struct PackSource {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;
  bool lanes_adjacent = false;
};

// Packs lanes [lane, lane + lanes) and depth [first, first + depth) into panels of `width` lanes:
// panel i holds out[p * width + l], one panel after the other, depth * width floats each. Lanes
// that the last panel lacks are 0.
void pack_panels(const CpuKernels& kernels, const PackSource& source, std::int64_t lane,
                 std::int64_t lanes, std::int64_t first, std::int64_t depth, std::int64_t width,
                 float* out);

}  // namespace engine
