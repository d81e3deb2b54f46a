// The inner loops with AVX-512 (F, BW, DQ, VL). Only functions marked ENGINE_TARGET use it, so the
// file needs no compiler flags. Operations are described in cpu_kernels_portable.cpp.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined pass-through operand of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstring>
#include <limits>
#include <string>

#include "engine/core/error.h"
#include "engine/ops/cpu_kernels.h"
#include "engine/ops/cpu_kernels_tables.h"

#define ENGINE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define ENGINE_VEC ENGINE_TARGET __attribute__((always_inline)) static inline

namespace engine {
namespace {

struct Vec {
  using Type = __m512;
  static constexpr int lanes = 16;

  ENGINE_VEC Type load(const float* p) { return _mm512_loadu_ps(p); }
  ENGINE_VEC Type load(const f16* p) { return _mm512_cvtph_ps(load_half(p)); }
  ENGINE_VEC Type load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
  }
  ENGINE_VEC void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  ENGINE_VEC void store(f16* p, Type v) {
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &h, sizeof h);
  }
  ENGINE_VEC void store(bf16* p, Type v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
    const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    std::memcpy(p, &h, sizeof h);
  }

  ENGINE_VEC Type set(float v) { return _mm512_set1_ps(v); }
  ENGINE_VEC Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  ENGINE_VEC Type sub(Type a, Type b) { return _mm512_sub_ps(a, b); }
  ENGINE_VEC Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  ENGINE_VEC Type div(Type a, Type b) { return _mm512_div_ps(a, b); }
  ENGINE_VEC Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  ENGINE_VEC Type max(Type a, Type b) { return _mm512_max_ps(a, b); }
  ENGINE_VEC Type min(Type a, Type b) { return _mm512_min_ps(a, b); }
  ENGINE_VEC Type round(Type v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  ENGINE_VEC Type scale_by_power(Type p, Type n) { return _mm512_scalef_ps(p, n); }
  ENGINE_VEC Type pin(Type v) {
    __asm__("" : "+v"(v));
    return v;
  }
  ENGINE_VEC float sum(Type v) { return _mm512_reduce_add_ps(v); }
  ENGINE_VEC void add_widened(double* sums, Type v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
  }
  ENGINE_VEC int count_nonzero_or_nan(Type v) {
    const __mmask16 differs = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return __builtin_popcount(static_cast<unsigned>(differs));
  }

 private:
  ENGINE_VEC __m256i load_half(const void* p) {
    __m256i h;
    std::memcpy(&h, p, sizeof h);
    return h;
  }
};

constexpr int gemm_rows = 14;
constexpr int attention_rows = 8;
constexpr int tile_vecs = 2;

}  // namespace
}  // namespace engine

#include "engine/ops/cpu_kernels_body.h"

namespace engine {

const CpuKernels& avx512_kernels() { return table; }

}  // namespace engine

#endif
