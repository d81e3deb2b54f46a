#include "eval/model_pass.h"

#include <algorithm>
#include <optional>

#include "engine/core/progress.h"

namespace engine {
namespace {

// Rows of logits at a time: bounded f32 memory whatever the vocabulary.
constexpr std::int64_t logit_bytes = 512 << 20;
constexpr std::int64_t max_chunk = 4096;

}  // namespace

std::int64_t packed_bytes(const EvalModel& model, std::int64_t rows) {
  if (model.exec != Exec::packed) return 0;
  return packed_workspace_bytes(*model.ops, packed_shapes(*model.source), rows, model.dtype,
                                model.kernel);
}

void each_block(const EvalModel& model, Loader& loader, const std::string& label, View hidden,
                Report* report, const std::function<void(const BlockWeights&)>& step) {
  Arena& arena = loader.arena();
  const ModelConfig& config = model.source->config();
  std::optional<Progress> progress;
  if (!arena.is_measuring()) progress.emplace(label, config.layers + 1);
  // Schemes may differ from block to block, so each has its own memory and every one is planned.
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    const Arena::Scope block(arena);
    const BlockWeights weights = model.exec == Exec::packed
                                     ? make_block_weights(arena, *model.source, layer, model.dtype)
                                     : make_block_weights(arena, config, model.dtype);
    if (arena.is_measuring()) {
      load_block(*model.source, layer, loader, weights);
      continue;
    }
    {
      const PhaseTimer timer(*report, "load");
      load_block(*model.source, layer, loader, weights);
      model.ops->synchronize();
    }
    const PhaseTimer timer(*report, "blocks");
    step(weights);
    check_stream(*model.ops, hidden, "layers." + std::to_string(layer));
    progress->advance(1, "block " + std::to_string(layer));
  }
}

void run_windows(const EvalModel& model, Loader& loader, const TokenWindows& tokens,
                 std::int64_t batch, const std::string& label, View hidden, Report* report) {
  Arena& arena = loader.arena();
  Ops& ops = *model.ops;
  const ModelConfig& config = model.source->config();
  {
    std::optional<PhaseTimer> timer;
    if (report != nullptr) timer.emplace(*report, "embed");
    embed_stream(*model.source, loader, tokens, hidden);
  }
  const Arena::Scope scope(arena);
  batch = batch > 0 ? std::min(batch, tokens.windows)
                    : default_batch(ops.kind(), tokens.seq, tokens.windows);
  const RopeTable rope = make_rope_table(arena, ops, config, tokens.seq);
  StreamPass pass{
      .run = {.ops = ops, .config = config, .rope = rope, .kernel = model.kernel},
      .weights = {},
      .scratch = make_block_scratch(arena, ops, config, model.dtype, batch, tokens.seq, tokens.seq,
                                    packed_bytes(model, batch * tokens.seq)),
      .seq = tokens.seq,
      .batch = batch};
  each_block(model, loader, label, hidden, report, [&](const BlockWeights& weights) {
    pass.weights = weights;
    propagate(pass, hidden);
  });
}

Head::Head(const EvalModel& model, Loader& loader, std::int64_t rows) : model_(model) {
  const ModelConfig& c = model.source->config();
  Arena& arena = loader.arena();
  chunk_ = std::clamp<std::int64_t>(logit_bytes / (4 * c.vocab), 1, std::min(rows, max_chunk));
  norm_ = arena.make(MemTag::weights, model.dtype, 1, c.hidden);
  head_ = arena.make(MemTag::weights, model.dtype, c.vocab, c.hidden);
  h_ = arena.make(MemTag::activations, model.dtype, chunk_, c.hidden);
  logits_ = arena.make(MemTag::activations, DType::f32, chunk_, c.vocab);
  model.source->load_dense("norm.weight", loader, norm_);
  model.source->load_dense("lm_head.weight", loader, head_);
}

View Head::logits(View hidden) {
  const View h = h_.row_range(0, hidden.rows), out = logits_.row_range(0, hidden.rows);
  const auto eps = static_cast<float>(model_.source->config().rms_eps);
  model_.ops->rmsnorm(hidden, norm_, eps, h);
  model_.ops->matmul(h, head_, out, false);
  return out;
}

void planned_run(const EvalModel& model, bool poison, Report& report,
                 const std::function<void(Arena& arena, Report* report)>& pass) {
  Arena plan = Arena::measuring(model.ops->kind());
  pass(plan, nullptr);
  report.add_plan(plan.peak(), plan.tag_peaks());
  Arena arena(model.ops->memory(), *model.ledger, plan.peak(), poison);
  pass(arena, &report);
  REQUIRE(arena.peak() == plan.peak(), "planned " + std::to_string(plan.peak()) + " bytes, took " +
                                           std::to_string(arena.peak()));
  report["plan"]["arena_peak_bytes"] = arena.peak();
  report.add_driver_memory(*model.ops, *model.ledger);
}

}  // namespace engine
