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
  int lanes;     // of a warp for a row of a matrix, a power of two
  int packs;     // of a lane for a row
  int turns;     // rows for each group of lanes
  int blocks;    // for a matrix
  bool vectors;  // rows of the matrices start at multiples of 16 bytes
};
struct StageArgs {
  StagePart part[rotate_max_parts];
  int rows;  // of the input
  bool add;
  float factor;
};

// Launch: blockIdx.y is the part; a block has some rows of one matrix, which its threads hold in
// registers (asked for before the input is there), and multiplies all inputs with them, kRows at a
// time from shared memory. A group of lanes adds up one element in a fixed order.
template <int kRows>
__global__ void __launch_bounds__(threads)
    butterfly_stage_kernel(const __grid_constant__ StageArgs args) {
  extern __shared__ __align__(16) float values[];
  chain_trigger();
  const StagePart& s = args.part[blockIdx.y];
  const int batch = static_cast<int>(blockIdx.x) / s.blocks;
  const bool mine = batch < s.batches;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int within = lane % s.lanes;
  const int groups = threads / s.lanes;
  const int first = static_cast<int>(blockIdx.x) % s.blocks * groups * s.turns +
                    static_cast<int>(threadIdx.x) / s.lanes;
  Pack<__half, 8> m[held];
#pragma unroll
  for (int q = 0; q < held; ++q) {
    const int row = first + q / s.packs * groups;
    const int col = (q % s.packs * s.lanes + within) * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) m[q].v[e] = __half(0.0F);
    if (!mine || q >= s.packs * s.turns || row >= s.p || col >= s.p) continue;
    const __half* from =
        s.matrices + batch * s.matrix_stride + static_cast<std::int64_t>(row) * s.p;
    if (s.vectors) {
      m[q] = *reinterpret_cast<const Pack<__half, 8>*>(from + col);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e < s.p) m[q].v[e] = from[col + e];
      }
    }
  }
  chain_wait();
  if (!mine) return;
  const int padded = (s.p + 7) / 8 * 8;
  for (int row0 = 0; row0 < args.rows; row0 += kRows) {
    if (row0 > 0) __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * padded; i += threads) {
      const int r = row0 + i / padded, k = i % padded;
      float v = 0.0F;
      if (r < args.rows && k < s.p) {
        const int place = k * s.step + batch * s.batch_step;
        const int from = s.gather == nullptr ? place : s.gather[place];
        v = load_any(s.in, s.in_dtype, r * s.in_stride + from);
        if (s.diagonal != nullptr) v *= s.diagonal[from];
      }
      values[i] = v;
    }
    __syncthreads();
    float sum[kRows] = {};
#pragma unroll
    for (int q = 0; q < held; ++q) {
      if (q >= s.packs * s.turns) break;
      const int col = (q % s.packs * s.lanes + within) * 8;
      if (col < s.p) {
        float w[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) w[e] = to_f32(m[q].v[e]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 a = *reinterpret_cast<const float4*>(values + r * padded + col);
          const float4 b = *reinterpret_cast<const float4*>(values + r * padded + col + 4);
          sum[r] = fmaf(w[0], a.x, sum[r]);
          sum[r] = fmaf(w[1], a.y, sum[r]);
          sum[r] = fmaf(w[2], a.z, sum[r]);
          sum[r] = fmaf(w[3], a.w, sum[r]);
          sum[r] = fmaf(w[4], b.x, sum[r]);
          sum[r] = fmaf(w[5], b.y, sum[r]);
          sum[r] = fmaf(w[6], b.z, sum[r]);
          sum[r] = fmaf(w[7], b.w, sum[r]);
        }
      }
      if (q % s.packs != s.packs - 1) continue;
      const int row = first + q / s.packs * groups;
      const int place = row * s.step + batch * s.batch_step;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for (int d = 1; d < s.lanes; d *= 2) {
          sum[r] += __shfl_xor_sync(0xffffffffU, sum[r], d);
        }
        if (within == 0 && row < s.p && row0 + r < args.rows) {
          const std::int64_t to =
              (row0 + r) * s.out_stride + (s.scatter == nullptr ? place : s.scatter[place]);
          const float v = args.factor * sum[r];
          store_any(s.out, s.out_dtype, to, args.add ? load_any(s.out, s.out_dtype, to) + v : v);
        }
        sum[r] = 0.0F;
      }
    }
  }
}

// What follows from the size of the matrices.
void divide(StagePart& s) {
  const int packs = static_cast<int>(ceil_div(s.p, 8));
  s.lanes = std::min(32, static_cast<int>(std::bit_ceil(static_cast<unsigned>(packs))));
  s.packs = static_cast<int>(ceil_div(packs, s.lanes));
  const int groups = threads / s.lanes;
  s.turns = std::min(held / s.packs, static_cast<int>(ceil_div(s.p, groups)));
  const auto blocks = [&] { return static_cast<int>(ceil_div(s.p, groups * s.turns)); };
  while (s.turns > 1 && s.batches * blocks() < enough_blocks) --s.turns;
  s.blocks = blocks();
  s.vectors = s.p % 8 == 0 && reinterpret_cast<std::uintptr_t>(s.matrices) % 16 == 0;
}

void run_stage(const StageArgs& args, std::size_t parts, cudaStream_t stream) {
  int blocks = 0, widest = 0;
  for (std::size_t i = 0; i < parts; ++i) {
    blocks = std::max(blocks, args.part[i].batches * args.part[i].blocks);
    widest = std::max(widest, args.part[i].p);
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  const auto shared = [&](int rows) {
    return static_cast<std::size_t>(rows * ceil_div(widest, 8) * 8) * sizeof(float);
  };
  const auto run = [&](auto* kernel, int rows) {
    launch_chained("rotate_rows", kernel, grid, dim3(threads), shared(rows), stream, args);
  };
  if (args.rows == 1) return run(butterfly_stage_kernel<1>, 1);
  if (args.rows == 2) return run(butterfly_stage_kernel<2>, 2);
  if (args.rows <= 4) return run(butterfly_stage_kernel<4>, 4);
  run(butterfly_stage_kernel<8>, 8);
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
    divide(a);
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
    divide(b);
    middle += part.in.rows * q.d;
  }
  run_stage(first, parts.size(), stream);
  run_stage(second, parts.size(), stream);
}

}  // namespace engine
