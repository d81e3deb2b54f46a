// The inner loops in vectors of four floats, which every compiler we support lowers to whatever the
// target has. This is also the description of what a `Vec` offers.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "engine/core/error.h"
#include "engine/ops/cpu_kernels.h"
#include "engine/ops/cpu_kernels_tables.h"

#define ENGINE_TARGET

namespace engine {
namespace {

struct Vec {
  using Type = float __attribute__((vector_size(16)));
  using Bits = std::int32_t __attribute__((vector_size(16)));
  static constexpr int lanes = 4;

  static Type load(const float* p) {
    Type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Type load(const f16* p) {
    return Type{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static Type load(const bf16* p) {
    return Type{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static void store(float* p, Type v) { std::memcpy(p, &v, sizeof v); }
  static void store(f16* p, Type v) {  // rounds to nearest even
    for (int i = 0; i < lanes; ++i) p[i] = to_f16(v[i]);
  }
  static void store(bf16* p, Type v) {
    for (int i = 0; i < lanes; ++i) p[i] = to_bf16(v[i]);
  }

  static Type set(float v) { return Type{v, v, v, v}; }
  static Type add(Type a, Type b) { return a + b; }
  static Type sub(Type a, Type b) { return a - b; }
  static Type mul(Type a, Type b) { return a * b; }
  static Type div(Type a, Type b) { return a / b; }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }  // fused or not
  // b when either is NaN.
  static Type max(Type a, Type b) { return a > b ? a : b; }
  static Type min(Type a, Type b) { return a < b ? a : b; }
  // To the nearest integer, for |v| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. The sum is
  // pinned so that it is not simplified away.
  static Type round(Type v) {
    const Type big = set(12582912.0F);
    return pin(v + big) - big;
  }
  // p * 2^n for integral n in [-256, 254] in two steps, so that either may leave the normal range.
  static Type scale_by_power(Type p, Type n) {
    const Bits i = __builtin_convertvector(n, Bits);
    const Bits half = i >> 1;
    return p * power(half) * power(i - half);
  }
  // The value itself, with its rounding made unavoidable.
  static Type pin(Type v) {
    __asm__("" : "+m"(v));
    return v;
  }
  static float sum(Type v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void add_widened(double* sums, Type v) {
    for (int i = 0; i < lanes; ++i) sums[i] += static_cast<double>(v[i]);
  }
  static int count_nonzero_or_nan(Type v) {
    int count = 0;
    for (int i = 0; i < lanes; ++i) count += v[i] == 0.0F ? 0 : 1;
    return count;
  }

 private:
  static Type power(Bits n) {
    const Bits bits = (n + 127) << 23;
    Type v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
};

constexpr int gemm_rows = 4;
constexpr int attention_rows = 4;
constexpr int tile_vecs = 2;

}  // namespace
}  // namespace engine

#include "engine/ops/cpu_kernels_body.h"

namespace engine {

const CpuKernels& portable_kernels() { return table; }

}  // namespace engine
