// The parts of a layer-streamed pass that every evaluation shares: the loop over blocks and the
// final norm with the head. All of it also runs on a measuring arena, for the plan.
#pragma once

#include <functional>
#include <string>

#include "engine/core/report.h"
#include "engine/model/stream.h"

namespace engine {

// A model, and where and how it is evaluated.
struct EvalModel {
  WeightSource* source = nullptr;
  Ops* ops = nullptr;
  Ledger* ledger = nullptr;
  DType dtype = DType::bf16;                      // compute dtype and that of the hidden stream
  Exec exec = Exec::decoded;                      // how the blocks' linears are held
  PackedKernel kernel = PackedKernel::automatic;  // of products with packed linears
};

// What the products of up to `rows` rows with packed linears need; 0 for decoded ones.
[[nodiscard]] std::int64_t packed_bytes(const EvalModel& model, std::int64_t rows);

// For every block in turn: loads it into a scope of the arena and calls `step` with its weights;
// then checks `hidden`. On a measuring arena it only loads. Times go to the report as "load" and
// "blocks"; `label` names the progress bar.
void each_block(const EvalModel& model, Loader& loader, const std::string& label, View hidden,
                Report* report, const std::function<void(const BlockWeights&)>& step);

// hidden [tokens.windows * seq, hidden]: embeds the tokens and runs them through all blocks,
// `batch` windows at a time (0: default_batch).
void run_windows(const EvalModel& model, Loader& loader, const TokenWindows& tokens,
                 std::int64_t batch, const std::string& label, View hidden, Report* report);

// Final norm and head, in memory of the loader's arena until its scope ends.
class Head {
 public:
  // Logits of at most `rows` rows at a time, and of no more than fit half a gigabyte.
  Head(const EvalModel& model, Loader& loader, std::int64_t rows);
  [[nodiscard]] std::int64_t chunk() const { return chunk_; }
  // f32 [hidden.rows, vocab] for up to chunk() rows of the last block's output; good until the next
  // call.
  View logits(View hidden);

 private:
  const EvalModel& model_;
  std::int64_t chunk_;
  View norm_, head_, h_, logits_;
};

// Runs `pass` on a measuring arena, then on a real one of just that size; puts the plan and the
// driver's view of the memory into the report.
void planned_run(const EvalModel& model, bool poison, Report& report,
                 const std::function<void(Arena& arena, Report* report)>& pass);

}  // namespace engine
