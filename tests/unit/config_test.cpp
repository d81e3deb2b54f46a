#include "engine/model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "formats/json.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;

Json base() {
  return parse_json(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
      "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
      "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
      "rope_scaling": null, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
      "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
      "attention_bias": false, "use_cache": true, "unknown_key": [1]})",
                    "base");
}

constexpr const char* kLlama3Scaling =
    R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})";

// The base with the members of `patch` put in; "ABSENT" removes the key.
ModelConfig patched(const std::string& patch) {
  Json json = base();
  const Json changes = parse_json(patch, "patch");
  for (const auto& [key, value] : changes.get_ref<const Json::object_t&>()) {
    if (value == "ABSENT") {
      json.erase(key);
    } else {
      json[key] = value;
    }
  }
  return config_from_json(json.dump(), "config.json");
}

TEST(Config, ReadsLlama3) {
  ModelConfig expected = synthetic_config("llama3-8b");
  EXPECT_EQ(patched("{}"), expected);
  EXPECT_EQ(expected.head_dim, 128);
  EXPECT_EQ(expected.torch_dtype, TensorDType::bf16);
}

TEST(Config, ParameterCountsAreThePublishedOnes) {
  EXPECT_EQ(parameter_count(synthetic_config("llama-7b")), 6'738'415'616);
  EXPECT_EQ(parameter_count(synthetic_config("llama2-7b")), 6'738'415'616);
  EXPECT_EQ(parameter_count(synthetic_config("llama3-8b")), 8'030'261'248);
  EXPECT_EQ(parameter_count(synthetic_config("llama3-70b")), 70'553'706'496);
  ModelConfig tied = synthetic_config("llama3-8b");
  tied.tie_embeddings = true;
  EXPECT_EQ(parameter_count(tied), 8'030'261'248 - 128'256LL * 4096);
}

TEST(Config, DefaultsOfAbsentKeys) {
  EXPECT_EQ(patched(R"({"num_key_value_heads": "ABSENT"})").kv_heads, 32);
  EXPECT_EQ(patched(R"({"num_key_value_heads": null})").kv_heads, 32);
  EXPECT_EQ(patched(R"({"head_dim": 64})").head_dim, 64);
  EXPECT_EQ(patched(R"({"head_dim": null})").head_dim, 128);
  EXPECT_EQ(patched(R"({"max_position_embeddings": "ABSENT"})").max_positions, 2048);
  EXPECT_EQ(patched(R"({"rope_theta": "ABSENT"})").rope_theta, 10000.0);
  EXPECT_EQ(patched(R"({"rms_norm_eps": "ABSENT"})").rms_eps, 1e-6);
  EXPECT_EQ(patched(R"({"torch_dtype": "ABSENT"})").torch_dtype, TensorDType::f32);
  EXPECT_FALSE(patched(R"({"tie_word_embeddings": "ABSENT"})").tie_embeddings);
  EXPECT_EQ(patched(R"({"bos_token_id": "ABSENT"})").bos, 1);
  EXPECT_EQ(patched(R"({"bos_token_id": null})").bos, -1);
  EXPECT_EQ(patched(R"({"eos_token_id": "ABSENT"})").eos, std::vector<std::int64_t>{2});
  EXPECT_TRUE(patched(R"({"eos_token_id": null})").eos.empty());
  EXPECT_EQ(patched(R"({"hidden_act": "ABSENT", "attention_bias": "ABSENT"})"), patched("{}"));
  EXPECT_EQ(patched(R"({"architectures": "ABSENT"})"), patched("{}"));
  EXPECT_EQ(patched(R"({"model_type": "ABSENT"})"), patched("{}"));
}

TEST(Config, AcceptsTheAliases) {
  EXPECT_EQ(patched(R"({"torch_dtype": "ABSENT", "dtype": "float16"})").torch_dtype,
            TensorDType::f16);
  EXPECT_EQ(patched(R"({"dtype": "bfloat16"})").torch_dtype, TensorDType::bf16);
  EXPECT_EQ(patched(R"({"eos_token_id": [128001, 128008, 128009]})").eos,
            (std::vector<std::int64_t>{128001, 128008, 128009}));

  const std::string scaling = kLlama3Scaling;
  const ModelConfig reference = patched(R"({"rope_scaling": )" + scaling + "}");
  const RopeScaling expected{RopeType::llama3, 8.0, 1.0, 4.0, 8192};
  EXPECT_EQ(reference.rope_scaling, expected);
  std::string typed = scaling;
  typed.replace(typed.find("rope_type"), 9, "type");
  EXPECT_EQ(patched(R"({"rope_scaling": )" + typed + "}"), reference);
  // Both spellings at once are fine as long as they agree.
  EXPECT_EQ(patched(R"({"rope_scaling": {"type": "llama3",)" + scaling.substr(1) + "}"), reference);
  const std::string parameters = R"({"rope_theta": 500000.0,)" + scaling.substr(1);
  EXPECT_EQ(patched(R"({"rope_theta": "ABSENT", "rope_parameters": )" + parameters + "}"),
            reference);
  EXPECT_EQ(patched(R"({"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}})"),
            patched("{}"));
  EXPECT_EQ(patched(R"({"rope_scaling": {"type": "linear", "factor": 2}})").rope_scaling.type,
            RopeType::linear);
  EXPECT_EQ(patched(R"({"rope_scaling": {"type": "default"}})").rope_scaling.type, RopeType::none);
}

TEST(Config, RejectsEveryUnsupportedOrMalformedFile) {
  struct Case {
    std::string patch;
    std::string message;
  };
  const auto scaling = [](const std::string& fields) {
    return R"({"rope_scaling": )" + fields + "}";
  };
  const auto llama3 = [&](const std::string& from, const std::string& to) {
    std::string text = kLlama3Scaling;
    text.replace(text.find(from), from.size(), to);
    return scaling(text);
  };
  const std::vector<Case> cases = {
      {R"({"architectures": ["MistralForCausalLM"]})",
       "config.json: architectures: expected [\"LlamaForCausalLM\"], found "
       "[\"MistralForCausalLM\"]"},
      {R"({"architectures": "LlamaForCausalLM"})", "architectures: expected"},
      {R"({"architectures": []})", "architectures: expected"},
      {R"({"architectures": "ABSENT", "model_type": "ABSENT"})",
       "architectures: expected [\"LlamaForCausalLM\"], found nothing"},
      {R"({"model_type": "qwen2"})", "model_type: expected \"llama\", found \"qwen2\""},
      {R"({"hidden_act": "gelu"})", "hidden_act: expected \"silu\", found \"gelu\""},
      {R"({"hidden_act": 1})", "hidden_act: expected a string, found 1"},
      {R"({"attention_bias": true})", "attention_bias: expected false, found true"},
      {R"({"mlp_bias": true})", "mlp_bias: expected false, found true"},
      {R"({"mlp_bias": 0})", "mlp_bias: expected true or false, found 0"},
      {R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor: expected 1, found 0.5"},
      {R"({"hidden_size": "ABSENT"})",
       "hidden_size: expected an integer from 1 to 131072, found nothing"},
      {R"({"hidden_size": "abc"})",
       "hidden_size: expected an integer from 1 to 131072, found "
       "\"abc\""},
      {R"({"hidden_size": 4096.0})", "hidden_size: expected an integer"},
      {R"({"hidden_size": 0})", "hidden_size: expected an integer"},
      {R"({"hidden_size": -4096})", "hidden_size: expected an integer"},
      {R"({"hidden_size": 1000000000})", "hidden_size: expected an integer"},
      {R"({"hidden_size": 4100})", "hidden_size: expected a multiple of num_attention_heads 32"},
      {R"({"intermediate_size": "ABSENT"})", "intermediate_size: expected"},
      {R"({"intermediate_size": 10000000})", "intermediate_size: expected"},
      {R"({"num_hidden_layers": "ABSENT"})", "num_hidden_layers: expected"},
      {R"({"num_hidden_layers": 100000})", "num_hidden_layers: expected"},
      {R"({"num_attention_heads": "ABSENT"})", "num_attention_heads: expected"},
      {R"({"num_attention_heads": 0})", "num_attention_heads: expected"},
      {R"({"num_key_value_heads": 0})", "num_key_value_heads: expected an integer from 1"},
      {R"({"num_key_value_heads": 5})",
       "num_key_value_heads: expected a divisor of num_attention_heads 32, found 5"},
      {R"({"num_key_value_heads": 64})", "expected a divisor of num_attention_heads 32, found 64"},
      {R"({"head_dim": 127})", "head_dim: expected an even number, for the rotation, found 127"},
      {R"({"head_dim": 100000})", "head_dim: expected an integer from 1 to 4096"},
      {R"({"vocab_size": "ABSENT"})", "vocab_size: expected"},
      {R"({"vocab_size": 1e10})", "vocab_size: expected"},
      {R"({"max_position_embeddings": 0})", "max_position_embeddings: expected"},
      {R"({"rms_norm_eps": 0})", "rms_norm_eps: expected a number between 0 and 1"},
      {R"({"rms_norm_eps": "1e-5"})", "rms_norm_eps: expected a number, found \"1e-5\""},
      {R"({"rope_theta": 0})", "rope_theta: expected a number above 1"},
      {R"({"rope_theta": [1]})", "rope_theta: expected a number, found [1]"},
      {R"({"tie_word_embeddings": "no"})", "tie_word_embeddings: expected true or false"},
      {R"({"torch_dtype": "float8"})",
       "torch_dtype: expected \"float32\", \"float16\" or \"bfloat16\", found \"float8\""},
      {R"({"dtype": "float16"})", "torch_dtype: expected the same value as in dtype, \"float16\""},
      {R"({"bos_token_id": 128256})",
       "bos_token_id: expected token ids below 128256, found 128256"},
      {R"({"bos_token_id": [1, 2]})", "bos_token_id: expected at most one token id, found [1,2]"},
      {R"({"eos_token_id": -1})", "eos_token_id: expected token ids below 128256, found -1"},
      {R"({"eos_token_id": [1, "2"]})", "eos_token_id: expected token ids below 128256"},
      {R"({"vocab_size": 2, "bos_token_id": 1, "eos_token_id": "ABSENT"})",
       "eos_token_id: expected token ids below vocab_size 2, found 2"},
      {scaling("5"), "rope_scaling: expected an object, found 5"},
      {scaling("{}"), "rope_scaling.rope_type: expected a string, found nothing"},
      {scaling(R"({"rope_type": "yarn", "factor": 4})"),
       "rope_scaling.rope_type: expected \"default\", \"linear\" or \"llama3\", found \"yarn\""},
      {scaling(R"({"type": "dynamic", "factor": 4})"), "rope_scaling.type: expected"},
      {scaling(R"({"type": "linear", "rope_type": "llama3", "factor": 4})"),
       "rope_scaling.rope_type: expected the same value as in rope_scaling.type"},
      {scaling(R"({"type": "linear"})"), "rope_scaling.factor: expected a number, found nothing"},
      {scaling(R"({"type": "linear", "factor": 0.5})"), "rope_scaling.factor: expected a number"},
      {llama3("\"factor\": 8.0", "\"factor\": \"8\""), "rope_scaling.factor: expected a number"},
      {llama3("\"low_freq_factor\": 1.0", "\"low_freq_factor\": 4.0"),
       "rope_scaling.high_freq_factor: expected 0 < low_freq_factor"},
      {llama3("\"low_freq_factor\": 1.0", "\"low_freq_factor\": 0"), "0 < low_freq_factor"},
      {llama3("8192", "0"), "rope_scaling.original_max_position_embeddings: expected"},
      {R"({"rope_parameters": {"rope_theta": 10000.0}})",
       "rope_parameters.rope_theta: expected the top level's rope_theta 500000.0, found 10000.0"},
      {R"({"rope_parameters": {"rope_type": "yarn"}})", "rope_parameters.rope_type: expected"},
      {R"({"rope_parameters": {"partial_rotary_factor": 0.5}})",
       "rope_parameters.partial_rotary_factor: expected 1, found 0.5"},
      {R"({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {}})",
       "rope_parameters: expected the same scaling as in rope_scaling"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.patch);
    const std::string message = error_of([&] { (void)patched(c.patch); });
    expect_contains(message, c.message);
    EXPECT_EQ(message.substr(0, 13), "config.json: ");
  }
  expect_contains(error_of([] { (void)config_from_json("{", "c"); }), "c: byte 2: expected valid");
  expect_contains(error_of([] { (void)config_from_json("[]", "c"); }), "c: JSON: expected an obj");
}

TEST(Config, RoundTrips) {
  for (const std::string& name : synthetic_config_names()) {
    ModelConfig config = synthetic_config(name);
    EXPECT_EQ(config_from_json(config_to_json(config), name), config) << name;
  }
  ModelConfig config = synthetic_config("tiny-test");
  config.head_dim = 48;
  config.tie_embeddings = true;
  config.torch_dtype = TensorDType::f16;
  config.rope_theta = 123456.789;
  config.rms_eps = 1.0 / 3.0;
  config.bos = -1;
  config.eos = {};
  config.rope_scaling = {RopeType::llama3, 32.0, 1.5, 4.5, 4096};
  EXPECT_EQ(config_from_json(config_to_json(config), "odd"), config);
  config.eos = {1, 3, 5};
  config.rope_scaling = {RopeType::linear, 2.5};
  EXPECT_EQ(config_from_json(config_to_json(config), "odd"), config);
}

TEST(Config, GenerationConfigDecidesEos) {
  const testing::TempDir dir;
  dir.file("config.json", base().dump());
  EXPECT_EQ(load_config(dir.path()).eos, std::vector<std::int64_t>{128001});
  dir.file("generation_config.json", R"({"bos_token_id": 5, "temperature": 0.6})");
  EXPECT_EQ(load_config(dir.path()).eos, std::vector<std::int64_t>{128001});
  dir.file("generation_config.json", R"({"eos_token_id": [128001, 128009]})");
  EXPECT_EQ(load_config(dir.path()).eos, (std::vector<std::int64_t>{128001, 128009}));
  EXPECT_EQ(load_config(dir.path()).bos, 128000);
  dir.file("generation_config.json", R"({"eos_token_id": [999999]})");
  expect_contains(error_of([&] { (void)load_config(dir.path()); }),
                  "generation_config.json: eos_token_id: expected token ids below 128256");
  expect_contains(error_of([&] { (void)load_config(dir.path() / "none"); }),
                  "none/config.json: cannot open");
}

TEST(Config, UnknownSyntheticNamesListTheKnownOnes) {
  expect_contains(error_of([] { (void)synthetic_config("gpt"); }),
                  "expected one of llama-7b, llama2-7b, llama3-8b, llama3-70b, llava-next-8b, "
                  "tiny-test, found \"gpt\"");
  EXPECT_EQ(synthetic_config("llava-next-8b").vocab, 128320);
}

TEST(Rope, PlainFrequenciesFollowThePowerLaw) {
  const ModelConfig config = synthetic_config("llama2-7b");
  const std::vector<float> frequencies = rope_inverse_frequencies(config);
  ASSERT_EQ(frequencies.size(), 64U);
  EXPECT_EQ(frequencies[0], 1.0F);
  for (std::size_t j = 0; j < frequencies.size(); ++j) {
    const double exact = std::pow(10000.0, -static_cast<double>(j) / 64.0);
    EXPECT_LE(std::abs(frequencies[j] - exact), 2e-7 * exact) << j;
  }
}

TEST(Rope, LinearScalingDividesAll) {
  ModelConfig config = synthetic_config("llama2-7b");
  const std::vector<float> plain = rope_inverse_frequencies(config);
  config.rope_scaling = {RopeType::linear, 4.0};
  const std::vector<float> scaled = rope_inverse_frequencies(config);
  for (std::size_t j = 0; j < plain.size(); ++j) EXPECT_EQ(scaled[j], plain[j] / 4.0F);
}

// LLaMA 3.1: 64 pairs fall into 29 kept, 6 blended (29..34) and 29 divided by the factor.
TEST(Rope, Llama3ScalingKeepsBlendsAndDivides) {
  ModelConfig config = synthetic_config("llama3-8b");
  const std::vector<float> plain = rope_inverse_frequencies(config);
  config.rope_scaling = {RopeType::llama3, 8.0, 1.0, 4.0, 8192};
  const std::vector<float> scaled = rope_inverse_frequencies(config);
  ASSERT_EQ(scaled.size(), 64U);
  for (std::size_t j = 0; j < 64; ++j) {
    if (j < 29) {
      EXPECT_EQ(scaled[j], plain[j]) << j;
    } else if (j > 34) {
      EXPECT_EQ(scaled[j], plain[j] / 8.0F) << j;
    } else {
      EXPECT_LT(scaled[j], plain[j]) << j;
      EXPECT_GT(scaled[j], plain[j] / 8.0F) << j;
      // The blend as the definition writes it, in double precision.
      const double turns = 8192.0 * plain[j] / (2.0 * 3.14159265358979323846);
      const double smooth = (turns - 1.0) / 3.0;
      const double exact = (1.0 - smooth) * plain[j] / 8.0 + smooth * plain[j];
      EXPECT_LE(std::abs(scaled[j] - exact), 1e-6 * exact) << j;
    }
  }
}

}  // namespace
}  // namespace engine
