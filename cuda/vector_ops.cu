// CudaOps: linears of few rows, alone and with what the decode step fuses around them.
#include <bit>
#include <vector>

#include "cuda/cuda_ops.h"
#include "cuda/rotated.h"
#include "cuda/types.cuh"
#include "cuda/vector.h"
#include "cuda/vector_wide.h"
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

VectorProblem linear_problem(View x, const Linear& w, View out, bool accumulate) {
  REQUIRE(out.rows == x.rows && out.cols == w.rows(), "linear into " + out.shape());
  require_cuda("linear", {x, out});
  VectorProblem p;
  p.x = x;
  p.segment[0] = segment_of(w, out);
  p.out_dtype = out.dtype;
  p.epilogue = accumulate ? VectorEpilogue::add : VectorEpilogue::store;
  return p;
}

bool streams_gate_up(const GateUp& s) {
  return streams(s.x, *s.gate) && vector_takes(*s.up, s.x.dtype) &&
         vector_compatible(*s.gate, *s.up);
}
VectorProblem gate_up_problem(const GateUp& s) {
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
  return p;
}

bool streams_qkv(const QkvStep& s) {
  return streams(s.x, *s.q) && vector_takes(*s.k, s.x.dtype) && vector_takes(*s.v, s.x.dtype) &&
         vector_compatible(*s.q, *s.k) && vector_compatible(*s.q, *s.v) && s.head_dim >= 32 &&
         std::has_single_bit(static_cast<std::uint64_t>(s.head_dim));
}
// Without the last step of a quantized cache, finish_qkv().
VectorProblem qkv_problem(const QkvStep& s) {
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
  return p;
}
void finish_qkv(Ops& ops, const QkvStep& s) {
  if (!s.cache.quantized()) return;
  ops.kv_append_step(s.scratch.k.row_range(0, s.x.rows), s.scratch.v.row_range(0, s.x.rows),
                     s.head_dim, s.cache, s.position);
}

}  // namespace

VectorResources CudaOps::vector_resources() const {
  return {properties_.multiProcessorCount,
          static_cast<std::int64_t>(properties_.sharedMemPerBlockOptin) - 2048,  // static shared
          sm90_code_,
          vector_partials_.view(),
          vector_counters_.view(),
          vector_arrivals_.view()};
}

SchemeDevice CudaOps::scheme_device() const {
  const VectorResources r = vector_resources();
  return {r.multiprocessors, r.shared_bytes};
}

bool CudaOps::stream_product(const VectorProblem& p) {
  const VectorResources resources = vector_resources();
  if (vector_fits(p, resources)) {
    vector_product(p, resources, stream_);
    return true;
  }
  if (!vector_wide_fits(p, resources)) return false;
  vector_wide_product(p, resources, stream_);
  return true;
}

bool CudaOps::stream_chain(const VectorProblem& first, const VectorProblem& second) {
  // Products of 8 bits are so long that their blocks meet for longer than a launch takes.
  if (first.segment[0].w->packed.shape.bits > 4) return false;
  const VectorProblem both[] = {first, second};
  if (!vector_chain_fits(both, vector_resources())) return false;
  vector_chain(both, vector_resources(), stream_);
  return true;
}

void CudaOps::linear(View x, const Linear& w, View out, bool accumulate, View workspace,
                     PackedKernel kernel) {
  if (w.is_packed()) return packed_matmul(x, w.packed, out, accumulate, kernel, workspace);
  if (!streams(x, w) || !fits_store(x, out)) return matmul(x, w.dense, out, accumulate);
  if (!stream_product(linear_problem(x, w, out, accumulate))) {
    matmul(x, w.dense, out, accumulate);
  }
}

void CudaOps::linears(View x, std::span<const LinearOut> all, View workspace) {
  // Schemes that go together take one launch: blocks for all rows of outputs at once.
  std::vector<SchemePart> parts;
  for (const LinearOut& one : all) {
    if (!one.w->is_packed() || !scheme_compatible(one.w->packed.shape, all[0].w->packed.shape) ||
        !scheme_fits(one.w->packed.shape, scheme_device()) || !fits_store(x, one.out) ||
        one.out.dtype != all[0].out.dtype) {
      break;
    }
    parts.push_back({&one.w->packed, one.out, x});
  }
  const bool together = !parts.empty() && parts.size() == all.size() &&
                        parts.size() <= scheme_max_parts && x.rows >= 1 &&
                        x.rows <= scheme_max_rows && x.dtype != DType::f32;
  if (!together) return Ops::linears(x, all, workspace);
  std::int64_t needed = 0;
  bool turned = false, compatible = true;
  for (const SchemePart& part : parts) {
    const PackedShape& s = part.w->shape;
    turned |= s.rotated();
    compatible &= rotated_compatible(s, parts[0].w->shape) && rotated_fits(s, scheme_device());
    needed += rotated_bytes(s, x.rows);
  }
  if (turned) {
    if (!compatible || workspace.bytes() < needed) return Ops::linears(x, all, workspace);
    return rotated_product(x, parts, false, scheme_device(), workspace, stream_);
  }
  scheme_product(x, parts, false, scheme_device(), stream_);
}

void CudaOps::qkv_step(const QkvStep& s) {
  if (!streams_qkv(s)) return Ops::qkv_step(s);
  if (stream_product(qkv_problem(s))) return finish_qkv(*this, s);
  if (s.x.rows <= vector_max_int_rows) return Ops::qkv_step(s);
  // Twice half the rows is faster than one launch for each of q, k and v.
  const std::int64_t half = (s.x.rows + 1) / 2;
  qkv_step(some_rows(s, 0, half));
  qkv_step(some_rows(s, half, s.x.rows - half));
}

void CudaOps::gate_up(const GateUp& s) {
  if (!streams_gate_up(s) || !stream_product(gate_up_problem(s))) Ops::gate_up(s);
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
  if (!stream_product(p)) Ops::norm_linear(s);
}

// o with gate and up, down with the next q, k, v: two launches in place of four. All four in one
// would be slower: the blocks meet for longer than a launch takes, unless the ring is full.
void CudaOps::block_tail(const BlockTail& s) {
  const View x = s.mlp.x;
  const bool first = streams(s.a, *s.o) && fits_store(s.a, x) && streams_gate_up(s.mlp) &&
                     stream_chain(linear_problem(s.a, *s.o, x, true), gate_up_problem(s.mlp));
  if (!first) {
    linear(s.a, *s.o, x, true, s.mlp.scratch.workspace, PackedKernel::automatic);
    gate_up(s.mlp);
  }
  const View g = s.mlp.out;
  if (s.next.q != nullptr && streams(g, *s.down) && fits_store(g, x) && streams_qkv(s.next) &&
      stream_chain(linear_problem(g, *s.down, x, true), qkv_problem(s.next))) {
    return finish_qkv(*this, s.next);
  }
  linear(g, *s.down, x, true, s.mlp.scratch.workspace, PackedKernel::automatic);
  if (s.next.q != nullptr) qkv_step(s.next);
}

}  // namespace engine
