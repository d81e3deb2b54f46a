// CudaOps: PB-LLM's compact codes (docs/methods/pbllm.md), there and back. Where a code lies
// follows from the number of salient weights before it: counted per tile or row, summed up by one
// block, and counted again inside.
#include <string>

#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int threads = 256;
constexpr int scan_threads = 1024;
constexpr int share = 16;  // neighbours of a tile per thread
constexpr int tile = threads * share;
constexpr int byte_codes = 8;  // columns per thread in the decoder: a byte of the bitmap

// The sum of v over the threads before this one; `total` over all. `scratch` is shared memory for
// 32 values. Ends with a barrier.
template <class T>
__device__ T block_before(T v, T* scratch, T& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  T sum = v;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(0xffffffffU, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int i = 0; i < warps; ++i) {
    if (i < warp) before += scratch[i];
    total += scratch[i];
  }
  __syncthreads();
  return before + sum - v;
}

// counts[i] = the sum of those before i, in place; `total` (or null) gets the sum of all. One
// block.
__global__ void __launch_bounds__(scan_threads)
    scan_kernel(std::int64_t* counts, std::int64_t n, std::int32_t* total) {
  __shared__ std::int64_t scratch[32];
  const std::int64_t piece = ceil_div(n, scan_threads);
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * piece;
  const std::int64_t last = min(first + piece, n);
  std::int64_t sum = 0;
  for (std::int64_t i = first; i < last; ++i) sum += counts[i];
  std::int64_t all = 0;
  std::int64_t before = block_before(sum, scratch, all);
  for (std::int64_t i = first; i < last; ++i) {
    const std::int64_t count = counts[i];
    counts[i] = before;
    before += count;
  }
  if (threadIdx.x == 0 && total != nullptr) *total = static_cast<std::int32_t>(all);
}

// A u8 matrix read in row-major order.
struct Bytes {
  const std::uint8_t* data;
  std::int64_t stride;
  std::int64_t cols;
  bool flat;  // without gaps, at a multiple of 16 bytes

  // Elements [first, first + n) into `to`, n <= share; zeros behind them.
  __device__ void read(std::int64_t first, int n, std::uint8_t (&to)[share]) const {
    if (flat && n == share) {
      const uint4 words = *reinterpret_cast<const uint4*>(data + first);
      const std::uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < share; ++i) {
        to[i] = static_cast<std::uint8_t>(four[i / 4] >> (8 * (i % 4)));
      }
      return;
    }
    std::int64_t row = first / cols;
    std::int64_t col = first % cols;
#pragma unroll
    for (int i = 0; i < share; ++i) {
      to[i] = i < n ? data[row * stride + col] : std::uint8_t{0};
      if (++col == cols) {
        col = 0;
        ++row;
      }
    }
  }
};

// How many of a thread's elements of the block's tile there are.
__device__ inline int tile_items(std::int64_t first, std::int64_t n) {
  return static_cast<int>(max(min(n - first, std::int64_t{share}), std::int64_t{0}));
}

// ones[t] = ones of the mask in tile t. Bound by memory.
__global__ void __launch_bounds__(threads)
    count_tiles_kernel(const Bytes mask, std::int64_t n, std::int64_t* ones) {
  __shared__ int scratch[32];
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * tile + static_cast<int>(threadIdx.x) * share;
  std::uint8_t flags[share];
  mask.read(first, tile_items(first, n), flags);
  int count = 0;
#pragma unroll
  for (int i = 0; i < share; ++i) count += flags[i] != 0 ? 1 : 0;
  count = block_reduce(count, SumOp{}, 0, scratch);
  if (threadIdx.x == 0) ones[blockIdx.x] = count;
}

// The codes of one tile, sorted by the mask in shared memory and then written side by side.
__global__ void __launch_bounds__(threads)
    split_kernel(const Bytes mask, const Bytes codes, std::int64_t n, const std::int64_t* before,
                 const std::int32_t* all_ones, std::uint8_t* out) {
  __shared__ int scratch[32];
  __shared__ std::uint8_t sorted[tile];
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * tile;
  const int place = static_cast<int>(threadIdx.x) * share;
  const int items = tile_items(start + place, n);
  std::uint8_t flags[share];
  std::uint8_t values[share];
  mask.read(start + place, items, flags);
  codes.read(start + place, items, values);
  int count = 0;
#pragma unroll
  for (int i = 0; i < share; ++i) count += flags[i] != 0 ? 1 : 0;
  int ones = 0;
  int rank = block_before(count, scratch, ones);
  const auto size = static_cast<int>(min(n - start, std::int64_t{tile}));
  const int zeros = size - ones;
#pragma unroll
  for (int i = 0; i < share; ++i) {
    if (i >= items) break;
    const bool one = flags[i] != 0;
    sorted[one ? zeros + rank : place + i - rank] = values[i];
    rank += one ? 1 : 0;
  }
  __syncthreads();
  const std::int64_t ones_before = before[blockIdx.x];
  std::uint8_t* low = out + start - ones_before;
  std::uint8_t* high = out + n - *all_ones + ones_before - zeros;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += threads) {
    (i < zeros ? low : high)[i] = sorted[i];
  }
}

// ones[r] = ones of row r of the bitmap, a warp per row.
__global__ void __launch_bounds__(threads)
    count_rows_kernel(const std::uint8_t* bitmap, std::int64_t stride, std::int64_t rows,
                      std::int64_t row_bytes, std::int64_t* ones) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (threads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= rows) return;
  int count = 0;
  for (std::int64_t i = threadIdx.x % 32; i < row_bytes; i += 32) {
    count += __popc(bitmap[row * stride + i]);
  }
  count = warp_reduce(count, SumOp{});
  if (threadIdx.x % 32 == 0) ones[row] = count;
}

// `bits` bits (1 to 8) from bit `at` on. Reads no byte behind the last of them.
__device__ inline std::uint32_t read_bits(const std::uint8_t* bytes, std::int64_t at, int bits) {
  const auto shift = static_cast<int>(at % 8);
  std::uint32_t window = bytes[at / 8];
  if (shift + bits > 8) window |= static_cast<std::uint32_t>(bytes[at / 8 + 1]) << 8;
  return (window >> shift) & ((1U << bits) - 1U);
}

struct Decode {
  const std::uint8_t* bitmap;
  std::int64_t bitmap_stride;
  const std::uint8_t* signs;
  const std::uint8_t* high;
  int high_bits;
  const float* means;  // or null
  std::int64_t mean_stride;
  const float* scales;
  std::int64_t scale_stride;
  const float* high_scales;
  std::int64_t high_scale_stride;
  const std::int32_t* high_zeros;
  std::int64_t high_zero_stride;
  const std::int64_t* before;  // salient weights before each row
  std::int64_t cols;
  std::int64_t group;
};

// One row per block; a thread takes 8 columns, one byte of the bitmap, at a time. kWide: rows of
// out take packs of 8. Bound by the stores.
template <class T, bool kWide>
__global__ void __launch_bounds__(threads)
    decode_kernel(const Decode p, T* out, std::int64_t out_stride) {
  __shared__ int scratch[32];
  const std::int64_t row = blockIdx.x;
  const std::uint8_t* bitmap = p.bitmap + row * p.bitmap_stride;
  const float high_scale = p.high_scales[row * p.high_scale_stride];
  const std::int32_t high_zero = p.high_zeros[row * p.high_zero_stride];
  const float* scales = p.scales + row * p.scale_stride;
  const float* means = p.means == nullptr ? nullptr : p.means + row * p.mean_stride;
  std::int64_t before = p.before[row];  // salient weights before this pass over the row
  for (std::int64_t start = 0; start < p.cols; start += threads * byte_codes) {
    const std::int64_t col = start + static_cast<int>(threadIdx.x) * byte_codes;
    const auto n =
        static_cast<int>(max(min(p.cols - col, std::int64_t{byte_codes}), std::int64_t{0}));
    const std::uint32_t flags = n > 0 ? bitmap[col / byte_codes] : 0U;
    const int ones = __popc(flags);
    int all = 0;
    std::int64_t rank = before + block_before(ones, scratch, all);
    before += all;
    if (n == 0) continue;  // the barriers of the next pass still meet: every thread gets there
    std::uint32_t signs = n > ones ? read_bits(p.signs, row * p.cols + col - rank, n - ones) : 0U;
    std::int64_t unit = col / p.group;
    std::int64_t next = (unit + 1) * p.group;
    float scale = scales[unit];
    float mean = means != nullptr ? means[unit] : 0.0F;
    Pack<T, byte_codes> values;
#pragma unroll
    for (int e = 0; e < byte_codes; ++e) {
      if (e >= n) break;
      if (col + e == next) {
        ++unit;
        next += p.group;
        scale = scales[unit];
        if (means != nullptr) mean = means[unit];
      }
      float v = 0.0F;
      if ((flags >> e & 1U) != 0) {
        const std::int64_t code = read_bits(p.high, rank * p.high_bits, p.high_bits);
        ++rank;
        v = __fmul_rn(high_scale, static_cast<float>(code - high_zero));
      } else {
        v = (signs & 1U) != 0 ? scale : -scale;
        if (means != nullptr) v = __fadd_rn(mean, v);
        signs >>= 1;
      }
      if constexpr (kWide) {
        values.v[e] = from_f32<T>(v);
      } else {
        out[row * out_stride + col + e] = from_f32<T>(v);
      }
    }
    if constexpr (kWide) {
      *reinterpret_cast<Pack<T, byte_codes>*>(out + row * out_stride + col) = values;
    }
  }
}

Bytes bytes_of(const View& v) {
  const bool flat = v.contiguous() && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
  return {v.as<std::uint8_t>(), v.stride, v.cols, flat};
}

void require_shape(const char* what, const View& v, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(what) + " expected " + dtype_name(dtype) + " [" + std::to_string(rows) +
              ", " + std::to_string(cols) + "], found " + v.shape());
  require_cuda(what, {v});
}

}  // namespace

std::int64_t CudaOps::pbllm_split_bytes(std::int64_t rows, std::int64_t d) {
  return ceil_div(rows * d, tile) * 8;
}

void CudaOps::pbllm_split(View mask, View codes, View out, View ones, View workspace) {
  const std::int64_t rows = mask.rows, d = mask.cols, n = rows * d;
  REQUIRE(n > 0 && n < (std::int64_t{1} << 31), "pbllm_split: mask " + mask.shape());
  require_shape("pbllm_split: mask", mask, DType::u8, rows, d);
  require_shape("pbllm_split: codes", codes, DType::u8, rows, d);
  require_shape("pbllm_split: out", out, DType::u8, 1, n);
  require_shape("pbllm_split: ones", ones, DType::i32, 1, 1);
  require_cuda("pbllm_split", {workspace});
  REQUIRE(workspace.contiguous() && workspace.bytes() >= pbllm_split_bytes(rows, d),
          "pbllm_split: workspace " + workspace.shape());
  const dim3 grid(static_cast<unsigned>(ceil_div(n, tile)));
  auto* before = reinterpret_cast<std::int64_t*>(workspace.as<std::uint8_t>());
  launch("pbllm_split (count)", count_tiles_kernel, grid, dim3(threads), 0, stream_, bytes_of(mask),
         n, before);
  launch("pbllm_split (scan)", scan_kernel, dim3(1), dim3(scan_threads), 0, stream_, before,
         ceil_div(n, tile), ones.as<std::int32_t>());
  launch("pbllm_split", split_kernel, grid, dim3(threads), 0, stream_, bytes_of(mask),
         bytes_of(codes), n, before, ones.as<std::int32_t>(), out.as<std::uint8_t>());
}

void CudaOps::pbllm_decode(const PbllmDecode& p) {
  const std::int64_t rows = p.out.rows, d = p.out.cols, groups = p.scales.cols;
  REQUIRE(rows > 0 && d > 0 && rows < (std::int64_t{1} << 31),
          "pbllm_decode: out " + p.out.shape());
  REQUIRE(p.high_bits >= 1 && p.high_bits <= 8,
          "pbllm_decode: " + std::to_string(p.high_bits) + " bits");
  REQUIRE(groups > 0 && d % groups == 0, "pbllm_decode: scales " + p.scales.shape());
  require_shape("pbllm_decode: bitmap", p.bitmap, DType::u8, rows, ceil_div(d, 8));
  require_shape("pbllm_decode: signs", p.signs, DType::u8, 1, p.signs.cols);
  require_shape("pbllm_decode: high", p.high, DType::u8, 1, p.high.cols);
  if (!p.means.empty()) require_shape("pbllm_decode: means", p.means, DType::f32, rows, groups);
  require_shape("pbllm_decode: scales", p.scales, DType::f32, rows, groups);
  require_shape("pbllm_decode: salient scales", p.high_scales, DType::f32, rows, 1);
  require_shape("pbllm_decode: salient zeros", p.high_zeros, DType::i32, rows, 1);
  require_cuda("pbllm_decode", {p.out, p.workspace});
  REQUIRE(p.workspace.contiguous() && p.workspace.bytes() >= pbllm_decode_bytes(rows),
          "pbllm_decode: workspace " + p.workspace.shape());
  auto* before = reinterpret_cast<std::int64_t*>(p.workspace.as<std::uint8_t>());
  const Decode decode{p.bitmap.as<std::uint8_t>(),
                      p.bitmap.stride,
                      p.signs.as<std::uint8_t>(),
                      p.high.as<std::uint8_t>(),
                      p.high_bits,
                      p.means.empty() ? nullptr : p.means.as<float>(),
                      p.means.stride,
                      p.scales.as<float>(),
                      p.scales.stride,
                      p.high_scales.as<float>(),
                      p.high_scales.stride,
                      p.high_zeros.as<std::int32_t>(),
                      p.high_zeros.stride,
                      before,
                      d,
                      d / groups};
  launch("pbllm_decode (count)", count_rows_kernel,
         dim3(static_cast<unsigned>(ceil_div(rows, threads / 32))), dim3(threads), 0, stream_,
         decode.bitmap, decode.bitmap_stride, rows, p.bitmap.cols, before);
  launch("pbllm_decode (scan)", scan_kernel, dim3(1), dim3(scan_threads), 0, stream_, before, rows,
         nullptr);
  dispatch_float(p.out.dtype, "pbllm_decode", [&](auto type) {
    using T = decltype(type);
    const bool wide =
        aligned_rows(p.out, static_cast<std::int64_t>(alignof(Pack<T, byte_codes>)), byte_codes);
    launch("pbllm_decode", wide ? decode_kernel<T, true> : decode_kernel<T, false>,
           dim3(static_cast<unsigned>(rows)), dim3(threads), 0, stream_, decode,
           static_cast<T*>(p.out.data), p.out.stride);
  });
  seal(stream_);
}

}  // namespace engine
