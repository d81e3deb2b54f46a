// Instructions that the kernels behind vector_product are made of: copies into shared memory, reads
// of codes and coefficients there, barriers.
#pragma once

#include "cuda/attn_mma.cuh"
#include "cuda/types.cuh"
#include "cuda/vector_args.cuh"

namespace engine {

// Barriers of the working warps, and of the finishing ones. A diverged warp would be counted once
// for each of its parts, so it meets first.
constexpr int barrier_of_finishers = 1;
constexpr int barrier_of_workers = 2;
__device__ inline void barrier_finishers() {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"n"(barrier_of_finishers), "n"(vector_finishers) : "memory");
}
__device__ inline void barrier_workers() {
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"n"(barrier_of_workers), "n"(vector_workers) : "memory");
}

__device__ inline void copy_async_16(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ inline void copy_async_8(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

// A shared-memory address that the compiler keeps instead of computing it at each use.
__device__ inline std::uint32_t kept_address(const void* p) {
  std::uint32_t a = shared_address(p);
  asm volatile("" : "+r"(a));
  return a;
}
__device__ inline uint4 shared_16(std::uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
__device__ inline uint2 shared_8(std::uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
__device__ inline std::uint32_t shared_4(std::uint32_t at) {
  std::uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
__device__ inline float shared_float(std::uint32_t at) { return __uint_as_float(shared_4(at)); }
__device__ inline std::uint32_t shared_2(std::uint32_t at) {
  std::uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

// The words of a plane of B bits that the steps of columns 32 u .. 32 u + 31 need beyond those of
// the steps before: chunks of 512 bytes, then one of 256 if B is odd. A plane of 4 bits comes in
// halves, which saves registers. `at` is the lane's place in the first chunk, in shared memory.
template <int B>
__device__ void load_code_plane(std::uint32_t at, int lane, int u, std::uint32_t (&w)[2 * B]) {
  if (B == 4 ? u % 2 != 0 : u != 0) return;
#pragma unroll
  for (int c = 0; c < B / 2; ++c) {
    if (B == 4 && c != u / 2) continue;
    const uint4 v = shared_16(at + c * 512);
    w[4 * c] = v.x;
    w[4 * c + 1] = v.y;
    w[4 * c + 2] = v.z;
    w[4 * c + 3] = v.w;
  }
  if constexpr (B % 2 == 1) {
    const uint2 v = shared_8(at + B / 2 * 512 - lane * 8);
    w[2 * B - 2] = v.x;
    w[2 * B - 1] = v.y;
  }
}
template <int B>
__device__ void request_plane(std::uint32_t to, const unsigned char* from, int lane) {
#pragma unroll
  for (int c = 0; c < B / 2; ++c) copy_async_16(to + c * 512, from + c * 512);
  if constexpr (B % 2 == 1) {
    copy_async_8(to + B / 2 * 512 - lane * 8, from + B / 2 * 512 - lane * 8);
  }
}

// Two scales (rows g and g + 8) at `unit`, as f32.
__device__ inline float2 load_scale_pair(const unsigned char* unit, int kind, int place) {
  if (kind == 0) return *reinterpret_cast<const float2*>(unit + place * 4);
  const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(unit + place * 2);
  if (kind == 1) return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000U)};
}

// Scale and zero of rows g and g + 8 of one term of a unit, whose bytes are at `unit`.
template <class T>
__device__ void load_unit(const VectorArgs<T>& args, const unsigned char* unit, int place,
                          float2& scale, float2& zero) {
  scale = load_scale_pair(unit, args.scale_kind, place);
  zero = {args.constant_zero, args.constant_zero};
  if (args.zero_offset != 0) {
    const uchar2 z = *reinterpret_cast<const uchar2*>(unit + args.zero_offset + place);
    zero = {static_cast<float>(z.x), static_cast<float>(z.y)};
  }
}

// Copies of whole records by the copy engine (sm_90): one lane asks, a barrier in shared memory
// counts the bytes that arrive.
#if __CUDA_ARCH__ >= 900
__device__ inline void bulk_init(std::uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void bulk_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// True in one lane of a whole warp. Where the compiler sees it (and not `lane == 0`), it knows that
// one lane asks, and leaves out a loop over lanes that waits for the copy engine each time.
__device__ inline bool elect() {
  std::uint32_t yes;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(yes));
  return yes != 0;
}
__device__ inline void bulk_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_copy(std::uint32_t to, const void* from, int bytes,
                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ inline void bulk_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

}  // namespace engine
