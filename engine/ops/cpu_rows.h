// Rows of 16- or 32-bit floats to and from f32, and checked index vectors, for the CPU's
// quantization ops.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/core/view.h"

namespace engine {

// out[i] = v[row, first + i] as f32, i < n.
inline void load_row(const View& v, std::int64_t row, std::int64_t first, std::int64_t n,
                     float* out) {
  const auto read = [&](const auto* data) {
    data += row * v.stride + first;
    for (std::int64_t i = 0; i < n; ++i) out[i] = to_float(data[i]);
  };
  switch (v.dtype) {
    case DType::f32:
      return read(v.host<float>());
    case DType::f16:
      return read(v.host<f16>());
    case DType::bf16:
      return read(v.host<bf16>());
    default:
      REQUIRE(false, "expected f32, f16 or bf16, found " + v.shape());
  }
}

// An i32 [1, n] view whose entries lie in [0, limit); `what` names it in the message.
inline const std::int32_t* checked_indices(const View& v, std::int64_t n, std::int64_t limit,
                                           const char* what) {
  REQUIRE(v.rows == 1 && v.cols == n,
          std::string(what) + " expected [1, " + std::to_string(n) + "], found " + v.shape());
  const auto* index = v.host<std::int32_t>();
  for (std::int64_t i = 0; i < n; ++i) {
    REQUIRE(index[i] >= 0 && index[i] < limit, std::string(what) + "[" + std::to_string(i) +
                                                   "] is " + std::to_string(index[i]) +
                                                   ", expected 0 to " + std::to_string(limit - 1));
  }
  return index;
}

// As checked_indices, and every value of [0, n) occurs once.
inline const std::int32_t* checked_permutation(const View& v, std::int64_t n) {
  const std::int32_t* perm = checked_indices(v, n, n, "permutation");
  std::vector<bool> seen(static_cast<std::size_t>(n), false);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto at = static_cast<std::size_t>(perm[i]);
    REQUIRE(!seen[at], "permutation names " + std::to_string(perm[i]) + " twice");
    seen[at] = true;
  }
  return perm;
}

}  // namespace engine
