// Reading and writing config.json. One table says what is required and what defaults to what.
#include <array>
#include <optional>

#include "engine/model/config.h"
#include "formats/json.h"

namespace engine {
namespace {

constexpr std::size_t kMaxConfigBytes = std::size_t{4} << 20;
// Defaults that depend on other fields, resolved after the table.
constexpr std::int64_t kRequired = -1;
constexpr std::int64_t kDerived = 0;

// The caps are far above any published model; they keep every product of sizes within 64 bits.
struct SizeField {
  const char* key;
  std::int64_t ModelConfig::*member;
  std::int64_t high;
  std::int64_t fallback;
};

constexpr std::array<SizeField, 8> kSizes = {{
    {"hidden_size", &ModelConfig::hidden, 1 << 17, kRequired},
    {"intermediate_size", &ModelConfig::intermediate, 1 << 20, kRequired},
    {"num_hidden_layers", &ModelConfig::layers, 1 << 10, kRequired},
    {"num_attention_heads", &ModelConfig::heads, 1 << 12, kRequired},
    {"num_key_value_heads", &ModelConfig::kv_heads, 1 << 12, kDerived},  // as many as heads
    {"head_dim", &ModelConfig::head_dim, 1 << 12, kDerived},             // hidden / heads
    {"vocab_size", &ModelConfig::vocab, 1 << 22, kRequired},
    {"max_position_embeddings", &ModelConfig::max_positions, 1 << 26, 2048},
}};

struct NumberField {
  const char* key;
  double ModelConfig::*member;
  double fallback;
};

// rope_theta is with the rope keys below.
constexpr std::array<NumberField, 1> kNumbers = {{{"rms_norm_eps", &ModelConfig::rms_eps, 1e-6}}};

// Keys that must have this one value, or be absent.
struct FixedFlag {
  const char* key;
  bool value;
};
constexpr std::array<FixedFlag, 2> kFixedFlags = {{{"attention_bias", false}, {"mlp_bias", false}}};

struct FixedText {
  const char* key;
  const char* value;
};
constexpr std::array<FixedText, 2> kFixedTexts = {
    {{"hidden_act", "silu"}, {"model_type", "llama"}}};

constexpr double kDefaultTheta = 10000.0;
constexpr std::int64_t kDefaultBos = 1;
constexpr std::int64_t kDefaultEos = 2;

struct DTypeName {
  const char* name;
  TensorDType dtype;
};
constexpr std::array<DTypeName, 3> kTorchDTypes = {{{"float32", TensorDType::f32},
                                                    {"float16", TensorDType::f16},
                                                    {"bfloat16", TensorDType::bf16}}};

// A key that may be spelt in two ways; both at once must agree. nullptr if neither is there.
const char* either(const JsonObject& object, const char* one, const char* other) {
  const Json* first = object.find(one);
  const Json* second = object.find(other);
  if (first != nullptr && second != nullptr && *first != *second) {
    object.fail(one, "the same value as in " + object.path_of(other) + ", " + describe(*second));
  }
  return first != nullptr ? one : second != nullptr ? other : nullptr;
}

void read_architecture(const JsonObject& root) {
  const Json* architectures = root.find("architectures");
  if (architectures == nullptr && !root.has("model_type")) {
    root.fail("architectures", "[\"LlamaForCausalLM\"]");
  }
  if (architectures != nullptr && *architectures != Json::array({"LlamaForCausalLM"})) {
    root.fail("architectures", "[\"LlamaForCausalLM\"]");
  }
  for (const FixedText& field : kFixedTexts) {
    if (root.text(field.key, field.value) != field.value) {
      root.fail(field.key, "\"" + std::string(field.value) + "\"");
    }
  }
  for (const FixedFlag& field : kFixedFlags) {
    if (root.boolean(field.key, field.value) != field.value) {
      root.fail(field.key, field.value ? "true" : "false");
    }
  }
  if (root.number("partial_rotary_factor", 1.0) != 1.0) root.fail("partial_rotary_factor", "1");
}

void read_scaling(const JsonObject& object, RopeScaling& scaling) {
  const char* key = either(object, "rope_type", "type");
  const std::string type = key == nullptr ? "default" : object.text(key);
  constexpr std::int64_t kMaxPositions = 1 << 26;
  if (type == "default") {
    scaling.type = RopeType::none;
  } else if (type == "linear") {
    scaling.type = RopeType::linear;
    scaling.factor = object.number("factor");
  } else if (type == "llama3") {
    scaling.type = RopeType::llama3;
    scaling.factor = object.number("factor");
    scaling.low_freq_factor = object.number("low_freq_factor");
    scaling.high_freq_factor = object.number("high_freq_factor");
    scaling.original_max_positions =
        object.integer("original_max_position_embeddings", 1, kMaxPositions);
  } else {
    object.fail(key, "\"default\", \"linear\" or \"llama3\"");
  }
}

void read_rope(const JsonObject& root, ModelConfig& config) {
  config.rope_theta = root.number("rope_theta", kDefaultTheta);
  RopeScaling scaling;
  if (root.has("rope_scaling")) {
    const JsonObject object = root.object("rope_scaling");
    // Without a type, a scaling object would silently mean nothing.
    if (either(object, "rope_type", "type") == nullptr) object.fail("rope_type", "a string");
    read_scaling(object, scaling);
  }
  if (root.has("rope_parameters")) {  // newer files: theta and scaling together
    const JsonObject object = root.object("rope_parameters");
    const double theta = object.number("rope_theta", config.rope_theta);
    if (root.has("rope_theta") && theta != config.rope_theta) {
      object.fail("rope_theta", "the top level's rope_theta " + describe(*root.find("rope_theta")));
    }
    config.rope_theta = theta;
    if (object.number("partial_rotary_factor", 1.0) != 1.0)
      object.fail("partial_rotary_factor", "1");
    RopeScaling newer;
    read_scaling(object, newer);
    if (root.has("rope_scaling") && newer != scaling) {
      root.fail("rope_parameters", "the same scaling as in rope_scaling");
    }
    scaling = newer;
  }
  config.rope_scaling = scaling;
}

TensorDType read_torch_dtype(const JsonObject& root) {
  const char* key = either(root, "torch_dtype", "dtype");
  if (key == nullptr) return TensorDType::f32;
  const std::string name = root.text(key);
  for (const DTypeName& row : kTorchDTypes) {
    if (name == row.name) return row.dtype;
  }
  root.fail(key, "\"float32\", \"float16\" or \"bfloat16\"");
}

// The token ids at `key`, an integer or a list of them; nothing if the key does not occur. A null
// is an explicit "none".
std::optional<std::vector<std::int64_t>> read_ids(const JsonObject& root, const char* key,
                                                  std::int64_t vocab) {
  const std::string expected = "token ids below " + std::to_string(vocab);
  const Json* value = root.find(key);
  if (value == nullptr) {
    if (root.value().contains(key)) return std::vector<std::int64_t>{};
    return std::nullopt;
  }
  const auto one = [&](const Json& id) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= vocab) {
      root.fail(key, expected);
    }
    return id.get<std::int64_t>();
  };
  if (!value->is_array()) return std::vector<std::int64_t>{one(*value)};
  std::vector<std::int64_t> ids;
  for (const Json& id : *value) ids.push_back(one(id));
  return ids;
}

}  // namespace

ModelConfig config_from_json(std::string_view text, const std::string& file) {
  const Json json = parse_json(text, file, {.max_bytes = kMaxConfigBytes, .max_depth = 32});
  const JsonObject root(json, file);
  read_architecture(root);

  ModelConfig config;
  for (const SizeField& field : kSizes) {
    config.*field.member = field.fallback == kRequired
                               ? root.integer(field.key, 1, field.high)
                               : root.integer(field.key, 1, field.high, field.fallback);
  }
  for (const NumberField& field : kNumbers) {
    config.*field.member = root.number(field.key, field.fallback);
  }
  if (config.kv_heads == kDerived) config.kv_heads = config.heads;
  if (config.head_dim == kDerived) {
    if (config.hidden % config.heads != 0) {
      root.fail("hidden_size", "a multiple of num_attention_heads " + std::to_string(config.heads) +
                                   " (there is no head_dim)");
    }
    config.head_dim = config.hidden / config.heads;
  }
  config.tie_embeddings = root.boolean("tie_word_embeddings", false);
  config.torch_dtype = read_torch_dtype(root);
  read_rope(root, config);
  const auto bos =
      read_ids(root, "bos_token_id", config.vocab).value_or(std::vector<std::int64_t>{kDefaultBos});
  if (bos.size() > 1) root.fail("bos_token_id", "at most one token id");
  config.bos = bos.empty() ? -1 : bos[0];
  config.eos =
      read_ids(root, "eos_token_id", config.vocab).value_or(std::vector<std::int64_t>{kDefaultEos});
  check_config(config, file);
  return config;
}

ModelConfig load_config(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "config.json";
  ModelConfig config = config_from_json(read_text_file(path, kMaxConfigBytes), path.string());

  const std::filesystem::path generation = directory / "generation_config.json";
  std::error_code ignored;
  if (std::filesystem::exists(generation, ignored)) {
    const Json json = read_json_file(generation, {.max_bytes = kMaxConfigBytes, .max_depth = 32});
    const JsonObject root(json, generation.string());
    config.eos = read_ids(root, "eos_token_id", config.vocab).value_or(config.eos);
  }
  return config;
}

std::string config_to_json(const ModelConfig& config) {
  Json json = Json::object();
  json["architectures"] = Json::array({"LlamaForCausalLM"});
  for (const FixedText& field : kFixedTexts) json[field.key] = field.value;
  for (const FixedFlag& field : kFixedFlags) json[field.key] = field.value;
  for (const SizeField& field : kSizes) json[field.key] = config.*field.member;
  for (const NumberField& field : kNumbers) json[field.key] = config.*field.member;
  json["rope_theta"] = config.rope_theta;
  const RopeScaling& scaling = config.rope_scaling;
  json["rope_scaling"] = nullptr;
  if (scaling.type == RopeType::linear) {
    json["rope_scaling"] = {{"rope_type", "linear"}, {"factor", scaling.factor}};
  } else if (scaling.type == RopeType::llama3) {
    json["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", scaling.factor},
                            {"low_freq_factor", scaling.low_freq_factor},
                            {"high_freq_factor", scaling.high_freq_factor},
                            {"original_max_position_embeddings", scaling.original_max_positions}};
  }
  json["tie_word_embeddings"] = config.tie_embeddings;
  for (const DTypeName& row : kTorchDTypes) {
    if (row.dtype == config.torch_dtype) json["torch_dtype"] = row.name;
  }
  json["bos_token_id"] = config.bos < 0 ? Json(nullptr) : Json(config.bos);
  if (config.eos.empty()) {
    json["eos_token_id"] = nullptr;
  } else if (config.eos.size() == 1) {
    json["eos_token_id"] = config.eos[0];
  } else {
    json["eos_token_id"] = config.eos;
  }
  return json.dump(2) + "\n";
}

}  // namespace engine
