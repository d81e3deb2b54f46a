// Butterflies over few rows: bound by the bytes of their rotations.
#include <algorithm>
#include <bit>

#include "cuda/any_float.cuh"
#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/rotate.h"

namespace engine {
namespace {

constexpr int threads = 128;
constexpr int held = 8;  // packs of 8 elements that a thread holds of the rotations
constexpr int enough_blocks = 264;

// One of two stages: out[place(i, b)] = sum over k of M_b(i, k) in[place(k, b)], with
// place(k, b) = k * step + b * batch_step.
struct StagePart {
  const __half* matrices;       // [p, p] each
  const float* diagonal;        // of the input, or null
  const std::int32_t* gather;   // where place p of the input is, or null
  const std::int32_t* scatter;  // where place p of the output goes, or null
  const void* in;
  void* out;
  std::int64_t in_stride, out_stride, matrix_stride;
  DType in_dtype, out_dtype;
  int p, batches, step, batch_step;
  int log_lanes;  // of a warp for a row of a matrix
  int turns;      // rows for each group of lanes
  int blocks;     // for a matrix
  bool vectors;   // rows of the matrices start at multiples of 16 bytes
};
struct StageArgs {
  StagePart part[rotate_max_parts];
  int rows;  // of the input
  bool add;
  float factor;
};

// Blocks that a multiprocessor shall have room for: bytes on their way.
constexpr int resident(int rows, int packs) { return packs == 4 ? 1 : rows == 1 ? 5 : 3; }

// sum += two elements of a matrix times a and b.
__device__ inline void add_pair(float& sum, std::uint32_t two, float a, float b) {
  const float2 w = __half22float2(*reinterpret_cast<const __half2*>(&two));
  sum = fmaf(w.y, b, fmaf(w.x, a, sum));
}

// Launch: blockIdx.y is the part; a block has some rows of one matrix, which its threads hold in
// registers, and multiplies all inputs with them, kRows at a time from shared memory. The matrix
// and the places of inputs and outputs are asked for before the input is there. A group of lanes
// adds up one element in a fixed order. A lane has kPacks packs of up to kTurns rows.
template <int kRows, int kPacks, int kTurns>
__global__ void __launch_bounds__(threads, resident(kRows, kPacks))
    butterfly_stage_kernel(const __grid_constant__ StageArgs args) {
  constexpr int most = kRows < 4 ? 4 / kRows : 1;
  constexpr int together = kTurns < most ? kTurns : most;  // turns side by side
  extern __shared__ __align__(16) float values[];
  chain_trigger();
  const StagePart& s = args.part[blockIdx.y];
  const int batch = static_cast<int>(blockIdx.x) / s.blocks;
  const bool mine = batch < s.batches;
  const int t = static_cast<int>(threadIdx.x);
  const int lanes = 1 << s.log_lanes, within = t & (lanes - 1);
  const int groups = threads >> s.log_lanes;
  const int first =
      (static_cast<int>(blockIdx.x) - batch * s.blocks) * groups * s.turns + (t >> s.log_lanes);
  uint4 m[kTurns][kPacks];
  const auto load = [&](auto&& pack_at) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = first + turn * groups;
      const __half* from =
          s.matrices + batch * s.matrix_stride + static_cast<std::int64_t>(row) * s.p;
#pragma unroll
      for (int q = 0; q < kPacks; ++q) {
        const int col = ((q << s.log_lanes) + within) * 8;
        m[turn][q] = {0, 0, 0, 0};
        if (mine && turn < s.turns && row < s.p && col < s.p) m[turn][q] = pack_at(from, col);
      }
    }
  };
  if (s.vectors) {
    load([](const __half* from, int col) {
      return __ldg(reinterpret_cast<const uint4*>(from + col));
    });
  } else {
    load([&](const __half* from, int col) {
      std::uint32_t half[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) half[e] = col + e < s.p ? __half_as_ushort(from[col + e]) : 0U;
      return uint4{half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16,
                   half[6] | half[7] << 16};
    });
  }
  // Where the inputs of column t, t + 128, ... are, and what they are multiplied with.
  constexpr int columns = 2 * kPacks;
  const int padded = (s.p + 7) / 8 * 8;
  int source[columns];
  float diagonal[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    const int k = t + j * threads;
    const int place = k * s.step + batch * s.batch_step;
    source[j] = place;
    diagonal[j] = 0.0F;
    if (mine && k < s.p) {
      if (s.gather != nullptr) source[j] = s.gather[place];
      diagonal[j] = s.diagonal == nullptr ? 1.0F : s.diagonal[source[j]];
    }
  }
  int target[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int row = first + turn * groups;
    const bool wanted = mine && within == 0 && turn < s.turns && row < s.p;
    target[turn] = wanted ? row * s.step + batch * s.batch_step : -1;
    if (wanted && s.scatter != nullptr) target[turn] = s.scatter[target[turn]];
  }
  chain_wait();
  if (!mine) return;
  for (int row0 = 0; row0 < args.rows; row0 += kRows) {
    if (row0 > 0) __syncthreads();
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int k = t + j * threads;
      if (k >= padded) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v = 0.0F;
        if (k < s.p && row0 + r < args.rows) {
          v = load_any(s.in, s.in_dtype, (row0 + r) * s.in_stride + source[j]) * diagonal[j];
        }
        values[r * padded + k] = v;
      }
    }
    __syncthreads();
#pragma unroll
    for (int base = 0; base < kTurns; base += together) {
      if (base >= s.turns) break;
      float old[together][kRows] = {}, sum[together][kRows] = {};
      if (args.add) {
#pragma unroll
        for (int i = 0; i < together; ++i) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (target[base + i] < 0 || row0 + r >= args.rows) continue;
            old[i][r] = load_any(s.out, s.out_dtype, (row0 + r) * s.out_stride + target[base + i]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < kPacks; ++q) {
        const int col = ((q << s.log_lanes) + within) * 8;
        if (col >= s.p) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 a = *reinterpret_cast<const float4*>(values + r * padded + col);
          const float4 b = *reinterpret_cast<const float4*>(values + r * padded + col + 4);
#pragma unroll
          for (int i = 0; i < together; ++i) {
            const uint4& w = m[base + i][q];
            add_pair(sum[i][r], w.x, a.x, a.y);
            add_pair(sum[i][r], w.y, a.z, a.w);
            add_pair(sum[i][r], w.z, b.x, b.y);
            add_pair(sum[i][r], w.w, b.z, b.w);
          }
        }
      }
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        if (d >= lanes) break;
#pragma unroll
        for (int i = 0; i < together; ++i) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            sum[i][r] += __shfl_xor_sync(0xffffffffU, sum[i][r], d);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < together; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (target[base + i] < 0 || row0 + r >= args.rows) continue;
          const float v = args.factor * sum[i][r];
          store_any(s.out, s.out_dtype, (row0 + r) * s.out_stride + target[base + i],
                    args.add ? old[i][r] + v : v);
        }
      }
    }
  }
}

// What follows from the size of the matrices, with so many packs for a lane.
void divide(StagePart& s, int packs) {
  const int columns = static_cast<int>(ceil_div(s.p, 8 * packs));
  s.log_lanes = std::min(5, static_cast<int>(std::bit_width(static_cast<unsigned>(columns - 1))));
  const int groups = threads >> s.log_lanes;
  s.turns = std::min(held / packs, static_cast<int>(ceil_div(s.p, groups)));
  const auto blocks = [&] { return static_cast<int>(ceil_div(s.p, groups * s.turns)); };
  while (s.turns > 1 && s.batches * blocks() < enough_blocks) --s.turns;
  s.blocks = blocks();
  s.vectors = s.p % 8 == 0 && reinterpret_cast<std::uintptr_t>(s.matrices) % 16 == 0;
}

template <int kRows>
auto stage_kernel(int packs, int turns) {
  if (packs == 4) return butterfly_stage_kernel<kRows, 4, 2>;
  if (packs == 2) return butterfly_stage_kernel<kRows, 2, 4>;
  if (turns == 1) return butterfly_stage_kernel<kRows, 1, 1>;
  if (turns <= 4) return butterfly_stage_kernel<kRows, 1, 4>;
  return butterfly_stage_kernel<kRows, 1, 8>;
}

void run_stage(StageArgs& args, std::size_t parts, cudaStream_t stream) {
  int blocks = 0, widest = 0, turns = 0;
  for (std::size_t i = 0; i < parts; ++i) widest = std::max(widest, args.part[i].p);
  const int packs = widest <= 256 ? 1 : widest <= 512 ? 2 : 4;
  for (std::size_t i = 0; i < parts; ++i) {
    StagePart& s = args.part[i];
    divide(s, packs);
    blocks = std::max(blocks, s.batches * s.blocks);
    turns = std::max(turns, s.turns);
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  const auto shared = [&](int rows) {
    return static_cast<std::size_t>(rows * ceil_div(widest, 8) * 8) * sizeof(float);
  };
  const auto run = [&](auto* kernel, int rows) {
    launch_chained("rotate_rows", kernel, grid, dim3(threads), shared(rows), stream, args);
  };
  if (args.rows == 1) return run(stage_kernel<1>(packs, turns), 1);
  if (args.rows == 2) return run(stage_kernel<2>(packs, turns), 2);
  if (args.rows <= 4) return run(stage_kernel<4>(packs, turns), 4);
  run(stage_kernel<8>(packs, turns), 8);
}

const std::int32_t* indices(const View& v) { return v.empty() ? nullptr : v.as<std::int32_t>(); }

}  // namespace

void rotate_butterfly(std::span<const RotatePart> parts, bool add, float factor, View scratch,
                      cudaStream_t stream) {
  StageArgs first{}, second{};
  first.rows = second.rows = static_cast<int>(parts[0].in.rows);
  first.factor = 1.0F;
  second.factor = factor;
  second.add = add;
  auto* middle = static_cast<float*>(scratch.data);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const RotatePart& part = parts[i];
    const TransformView& q = *part.q;
    REQUIRE(q.first.dtype == DType::f16 && q.second.dtype == DType::f16 && q.p1 > 0 &&
                q.p1 <= max_butterfly_side && q.p2 > 0 && q.p2 <= max_butterfly_side &&
                q.p1 * q.p2 == q.d,
            "rotate_rows: a butterfly of " + q.first.shape() + " and " + q.second.shape());
    StagePart& a = first.part[i];
    a.matrices = static_cast<const __half*>(q.first.data);
    a.matrix_stride = q.shared ? 0 : q.p1 * q.p1;
    a.diagonal = part.diagonal.empty() ? nullptr : part.diagonal.as<float>();
    a.gather = indices(q.perm_in);
    a.in = part.in.data;
    a.in_stride = part.in.stride;
    a.in_dtype = part.in.dtype;
    a.out = middle;
    a.out_stride = q.d;
    a.out_dtype = DType::f32;
    a.p = static_cast<int>(q.p1);
    a.batches = a.step = static_cast<int>(q.p2);
    a.batch_step = 1;
    StagePart& b = second.part[i];
    b.matrices = static_cast<const __half*>(q.second.data);
    b.matrix_stride = q.shared ? 0 : q.p2 * q.p2;
    b.scatter = indices(part.places);
    b.in = middle;
    b.in_stride = q.d;
    b.in_dtype = DType::f32;
    b.out = part.out.data;
    b.out_stride = part.out.stride;
    b.out_dtype = part.out.dtype;
    b.p = b.batch_step = static_cast<int>(q.p2);
    b.batches = static_cast<int>(q.p1);
    b.step = 1;
    middle += part.in.rows * q.d;
  }
  run_stage(first, parts.size(), stream);
  run_stage(second, parts.size(), stream);
}

}  // namespace engine
