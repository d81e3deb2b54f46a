// The host side that vector_product and vector_wide_product share: what a problem says about a
// launch, whatever the plan.
#pragma once

#include <algorithm>

#include "cuda/types.cuh"
#include "cuda/vector.h"
#include "cuda/vector_args.cuh"
#include "engine/weight/packed_layout.h"

namespace engine {

// Throws unless the problem is one of vector.h.
inline void check_vector_problem(const VectorProblem& p) {
  REQUIRE(p.x.rows >= 1 && p.x.rows <= vector_max_rows && p.segments >= 1 && p.segments <= 3 &&
              (p.x.dtype == DType::f16 || p.x.dtype == DType::bf16),
          "vector product of " + p.x.shape());
  require_cuda("vector product", {p.x});
  REQUIRE((p.epilogue != VectorEpilogue::silu && p.epilogue != VectorEpilogue::qkv) ||
              p.out_dtype == p.x.dtype,
          "vector product: a fused result has the dtype of x");
  REQUIRE(p.norm.empty() || (p.norm.dtype == p.x.dtype && p.norm.cols == p.x.cols),
          "vector product: norm " + p.norm.shape());
  for (int i = 0; i < p.segments; ++i) {
    const Linear& w = *p.segment[i].w;
    REQUIRE(
        w.cols() == p.x.cols && vector_takes(w, p.x.dtype) &&
            (i == 0 || vector_compatible(*p.segment[0].w, w)),
        "vector product of " + p.x.shape() + ": segment " + std::to_string(i) + " does not fit");
    if (w.is_packed()) {
      check_packed_weight("vector product", w.packed, DeviceKind::cuda);
    } else {
      require_cuda("vector product", {w.dense});
    }
  }
}

// Pairs of row tiles of all segments.
inline std::int64_t vector_units(const VectorProblem& p) {
  std::int64_t units = 0;
  for (int i = 0; i < p.segments; ++i) {
    const std::int64_t tiles = ceil_div(p.segment[i].w->rows(), 16);
    if (p.epilogue == VectorEpilogue::silu) return tiles;
    units += ceil_div(tiles, 2);
  }
  return units;
}

// For one linear without a norm; only its shape is known.
struct VectorShapeProblem {
  Linear w;
  VectorProblem problem;
  VectorShapeProblem(const PackedShape& shape, std::int64_t rows) {
    w.packed.shape = shape;
    problem.x = make_view(nullptr, DType::bf16, DeviceKind::cuda, rows, shape.cols);
    problem.segment[0].w = &w;
  }
  VectorShapeProblem(const VectorShapeProblem&) = delete;
  VectorShapeProblem& operator=(const VectorShapeProblem&) = delete;
};

// The arguments that do not depend on how columns and shared memory are divided.
template <class T>
VectorArgs<T> problem_args(const VectorProblem& p) {
  const Linear& first = *p.segment[0].w;
  VectorArgs<T> a{};
  a.rows = static_cast<int>(p.x.rows);
  a.cols = static_cast<int>(p.x.cols);
  while ((std::int64_t{32} << a.half_shift) < p.head_dim) ++a.half_shift;
  for (int i = 0; i < p.segments; ++i) {
    const VectorSegment& s = p.segment[i];
    const Linear& w = *s.w;
    VectorWeight<T>& out = a.weight[i];
    out.rows = w.rows();
    out.tiles = static_cast<int>(ceil_div(w.rows(), 16));
    out.data =
        static_cast<const unsigned char*>(w.is_packed() ? w.packed.records.data : w.dense.data);
    out.row_units = static_cast<const unsigned char*>(w.packed.row_units.data);
    out.stride = w.dense.stride;
    out.out = s.out;
    out.out_stride = s.out_stride;
    out.position_stride = s.position_stride;
    if (i < 2) a.segment_units[i] = static_cast<int>(ceil_div(out.tiles, 2));
  }
  a.units = static_cast<int>(vector_units(p));
  a.x = static_cast<const T*>(p.x.data);
  a.x_stride = p.x.stride;
  a.norm = static_cast<const T*>(p.norm.data);
  a.eps = p.eps;
  a.inverse_cols = 1.0F / static_cast<float>(p.x.cols);
  a.wide = aligned_rows(p.x, 16, 8) && aligned_rows(p.norm, 16, 1) &&
           first.packed.permutation.data == nullptr;
  a.permutation = static_cast<const std::int32_t*>(first.packed.permutation.data);
  a.book = static_cast<const float*>(first.packed.book.data);
  a.cos = static_cast<const float*>(p.cos.data);
  a.sin = static_cast<const float*>(p.sin.data);
  a.cos_stride = p.cos.stride;
  a.sin_stride = p.sin.stride;
  a.position = static_cast<const std::int32_t*>(p.position.data);
  a.positions = static_cast<int>(std::min<std::int64_t>(p.positions, 0x7fffffff));
  if (first.is_packed()) {
    const PackedShape& s = first.packed.shape;
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
  a.out_f32 = p.out_dtype == DType::f32;
  a.epilogue = p.epilogue;
  return a;
}

}  // namespace engine
