// How x gets into a block of the kernels behind vector_product.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector_load.cuh"

namespace engine {

// Eight values of a row of x (or of the norm's weights) from column c, zeros beyond the columns.
template <class T>
__device__ Pack<T, 8> load_x(const VectorArgs<T>& args, const T* row, int c) {
  Pack<T, 8> out{};
  if (args.wide) {
    if (c < args.cols) out = *reinterpret_cast<const Pack<T, 8>*>(row + c);
    return out;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (c + e < args.cols) {
      out.v[e] = row[args.permutation == nullptr ? c + e : args.permutation[c + e]];
    }
  }
  return out;
}

// The part of a row of x that a thread stages: eight columns of each `step`. The first four, or two
// and the norm's weights for them, it keeps in registers: their loads are on their way while the
// warp asks for weights.
template <class T>
struct XPart {
  Pack<T, 8> held[4];
  const T* row;
  int r, step, first, base;
  int kept;  // columns of x in `held`; 0 where single loads would be needed
  bool mine;

  // Before chain_wait(): the norm's weights do not change.
  __device__ void begin(const VectorArgs<T>& args, int c0) {
    r = static_cast<int>(threadIdx.x) >> args.team_shift;
    step = 8 << args.team_shift;
    first = (static_cast<int>(threadIdx.x) * 8) & (step - 1);
    mine = r < args.rows;
    row = args.x + r * args.x_stride;
    base = args.norm != nullptr ? 0 : c0 & -step;
    kept = !args.wide ? 0 : args.norm != nullptr ? 2 : 4;
    if (mine && kept == 2) {
      held[2] = load_wide(args, args.norm, first);
      held[3] = load_wide(args, args.norm, first + step);
    }
  }
  __device__ void load(const VectorArgs<T>& args) {
    if (!mine || kept == 0) return;
    held[0] = load_wide(args, row, base + first);
    held[1] = load_wide(args, row, base + first + step);
    if (kept == 2) return;
    held[2] = load_wide(args, row, base + first + 2 * step);
    held[3] = load_wide(args, row, base + first + 3 * step);
  }

  // Calls body(c, inside, x, w) with eight columns from c of x and of the norm's weights (if there
  // is one), for all that the thread has to do with columns [c0, c1); x is zero beyond the columns,
  // and anything where `inside` is false, which is so for whole groups of 16 lanes (128 columns).
  // All lanes of a warp take part each time.
  template <class Body>
  __device__ void each(const VectorArgs<T>& args, int c0, int c1, const Body& body) {
    const bool normed = args.norm != nullptr;
    int k = ((c0 & -step) - base) >> (args.team_shift + 3);
    // What was kept of columns before c0.
    for (int i = 0; i < k && i < kept; ++i) shift(normed);
#pragma unroll 1
    for (int c = c0 & -step; c < c1; c += step, ++k) {
      const int at = c + first;
      const bool inside = mine && at >= c0 && at < c1;
      Pack<T, 8> x = held[0];
      Pack<T, 8> w = held[2];
      if (k >= kept) {
        x = inside ? load_x(args, row, at) : Pack<T, 8>{};
        if (normed && inside) w = load_x(args, args.norm, at);
      }
      body(at, inside, x, w);
      shift(normed);
    }
  }

  // 1 / rms of the row. Called by all workers; has a barrier of theirs.
  __device__ float inverse_rms(const VectorArgs<T>& args) {
    __shared__ float squares[vector_warps];
    float sum = 0;
    if (mine) {
      const auto add = [&](const Pack<T, 8>& p) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_f32(p.v[e]) * to_f32(p.v[e]);
      };
      if (kept > 0) {
        add(held[0]);  // zeros beyond the columns
        add(held[1]);
      }
#pragma unroll 1
      for (int c = first + kept * step; c < args.cols; c += step) add(load_x(args, row, c));
    }
    sum = warp_reduce(sum, SumOp{});
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    barrier_workers();
    if (!mine) return 0.0F;
    const int warps = 1 << (args.team_shift - 5);  // of this row
    const int lane = static_cast<int>(threadIdx.x) % 32;
    sum = warp_reduce(lane < warps ? squares[r * warps + lane] : 0.0F, SumOp{});
    return rsqrtf(fmaf(sum, args.inverse_cols, args.eps));
  }

 private:
  __device__ void shift(bool normed) {
    held[0] = held[1];
    if (!normed) held[1] = held[2];
    held[2] = held[3];
  }
  __device__ static Pack<T, 8> load_wide(const VectorArgs<T>& args, const T* from, int c) {
    Pack<T, 8> out{};
    if (c < args.cols) out = *reinterpret_cast<const Pack<T, 8>*>(from + c);
    return out;
  }
};

}  // namespace engine
