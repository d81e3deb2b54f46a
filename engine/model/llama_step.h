// One decoding step of the whole model, as it is recorded.
#pragma once

#include <vector>

#include "engine/model/llama.h"

namespace engine {

// Everything a step touches; nothing here changes from step to step.
struct LlamaStep {
  Ops& ops;
  const ModelConfig& config;
  View embedding;   // [vocab, hidden]
  View final_norm;  // [1, hidden]
  const Linear& head;
  const std::vector<BlockWeights>& blocks;
  const std::vector<KvCache>& cache;  // one per block
  RopeTable rope;
  const BlockScratch& scratch;
  View x;       // [batch, hidden]
  View logits;  // f32 [batch, vocab]
  View attention_workspace, sample_workspace;
  SampleOptions sampling;
  StepState state;
};

// Feeds state.token at state.position and samples the next one.
void llama_step(const LlamaStep& step);

}  // namespace engine
