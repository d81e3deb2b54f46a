// The decoder's memory: what it takes, in which order, and how it is filled.
#include <algorithm>

#include "engine/core/interrupt.h"
#include "engine/model/decoder.h"

namespace engine {
namespace {

constexpr std::int64_t max_batch = 1024;

KvCache make_kv_cache(Arena& arena, const ModelConfig& c, const DecoderOptions& o) {
  const std::int64_t rows = o.batch * o.capacity, cols = c.kv_heads * c.head_dim;
  const DType dtype = o.kv8 ? DType::u8 : o.dtype;
  KvCache cache;
  cache.batch = o.batch;
  cache.capacity = o.capacity;
  cache.k = arena.make(MemTag::kv, dtype, rows, cols);
  cache.v = arena.make(MemTag::kv, dtype, rows, cols);
  if (o.kv8) {
    cache.k_scale = arena.make(MemTag::kv, DType::f32, rows, c.kv_heads);
    cache.v_scale = arena.make(MemTag::kv, DType::f32, rows, c.kv_heads);
  }
  return cache;
}

}  // namespace

Decoder::Decoder(WeightSource& source, Ops& ops, Ledger& ledger, const DecoderOptions& options)
    : quantized_(options.scheme ? quantize_on_load(source, *options.scheme) : nullptr),
      source_(quantized_ ? *quantized_ : source),
      ops_(ops),
      ledger_(ledger),
      options_(options) {
  REQUIRE(options.capacity > 0 && options.prompt_rows > 0, "no room for tokens");
  REQUIRE(options.batch > 0 && options.batch <= max_batch, "batch out of range");
  if (options_.max_steps <= 0) options_.max_steps = options_.capacity;
  if (options.exec == Exec::packed) require_packed(source_);
  Arena plan = Arena::measuring(ops.kind());
  build(plan);
  planned_bytes_ = plan.peak();
  planned_tags_ = plan.tag_peaks();
  const TagBytes before = ledger.entry(ops.memory().name()).live;
  arena_ = std::make_unique<Arena>(ops.memory(), ledger, planned_bytes_, options.poison);
  build(*arena_);
  REQUIRE(arena_->peak() == planned_bytes_, "planned " + std::to_string(planned_bytes_) +
                                                " bytes, took " + std::to_string(arena_->peak()));
  resident_tags_ = ledger.entry(ops.memory().name()).live;
  for (std::size_t t = 0; t < mem_tag_count; ++t) resident_tags_[t] -= before[t];
  host_logits_.resize(static_cast<std::size_t>(options.batch * config().vocab));
  ops.zero(step_workspace_);
  reset();
}

// Replays may still be running on the memory that goes now. A device that fails here has failed a
// call before, too.
Decoder::~Decoder() {
  try {
    ops_.synchronize();
  } catch (const Error&) {
  }
}

const ModelConfig& Decoder::config() const { return source_.config(); }

std::int64_t Decoder::rows_per_pass() const {
  return std::max(options_.batch,
                  std::min(options_.prompt_rows, options_.batch * options_.capacity));
}

void Decoder::build(Arena& arena) {
  const ModelConfig& c = config();
  blocks_.clear();
  cache_.clear();
  embedding_ = arena.make(MemTag::weights, options_.dtype, c.vocab, c.hidden);
  head_.dense = c.tie_embeddings ? embedding_
                                 : arena.make(MemTag::weights, options_.dtype, c.vocab, c.hidden);
  final_norm_ = arena.make(MemTag::weights, options_.dtype, 1, c.hidden);
  for (std::int64_t i = 0; i < c.layers; ++i) {
    blocks_.push_back(options_.exec == Exec::packed
                          ? make_block_weights(arena, source_, i, options_.dtype)
                          : make_block_weights(arena, c, options_.dtype));
    cache_.push_back(make_kv_cache(arena, c, options_));
  }
  rope_ = make_rope_table(arena, ops_, c, options_.capacity);
  load(arena);
  make_scratch(arena);
}

void Decoder::load(Arena& arena) {
  const Arena::Scope scope(arena);
  Loader loader(ops_, ledger_, arena, config());
  loader.verify = options_.verify;
  source_.load_dense("embed_tokens.weight", loader, embedding_);
  if (!config().tie_embeddings) source_.load_dense("lm_head.weight", loader, head_.dense);
  source_.load_dense("norm.weight", loader, final_norm_);
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    load_norms(source_, static_cast<std::int64_t>(i), loader, blocks_[i]);
  }
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    check_interrupt();
    load_linears(source_, static_cast<std::int64_t>(i), loader, blocks_[i]);
  }
  if (!arena.is_measuring()) ops_.synchronize();
}

// What any pass of at most `rows` rows and any step may ask for. Few queries take another attention
// kernel, which splits the keys; fewer keys or sequences can have more splits than more of them, so
// every length is asked for.
std::int64_t Decoder::workspace_bytes(std::int64_t rows) const {
  const AttnShape shape{config().heads, config().kv_heads, config().head_dim};
  std::int64_t bytes = 0;
  for (std::int64_t q = 1; q <= std::min(rows, options_.capacity); ++q) {
    if (ops_.attention_workspace_bytes(shape, 1, q, options_.capacity) != 0) {
      for (std::int64_t kv = q; kv <= options_.capacity; ++kv) {
        bytes = std::max(bytes, ops_.attention_workspace_bytes(shape, 1, q, kv));
      }
    }
    if (ops_.attention_workspace_bytes(shape, 1, q, q) == 0) continue;
    for (std::int64_t n = 1; n <= std::min(options_.batch, rows / q); ++n) {
      bytes = std::max(bytes, ops_.attention_workspace_bytes(shape, n, q, q));
    }
  }
  if (options_.exec == Exec::packed) {
    const std::vector<PackedShape> shapes = packed_shapes(source_);
    bytes = std::max(bytes,
                     packed_workspace_bytes(ops_, shapes, rows, options_.dtype, options_.kernel));
    bytes = std::max(bytes, packed_workspace_bytes(ops_, shapes, options_.batch, options_.dtype,
                                                   PackedKernel::automatic));
  }
  return bytes;
}

void Decoder::make_scratch(Arena& arena) {
  const ModelConfig& c = config();
  const DType dtype = options_.dtype;
  const std::int64_t rows = rows_per_pass(), batch = options_.batch;
  const AttnShape shape{c.heads, c.kv_heads, c.head_dim};
  const auto make = [&](DType type, std::int64_t r, std::int64_t n) {
    return arena.make(MemTag::activations, type, r, n);
  };
  scratch_ =
      make_block_scratch(arena, ops_, c, dtype, 1, rows, options_.capacity, workspace_bytes(rows));
  if (options_.kv8) {
    scratch_.k_read = make(dtype, options_.capacity, c.kv_heads * c.head_dim);
    scratch_.v_read = make(dtype, options_.capacity, c.kv_heads * c.head_dim);
  }
  ids_ = make(DType::i32, rows, 1);
  x_ = make(dtype, rows, c.hidden);
  last_ = make(dtype, batch, c.hidden);
  logits_ = make(DType::f32, batch, c.vocab);
  state_ = {.token = make(DType::i32, batch, 1),
            .position = make(DType::i32, 1, 1),
            .step = make(DType::i32, 1, 1),
            .history = make(DType::i32, batch, options_.max_steps),
            .bad = make(DType::i32, 1, 1)};
  step_workspace_ = arena.make(MemTag::workspace, DType::u8, 1,
                               ops_.attention_step_bytes(shape, batch, options_.capacity));
  sample_workspace_ =
      arena.make(MemTag::workspace, DType::u8, 1, ops_.sample_step_bytes(batch, c.vocab));
}

StepBytes Decoder::step_bytes(std::int64_t position) const {
  StepBytes bytes;
  for (const BlockWeights& w : blocks_) {
    bytes.weights += w.attn_norm.bytes() + w.mlp_norm.bytes();
    for (const Linear& linear : w.linear) bytes.weights += linear.bytes();
  }
  bytes.weights += final_norm_.bytes() + head_.bytes() + last_.bytes();
  for (const KvCache& cache : cache_) {
    const std::int64_t held =
        cache.k.bytes() + cache.v.bytes() + cache.k_scale.bytes() + cache.v_scale.bytes();
    bytes.kv += held / options_.capacity * (position + 1);
  }
  return bytes;
}

}  // namespace engine
