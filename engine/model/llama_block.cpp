// One LLaMA decoder block (Touvron et al. 2023; grouped-query attention as in LLaMA2/3):
//   x <- x + Wo . attention(rope(Wq n), rope(Wk n), Wv n),  n = rmsnorm(x)
//   x <- x + Wdown . (silu(Wgate m) * (Wup m)),             m = rmsnorm(x)
#include "engine/model/llama.h"

namespace engine {
namespace {

// Attention of the new rows, which are appended to the cache first if there is one. Queries then
// see what the cache holds; only whole sequences in a plain cache, where that is k and v, need not
// be read back.
void attend(const BlockRun& run, const BlockScratch& s, View q, View k, View v, View out) {
  Ops& ops = run.ops;
  const ModelConfig& c = run.config;
  const AttnShape shape{c.heads, c.kv_heads, c.head_dim};
  if (run.cache != nullptr) {
    ops.kv_append(k, v, c.head_dim, *run.cache, run.first, run.batch, run.start);
  }
  if (run.cache == nullptr || (run.start == 0 && !run.cache->quantized())) {
    ops.attention(q, k, v, shape, run.batch, out, s.workspace);
    return;
  }
  const std::int64_t len = q.rows / run.batch;
  const std::int64_t seen = run.start + len;
  for (std::int64_t b = 0; b < run.batch; ++b) {
    const std::int64_t sequence = run.first + b;
    View keys = run.cache->k.row_range(sequence * run.cache->capacity, seen);
    View values = run.cache->v.row_range(sequence * run.cache->capacity, seen);
    if (run.cache->quantized()) {
      keys = s.k_read.row_range(0, seen);
      values = s.v_read.row_range(0, seen);
      ops.kv_read(*run.cache, c.head_dim, sequence, keys, values);
    }
    ops.attention(q.row_range(b * len, len), keys, values, shape, 1, out.row_range(b * len, len),
                  s.workspace);
  }
}

bool seen(const TapFn& tap, Tap t, const View& v) { return !tap || tap(t, v); }

}  // namespace

bool llama_attention(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View h,
                     View out, bool accumulate, const TapFn& tap) {
  Ops& ops = run.ops;
  const std::int64_t head_dim = run.config.head_dim;
  const std::int64_t kept = run.ragged != nullptr ? run.ragged->kept : 0;
  const View q = s.q.row_range(0, h.rows), a = s.a.row_range(0, h.rows);
  const View k = s.k.row_range(kept, h.rows), v = s.v.row_range(kept, h.rows);
  ops.linear(h, w[Site::q], q, false, s.workspace, run.kernel);
  ops.linear(h, w[Site::k], k, false, s.workspace, run.kernel);
  ops.linear(h, w[Site::v], v, false, s.workspace, run.kernel);
  if (run.ragged != nullptr) {
    const ModelConfig& c = run.config;
    const RaggedBatch& r = *run.ragged;
    ops.rope_rows(q, head_dim, run.rope.cos, run.rope.sin, r.positions);
    ops.rope_rows(k, head_dim, run.rope.cos, run.rope.sin, r.positions);
    ops.attention_runs(q, s.k.row_range(0, kept + h.rows), s.v.row_range(0, kept + h.rows),
                       {c.heads, c.kv_heads, head_dim}, r.runs, a);
  } else {
    const Positions positions{run.start, h.rows / run.batch};
    ops.rope(q, head_dim, run.rope.cos, run.rope.sin, positions);
    ops.rope(k, head_dim, run.rope.cos, run.rope.sin, positions);
    attend(run, s, q, k, v, a);
  }
  if (!seen(tap, Tap::attn_out, a)) return false;
  ops.linear(a, w[Site::o], out, accumulate, s.workspace, run.kernel);
  return true;
}

bool llama_mlp(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View h, View out,
               bool accumulate, const TapFn& tap) {
  Ops& ops = run.ops;
  const View g = s.g.row_range(0, h.rows), u = s.u.row_range(0, h.rows);
  ops.linear(h, w[Site::gate], g, false, s.workspace, run.kernel);
  ops.linear(h, w[Site::up], u, false, s.workspace, run.kernel);
  ops.silu_mul(g, u, g);
  if (!seen(tap, Tap::mlp_out, g)) return false;
  ops.linear(g, w[Site::down], out, accumulate, s.workspace, run.kernel);
  return true;
}

void llama_block(const BlockRun& run, const BlockWeights& w, const BlockScratch& s, View x,
                 const TapFn& tap) {
  const View h = s.h.row_range(0, x.rows);
  const auto eps = static_cast<float>(run.config.rms_eps);
  run.ops.rmsnorm(x, w.attn_norm, eps, h);
  if (!seen(tap, Tap::attn_in, h)) return;
  if (!llama_attention(run, w, s, h, x, true, tap)) return;
  run.ops.rmsnorm(x, w.mlp_norm, eps, h);
  if (!seen(tap, Tap::mlp_in, h)) return;
  llama_mlp(run, w, s, h, x, true, tap);
}

}  // namespace engine
