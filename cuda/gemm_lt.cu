#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/gemm_lt.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

cudaDataType_t library_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return CUDA_R_32F;
    case DType::f16:
      return CUDA_R_16F;
    case DType::bf16:
      return CUDA_R_16BF;
    default:
      REQUIRE(false, std::string("matmul does not take ") + dtype_name(dtype));
  }
  return CUDA_R_32F;
}

std::uint32_t alignment_of(const void* p) {
  std::uint32_t bytes = 256;
  while (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) bytes /= 2;
  return bytes;
}

struct Preference {
  Preference() { LIBRARY_TRY(cublasLtMatmulPreferenceCreate(&handle)); }
  ~Preference() { (void)cublasLtMatmulPreferenceDestroy(handle); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  template <class T>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    LIBRARY_TRY(cublasLtMatmulPreferenceSetAttribute(handle, attribute, &value, sizeof(value)));
  }
  cublasLtMatmulPreference_t handle = nullptr;
};

// The library reads matrices column by column, so a row-major [r, c] is its [c, r] with the same
// distance between what it calls columns.
cublasLtMatrixLayout_t transposed_layout(DType dtype, std::int64_t rows, std::int64_t cols,
                                         std::int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  LIBRARY_TRY(cublasLtMatrixLayoutCreate(&layout, library_type(dtype),
                                         static_cast<std::uint64_t>(cols),
                                         static_cast<std::uint64_t>(rows), stride));
  return layout;
}

std::string describe(const GemmKey& key) {
  return std::string(dtype_name(key.in)) + " [" + std::to_string(key.m) + ", " +
         std::to_string(key.k) + "] (stride " + std::to_string(key.x_stride) + ") x [" +
         std::to_string(key.n) + ", " + std::to_string(key.k) + "]^T (stride " +
         std::to_string(key.w_stride) + ") to " + dtype_name(key.out) + " (stride " +
         std::to_string(key.out_stride) + (key.accumulate ? "), accumulating" : ")");
}

}  // namespace

GemmPlan::~GemmPlan() {
  if (out != nullptr) (void)cublasLtMatrixLayoutDestroy(out);
  if (x != nullptr) (void)cublasLtMatrixLayoutDestroy(x);
  if (w != nullptr) (void)cublasLtMatrixLayoutDestroy(w);
  if (operation != nullptr) (void)cublasLtMatmulDescDestroy(operation);
}

const GemmPlan& GemmPlans::find(cublasLtHandle_t handle, const GemmKey& key,
                                std::size_t workspace_bytes) {
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second;
  const auto place = plans_.try_emplace(key).first;
  try {
    GemmPlan& plan = place->second;
    LIBRARY_TRY(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transpose = CUBLAS_OP_T;
    LIBRARY_TRY(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                               &transpose, sizeof(transpose)));
    plan.w = transposed_layout(key.in, key.n, key.k, key.w_stride);
    plan.x = transposed_layout(key.in, key.m, key.k, key.x_stride);
    plan.out = transposed_layout(key.out, key.m, key.n, key.out_stride);
    Preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    // Parts of a split sum meet in f32 in the workspace, in a fixed order, or not at all.
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                   static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.w_align);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.x_align);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.out_align);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.out_align);
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, plan.operation, plan.w, plan.x, plan.out, plan.out,
                                       preference.handle, 1, &result, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
      throw Error(ErrorCode::device, "cuda: cublasLt has no algorithm for " + describe(key) +
                                         " (status " + std::to_string(static_cast<int>(status)) +
                                         ")");
    }
    plan.algorithm = result.algo;
    return plan;
  } catch (...) {
    plans_.erase(place);
    throw;
  }
}

void CudaOps::matmul(View x, View w, View out, bool accumulate) {
  REQUIRE(x.cols == w.cols && out.rows == x.rows && out.cols == w.rows,
          "matmul of " + x.shape() + " and " + w.shape() + " into " + out.shape());
  REQUIRE(x.dtype == w.dtype && (out.dtype == x.dtype || out.dtype == DType::f32),
          "matmul dtypes " + x.shape() + ", " + w.shape() + ", " + out.shape());
  if (out.empty()) return;
  if (x.cols == 0) {
    if (!accumulate) zero(out);
    return;
  }
  require_cuda("matmul", {x, w, out});
  // The distance of a single row is irrelevant but the library insists on a plausible one.
  const auto distance = [](const View& v) { return v.rows <= 1 ? v.cols : v.stride; };
  const GemmKey key{x.rows,
                    w.rows,
                    x.cols,
                    distance(x),
                    distance(w),
                    distance(out),
                    x.dtype,
                    out.dtype,
                    accumulate,
                    alignment_of(x.data),
                    alignment_of(w.data),
                    alignment_of(out.data)};
  const View& workspace = lt_workspace_.view();
  const auto workspace_bytes = static_cast<std::size_t>(workspace.bytes());
  const GemmPlan& plan = plans_->find(cublas_lt_, key, workspace_bytes);
  const float alpha = 1.0F;
  const float beta = accumulate ? 1.0F : 0.0F;
  LIBRARY_TRY(cublasLtMatmul(cublas_lt_, plan.operation, &alpha, w.data, plan.w, x.data, plan.x,
                             &beta, out.data, plan.out, out.data, plan.out, &plan.algorithm,
                             workspace.data, workspace_bytes, stream_));
}

}  // namespace engine
