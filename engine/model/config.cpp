#include "engine/model/config.h"

#include <array>
#include <cmath>
#include <numbers>

#include "formats/error.h"

namespace engine {
namespace {

struct NamedConfig {
  std::string_view name;
  std::int64_t hidden, intermediate, layers, heads, kv_heads, vocab, max_positions;
  double rope_theta, rms_eps;
  TensorDType torch_dtype;
  std::int64_t bos, eos;
};

// head_dim is hidden / heads and the head is not tied in all of them.
constexpr std::array<NamedConfig, 6> kNamed = {{
    {"llama-7b", 4096, 11008, 32, 32, 32, 32000, 2048, 1e4, 1e-6, TensorDType::f16, 1, 2},
    {"llama2-7b", 4096, 11008, 32, 32, 32, 32000, 4096, 1e4, 1e-5, TensorDType::f16, 1, 2},
    {"llama3-8b", 4096, 14336, 32, 32, 8, 128256, 8192, 5e5, 1e-5, TensorDType::bf16, 128000,
     128001},
    {"llama3-70b", 8192, 28672, 80, 64, 8, 128256, 8192, 5e5, 1e-5, TensorDType::bf16, 128000,
     128001},
    // LLaMA3-8B-Instruct with a vocabulary padded for the image tokens; ends turns by <|eot_id|>.
    {"llava-next-8b", 4096, 14336, 32, 32, 8, 128320, 8192, 5e5, 1e-5, TensorDType::bf16, 128000,
     128009},
    {"tiny-test", 128, 384, 2, 4, 2, 512, 512, 1e4, 1e-5, TensorDType::bf16, 1, 2},
}};

}  // namespace

std::vector<std::string> synthetic_config_names() {
  std::vector<std::string> names;
  for (const NamedConfig& row : kNamed) names.emplace_back(row.name);
  return names;
}

ModelConfig synthetic_config(std::string_view name) {
  std::string known;
  for (const NamedConfig& row : kNamed) {
    if (row.name == name) {
      ModelConfig config;
      config.hidden = row.hidden;
      config.intermediate = row.intermediate;
      config.layers = row.layers;
      config.heads = row.heads;
      config.kv_heads = row.kv_heads;
      config.head_dim = row.hidden / row.heads;
      config.vocab = row.vocab;
      config.max_positions = row.max_positions;
      config.rope_theta = row.rope_theta;
      config.rms_eps = row.rms_eps;
      config.torch_dtype = row.torch_dtype;
      config.bos = row.bos;
      config.eos = {row.eos};
      return config;
    }
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  throw Error(ErrorCode::usage, "synthetic model: expected one of " + known + ", found \"" +
                                    std::string(name) + "\"");
}

void check_config(const ModelConfig& config, const std::string& file) {
  const auto require = [&](bool holds, const char* key, const std::string& expected,
                           const std::string& found) {
    if (!holds) throw FormatError(file, key, expected, found);
  };
  const std::string heads = std::to_string(config.heads);
  require(config.heads % config.kv_heads == 0, "num_key_value_heads",
          "a divisor of num_attention_heads " + heads, std::to_string(config.kv_heads));
  require(config.head_dim % 2 == 0, "head_dim", "an even number, for the rotation",
          std::to_string(config.head_dim));
  require(config.rms_eps > 0.0 && config.rms_eps < 1.0, "rms_norm_eps", "a number between 0 and 1",
          std::to_string(config.rms_eps));
  require(config.rope_theta > 1.0 && config.rope_theta <= 1e12, "rope_theta",
          "a number above 1 and up to 1e12", std::to_string(config.rope_theta));
  const auto valid_token = [&](std::int64_t id) { return id >= 0 && id < config.vocab; };
  const std::string ids = "token ids below vocab_size " + std::to_string(config.vocab);
  require(config.bos == -1 || valid_token(config.bos), "bos_token_id", ids,
          std::to_string(config.bos));
  for (const std::int64_t id : config.eos) {
    require(valid_token(id), "eos_token_id", ids, std::to_string(id));
  }
  const RopeScaling& rope = config.rope_scaling;
  require(rope.type == RopeType::none || (rope.factor >= 1.0 && rope.factor <= 1e6),
          "rope_scaling.factor", "a number from 1 to 1e6", std::to_string(rope.factor));
  if (rope.type == RopeType::llama3) {
    require(rope.low_freq_factor > 0.0 && rope.low_freq_factor < rope.high_freq_factor &&
                rope.high_freq_factor <= 1e6,
            "rope_scaling.high_freq_factor",
            "0 < low_freq_factor " + std::to_string(rope.low_freq_factor) +
                " < high_freq_factor <= 1e6",
            std::to_string(rope.high_freq_factor));
  }
}

std::int64_t parameter_count(const ModelConfig& config) {
  const std::int64_t queries = config.heads * config.head_dim;
  const std::int64_t keys = config.kv_heads * config.head_dim;
  const std::int64_t attention = 2 * queries * config.hidden + 2 * keys * config.hidden;
  const std::int64_t mlp = 3 * config.hidden * config.intermediate;
  const std::int64_t block = attention + mlp + 2 * config.hidden;
  const std::int64_t tables = (config.tie_embeddings ? 1 : 2) * config.vocab * config.hidden;
  return tables + config.layers * block + config.hidden;
}

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  const auto pairs = static_cast<std::size_t>(config.head_dim / 2);
  const RopeScaling& scaling = config.rope_scaling;
  const auto factor = static_cast<float>(scaling.factor);
  const auto original = static_cast<float>(scaling.original_max_positions);
  const auto low = static_cast<float>(scaling.low_freq_factor);
  const auto high = static_cast<float>(scaling.high_freq_factor);
  const float longest = original / low;    // wavelengths beyond it turn less than `low` times
  const float shortest = original / high;  // those below it more than `high` times

  std::vector<float> frequencies(pairs);
  for (std::size_t j = 0; j < pairs; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(config.head_dim);
    // The power is rounded once to f32, the reciprocal again.
    float frequency =
        1.0F / static_cast<float>(std::pow(config.rope_theta, static_cast<double>(exponent)));
    if (scaling.type == RopeType::linear) frequency /= factor;
    if (scaling.type == RopeType::llama3) {
      const float wavelength = static_cast<float>(2.0 * std::numbers::pi) / frequency;
      if (wavelength > longest) {
        frequency /= factor;
      } else if (wavelength >= shortest) {
        const float smooth = (original / wavelength - low) / (high - low);
        frequency = (1.0F - smooth) * frequency / factor + smooth * frequency;
      }
    }
    frequencies[j] = frequency;
  }
  return frequencies;
}

}  // namespace engine
