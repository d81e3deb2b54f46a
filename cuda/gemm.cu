#include "cuda/check.h"
#include "cuda/gemm.h"

namespace engine {
namespace {

// A row-major matrix is its transpose in the library's column-major reading, so c^T = op(b)^T
// op(a)^T: the operands swap places and keep their own flags.
cublasOperation_t flag(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

void gemm_f32(cublasHandle_t handle, bool ta, bool tb, std::int64_t m, std::int64_t n,
              std::int64_t k, float alpha, const float* a, std::int64_t lda, const float* b,
              std::int64_t ldb, float beta, float* c, std::int64_t ldc) {
  if (m == 0 || n == 0) return;
  LIBRARY_TRY(
      cublasSgemm_64(handle, flag(tb), flag(ta), n, m, k, &alpha, b, ldb, a, lda, &beta, c, ldc));
}

void gemm_f64(cublasHandle_t handle, bool ta, bool tb, std::int64_t m, std::int64_t n,
              std::int64_t k, double alpha, const double* a, std::int64_t lda, const double* b,
              std::int64_t ldb, double beta, double* c, std::int64_t ldc) {
  if (m == 0 || n == 0) return;
  LIBRARY_TRY(
      cublasDgemm_64(handle, flag(tb), flag(ta), n, m, k, &alpha, b, ldb, a, lda, &beta, c, ldc));
}

void gemm_16(cublasHandle_t handle, DType dtype, bool ta, bool tb, std::int64_t m, std::int64_t n,
             std::int64_t k, float alpha, const void* a, std::int64_t lda, const void* b,
             std::int64_t ldb, float beta, float* c, std::int64_t ldc) {
  REQUIRE(dtype == DType::f16 || dtype == DType::bf16,
          std::string("gemm_16 takes f16 or bf16, not ") + dtype_name(dtype));
  if (m == 0 || n == 0) return;
  const cudaDataType_t type = dtype == DType::f16 ? CUDA_R_16F : CUDA_R_16BF;
  LIBRARY_TRY(cublasGemmEx_64(handle, flag(tb), flag(ta), n, m, k, &alpha, b, type, ldb, a, type,
                              lda, &beta, c, CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
}

}  // namespace engine
