// Fused ops: each is defined by the composition of plain ops in fused_ops.cpp, which is what a
// backend without a kernel of its own runs; a kernel is tested against it on the same device.
// Rounding points are those of the composition unless a line says otherwise.
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/ops/packed_ops.h"
#include "engine/ops/step_ops.h"

namespace engine {

// Intermediate results of the compositions, at least as many rows as x.
struct FusedScratch {
  View h;          // [rows, cols of the linears]: the normalized input
  View k, v;       // [rows, kv_heads * head_dim]: keys and values (qkv_step)
  View u;          // [rows, intermediate]: the up projection (gate_up)
  View workspace;  // u8 [1, n]: packed_workspace_bytes of the linears
};

// q_out = rope(q(rmsnorm(x))); rope(k(..)) and v(..) are appended to the cache.
struct QkvStep {
  View x, norm;  // [batch, hidden], [1, hidden]
  float eps = 0;
  const Linear* q = nullptr;
  const Linear* k = nullptr;
  const Linear* v = nullptr;
  std::int64_t head_dim = 0;
  View cos, sin;  // f32 [positions, head_dim / 2]
  View position;  // i32 [1, 1]
  KvCache cache;
  View q_out;  // [batch, heads * head_dim]
  FusedScratch scratch;
};

// out = silu(gate(rmsnorm(x))) * up(rmsnorm(x)).
struct GateUp {
  View x, norm;
  float eps = 0;
  const Linear* gate = nullptr;
  const Linear* up = nullptr;
  View out;  // [rows, intermediate]
  FusedScratch scratch;
};

// out = w(rmsnorm(x)); out of x's dtype or f32.
struct NormLinear {
  View x, norm;
  float eps = 0;
  const Linear* w = nullptr;
  View out;
  FusedScratch scratch;
};

// What follows the attention of a block, up to the queries of the next one:
//   x += o(a); then gate_up(mlp); x += down(mlp.out); then qkv_step(next), if next.q is given.
// mlp.x and next.x are x. The composition is that of the fused ops.
struct BlockTail {
  View a;  // [rows, heads * head_dim]: what attention gave
  const Linear* o = nullptr;
  GateUp mlp;
  const Linear* down = nullptr;
  QkvStep next;
};

}  // namespace engine
