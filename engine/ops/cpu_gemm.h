// The CPU's blocked matrix product: packed panels, a register-tiled microkernel per instruction
// set, f32 accumulation (after Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", ACM TOMS 34(3), 2008).
//
// Every element is summed over k in one fixed order of blocks, whatever the number of threads, so
// the same call gives the same bits. Different instruction sets may differ in the last bits.
#pragma once

#include <cstdint>

#include "engine/core/dtype.h"
#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "engine/ops/cpu_kernels.h"

namespace engine {

// A logical matrix [rows, cols] of f32, f16 or bf16. Element (r, c) lies at data[r * stride + c],
// or at data[c * stride + r] when `transposed` (the memory then holds [cols, rows]).
struct GemmInput {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;
  bool transposed = false;
};

// Element (r, c) at data[r * stride + c]; f32, f16 or bf16, rounded once.
struct GemmOutput {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;
};

// c = alpha * a * b (+ c). a [m, k], b [k, n], c [m, n]. Inputs are converted to f32, products and
// sums are f32. alpha scales a before the products (-1 is exact). k may be 0.
struct GemmProblem {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  GemmInput a;
  GemmInput b;
  GemmOutput c;
  float alpha = 1.0F;
  bool accumulate = false;
  // Only elements (i, j) with i >= j are asked for: tiles wholly above the diagonal are skipped,
  // other elements above it may be overwritten.
  bool lower_only = false;
};

// `pool` null: on the calling thread (for use inside a body of ThreadPool::run).
// 2*m*n*k flops, half of that with lower_only. Fails (REQUIRE) on bad dtypes or strides.
void gemm(ThreadPool* pool, const GemmProblem& problem, Isa isa = best_isa());

// All f32: c[m, n] = a * b + beta * c with beta 0 or 1. `a_transposed`: a is stored [k, m];
// `b_transposed`: b is stored [n, k].
inline void sgemm(ThreadPool& pool, std::int64_t m, std::int64_t n, std::int64_t k, const float* a,
                  std::int64_t lda, bool a_transposed, const float* b, std::int64_t ldb,
                  bool b_transposed, float* c, std::int64_t ldc, float beta) {
  REQUIRE(beta == 0.0F || beta == 1.0F, "sgemm: beta is 0 or 1");
  GemmProblem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.a = {a, DType::f32, lda, a_transposed};
  p.b = {b, DType::f32, ldb, b_transposed};
  p.c = {c, DType::f32, ldc};
  p.accumulate = beta == 1.0F;
  gemm(&pool, p);
}

}  // namespace engine
