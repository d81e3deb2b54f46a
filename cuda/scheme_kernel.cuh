// The kernel behind scheme_product, for a codec of each kind.
#pragma once

#include "cuda/chain.cuh"
#include "cuda/scheme_args.cuh"
#include "cuda/vector_half.cuh"
#include "engine/weight/packed_weight.h"

namespace engine {

// A warp's sums: 16 rows x 8 rows of x as fragment C of m16n8k16 (rows g, g + 8; columns 2t, 2t+1).
using SchemeSums = float[4];

// What all of a warp's lanes know of where they are.
struct SchemeLane {
  int lane, g, t;
  std::uint32_t base;  // of shared memory
  std::uint32_t x;     // lane's place in its row of x, shared memory, column 0
  std::uint32_t sums;  // of the sums of x for its two columns of C, block 0
};

// One record.
struct SchemeRecord {
  const unsigned char* from = nullptr;
  int bytes = 0;
};

// Signs as +1 and -1: bit `bit` of either half of `w`, 1 for +1.
template <class T>
__device__ std::uint32_t sign_pair(std::uint32_t w, int bit) {
  constexpr std::uint32_t one = std::is_same_v<T, __half> ? 0x3c003c00U : 0x3f803f80U;
  std::uint32_t out;  // (~a & b) | c
  asm("lop3.b32 %0, %1, %2, %3, 0xae;"
      : "=r"(out)
      : "r"(w << (15 - bit)), "r"(0x80008000U), "r"(one));
  return out;
}

// part += signs of a record times its 128 columns of x; `plane` and `x` are the lane's.
template <class T>
__device__ void add_signs(SchemeSums& part, std::uint32_t plane, std::uint32_t x) {
  const uint2 words = shared_8(plane);
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const uint4 b = shared_16(x + 64 * u);
    const std::uint32_t w = u < 2 ? words.x : words.y;
    std::uint32_t a[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = sign_pair<T>(w, 8 * (u % 2) + q);
    mma<T>(part, a, b.x, b.y);
#pragma unroll
    for (int q = 0; q < 4; ++q) a[q] = sign_pair<T>(w, 8 * (u % 2) + 4 + q);
    mma<T>(part, a, b.z, b.w);
  }
}

// acc += scale * part + mean * sum; rows g (x) and g + 8 (y).
__device__ inline void add_levels(SchemeSums& acc, const SchemeSums& part, float2 scale,
                                  float2 mean, float2 sum) {
  acc[0] = fmaf(mean.x, sum.x, fmaf(scale.x, part[0], acc[0]));
  acc[1] = fmaf(mean.x, sum.y, fmaf(scale.x, part[1], acc[1]));
  acc[2] = fmaf(mean.y, sum.x, fmaf(scale.y, part[2], acc[2]));
  acc[3] = fmaf(mean.y, sum.y, fmaf(scale.y, part[3], acc[3]));
}

__device__ inline float2 block_sums(const SchemeLane& l, int block) {
  const uint2 v = shared_8(l.sums + 32 * block);
  return {__uint_as_float(v.x), __uint_as_float(v.y)};
}

// Blocks of codec C that one multiprocessor may have.
template <class C>
constexpr int scheme_blocks() {
  if constexpr (requires { C::kShare; }) return C::kShare ? 2 : 1;
  return 1;
}

// Whether C's records are of one size, one after the other, and so need no look() nor locate().
template <class C>
constexpr bool scheme_even() {
  if constexpr (requires { C::kEven; }) return C::kEven;
  return false;
}

// The part that row tile `tile` of all belongs to.
template <class T>
__device__ int part_of_tile(const SchemeArgs<T>& args, int tile) {
  int part = 0;
#pragma unroll
  for (int p = 1; p < scheme_max_parts; ++p) {
    if (p < args.parts && tile >= args.first_tile[p]) part = p;
  }
  return part;
}

// Eight neighbours of a row of x from column c on; 0 beyond the last.
template <class T>
__device__ Pack<T, 8> load_x(const SchemeArgs<T>& args, const T* x, int row, int c) {
  const T* from = x + row * args.x_stride + c;
  if (args.x_vectors && c + 8 <= args.cols) return *reinterpret_cast<const Pack<T, 8>*>(from);
  Pack<T, 8> v;
#pragma unroll
  for (int e = 0; e < 8; ++e) v.v[e] = c + e < args.cols ? from[e] : from_f32<T>(0.0F);
  return v;
}

// Columns of blocks [begin, end) of x into shared memory, by the warp that will use them, in the
// order of columns, with their sums; or, if `order` is given, as its bytes say.
template <class T>
__device__ void stage_scheme_x(const SchemeArgs<T>& args, const void* input, unsigned char* shared,
                               int begin, int end, const unsigned char* order, int lane) {
  const T* x = static_cast<const T*>(input);
  const int chunks = (end - begin) * 16;
  for (int r = 0; r < args.rows; ++r) {
    unsigned char* const to = shared + r * args.x_row_bytes;
    for (int first = 0; first < chunks; first += 32) {
      const int i = first + lane;
      const int c = begin * 128 + 8 * i;
      Pack<T, 8> v;
#pragma unroll
      for (int e = 0; e < 8; ++e) v.v[e] = from_f32<T>(0.0F);
      if (i < chunks && order == nullptr) v = load_x(args, x, r, c);
      if (i < chunks && order != nullptr) {
        const Pack<std::uint8_t, 8> places =
            *reinterpret_cast<const Pack<std::uint8_t, 8>*>(order + c);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int from = c / 128 * 128 + places.v[e];
          if (from < args.cols) v.v[e] = x[r * args.x_stride + from];
        }
      }
      if (i < chunks) *reinterpret_cast<Pack<T, 8>*>(to + c * 2) = v;
      if (order != nullptr) continue;
      float sum = 0;  // sixteen lanes have a block
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += to_f32(v.v[e]);
#pragma unroll
      for (int d = 1; d < 16; d *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, d);
      if (i < chunks && lane % 16 == 0) {
        reinterpret_cast<float*>(shared + args.sum_offset)[c / 128 * scheme_rows + r] = sum;
      }
    }
  }
  __syncwarp();
}

// out[n, r] (+)= sum over k of x[n, k] w[r, k], for up to 8 rows n of x.
//
// Launch: one or two (`shares`) blocks of 512 threads per multiprocessor, through launch_chained. A
// multiprocessor has a run of row tiles (16 rows), two blocks a half of it each; a block's 16 warps
// divide the columns, each streaming its records of one tile after the other through a ring of its
// own (cp.async). Weights are the A operand of m16n8k16
// products. A warp holds its columns of x in shared memory; C (the codec) does the rest with what
// it finds there. The warps' sums meet in shared memory, two buffers in turn, and are added in the
// order of warps: results repeat. Cost: the records once, x once per block.
template <class T, class C>
__global__ void __launch_bounds__(scheme_threads, scheme_blocks<C>())
    scheme_product_kernel(const __grid_constant__ SchemeArgs<T> args) {
  extern __shared__ __align__(256) unsigned char scheme_shared[];  // x: row 0 at multiples of 256
  unsigned char* const shared = scheme_shared;
  chain_trigger();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tiles = args.first_tile[args.parts];
  const unsigned places = gridDim.x / args.shares, run = blockIdx.x % places;
  int first = static_cast<int>(static_cast<std::int64_t>(tiles) * run / places);
  int last = static_cast<int>(static_cast<std::int64_t>(tiles) * (run + 1) / places);
  if (args.shares == 2) (blockIdx.x < places ? last : first) = (first + last + 1) / 2;
  const int begin = args.units * warp / scheme_warps;
  const int end = args.units * (warp + 1) / scheme_warps;

  SchemeLane l;
  l.lane = static_cast<int>(threadIdx.x) % 32;
  l.g = l.lane / 4;
  l.t = l.lane % 4;
  const std::uint32_t base = kept_address(shared);
  l.base = base;
  l.x = base + static_cast<std::uint32_t>(min(l.g, args.rows - 1) * args.x_row_bytes + 16 * l.t);
  l.sums = base + static_cast<std::uint32_t>(args.sum_offset + 8 * l.t);

  unsigned char* const ring = shared + args.ring_offset + warp * args.stages * args.stage_bytes;
  const std::uint32_t ring_address = shared_address(ring);
  const auto ring_end = static_cast<std::uint32_t>(args.stages * args.stage_bytes);
  std::uint32_t fill = 0;  // the stage to fill next, in bytes
  int ask_tile = begin < end ? first : last;
  int ask_unit = begin;
  int ask_part = part_of_tile(args, ask_tile);
  // Where a record lies may itself have to be read: one record ahead, and used then only.
  uint2 place = {0, 0};
  const auto look = [&] {
    if (ask_tile >= last) return;
    place = C::look(args, args.part[ask_part], ask_tile - args.first_tile[ask_part], ask_unit);
  };
  look();
  // Where a codec's records follow each other evenly: the next one.
  constexpr bool even = scheme_even<C>();
  [[maybe_unused]] const unsigned char* ask_from = nullptr;
  const auto aim = [&] {
    const SchemeWeight& w = args.part[ask_part];
    const std::int64_t tile = ask_tile - args.first_tile[ask_part];
    ask_from = w.records + tile * w.tile_bytes + std::int64_t{begin} * args.fixed + 16 * l.lane;
  };
  if constexpr (even) aim();
  const auto request = [&] {
    if (ask_tile < last) {
      const int mine = 16 * l.lane;
      SchemeRecord record;
      if constexpr (even) {
        record = {ask_from - mine, args.fixed};
        ask_from += args.fixed;
      } else {
        record = C::locate(args, args.part[ask_part], ask_tile - args.first_tile[ask_part],
                           ask_unit, place);
      }
      const int bytes = min(record.bytes, args.stage_bytes);
#pragma unroll 1
      for (int i = 0; i < bytes; i += 2048) {
        const std::uint32_t to = ring_address + fill + static_cast<std::uint32_t>(i + mine);
        const unsigned char* from = record.from + i + mine;
#pragma unroll
        for (int c = 0; c < 2048; c += 512) {
          if (i + mine + c < bytes) copy_async_16(to + c, from + c);
        }
      }
      if (++ask_unit == end) {
        ask_unit = begin;
        ask_part = part_of_tile(args, ++ask_tile);
        if constexpr (even) aim();
      }
      look();
    }
    copy_commit();
    fill += static_cast<std::uint32_t>(args.stage_bytes);
    if (fill == ring_end) fill = 0;
  };
  // Two stages before x, which would wait behind more.
  const int early = min(2, args.stages - 1);
#pragma unroll 1
  for (int s = 0; s < early; ++s) request();
  constexpr bool own_input = requires { C::prepare(args, shared); };  // each part has its own x
  if constexpr (own_input) {
    C::prepare(args, shared);
    __syncthreads();
  }
  chain_wait();
  int staged_part = part_of_tile(args, first);
  stage_scheme_x<T>(args, args.part[staged_part].x, shared, begin * C::kBlocks, end * C::kBlocks,
                    C::kOwnOrder ? args.part[staged_part].base + args.order : nullptr, l.lane);
#pragma unroll 1
  for (int s = early; s < args.stages - 1; ++s) request();

  std::uint32_t use = 0;  // the stage to use next, in bytes
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    const int part = part_of_tile(args, tile);
    const SchemeWeight& w = args.part[part];
    const int own_tile = tile - args.first_tile[part];
    if constexpr (C::kOwnOrder || own_input) {
      if (part != staged_part) {
        stage_scheme_x<T>(args, w.x, shared, begin * C::kBlocks, end * C::kBlocks,
                          C::kOwnOrder ? w.base + args.order : nullptr, l.lane);
        staged_part = part;
      }
    }
    C codec;
    if (begin < end) codec.begin_tile(args, w, own_tile, l);
    SchemeSums acc = {0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      if (args.stages == 6) {
        copy_wait<4>();
      } else if (args.stages == 4) {
        copy_wait<2>();
      } else if (args.stages == 3) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncwarp();
      request();
      codec.add(acc, args, w, own_tile, unit, ring + use, l);
      use += static_cast<std::uint32_t>(args.stage_bytes);
      if (use == ring_end) use = 0;
    }
    float* const red = reinterpret_cast<float*>(shared + args.red_offset) +
                       tile % 2 * (scheme_warps * 16 * args.rows);
    float* const mine = red + warp * 16 * args.rows;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int n = 2 * l.t + e % 2;
      if (n < args.rows) mine[n * 16 + l.g + e / 2 * 8] = acc[e];
    }
    __syncwarp();
    codec.finish_tile(args, mine, l);
    __syncthreads();
    const int item = static_cast<int>(threadIdx.x);
    const int row = own_tile * 16 + item % 16;
    if (item < 16 * args.rows && row < w.rows) {
      float sum = 0.0F;
#pragma unroll
      for (int k = 0; k < scheme_warps; ++k) sum += red[k * 16 * args.rows + item];
      const std::int64_t at = item / 16 * w.out_stride + row;
      if (args.out_f32) {
        float* to = static_cast<float*>(w.out) + at;
        *to = args.add ? *to + sum : sum;
      } else {
        T* to = static_cast<T*>(w.out) + at;
        *to = from_f32<T>(args.add ? to_f32(*to) + sum : sum);
      }
    }
  }
}

}  // namespace engine
