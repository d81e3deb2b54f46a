// Products of many rows with a packed weight: checks, plan and the kernels around the product.
#include <algorithm>
#include <limits>

#include "cuda/chain.cuh"
#include "cuda/chain.h"
#include "cuda/packed_gemm.h"
#include "cuda/packed_gemm_args.cuh"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

constexpr const char* op = "packed_gemm";
constexpr int threads = 256;
constexpr int max_splits = 32;

std::int64_t round_up(std::int64_t v, std::int64_t to) { return ceil_div(v, to) * to; }

// How a product is divided, and what lies where in the workspace.
struct Plan {
  int tokens;                                  // per block
  int splits;                                  // of the columns
  std::int64_t x_cols, x_bytes;                // copy of x [m, x_cols] at the start
  std::int64_t partial_stride, partial_bytes;  // f32 [splits, m, partial_stride] behind it
};

// Columns are split if there are too few blocks of outputs for all multiprocessors. The time is
// estimated in steps of one block over 128 columns, of a multiprocessor with `blocks / processors`
// blocks: starting one costs about three steps, storing and adding its partial sums two, the second
// kernel two more. Two blocks at once, if they fit, take little longer than one: a block alone
// waits for its own instructions half of the time.
int choose_splits(std::int64_t tiles, std::int64_t col_blocks, std::int64_t processors,
                  bool two_at_once) {
  int best = 1;
  double best_time = std::numeric_limits<double>::max();
  for (int splits = 1; splits <= std::min<std::int64_t>(max_splits, col_blocks); ++splits) {
    const std::int64_t blocks = tiles * splits;
    const std::int64_t each = ceil_div(blocks, processors);
    const double turns = two_at_once
                             ? 1.2 * static_cast<double>(each / 2) + static_cast<double>(each % 2)
                             : static_cast<double>(each);
    double time = turns * static_cast<double>(ceil_div(col_blocks, splits) + 3);
    if (splits > 1) {
      time += 2.0 + 2.0 * static_cast<double>(blocks) / static_cast<double>(processors);
    }
    if (time < best_time) {
      best_time = time;
      best = splits;
    }
  }
  return best;
}

Plan make_plan(const PackedShape& shape, std::int64_t m, int multiprocessors) {
  Plan plan{};
  plan.tokens = m <= 32 ? 32 : 64;
  const std::int64_t tiles =
      ceil_div(m, plan.tokens) * ceil_div(shape.row_tiles(), gemm_block_tiles);
  // What packed_gemm_kernel's launch bounds allow.
  const bool two_at_once = plan.tokens == 32 && shape.bits <= 4;
  plan.splits = choose_splits(tiles, shape.col_blocks(), std::max(multiprocessors, 1), two_at_once);
  plan.x_cols = round_up(shape.cols, 8);
  plan.x_bytes = round_up(m * plan.x_cols * 2, 256);
  plan.partial_stride = round_up(shape.rows, 4);
  plan.partial_bytes = plan.splits == 1 ? 0 : plan.splits * m * plan.partial_stride * 4;
  return plan;
}

// out[r, j] = x[r, perm[j]], or x[r, j] without perm; 0 for j >= cols. 16-bit elements.
// Launch: grid_2d(m, out_cols, 256); through launch_chained. Preconditions: perm[j] < cols.
__global__ void __launch_bounds__(threads)
    gather_x_kernel(const std::uint16_t* x, std::int64_t stride, const std::int32_t* perm,
                    std::int64_t m, int cols, int out_cols, std::uint16_t* out) {
  chain_trigger();
  chain_wait();
  for (std::int64_t r = blockIdx.y; r < m; r += gridDim.y) {
    for (int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); j < out_cols;
         j += static_cast<int>(gridDim.x * blockDim.x)) {
      const std::uint16_t v =
          j >= cols ? std::uint16_t{0} : x[r * stride + (perm == nullptr ? j : perm[j])];
      out[r * out_cols + j] = v;
    }
  }
}

// out (+)= the sum of the partial sums, in the order of the splits.
// Launch: grid_2d(m, ceil(rows / 4), 256); through launch_chained.
// Cost: splits * m * rows * 4 bytes read, mostly from L2.
template <class T>
__global__ void __launch_bounds__(threads)
    add_splits_kernel(const __grid_constant__ PackedGemmArgs args) {
  chain_trigger();
  chain_wait();
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (row >= args.rows) return;
  const std::int64_t step = args.m * args.partial_stride;
  for (int token = static_cast<int>(blockIdx.y); token < args.m;
       token += static_cast<int>(gridDim.y)) {
    const float* from = args.partial + token * args.partial_stride + row;
    float4 sum = *reinterpret_cast<const float4*>(from);
    for (int s = 1; s < args.splits; ++s) {
      from += step;
      const float4 v = *reinterpret_cast<const float4*>(from);
      sum.x += v.x;
      sum.y += v.y;
      sum.z += v.z;
      sum.w += v.w;
    }
    store_rows<T>(args, token, row, sum);
  }
}

template <class T>
void launch_format(const PackedShape& shape, const PackedGemmArgs& args, int tokens,
                   cudaStream_t stream) {
  if (shape.kind == PackedKind::codebook) {
    return launch_gemm_format<T, Codebook<T>>(args, tokens, stream);
  }
  if (shape.kind == PackedKind::binary2) {
    return launch_gemm_format<T, Binary2<T>>(args, tokens, stream);
  }
  switch (shape.bits) {
    case 1:
      return launch_gemm_format<T, Affine<T, 1>>(args, tokens, stream);
    case 2:
      return launch_gemm_format<T, Affine<T, 2>>(args, tokens, stream);
    case 3:
      return launch_gemm_format<T, Affine<T, 3>>(args, tokens, stream);
    case 4:
      return launch_gemm_format<T, Affine<T, 4>>(args, tokens, stream);
    case 5:
      return launch_gemm_format<T, Affine<T, 5>>(args, tokens, stream);
    case 6:
      return launch_gemm_format<T, Affine<T, 6>>(args, tokens, stream);
    case 7:
      return launch_gemm_format<T, Affine<T, 7>>(args, tokens, stream);
    case 8:
      return launch_gemm_format<T, Affine<T, 8>>(args, tokens, stream);
    default:
      REQUIRE(false, std::string(op) + " does not take " + std::to_string(shape.bits) + " bits");
  }
}

template <class T>
void multiply(const PackedShape& shape, const PackedGemmArgs& args, const Plan& plan,
              cudaStream_t stream) {
  launch_format<T>(shape, args, plan.tokens, stream);
  if (args.splits == 1) return;
  launch_chained("packed_gemm_add", add_splits_kernel<T>,
                 grid_2d(args.m, ceil_div(args.rows, 4), threads), dim3(threads), 0, stream, args);
}

UnitFormat unit_format(const PackedShape& shape) {
  const ScaleType scale = shape.scale_dtype == DType::f32   ? ScaleType::f32
                          : shape.scale_dtype == DType::f16 ? ScaleType::f16
                                                            : ScaleType::bf16;
  return {scale, shape.zeros};
}

// Rows at multiples of four elements.
bool whole_packs(const View& v) {
  const std::size_t pack = 4 * dtype_bytes(v.dtype);
  return reinterpret_cast<std::uintptr_t>(v.data) % pack == 0 && (v.rows <= 1 || v.stride % 4 == 0);
}

void check(View x, const PackedWeight& w, View out, const Plan& plan, View workspace) {
  const PackedShape& shape = w.shape;
  check_packed_weight(op, w, DeviceKind::cuda);
  require_cuda(op, {x, out, workspace});
  REQUIRE(x.dtype == DType::f16 || x.dtype == DType::bf16,
          std::string(op) + ": x is " + x.shape() + ", expected f16 or bf16");
  REQUIRE(x.cols == shape.cols, std::string(op) + ": x is " + x.shape() + ", expected " +
                                    std::to_string(shape.cols) + " columns");
  REQUIRE(out.rows == x.rows && out.cols == shape.rows,
          std::string(op) + ": out is " + out.shape() + ", expected " + std::to_string(x.rows) +
              " x " + std::to_string(shape.rows));
  REQUIRE(out.dtype == x.dtype || out.dtype == DType::f32,
          std::string(op) + ": out is " + out.shape() + ", expected f32 or the type of x");
  REQUIRE(x.rows < (1 << 30) && shape.rows < (1 << 24) && shape.cols < (1 << 24),
          std::string(op) + ": more than 2^24 rows or columns: " + out.shape());
  REQUIRE(workspace.bytes() >= plan.x_bytes + plan.partial_bytes &&
              reinterpret_cast<std::uintptr_t>(workspace.data) % 256 == 0,
          std::string(op) + ": workspace is " + workspace.shape() + ", expected " +
              std::to_string(plan.x_bytes + plan.partial_bytes) +
              " bytes at a multiple of 256 bytes");
}

}  // namespace

void packed_gemm(View x, const PackedWeight& w, View out, bool accumulate, int multiprocessors,
                 View workspace, cudaStream_t stream) {
  if (x.rows == 0) return;
  const PackedShape& shape = w.shape;
  const Plan plan = make_plan(shape, x.rows, multiprocessors);
  check(x, w, out, plan, workspace);

  PackedGemmArgs args{};
  args.records = static_cast<const std::uint8_t*>(w.records.data);
  if (shape.group == 0) args.row_units = static_cast<const std::uint8_t*>(w.row_units.data);
  args.book = static_cast<const float*>(w.book.data);
  args.x = x.data;
  args.x_stride = x.stride;
  args.x_cols = static_cast<int>(shape.cols);
  args.out = out.data;
  args.out_stride = out.stride;
  args.out_f32 = out.dtype == DType::f32;
  args.out_packs = whole_packs(out);
  args.accumulate = accumulate;
  args.m = static_cast<int>(x.rows);
  args.rows = static_cast<int>(shape.rows);
  args.row_tiles = static_cast<int>(shape.row_tiles());
  args.col_blocks = static_cast<int>(shape.col_blocks());
  args.splits = plan.splits;
  args.record_bytes = static_cast<int>(shape.record_bytes());
  args.unit_bytes = static_cast<int>(shape.unit_bytes());
  args.units = static_cast<int>(shape.groups_per_record());
  args.format = unit_format(shape);
  auto* const space = static_cast<std::uint8_t*>(workspace.data);
  args.partial = reinterpret_cast<float*>(space + plan.x_bytes);
  args.partial_stride = plan.partial_stride;

  // The kernel takes whole 16-byte chunks of x in the order of the codes, and offsets of 32 bits
  // within a block.
  const bool direct = w.permutation.empty() && aligned_rows(x, 16, 8) && x.stride < (1 << 24);
  if (!direct) {
    launch_chained("packed_gemm_gather", gather_x_kernel, grid_2d(x.rows, plan.x_cols, threads),
                   dim3(threads), 0, stream, static_cast<const std::uint16_t*>(x.data), x.stride,
                   static_cast<const std::int32_t*>(w.permutation.data), x.rows,
                   static_cast<int>(shape.cols), static_cast<int>(plan.x_cols),
                   reinterpret_cast<std::uint16_t*>(space));
    args.x = space;
    args.x_stride = plan.x_cols;
    args.x_cols = static_cast<int>(plan.x_cols);
  }
  if (x.dtype == DType::f16) {
    multiply<__half>(shape, args, plan, stream);
  } else {
    multiply<__nv_bfloat16>(shape, args, plan, stream);
  }
}

std::int64_t packed_gemm_workspace_bytes(const PackedShape& shape, std::int64_t m,
                                         int multiprocessors) {
  if (m <= 0) return 0;
  const Plan plan = make_plan(shape, m, multiprocessors);
  return plan.x_bytes + plan.partial_bytes;
}

}  // namespace engine
