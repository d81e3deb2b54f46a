// The next token of each row of logits: greedy, by temperature, or from the most likely tokens.
// Nothing here allocates, synchronises or depends on the data on the host's side, so that a step
// can be recorded.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "engine/core/rng.h"
#include "engine/ops/step_check.h"

namespace engine {
namespace {

using Key = unsigned long long;

constexpr int threads = 256;
constexpr int per_thread = 4;
constexpr int chunk = threads * per_thread;  // logits a block takes
constexpr Key nonfinite = ~Key{0};           // above the key of any finite logit

// Order-preserving bits of a finite logit: larger logits have larger bits, both zeros the same.
__device__ inline std::uint32_t ordered_bits(float v) {
  const std::uint32_t bits = __float_as_uint(v == 0.0F ? 0.0F : v);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}
__device__ inline float logit_of(std::uint32_t ordered) {
  return __uint_as_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000U : 0xFFFFFFFFU));
}

// The largest key of a row is its largest logit with the lowest id, or `nonfinite`.
__device__ inline Key best_key(float v, std::int64_t id) {
  if (!isfinite(v)) return nonfinite;
  return Key{ordered_bits(v)} << 32 | (0xFFFFFFFFU - static_cast<std::uint32_t>(id));
}

struct MaxKey {
  __device__ Key operator()(Key a, Key b) const { return a > b ? a : b; }
};

// All rows of one sort: ascending keys are rows, then logits falling, then ids rising. The ids
// rise in the input already and the sort is stable, so that their bits need no pass.
struct SortLayout {
  int id_bits;
  int row_bits;
  [[nodiscard]] int end_bit() const { return id_bits + 32 + row_bits; }
};

struct Rows {
  const float* logits;
  std::int64_t stride;
  int vocab;
  int chunks;  // of a row
};

struct State {
  std::int32_t* token;
  std::int32_t* position;
  std::int32_t* step;
  std::int32_t* history;
  std::int32_t* bad;
  std::int64_t token_stride, history_stride, steps;
};

// Launch: chained; grid (chunks, batch), 256 threads. best[row, chunk] is the largest key of the
// chunk; with `keys`, every logit's sort key is written, too. N: elements per access.
template <int N>
__global__ void __launch_bounds__(threads)
    best_of_chunk_kernel(Rows rows, Key* best, Key* keys, int id_bits) {
  __shared__ Key scratch[32];
  chain_trigger();
  chain_wait();
  const std::int64_t row = blockIdx.y;
  const float* from = rows.logits + row * rows.stride;
  Key top = 0;
#pragma unroll
  for (int i = 0; i < per_thread / N; ++i) {
    const int id =
        static_cast<int>(blockIdx.x) * chunk + (i * threads + static_cast<int>(threadIdx.x)) * N;
    if (id >= rows.vocab) continue;
    const auto pack = *reinterpret_cast<const Pack<float, N>*>(from + id);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      top = MaxKey{}(top, best_key(pack.v[e], id + e));
      if (keys == nullptr) continue;
      const Key falling = static_cast<std::uint32_t>(~ordered_bits(pack.v[e]));
      keys[row * rows.vocab + id + e] =
          ((static_cast<Key>(row) << 32 | falling) << id_bits) | static_cast<Key>(id + e);
    }
  }
  top = block_reduce(top, MaxKey{}, Key{0}, scratch);
  if (threadIdx.x == 0) best[row * rows.chunks + blockIdx.x] = top;
}

// Token of one row; -1 stands for a row with NaN or infinity.
__device__ inline void record(const State& state, std::int64_t row, std::int32_t step,
                              std::int32_t token) {
  if (token < 0) {
    atomicAdd(state.bad, 1);
    token = 0;
  }
  state.token[row * state.token_stride] = token;
  if (step >= 0 && step < state.steps) state.history[row * state.history_stride + step] = token;
}

__device__ inline std::int32_t token_of(Key best) {
  return best == nonfinite ? -1
                           : static_cast<std::int32_t>(0xFFFFFFFFU - static_cast<unsigned>(best));
}

// Launch: chained; one block of 256 threads, a warp per row.
__global__ void __launch_bounds__(threads)
    greedy_kernel(const Key* best, int chunks, std::int64_t batch, State state) {
  chain_trigger();
  chain_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t step = *state.step;
  for (std::int64_t row = threadIdx.x / 32; row < batch; row += threads / 32) {
    Key top = 0;
#pragma unroll 4
    for (int i = lane; i < chunks; i += 32) top = MaxKey{}(top, best[row * chunks + i]);
    top = warp_reduce(top, MaxKey{});
    if (lane == 0) record(state, row, step, token_of(top));
  }
  __syncthreads();  // every warp has read the step
  if (threadIdx.x == 0) {
    *state.step = step + 1;
    *state.position += 1;
  }
}

// The weights exp((l - max) / temperature) of one row: by id, or in the order of the sort.
struct Weights {
  const float* logits;  // of the row
  const Key* sorted;    // of the row, or null
  int id_bits;
  double top;
  double temperature;
  __device__ double operator()(int i) const {
    const float l =
        sorted == nullptr ? logits[i] : logit_of(~static_cast<std::uint32_t>(sorted[i] >> id_bits));
    return exp((static_cast<double>(l) - top) / temperature);
  }
  __device__ std::int32_t id(int i) const {
    if (sorted == nullptr) return i;
    return static_cast<std::int32_t>(sorted[i] & ((Key{1} << id_bits) - 1));
  }
};

struct SampleArgs {
  Rows rows;
  const Key* best;    // [batch, chunks]
  const Key* sorted;  // [batch, vocab], or null
  double* sums;       // [batch, chunks]: weights of each chunk
  int id_bits;
  double temperature, top_p;
  std::uint64_t seed;
};

// The whole block must call it.
__device__ inline Key best_of_row(const SampleArgs& args, std::int64_t row, Key* scratch) {
  Key top = 0;
  for (int i = static_cast<int>(threadIdx.x); i < args.rows.chunks; i += threads) {
    top = MaxKey{}(top, args.best[row * args.rows.chunks + i]);
  }
  return block_reduce(top, MaxKey{}, Key{0}, scratch);
}

__device__ inline Weights weights_of(const SampleArgs& args, std::int64_t row, Key best) {
  return {args.rows.logits + row * args.rows.stride,
          args.sorted == nullptr ? nullptr : args.sorted + row * args.rows.vocab, args.id_bits,
          static_cast<double>(logit_of(static_cast<std::uint32_t>(best >> 32))), args.temperature};
}

// Launch: chained; grid (chunks, batch), 256 threads.
__global__ void __launch_bounds__(threads) chunk_sums_kernel(SampleArgs args) {
  __shared__ Key key_scratch[32];
  __shared__ double sum_scratch[32];
  chain_trigger();
  chain_wait();
  const std::int64_t row = blockIdx.y;
  const Weights weights = weights_of(args, row, best_of_row(args, row, key_scratch));
  double sum = 0;
#pragma unroll
  for (int e = 0; e < per_thread; ++e) {
    const int i =
        static_cast<int>(blockIdx.x) * chunk + e * threads + static_cast<int>(threadIdx.x);
    if (i < args.rows.vocab) sum += weights(i);
  }
  sum = block_reduce(sum, SumOp{}, 0.0, sum_scratch);
  if (threadIdx.x == 0) args.sums[row * args.rows.chunks + blockIdx.x] = sum;
}

struct Found {
  int index;
  double before;  // running sum without value(index)
  double upto;    // and with it
};

struct SearchScratch {
  double warp_sums[threads / 32];
  int first;
  Found found;
};

// The first i < n at which `base` + value(0) + ... + value(i) exceeds `limit` (or reaches it, if
// `reach`); n - 1 if none does. The whole block must call it; every thread gets the result.
template <class Value>
__device__ Found search(int n, double base, double limit, bool reach, const Value& value,
                        SearchScratch& scratch) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int share = (n + threads - 1) / threads;
  const int begin = min(n, thread * share);
  const int end = min(n, begin + share);
  double own = 0;
  for (int i = begin; i < end; ++i) own += value(i);
  double upto = own;  // of the warp, this thread included
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(0xffffffffU, upto, static_cast<unsigned>(offset));
    if (lane >= offset) upto += other;
  }
  double before = __shfl_up_sync(0xffffffffU, upto, 1);
  if (lane == 0) before = 0;
  if (lane == 31) scratch.warp_sums[warp] = upto;
  if (thread == 0) scratch.first = n - 1;
  __syncthreads();
  double running = base;
  for (int w = 0; w < warp; ++w) running += scratch.warp_sums[w];
  running += before;
  Found mine{-1, 0, 0};
  for (int i = begin; i < end; ++i) {
    const double last = running;
    running += value(i);
    const bool hit = reach ? running >= limit : running > limit;
    if (hit || i == n - 1) {
      mine = {i, last, running};
      if (hit) atomicMin(&scratch.first, i);
      break;
    }
  }
  __syncthreads();
  if (mine.index == scratch.first) scratch.found = mine;
  __syncthreads();
  const Found found = scratch.found;
  __syncthreads();  // before the scratch is used again
  return found;
}

// As `search` over all weights of a row, by chunk and then inside it.
__device__ inline Found search_row(const SampleArgs& args, const double* sums,
                                   const Weights& weights, double limit, bool reach,
                                   SearchScratch& scratch) {
  const Found at = search(
      args.rows.chunks, 0.0, limit, reach, [&](int i) { return sums[i]; }, scratch);
  const int first = at.index * chunk;
  Found inside = search(
      min(chunk, args.rows.vocab - first), at.before, limit, reach,
      [&](int i) { return weights(first + i); }, scratch);
  inside.index += first;
  return inside;
}

// Launch: chained; grid (batch), 256 threads. Chooses and records the token of one row.
__global__ void __launch_bounds__(threads) choose_kernel(SampleArgs args, State state) {
  __shared__ Key key_scratch[32];
  __shared__ SearchScratch scratch;
  chain_trigger();
  chain_wait();
  const std::int64_t row = blockIdx.x;
  const std::int32_t step = *state.step;
  const Key best = best_of_row(args, row, key_scratch);
  if (best == nonfinite) {  // the same for the whole block
    if (threadIdx.x == 0) record(state, row, step, -1);
    return;
  }
  const Weights weights = weights_of(args, row, best);
  const double* sums = args.sums + row * args.rows.chunks;
  // Nothing exceeds infinity: this is the sum of all.
  double mass = search(
                    args.rows.chunks, 0.0, static_cast<double>(INFINITY), false,
                    [&](int i) { return sums[i]; }, scratch)
                    .upto;
  int last = args.rows.vocab - 1;
  if (args.sorted != nullptr) {
    const Found cut = search_row(args, sums, weights, args.top_p * mass, true, scratch);
    mass = cut.upto;
    last = cut.index;
  }
  const double uniform = uniform_value(args.seed + static_cast<std::uint64_t>(row), sampling_stream,
                                       static_cast<std::uint64_t>(step));
  const Found chosen = search_row(args, sums, weights, uniform * mass, false, scratch);
  if (threadIdx.x == 0) record(state, row, step, weights.id(min(chosen.index, last)));
}

// Launch: chained; one thread. Every row has used the step by now.
__global__ void advance_kernel(State state) {
  chain_trigger();
  chain_wait();
  *state.step += 1;
  *state.position += 1;
}

// Bits that hold 0 to n - 1.
int bits_below(std::int64_t n) {
  return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n - 1)));
}

std::int64_t padded(std::int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// What lies where in the workspace.
struct Places {
  std::int64_t sums, keys, sorted, sort, end;  // the best keys are first
  SortLayout layout;
  std::size_t sort_bytes;
};

cudaError_t sort_keys(void* workspace, std::size_t& bytes, cub::DoubleBuffer<Key>& keys,
                      std::int64_t count, const SortLayout& layout, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortKeys(workspace, bytes, keys, count, layout.id_bits,
                                        layout.end_bit(), stream);
}

Places plan_places(std::int64_t batch, std::int64_t vocab) {
  REQUIRE(batch > 0 && batch <= 65535 && vocab > 0 && vocab <= 0x7fffffff,
          "sample_step of " + std::to_string(batch) + " x " + std::to_string(vocab));
  Places p{};
  p.layout = {bits_below(vocab), bits_below(batch)};
  REQUIRE(p.layout.end_bit() <= 64, "sample_step of too many rows of too many logits: " +
                                        std::to_string(batch) + " x " + std::to_string(vocab));
  const std::int64_t chunks = ceil_div(vocab, chunk);
  p.sums = padded(batch * chunks * 8);
  p.keys = p.sums + padded(batch * chunks * 8);
  p.sorted = p.keys + padded(batch * vocab * 8);
  p.sort = p.sorted + padded(batch * vocab * 8);
  cub::DoubleBuffer<Key> none;
  CUDA_TRY(sort_keys(nullptr, p.sort_bytes, none, batch * vocab, p.layout, nullptr));
  p.end = p.sort + padded(static_cast<std::int64_t>(p.sort_bytes));
  return p;
}

}  // namespace

void CudaOps::sample_step(View logits, const SampleOptions& options, const StepState& state,
                          View workspace) {
  check_sample_step(logits, options, state);
  const std::int64_t batch = logits.rows;
  if (batch == 0) return;
  require_cuda("sample_step", {logits, state.token, state.position, state.step, state.bad});
  if (!state.history.empty()) require_cuda("sample_step", {state.history});
  const Places places = plan_places(batch, logits.cols);
  REQUIRE(workspace.contiguous() && workspace.bytes() >= places.end,
          "sample_step needs " + std::to_string(places.end) + " bytes of workspace, got " +
              workspace.shape());
  require_cuda("sample_step", {workspace});
  REQUIRE(aligned_rows(workspace, 16, 1), "sample_step: the workspace is misaligned");
  auto* base = static_cast<char*>(workspace.data);
  auto* best = reinterpret_cast<Key*>(base);

  const Rows rows{logits.as<float>(), logits.stride, static_cast<int>(logits.cols),
                  static_cast<int>(ceil_div(logits.cols, chunk))};
  const State to{state.token.as<std::int32_t>(), state.position.as<std::int32_t>(),
                 state.step.as<std::int32_t>(),  state.history.as<std::int32_t>(),
                 state.bad.as<std::int32_t>(),   state.token.stride,
                 state.history.stride,           state.history.cols};
  const dim3 grid(static_cast<unsigned>(rows.chunks), static_cast<unsigned>(batch));
  const bool greedy = options.temperature == 0;
  const bool sorting = !greedy && options.top_p < 1;
  auto* keys = sorting ? reinterpret_cast<Key*>(base + places.keys) : nullptr;
  const bool wide = aligned_rows(logits, 16, 4);
  launch_chained("sample_best", wide ? best_of_chunk_kernel<4> : best_of_chunk_kernel<1>, grid,
                 threads, 0, stream_, rows, best, keys, places.layout.id_bits);
  if (greedy) {
    return launch_chained("sample_greedy", greedy_kernel, 1, threads, 0, stream_, best, rows.chunks,
                          batch, to);
  }
  SampleArgs args{rows,
                  best,
                  nullptr,
                  reinterpret_cast<double*>(base + places.sums),
                  places.layout.id_bits,
                  static_cast<double>(options.temperature),
                  static_cast<double>(options.top_p),
                  options.seed};
  if (sorting) {
    cub::DoubleBuffer<Key> buffers(keys, reinterpret_cast<Key*>(base + places.sorted));
    std::size_t bytes = places.sort_bytes;
    CUDA_TRY(
        sort_keys(base + places.sort, bytes, buffers, batch * logits.cols, places.layout, stream_));
    args.sorted = buffers.Current();
  }
  launch_chained("sample_sums", chunk_sums_kernel, grid, threads, 0, stream_, args);
  launch_chained("sample_choose", choose_kernel, static_cast<unsigned>(batch), threads, 0, stream_,
                 args, to);
  launch_chained("sample_advance", advance_kernel, 1, 1, 0, stream_, to);
}

std::int64_t CudaOps::sample_step_bytes(std::int64_t batch, std::int64_t vocab) const {
  return plan_places(batch, vocab).end;
}

}  // namespace engine
