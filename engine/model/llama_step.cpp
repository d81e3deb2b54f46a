// A LLaMA decoder for one token per sequence (Touvron et al. 2023; blocks as in llama_block.cpp):
//   x = embedding[token]
//   x <- x + Wo . attention(q, cache),  q, cache = rope(Wq n), (rope(Wk n), Wv n),  n = rmsnorm(x)
//   x <- x + Wdown . (silu(Wgate m) * (Wup m)),                                     m = rmsnorm(x)
//   token = sample(Whead . rmsnorm(x))
#include "engine/model/llama_step.h"

namespace engine {

void llama_step(const LlamaStep& s) {
  Ops& ops = s.ops;
  const ModelConfig& c = s.config;
  const std::int64_t batch = s.x.rows;
  const auto eps = static_cast<float>(c.rms_eps);
  const View x = s.x;
  const View q = s.scratch.q.row_range(0, batch), a = s.scratch.a.row_range(0, batch),
             g = s.scratch.g.row_range(0, batch);
  const FusedScratch fused{.h = s.scratch.h,
                           .k = s.scratch.k,
                           .v = s.scratch.v,
                           .u = s.scratch.u,
                           .workspace = s.scratch.workspace};
  const AttnShape shape{c.heads, c.kv_heads, c.head_dim};

  const auto qkv = [&](std::size_t layer) {
    const BlockWeights& w = s.blocks[layer];
    return QkvStep{.x = x,
                   .norm = w.attn_norm,
                   .eps = eps,
                   .q = &w[Site::q],
                   .k = &w[Site::k],
                   .v = &w[Site::v],
                   .head_dim = c.head_dim,
                   .cos = s.rope.cos,
                   .sin = s.rope.sin,
                   .position = s.state.position,
                   .cache = s.cache[layer],
                   .q_out = q,
                   .scratch = fused};
  };

  ops.embed(s.state.token, s.embedding, x);
  if (!s.blocks.empty()) ops.qkv_step(qkv(0));
  for (std::size_t layer = 0; layer < s.blocks.size(); ++layer) {
    const BlockWeights& w = s.blocks[layer];
    ops.attention_step(q, s.cache[layer], shape, s.state.position, a, s.attention_workspace);
    BlockTail tail{.a = a,
                   .o = &w[Site::o],
                   .mlp = {.x = x,
                           .norm = w.mlp_norm,
                           .eps = eps,
                           .gate = &w[Site::gate],
                           .up = &w[Site::up],
                           .out = g,
                           .scratch = fused},
                   .down = &w[Site::down],
                   .next = {}};
    if (layer + 1 < s.blocks.size()) tail.next = qkv(layer + 1);
    ops.block_tail(tail);
  }
  ops.norm_linear(
      {.x = x, .norm = s.final_norm, .eps = eps, .w = &s.head, .out = s.logits, .scratch = fused});
  ops.sample_step(s.logits, s.sampling, s.state, s.sample_workspace);
}

}  // namespace engine
