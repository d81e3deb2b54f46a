// Causal grouped-query attention over many queries (the FlashAttention-2 schedule: Dao, 2023).
#include <cmath>

#include "cuda/attn.h"
#include "cuda/attn_mma.cuh"
#include "cuda/check.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int tile_q = 128;              // 32 queries per warp: two row blocks of 16
constexpr int tile_k = 64;               // keys per step
constexpr int row_blocks = tile_q / 64;  // per warp
constexpr int key_blocks = tile_k / 8;   // column blocks of a score tile

template <class T>
struct Args {
  const T* q;
  const T* k;
  const T* v;
  T* out;
  int q_stride, k_stride, v_stride, out_stride;  // 32 bits: registers are scarce here
  int q_len, kv_len, heads, group;
  float scale_log2;  // 1/sqrt(head_dim) * log2(e)
};

// A thread's part in copying tiles of rows of HD elements: chunk `chunk` of every rows_at_once-th
// row from `row` on.
template <int HD>
struct Copier {
  static constexpr int chunks = HD / 8;
  static constexpr int rows_at_once = threads / chunks;
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
};

// The running state of a warp's 32 queries. Thread (g, t) holds rows g and g + 8 of each row block.
template <int HD>
struct State {
  float acc[row_blocks][HD / 8][4];
  float peak[row_blocks][2];  // running maximum of the raw scores
  float sum[row_blocks][2];   // this thread's share of the sum; the quad's four shares make a row
};

// s = q k^T for one tile of keys. q_lane and k_lane: where this lane's first ldmatrix rows lie.
template <class T, int HD>
__device__ void score_tile(float (&s)[row_blocks][key_blocks][4], std::uint32_t q_lane,
                           std::uint32_t k_lane) {
#pragma unroll
  for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
    for (int n = 0; n < key_blocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0F;
    }
  }
#pragma unroll
  for (int step = 0; step < HD / 16; ++step) {
    std::uint32_t a[row_blocks][4];
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
      ldmatrix(a[m], (q_lane ^ (step * 32)) + m * 16 * HD * 2);
    }
#pragma unroll
    for (int n = 0; n < key_blocks; n += 2) {
      std::uint32_t b[4];
      ldmatrix(b, (k_lane ^ (step * 32)) + n * 8 * HD * 2);
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) {
        mma<T>(s[m][n], a[m], b[0], b[1]);
        mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Turns scores into unnormalised probabilities p, in pairs (p[m][n][h]: columns 2t and 2t + 1 of
// row g + 8 h), and rescales the state to the new maxima. Every row sees a key in its first tile,
// so the maxima are finite from then on.
template <class T, int HD>
__device__ void softmax_tile(float (&s)[row_blocks][key_blocks][4],
                             std::uint32_t (&p)[row_blocks][key_blocks][2], State<HD>& state,
                             float scale_log2) {
#pragma unroll
  for (int m = 0; m < row_blocks; ++m) {
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
template <class T, int HD>
__device__ void value_tile(const std::uint32_t (&p)[row_blocks][key_blocks][2], State<HD>& state,
                           std::uint32_t v_lane) {
#pragma unroll
  for (int step = 0; step < tile_k / 16; ++step) {
#pragma unroll
    for (int n = 0; n < HD / 8; n += 2) {
      std::uint32_t b[4];
      ldmatrix_transposed(b, (v_lane ^ (n * 16)) + step * 16 * HD * 2);
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) {
        const std::uint32_t a[4] = {p[m][2 * step][0], p[m][2 * step][1], p[m][2 * step + 1][0],
                                    p[m][2 * step + 1][1]};
        mma<T>(state.acc[m][n], a, b[0], b[1]);
        mma<T>(state.acc[m][n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Shapes: q [batch * q_len, heads * HD], k and v [batch * kv_len, kv_heads * HD], out as q.
// Launch: grid (batch * heads, ceil(q_len / 128)), 128 threads, (128 + 64 + 64) * HD * 2 bytes of
// shared memory. Blocks of late queries see the most keys and start first; neighbouring blocks
// share a kv head, so its keys stay in L2.
// Preconditions: rows aligned to 16 bytes, q_len <= kv_len.
// Schedule per tile: scores and softmax while the values arrive, sums while the next keys
// arrive (requested only then: with the scores still live there are not enough registers). Rows
// past the end are zeros in shared memory; only tiles that cross the diagonal are masked. Cost: 4 *
// HD flops per visible (query, key) pair; about 2 * HD * 2 bytes of shared reads per pair and 32
// queries.
template <class T, int HD>
__global__ void __launch_bounds__(threads, 2) attn_prefill_kernel(Args<T> args) {
  extern __shared__ __align__(256) unsigned char shared[];
  using Copy = Copier<HD>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * (tile_q / 4);
  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t k_tile = q_tile + tile_q * HD * 2;
  const std::uint32_t v_tile = k_tile + tile_k * HD * 2;
  const std::uint32_t q_lane = q_tile + swizzled<HD>(first_row + lane % 16, lane / 16);
  const std::uint32_t k_lane = k_tile + swizzled<HD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const std::uint32_t v_lane = v_tile + swizzled<HD>(lane % 16, lane / 16);
  const std::uint32_t copy_offset = swizzled<HD>(Copy::row(), Copy::chunk());

  const std::int64_t sequence = blockIdx.x / static_cast<unsigned>(args.heads);
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.heads));
  const int first_q = static_cast<int>(gridDim.y - 1 - blockIdx.y) * tile_q;
  const int left = args.q_len - first_q;
  const std::int64_t kv_column = std::int64_t{head / args.group} * HD + Copy::chunk() * 8;
  const std::int64_t kv_row = sequence * args.kv_len + Copy::row();
  const T* k = args.k + kv_row * args.k_stride + kv_column;
  const T* v = args.v + kv_row * args.v_stride + kv_column;
  const T* q = args.q + (sequence * args.q_len + first_q + Copy::row()) * args.q_stride +
               std::int64_t{head} * HD + Copy::chunk() * 8;
  Copy::template load<tile_q>(q_tile + copy_offset, q, args.q_stride, left - Copy::row());
  int kv_left = args.kv_len - Copy::row();  // from this thread's first key of the tile on
  Copy::template load<tile_k>(k_tile + copy_offset, k, args.k_stride, kv_left);
  copy_commit();

  const int past = args.kv_len - args.q_len;
  int tiles = (past + first_q + (left < tile_q ? left : tile_q) + tile_k - 1) / tile_k;
  // The last key that this thread's first row sees, counted from the thread's first column of the
  // tile.
  int visible = past + first_q + first_row + lane / 4 - lane % 4 * 2;

  State<HD> state;
#pragma unroll
  for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.peak[m][h] = -INFINITY;
      state.sum[m][h] = 0.0F;
    }
#pragma unroll
    for (int n = 0; n < HD / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.acc[m][n][e] = 0.0F;
    }
  }

  for (; tiles > 0; --tiles) {
    copy_wait<0>();
    __syncthreads();  // keys are here, and everyone is done with the previous values
    Copy::template load<tile_k>(v_tile + copy_offset, v, args.v_stride, kv_left);
    copy_commit();

    float s[row_blocks][key_blocks][4];
    score_tile<T, HD>(s, opaque(q_lane), opaque(k_lane));
    if (visible < tile_k - 7) {  // the thread's last column
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
        for (int n = 0; n < key_blocks; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (n * 8 + e % 2 > visible + m * 16 + e / 2 * 8) s[m][n][e] = -INFINITY;
          }
        }
      }
    }
    std::uint32_t p[row_blocks][key_blocks][2];
    softmax_tile<T, HD>(s, p, state, args.scale_log2);
    copy_wait<0>();
    __syncthreads();  // values are here, and everyone is done with the keys
    kv_left -= tile_k;
    visible -= tile_k;
    if (tiles > 1) Copy::template load<tile_k>(k_tile + copy_offset, k, args.k_stride, kv_left);
    copy_commit();
    value_tile<T, HD>(p, state, opaque(v_lane));
  }

  // Results leave through the warp's own rows of the query tile, which only it reads.
#pragma unroll
  for (int m = 0; m < row_blocks; ++m) {
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
  T* out = args.out + (sequence * args.q_len + first_q) * args.out_stride + std::int64_t{head} * HD;
#pragma unroll
  for (int i = 0; i < chunks; ++i) {
    const int row = first_row + (i * 32 + lane) / chunks;
    const int chunk = (i * 32 + lane) % chunks;
    if (row < left) {
      *reinterpret_cast<uint4*>(out + std::int64_t{row} * args.out_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(shared + swizzled<HD>(row, chunk));
    }
  }
}

template <class T, int HD>
void launch_prefill(const AttnProblem& p, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(p.q_len, tile_q);
  constexpr std::int64_t limit = 0x7fffff00;
  for (const View* v : {&p.q, &p.k, &p.v, &p.out}) {
    REQUIRE(v->stride <= limit, "attention of too distant rows: " + v->shape());
  }
  REQUIRE(p.batch * p.shape.heads <= limit && blocks <= 65535 && p.kv_len <= limit,
          "attention of too large " + p.q.shape());
  const auto narrow = [](std::int64_t v) { return static_cast<int>(v); };
  const Args<T> args{static_cast<const T*>(p.q.data),
                     static_cast<const T*>(p.k.data),
                     static_cast<const T*>(p.v.data),
                     static_cast<T*>(p.out.data),
                     narrow(p.q.stride),
                     narrow(p.k.stride),
                     narrow(p.v.stride),
                     narrow(p.out.stride),
                     narrow(p.q_len),
                     narrow(p.kv_len),
                     narrow(p.shape.heads),
                     narrow(p.shape.heads / p.shape.kv_heads),
                     log2_e / std::sqrt(static_cast<float>(HD))};
  const dim3 grid(static_cast<unsigned>(p.batch * p.shape.heads), static_cast<unsigned>(blocks));
  launch("attn_prefill", attn_prefill_kernel<T, HD>, grid, threads,
         (tile_q + 2 * tile_k) * HD * sizeof(T), stream, args);
}

template <class T>
void launch_by_head(const AttnProblem& p, cudaStream_t stream) {
  switch (p.shape.head_dim) {
    case 32:
      return launch_prefill<T, 32>(p, stream);
    case 64:
      return launch_prefill<T, 64>(p, stream);
    case 128:
      return launch_prefill<T, 128>(p, stream);
    default:
      REQUIRE(false, "no tensor core kernel for head_dim " + std::to_string(p.shape.head_dim));
  }
}

}  // namespace

void attention_prefill(const AttnProblem& p, cudaStream_t stream) {
  if (p.q.dtype == DType::f16) return launch_by_head<__half>(p, stream);
  REQUIRE(p.q.dtype == DType::bf16, "no tensor core kernel for " + p.q.shape());
  launch_by_head<__nv_bfloat16>(p, stream);
}

}  // namespace engine
