// Dense products on raw device pointers, row-major, for kernels that need one inside.
#pragma once

#include <cublas_v2.h>

#include <cstdint>

#include "engine/core/dtype.h"

namespace engine {

// c[m, n] = alpha * op(a) * op(b) + beta * c, everything row-major. op(a) is [m, k]: with `ta` the
// stored a is [k, m], with `tb` the stored b is [n, k]. lda, ldb, ldc are the elements from one
// stored row to the next. The work is queued on the handle's stream (never call cublasSetStream
// again: it would detach the handle's workspace). Deterministic. beta 0 does not read c.
// Throws Error(device) when the library refuses.

// IEEE f32 multiply-add, never TF32.
void gemm_f32(cublasHandle_t handle, bool ta, bool tb, std::int64_t m, std::int64_t n,
              std::int64_t k, float alpha, const float* a, std::int64_t lda, const float* b,
              std::int64_t ldb, float beta, float* c, std::int64_t ldc);

void gemm_f64(cublasHandle_t handle, bool ta, bool tb, std::int64_t m, std::int64_t n,
              std::int64_t k, double alpha, const double* a, std::int64_t lda, const double* b,
              std::int64_t ldb, double beta, double* c, std::int64_t ldc);

// a and b are both `dtype` (f16 or bf16), c is f32: exact products, f32 accumulation.
// Example, a tile of x^T x for x [rows, k]: gemm_16(h, dtype, true, false, tile_i, tile_j, rows,
// 1, x + i0, ldx, x + j0, ldx, 1, h + i0 * ldh + j0, ldh).
void gemm_16(cublasHandle_t handle, DType dtype, bool ta, bool tb, std::int64_t m, std::int64_t n,
             std::int64_t k, float alpha, const void* a, std::int64_t lda, const void* b,
             std::int64_t ldb, float beta, float* c, std::int64_t ldc);

}  // namespace engine
