#include "engine/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/core/interrupt.h"
#include "engine/core/rng.h"
#include "engine/model/stream.h"

namespace engine {
namespace {

constexpr std::uint64_t sampling_stream = 0x73616d706c65;  // "sample"

}  // namespace

std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& o,
                          std::uint64_t step) {
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  if (o.temperature <= 0) return static_cast<std::int32_t>(best);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  if (o.top_p < 1) {
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
    });
  }
  std::vector<double> p(logits.size());
  double total = 0;
  const double top = logits[static_cast<std::size_t>(best)];
  for (std::size_t i = 0; i < p.size(); ++i) {
    p[i] = std::exp((logits[static_cast<std::size_t>(order[i])] - top) / o.temperature);
    total += p[i];
  }
  // The smallest set of most likely tokens whose probability reaches top_p.
  std::size_t kept = 0;
  double mass = 0;
  while (kept < p.size() && (kept == 0 || o.top_p >= 1 || mass < o.top_p * total))
    mass += p[kept++];
  double u = uniform_value(o.seed, sampling_stream, step) * mass;
  for (std::size_t i = 0; i < kept; ++i) {
    u -= p[i];
    if (u < 0) return order[i];
  }
  return order[kept - 1];
}

Decoder::Decoder(WeightSource& source, Ops& ops, Ledger& ledger, DType dtype, std::int64_t capacity)
    : source_(source), ops_(ops), ledger_(ledger), dtype_(dtype), capacity_(capacity) {
  Arena plan = Arena::measuring(ops.kind());
  layout(plan);
  load(plan);
  arena_ = std::make_unique<Arena>(ops.memory(), ledger, plan.peak());
  layout(*arena_);
  load(*arena_);
  host_logits_.resize(static_cast<std::size_t>(source.config().vocab));
}

void Decoder::layout(Arena& arena) {
  const ModelConfig& c = source_.config();
  const std::int64_t kv_dim = c.kv_heads * c.head_dim;
  const std::int64_t chunk = std::min(max_chunk, capacity_);
  blocks_.clear();
  cache_.clear();
  embedding_ = arena.make(MemTag::weights, dtype_, c.vocab, c.hidden);
  head_ = c.tie_embeddings ? embedding_ : arena.make(MemTag::weights, dtype_, c.vocab, c.hidden);
  final_norm_ = arena.make(MemTag::weights, dtype_, 1, c.hidden);
  for (std::int64_t i = 0; i < c.layers; ++i) {
    blocks_.push_back(make_block_weights(arena, c, dtype_));
    cache_.push_back({arena.make(MemTag::kv, dtype_, capacity_, kv_dim),
                      arena.make(MemTag::kv, dtype_, capacity_, kv_dim)});
  }
  rope_ = make_rope_table(arena, ops_, c, capacity_);
  scratch_ = make_block_scratch(arena, ops_, c, dtype_, 1, chunk, capacity_);
  // A few queries use another attention kernel with a workspace of its own. It splits the keys, and
  // a shorter context can have more splits than a longer one, so every length is asked for.
  const AttnShape shape{c.heads, c.kv_heads, c.head_dim};
  std::int64_t workspace = scratch_.workspace.count();
  for (std::int64_t q = 1; q <= chunk; ++q) {
    if (ops_.attention_workspace_bytes(shape, 1, q, capacity_) == 0) continue;
    for (std::int64_t kv = q; kv <= capacity_; ++kv) {
      workspace = std::max(workspace, ops_.attention_workspace_bytes(shape, 1, q, kv));
    }
  }
  scratch_.workspace = arena.make(MemTag::workspace, DType::u8, 1, workspace);
  ids_ = arena.make(MemTag::activations, DType::i32, chunk, 1);
  x_ = arena.make(MemTag::activations, dtype_, chunk, c.hidden);
  logits_ = arena.make(MemTag::activations, DType::f32, 1, c.vocab);
}

void Decoder::load(Arena& arena) {
  const Arena::Scope scope(arena);
  Loader loader(ops_, ledger_, arena, source_.config());
  source_.load_dense("embed_tokens.weight", loader, embedding_);
  if (!source_.config().tie_embeddings) source_.load_dense("lm_head.weight", loader, head_);
  source_.load_dense("norm.weight", loader, final_norm_);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    check_interrupt();
    load_block(source_, static_cast<std::int64_t>(i), loader, blocks_[i]);
  }
  if (!arena.is_measuring()) ops_.synchronize();
}

void Decoder::forward(std::span<const std::int32_t> tokens) {
  const auto n = static_cast<std::int64_t>(tokens.size());
  const View x = x_.row_range(0, n);
  const View ids = ids_.row_range(0, n);
  ops_.upload(host_view(tokens.data(), n, 1), ids);
  ops_.embed(ids, embedding_, x);
  BlockRun run{.ops = ops_, .config = source_.config(), .rope = rope_, .start = position_};
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    run.cache = &cache_[i];
    llama_block(run, blocks_[i], scratch_, x, {});
  }
  ops_.rmsnorm(x, final_norm_, static_cast<float>(source_.config().rms_eps),
               scratch_.h.row_range(0, n));
  position_ += n;
}

std::span<const float> Decoder::feed(std::span<const std::int32_t> tokens) {
  REQUIRE(!tokens.empty(), "no tokens");
  check_tokens(tokens, source_.config(), "prompt");
  if (position_ + static_cast<std::int64_t>(tokens.size()) > capacity_) {
    throw Error(ErrorCode::usage,
                "the context is full: expected at most " + std::to_string(capacity_) +
                    " tokens, found " +
                    std::to_string(position_ + static_cast<std::int64_t>(tokens.size())));
  }
  std::int64_t rows = 0;
  while (!tokens.empty()) {
    check_interrupt();
    rows = std::min<std::int64_t>(static_cast<std::int64_t>(tokens.size()), x_.rows);
    forward(tokens.first(static_cast<std::size_t>(rows)));
    tokens = tokens.subspan(static_cast<std::size_t>(rows));
  }
  ops_.matmul(scratch_.h.row_range(rows - 1, 1), head_, logits_, false);
  ops_.download(logits_, host_view(host_logits_.data(), 1, source_.config().vocab));
  for (const float v : host_logits_) {
    if (!std::isfinite(v)) {
      throw Error(ErrorCode::numeric, "position " + std::to_string(position_ - 1) +
                                          ": expected finite logits, found NaN or infinity");
    }
  }
  return host_logits_;
}

std::vector<float> Decoder::feed_all_logits(std::span<const std::int32_t> tokens) {
  REQUIRE(static_cast<std::int64_t>(tokens.size()) <= x_.rows, "too many tokens at once");
  REQUIRE(position_ + static_cast<std::int64_t>(tokens.size()) <= capacity_, "the context is full");
  check_tokens(tokens, source_.config(), "prompt");
  const std::int64_t vocab = source_.config().vocab;
  forward(tokens);
  std::vector<float> out(tokens.size() * static_cast<std::size_t>(vocab));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    ops_.matmul(scratch_.h.row_range(static_cast<std::int64_t>(i), 1), head_, logits_, false);
    ops_.download(logits_, host_view(out.data() + i * static_cast<std::size_t>(vocab), 1, vocab));
  }
  return out;
}

}  // namespace engine
