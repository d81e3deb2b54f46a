#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "engine/core/rng.h"

namespace engine {
namespace {

constexpr int threads = 256;

// Elementwise kernels here share one geometry: grid_2d over (rows, packs of a row), 256 threads,
// a loop over what the grid does not cover. Cost: the bytes read and written, once each.
__device__ std::int64_t first_item() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t item_step() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

// Contiguous views become one long row, so that rows need not divide the grid evenly.
void flatten(std::initializer_list<View*> views) {
  for (const View* v : views) {
    if (!v->contiguous()) return;
  }
  for (View* v : views) *v = v->reshape(1, v->count());
}

// out[r, :] = table[ids[r], :]; `units` 16-, 4- or 2-byte units per row, strides in units.
template <class Unit>
__global__ void embed_kernel(const std::int32_t* ids, std::int64_t ids_stride, const Unit* table,
                             std::int64_t table_stride, Unit* out, std::int64_t out_stride,
                             std::int64_t rows, std::int64_t units) {
  chain_trigger();
  chain_wait();
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    const Unit* from = table + ids[r * ids_stride] * table_stride;
    Unit* to = out + r * out_stride;
    for (std::int64_t i = first_item(); i < units; i += item_step()) to[i] = from[i];
  }
}

// One block per row, 256 threads, N elements per access; the second reading of the row hits the
// cache. Each thread reads its elements again before it overwrites them, so out may be x.
template <class T, int N>
__global__ void __launch_bounds__(threads)
    rmsnorm_kernel(const T* x, std::int64_t x_stride, const T* weight, float eps, T* out,
                   std::int64_t out_stride, std::int64_t dim) {
  __shared__ float scratch[32];
  using P = Pack<T, N>;
  chain_trigger();
  chain_wait();
  const auto r = static_cast<std::int64_t>(blockIdx.x);
  const P* row = reinterpret_cast<const P*>(x + r * x_stride);
  const P* scale = reinterpret_cast<const P*>(weight);
  P* to = reinterpret_cast<P*>(out + r * out_stride);
  const std::int64_t packs = dim / N;
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < packs; i += threads) {
    const P p = row[i];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float v = to_f32(p.v[e]);
      sum += v * v;
    }
  }
  sum = block_reduce(sum, SumOp{}, 0.0F, scratch);
  const float inverse = 1.0F / sqrtf(sum / static_cast<float>(dim) + eps);
  for (std::int64_t i = threadIdx.x; i < packs; i += threads) {
    P p = row[i];
    const P w = scale[i];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      p.v[e] = from_f32<T>(round_through<T>(to_f32(p.v[e]) * inverse) * to_f32(w.v[e]));
    }
    to[i] = p;
  }
}

// out = round(silu(gate)) * up.
template <class T, int N>
__global__ void silu_mul_kernel(const T* gate, std::int64_t gate_stride, const T* up,
                                std::int64_t up_stride, T* out, std::int64_t out_stride,
                                std::int64_t rows, std::int64_t packs) {
  using P = Pack<T, N>;
  chain_trigger();
  chain_wait();
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t i = first_item(); i < packs; i += item_step()) {
      P g = reinterpret_cast<const P*>(gate + r * gate_stride)[i];
      const P u = reinterpret_cast<const P*>(up + r * up_stride)[i];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float v = to_f32(g.v[e]);
        g.v[e] = from_f32<T>(round_through<T>(v / (1.0F + expf(-v))) * to_f32(u.v[e]));
      }
      reinterpret_cast<P*>(out + r * out_stride)[i] = g;
    }
  }
}

template <class To, class From>
__device__ To converted(From v) {
  if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(v);  // from float only
  } else if constexpr (std::is_same_v<From, double>) {
    return from_f32<To>(__double2float_rn(v));
  } else {
    return from_f32<To>(to_f32(v));
  }
}

template <class From, class To, int N>
__global__ void convert_kernel(const From* in, std::int64_t in_stride, To* out,
                               std::int64_t out_stride, std::int64_t rows, std::int64_t packs) {
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t i = first_item(); i < packs; i += item_step()) {
      const auto p = reinterpret_cast<const Pack<From, N>*>(in + r * in_stride)[i];
      Pack<To, N> q;
#pragma unroll
      for (int e = 0; e < N; ++e) q.v[e] = converted<To>(p.v[e]);
      reinterpret_cast<Pack<To, N>*>(out + r * out_stride)[i] = q;
    }
  }
}

// Multiplication and addition are rounded apart (never fused), as on the host.
template <class T>
__global__ void fill_bell_kernel(T* out, std::int64_t out_stride, std::int64_t rows,
                                 std::int64_t cols, std::uint64_t seed, std::uint64_t stream,
                                 float scale, float shift) {
  for (std::int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (std::int64_t c = first_item(); c < cols; c += item_step()) {
      const float bell = bell_value(seed, stream, static_cast<std::uint64_t>(r * cols + c));
      out[r * out_stride + c] = from_f32<T>(__fadd_rn(__fmul_rn(bell, scale), shift));
    }
  }
}

template <class From, class To>
void launch_convert(const View& in, const View& out, cudaStream_t stream) {
  const auto bytes = [](std::size_t size) {
    return std::min<std::int64_t>(16, 4 * std::int64_t(size));
  };
  const bool wide =
      aligned_rows(in, bytes(sizeof(From)), 4) && aligned_rows(out, bytes(sizeof(To)), 4);
  const std::int64_t packs = wide ? in.cols / 4 : in.cols;
  launch("convert", wide ? convert_kernel<From, To, 4> : convert_kernel<From, To, 1>,
         grid_2d(in.rows, packs, threads), threads, 0, stream, static_cast<const From*>(in.data),
         in.stride, static_cast<To*>(out.data), out.stride, in.rows, packs);
}

}  // namespace

void CudaOps::embed(View ids, View table, View out) {
  REQUIRE(ids.dtype == DType::i32 && ids.cols == 1 && ids.rows == out.rows &&
              table.cols == out.cols && table.dtype == out.dtype,
          "embed of " + ids.shape() + " from " + table.shape() + " into " + out.shape());
  if (out.empty()) return;
  require_cuda("embed", {ids, table, out});
  const auto size = static_cast<std::int64_t>(dtype_bytes(out.dtype));
  const auto run = [&](auto unit) {
    using Unit = decltype(unit);
    const std::int64_t elements = static_cast<std::int64_t>(sizeof(Unit)) / size;
    const std::int64_t units = out.cols / elements;
    launch_chained("embed", embed_kernel<Unit>, grid_2d(out.rows, units, threads), threads, 0,
                   stream_, ids.as<std::int32_t>(), ids.stride,
                   static_cast<const Unit*>(table.data), table.stride / elements,
                   static_cast<Unit*>(out.data), out.stride / elements, out.rows, units);
  };
  if (aligned_rows(table, 16, 16 / size) && aligned_rows(out, 16, 16 / size)) {
    run(uint4{});
  } else if (size == 4) {
    run(std::uint32_t{});
  } else {
    REQUIRE(size == 2, "embed does not take " + out.shape());
    run(std::uint16_t{});
  }
}

void CudaOps::rmsnorm(View x, View weight, float eps, View out) {
  REQUIRE(x.rows == out.rows && x.cols == out.cols && weight.rows == 1 && weight.cols == x.cols &&
              x.dtype == out.dtype && x.dtype == weight.dtype,
          "rmsnorm of " + x.shape() + " by " + weight.shape() + " into " + out.shape());
  if (x.empty()) return;
  require_cuda("rmsnorm", {x, weight, out});
  REQUIRE(x.rows <= 0x7fffffff, "rmsnorm of too many rows: " + x.shape());
  dispatch_float(x.dtype, "rmsnorm", [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide =
        aligned_rows(x, 16, n) && aligned_rows(weight, 16, n) && aligned_rows(out, 16, n);
    launch_chained("rmsnorm", wide ? rmsnorm_kernel<T, n> : rmsnorm_kernel<T, 1>,
                   static_cast<unsigned>(x.rows), threads, 0, stream_,
                   static_cast<const T*>(x.data), x.stride, static_cast<const T*>(weight.data), eps,
                   static_cast<T*>(out.data), out.stride, x.cols);
  });
}

void CudaOps::silu_mul(View gate, View up, View out) {
  REQUIRE(gate.rows == up.rows && gate.cols == up.cols && gate.rows == out.rows &&
              gate.cols == out.cols && gate.dtype == up.dtype && gate.dtype == out.dtype,
          "silu_mul of " + gate.shape() + " and " + up.shape() + " into " + out.shape());
  if (out.empty()) return;
  require_cuda("silu_mul", {gate, up, out});
  flatten({&gate, &up, &out});
  dispatch_float(gate.dtype, "silu_mul", [&](auto tag) {
    using T = decltype(tag);
    constexpr int n = 16 / sizeof(T);
    const bool wide =
        aligned_rows(gate, 16, n) && aligned_rows(up, 16, n) && aligned_rows(out, 16, n);
    const std::int64_t packs = wide ? gate.cols / n : gate.cols;
    launch_chained("silu_mul", wide ? silu_mul_kernel<T, n> : silu_mul_kernel<T, 1>,
                   grid_2d(gate.rows, packs, threads), threads, 0, stream_,
                   static_cast<const T*>(gate.data), gate.stride, static_cast<const T*>(up.data),
                   up.stride, static_cast<T*>(out.data), out.stride, gate.rows, packs);
  });
}

void CudaOps::convert(View in, View out) {
  REQUIRE(in.rows == out.rows && in.cols == out.cols,
          "convert of " + in.shape() + " into " + out.shape());
  if (in.empty()) return;
  require_cuda("convert", {in, out});
  if (in.dtype == out.dtype) return copy(in, out);
  flatten({&in, &out});
  if (in.dtype == DType::f64 || out.dtype == DType::f64) {
    if (in.dtype == DType::f32) return launch_convert<float, double>(in, out, stream_);
    REQUIRE(out.dtype == DType::f32, "no conversion from " + in.shape() + " to " + out.shape());
    return launch_convert<double, float>(in, out, stream_);
  }
  dispatch_float(in.dtype, "convert", [&](auto from) {
    dispatch_float(out.dtype, "convert", [&](auto to) {
      if constexpr (!std::is_same_v<decltype(from), decltype(to)>) {
        launch_convert<decltype(from), decltype(to)>(in, out, stream_);
      }
    });
  });
  seal(stream_);
}

void CudaOps::fill_bell(View out, std::uint64_t seed, std::uint64_t stream, float scale,
                        float shift) {
  if (out.empty()) return;
  require_cuda("fill_bell", {out});
  flatten({&out});
  dispatch_float(out.dtype, "fill_bell", [&](auto tag) {
    using T = decltype(tag);
    launch("fill_bell", fill_bell_kernel<T>, grid_2d(out.rows, out.cols, threads), threads, 0,
           stream_, static_cast<T*>(out.data), out.stride, out.rows, out.cols, seed, stream, scale,
           shift);
  });
  seal(stream_);
}

void CudaOps::zero(View out) {
  if (out.empty()) return;
  require_cuda("zero", {out});
  const auto size = dtype_bytes(out.dtype);
  if (out.contiguous()) {
    CUDA_TRY(cudaMemsetAsync(out.data, 0, static_cast<std::size_t>(out.bytes()), stream_));
  } else {
    CUDA_TRY(cudaMemset2DAsync(out.data, static_cast<std::size_t>(out.stride) * size, 0,
                               static_cast<std::size_t>(out.cols) * size,
                               static_cast<std::size_t>(out.rows), stream_));
  }
}

}  // namespace engine
