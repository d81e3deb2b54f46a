#include "engine/ops/cpu_pack.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "engine/core/error.h"

namespace engine {
namespace {

using Four = float __attribute__((vector_size(16)));

Four load4(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

void store4(float* p, Four v) { std::memcpy(p, &v, sizeof v); }

// out[p * width + l] = rows[l * stride + p] for four l and four p.
void transpose4(const float* rows, std::int64_t stride, float* out, std::int64_t width) {
  const Four a = load4(rows);
  const Four b = load4(rows + stride);
  const Four c = load4(rows + 2 * stride);
  const Four d = load4(rows + 3 * stride);
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store4(out, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  store4(out + width, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  store4(out + 2 * width, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store4(out + 3 * width, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// One panel from rows that run along the depth.
void transpose_panel(const float* rows, std::int64_t stride, std::int64_t lanes, std::int64_t depth,
                     std::int64_t width, float* out) {
  std::int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) {
    const float* four = rows + l * stride;
    std::int64_t p = 0;
    for (; p + 4 <= depth; p += 4) transpose4(four + p, stride, out + p * width + l, width);
    for (; p < depth; ++p) {
      for (int i = 0; i < 4; ++i) out[p * width + l + i] = four[i * stride + p];
    }
  }
  for (; l < lanes; ++l) {
    for (std::int64_t p = 0; p < depth; ++p) out[p * width + l] = rows[l * stride + p];
  }
  for (; l < width; ++l) {
    for (std::int64_t p = 0; p < depth; ++p) out[p * width + l] = 0.0F;
  }
}

}  // namespace

float* Scratch::floats(std::int64_t n) {
  constexpr std::size_t slack = 64 / sizeof(float);
  const auto wanted = static_cast<std::size_t>(n) + slack;
  if (memory_.size() < wanted) {
    memory_.clear();
    memory_.resize(wanted);
  }
  void* p = memory_.data();
  std::size_t space = memory_.size() * sizeof(float);
  return static_cast<float*>(std::align(64, static_cast<std::size_t>(n) * sizeof(float), p, space));
}

void pack_panels(const CpuKernels& kernels, const PackSource& source, std::int64_t lane,
                 std::int64_t lanes, std::int64_t first, std::int64_t depth, std::int64_t width,
                 float* out) {
  thread_local Scratch scratch;
  const auto size = static_cast<std::int64_t>(dtype_bytes(source.dtype));
  const auto* data = static_cast<const char*>(source.data);
  for (std::int64_t done = 0; done < lanes; done += width, out += depth * width) {
    const std::int64_t here = std::min(width, lanes - done);
    const std::int64_t l = lane + done;
    if (source.lanes_adjacent) {
      const char* from = data + (first * source.stride + l) * size;
      for (std::int64_t p = 0; p < depth; ++p, from += source.stride * size) {
        kernels.to_f32(source.dtype, from, out + p * width, here);
        std::fill(out + p * width + here, out + (p + 1) * width, 0.0F);
      }
    } else if (source.dtype == DType::f32) {
      const auto* rows = static_cast<const float*>(source.data) + l * source.stride + first;
      transpose_panel(rows, source.stride, here, depth, width, out);
    } else {
      float* rows = scratch.floats(width * depth);
      for (std::int64_t i = 0; i < here; ++i) {
        kernels.to_f32(source.dtype, data + ((l + i) * source.stride + first) * size,
                       rows + i * depth, depth);
      }
      transpose_panel(rows, depth, here, depth, width, out);
    }
  }
}

}  // namespace engine
