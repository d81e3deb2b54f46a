// Cached cublasLt descriptors and algorithms: one plan per shape, layout, type and alignment.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>

#include "engine/core/view.h"

namespace engine {

// out [m, n] = x [m, k] w [n, k]^T (+ out), with the rows' distances and the largest power of two
// (at most 256) that divides each address.
struct GemmKey {
  std::int64_t m, n, k;
  std::int64_t x_stride, w_stride, out_stride;
  DType in, out;
  bool accumulate;
  std::uint32_t x_align, w_align, out_align;
  auto operator<=>(const GemmKey&) const = default;
};

struct GemmPlan {
  GemmPlan() = default;
  GemmPlan(const GemmPlan&) = delete;
  GemmPlan& operator=(const GemmPlan&) = delete;
  ~GemmPlan();
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t w = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t out = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

class GemmPlans {
 public:
  // Throws Error(device) naming the shapes when the library has no algorithm.
  const GemmPlan& find(cublasLtHandle_t handle, const GemmKey& key, std::size_t workspace_bytes);

 private:
  std::map<GemmKey, GemmPlan> plans_;
};

}  // namespace engine
