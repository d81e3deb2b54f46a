#include "engine/ops/cpu_gemm.h"

#include <algorithm>
#include <functional>

#include "engine/ops/cpu_pack.h"

namespace engine {
namespace {

constexpr std::int64_t depth_block = 256;        // k of one pass: a panel of b stays in L1
constexpr std::int64_t row_block_target = 84;    // rows of a packed at once: they stay in L2
constexpr std::int64_t max_columns = 1024;       // columns of b packed at once, for all of k
constexpr std::int64_t packed_floats = 2 << 20;  // and at most about this many floats
constexpr std::int64_t skinny_rows = 8;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void run(ThreadPool* pool, std::int64_t n, std::int64_t grain,
         const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (pool != nullptr) {
    pool->run(n, grain, body);
  } else {
    for (std::int64_t i = 0; i < n; i += grain) body(i, std::min(n, i + grain));
  }
}

bool is_small_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

void check(const GemmProblem& p) {
  REQUIRE(p.m >= 0 && p.n >= 0 && p.k >= 0, "gemm: negative size");
  REQUIRE(is_small_float(p.a.dtype) && is_small_float(p.b.dtype) && is_small_float(p.c.dtype),
          "gemm: dtypes are f32, f16 or bf16");
  REQUIRE(p.a.stride >= (p.a.transposed ? p.m : p.k) || p.m == 0 || p.k == 0, "gemm: stride of a");
  REQUIRE(p.b.stride >= (p.b.transposed ? p.k : p.n) || p.n == 0 || p.k == 0, "gemm: stride of b");
  REQUIRE(p.c.stride >= p.n, "gemm: stride of c");
}

char* output_at(const GemmProblem& p, std::int64_t row, std::int64_t col) {
  return static_cast<char*>(p.c.data) +
         (row * p.c.stride + col) * static_cast<std::int64_t>(dtype_bytes(p.c.dtype));
}

// Row `row` of c from column `col` on, = or += values (which are overwritten).
void finish_row(const CpuKernels& kernels, const GemmProblem& p, std::int64_t row, std::int64_t col,
                float* values, std::int64_t n) {
  char* out = output_at(p, row, col);
  if (p.accumulate) {
    float old[64];
    for (std::int64_t i = 0; i < n; i += 64) {
      const std::int64_t here = std::min<std::int64_t>(64, n - i);
      kernels.to_f32(p.c.dtype, output_at(p, row, col + i), old, here);
      for (std::int64_t j = 0; j < here; ++j) values[i + j] += old[j];
    }
  }
  kernels.from_f32(p.c.dtype, values, out, n);
}

// A few rows against a stored [n, k]: memory bound, so b is read once, in place.
void gemm_skinny(ThreadPool* pool, const GemmProblem& p, const CpuKernels& kernels) {
  thread_local Scratch scratch;
  // Row-contiguous f32 copy of a. Its size follows k, which is a row of weights.
  float* a = scratch.floats(p.m * p.k);
  const auto a_size = static_cast<std::int64_t>(dtype_bytes(p.a.dtype));
  for (std::int64_t i = 0; i < p.m; ++i) {
    kernels.to_f32(p.a.dtype, static_cast<const char*>(p.a.data) + i * p.a.stride * a_size,
                   a + i * p.k, p.k);
  }
  const auto b_size = static_cast<std::int64_t>(dtype_bytes(p.b.dtype));
  constexpr std::int64_t columns = 64;
  const std::int64_t grain =
      std::max<std::int64_t>(columns, 100000 / std::max<std::int64_t>(p.k, 1));
  run(pool, p.n, grain, [&](std::int64_t begin, std::int64_t end) {
    float out[skinny_rows * columns];
    for (std::int64_t j0 = begin; j0 < end; j0 += columns) {
      const std::int64_t n = std::min(columns, end - j0);
      kernels.dots(p.m, n, p.k, a, p.k, p.b.dtype,
                   static_cast<const char*>(p.b.data) + j0 * p.b.stride * b_size, p.b.stride, out,
                   columns);
      for (std::int64_t i = 0; i < p.m; ++i) {
        float* row = out + i * columns;
        if (p.alpha != 1.0F) {
          for (std::int64_t j = 0; j < n; ++j) row[j] *= p.alpha;
        }
        finish_row(kernels, p, i, j0, row, n);
      }
    }
  });
}

// One tile that may hang over the edge: then it goes through a full-sized copy.
void run_tile(const Tile& tile, std::int64_t k, const float* a, const float* b, float* c,
              std::int64_t ldc, std::int64_t rows, std::int64_t cols, bool add) {
  if (rows == tile.rows && cols == tile.cols) {
    tile.run(k, a, b, c, ldc, add);
    return;
  }
  alignas(64) float whole[max_tile_rows * max_tile_cols];
  tile.run(k, a, b, whole, tile.cols, false);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; ++j) {
      const float v = whole[i * tile.cols + j];
      c[i * ldc + j] = add ? c[i * ldc + j] + v : v;
    }
  }
}

// Columns [first, first + n) of c from b packed for all of k.
struct Panel {
  std::int64_t first = 0;
  std::int64_t n = 0;
  std::int64_t padded = 0;  // n in whole tiles
  const float* packed = nullptr;
};

// Rows [i0, i1) of c and columns [j0, j1) of the panel.
void gemm_piece(const GemmProblem& p, const CpuKernels& kernels, const Panel& panel,
                std::int64_t i0, std::int64_t i1, std::int64_t j0, std::int64_t j1) {
  thread_local Scratch a_scratch;
  thread_local Scratch c_scratch;
  const Tile& tile = kernels.gemm;
  const std::int64_t rows = i1 - i0;
  float* a = a_scratch.floats(ceil_div(rows, tile.rows) * tile.rows * depth_block);
  // A 16-bit c is rounded once, so its sums over k wait in f32.
  const bool direct = p.c.dtype == DType::f32;
  const std::int64_t ldc = direct ? p.c.stride : j1 - j0;
  float* c = direct ? static_cast<float*>(p.c.data) + i0 * ldc + panel.first + j0
                    : c_scratch.floats(rows * ldc);
  const PackSource source{p.a.data, p.a.dtype, p.a.stride, p.a.transposed};
  // At least one pass, so that k = 0 writes zeros.
  for (std::int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += depth_block) {
    const std::int64_t depth = std::min(depth_block, p.k - k0);
    pack_panels(kernels, source, i0, rows, k0, depth, tile.rows, a);
    if (p.alpha != 1.0F) {
      const std::int64_t n = ceil_div(rows, tile.rows) * tile.rows * depth;
      for (std::int64_t i = 0; i < n; ++i) a[i] *= p.alpha;
    }
    const float* b = panel.packed + k0 * panel.padded;
    const bool add = k0 > 0 || (direct && p.accumulate);
    for (std::int64_t j = j0; j < j1; j += tile.cols) {
      for (std::int64_t i = 0; i < rows; i += tile.rows) {
        const std::int64_t here = std::min<std::int64_t>(tile.rows, rows - i);
        if (p.lower_only && panel.first + j > i0 + i + here - 1) continue;
        run_tile(tile, depth, a + i * depth, b + j * depth, c + i * ldc + (j - j0), ldc, here,
                 std::min<std::int64_t>(tile.cols, j1 - j), add);
      }
    }
  }
  if (direct) return;
  for (std::int64_t i = 0; i < rows; ++i) {
    // With lower_only only what was computed may be read.
    const std::int64_t last_row = std::min(i0 + i / tile.rows * tile.rows + tile.rows, i1) - 1;
    std::int64_t n = j1 - j0;
    if (p.lower_only) {
      const std::int64_t asked = last_row - panel.first - j0;
      n = asked < 0 ? 0 : std::min(n, (asked / tile.cols + 1) * tile.cols);
    }
    if (n > 0) finish_row(kernels, p, i0 + i, panel.first + j0, c + i * ldc, n);
  }
}

}  // namespace

void gemm(ThreadPool* pool, const GemmProblem& p, Isa isa) {
  check(p);
  if (p.m == 0 || p.n == 0) return;
  const CpuKernels& kernels = cpu_kernels(isa);
  if (p.m <= skinny_rows && p.b.transposed && !p.a.transposed && !p.lower_only) {
    gemm_skinny(pool, p, kernels);
    return;
  }
  thread_local Scratch b_scratch;
  const Tile& tile = kernels.gemm;
  const std::int64_t row_block =
      std::max<std::int64_t>(row_block_target / tile.rows, 1) * tile.rows;
  const std::int64_t fitting = packed_floats / std::max<std::int64_t>(p.k, 1) / tile.cols;
  const std::int64_t width =
      std::clamp<std::int64_t>(fitting, 1, max_columns / tile.cols) * tile.cols;
  const PackSource source{p.b.data, p.b.dtype, p.b.stride, !p.b.transposed};
  const std::int64_t depths = ceil_div(p.k, depth_block);
  const std::int64_t row_blocks = ceil_div(p.m, row_block);
  for (std::int64_t first = 0; first < p.n; first += width) {
    Panel panel;
    panel.first = first;
    panel.n = std::min(width, p.n - first);
    const std::int64_t tiles = ceil_div(panel.n, tile.cols);
    panel.padded = tiles * tile.cols;
    float* packed = b_scratch.floats(panel.padded * p.k);
    panel.packed = packed;
    run(pool, tiles * depths, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t k0 = item / tiles * depth_block;
        const std::int64_t j = item % tiles * tile.cols;
        const std::int64_t depth = std::min(depth_block, p.k - k0);
        pack_panels(kernels, source, first + j, std::min<std::int64_t>(tile.cols, panel.n - j), k0,
                    depth, tile.cols, packed + k0 * panel.padded + j * depth);
      }
    });
    // Short problems are cut along the columns too, by their shape alone.
    const std::int64_t cuts = std::clamp<std::int64_t>(16 / row_blocks, 1, ceil_div(tiles, 2));
    const std::int64_t cut = ceil_div(tiles, cuts) * tile.cols;
    run(pool, row_blocks * cuts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t i0 = item / cuts * row_block;
        const std::int64_t j0 = item % cuts * cut;
        const std::int64_t i1 = std::min(p.m, i0 + row_block);
        const std::int64_t j1 = std::min(panel.n, j0 + cut);
        if (j0 < j1) gemm_piece(p, kernels, panel, i0, i1, j0, j1);
      }
    });
  }
}

}  // namespace engine
