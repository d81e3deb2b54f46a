// The kernel behind vector_wide_product: 16 rows of x in the registers of warps, each of which
// keeps to its own columns; blocks of a cluster divide the columns.
#pragma once

#include "cuda/vector_wide_parts.cuh"

namespace engine {

#if __CUDA_ARCH__ >= 900
// Fragments B of 16 rows of x and 128 columns: [8 rows][32 columns][two steps of two registers].
// `at`: the lane's row and columns.
__device__ inline void load_fragments(std::uint32_t (&b)[2][4][4], const unsigned char* at,
                                      int x_row_bytes) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 v = *reinterpret_cast<const uint4*>(at + n * 8 * x_row_bytes + 64 * u);
      b[n][u][0] = v.x;
      b[n][u][1] = v.y;
      b[n][u][2] = v.z;
      b[n][u][3] = v.w;
    }
  }
}

// The finishing warps: add the sums of the block's warps for each unit and send them to the block
// of the cluster that finishes it (the units go round); that one adds those of all blocks in order.
//
// Nothing tells a block that its sums may be overwritten: unit i goes where i - B C went before (B
// buffers, C blocks), and its sender has by then finished a unit j >= i - delay - C of its own. For
// that all blocks had sent unit j, each after it had finished unit j - 1 - delay if it was its own;
// so 2 delay < (B - 1) C is enough.
template <class T>
__device__ void wide_finish(const WideArgs<T>& wide, unsigned char* shared, int rank, int parts) {
  const VectorArgs<T>& args = wide.v;
  const int thread = static_cast<int>(threadIdx.x) - wide_workers;
  const int lane = thread % 32;
  // The thread's products of a unit: row `row` of both tiles with rows n and n + 1 of x.
  const int row = lane / 4 + thread / 64 * 8;
  const int n = thread / 32 % 2 * 8 + lane % 4 * 2;
  const int place = (thread / 32 % 2 * 32 + lane) * 16 + thread / 64 * 8;
  const std::uint32_t base = shared_address(shared);
  const int first_unit = static_cast<int>(blockIdx.x) / wide.cluster;
  const int count = (args.units - first_unit + wide.clusters - 1) / wide.clusters;
  int red = 0;
  std::uint32_t red_phase = 0;
  int owner = 0;  // of unit i, and the buffer there
  int to = 0;
  int due = -wide.delay;  // the unit to finish
  int due_owner = (wide.cluster - wide.delay) % wide.cluster;
  int got = 0;
  std::uint32_t got_phase = 0;
#pragma unroll 1
  for (int i = 0; i < count + wide.delay; ++i) {
    const bool mine = due >= 0 && due_owner == rank;
    const int unit = first_unit + due * wide.clusters;
    // Sums start from what they are added to, which is read while the workers multiply.
    float old[2][2] = {{0.0F, 0.0F}, {0.0F, 0.0F}};
    if (mine && args.epilogue == VectorEpilogue::add) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (n + e < args.rows) old_pair(args, unit, 16 * (n + e) + row, old[e]);
      }
    }
    if (i < count) {
      bulk_wait(base + wide_red_full + 8 * red, red_phase);
      const float4* from = reinterpret_cast<const float4*>(shared + args.red_offset) +
                           (red * 2 + thread / 64) * parts * 64 + thread % 64;
      float4 sum = from[0];
#pragma unroll 4
      for (int p = 1; p < parts; ++p) {
        const float4 v = from[p * 64];
        sum.x += v.x;
        sum.y += v.y;
        sum.z += v.z;
        sum.w += v.w;
      }
      const auto place_there = static_cast<std::uint32_t>(
          wide.part_offset + (to * wide.cluster + rank) * wide_unit_bytes + thread * 16);
      const auto at = static_cast<std::uint32_t>(owner);
      peer_send(peer_address(base + place_there, at), sum,
                peer_address(base + wide_part_full + 8 * to, at));
      count_arrive(base + wide_red_free + 8 * red, lane);
      if (++red == wide.red_buffers) {
        red = 0;
        red_phase ^= 1;
      }
      if (++owner == wide.cluster) {
        owner = 0;
        if (++to == wide.part_buffers) to = 0;
      }
    }
    if (mine) {
      const std::uint32_t barrier = base + wide_part_full + 8 * got;
      peer_wait(barrier, got_phase);
      // The next unit in this buffer.
      if (thread == 0) bulk_expect(barrier, wide.cluster * wide_unit_bytes);
      const unsigned char* from =
          shared + wide.part_offset + got * wide.cluster * wide_unit_bytes + place;
#pragma unroll 1
      for (int c = 0; c < wide.cluster; ++c) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float2 v =
              *reinterpret_cast<const float2*>(from + c * wide_unit_bytes + tile * wide_part_bytes);
          old[0][tile] += v.x;
          old[1][tile] += v.y;
        }
      }
#pragma unroll 1
      for (int e = 0; e < 2; ++e) {
        if (n + e < args.rows) {
          finish(args, unit, row, n + e, e == 0 ? old[0][0] : old[1][0],
                 e == 0 ? old[0][1] : old[1][1]);
        }
      }
      __syncwarp();
      if (++got == wide.part_buffers) {
        got = 0;
        got_phase ^= 1;
      }
    }
    ++due;
    if (++due_owner == wide.cluster) due_owner = 0;
  }
}
#endif  // sm_90

// out[n, r] = sum over k of x[n, k] w[r, k], for up to 16 rows n of x.
//
// Launch: clusters of wide.cluster blocks, 640 threads, one block per multiprocessor; sm_90. A
// cluster walks over units (pairs of row tiles, find_tile()); its blocks divide the columns, and so
// do the sixteen working warps of a block: two to a block of 128 columns, one for each tile of a
// unit (wide.halves), or one for both tiles. A warp whose columns are one block keeps its fragments
// of x in registers for the whole launch, so that all it reads are records. They come by the copy
// engine through a ring of the warp's own, which is begun while the preceding kernel of the chain
// is still running. Weights are the A operand of m16n8k16 products, straight from the codes, scaled
// once per group as in vector_half_kernel. Sums of warps meet in shared memory, where four other
// warps add them and send them to the block that finishes the unit (wide_finish()). Sums of squares
// for the norm are exchanged in the cluster. No order depends on timing, so results repeat.
// Preconditions: x_row_bytes = 64 mod 128; blocks of columns >= cluster; sizes as
// vector_wide_product makes them. Cost: the weights read once; x once per cluster; about 180
// instructions per record of 4 bits and warp.
template <class T, class C, int kMode>
__global__ void __launch_bounds__(wide_threads, 1)
    vector_wide_kernel(const __grid_constant__ WideArgs<T> wide) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  using M = HalfMagic<T>;
  constexpr bool kPlain = kMode == wide_plain;
  constexpr bool kFine = kMode == wide_fine;
  chain_trigger();
  const VectorArgs<T>& args = wide.v;
  // Plain: sizes are constants.
  const int record_bytes = kPlain ? C::kCodeBytes + 48 : args.record_bytes;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // From one lane to all: the compiler then knows that it is the same for the whole warp.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int rank = static_cast<int>(cluster_rank());
  const int slice_begin = args.blocks * rank / wide.cluster;
  const int slice_blocks = args.blocks * (rank + 1) / wide.cluster - slice_begin;
  const int parts = min(slice_blocks, wide.halves ? wide_warps / 2 : wide_warps);
  const std::uint32_t base = shared_address(shared);
  if (warp >= wide_warps) {
    if (warp == wide_warps && lane == 0) {
      for (int i = 0; i < wide.red_buffers; ++i) {
        count_init(base + wide_red_full + 8 * i, wide.halves ? 2 * parts : parts);
        count_init(base + wide_red_free + 8 * i, wide_finishers / 32);
      }
      for (int i = 0; i < wide.part_buffers; ++i) {
        count_init(base + wide_part_full + 8 * i, 1);
      }
      bulk_fence();
      for (int i = 0; i < wide.part_buffers; ++i) {
        bulk_expect(base + wide_part_full + 8 * i, wide.cluster * wide_unit_bytes);
      }
    }
    __syncwarp();
    cluster_arrive();  // the barriers exist
    chain_wait();
    cluster_wait();
    if (args.norm != nullptr) {
      cluster_arrive();
      cluster_wait();
    }
    __syncthreads();  // x is there
    __syncthreads();  // and in the registers
    wide_finish(wide, shared, rank, parts);
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    return;
  }

  const int g = lane / 4;
  const int t = lane % 4;
  const int part = wide.halves ? warp / 2 : warp;
  const bool active = part < parts;
  const int stride = wide.halves ? wide_warps / 2 : wide_warps;
  const int ring_warp = min(warp, wide.rings - 1);
  const std::uint32_t barriers = base + static_cast<std::uint32_t>(warp * wide_max_stages * 8);
  const auto ring_end = static_cast<std::uint32_t>(args.stages * record_bytes);
  const int ring = args.ring_offset + ring_warp * args.stages * record_bytes;
  if (lane == 0) {
    for (int s = 0; s < args.stages; ++s) bulk_init(barriers + 8 * s);
    bulk_fence();
  }
  __syncwarp();
  cluster_arrive();
  WideSource<T> source;
  source.unit = active ? static_cast<int>(blockIdx.x) / wide.cluster : args.units;
  source.half_begin = source.half = wide.halves ? warp % 2 : 0;
  source.half_end = wide.halves ? source.half_begin + 1 : 2;
  source.blocks = active ? (slice_blocks - part + stride - 1) / stride : 0;
  const int half_begin = source.half_begin;
  const int half_end = source.half_end;
  const int my_blocks = source.blocks;
  source.aim(wide, slice_begin + part);
  // The stage to use and then to fill again, in bytes.
  std::uint32_t use = 0;
  std::uint32_t use_barrier = 0;
  const auto request = [&] {
    if (source.unit < args.units) {
      if (elect()) {
        bulk_expect(barriers + use_barrier, record_bytes);
        bulk_copy(base + static_cast<std::uint32_t>(ring) + use, source.from(record_bytes),
                  record_bytes, barriers + use_barrier);
      }
      source.advance(wide, slice_begin + part);
    }
    use_barrier += 8;
    use += static_cast<std::uint32_t>(record_bytes);
    if (use == ring_end) use = use_barrier = 0;
  };
  unsigned char* x = shared + wide.x_offset;
  {
    WideRow<T> x_row;
    x_row.begin(args, warp, lane, slice_begin * 128, (slice_begin + slice_blocks) * 128);
#pragma unroll 1
    for (int s = 0; s < wide.early; ++s) request();
    chain_wait();
    x_row.load_all(args);
#pragma unroll 1
    for (int s = wide.early; s < args.stages; ++s) request();
    __syncwarp();
    cluster_wait();
    float inverse = 1.0F;
    if (args.norm != nullptr) {
      const float sum = x_row.squares(args);
      if (lane < wide.cluster) {
        const auto place = static_cast<std::uint32_t>(wide_squares + (rank * 16 + warp) * 4);
        peer_store(peer_address(base + place, static_cast<std::uint32_t>(lane)), sum);
      }
      __syncwarp();
      cluster_arrive();
      cluster_wait();
      float all = 0;
      for (int c = 0; c < wide.cluster; ++c) {
        all += *reinterpret_cast<const float*>(shared + wide_squares + (c * 16 + warp) * 4);
      }
      inverse = 1.0F / sqrtf(all / static_cast<float>(args.cols) + args.eps);
    }
    x_row.put(args, x, inverse);
  }
  __syncthreads();

  const unsigned char* x_at = x + g * args.x_row_bytes + part * 256 + 16 * t;
  const unsigned char* sum_at = shared + args.sum_offset + part * wide_sum_bytes + 16 * t;
  std::uint32_t b[2][4][4];
#pragma unroll 1
  for (int k = 0; k < my_blocks; ++k) {
    load_fragments(b, x_at + k * stride * 256, args.x_row_bytes);
    if (half_begin != 0) continue;
    // Sums of x as products with ones: they come out where lanes need them.
    const std::uint32_t one = pack2<T>(1.0F, 1.0F);
    const std::uint32_t ones[4] = {one, one, one, one};
    float sum[2][4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (u == 0 || kFine) clear(sum);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma<T>(sum[n], ones, b[n][u][0], b[n][u][1]);
        mma<T>(sum[n], ones, b[n][u][2], b[n][u][3]);
      }
      if ((u == 3 || kFine) && g == 0) {
        *reinterpret_cast<float4*>(const_cast<unsigned char*>(sum_at) +
                                   k * stride * wide_sum_bytes + (kFine ? u : 0) * 64) = {
            sum[0][0], sum[0][1], sum[1][0], sum[1][1]};
      }
    }
  }
  __syncthreads();  // sums of warps may come to lie where x was

  int red = 0;
  std::uint32_t red_phase = 0;
  std::uint32_t phase = 0;  // parity of the stages' next arrivals
  const int units = active ? args.units : 0;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x) / wide.cluster; unit < units;
       unit += wide.clusters) {
#pragma unroll 1
    for (int half = half_begin; half < half_end; ++half) {
      [[maybe_unused]] const unsigned char* row_unit = nullptr;
      if (kMode == wide_coarse && args.units_per_record == 0) {
        int segment = 0;
        int tile = 0;
        find_tile(args, unit, half, segment, tile);
        const VectorWeight<T>& w = args.weight[segment];
        row_unit = w.row_units + std::int64_t{min(tile, w.tiles - 1)} * args.unit_bytes;
      }
      float acc[2][4];
      clear(acc);
#pragma unroll 1
      for (int k = 0; k < my_blocks; ++k) {
        if (!wide.kept) load_fragments(b, x_at + k * stride * 256, args.x_row_bytes);
        bulk_wait(barriers + use_barrier, phase);
        const std::uint32_t at = base + static_cast<std::uint32_t>(ring + lane * 16) + use;
        const unsigned char* coefficients = shared + ring + use + C::kCodeBytes;
        std::uint32_t low[2 * C::kLow];
        [[maybe_unused]] std::uint32_t high[C::kHigh > 0 ? 2 * C::kHigh : 1];
        float product[2][4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          load_code_plane<C::kLow>(at, lane, u, low);
          if constexpr (C::kHigh > 0) load_code_plane<C::kHigh>(at + 256 * C::kLow, lane, u, high);
          if (u == 0 || kFine) clear(product);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const int p = (2 * u + s) * 4;
            std::uint32_t a[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) a[q] = half_pair_bits<C::kLow, 0>(low, p + q, M::kLow);
#pragma unroll
            for (int n = 0; n < 2; ++n) mma<T>(product[n], a, b[n][u][2 * s], b[n][u][2 * s + 1]);
            if constexpr (C::kHigh > 0) {
#pragma unroll
              for (int q = 0; q < 4; ++q) {
                a[q] = half_pair_bits<C::kHigh, M::kHighUp>(high, p + q, M::kHigh);
              }
#pragma unroll
              for (int n = 0; n < 2; ++n) mma<T>(product[n], a, b[n][u][2 * s], b[n][u][2 * s + 1]);
            }
          }
          if (u != 3 && !kFine) continue;
          constexpr float offset = M::kLowOffset + (C::kHigh > 0 ? M::kHighOffset : 0.0F);
          int index = 0;
          if constexpr (kFine) index = args.units_per_record == 4 ? u : u / 2;
          const float4 v = *reinterpret_cast<const float4*>(sum_at + k * stride * wide_sum_bytes +
                                                            (kFine ? u : 0) * 64);
          const float sum[2][2] = {{v.x, v.y}, {v.z, v.w}};
          float2 scale;
          float2 zero;
          if constexpr (kPlain) {
            scale = __half22float2(*reinterpret_cast<const __half2*>(coefficients + 4 * g));
            const uchar2 z = *reinterpret_cast<const uchar2*>(coefficients + 32 + 2 * g);
            zero = {static_cast<float>(z.x), static_cast<float>(z.y)};
          } else if (!kFine && args.units_per_record == 0) {
            load_unit(args, row_unit, 2 * g, scale, zero);
          } else {
            load_unit(args, coefficients + index * args.unit_bytes, 2 * g, scale, zero);
          }
          zero.x += offset;
          zero.y += offset;
          add_scaled(acc, product, sum, scale, zero, M::kUnit);
        }
        __syncwarp();  // all lanes have left the stage
        request();
        if (use == 0) phase ^= 1;
      }
      if (half == half_begin) bulk_wait(base + wide_red_free + 8 * red, red_phase ^ 1);
      float4* to = reinterpret_cast<float4*>(shared + args.red_offset) +
                   ((red * 2 + half) * parts + part) * 64 + lane;
      to[0] = {acc[0][0], acc[0][1], acc[0][2], acc[0][3]};
      to[32] = {acc[1][0], acc[1][1], acc[1][2], acc[1][3]};
    }
    count_arrive(base + wide_red_full + 8 * red, lane);
    if (++red == wide.red_buffers) {
      red = 0;
      red_phase ^= 1;
    }
  }
  // No block leaves while others may still send to it.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#else
  __trap();  // vector_wide_fits() says no
#endif
}

template <class T, class C>
WideKernel<T> pick_wide(int mode) {
  if (mode == wide_plain) return vector_wide_kernel<T, C, wide_plain>;
  return mode == wide_coarse ? vector_wide_kernel<T, C, wide_coarse>
                             : vector_wide_kernel<T, C, wide_fine>;
}

// Each width is instantiated in a file of its own, which keeps compilation short.
template <class T>
WideKernel<T> wide_kernel_2(int mode);
template <class T>
WideKernel<T> wide_kernel_3(int mode);
template <class T>
WideKernel<T> wide_kernel_4(int mode);
template <class T>
WideKernel<T> wide_kernel_8(int mode);

}  // namespace engine
