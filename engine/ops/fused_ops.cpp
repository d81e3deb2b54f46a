// The fused ops by composition of plain ones.
#include "engine/ops/fused_ops.h"

#include "engine/ops/ops.h"

namespace engine {

void Ops::linear(View x, const Linear& w, View out, bool accumulate, View workspace,
                 PackedKernel kernel) {
  if (w.is_packed()) {
    packed_matmul(x, w.packed, out, accumulate, kernel, workspace);
  } else {
    matmul(x, w.dense, out, accumulate);
  }
}

void Ops::linears(View x, std::span<const LinearOut> all, View workspace) {
  for (const LinearOut& one : all) linear(x, *one.w, one.out, false, workspace);
}

void Ops::qkv_step(const QkvStep& s) {
  const View h = s.scratch.h.row_range(0, s.x.rows);
  const View k = s.scratch.k.row_range(0, s.x.rows);
  const View v = s.scratch.v.row_range(0, s.x.rows);
  rmsnorm(s.x, s.norm, s.eps, h);
  const LinearOut all[] = {{s.q, s.q_out}, {s.k, k}, {s.v, v}};
  linears(h, all, s.scratch.workspace);
  rope_step(s.q_out, s.head_dim, s.cos, s.sin, s.position);
  rope_step(k, s.head_dim, s.cos, s.sin, s.position);
  kv_append_step(k, v, s.head_dim, s.cache, s.position);
}

void Ops::gate_up(const GateUp& s) {
  const View h = s.scratch.h.row_range(0, s.x.rows);
  const View u = s.scratch.u.row_range(0, s.x.rows);
  rmsnorm(s.x, s.norm, s.eps, h);
  const LinearOut both[] = {{s.gate, s.out}, {s.up, u}};
  linears(h, both, s.scratch.workspace);
  silu_mul(s.out, u, s.out);
}

void Ops::block_tail(const BlockTail& s) {
  linear(s.a, *s.o, s.mlp.x, true, s.mlp.scratch.workspace);
  gate_up(s.mlp);
  linear(s.mlp.out, *s.down, s.mlp.x, true, s.mlp.scratch.workspace);
  if (s.next.q != nullptr) qkv_step(s.next);
}

void Ops::norm_linear(const NormLinear& s) {
  const View h = s.scratch.h.row_range(0, s.x.rows);
  rmsnorm(s.x, s.norm, s.eps, h);
  linear(h, *s.w, s.out, false, s.scratch.workspace);
}

}  // namespace engine
