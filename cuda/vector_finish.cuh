// What happens to the sums of the kernels behind vector_product: warps of their own add what the
// working warps leave, and do what follows.
#pragma once

#include "cuda/chain.cuh"
#include "cuda/kv.cuh"
#include "cuda/vector_load.cuh"

namespace engine {

// What out held, for the add epilogue; 0 for others.
template <class T>
__device__ float old_out(const VectorArgs<T>& args, const VectorWeight<T>& w, int n,
                         std::int64_t row) {
  if (args.epilogue != VectorEpilogue::add || row >= w.rows) return 0.0F;
  const std::int64_t at = n * w.out_stride + row;
  return args.out_f32 ? static_cast<const float*>(w.out)[at]
                      : to_f32(static_cast<const T*>(w.out)[at]);
}

template <class T>
__device__ void put_out(const VectorArgs<T>& args, const VectorWeight<T>& w, int n,
                        std::int64_t row, float v) {
  if (row >= w.rows) return;
  const std::int64_t at = n * w.out_stride + row;
  if (args.out_f32) {
    static_cast<float*>(w.out)[at] = v;
  } else {
    static_cast<T*>(w.out)[at] = from_f32<T>(v);
  }
}

// Products v0, v1 of row `row` of the unit's two tiles with row n of x; old_out() added already.
template <class T>
__device__ void finish(const VectorArgs<T>& args, int unit, int row, int n, float v0, float v1) {
  int segment = 0;
  int tile = 0;
  find_tile(args, unit, 0, segment, tile);
  const VectorWeight<T>& w = args.weight[segment];
  const std::int64_t first = std::int64_t{tile} * 16 + row;
  if (args.epilogue == VectorEpilogue::silu) {
    const float gate = round_through<T>(v0);
    const float act = round_through<T>(gate / (1.0F + expf(-gate)));
    put_out(args, w, n, first, act * round_through<T>(v1));
    return;
  }
  if (args.epilogue != VectorEpilogue::qkv) {
    put_out(args, w, n, first, v0);
    put_out(args, w, n, first + 16, v1);
    return;
  }
  const std::int64_t position = *args.position;
  const bool inside = position >= 0 && position < args.positions;
  T* out = static_cast<T*>(w.out) + n * w.out_stride;
  if (segment == 0 && !inside) {  // as rope_step: nothing is rotated
    out[first] = from_f32<T>(v0);
    out[first + (16 << args.half_shift)] = from_f32<T>(v1);
    return;
  }
  if (!inside) return;  // as kv_append_step: nothing is stored
  out += position * w.position_stride;
  if (segment == 2) {
    if (first < w.rows) out[first] = from_f32<T>(v0);
    if (first + 16 < w.rows) out[first + 16] = from_f32<T>(v1);
    return;
  }
  const int j = (tile & ((2 << args.half_shift) - 1)) * 16 + row;
  T low = from_f32<T>(v0);
  T high = from_f32<T>(v1);
  rotate(low, high, args.cos[position * args.cos_stride + j],
         args.sin[position * args.sin_stride + j]);
  out[first] = low;
  out[first + (16 << args.half_shift)] = high;
}

// Where the working warps and the finishing ones meet, for each of two buffers of partial sums in
// turn: `full` when all workers have left theirs, `free` when the finishers have read them. No
// worker waits for another one there.
struct VectorMeeting {
  std::uint64_t full[2];
  std::uint64_t free[2];
};
__device__ inline void meeting_init(std::uint32_t barrier, int warps) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(warps) : "memory");
}
// Before the workers' and the finishers' first meeting, by one thread; a barrier of the block must
// follow.
__device__ inline void meeting_begin(VectorMeeting& m) {
  for (int i = 0; i < 2; ++i) {
    meeting_init(shared_address(&m.full[i]), vector_warps);
    meeting_init(shared_address(&m.free[i]), vector_finishers / 32);
  }
}
// By all lanes of a warp.
__device__ inline void meeting_arrive(std::uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared::cta.b64 state, [%0];\n"
      "}\n" ::"r"(shared_address(&barrier))
      : "memory");
}
__device__ inline bool meeting_over(std::uint64_t& barrier, int use) {
  std::uint32_t over;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(&barrier)), "r"(use & 1)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(&barrier)), "r"(use & 1)
      : "memory");
#endif
  return over != 0;
}
// Until all have arrived for the use-th time.
__device__ inline void meeting_wait(std::uint64_t& barrier, int use) {
  while (!meeting_over(barrier, use)) {
#if __CUDA_ARCH__ < 900
    __nanosleep(32);  // try_wait sleeps by itself
#endif
  }
}

// old_out() of item i = 16 n + row of a unit, for both of its tiles.
template <class T>
__device__ void old_pair(const VectorArgs<T>& args, int unit, int i, float (&out)[2]) {
  int segment = 0;
  int tile = 0;
  find_tile(args, unit, 0, segment, tile);
  const std::int64_t row = std::int64_t{tile} * 16 + i % 16;
  out[0] = old_out(args, args.weight[segment], i / 16, row);
  out[1] = old_out(args, args.weight[segment], i / 16, row + 16);
}

// The finishing warps: add the partial sums [part][tile][n][row] of each unit, do what follows.
// `round` counts the units, over all phases.
template <class T, int kParts>
__device__ void finish_units(const VectorArgs<T>& args, const unsigned char* shared,
                             VectorMeeting& meeting, int& round) {
  __shared__ int arrived;
  const int thread = static_cast<int>(threadIdx.x) - vector_workers;
  const int slice = static_cast<int>(blockIdx.y);
  const int items = 16 * args.rows;
  const int buffer_floats = kParts * 2 * items;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < args.units;
       unit += static_cast<int>(gridDim.x)) {
    const int buffer = round % 2;
    const float* red =
        reinterpret_cast<const float*>(shared + args.red_offset) + buffer * buffer_floats;
    // Partial sums of slices: [unit][slice][n][row][2].
    float2* parts =
        reinterpret_cast<float2*>(args.partials) + std::int64_t{unit} * args.slices * items;
    // Sums start from what they are added to, which is read while the workers multiply.
    float first[2] = {0.0F, 0.0F};
    if (args.epilogue == VectorEpilogue::add && slice == 0 && thread < items) {
      old_pair(args, unit, thread, first);
    }
    meeting_wait(meeting.full[buffer], round / 2);
#pragma unroll 1
    for (int i = thread; i < items; i += vector_finishers) {
      if (i != thread) {
        first[0] = first[1] = 0.0F;
        if (args.epilogue == VectorEpilogue::add && slice == 0) old_pair(args, unit, i, first);
      }
      float v0 = first[0];
      float v1 = first[1];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        v0 += red[2 * p * items + i];
        v1 += red[(2 * p + 1) * items + i];
      }
      if (args.slices == 1) {
        finish(args, unit, i % 16, i / 16, v0, v1);
      } else {
        parts[slice * items + i] = {v0, v1};
      }
    }
    meeting_arrive(meeting.free[buffer]);
    ++round;
    if (args.slices == 1) continue;
    __threadfence();
    barrier_finishers();
    if (thread == 0) {
      arrived = atomicAdd(args.counters + unit, 1);
      if (arrived == args.slices - 1) args.counters[unit] = 0;
    }
    barrier_finishers();
    if (arrived == args.slices - 1) {
      __threadfence();
#pragma unroll 1
      for (int i = thread; i < items; i += vector_finishers) {
        float v0 = 0;
        float v1 = 0;
        for (int s = 0; s < args.slices; ++s) {
          const float2 v = __ldcg(parts + s * items + i);
          v0 += v.x;
          v1 += v.y;
        }
        finish(args, unit, i % 16, i / 16, v0, v1);
      }
    }
    barrier_finishers();  // `arrived` may be written again
  }
}

// The finishing warps, after the last unit of phase p: counts the block and waits for all others.
// What they wrote may be read after the barrier of the whole block that follows.
template <class T>
__device__ void meet_blocks(const VectorPhases<T>& all, int p) {
  barrier_finishers();
  if (threadIdx.x != vector_workers) return;
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(all.arrivals + p) : "memory");
  int arrived = 0;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(arrived)
                 : "l"(all.arrivals + p)
                 : "memory");
  } while (arrived < static_cast<int>(gridDim.x));
}
// One thread of each block, when it has met the others for the last time: the last of them puts the
// counters back.
template <class T>
__device__ void leave_blocks(const VectorPhases<T>& all) {
  const int last = static_cast<int>(gridDim.x) - 1;
  if (atomicAdd(all.arrivals + vector_max_phases - 1, 1) != last) return;
  for (int i = 0; i < vector_max_phases; ++i) all.arrivals[i] = 0;
}

// What the finishing warps do in all phases, while the workers put x into shared memory and
// multiply.
template <class T, int kParts>
__device__ void finish_phases(const VectorPhases<T>& all, const unsigned char* shared,
                              VectorMeeting& meeting) {
  int round = 0;
  chain_wait();
  __syncthreads();  // the meeting has begun
#pragma unroll 1
  for (int p = 0; p < phases_of(all); ++p) {
    if (p > 0) {
      meet_blocks(all, p - 1);
      __syncwarp();  // one lane was away
      __syncthreads();
      if (p == phases_of(all) - 1 && threadIdx.x == vector_workers) leave_blocks(all);
    }
    finish_units<T, kParts>(all.phase[p], shared, meeting, round);
  }
}

}  // namespace engine
