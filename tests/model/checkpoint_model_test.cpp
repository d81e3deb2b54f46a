// Random checkpoints of odd shapes: against plain loops in double, and the many ways to store one
// model against each other.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::TempDir;

std::vector<std::int32_t> random_ids(const ModelConfig& config, std::int64_t count) {
  return synthetic_tokens(count, config.vocab, 7);
}

struct Shape {
  const char* name;
  std::int64_t hidden, intermediate, layers, heads, kv_heads, head_dim;
  double theta;
  RopeScaling scaling;
};

const Shape shapes[] = {
    {"one head", 16, 24, 1, 1, 1, 16, 10000.0, {}},
    {"multi-head", 48, 80, 2, 4, 4, 12, 10000.0, {}},
    {"grouped", 64, 96, 2, 8, 2, 8, 500000.0, {}},
    {"multi-query, wide heads", 40, 56, 3, 4, 1, 20, 10000.0, {}},
    {"narrow heads", 72, 64, 1, 3, 3, 8, 10000.0, {}},
    {"linear scaling", 32, 48, 2, 4, 2, 16, 10000.0, {RopeType::linear, 4.0, 1.0, 4.0, 8192}},
    // Short original context, so that all three ranges of frequencies occur.
    {"llama3 scaling", 64, 48, 2, 4, 2, 32, 500000.0, {RopeType::llama3, 8.0, 1.0, 4.0, 64}},
};

TEST(CheckpointModel, ForwardPassEqualsPlainLoops) {
  for (const Shape& shape : shapes) {
    for (const bool tied : {false, true}) {
      SCOPED_TRACE(std::string(shape.name) + (tied ? ", tied" : ""));
      TinyCheckpoint options;
      ModelConfig& c = options.config;
      c.hidden = shape.hidden;
      c.intermediate = shape.intermediate;
      c.layers = shape.layers;
      c.heads = shape.heads;
      c.kv_heads = shape.kv_heads;
      c.head_dim = shape.head_dim;
      c.vocab = 61;
      c.rope_theta = shape.theta;
      c.rope_scaling = shape.scaling;
      c.tie_embeddings = tied;
      const TempDir dir;
      const NamedTensors tensors = write_tiny_checkpoint(dir.path() / "m", options);
      const auto source = open_checkpoint(dir.path() / "m");
      const std::vector<std::int32_t> ids = random_ids(c, 45);
      const std::vector<double> expected = naive_logits(c, tensors, ids);
      const std::vector<float> logits = logits_of(*source, DType::f32, ids);
      // Sums of at most 96 products in f32 through three blocks; logits are of order 1 (tied: 8,
      // because the head is not scaled down).
      const Comparison same = compare_close(std::vector<double>(logits.begin(), logits.end()),
                                            expected, {.absolute = tied ? 2e-4 : 2e-5});
      EXPECT_TRUE(same) << same.message;
    }
  }
}

TEST(CheckpointModel, TiedHeadEqualsACopiedOne) {
  const TempDir dir;
  TinyCheckpoint options;
  options.config.tie_embeddings = true;
  NamedTensors tensors = write_tiny_checkpoint(dir.path() / "tied", options);
  EXPECT_EQ(tensors.count("lm_head.weight"), 0U);
  options.config.tie_embeddings = false;
  options.edit = [&](const std::string& name, std::vector<float>& values) {
    values = tensors.at(name == "lm_head.weight" ? "model.embed_tokens.weight" : name);
  };
  write_tiny_checkpoint(dir.path() / "copied", options);
  const auto tied = open_checkpoint(dir.path() / "tied");
  const auto copied = open_checkpoint(dir.path() / "copied");
  const std::vector<std::int32_t> ids = random_ids(options.config, 30);
  EXPECT_EQ(logits_of(*tied, DType::f32, ids), logits_of(*copied, DType::f32, ids));
  const TokenWindows tokens{ids, 2, 15};
  EXPECT_EQ(perplexity_of(*tied, tokens), perplexity_of(*copied, tokens));
}

// The same values in three dtypes and as one file or many: bf16 values fit f32, and a value that
// fits bf16 and f16 fits all.
TEST(CheckpointModel, StorageDoesNotMatter) {
  const TempDir dir;
  TinyCheckpoint options;
  // Few significant bits and a narrow range: representable everywhere.
  options.edit = [](const std::string&, std::vector<float>& values) {
    for (float& v : values) v = std::nearbyint(v * 64.0F) / 64.0F;
  };
  std::vector<float> expected;
  const std::vector<std::int32_t> ids = random_ids(options.config, 20);
  for (const TensorDType dtype : {TensorDType::f32, TensorDType::f16, TensorDType::bf16}) {
    for (const std::uint64_t shard :
         {ShardedCheckpointWriter::kMaxShardBytes, std::uint64_t{200'000}}) {
      options.dtype = dtype;
      options.max_shard_bytes = shard;
      const std::filesystem::path path =
          dir.path() / (std::string(dtype_name(dtype)) + std::to_string(shard));
      // bf16 keeps 8 bits: only multiples of 1/64 below 4 survive all three.
      const NamedTensors tensors = write_tiny_checkpoint(path, options);
      EXPECT_EQ(std::filesystem::exists(path / "model.safetensors.index.json"), shard == 200'000);
      const auto source = open_checkpoint(path);
      EXPECT_EQ(dtype_bytes(source->linear_dtype()), dtype_size(dtype));
      const std::vector<float> logits = logits_of(*source, DType::f32, ids);
      if (expected.empty()) expected = logits;
      EXPECT_TRUE(logits == expected) << path;
    }
  }
}

TEST(CheckpointModel, RoundedCheckpointsLoadTheirOwnValues) {
  for (const TensorDType dtype : {TensorDType::f32, TensorDType::f16, TensorDType::bf16}) {
    const TempDir dir;
    TinyCheckpoint options;
    options.dtype = dtype;
    const NamedTensors tensors = write_tiny_checkpoint(dir.path() / "m", options);
    const auto source = open_checkpoint(dir.path() / "m");
    for (const Site s : all_sites) {
      EXPECT_TRUE(load_weight(*source, 1, s) ==
                  tensors.at("model." + linear_name(1, s) + ".weight"))
          << site_name(s);
    }
  }
}

TEST(CheckpointModel, WeightsThatAreNotFiniteAreNamed) {
  for (const char* name :
       {"model.layers.1.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"}) {
    const TempDir dir;
    TinyCheckpoint options;
    options.edit = [&](const std::string& tensor, std::vector<float>& values) {
      if (tensor == name) values[5] = std::numeric_limits<float>::quiet_NaN();
    };
    write_tiny_checkpoint(dir.path() / "m", options);
    const auto source = open_checkpoint(dir.path() / "m");
    const std::vector<std::int32_t> ids = random_ids(options.config, 4);
    const std::string message = error_of([&] { logits_of(*source, DType::f32, ids); });
    const std::string shown(name + 6);
    expect_contains(message, shown.substr(0, shown.find(".weight")));
    expect_contains(message, "1 NaN or infinite");
  }
}

TEST(CheckpointModel, ConfigurationAndFilesMustAgree) {
  const TempDir dir;
  TinyCheckpoint options;
  write_tiny_checkpoint(dir.path() / "m", options);
  ModelConfig fewer = options.config;
  fewer.layers = 1;
  fewer.torch_dtype = options.dtype;
  dir.file("m/config.json", config_to_json(fewer));
  expect_contains(error_of([&] { open_checkpoint(dir.path() / "m"); }),
                  "num_hidden_layers: expected at least 2");
  ModelConfig wider = options.config;
  wider.intermediate = 512;
  dir.file("m/config.json", config_to_json(wider));
  expect_contains(error_of([&] { open_checkpoint(dir.path() / "m"); }), "mlp.gate_proj.weight");
  ModelConfig more = options.config;
  more.layers = 3;
  dir.file("m/config.json", config_to_json(more));
  expect_contains(error_of([&] { open_checkpoint(dir.path() / "m"); }), "layers.2.");
}

}  // namespace
}  // namespace engine::test
