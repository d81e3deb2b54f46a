// Contract: rotary embedding and attention.
#pragma once

#include <cstdint>

#include "engine/core/view.h"

namespace engine {

struct AttnShape {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;  // divides heads; query head h reads kv head h / (heads / kv_heads)
  std::int64_t head_dim = 0;  // even, at most 256
};

// Row r of a stacked batch of sequences stands at position start + r % period.
struct Positions {
  std::int64_t start = 0;
  std::int64_t period = 0;
};

class AttnOps {
 public:
  virtual ~AttnOps() = default;

  // Rotates halves in place (Hugging Face's convention): with j < head_dim/2,
  // (x_j, x_{j+hd/2}) -> (x_j cos - x_{j+hd/2} sin, x_{j+hd/2} cos + x_j sin).
  // x [rows, n * head_dim] f32/f16/bf16; cos, sin f32 [positions, head_dim/2], rounded to x's dtype
  // before use as Hugging Face does; the products are rounded to x's dtype before they are added.
  virtual void rope(View x, std::int64_t head_dim, View cos, View sin, Positions positions) = 0;

  // Causal grouped-query attention with scale 1/sqrt(head_dim), softmax in f32.
  // q [batch * q_len, heads * head_dim]; k, v [batch * kv_len, kv_heads * head_dim] (row strides
  // may be larger); out as q. Query i of a sequence stands at position kv_len - q_len + i and sees
  // keys 0 .. that position. The score matrix is never stored. One dtype. `workspace` holds
  // attention_workspace_bytes(...) bytes (u8 [1, n]); it may be empty if that is 0.
  virtual void attention(View q, View k, View v, const AttnShape& shape, std::int64_t batch,
                         View out, View workspace) = 0;
  [[nodiscard]] virtual std::int64_t attention_workspace_bytes(const AttnShape& shape,
                                                               std::int64_t batch,
                                                               std::int64_t q_len,
                                                               std::int64_t kv_len) const = 0;
};

}  // namespace engine
