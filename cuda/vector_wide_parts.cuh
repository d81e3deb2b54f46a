// The pieces of vector_wide_kernel: its arguments, what blocks of a cluster say to each other, the
// stream of a warp's records, the way of x into shared memory.
#pragma once

#include "cuda/vector_half.cuh"

namespace engine {

constexpr int wide_warps = 16;  // that multiply
constexpr int wide_workers = wide_warps * 32;
constexpr int wide_finishers = 128;  // one for each four sums of a unit
constexpr int wide_threads = wide_workers + wide_finishers;
constexpr int wide_max_cluster = 8;
constexpr int wide_max_stages = 14;
constexpr int wide_max_red = 4;
constexpr int wide_max_parts = 3;
constexpr int wide_held = 8;            // packs of x that a lane keeps while a row is staged
constexpr int wide_unit_bytes = 2048;   // sums of a unit: 2 tiles of 16 x 16 f32
constexpr int wide_part_bytes = 1024;   // those of a tile
constexpr int wide_sum_bytes = 4 * 64;  // sums of x over the columns of a record

// The start of shared memory: barriers, then sums of squares [block of the cluster][row].
constexpr int wide_red_full = wide_warps * wide_max_stages * 8;
constexpr int wide_red_free = wide_red_full + wide_max_red * 8;
constexpr int wide_part_full = wide_red_free + wide_max_red * 8;
constexpr int wide_squares = 1920;
constexpr int wide_header = wide_squares + wide_max_cluster * 16 * 4 + 128;  // 2560
static_assert(wide_part_full + wide_max_parts * 8 <= wide_squares && wide_header % 128 == 0);

constexpr int wide_plain = 0;   // groups of 128 columns or more, f16 scales, zeros
constexpr int wide_coarse = 1;  // other scales, or units by row
constexpr int wide_fine = 2;    // groups of 32 or 64 columns

template <class T>
struct WideArgs {
  VectorArgs<T> v;
  std::int64_t tile_bytes;        // records of a row tile
  std::int64_t unit_bytes;        // from a unit of a cluster to its next one
  int cluster;                    // blocks that divide the columns
  int clusters;                   // of the grid
  int red_buffers;                // units whose sums may wait in a block
  int part_buffers, part_offset;  // the same of those that come from the blocks of the cluster
  int x_offset;
  int delay;  // units by which a block finishes its own ones later
  int rings;  // warps of a block that may have work
  // Stages to ask for before the preceding kernel is done. An argument, because the compiler makes
  // a second copy of the code, with spills, for a constant.
  int early;
  bool halves;  // a warp multiplies one tile of a unit, else both
  bool kept;    // a warp has one block of columns only
};

template <class T>
using WideKernel = void (*)(const WideArgs<T>);

#if __CUDA_ARCH__ >= 900
__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Two halves of a barrier of all threads of the cluster; whole warps.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address in block `rank` of the cluster of what lies at `address` in this one.
__device__ inline std::uint32_t peer_address(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ inline void peer_store(std::uint32_t address, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
// Stores 16 bytes at a peer, whose barrier counts them when they have arrived.
__device__ inline void peer_send(std::uint32_t address, float4 v, std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::
          "r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}
// As bulk_wait(), for what other blocks of the cluster have sent.
__device__ inline void peer_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void count_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// By whole warps: what all their lanes have done before is seen by those that wait.
__device__ inline void count_arrive(std::uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  __syncwarp();
}

// The records of a warp in the order of use: units of the cluster; tiles of the unit; the warp's
// blocks of columns.
template <class T>
struct WideSource {
  const unsigned char* base[2];  // the warp's first record in the tiles of the unit
  int unit;                      // at or beyond args.units: no more
  int half, half_begin, half_end;
  int block = 0, blocks;  // the next of the warp's blocks of columns, and their number
  int run = 0;            // units that follow each other by wide.unit_bytes, this one included

  __device__ void aim(const WideArgs<T>& wide, int first_block) {
    const VectorArgs<T>& args = wide.v;
    if (unit >= args.units) return;
    int segment = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int tile = 0;
      find_tile(args, unit, h, segment, tile);
      const VectorWeight<T>& w = args.weight[segment];
      // A tile beyond the last is read as the last; finish() drops its rows.
      base[h] = w.data + min(tile, w.tiles - 1) * wide.tile_bytes +
                std::int64_t{first_block} * args.record_bytes;
    }
    if (args.epilogue == VectorEpilogue::silu) {
      run = (args.units - unit + wide.clusters - 1) / wide.clusters;
      return;
    }
    int local = unit;
    if (segment > 0) local -= args.segment_units[0];
    if (segment > 1) local -= args.segment_units[1];
    const int whole = args.weight[segment].tiles / 2;  // units of two tiles
    run = local < whole ? (whole - local + wide.clusters - 1) / wide.clusters : 1;
    if (args.epilogue == VectorEpilogue::qkv && segment < 2 &&
        (wide.clusters & ((1 << args.half_shift) - 1)) != 0) {
      run = 1;
    }
  }
  [[nodiscard]] __device__ const unsigned char* from(int record_bytes) const {
    return (half == 0 ? base[0] : base[1]) + block * wide_warps * record_bytes;
  }
  __device__ void advance(const WideArgs<T>& wide, int first_block) {
    if (++block < blocks) return;
    block = 0;
    if (++half < half_end) return;
    half = half_begin;
    unit += wide.clusters;
    if (--run > 0) {
      base[0] += wide.unit_bytes;
      base[1] += wide.unit_bytes;
    } else {
      aim(wide, first_block);
    }
  }
};

// The part of row `row` of x that lies in the block's columns [c0, c1): a warp loads it, normalizes
// it if asked and puts it into shared memory. Rows beyond x are zeros.
template <class T>
struct WideRow {
  uint4 held[wide_held];  // as words: the compiler would keep elements apart
  uint4 weight[wide_held / 2];
  const T* from;
  int row, first, c0, c1;
  bool mine, keep;

  __device__ static uint4 load(const T* from, int c, int end) {
    uint4 out{};
    if (c < end) out = *reinterpret_cast<const uint4*>(from + c);
    return out;
  }
  // Converted once for squares() and once more later: all of it as f32 would not fit in registers.
  __device__ static Pack<T, 8> unpack(const uint4& v) {
    const uint4 words = {opaque(v.x), opaque(v.y), opaque(v.z), opaque(v.w)};
    return *reinterpret_cast<const Pack<T, 8>*>(&words);
  }
  // Before chain_wait(): the norm's weights do not change.
  __device__ void begin(const VectorArgs<T>& args, int warp, int lane, int begin, int end) {
    row = warp;
    mine = row < args.rows;
    keep = mine && args.wide;
    from = args.x + row * args.x_stride;
    c0 = begin;
    c1 = end;
    first = c0 + lane * 8;
    if (keep && args.norm != nullptr) {
#pragma unroll
      for (int k = 0; k < wide_held / 2; ++k) {
        weight[k] = load(args.norm, first + 256 * k, min(c1, args.cols));
      }
    }
  }
  __device__ void load_all(const VectorArgs<T>& args) {
    if (!keep) return;
#pragma unroll
    for (int k = 0; k < wide_held; ++k) held[k] = load(from, first + 256 * k, min(c1, args.cols));
  }
  // The sum of the squares in the block's columns, in all lanes.
  __device__ float squares(const VectorArgs<T>& args) const {
    float sum = 0;
    if (mine) {
      const auto add = [&](const Pack<T, 8>& p) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_f32(p.v[e]) * to_f32(p.v[e]);
      };
      if (keep) {
#pragma unroll
        for (int k = 0; k < wide_held; ++k) add(unpack(held[k]));  // zeros beyond the columns
      }
#pragma unroll 1
      for (int c = first + (keep ? 256 * wide_held : 0); c < c1; c += 256) {
        add(load_x(args, from, c));
      }
    }
    return warp_reduce(sum, SumOp{});
  }
  __device__ void put(const VectorArgs<T>& args, unsigned char* x, float inverse) const {
    unsigned char* to = x + row * args.x_row_bytes - c0 * 2;
    const bool normed = args.norm != nullptr;
    const auto one = [&](Pack<T, 8> p, const Pack<T, 8>& w, int c) {
      if (normed && mine) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          p.v[e] = from_f32<T>(round_through<T>(to_f32(p.v[e]) * inverse) * to_f32(w.v[e]));
        }
      }
      *reinterpret_cast<Pack<T, 8>*>(to + c * 2) = p;
    };
    if (keep) {
#pragma unroll
      for (int k = 0; k < wide_held; ++k) {
        const int c = first + 256 * k;
        if (k < wide_held / 2) {
          if (c < c1) one(unpack(held[k]), unpack(weight[k % (wide_held / 2)]), c);
        } else if (c < c1) {
          uint4 w{};
          if (normed) w = load(args.norm, c, args.cols);
          one(unpack(held[k]), unpack(w), c);
        }
      }
    }
#pragma unroll 1
    for (int c = first + (keep ? 256 * wide_held : 0); c < c1; c += 256) {
      Pack<T, 8> p{};
      Pack<T, 8> w{};
      if (mine) p = load_x(args, from, c);
      if (mine && normed) w = load_x(args, args.norm, c);
      one(p, w, c);
    }
  }
};
#endif  // sm_90

}  // namespace engine
