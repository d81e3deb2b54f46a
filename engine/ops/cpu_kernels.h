// The CPU's inner loops, one table of functions per instruction set, chosen at run time. The loops
// themselves are written once (cpu_kernels_body.h) over a small vector type and compiled per set.
#pragma once

#include <cstdint>

#include "engine/core/dtype.h"

namespace engine {

enum class Isa : std::uint8_t { portable, avx2, avx512 };
[[nodiscard]] const char* isa_name(Isa isa);
[[nodiscard]] bool isa_supported(Isa isa);  // by this processor
[[nodiscard]] Isa best_isa();

// Register tile of the matrix product: c [rows, cols] f32 with row stride ldc, = or += the product
// of packed a [k, rows] and packed b [k, cols], both contiguous.
using TileFunction = void (*)(std::int64_t k, const float* a, const float* b, float* c,
                              std::int64_t ldc, bool add);
struct Tile {
  int rows = 0;
  int cols = 0;
  TileFunction run = nullptr;
};
inline constexpr int max_tile_rows = 14;
inline constexpr int max_tile_cols = 32;

// `dtype` is f32, f16 or bf16 throughout; pointers need no alignment.
struct CpuKernels {
  Tile gemm;
  Tile attention;  // fewer rows, a power of two: they are keys or elements of a head

  // Rows of `dtype` to and from f32; f32 is a plain copy.
  void (*to_f32)(DType dtype, const void* in, float* out, std::int64_t n);
  void (*from_f32)(DType dtype, const float* in, void* out, std::int64_t n);

  // out[i, j] = sum_p a[i, p] * b[j, p] for small m: a f32 [m, k], b [n, k] of `dtype`, out f32
  // [m, n], with row strides.
  void (*dots)(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda,
               DType dtype, const void* b, std::int64_t ldb, float* out, std::int64_t ldo);

  double (*sum_squares)(DType dtype, const void* x, std::int64_t n);
  // out = round(x * scale) * weight, all of `dtype`. out may be x.
  void (*scale_and_weigh)(DType dtype, const void* x, float scale, const void* weight, void* out,
                          std::int64_t n);
  // out = round(gate / (1 + exp(-gate))) * up. out may be gate or up.
  void (*silu_mul)(DType dtype, const void* gate, const void* up, void* out, std::int64_t n);
  // In place (lo, hi) -> (lo cos - hi sin, hi cos + lo sin), n of each; cos and sin f32, rounded to
  // `dtype` here, and so is each product.
  void (*rotate)(DType dtype, void* lo, void* hi, const float* cos, const float* sin,
                 std::int64_t n);

  float (*row_max)(const float* x, std::int64_t n);  // NaN are passed over; -infinity if no others
  // sum exp(x - shift): short runs in f32, the runs in f64. NaN if any element is.
  double (*sum_exp)(const float* x, float shift, std::int64_t n);
  void (*exp)(const float* x, float* out, std::int64_t n);  // relative error below 3e-7
  // The number of NaN and infinite elements.
  std::int64_t (*count_nonfinite)(DType dtype, const void* x, std::int64_t n);

  // One step of the online softmax (Milakov and Gimelshein, arXiv:1805.02867) for a panel of
  // attention.cols queries: scores [keys, cols] become exp(score - new peak), and 0 where
  // first_key + key > position[lane]. peak, total [cols] are brought up to date; rescale [cols]
  // gets the factor for what was accumulated under the old peak (peaks start at -infinity).
  void (*softmax_step)(float* scores, std::int64_t keys, std::int64_t first_key,
                       const std::int32_t* position, float* peak, float* total, float* rescale);
  // rows [n, cols]: every row times factor [cols], cols = attention.cols.
  void (*scale_lanes)(float* rows, std::int64_t n, const float* factor);
};

// The table of a supported set; Error(internal) otherwise.
[[nodiscard]] const CpuKernels& cpu_kernels(Isa isa);

}  // namespace engine
