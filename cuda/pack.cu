// CudaOps: packing of codes and gathering of columns.
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int rows_per_thread = 8;

// Eight codes fill `kBits` whole bytes, whatever the width, so a thread converts eight neighbours
// and shares no byte with another. A row's tail counts as followed by zeros. kWide: codes rows
// start at multiples of 8 bytes; packed rows need no alignment unless kBits is 2, 4 or 8, where
// kWide also means that packed rows start at multiples of kBits.
template <int kBits, bool kWide>
__global__ void __launch_bounds__(threads)
    pack_kernel(const std::uint8_t* codes, std::int64_t code_stride, std::uint8_t* packed,
                std::int64_t packed_stride, std::int64_t rows, std::int64_t cols,
                std::int64_t row_bytes) {
  const std::int64_t t =
      static_cast<std::int64_t>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  const std::int64_t c = t * 8;
  if (c >= cols) return;
  const auto n = static_cast<int>(min(cols - c, std::int64_t{8}));
  const auto bytes = static_cast<int>(min(row_bytes - t * kBits, std::int64_t{kBits}));
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const std::uint8_t* from = codes + r * code_stride + c;
    std::uint8_t* to = packed + r * packed_stride + t * kBits;
    Pack<std::uint8_t, 8> in;
    if (kWide && n == 8) {
      in = *reinterpret_cast<const Pack<std::uint8_t, 8>*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) in.v[e] = e < n ? from[e] : std::uint8_t{0};
    }
    std::uint64_t word = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      constexpr std::uint64_t mask = (1U << kBits) - 1;
      word |= (in.v[e] & mask) << (e * kBits);
    }
    if (kWide && bytes == kBits && (kBits == 2 || kBits == 4 || kBits == 8)) {
      if constexpr (kBits == 2) {
        *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(word);
      } else if constexpr (kBits == 4) {
        *reinterpret_cast<std::uint32_t*>(to) = static_cast<std::uint32_t>(word);
      } else if constexpr (kBits == 8) {
        *reinterpret_cast<std::uint64_t*>(to) = word;
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBits; ++b) {
        if (b < bytes) to[b] = static_cast<std::uint8_t>(word >> (8 * b));
      }
    }
  }
}

// The way back; same geometry.
template <int kBits, bool kWide>
__global__ void __launch_bounds__(threads)
    unpack_kernel(const std::uint8_t* packed, std::int64_t packed_stride, std::uint8_t* codes,
                  std::int64_t code_stride, std::int64_t rows, std::int64_t cols,
                  std::int64_t row_bytes) {
  const std::int64_t t =
      static_cast<std::int64_t>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  const std::int64_t c = t * 8;
  if (c >= cols) return;
  const auto n = static_cast<int>(min(cols - c, std::int64_t{8}));
  const auto bytes = static_cast<int>(min(row_bytes - t * kBits, std::int64_t{kBits}));
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const std::uint8_t* from = packed + r * packed_stride + t * kBits;
    std::uint8_t* to = codes + r * code_stride + c;
    std::uint64_t word = 0;
    if (kWide && bytes == kBits && (kBits == 2 || kBits == 4 || kBits == 8)) {
      if constexpr (kBits == 2) {
        word = *reinterpret_cast<const std::uint16_t*>(from);
      } else if constexpr (kBits == 4) {
        word = *reinterpret_cast<const std::uint32_t*>(from);
      } else if constexpr (kBits == 8) {
        word = *reinterpret_cast<const std::uint64_t*>(from);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBits; ++b) {
        if (b < bytes) word |= static_cast<std::uint64_t>(from[b]) << (8 * b);
      }
    }
    Pack<std::uint8_t, 8> out;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      constexpr std::uint64_t mask = (1U << kBits) - 1;
      out.v[e] = static_cast<std::uint8_t>((word >> (e * kBits)) & mask);
    }
    if (kWide && n == 8) {
      *reinterpret_cast<Pack<std::uint8_t, 8>*>(to) = out;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < n) to[e] = out.v[e];
      }
    }
  }
}

__device__ inline void put(float& out, float v) { out = v; }
__device__ inline void put(float& out, __half v) { out = __half2float(v); }
__device__ inline void put(float& out, __nv_bfloat16 v) { out = __bfloat162float(v); }
__device__ inline void put(std::uint8_t& out, std::uint8_t v) { out = v; }

// out[r, c] = dead[c] ? 0 : in[r, perm[c]]: a thread owns a column and walks down rows. With a
// permutation the loads of a block scatter within one row of `in`, which the caches hold.
template <class In, class Out>
__global__ void __launch_bounds__(threads)
    gather_kernel(const In* in, std::int64_t in_stride, const std::int32_t* perm,
                  const std::uint8_t* dead, Out* out, std::int64_t out_stride, std::int64_t rows,
                  std::int64_t cols) {
  const std::int64_t c =
      static_cast<std::int64_t>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (c >= cols) return;
  const std::int64_t from = perm != nullptr ? perm[c] : c;
  const bool zero = dead != nullptr && dead[c] != 0;
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    Out v{};
    if (!zero) put(v, in[r * in_stride + from]);
    out[r * out_stride + c] = v;
  }
}

dim3 column_grid(std::int64_t rows, std::int64_t items) {
  return {static_cast<unsigned>(ceil_div(items, threads)),
          static_cast<unsigned>(std::min<std::int64_t>(ceil_div(rows, rows_per_thread), 65535)), 1};
}

// Calls body(std::integral_constant<int, bits>).
template <class Body>
void dispatch_bits(int bits, const char* op, Body&& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    case 6:
      return body(std::integral_constant<int, 6>{});
    case 7:
      return body(std::integral_constant<int, 7>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      REQUIRE(false, std::string(op) + " of " + std::to_string(bits) + " bits");
  }
}

std::int64_t checked_row_bytes(const char* op, const View& codes, int bits, const View& packed) {
  const std::int64_t row_bytes = ceil_div(codes.cols * bits, 8);
  REQUIRE(codes.dtype == DType::u8 && packed.dtype == DType::u8 && packed.rows == codes.rows &&
              packed.cols == row_bytes,
          std::string(op) + ": codes " + codes.shape() + " at " + std::to_string(bits) +
              " bits, packed " + packed.shape());
  if (!codes.empty()) require_cuda(op, {codes, packed});
  return row_bytes;
}

bool wide_rows(const View& codes, int bits, const View& packed) {
  const bool single_word = bits == 2 || bits == 4 || bits == 8;
  return aligned_rows(codes, 8, 1) && (!single_word || aligned_rows(packed, bits, 1));
}

}  // namespace

void CudaOps::pack_codes(View codes, int bits, View packed) {
  dispatch_bits(bits, "pack_codes", [&](auto width) {
    constexpr int kBits = decltype(width)::value;
    const std::int64_t row_bytes = checked_row_bytes("pack_codes", codes, bits, packed);
    if (codes.empty()) return;
    launch("pack_codes",
           wide_rows(codes, bits, packed) ? pack_kernel<kBits, true> : pack_kernel<kBits, false>,
           column_grid(codes.rows, ceil_div(codes.cols, 8)), dim3(threads), 0, stream_,
           codes.as<std::uint8_t>(), codes.stride, packed.as<std::uint8_t>(), packed.stride,
           codes.rows, codes.cols, row_bytes);
  });
}

void CudaOps::unpack_codes(View packed, int bits, View codes) {
  dispatch_bits(bits, "unpack_codes", [&](auto width) {
    constexpr int kBits = decltype(width)::value;
    const std::int64_t row_bytes = checked_row_bytes("unpack_codes", codes, bits, packed);
    if (codes.empty()) return;
    launch(
        "unpack_codes",
        wide_rows(codes, bits, packed) ? unpack_kernel<kBits, true> : unpack_kernel<kBits, false>,
        column_grid(codes.rows, ceil_div(codes.cols, 8)), dim3(threads), 0, stream_,
        packed.as<std::uint8_t>(), packed.stride, codes.as<std::uint8_t>(), codes.stride,
        codes.rows, codes.cols, row_bytes);
  });
}

void CudaOps::gather_columns(View in, View perm, View dead, View out) {
  REQUIRE(out.rows == in.rows && out.cols == in.cols &&
              out.dtype == (in.dtype == DType::u8 ? DType::u8 : DType::f32),
          "gather_columns: in " + in.shape() + ", out " + out.shape());
  REQUIRE(in.dtype != DType::u8 || dead.empty(), "gather_columns: codes have no dead columns");
  if (in.empty()) return;
  require_cuda("gather_columns", {in, out});
  REQUIRE(in.data != out.data, "gather_columns in place");
  const std::int32_t* order = nullptr;
  const std::uint8_t* zeroed = nullptr;
  if (!perm.empty()) {
    REQUIRE(perm.rows == 1 && perm.cols == in.cols, "gather_columns: perm " + perm.shape());
    require_cuda("gather_columns", {perm});
    order = perm.as<std::int32_t>();
  }
  if (!dead.empty()) {
    REQUIRE(dead.rows == 1 && dead.cols == in.cols, "gather_columns: dead " + dead.shape());
    require_cuda("gather_columns", {dead});
    zeroed = dead.as<std::uint8_t>();
  }
  const dim3 grid = column_grid(in.rows, in.cols);
  if (in.dtype == DType::u8) {
    launch("gather_columns", gather_kernel<std::uint8_t, std::uint8_t>, grid, dim3(threads), 0,
           stream_, in.as<std::uint8_t>(), in.stride, order, zeroed, out.as<std::uint8_t>(),
           out.stride, in.rows, in.cols);
    return;
  }
  dispatch_float(in.dtype, "gather_columns", [&](auto type) {
    using T = decltype(type);
    launch("gather_columns", gather_kernel<T, float>, grid, dim3(threads), 0, stream_,
           static_cast<const T*>(in.data), in.stride, order, zeroed, out.as<float>(), out.stride,
           in.rows, in.cols);
  });
}

}  // namespace engine
