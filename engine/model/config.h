// The shape of a LLaMA-architecture model, from config.json or by the name of a known model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "formats/safetensors.h"

namespace engine {

enum class RopeType : std::uint8_t { none, linear, llama3 };

// Only `linear` uses factor; `llama3` uses all four.
struct RopeScaling {
  RopeType type = RopeType::none;
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int64_t original_max_positions = 8192;

  bool operator==(const RopeScaling&) const = default;
};

struct ModelConfig {
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;     // of the queries
  std::int64_t kv_heads = 0;  // divides heads
  std::int64_t head_dim = 0;  // even; heads * head_dim may differ from hidden
  std::int64_t vocab = 0;
  std::int64_t max_positions = 0;
  double rope_theta = 10000.0;
  double rms_eps = 1e-6;
  bool tie_embeddings = false;                 // lm_head is embed_tokens
  TensorDType torch_dtype = TensorDType::f32;  // f32, f16 or bf16: what the file claims
  std::int64_t bos = -1;                       // -1: none
  std::vector<std::int64_t> eos;               // any of them ends generation
  RopeScaling rope_scaling;

  bool operator==(const ModelConfig&) const = default;
};

// Parses config.json of a LlamaForCausalLM. Throws FormatError naming key, expected and found for
// anything missing, out of range or outside the architecture: other model types, activations or
// rope types, biases, heads that kv_heads do not divide. Keys without influence are ignored.
[[nodiscard]] ModelConfig config_from_json(std::string_view text, const std::string& file);

// config.json of a checkpoint directory; its generation_config.json, if there, decides eos.
[[nodiscard]] ModelConfig load_config(const std::filesystem::path& directory);

// config.json in the Hugging Face layout; config_from_json() of it gives an equal config.
[[nodiscard]] std::string config_to_json(const ModelConfig& config);

// The published shape of "llama-7b", "llama2-7b", "llama3-8b", "llama3-70b", "llava-next-8b" (its
// language model), or the small "tiny-test". Throws Error(usage) listing these names for others.
[[nodiscard]] ModelConfig synthetic_config(std::string_view name);
[[nodiscard]] std::vector<std::string> synthetic_config_names();

// Throws FormatError (with `file`) if the fields contradict each other.
void check_config(const ModelConfig& config, const std::string& file);

// All parameters; a tied head counts once.
[[nodiscard]] std::int64_t parameter_count(const ModelConfig& config);

// Angle per position of each rotated pair: head_dim / 2 values, computed in f32 in the order of
// Hugging Face transformers, scaling included.
[[nodiscard]] std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace engine
