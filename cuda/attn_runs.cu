// Attention of runs: neighbouring queries over keys that lie in several pieces.
#include <cmath>

#include "cuda/attn.h"
#include "cuda/attn_plain.cuh"
#include "cuda/attn_tile.cuh"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/types.cuh"
#include "engine/ops/runs_check.h"

namespace engine {
namespace {

constexpr int tile_q = run_queries;
constexpr int row_blocks = tile_q / 64;  // per warp

struct Runs {
  const std::int32_t* at;
  std::int64_t stride;
};

// The keys of a run, numbered through its spans.
struct alignas(16) Chain {
  int end[run_spans];    // number of the first key beyond the span; the last end is that of all
  int shift[run_spans];  // from a key's number to its row

  __device__ explicit Chain(const std::int32_t* spans) {
    int first = 0;
#pragma unroll
    for (int s = 0; s < run_spans; ++s) {
      shift[s] = spans[2 * s] - first;
      first += spans[2 * s + 1];
      end[s] = first;
    }
  }
  [[nodiscard]] __device__ int keys() const { return end[run_spans - 1]; }
  // `i` at least 0; of keys beyond the last the row is negative.
  [[nodiscard]] __device__ int row(int i) const {
    int by = shift[run_spans - 1];
#pragma unroll
    for (int s = run_spans - 2; s >= 0; --s) by = i < end[s] ? shift[s] : by;
    return i < keys() ? i + by : -1;
  }
};

template <class T>
struct Args {
  const T* q;
  const T* k;
  const T* v;
  T* out;
  Runs runs;
  int q_stride, k_stride, v_stride, out_stride;  // 32 bits: registers are scarce here
  int group;
  float scale_log2;  // 1/sqrt(head_dim) * log2(e)
};

// Shapes: as EvalOps::attention_runs, with heads of HD.
// Launch: grid (runs, heads), 128 threads, (64 + 64 + 64) * HD * 2 + 32 bytes of shared memory.
// Neighbouring blocks are runs of one head: what they share of the keys stays in L2.
// Preconditions: rows aligned to 16 bytes.
// As attn_prefill_kernel, with one block of 16 queries per warp and tiles of keys gathered from the
// spans: a lane of each warp looks up two of a tile's 64 rows, and hands them to the others. A warp
// without queries copies, but does not compute.
template <class T, int HD>
__global__ void __launch_bounds__(attn_threads, 4) attn_runs_kernel(Args<T> args) {
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

  const std::int32_t* run = args.runs.at + blockIdx.x * args.runs.stride;
  const std::int64_t first_q = run[0];
  const int queries = run[1];
  const Chain chain(run + 2);
  // Registers do not suffice to keep it. The loop's first barrier comes before it is read.
  Chain* kept = reinterpret_cast<Chain*>(shared + (tile_q + 2 * tile_k) * HD * 2);
  if (threadIdx.x == 0) *kept = chain;
  const int head = static_cast<int>(blockIdx.y);
  const std::int64_t kv_column = std::int64_t{head / args.group} * HD + Copy::chunk() * 8;
  const T* k = args.k + kv_column;
  const T* v = args.v + kv_column;
  const T* q = args.q + (first_q + Copy::row()) * args.q_stride + std::int64_t{head} * HD +
               Copy::chunk() * 8;
  Copy::template load<tile_q>(q_tile + copy_offset, q, args.q_stride, queries - Copy::row());
  int key = lane;  // whose row this lane looks up, and that of key + 32
  int low = chain.row(key);
  int high = chain.row(key + 32);
  Copy::gather(k_tile + copy_offset, k, args.k_stride, low, high);
  copy_commit();

  const bool busy = first_row < queries;
  int tiles = (chain.keys() + tile_k - 1) / tile_k;
  int visible = chain.keys() - queries + first_row + lane / 4 - lane % 4 * 2;
  AttnState<HD, row_blocks> state;
  state.clear();

  for (; tiles > 0; --tiles) {
    copy_wait<0>();
    __syncthreads();  // keys are here, and everyone is done with the previous values
    Copy::gather(v_tile + copy_offset, v, args.v_stride, low, high);
    copy_commit();

    std::uint32_t p[row_blocks][key_blocks][2];
    if (busy) {
      float s[row_blocks][key_blocks][4];
      score_tile<T, HD, row_blocks>(s, opaque(q_lane), opaque(k_lane));
      mask_tile(s, visible);
      softmax_tile<T, HD, row_blocks>(s, p, state, args.scale_log2);
    }
    key += tile_k;
    visible -= tile_k;
    low = kept->row(key);
    high = kept->row(key + 32);
    copy_wait<0>();
    __syncthreads();  // values are here, and everyone is done with the keys
    if (tiles > 1) Copy::gather(k_tile + copy_offset, k, args.k_stride, low, high);
    copy_commit();
    if (busy) value_tile<T, HD, row_blocks>(p, state, opaque(v_lane));
  }

  if (!busy) return;
  T* out = args.out + first_q * args.out_stride + std::int64_t{head} * HD;
  store_state<T, HD, row_blocks>(state, shared, first_row, out, args.out_stride, queries);
}

template <class T, int HD>
void launch_runs(const View& q, const View& k, const View& v, const View& out,
                 const AttnShape& shape, Runs runs, dim3 grid, cudaStream_t stream) {
  constexpr std::int64_t limit = 0x7fffff00;
  for (const View* view : {&q, &k, &v, &out}) {
    REQUIRE(view->stride <= limit, "attention_runs of too distant rows: " + view->shape());
  }
  const auto narrow = [](std::int64_t n) { return static_cast<int>(n); };
  const Args<T> args{static_cast<const T*>(q.data),
                     static_cast<const T*>(k.data),
                     static_cast<const T*>(v.data),
                     static_cast<T*>(out.data),
                     runs,
                     narrow(q.stride),
                     narrow(k.stride),
                     narrow(v.stride),
                     narrow(out.stride),
                     narrow(shape.heads / shape.kv_heads),
                     log2_e / std::sqrt(static_cast<float>(HD))};
  launch("attn_runs", attn_runs_kernel<T, HD>, grid, attn_threads,
         (tile_q + 2 * tile_k) * HD * sizeof(T) + sizeof(Chain), stream, args);
}

template <class T>
void launch_by_head(const View& q, const View& k, const View& v, const View& out,
                    const AttnShape& shape, Runs runs, dim3 grid, cudaStream_t stream) {
  switch (shape.head_dim) {
    case 32:
      return launch_runs<T, 32>(q, k, v, out, shape, runs, grid, stream);
    case 64:
      return launch_runs<T, 64>(q, k, v, out, shape, runs, grid, stream);
    case 128:
      return launch_runs<T, 128>(q, k, v, out, shape, runs, grid, stream);
    default:
      REQUIRE(false, "no tensor core kernel for head_dim " + std::to_string(shape.head_dim));
  }
}

// For the plain kernel.
struct ChainRows {
  Chain chain;
  __device__ std::int64_t row(std::int64_t i) const { return chain.row(static_cast<int>(i)); }
};

// Grid (runs, heads * pieces): a block takes up to 16 of a run's queries.
struct Pieces {
  static constexpr int count = run_queries / plain_tile_q;
  Runs runs;

  __device__ PlainBlock<ChainRows> block() const {
    const std::int32_t* run = runs.at + blockIdx.x * runs.stride;
    const Chain chain(run + 2);
    const int first = static_cast<int>(blockIdx.y % count) * plain_tile_q;
    return {run[0] + std::int64_t{first},
            run[1] - first,
            chain.keys() - run[1] + first,
            static_cast<int>(blockIdx.y / count),
            {chain}};
  }
};

}  // namespace

// The kernels are chosen as in attention: tensor cores for f16 and bf16 with a head_dim of 32, 64
// or 128 and rows aligned to 16 bytes, else the plain kernel.
void CudaOps::attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out) {
  check_attention_runs(q, k, v, shape, runs, out);
  if (runs.empty()) return;
  require_cuda("attention_runs", {q, k, v, runs, out});
  REQUIRE(runs.rows <= 0x7fffffff && shape.heads * Pieces::count <= 65535,
          "attention_runs of too many runs or heads: " + runs.shape() + ", " +
              std::to_string(shape.heads) + " heads");
  const Runs at{runs.as<std::int32_t>(), runs.stride};
  const auto count = static_cast<unsigned>(runs.rows);
  const auto heads = static_cast<unsigned>(shape.heads);
  bool tensor = q.dtype != DType::f32 && has_tensor_kernel(shape.head_dim);
  for (const View* view : {&q, &k, &v, &out}) tensor = tensor && aligned_rows(*view, 16, 8);
  if (tensor) {
    const dim3 grid(count, heads);
    if (q.dtype == DType::f16) {
      return launch_by_head<__half>(q, k, v, out, shape, at, grid, stream_);
    }
    return launch_by_head<__nv_bfloat16>(q, k, v, out, shape, at, grid, stream_);
  }
  dispatch_float(q.dtype, "attention_runs", [&](auto tag) {
    launch_plain<decltype(tag)>("attn_runs_plain", q, k, v, out, shape, Pieces{at},
                                dim3(count, heads * Pieces::count), stream_);
  });
}

}  // namespace engine
