// Rotary embedding of one step, and tokens into and out of the key-value cache.
#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/kv.cuh"
#include "engine/ops/step_check.h"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / 32;

// Launch: grid (ceil(packs / 128), rows); a thread turns N neighbouring pairs of one row. x is
// aligned for packs of N, half is a multiple of N. A position beyond the tables changes nothing.
template <class T, int N>
__global__ void __launch_bounds__(threads)
    rope_step_kernel(T* x, std::int64_t stride, int packs, int half, const float* cos_table,
                     std::int64_t cos_stride, const float* sin_table, std::int64_t sin_stride,
                     std::int64_t positions, const std::int32_t* position) {
  using P = Pack<T, N>;
  const int i = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  const int per_head = half / N;
  const int j = i % per_head * N;
  T* low_at = x + static_cast<std::int64_t>(blockIdx.y) * stride +
              static_cast<std::int64_t>(i / per_head) * 2 * half + j;
  chain_trigger();
  chain_wait();
  const std::int64_t at = *position;
  if (i >= packs || at < 0 || at >= positions) return;
  P low = *reinterpret_cast<const P*>(low_at);
  P high = *reinterpret_cast<const P*>(low_at + half);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    rotate(low.v[e], high.v[e], cos_table[at * cos_stride + j + e],
           sin_table[at * sin_stride + j + e]);
  }
  *reinterpret_cast<P*>(low_at) = low;
  *reinterpret_cast<P*>(low_at + half) = high;
}

template <class T, class E>
struct AppendArgs {
  const T* k;
  const T* v;
  CacheHalf<E> k_cache, v_cache;
  std::int64_t k_stride, v_stride;
  std::int64_t capacity, first, len, start;
  const std::int32_t* position;  // null: tokens from `start`; else `start` is not used
  int heads, head_dim;
};

// Launch: grid (rows, ceil(2 heads / 4)); a warp takes one head of the keys or of the values of one
// row. Row r is token start + r % len of sequence first + r / len.
template <class T, class E>
__global__ void __launch_bounds__(threads) kv_append_kernel(AppendArgs<T, E> args) {
  chain_trigger();
  chain_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int item = static_cast<int>(blockIdx.y) * warps + static_cast<int>(threadIdx.x) / 32;
  if (item >= 2 * args.heads) return;
  const std::int64_t row = blockIdx.x;
  const std::int64_t start = args.position == nullptr ? args.start : *args.position;
  const std::int64_t token = start + row % args.len;
  if (token < 0 || token >= args.capacity) return;
  const std::int64_t at = (args.first + row / args.len) * args.capacity + token;
  const bool keys = item < args.heads;
  const int head = keys ? item : item - args.heads;
  const T* from = (keys ? args.k + row * args.k_stride : args.v + row * args.v_stride) +
                  static_cast<std::int64_t>(head) * args.head_dim;
  append_head<T, E>(from, args.head_dim, keys ? args.k_cache : args.v_cache, at, head, lane);
}

// Grid over packs of N codes and rows. N divides head_dim; both matrices are aligned for packs.
template <class T, int N>
__global__ void __launch_bounds__(threads)
    kv_decode_kernel(const std::uint8_t* codes, std::int64_t stride, const float* scale,
                     std::int64_t scale_stride, int head_dim, std::int64_t rows, std::int64_t packs,
                     T* out, std::int64_t out_stride) {
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t i = std::int64_t{blockIdx.x} * threads + threadIdx.x; i < packs;
         i += std::int64_t{gridDim.x} * threads) {
      const auto in = *reinterpret_cast<const Pack<std::uint8_t, N>*>(codes + r * stride + i * N);
      const float s = scale[r * scale_stride + i * N / head_dim];
      Pack<T, N> values;
#pragma unroll
      for (int e = 0; e < N; ++e) values.v[e] = from_f32<T>(code_value<T>(in.v[e], s));
      *reinterpret_cast<Pack<T, N>*>(out + r * out_stride + i * N) = values;
    }
  }
}

template <class E>
CacheHalf<E> half_of(const View& data, const View& scale) {
  return {static_cast<E*>(data.data), static_cast<float*>(scale.data), data.stride, scale.stride};
}

template <class T, class E>
void launch_append(View k, View v, std::int64_t head_dim, const KvCache& cache, std::int64_t first,
                   std::int64_t n, std::int64_t start, View position, cudaStream_t stream) {
  const auto heads = static_cast<int>(k.cols / head_dim);
  const std::int64_t groups = ceil_div(2 * std::int64_t{heads}, warps);
  REQUIRE(k.rows <= 0x7fffffff && groups <= 65535, "kv_append of too large " + k.shape());
  const AppendArgs<T, E> args{static_cast<const T*>(k.data),
                              static_cast<const T*>(v.data),
                              half_of<E>(cache.k, cache.k_scale),
                              half_of<E>(cache.v, cache.v_scale),
                              k.stride,
                              v.stride,
                              cache.capacity,
                              first,
                              k.rows / n,
                              start,
                              static_cast<const std::int32_t*>(position.data),
                              heads,
                              static_cast<int>(head_dim)};
  const dim3 grid(static_cast<unsigned>(k.rows), static_cast<unsigned>(groups));
  if (position.empty()) {
    launch("kv_append", kv_append_kernel<T, E>, grid, threads, 0, stream, args);
  } else {
    launch_chained("kv_append_step", kv_append_kernel<T, E>, grid, threads, 0, stream, args);
  }
}

void append(const char* op, View k, View v, std::int64_t head_dim, const KvCache& cache,
            std::int64_t first, std::int64_t n, std::int64_t start, View position,
            cudaStream_t stream) {
  require_cuda(op, {k, v, cache.k, cache.v});
  if (cache.quantized()) require_cuda(op, {cache.k_scale, cache.v_scale});
  dispatch_float(k.dtype, op, [&](auto tag) {
    using T = decltype(tag);
    if (cache.quantized()) {
      launch_append<T, std::uint8_t>(k, v, head_dim, cache, first, n, start, position, stream);
    } else {
      launch_append<T, T>(k, v, head_dim, cache, first, n, start, position, stream);
    }
  });
}

void decode(View codes, View scale, std::int64_t head_dim, View out, cudaStream_t stream) {
  dispatch_float(out.dtype, "kv_read", [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide = head_dim % n == 0 && aligned_rows(codes, n, n) && aligned_rows(out, 16, n);
    const std::int64_t packs = wide ? out.cols / n : out.cols;
    launch("kv_read", wide ? kv_decode_kernel<T, n> : kv_decode_kernel<T, 1>,
           grid_2d(out.rows, packs, threads), threads, 0, stream, codes.as<std::uint8_t>(),
           codes.stride, scale.as<float>(), scale.stride, static_cast<int>(head_dim), out.rows,
           packs, static_cast<T*>(out.data), out.stride);
  });
}

}  // namespace

void CudaOps::rope_step(View x, std::int64_t head_dim, View cos, View sin, View position) {
  check_rope_step(x, head_dim, cos, sin, position);
  if (x.empty()) return;
  require_cuda("rope_step", {x, cos, sin, position});
  REQUIRE(x.rows <= 65535 && x.cols <= 0x7fffffff, "rope_step of too large " + x.shape());
  dispatch_float(x.dtype, "rope_step", [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide = aligned_rows(x, 16, n) && head_dim / 2 % n == 0;
    const std::int64_t packs = x.cols / 2 / (wide ? n : 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(packs, threads)), static_cast<unsigned>(x.rows));
    launch_chained("rope_step", wide ? rope_step_kernel<T, n> : rope_step_kernel<T, 1>, grid,
                   threads, 0, stream_, static_cast<T*>(x.data), x.stride, static_cast<int>(packs),
                   static_cast<int>(head_dim / 2), cos.as<float>(), cos.stride, sin.as<float>(),
                   sin.stride, cos.rows, position.as<std::int32_t>());
  });
}

void CudaOps::kv_append_step(View k, View v, std::int64_t head_dim, const KvCache& cache,
                             View position) {
  check_append("kv_append_step", k, v, cache.batch, head_dim, cache);
  check_scalar("kv_append_step", position);
  require_cuda("kv_append_step", {position});
  append("kv_append_step", k, v, head_dim, cache, 0, cache.batch, 0, position, stream_);
}

void CudaOps::kv_append(View k, View v, std::int64_t head_dim, const KvCache& cache,
                        std::int64_t first, std::int64_t n, std::int64_t start) {
  check_append("kv_append", k, v, k.rows, head_dim, cache);
  check_append_range(k, cache, first, n, start);
  if (k.empty()) return;
  append("kv_append", k, v, head_dim, cache, first, n, start, {}, stream_);
}

void CudaOps::kv_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k,
                      View v) {
  check_read(cache, head_dim, sequence, k, v);
  if (k.empty()) return;
  const std::int64_t first = sequence * cache.capacity;
  if (!cache.quantized()) {
    copy(cache.k.row_range(first, k.rows), k);
    copy(cache.v.row_range(first, v.rows), v);
    return;
  }
  require_cuda("kv_read", {k, v, cache.k, cache.v, cache.k_scale, cache.v_scale});
  decode(cache.k.row_range(first, k.rows), cache.k_scale.row_range(first, k.rows), head_dim, k,
         stream_);
  decode(cache.v.row_range(first, v.rows), cache.v_scale.row_range(first, v.rows), head_dim, v,
         stream_);
}

}  // namespace engine
