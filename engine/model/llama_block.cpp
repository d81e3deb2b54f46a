// One LLaMA decoder block (Touvron et al. 2023; grouped-query attention as in LLaMA2/3):
//   x <- x + Wo . attention(rope(Wq n), rope(Wk n), Wv n),  n = rmsnorm(x)
//   x <- x + Wdown . (silu(Wgate m) * (Wup m)),             m = rmsnorm(x)
#include "engine/model/llama.h"

namespace engine {

void llama_block(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View x,
                 const TapFn& tap) {
  Ops& ops = run.ops;
  const ModelConfig& c = run.config;
  const std::int64_t rows = x.rows;
  const std::int64_t len = rows / run.batch;
  const auto window = [&](const View& v) { return v.row_range(0, rows); };
  const auto seen = [&](Tap t, const View& v) { return !tap || tap(t, v); };
  const View h = window(s.h), q = window(s.q), k = window(s.k), v = window(s.v), a = window(s.a),
             g = window(s.g), u = window(s.u);
  const AttnShape shape{c.heads, c.kv_heads, c.head_dim};
  const Positions positions{run.start, len};

  ops.rmsnorm(x, w.attn_norm, static_cast<float>(c.rms_eps), h);
  if (!seen(Tap::attn_in, h)) return;
  ops.matmul(h, w[Site::q], q, false);
  ops.matmul(h, w[Site::k], k, false);
  ops.matmul(h, w[Site::v], v, false);
  ops.rope(q, c.head_dim, run.rope.cos, run.rope.sin, positions);
  ops.rope(k, c.head_dim, run.rope.cos, run.rope.sin, positions);
  if (run.cache != nullptr) {
    ops.copy(k, run.cache->k.row_range(run.start, rows));
    ops.copy(v, run.cache->v.row_range(run.start, rows));
    ops.attention(q, run.cache->k.row_range(0, run.start + rows),
                  run.cache->v.row_range(0, run.start + rows), shape, 1, a, s.workspace);
  } else {
    ops.attention(q, k, v, shape, run.batch, a, s.workspace);
  }
  if (!seen(Tap::attn_out, a)) return;
  ops.matmul(a, w[Site::o], x, true);

  ops.rmsnorm(x, w.mlp_norm, static_cast<float>(c.rms_eps), h);
  if (!seen(Tap::mlp_in, h)) return;
  ops.matmul(h, w[Site::gate], g, false);
  ops.matmul(h, w[Site::up], u, false);
  ops.silu_mul(g, u, g);
  if (!seen(Tap::mlp_out, g)) return;
  ops.matmul(g, w[Site::down], x, true);
}

}  // namespace engine
