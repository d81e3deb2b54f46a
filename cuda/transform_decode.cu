// CudaOps: what decodes weights with transforms besides the transforms.
#include <algorithm>
#include <array>
#include <string>

#include "cuda/any_float.cuh"
#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/transform.h"

namespace engine {
namespace {

constexpr int tile = 32;
constexpr int tile_lines = 8;
constexpr int flat_threads = 256;
constexpr int rows_per_block = 8;

template <class T>
__global__ void __launch_bounds__(tile* tile_lines)
    transpose_kernel(const T* in, std::int64_t in_stride, std::int64_t in_batch, T* out,
                     std::int64_t out_stride, std::int64_t out_batch, std::int64_t rows,
                     std::int64_t cols) {
  __shared__ T values[tile][tile + 1];
  in += blockIdx.z * in_batch;
  out += blockIdx.z * out_batch;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const std::int64_t c0 = static_cast<std::int64_t>(blockIdx.x) * tile;
  for (std::int64_t r0 = static_cast<std::int64_t>(blockIdx.y) * tile; r0 < rows;
       r0 += static_cast<std::int64_t>(gridDim.y) * tile) {
#pragma unroll
    for (int i = y; i < tile; i += tile_lines) {
      if (r0 + i < rows && c0 + x < cols) values[i][x] = in[(r0 + i) * in_stride + c0 + x];
    }
    __syncthreads();
#pragma unroll
    for (int i = y; i < tile; i += tile_lines) {
      if (c0 + i < cols && r0 + x < rows) out[(c0 + i) * out_stride + r0 + x] = values[x][i];
    }
    __syncthreads();
  }
}

// out[r, c] = scales[r] (codes[r, c] - zero). A thread walks down a column, blocks gridDim.y apart.
__global__ void __launch_bounds__(flat_threads)
    midrise_kernel(const std::uint8_t* codes, std::int64_t code_stride, const float* scales,
                   std::int64_t scale_stride, float zero, float* out, std::int64_t stride,
                   std::int64_t rows, std::int64_t cols) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * flat_threads + threadIdx.x;
  if (c >= cols) return;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    out[r * stride + c] =
        __fmul_rn(scales[r * scale_stride], static_cast<float>(codes[r * code_stride + c]) - zero);
  }
}

// A nibble 2 v + 8 for each coordinate v of 256 points; of e8p with its order of nibbles.
struct LatticeTable {
  std::uint32_t words[256];
};

__device__ void point_of(const std::uint32_t* words, std::uint16_t code, float (&v)[8]) {  // e8p
  const std::uint32_t word = words[code >> 8];
  unsigned signs = code & 255U;
  const unsigned lowered = __popc(signs) & 1U;
  signs ^= lowered;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = i % 2 == 0 ? i / 2 : 4 + i / 2;
    const float value = static_cast<float>((word >> (4 * place)) & 15U) * 0.5F - 4.0F;
    v[i] = ((signs >> place & 1U) != 0 ? -value : value) + (lowered != 0 ? -0.25F : 0.25F);
  }
}

__device__ void point_of(const std::uint32_t* words, std::uint8_t code, float (&v)[8]) {  // e8_byte
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] = static_cast<float>((words[code] >> (4 * i)) & 15U) * 0.5F - 4.0F;
  }
}

// One thread per code, 8 columns of out, walking down rows gridDim.y apart.
template <class Code>
__global__ void __launch_bounds__(flat_threads)
    lattice_kernel(const Code* codes, std::int64_t code_stride, LatticeTable table,
                   const float* scales, std::int64_t scale_stride, bool accumulate, float* out,
                   std::int64_t stride, std::int64_t rows, std::int64_t code_cols, bool aligned) {
  __shared__ std::uint32_t words[256];
  static_assert(flat_threads == 256);
  words[threadIdx.x] = table.words[threadIdx.x];
  __syncthreads();
  const std::int64_t k = static_cast<std::int64_t>(blockIdx.x) * flat_threads + threadIdx.x;
  if (k >= code_cols) return;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    float v[8];
    point_of(words, codes[r * code_stride + k], v);
    const float scale = scales[r * scale_stride];
    float* to = out + r * stride + 8 * k;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(scale, v[i]);
    if (aligned) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float4 four = make_float4(v[4 * h], v[4 * h + 1], v[4 * h + 2], v[4 * h + 3]);
        if (accumulate) {
          const float4 old = reinterpret_cast<const float4*>(to)[h];
          four = make_float4(__fadd_rn(old.x, four.x), __fadd_rn(old.y, four.y),
                             __fadd_rn(old.z, four.z), __fadd_rn(old.w, four.w));
        }
        reinterpret_cast<float4*>(to)[h] = four;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = accumulate ? __fadd_rn(to[i], v[i]) : v[i];
    }
  }
}

// out[r, perm[c]] = x[r, c] diagonal[perm[c]]; either may be null.
__global__ void __launch_bounds__(flat_threads)
    place_kernel(const float* x, std::int64_t x_stride, const std::int32_t* perm,
                 const float* diagonal, void* out, DType dtype, std::int64_t stride,
                 std::int64_t rows, std::int64_t cols) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * flat_threads + threadIdx.x;
  if (c >= cols) return;
  const std::int64_t to = perm == nullptr ? c : perm[c];
  const float factor = diagonal == nullptr ? 1.0F : diagonal[to];
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    store_any(out, dtype, r * stride + to, __fmul_rn(x[r * x_stride + c], factor));
  }
}

dim3 flat_grid(std::int64_t rows, std::int64_t items) {
  return {static_cast<unsigned>(ceil_div(items, flat_threads)),
          static_cast<unsigned>(std::min<std::int64_t>(ceil_div(rows, rows_per_block), 65535)), 1};
}

void require_scales(const char* op, const View& scales, std::int64_t rows) {
  REQUIRE(
      scales.dtype == DType::f32 && scales.cols == 1 && (scales.rows == rows || scales.rows == 1),
      std::string(op) + ": scales are " + scales.shape());
}

std::int64_t scale_stride(const View& scales) { return scales.rows == 1 ? 0 : scales.stride; }

LatticeTable lattice_table(LatticeBook book) {
  LatticeTable table{};
  if (book == LatticeBook::e8p) {
    std::ranges::copy(e8p_words(), table.words);
    return table;
  }
  for (std::size_t k = 0; k < 256; ++k) {
    for (std::size_t i = 0; i < 8; ++i) {
      const auto nibble = static_cast<std::uint32_t>(2.0F * e8_byte_points()[k][i] + 8.0F);
      table.words[k] |= nibble << (4 * i);
    }
  }
  return table;
}

}  // namespace

void transpose_batched(const TransposeProblem& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, tile)),
                  static_cast<unsigned>(std::min<std::int64_t>(ceil_div(p.rows, tile), 65535)),
                  static_cast<unsigned>(p.batch));
  const auto run = [&](auto element) {
    using T = decltype(element);
    launch("transpose", transpose_kernel<T>, grid, dim3(tile, tile_lines), 0, stream,
           static_cast<const T*>(p.in), p.in_stride, p.in_batch, static_cast<T*>(p.out),
           p.out_stride, p.out_batch, p.rows, p.cols);
  };
  p.bytes == 2 ? run(std::uint16_t{}) : run(std::uint32_t{});
}

void CudaOps::transpose(View in, View out) {
  REQUIRE(
      in.rows == out.cols && in.cols == out.rows && in.dtype == out.dtype && in.data != out.data,
      "transpose: from " + in.shape() + " to " + out.shape());
  REQUIRE(in.dtype == DType::f32 || in.dtype == DType::f16 || in.dtype == DType::bf16,
          "transpose of " + in.shape());
  if (in.empty()) return;
  require_cuda("transpose", {in, out});
  transpose_batched({.in = in.data,
                     .in_stride = in.stride,
                     .out = out.data,
                     .out_stride = out.stride,
                     .rows = in.rows,
                     .cols = in.cols,
                     .bytes = dtype_bytes(in.dtype)},
                    stream_);
}

void CudaOps::decode_midrise(View codes, int bits, View scales, View out) {
  REQUIRE(bits >= 1 && bits <= 8 && codes.rows == out.rows && codes.cols == out.cols,
          "decode_midrise: from " + codes.shape() + " to " + out.shape());
  require_scales("decode_midrise", scales, out.rows);
  require_cuda("decode_midrise", {codes, scales, out});
  launch("decode_midrise", midrise_kernel, flat_grid(out.rows, out.cols), dim3(flat_threads), 0,
         stream_, codes.as<std::uint8_t>(), codes.stride, scales.as<float>(), scale_stride(scales),
         static_cast<float>((1 << bits) - 1) * 0.5F, out.as<float>(), out.stride, out.rows,
         out.cols);
}

void CudaOps::decode_lattice(View codes, LatticeBook book, View scales, bool accumulate, View out) {
  const bool e8p = book == LatticeBook::e8p;
  REQUIRE(codes.dtype == (e8p ? DType::i16 : DType::u8) && codes.rows == out.rows &&
              codes.cols * lattice_columns == out.cols,
          "decode_lattice: from " + codes.shape() + " to " + out.shape());
  require_scales("decode_lattice", scales, out.rows);
  require_cuda("decode_lattice", {codes, scales, out});
  const LatticeTable table = lattice_table(book);
  const bool aligned = aligned_rows(out, 16, 8);
  const auto run = [&](auto* kernel, const auto* data) {
    launch("decode_lattice", kernel, flat_grid(out.rows, codes.cols), dim3(flat_threads), 0,
           stream_, data, codes.stride, table, scales.as<float>(), scale_stride(scales), accumulate,
           out.as<float>(), out.stride, out.rows, codes.cols, aligned);
  };
  if (e8p) {
    run(lattice_kernel<std::uint16_t>, static_cast<const std::uint16_t*>(codes.data));
  } else {
    run(lattice_kernel<std::uint8_t>, codes.as<std::uint8_t>());
  }
}

void CudaOps::place_columns(View x, View perm, View diagonal, View out) {
  REQUIRE(x.dtype == DType::f32 && x.rows == out.rows && x.cols == out.cols && x.data != out.data &&
              is_float(out.dtype) && out.dtype != DType::f64,
          "place_columns: from " + x.shape() + " to " + out.shape());
  require_cuda("place_columns", {x, out});
  if (!perm.empty()) {
    REQUIRE(perm.rows == 1 && perm.cols == x.cols, "place_columns: perm is " + perm.shape());
    require_cuda("place_columns", {perm});
  }
  if (!diagonal.empty()) {
    REQUIRE(diagonal.rows == 1 && diagonal.cols == x.cols,
            "place_columns: the diagonal is " + diagonal.shape());
    require_cuda("place_columns", {diagonal});
  }
  launch("place_columns", place_kernel, flat_grid(x.rows, x.cols), dim3(flat_threads), 0, stream_,
         x.as<float>(), x.stride, perm.empty() ? nullptr : perm.as<std::int32_t>(),
         diagonal.empty() ? nullptr : diagonal.as<float>(), out.data, out.dtype, out.stride, x.rows,
         x.cols);
  seal(stream_);
}

}  // namespace engine
