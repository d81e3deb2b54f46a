// vector_product: the host side of the streaming product kernels.
#include <algorithm>

#include "cuda/chain.h"
#include "cuda/vector_host.cuh"
#include "cuda/vector_kernels.cuh"

namespace engine {
namespace {

constexpr std::int64_t align_up(std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; }

// What of a weight and of the number of rows of x decides which kernel runs and how.
struct Layout {
  bool dense = false, integer = false;
  PackedShape shape;  // packed only
  int row_tiles = 1;
  int block_cols = 128, stages = 0, parts = 0;
  std::int64_t record_bytes = 0;
  int records = 1;  // of a stage
};

template <class C>
void take_half(Layout& out) {
  out.block_cols = C::kBlockCols;
  out.stages = C::stages(out.row_tiles);
  out.parts = C::kParts;
}
template <int B>
void take_int(Layout& out, std::int64_t rows) {
  using C = IntPlan<B>;
  out.integer = true;
  out.row_tiles = rows <= 4 ? 1 : 2;
  out.stages = C::kStages;
  out.parts = C::kParts;
  out.records = C::kRecords;
}

Layout layout_of(const Linear& w, std::int64_t rows) {
  Layout out;
  out.row_tiles = rows > 8 ? 2 : 1;
  if (!w.is_packed()) {
    out.dense = true;
    take_half<DenseCodec>(out);
    out.record_bytes = DenseCodec::kCodeBytes;
    return out;
  }
  out.shape = w.packed.shape;
  out.record_bytes = out.shape.record_bytes();
  if (out.shape.kind == PackedKind::codebook) {
    take_half<HalfCodec<4, 0, 1, true>>(out);
  } else if (out.shape.kind == PackedKind::binary2) {
    take_half<HalfCodec<1, 1, 2, false>>(out);
  } else {
    switch (out.shape.bits) {
      case 1:
        take_half<HalfCodec<1, 0, 1, false>>(out);
        break;
      case 2:
        take_int<2>(out, rows);
        break;
      case 3:
        take_int<3>(out, rows);
        break;
      case 4:
        take_int<4>(out, rows);
        break;
      case 5:
        take_half<HalfCodec<4, 1, 1, false>>(out);
        break;
      case 6:
        take_half<HalfCodec<4, 2, 1, false>>(out);
        break;
      case 7:
        take_half<HalfCodec<4, 3, 1, false>>(out);
        break;
      default:
        take_int<8>(out, rows);
        break;
    }
  }
  return out;
}

template <class T>
VectorKernel<T> kernel_of(const Layout& l) {
  const bool two = l.row_tiles > 1;
  if (l.dense) return vector_kernel_dense<T>(two);
  const bool fine = l.shape.groups_per_record() > 1;
  if (l.shape.kind != PackedKind::affine) return vector_kernel_other<T>(l.shape.kind, two, fine);
  const bool plain =
      !fine && l.shape.group != 0 && l.shape.scale_dtype == DType::f16 && l.shape.zeros;
  const int mode = plain ? vector_plain : fine ? vector_fine : vector_coarse;
  switch (l.shape.bits) {
    case 2:
      return vector_kernel_int2<T>(two, mode);
    case 3:
      return vector_kernel_int3<T>(two, mode);
    case 4:
      return vector_kernel_int4<T>(two, mode);
    case 8:
      return vector_kernel_int8<T>(two, mode);
    default:
      return vector_kernel_affine<T>(l.shape.bits, two, fine);
  }
}

// Bytes of shared memory, by part.
struct Shared {
  std::int64_t x_row = 0, x = 0;
  std::int64_t sum_cols = 0, sum_row = 0, sums = 0;
  std::int64_t factor_row = 0, factors = 0;
  std::int64_t red = 0, stage = 0, ring = 0;
  [[nodiscard]] std::int64_t total() const { return x + sums + factors + red + ring; }
};

Shared plan_shared(const Layout& l, std::int64_t rows, std::int64_t blocks, int slices,
                   int stages) {
  Shared s;
  const std::int64_t longest = ceil_div(blocks, slices);
  // Kernels for several tiles of rows of x read all rows of the tiles.
  const std::int64_t held = l.row_tiles == 1 ? rows : l.row_tiles * (l.integer ? 4 : 8);
  if (l.integer) {
    s.x_row = longest * 128 + 16;
    s.x = align_up(2 * held * s.x_row, 128);
    s.factor_row = longest;
    s.factors = align_up(held * s.factor_row * 4, 128);
  } else {
    s.x_row = align_up(longest * l.block_cols * 2, 128) + 64;
    s.x = align_up(held * s.x_row, 128);
  }
  if (!l.dense) {
    s.sum_cols = l.shape.group == 0 ? record_cols : std::min(l.shape.group, record_cols);
    s.sum_row = longest * (record_cols / s.sum_cols);
    s.sums = align_up(held * s.sum_row * 4, 128);
  }
  s.red = 2 * l.parts * 32 * rows * 4;
  s.stage = align_up(l.records * l.record_bytes, 16);
  s.ring = vector_warps * stages * s.stage;
  return s;
}

// Blocks of columns that the busiest block of the grid takes, plus what converting x (integers),
// meeting other slices and a short ring cost, in the same unit.
std::int64_t plan_cost(const Layout& l, std::int64_t rows, std::int64_t units, std::int64_t blocks,
                       int slices, int stages, int multiprocessors) {
  const std::int64_t columns = std::max<std::int64_t>(1, multiprocessors / slices);
  const std::int64_t longest = ceil_div(blocks, slices);
  const std::int64_t product = ceil_div(units, columns) * longest;
  if (!l.integer) return product + (slices > 1 ? 40 : 0) + 8 * (l.stages - stages);
  return product + (rows > 4 ? rows * longest / 6 : 0) + (slices > 1 ? 10 + 15 * slices : 0) +
         8 * std::max(0, 4 - stages);
}

// How a launch divides columns and shared memory; slices 0: it does not fit the device.
struct Plan {
  int slices = 0, stages = 0;
  Shared shared;
};

// The cheapest plan. A ring shorter than the kernel's own costs something, too; two stages are the
// least.
Plan choose_plan(const Layout& l, std::int64_t rows, std::int64_t units, std::int64_t blocks,
                 const VectorResources& r) {
  Plan best;
  std::int64_t best_cost = 0;
  if (l.integer && rows > vector_max_int_rows) return best;
  for (const int s : {1, 2, 4, 8}) {
    if (s > blocks) continue;
    if (s > 1 && (units > r.counters.cols || units * s * rows * 32 > r.partials.cols)) continue;
    for (int stages = l.stages; stages >= 2; --stages) {
      const Shared shared = plan_shared(l, rows, blocks, s, stages);
      if (shared.total() > r.shared_bytes) continue;
      const std::int64_t cost = plan_cost(l, rows, units, blocks, s, stages, r.multiprocessors);
      if (best.slices == 0 || cost < best_cost) {
        best = {s, stages, shared};
        best_cost = cost;
      }
      break;
    }
  }
  return best;
}

// Column blocks of a row tile.
std::int64_t blocks_of(const Layout& l, const VectorProblem& p) {
  return ceil_div(p.x.cols, l.block_cols);
}

// A plan for several products in one launch: none may be divided into slices, and what each needs
// of shared memory lies at the same place. slices 0: they do not fit.
Plan choose_common_plan(const Layout& l, std::span<const VectorProblem> problems,
                        const VectorResources& r) {
  if (problems.size() == 1) {
    const VectorProblem& p = problems.front();
    return choose_plan(l, p.x.rows, vector_units(p), blocks_of(l, p), r);
  }
  std::int64_t widest = 0;
  int stages = l.stages;
  for (const VectorProblem& p : problems) {
    const Plan alone = choose_plan(l, p.x.rows, vector_units(p), blocks_of(l, p), r);
    if (alone.slices != 1) return {};
    stages = std::min(stages, alone.stages);
    widest = std::max(widest, blocks_of(l, p));
  }
  return {1, stages, plan_shared(l, problems.front().x.rows, widest, 1, stages)};
}

// The arguments of one product; offsets in shared memory are those of the plan.
template <class T>
VectorArgs<T> make_args(const VectorProblem& p, const Layout& l, const Plan& plan,
                        std::int64_t columns, const VectorResources& r) {
  const Linear& first = *p.segment[0].w;
  VectorArgs<T> a = problem_args<T>(p);
  a.blocks = static_cast<int>(blocks_of(l, p));
  a.slices = plan.slices;
  a.stages = plan.stages;
  a.partials = static_cast<float*>(r.partials.data);
  a.counters = static_cast<std::int32_t*>(r.counters.data);
  a.team_shift = 9;
  while ((p.x.rows << a.team_shift) > vector_workers) --a.team_shift;
  for (int i = 0; i <= a.slices; ++i) a.slice_start[i] = a.blocks * i / a.slices;
  // Whole pairs of row tiles that follow each other.
  const bool silu = p.epilogue == VectorEpilogue::silu;
  if (l.integer && first.rows() % (silu ? 16 : 32) == 0 && (silu || p.segments == 1) &&
      p.epilogue != VectorEpilogue::qkv) {
    const std::int64_t step = columns * (silu ? 1 : 2) * a.blocks * l.record_bytes;
    if (step <= 0x7fffffff) a.unit_step = static_cast<int>(step);
  }
  // Rows of x lie close together in each product; where its parts begin is common to all.
  const Shared own = plan_shared(l, p.x.rows, a.blocks, plan.slices, plan.stages);
  const Shared& shared = plan.shared;
  a.x_row_bytes = static_cast<int>(own.x_row);
  while ((std::int64_t{1} << a.sum_shift) < own.sum_cols) ++a.sum_shift;
  a.sum_row = static_cast<int>(own.sum_row);
  a.factor_row = static_cast<int>(own.factor_row);
  a.sum_offset = static_cast<int>(shared.x);
  a.factor_offset = static_cast<int>(shared.x + shared.sums);
  a.red_offset = static_cast<int>(shared.x + shared.sums + shared.factors);
  a.ring_offset = static_cast<int>(shared.x + shared.sums + shared.factors + shared.red);
  a.stage_bytes = static_cast<int>(shared.stage);
  return a;
}

template <class T>
void run(std::span<const VectorProblem> problems, const VectorResources& r, cudaStream_t stream) {
  const VectorProblem& first = problems.front();
  const Layout l = layout_of(*first.segment[0].w, first.x.rows);
  const Plan plan = choose_common_plan(l, problems, r);
  REQUIRE(plan.slices > 0, "vector product of " + first.x.shape() + " does not fit the device");
  std::int64_t units = 0;
  for (const VectorProblem& p : problems) units = std::max(units, vector_units(p));
  // Blocks that meet must all be there at once: one for each multiprocessor, of which the shared
  // memory asked for leaves no room for a second one.
  const auto columns = std::min<std::int64_t>(units, std::max(1, r.multiprocessors / plan.slices));
  VectorPhases<T> all{};
  for (const VectorProblem& p : problems) {
    all.phase[all.phases++] = make_args<T>(p, l, plan, columns, r);
  }
  all.arrivals = static_cast<std::int32_t*>(r.arrivals.data);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(plan.slices));
  launch_chained("vector_product", kernel_of<T>(l), grid, dim3(vector_threads),
                 static_cast<std::size_t>(std::max(plan.shared.total(), r.shared_bytes / 2 + 1024)),
                 stream, all);
}

// Whether linears can follow each other in one launch.
bool same_format(const Linear& a, const Linear& b) {
  if (a.is_packed() != b.is_packed()) return false;
  if (!a.is_packed()) return a.dense.dtype == b.dense.dtype;
  const PackedShape& s = a.packed.shape;
  const PackedShape& o = b.packed.shape;
  return s.kind == o.kind && s.bits == o.bits && s.group == o.group &&
         s.scale_dtype == o.scale_dtype && s.zeros == o.zeros &&
         a.packed.book.data == b.packed.book.data;
}

}  // namespace

bool vector_fits(const VectorProblem& p, const VectorResources& r) {
  const Layout l = layout_of(*p.segment[0].w, p.x.rows);
  return choose_plan(l, p.x.rows, vector_units(p), blocks_of(l, p), r).slices > 0;
}

bool vector_fits(const PackedShape& shape, std::int64_t rows, const VectorResources& r) {
  return rows <= vector_max_rows && vector_fits(VectorShapeProblem(shape, rows).problem, r);
}

bool vector_takes(const Linear& w, DType dtype) {
  if (dtype != DType::f16 && dtype != DType::bf16) return false;
  if (w.is_packed()) return is_record_kind(w.packed.shape.kind);
  // 16-byte copies of rows.
  return w.dense.dtype == dtype && aligned_rows(w.dense, 16, 8);
}

bool vector_compatible(const Linear& a, const Linear& b) {
  return a.cols() == b.cols() && same_format(a, b) &&
         a.packed.permutation.data == b.packed.permutation.data;
}

bool vector_chain_fits(std::span<const VectorProblem> problems, const VectorResources& r) {
  if (problems.empty() || problems.size() > vector_max_phases) return false;
  const VectorProblem& first = problems.front();
  for (const VectorProblem& p : problems) {
    if (p.x.rows != first.x.rows || p.x.dtype != first.x.dtype ||
        !same_format(*p.segment[0].w, *first.segment[0].w)) {
      return false;
    }
  }
  const Layout l = layout_of(*first.segment[0].w, first.x.rows);
  // vector_half_kernel knows one phase.
  if (problems.size() > 1 && (!l.integer || !r.sm90)) return false;
  return choose_common_plan(l, problems, r).slices > 0;
}

void vector_chain(std::span<const VectorProblem> problems, const VectorResources& r,
                  cudaStream_t stream) {
  for (const VectorProblem& p : problems) check_vector_problem(p);
  REQUIRE(problems.size() == 1 || vector_chain_fits(problems, r),
          "vector products that do not go together");
  if (problems.front().x.dtype == DType::f16) {
    run<__half>(problems, r, stream);
  } else {
    run<__nv_bfloat16>(problems, r, stream);
  }
}

void vector_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream) {
  vector_chain({&p, 1}, r, stream);
}

}  // namespace engine
