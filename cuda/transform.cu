// CudaOps: transform_rows, and its butterflies. They go through two buffers of f32, some rows at a
// time, so that what one step leaves is still in the L2 cache when the next one reads it.
#include <algorithm>

#include "cuda/any_float.cuh"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/transform.h"
#include "engine/ops/transform_view.h"

namespace engine {
namespace {

constexpr std::int64_t buffer_bytes = std::int64_t{24} << 20;  // of each of the two
constexpr int permute_threads = 512;
constexpr int tile_rows = 128, tile_cols = 64, tile_depth = 16;
constexpr int product_threads = 128;  // each 8 x 8 of a tile
constexpr int pad = 4;

// out[r, k] = in[r, perm[k]], or with `scatter` out[r, perm[k]] = in[r, k]; perm null: the
// identity. One block per row, which lies in shared memory in between if it fits (`staged`), so
// that what the permutation scatters is not global memory. Bound by memory.
__global__ void __launch_bounds__(permute_threads)
    permute_kernel(const void* in, DType in_dtype, std::int64_t in_stride, const std::int32_t* perm,
                   bool scatter, bool staged, void* out, DType out_dtype, std::int64_t out_stride,
                   std::int64_t d) {
  extern __shared__ float staged_row[];
  const std::int64_t from = blockIdx.x * in_stride, to = blockIdx.x * out_stride;
  if (perm == nullptr) {
    for (std::int64_t k = threadIdx.x; k < d; k += permute_threads) {
      store_any(out, out_dtype, to + k, load_any(in, in_dtype, from + k));
    }
    return;
  }
  if (!staged) {
    for (std::int64_t k = threadIdx.x; k < d; k += permute_threads) {
      const std::int64_t p = perm[k];
      store_any(out, out_dtype, to + (scatter ? p : k),
                load_any(in, in_dtype, from + (scatter ? k : p)));
    }
    return;
  }
  for (std::int64_t k = threadIdx.x; k < d; k += permute_threads) {
    staged_row[scatter ? perm[k] : k] = load_any(in, in_dtype, from + k);
  }
  __syncthreads();
  for (std::int64_t k = threadIdx.x; k < d; k += permute_threads) {
    store_any(out, out_dtype, to + k, staged_row[scatter ? k : perm[k]]);
  }
}

template <class M, bool kVector>
__device__ void load_4(const M* from, std::int64_t first, int limit, float (&v)[4]) {
  // Elements first .. first + 3 of a run whose first `limit` count; the others are 0.
  if constexpr (kVector) {
    if (limit <= 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = 0.0F;
      return;
    }
    if constexpr (sizeof(M) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + first);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const auto four = *reinterpret_cast<const Pack<M, 4>*>(from + first);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = to_f32(four.v[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = e < limit ? to_f32(from[first + e]) : 0.0F;
  }
}

// Where a thread's next piece of both operands waits before it goes to shared memory.
template <class M, bool kTransposed, bool kVector>
struct Fragments {
  float x[4][4];
  float m[2][4];

  // x: rows row0 .. of [rows, p] at stride `stride`; matrix [p, p].
  __device__ void load(const float* from, std::int64_t stride, std::int64_t rows_left,
                       const M* matrix, int col0, int p, int k0) {
    const int t = static_cast<int>(threadIdx.x);
    const int k = k0 + 4 * (t % 4);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int row = t / 4 + 32 * u;
      load_4<float, kVector>(from, row * stride + k, row < rows_left ? p - k : 0, x[u]);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if constexpr (kTransposed) {
        const int depth = k0 + t / 16 + 8 * u, col = col0 + 4 * (t % 16);
        load_4<M, kVector>(matrix, static_cast<std::int64_t>(depth) * p + col,
                           depth < p ? p - col : 0, m[u]);
      } else {
        const int col = col0 + t / 4 + 32 * u;
        load_4<M, kVector>(matrix, static_cast<std::int64_t>(col) * p + k, col < p ? p - k : 0,
                           m[u]);
      }
    }
  }

  __device__ void store(float (*xs)[tile_rows + pad], float (*ms)[tile_cols + pad]) const {
    const int t = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) xs[4 * (t % 4) + e][t / 4 + 32 * u] = x[u][e];
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if constexpr (kTransposed) {
        *reinterpret_cast<float4*>(&ms[t / 16 + 8 * u][4 * (t % 16)]) =
            make_float4(m[u][0], m[u][1], m[u][2], m[u][3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) ms[4 * (t % 4) + e][t / 4 + 32 * u] = m[u][e];
      }
    }
  }
};

// out[r, b p + i] = sum over k of M_b(i, k) x[r, b p + k] (kTransposed: M_b(k, i)), k ascending;
// x, out f32 [rows, d], b = blockIdx.z. 128 threads make 128 x 64 of a product with 8 x 8 each,
// pieces of 16 of the sum in two buffers. Bound by the f32 units: 64 fused multiply-adds per 4
// loads of 16 bytes from shared memory.
template <class M, bool kTransposed, bool kVector>
__global__ void __launch_bounds__(product_threads, 3)
    batched_product_kernel(const float* x, std::int64_t d, std::int64_t rows, const M* matrices,
                           std::int64_t matrix_stride, int p, float* out) {
  __shared__ __align__(16) float xs[2][tile_depth][tile_rows + pad];
  __shared__ __align__(16) float ms[2][tile_depth][tile_cols + pad];
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.x) * tile_rows;
  const int col0 = static_cast<int>(blockIdx.y) * tile_cols;
  const std::int64_t batch = blockIdx.z;
  x += row0 * d + batch * p;
  const M* matrix = matrices + batch * matrix_stride;
  const int thread_row = 4 * (static_cast<int>(threadIdx.x) / 8);
  const int thread_col = 4 * (static_cast<int>(threadIdx.x) % 8);

  float sum[8][8] = {};
  Fragments<M, kTransposed, kVector> next;
  next.load(x, d, rows - row0, matrix, col0, p, 0);
  next.store(xs[0], ms[0]);
  __syncthreads();
  int buffer = 0;
  for (int k0 = 0; k0 < p; k0 += tile_depth, buffer ^= 1) {
    const bool more = k0 + tile_depth < p;
    if (more) next.load(x, d, rows - row0, matrix, col0, p, k0 + tile_depth);
#pragma unroll
    for (int k = 0; k < tile_depth; ++k) {
      float a[8], b[8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 va = *reinterpret_cast<const float4*>(&xs[buffer][k][64 * h + thread_row]);
        const float4 vb = *reinterpret_cast<const float4*>(&ms[buffer][k][32 * h + thread_col]);
        a[4 * h] = va.x, a[4 * h + 1] = va.y, a[4 * h + 2] = va.z, a[4 * h + 3] = va.w;
        b[4 * h] = vb.x, b[4 * h + 1] = vb.y, b[4 * h + 2] = vb.z, b[4 * h + 3] = vb.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
    if (more) next.store(xs[buffer ^ 1], ms[buffer ^ 1]);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::int64_t row = row0 + 64 * (i / 4) + thread_row + i % 4;
    if (row >= rows) continue;
    float* to = out + row * d + batch * p;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = col0 + 32 * h + thread_col;
      if constexpr (kVector) {
        if (col < p) {
          *reinterpret_cast<float4*>(to + col) =
              make_float4(sum[i][4 * h], sum[i][4 * h + 1], sum[i][4 * h + 2], sum[i][4 * h + 3]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (col + e < p) to[col + e] = sum[i][4 * h + e];
        }
      }
    }
  }
}

// One butterfly over some rows, which the two buffers hold.
struct ButterflyRun {
  const TransformView& q;
  bool inverse;
  std::size_t shared_limit;
  cudaStream_t stream;
  std::int64_t rows = 0;

  void permute(const View& in, const View& perm, const View& out) const {
    const std::size_t shared = static_cast<std::size_t>(q.d) * sizeof(float);
    const bool staged = !perm.empty() && shared <= shared_limit;
    launch("transform_rows", permute_kernel, dim3(static_cast<unsigned>(rows)),
           dim3(permute_threads), staged ? shared : 0, stream, in.data, in.dtype, in.stride,
           perm.empty() ? nullptr : perm.as<std::int32_t>(), inverse, staged, out.data, out.dtype,
           out.stride, q.d);
  }

  // Every row as [from_rows, d / from_rows], transposed.
  void transpose(const float* in, std::int64_t from_rows, float* out) const {
    const std::int64_t cols = q.d / from_rows;
    transpose_batched({.in = in,
                       .in_stride = cols,
                       .in_batch = q.d,
                       .out = out,
                       .out_stride = from_rows,
                       .out_batch = q.d,
                       .rows = from_rows,
                       .cols = cols,
                       .batch = rows,
                       .bytes = sizeof(float)},
                      stream);
  }

  template <class M, bool kTransposed, bool kVector>
  void product_as(const float* in, const View& matrices, std::int64_t p, float* out) const {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, tile_rows)),
                    static_cast<unsigned>(ceil_div(p, tile_cols)), static_cast<unsigned>(q.d / p));
    launch("transform_rows", batched_product_kernel<M, kTransposed, kVector>, grid,
           dim3(product_threads), 0, stream, in, q.d, rows, static_cast<const M*>(matrices.data),
           q.shared ? 0 : p * p, static_cast<int>(p), out);
  }

  template <class M>
  void product_of(const float* in, const View& matrices, std::int64_t p, float* out) const {
    const bool vector = p % 4 == 0 && reinterpret_cast<std::uintptr_t>(matrices.data) % 16 == 0;
    if (inverse) {
      vector ? product_as<M, true, true>(in, matrices, p, out)
             : product_as<M, true, false>(in, matrices, p, out);
    } else {
      vector ? product_as<M, false, true>(in, matrices, p, out)
             : product_as<M, false, false>(in, matrices, p, out);
    }
  }

  void product(const float* in, const View& matrices, std::int64_t p, float* out) const {
    if (matrices.dtype == DType::f16) {
      product_of<__half>(in, matrices, p, out);
    } else {
      product_of<float>(in, matrices, p, out);
    }
  }

  // x, out: `rows` rows; a, b: f32 [rows, d].
  void run(const View& x, const View& a_view, float* b, const View& out) const {
    float* a = a_view.as<float>();
    permute(x, inverse ? q.perm_out : q.perm_in, a_view);
    if (inverse) {
      product(a, q.second, q.p2, b);
      transpose(b, q.p1, a);
      product(a, q.first, q.p1, b);
      transpose(b, q.p2, a);
    } else {
      transpose(a, q.p1, b);
      product(b, q.first, q.p1, a);
      transpose(a, q.p2, b);
      product(b, q.second, q.p2, a);
    }
    permute(a_view, inverse ? q.perm_in : q.perm_out, out);
  }
};

}  // namespace

void CudaOps::transform_rows(View x, const TransformView& q, bool inverse, View out) {
  require_transform(x, q, out);
  if (x.empty()) return;
  require_cuda("transform_rows", {x, out});
  if (q.kind == TransformKind::none) {
    if (x.data != out.data) convert(x, out);
    return;
  }
  const std::size_t shared_limit = properties_.sharedMemPerBlockOptin;
  if (q.kind == TransformKind::hadamard) {
    return hadamard_rows(x, q, inverse, out, shared_limit, stream_);
  }
  require_cuda("transform_rows", {q.first, q.second});
  if (!q.perm_in.empty()) require_cuda("transform_rows", {q.perm_in, q.perm_out});
  const std::int64_t row_bytes = q.d * static_cast<std::int64_t>(sizeof(float));
  REQUIRE(row_bytes <= buffer_bytes && 2 * buffer_bytes <= lt_workspace_.view().bytes(),
          "transform_rows: no room for a row of " + std::to_string(q.d));
  std::int64_t chunk = std::min<std::int64_t>(buffer_bytes / row_bytes, 32768);
  if (chunk > tile_rows) chunk -= chunk % tile_rows;
  chunk = std::min(chunk, x.rows);
  auto* first_buffer = static_cast<float*>(lt_workspace_.view().data);
  const View a = make_view(first_buffer, DType::f32, DeviceKind::cuda, chunk, q.d);
  ButterflyRun run{q, inverse, shared_limit, stream_};
  for (std::int64_t row = 0; row < x.rows; row += chunk) {
    run.rows = std::min(chunk, x.rows - row);
    run.run(x.row_range(row, run.rows), a.row_range(0, run.rows),
            first_buffer + buffer_bytes / static_cast<std::int64_t>(sizeof(float)),
            out.row_range(row, run.rows));
  }
}

}  // namespace engine
