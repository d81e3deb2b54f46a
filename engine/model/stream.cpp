#include "engine/model/stream.h"

#include <algorithm>

#include "engine/core/interrupt.h"

namespace engine {

void check_tokens(std::span<const std::int32_t> ids, const ModelConfig& config,
                  const std::string& what) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= config.vocab) {
      throw Error(ErrorCode::mismatch,
                  what + ": token " + std::to_string(i) + ": expected an id below the model's " +
                      "vocabulary of " + std::to_string(config.vocab) + ", found " +
                      std::to_string(ids[i]) + " (a tokenizer of another model?)");
    }
  }
}

void embed_stream(WeightSource& source, Loader& loader, const TokenWindows& tokens, View hidden) {
  Arena& arena = loader.arena();
  const ModelConfig& c = source.config();
  const Arena::Scope scope(arena);
  const View table = arena.make(MemTag::weights, hidden.dtype, c.vocab, c.hidden);
  const View ids = arena.make(MemTag::activations, DType::i32, tokens.rows(), 1);
  source.load_dense("embed_tokens.weight", loader, table);
  if (arena.is_measuring()) return;
  loader.ops().upload(host_view(tokens.ids.data(), tokens.rows(), 1), ids);
  loader.ops().embed(ids, table, hidden);
  loader.ops().synchronize();
}

void propagate(const StreamPass& pass, View hidden) {
  BlockRun run = pass.run;
  const std::int64_t windows = hidden.rows / pass.seq;
  for (std::int64_t w = 0; w < windows; w += pass.batch) {
    check_interrupt();
    run.batch = std::min(pass.batch, windows - w);
    llama_block(run, pass.weights, pass.scratch,
                hidden.row_range(w * pass.seq, run.batch * pass.seq), {});
  }
}

void capture(const StreamPass& pass, View hidden, View copy, const TapFn& tap,
             const std::function<void(std::int64_t, const View&)>& after) {
  BlockRun run = pass.run;
  const std::int64_t windows = hidden.rows / pass.seq;
  for (std::int64_t w = 0; w < windows; w += pass.batch) {
    check_interrupt();
    run.batch = std::min(pass.batch, windows - w);
    const View x = copy.row_range(0, run.batch * pass.seq);
    pass.run.ops.copy(hidden.row_range(w * pass.seq, x.rows), x);
    llama_block(run, pass.weights, pass.scratch, x, tap);
    if (after) after(w * pass.seq, x);
  }
}

std::int64_t default_batch(DeviceKind kind, std::int64_t seq, std::int64_t windows) {
  const std::int64_t tokens = kind == DeviceKind::cpu ? seq : 16384;
  return std::clamp<std::int64_t>(tokens / std::max<std::int64_t>(seq, 1), 1,
                                  std::max<std::int64_t>(windows, 1));
}

void check_stream(Ops& ops, View hidden, const std::string& where) {
  const std::int64_t bad = ops.count_nonfinite(hidden);
  if (bad != 0) {
    throw Error(ErrorCode::numeric, where + ": expected finite activations, found " +
                                        std::to_string(bad) + " NaN or infinite values");
  }
}

}  // namespace engine
