// LLaMA the long way round: one token's arithmetic at a time, in double and plain loops. What the
// engine's forward pass is compared with.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/model/config.h"

namespace engine::test {

// Row-major values by Hugging Face name ("model.layers.0.self_attn.q_proj.weight", ...).
using NamedTensors = std::map<std::string, std::vector<float>>;

// Logits [ids.size(), vocab] of one sequence from position 0. A tied head is the embedding.
std::vector<double> naive_logits(const ModelConfig& config, const NamedTensors& tensors,
                                 std::span<const std::int32_t> ids);

}  // namespace engine::test
