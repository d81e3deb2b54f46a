// Causal grouped-query attention over many queries (the FlashAttention-2 schedule: Dao, 2023).
#include <cmath>

#include "cuda/attn.h"
#include "cuda/attn_tile.cuh"
#include "cuda/check.h"
#include "cuda/types.cuh"

namespace engine {
namespace {

constexpr int tile_q = 128;              // 32 queries per warp: two row blocks of 16
constexpr int row_blocks = tile_q / 64;  // per warp

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
__global__ void __launch_bounds__(attn_threads, 2) attn_prefill_kernel(Args<T> args) {
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

  AttnState<HD, row_blocks> state;
  state.clear();

  for (; tiles > 0; --tiles) {
    copy_wait<0>();
    __syncthreads();  // keys are here, and everyone is done with the previous values
    Copy::template load<tile_k>(v_tile + copy_offset, v, args.v_stride, kv_left);
    copy_commit();

    float s[row_blocks][key_blocks][4];
    score_tile<T, HD, row_blocks>(s, opaque(q_lane), opaque(k_lane));
    mask_tile(s, visible);
    std::uint32_t p[row_blocks][key_blocks][2];
    softmax_tile<T, HD, row_blocks>(s, p, state, args.scale_log2);
    copy_wait<0>();
    __syncthreads();  // values are here, and everyone is done with the keys
    kv_left -= tile_k;
    visible -= tile_k;
    if (tiles > 1) Copy::template load<tile_k>(k_tile + copy_offset, k, args.k_stride, kv_left);
    copy_commit();
    value_tile<T, HD, row_blocks>(p, state, opaque(v_lane));
  }

  T* out = args.out + (sequence * args.q_len + first_q) * args.out_stride + std::int64_t{head} * HD;
  store_state<T, HD, row_blocks>(state, shared, first_row, out, args.out_stride, left);
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
  launch("attn_prefill", attn_prefill_kernel<T, HD>, grid, attn_threads,
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
