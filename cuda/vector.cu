// vector_product: the host side of the streaming product kernels.
#include <algorithm>

#include "cuda/chain.h"
#include "cuda/vector_kernels.cuh"

namespace engine {
namespace {

constexpr std::int64_t align_up(std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; }

// What of a weight and of the number of rows of x decides which kernel runs and how.
struct Layout {
  bool dense = false, integer = false;
  PackedShape shape;  // packed only
  int row_tiles = 1;
  int block_cols = 128, stages = 0, tiles = 0, span = 1, parts = 0;
  std::int64_t record_bytes = 0;
};

template <class C>
void take_half(Layout& out) {
  out.block_cols = C::kBlockCols;
  out.stages = C::stages(out.row_tiles);
  out.tiles = C::kTiles;
  out.parts = C::kParts;
}
template <int B, int NT>
void take_plan(Layout& out) {
  using C = IntPlan<B, NT>;
  out.integer = true;
  out.row_tiles = NT;
  out.stages = C::kStages;
  out.tiles = C::kTiles;
  out.span = C::kSpan;
  out.parts = C::kParts;
}
template <int B>
void take_int(Layout& out, std::int64_t rows) {
  if (rows <= 4) {
    take_plan<B, 1>(out);
  } else if (rows <= 8) {
    take_plan<B, 2>(out);
  } else {
    take_plan<B, 4>(out);
  }
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
      return vector_kernel_int2<T>(l.row_tiles, mode);
    case 3:
      return vector_kernel_int3<T>(l.row_tiles, mode);
    case 4:
      return vector_kernel_int4<T>(l.row_tiles, mode);
    case 8:
      return vector_kernel_int8<T>(l.row_tiles, mode);
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

Shared plan_shared(const Layout& l, std::int64_t rows, std::int64_t blocks, int slices) {
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
  s.stage = align_up(l.tiles * l.span * l.record_bytes, 16);
  s.ring = vector_warps * l.stages * s.stage;
  return s;
}

// Blocks of columns that the busiest block of the grid takes, plus what meeting another slice
// costs.
std::int64_t plan_cost(std::int64_t units, std::int64_t blocks, int slices, int multiprocessors) {
  const std::int64_t columns = std::max<std::int64_t>(1, multiprocessors / slices);
  return ceil_div(units, columns) * ceil_div(blocks, slices) + (slices > 1 ? 40 : 0);
}

int choose_slices(const Layout& l, const VectorProblem& p, const VectorResources& r,
                  std::int64_t units, std::int64_t blocks) {
  int best = 0;
  std::int64_t best_cost = 0;
  for (const int s : {1, 2, 4, 8}) {
    if (s > blocks || plan_shared(l, p.x.rows, blocks, s).total() > r.shared_bytes) continue;
    if (s > 1 && (units > r.counters.cols || units * s * p.x.rows * 32 > r.partials.cols)) continue;
    const std::int64_t cost = plan_cost(units, blocks, s, r.multiprocessors);
    if (best == 0 || cost < best_cost) {
      best = s;
      best_cost = cost;
    }
  }
  return best;
}

template <class T>
void run(const VectorProblem& p, const VectorResources& r, cudaStream_t stream, int slices) {
  const Linear& first = *p.segment[0].w;
  const Layout l = layout_of(first, p.x.rows);
  VectorArgs<T> a{};
  a.rows = static_cast<int>(p.x.rows);
  a.cols = static_cast<int>(p.x.cols);
  a.blocks = static_cast<int>(ceil_div(p.x.cols, l.block_cols));
  while ((std::int64_t{32} << a.half_shift) < p.head_dim) ++a.half_shift;
  std::int64_t units = 0;
  for (int i = 0; i < p.segments; ++i) {
    const VectorSegment& s = p.segment[i];
    const Linear& w = *s.w;
    VectorWeight<T>& out = a.weight[i];
    out.rows = w.rows();
    out.tiles = static_cast<int>(ceil_div(w.rows(), 16));
    out.data = static_cast<const unsigned char*>(l.dense ? w.dense.data : w.packed.records.data);
    out.row_units = static_cast<const unsigned char*>(w.packed.row_units.data);
    out.stride = w.dense.stride;
    out.out = s.out;
    out.out_stride = s.out_stride;
    out.position_stride = s.position_stride;
    if (p.epilogue == VectorEpilogue::silu) {
      units = out.tiles;
    } else {
      units += ceil_div(out.tiles, 2);
      if (i < 2) a.segment_units[i] = static_cast<int>(ceil_div(out.tiles, 2));
    }
  }
  a.units = static_cast<int>(units);
  a.slices = slices != 0 ? slices : choose_slices(l, p, r, units, a.blocks);
  const Shared shared = plan_shared(l, p.x.rows, a.blocks, std::max(1, a.slices));
  REQUIRE(a.slices > 0 && shared.total() <= r.shared_bytes &&
              (a.slices == 1 ||
               (units <= r.counters.cols && units * a.slices * p.x.rows * 32 <= r.partials.cols)),
          "vector product of " + p.x.shape() + " does not fit the device");
  a.x = static_cast<const T*>(p.x.data);
  a.x_stride = p.x.stride;
  a.norm = static_cast<const T*>(p.norm.data);
  a.eps = p.eps;
  a.wide = aligned_rows(p.x, 16, 8) && aligned_rows(p.norm, 16, 1) &&
           first.packed.permutation.data == nullptr;
  a.permutation = static_cast<const std::int32_t*>(first.packed.permutation.data);
  a.book = static_cast<const float*>(first.packed.book.data);
  a.cos = static_cast<const float*>(p.cos.data);
  a.sin = static_cast<const float*>(p.sin.data);
  a.cos_stride = p.cos.stride;
  a.sin_stride = p.sin.stride;
  a.position = static_cast<const std::int32_t*>(p.position.data);
  a.partials = static_cast<float*>(r.partials.data);
  a.counters = static_cast<std::int32_t*>(r.counters.data);
  a.team_shift = 9;
  while ((p.x.rows << a.team_shift) > vector_workers) --a.team_shift;
  for (int i = 0; i <= a.slices; ++i) a.slice_start[i] = a.blocks * i / a.slices;
  if (!l.dense) {
    const PackedShape& s = l.shape;
    a.record_bytes = static_cast<int>(s.record_bytes());
    a.unit_bytes = static_cast<int>(s.unit_bytes());
    a.units_per_record = static_cast<int>(s.groups_per_record());
    a.scale_kind = s.scale_dtype == DType::f32 ? 0 : s.scale_dtype == DType::f16 ? 1 : 2;
    a.zero_offset = s.zeros
                        ? static_cast<int>(s.terms() * 16 *
                                           static_cast<std::int64_t>(dtype_bytes(s.scale_dtype)))
                        : 0;
    const int term_bits = s.kind == PackedKind::binary2 ? 1 : s.bits;
    a.constant_zero = static_cast<float>(1 << (term_bits - 1));
  }
  a.x_row_bytes = static_cast<int>(shared.x_row);
  a.sum_cols = static_cast<int>(shared.sum_cols);
  a.sum_row = static_cast<int>(shared.sum_row);
  a.sum_offset = static_cast<int>(shared.x);
  a.factor_row = static_cast<int>(shared.factor_row);
  a.factor_offset = static_cast<int>(shared.x + shared.sums);
  a.red_offset = static_cast<int>(shared.x + shared.sums + shared.factors);
  a.ring_offset = static_cast<int>(shared.x + shared.sums + shared.factors + shared.red);
  a.stage_bytes = static_cast<int>(shared.stage);
  a.out_f32 = p.out_dtype == DType::f32;
  a.epilogue = p.epilogue;
  const auto columns = std::min<std::int64_t>(units, std::max(1, r.multiprocessors / a.slices));
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(a.slices));
  launch_chained("vector_product", kernel_of<T>(l), grid, dim3(vector_threads),
                 static_cast<std::size_t>(std::max(shared.total(), r.shared_bytes / 2 + 1024)),
                 stream, a);
}

}  // namespace

bool vector_takes(const Linear& w, DType dtype) {
  if (dtype != DType::f16 && dtype != DType::bf16) return false;
  if (w.is_packed()) return true;
  // 16-byte copies of rows.
  return w.dense.dtype == dtype && aligned_rows(w.dense, 16, 8);
}

bool vector_compatible(const Linear& a, const Linear& b) {
  if (a.is_packed() != b.is_packed() || a.cols() != b.cols()) return false;
  if (!a.is_packed()) return a.dense.dtype == b.dense.dtype;
  const PackedShape& s = a.packed.shape;
  const PackedShape& o = b.packed.shape;
  return s.kind == o.kind && s.bits == o.bits && s.group == o.group &&
         s.scale_dtype == o.scale_dtype && s.zeros == o.zeros &&
         a.packed.permutation.data == b.packed.permutation.data &&
         a.packed.book.data == b.packed.book.data;
}

void vector_product(const VectorProblem& p, const VectorResources& r, cudaStream_t stream,
                    int slices) {
  REQUIRE(p.x.rows >= 1 && p.x.rows <= vector_max_rows && p.segments >= 1 && p.segments <= 3,
          "vector product of " + p.x.shape());
  REQUIRE(p.norm.empty() || (p.norm.dtype == p.x.dtype && p.norm.cols == p.x.cols),
          "vector product: norm " + p.norm.shape());
  for (int i = 0; i < p.segments; ++i) {
    const Linear& w = *p.segment[i].w;
    REQUIRE(
        w.cols() == p.x.cols && vector_takes(w, p.x.dtype) &&
            (i == 0 || vector_compatible(*p.segment[0].w, w)),
        "vector product of " + p.x.shape() + ": segment " + std::to_string(i) + " does not fit");
    REQUIRE(w.is_packed() ? w.packed.records.data != nullptr : w.dense.data != nullptr,
            "vector product without weights");
  }
  if (p.x.dtype == DType::f16) {
    run<__half>(p, r, stream, slices);
  } else {
    REQUIRE(p.x.dtype == DType::bf16, "vector product of " + p.x.shape());
    run<__nv_bfloat16>(p, r, stream, slices);
  }
}

}  // namespace engine
