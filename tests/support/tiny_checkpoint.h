// Random LLaMA checkpoints of any small shape, written as Hugging Face writes them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "engine/model/config.h"
#include "formats/safetensors.h"
#include "tests/support/naive_llama.h"

namespace engine::test {

// Two blocks, grouped queries, heads that are not a split of the hidden size; 128 divides the
// inputs of every linear.
ModelConfig small_config();

struct TinyCheckpoint {
  ModelConfig config = small_config();
  TensorDType dtype = TensorDType::bf16;
  std::uint64_t seed = 1;
  std::uint64_t max_shard_bytes = ShardedCheckpointWriter::kMaxShardBytes;
  std::filesystem::path tokenizer;  // a file to copy as it is; empty: none
  // Changes a tensor before it is rounded to `dtype`; may be empty.
  std::function<void(const std::string& name, std::vector<float>& values)> edit;
};

// Writes config.json, safetensors and the tokenizer; returns the values as they were stored.
NamedTensors write_tiny_checkpoint(const std::filesystem::path& directory,
                                   const TinyCheckpoint& options);

}  // namespace engine::test
