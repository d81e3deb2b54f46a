// The inner loops with AVX2, FMA and F16C. Only functions marked ENGINE_TARGET use them, so the
// file needs no compiler flags. Operations are described in cpu_kernels_portable.cpp.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <limits>
#include <string>

#include "engine/core/error.h"
#include "engine/ops/cpu_kernels.h"
#include "engine/ops/cpu_kernels_tables.h"

#define ENGINE_TARGET __attribute__((target("avx2,fma,f16c")))
#define ENGINE_VEC ENGINE_TARGET __attribute__((always_inline)) static inline

namespace engine {
namespace {

struct Vec {
  using Type = __m256;
  static constexpr int lanes = 8;

  ENGINE_VEC Type load(const float* p) { return _mm256_loadu_ps(p); }
  ENGINE_VEC Type load(const f16* p) { return _mm256_cvtph_ps(load_half(p)); }
  ENGINE_VEC Type load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
  }
  ENGINE_VEC void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  ENGINE_VEC void store(f16* p, Type v) {
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &h, sizeof h);
  }
  ENGINE_VEC void store(bf16* p, Type v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i h =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    std::memcpy(p, &h, sizeof h);
  }

  ENGINE_VEC Type set(float v) { return _mm256_set1_ps(v); }
  ENGINE_VEC Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  ENGINE_VEC Type sub(Type a, Type b) { return _mm256_sub_ps(a, b); }
  ENGINE_VEC Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
  ENGINE_VEC Type div(Type a, Type b) { return _mm256_div_ps(a, b); }
  ENGINE_VEC Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  ENGINE_VEC Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  ENGINE_VEC Type min(Type a, Type b) { return _mm256_min_ps(a, b); }
  ENGINE_VEC Type round(Type v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  ENGINE_VEC Type scale_by_power(Type p, Type n) {
    const __m256i i = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(i, 1);
    return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(i, half)));
  }
  ENGINE_VEC Type pin(Type v) {
    __asm__("" : "+x"(v));
    return v;
  }
  ENGINE_VEC float sum(Type v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  ENGINE_VEC void add_widened(double* sums, Type v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
  }
  ENGINE_VEC int count_nonzero_or_nan(Type v) {
    const Type differs = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(differs)));
  }

 private:
  ENGINE_VEC __m128i load_half(const void* p) {
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return h;
  }
  ENGINE_VEC Type power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

constexpr int gemm_rows = 6;
constexpr int attention_rows = 4;
constexpr int tile_vecs = 2;

}  // namespace
}  // namespace engine

#include "engine/ops/cpu_kernels_body.h"

namespace engine {

const CpuKernels& avx2_kernels() { return table; }

}  // namespace engine

#endif
