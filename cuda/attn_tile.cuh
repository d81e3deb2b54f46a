// What the kernels of attention over tiles of 64 keys share: 128 threads, whose warps take M blocks
// of 16 queries each; tiles of queries, keys and values in shared memory, swizzled.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attn_mma.cuh"
#include "cuda/types.cuh"

namespace engine {

constexpr int attn_threads = 128;
constexpr int tile_k = 64;              // keys per step
constexpr int key_blocks = tile_k / 8;  // column blocks of a score tile

// A thread's part in copying tiles of rows of HD elements: chunk `chunk` of every rows_at_once-th
// row from `row` on.
template <int HD>
struct Copier {
  static constexpr int chunks = HD / 8;
  static constexpr int rows_at_once = attn_threads / chunks;
  static_assert(32 % rows_at_once == 0);
  static __device__ int row() { return static_cast<int>(threadIdx.x) / chunks; }
  static __device__ int chunk() { return static_cast<int>(threadIdx.x) % chunks; }

  // ROWS rows into the tile at `target` (the tile's address plus swizzled(row(), chunk())), from
  // `source` (this thread's first chunk). Rows from `left` on, counted from this thread's first,
  // become zeros and are not read. Leaves `source` ROWS rows further. Asynchronous, not committed.
  template <int ROWS, class T>
  static __device__ void load(std::uint32_t target, const T*& source, int stride, int left) {
    const std::int64_t step =
        std::int64_t{rows_at_once} * static_cast<int>(opaque(static_cast<std::uint32_t>(stride)));
#pragma unroll
    for (int i = 0; i < ROWS / rows_at_once; ++i) {
      copy_async(target + i * rows_at_once * HD * 2, source, i * rows_at_once < left);
      source += step;
    }
  }

  // The tile_k rows of the matrix at `source` (at the column of this thread's chunk) that the
  // warp's lanes name: lane l those of the tile's rows l (`low`) and l + 32 (`high`). A negative
  // row becomes zeros and is not read. Asynchronous, not committed.
  template <class T>
  static __device__ void gather(std::uint32_t target, const T* source, int stride, int low,
                                int high) {
#pragma unroll
    for (int i = 0; i < tile_k / rows_at_once; ++i) {
      const int at = i * rows_at_once;
      const int named = __shfl_sync(0xffffffffU, at < 32 ? low : high, at % 32 + row());
      copy_async(target + at * HD * 2, source + std::int64_t{named} * stride, named >= 0);
    }
  }
};

// The running state of a warp's queries, M row blocks of 16. Thread (g, t) holds rows g and g + 8
// of each row block.
template <int HD, int M>
struct AttnState {
  float acc[M][HD / 8][4];
  float peak[M][2];  // running maximum of the raw scores
  float sum[M][2];   // this thread's share of the sum; the quad's four shares make a row

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        peak[m][h] = -INFINITY;
        sum[m][h] = 0.0F;
      }
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0F;
      }
    }
  }
};

// s = q k^T for one tile of keys. q_lane and k_lane: where this lane's first ldmatrix rows lie.
template <class T, int HD, int M>
__device__ void score_tile(float (&s)[M][key_blocks][4], std::uint32_t q_lane,
                           std::uint32_t k_lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < key_blocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0F;
    }
  }
#pragma unroll
  for (int step = 0; step < HD / 16; ++step) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ldmatrix(a[m], (q_lane ^ (step * 32)) + m * 16 * HD * 2);
    }
#pragma unroll
    for (int n = 0; n < key_blocks; n += 2) {
      std::uint32_t b[4];
      ldmatrix(b, (k_lane ^ (step * 32)) + n * 8 * HD * 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(s[m][n], a[m], b[0], b[1]);
        mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Hides the keys beyond what each row sees. `visible`: the last key that this thread's first row
// sees, counted from the thread's first column of the tile.
template <int M>
__device__ void mask_tile(float (&s)[M][key_blocks][4], int visible) {
  if (visible >= tile_k - 7) return;  // the thread's last column
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < key_blocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (n * 8 + e % 2 > visible + m * 16 + e / 2 * 8) s[m][n][e] = -INFINITY;
      }
    }
  }
}

// Turns scores into unnormalised probabilities p, in pairs (p[m][n][h]: columns 2t and 2t + 1 of
// row g + 8 h), and rescales the state to the new maxima. Every row sees a key in its first tile,
// so the maxima are finite from then on.
template <class T, int HD, int M>
__device__ void softmax_tile(float (&s)[M][key_blocks][4], std::uint32_t (&p)[M][key_blocks][2],
                             AttnState<HD, M>& state, float scale_log2) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float peak = state.peak[m][h];
#pragma unroll
      for (int n = 0; n < key_blocks; ++n) {
        peak = fmaxf(peak, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffU, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffU, peak, 2));
      const float base = peak * scale_log2;
      const float shrink = exp2_fast(state.peak[m][h] * scale_log2 - base);
      state.peak[m][h] = peak;
      float sum = state.sum[m][h] * shrink;
#pragma unroll
      for (int n = 0; n < key_blocks; ++n) {
        const float low = exp2_fast(fmaf(s[m][n][2 * h], scale_log2, -base));
        const float high = exp2_fast(fmaf(s[m][n][2 * h + 1], scale_log2, -base));
        sum += low + high;
        p[m][n][h] = pack2<T>(low, high);
      }
      state.sum[m][h] = sum;
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
        state.acc[m][n][2 * h] *= shrink;
        state.acc[m][n][2 * h + 1] *= shrink;
      }
    }
  }
}

// acc += p v. The pairs of two key blocks are exactly one A fragment.
template <class T, int HD, int M>
__device__ void value_tile(const std::uint32_t (&p)[M][key_blocks][2], AttnState<HD, M>& state,
                           std::uint32_t v_lane) {
#pragma unroll
  for (int step = 0; step < tile_k / 16; ++step) {
#pragma unroll
    for (int n = 0; n < HD / 8; n += 2) {
      std::uint32_t b[4];
      ldmatrix_transposed(b, (v_lane ^ (n * 16)) + step * 16 * HD * 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const std::uint32_t a[4] = {p[m][2 * step][0], p[m][2 * step][1], p[m][2 * step + 1][0],
                                    p[m][2 * step + 1][1]};
        mma<T>(state.acc[m][n], a, b[0], b[1]);
        mma<T>(state.acc[m][n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Normalizes and writes a warp's rows, `first_row` on, to out (the head's first column of the
// tile's first row); rows from `left` on are not written. They leave through the warp's own rows of
// the query tile at `shared`, which only it reads.
template <class T, int HD, int M>
__device__ void store_state(const AttnState<HD, M>& state, unsigned char* shared, int first_row,
                            T* out, int stride, int left) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = state.sum[m][h];
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      const float inverse = 1.0F / sum;
      const int row = first_row + m * 16 + h * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < HD / 8; ++n) {
        const std::uint32_t pair =
            pack2<T>(state.acc[m][n][2 * h] * inverse, state.acc[m][n][2 * h + 1] * inverse);
        const std::uint32_t at = swizzled<HD>(row, n) + static_cast<std::uint32_t>(lane % 4 * 4);
        *reinterpret_cast<std::uint32_t*>(shared + at) = pair;
      }
    }
  }
  __syncwarp();
  constexpr int chunks = HD / 8;
#pragma unroll
  for (int i = 0; i < chunks; ++i) {
    const int row = first_row + (i * 32 + lane) / chunks;
    const int chunk = (i * 32 + lane) % chunks;
    if (row < left) {
      *reinterpret_cast<uint4*>(out + std::int64_t{row} * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(shared + swizzled<HD>(row, chunk));
    }
  }
}

}  // namespace engine
