// Layer-streamed passes: every sequence goes through block i before block i+1 is loaded, so memory
// is one block plus the hidden stream, whatever the model's size. Quantization and evaluation share
// this.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "engine/model/source.h"

namespace engine {

// `windows` sequences of `seq` tokens each, stacked row-major.
struct TokenWindows {
  std::vector<std::int32_t> ids;
  std::int64_t windows = 0;
  std::int64_t seq = 0;

  [[nodiscard]] std::int64_t rows() const { return windows * seq; }
};

// Throws Error(mismatch) if an id is outside the model's vocabulary (the wrong tokenizer).
void check_tokens(std::span<const std::int32_t> ids, const ModelConfig& config,
                  const std::string& what);

// hidden [windows * seq, hidden] = embeddings of the tokens. The table lives in a scope of the
// loader's arena. On a measuring arena only the layout is recorded.
void embed_stream(WeightSource& source, Loader& loader, const TokenWindows& tokens, View hidden);

// Where a pass over the stream happens.
struct StreamPass {
  BlockRun run;  // batch and start are set by the pass
  BlockWeights weights;
  BlockScratch scratch;  // for batch * seq rows
  std::int64_t seq = 0;
  std::int64_t batch = 1;  // sequences at a time
};

// Runs the block over all sequences in place. Checks for Ctrl-C between batches.
void propagate(const StreamPass& pass, View hidden);

// Runs the block on a copy of each batch (`copy` [batch * seq, hidden]), leaving the stream as it
// is; `tap` as in llama_block. `after` (may be empty) gets each batch's first row and its output,
// which is complete only if no tap ended the block.
void capture(const StreamPass& pass, View hidden, View copy, const TapFn& tap,
             const std::function<void(std::int64_t first_row, const View& out)>& after);

// Sequences per batch when the user does not say: about 16k tokens on a GPU, one sequence on a CPU.
[[nodiscard]] std::int64_t default_batch(DeviceKind kind, std::int64_t seq, std::int64_t windows);

// Throws Error(numeric) if the stream holds NaN or infinity; `where` says after what.
void check_stream(Ops& ops, View hidden, const std::string& where);

}  // namespace engine
