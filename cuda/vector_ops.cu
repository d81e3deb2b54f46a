// CudaOps: linears of few rows, alone and with what the decode step fuses around them.
#include <bit>

#include "cuda/cuda_ops.h"
#include "cuda/types.cuh"
#include "cuda/vector.h"
#include "engine/ops/step_check.h"

namespace engine {
namespace {

bool fits_store(const View& x, const View& out) {
  return out.dtype == x.dtype || out.dtype == DType::f32;
}

// Whether the streaming kernel computes w(x).
bool streams(const View& x, const Linear& w) {
  return x.rows >= 1 && x.rows <= vector_max_rows && vector_takes(w, x.dtype);
}

VectorSegment segment_of(const Linear& w, const View& out) { return {&w, out.data, out.stride, 0}; }

// Keys or values of the step, straight into a plain cache: sequence b at row b * capacity.
VectorSegment cache_segment(const Linear& w, const View& cache, std::int64_t capacity) {
  return {&w, cache.data, capacity * cache.stride, cache.stride};
}

// The step of sequences first .. first + n - 1.
QkvStep some_rows(const QkvStep& s, std::int64_t first, std::int64_t n) {
  QkvStep out = s;
  out.x = s.x.row_range(first, n);
  out.q_out = s.q_out.row_range(first, n);
  const auto part = [&](const View& v) {
    return v.empty() ? v : v.row_range(first * s.cache.capacity, n * s.cache.capacity);
  };
  out.cache.k = part(s.cache.k);
  out.cache.v = part(s.cache.v);
  out.cache.k_scale = part(s.cache.k_scale);
  out.cache.v_scale = part(s.cache.v_scale);
  out.cache.batch = n;
  return out;
}

}  // namespace

VectorResources CudaOps::vector_resources() const {
  return {properties_.multiProcessorCount,
          static_cast<std::int64_t>(properties_.sharedMemPerBlockOptin) - 2048,  // static shared
          vector_partials_.view(), vector_counters_.view()};
}

void CudaOps::linear(View x, const Linear& w, View out, bool accumulate, View workspace,
                     PackedKernel kernel) {
  if (w.is_packed()) return packed_matmul(x, w.packed, out, accumulate, kernel, workspace);
  if (!streams(x, w) || !fits_store(x, out)) return matmul(x, w.dense, out, accumulate);
  REQUIRE(out.rows == x.rows && out.cols == w.rows(), "linear into " + out.shape());
  require_cuda("linear", {x, w.dense, out});
  VectorProblem p;
  p.x = x;
  p.segment[0] = segment_of(w, out);
  p.out_dtype = out.dtype;
  p.epilogue = accumulate ? VectorEpilogue::add : VectorEpilogue::store;
  if (!vector_fits(p, vector_resources())) return matmul(x, w.dense, out, accumulate);
  vector_product(p, vector_resources(), stream_);
}

void CudaOps::qkv_step(const QkvStep& s) {
  const bool fused = streams(s.x, *s.q) && vector_takes(*s.k, s.x.dtype) &&
                     vector_takes(*s.v, s.x.dtype) && vector_compatible(*s.q, *s.k) &&
                     vector_compatible(*s.q, *s.v) && s.head_dim >= 32 &&
                     std::has_single_bit(static_cast<std::uint64_t>(s.head_dim));
  if (!fused) return Ops::qkv_step(s);
  REQUIRE(s.head_dim <= 256 && s.v->rows() == s.k->rows() && s.q->rows() % s.head_dim == 0 &&
              s.k->rows() % s.head_dim == 0 && s.q_out.dtype == s.x.dtype &&
              s.q_out.rows == s.x.rows && s.q_out.cols == s.q->rows() &&
              s.cache.batch >= s.x.rows && s.cache.k.cols == s.k->rows() &&
              s.cache.v.cols == s.v->rows(),
          "qkv_step of " + s.x.shape() + " into " + s.q_out.shape());
  check_cache("qkv_step", s.cache, s.head_dim, s.x.dtype);
  check_rope_step(s.q_out, s.head_dim, s.cos, s.sin, s.position);
  require_cuda("qkv_step", {s.x, s.norm, s.cos, s.sin, s.position, s.q_out, s.cache.k, s.cache.v});
  VectorProblem p;
  p.x = s.x;
  p.norm = s.norm;
  p.eps = s.eps;
  p.segments = 3;
  p.segment[0] = segment_of(*s.q, s.q_out);
  if (s.cache.quantized()) {
    // A head's scale needs all its values, which several blocks compute.
    for (const View& v : {s.scratch.k, s.scratch.v}) {
      REQUIRE(v.dtype == s.x.dtype && v.rows >= s.x.rows && v.cols == s.k->rows(),
              "qkv_step: scratch " + v.shape());
      require_cuda("qkv_step", {v});
    }
    p.segment[1] = segment_of(*s.k, s.scratch.k);
    p.segment[2] = segment_of(*s.v, s.scratch.v);
  } else {
    REQUIRE(s.cache.k.dtype == s.x.dtype, "qkv_step: the cache is " + s.cache.k.shape());
    p.segment[1] = cache_segment(*s.k, s.cache.k, s.cache.capacity);
    p.segment[2] = cache_segment(*s.v, s.cache.v, s.cache.capacity);
  }
  p.out_dtype = s.x.dtype;
  p.epilogue = VectorEpilogue::qkv;
  p.head_dim = s.head_dim;
  p.cos = s.cos;
  p.sin = s.sin;
  p.position = s.position;
  p.positions = std::min(s.cache.capacity, s.cos.rows);
  if (!vector_fits(p, vector_resources())) {
    if (s.x.rows <= vector_max_int_rows) return Ops::qkv_step(s);
    // Twice half the rows is faster than one launch for each of q, k and v.
    const std::int64_t half = (s.x.rows + 1) / 2;
    qkv_step(some_rows(s, 0, half));
    qkv_step(some_rows(s, half, s.x.rows - half));
    return;
  }
  vector_product(p, vector_resources(), stream_);
  if (s.cache.quantized()) {
    kv_append_step(s.scratch.k.row_range(0, s.x.rows), s.scratch.v.row_range(0, s.x.rows),
                   s.head_dim, s.cache, s.position);
  }
}

void CudaOps::gate_up(const GateUp& s) {
  if (!streams(s.x, *s.gate) || !vector_takes(*s.up, s.x.dtype) ||
      !vector_compatible(*s.gate, *s.up)) {
    return Ops::gate_up(s);
  }
  REQUIRE(s.gate->rows() == s.up->rows() && s.out.dtype == s.x.dtype && s.out.rows == s.x.rows &&
              s.out.cols == s.gate->rows(),
          "gate_up of " + s.x.shape() + " into " + s.out.shape());
  require_cuda("gate_up", {s.x, s.norm, s.out});
  VectorProblem p;
  p.x = s.x;
  p.norm = s.norm;
  p.eps = s.eps;
  p.segments = 2;
  p.segment[0] = segment_of(*s.gate, s.out);
  p.segment[1] = segment_of(*s.up, s.out);
  p.out_dtype = s.x.dtype;
  p.epilogue = VectorEpilogue::silu;
  if (!vector_fits(p, vector_resources())) return Ops::gate_up(s);
  vector_product(p, vector_resources(), stream_);
}

void CudaOps::norm_linear(const NormLinear& s) {
  if (!streams(s.x, *s.w) || !fits_store(s.x, s.out)) return Ops::norm_linear(s);
  REQUIRE(s.out.rows == s.x.rows && s.out.cols == s.w->rows(),
          "norm_linear of " + s.x.shape() + " into " + s.out.shape());
  require_cuda("norm_linear", {s.x, s.norm, s.out});
  VectorProblem p;
  p.x = s.x;
  p.norm = s.norm;
  p.eps = s.eps;
  p.segment[0] = segment_of(*s.w, s.out);
  p.out_dtype = s.out.dtype;
  if (!vector_fits(p, vector_resources())) return Ops::norm_linear(s);
  vector_product(p, vector_resources(), stream_);
}

}  // namespace engine
