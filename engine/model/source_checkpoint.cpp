// A Hugging Face LLaMA checkpoint directory: config.json, safetensors, tokenizer.
#include <xxhash.h>

#include <algorithm>
#include <cstdio>

#include "engine/model/source.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

DType engine_dtype(TensorDType d) {
  switch (d) {
    case TensorDType::f32:
      return DType::f32;
    case TensorDType::f16:
      return DType::f16;
    case TensorDType::bf16:
      return DType::bf16;
    default:
      throw Error(ErrorCode::internal, "dtype was not checked");
  }
}

std::string xxh3_hex(const std::string& bytes) {
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return hash;
}

class CheckpointSource final : public WeightSource {
 public:
  explicit CheckpointSource(const std::filesystem::path& directory)
      : directory_(directory), config_(load_config(directory)), checkpoint_(directory) {
    // Every tensor is looked up and its shape compared now, so that a contradiction between
    // config.json and the files is reported before any work.
    for (const std::string& name : dense_names(config_)) static_cast<void>(info(name));
    for (std::int64_t i = 0; i < config_.layers; ++i) {
      for (const Site s : all_sites) static_cast<void>(linear(i, s));
    }
    if (checkpoint_.find("model.layers." + std::to_string(config_.layers) +
                         ".input_layernorm.weight") != nullptr) {
      throw Error(ErrorCode::mismatch, directory.string() +
                                           ": config.json: num_hidden_layers: expected at least " +
                                           std::to_string(config_.layers + 1) +
                                           " (the files hold that many layers), found " +
                                           std::to_string(config_.layers));
    }
    // A bias would be left out of every product.
    for (const std::string& name : checkpoint_.names()) {
      if (name.ends_with("_proj.bias")) {
        throw Error(ErrorCode::mismatch,
                    directory.string() + ": " + name +
                        ": expected no biases, as config.json says, found a tensor");
      }
    }
    for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
      std::error_code error;
      if (std::filesystem::is_regular_file(directory / name, error)) {
        tokenizer_name_ = name;
        break;
      }
    }
  }

  [[nodiscard]] const ModelConfig& config() const override { return config_; }

  [[nodiscard]] Json describe() const override {
    // Names, shapes and places of all tensors, and the first bytes of each: enough to tell two
    // models of one shape apart without reading either.
    constexpr std::size_t sample_bytes = 4096;
    std::string layout = config_to_json(config_), sample;
    for (const std::string& name : checkpoint_.names()) {
      const TensorInfo& t = *checkpoint_.find(name);
      layout += name + shape_text(t.shape) + std::to_string(t.begin) + ":" + std::to_string(t.end);
      const auto bytes = checkpoint_.bytes(t);
      sample.append(reinterpret_cast<const char*>(bytes.data()),
                    std::min(bytes.size(), sample_bytes));
    }
    // "models/tiny/" names the same directory as "models/tiny".
    std::filesystem::path path = std::filesystem::absolute(directory_).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    Json j;
    j["kind"] = "checkpoint";
    j["name"] = path.filename().string();
    j["dtype"] = dtype_name(linear_dtype());
    j["tensors_bytes"] = checkpoint_.total_bytes();
    j["layout_xxh3"] = xxh3_hex(layout);
    j["sample_xxh3"] = xxh3_hex(sample);
    return j;
  }

  [[nodiscard]] std::string tokenizer_bytes() const override {
    if (tokenizer_name_.empty()) {
      throw Error(ErrorCode::io, directory_.string() +
                                     ": no tokenizer: expected tokenizer.json or tokenizer.model");
    }
    return read_text_file(directory_ / tokenizer_name_, std::size_t{64} << 20);
  }
  [[nodiscard]] std::string tokenizer_name() const override { return tokenizer_name_; }

  [[nodiscard]] DenseInfo dense_info(const std::string& name) const override {
    const TensorInfo& t = info(name);
    const bool vector = t.shape.size() == 1;
    return {engine_dtype(t.dtype), vector ? 1 : t.shape[0], vector ? t.shape[0] : t.shape[1]};
  }
  void load_dense(const std::string& name, Loader& loader, View out) override {
    const TensorInfo& t = info(name);
    loader.put(checkpoint_.bytes(t), engine_dtype(t.dtype), out);
  }
  void read_raw(const std::string& name, Loader& loader, std::span<std::byte> out) override {
    if (loader.arena().is_measuring()) return;
    const auto bytes = checkpoint_.bytes(info(name));
    REQUIRE(bytes.size() == out.size(), "size of " + name);
    std::copy(bytes.begin(), bytes.end(), out.begin());
  }
  void load_linear(std::int64_t layer, Site site, Loader& loader, View out) override {
    const TensorInfo& t = linear(layer, site);
    loader.put(checkpoint_.bytes(t), engine_dtype(t.dtype), out);
  }
  [[nodiscard]] DType linear_dtype() const override {
    return engine_dtype(linear(0, Site::q).dtype);
  }

 private:
  [[nodiscard]] const TensorInfo& info(const std::string& name) const {
    if (name == "lm_head.weight" || name == "embed_tokens.weight") {
      const std::string key =
          name == "lm_head.weight" && !config_.tie_embeddings ? name : "model.embed_tokens.weight";
      return checkpoint_.require(key, {config_.vocab, config_.hidden},
                                 {TensorDType::bf16, TensorDType::f16, TensorDType::f32});
    }
    return checkpoint_.require("model." + name, {config_.hidden},
                               {TensorDType::bf16, TensorDType::f16, TensorDType::f32});
  }
  [[nodiscard]] const TensorInfo& linear(std::int64_t layer, Site site) const {
    const SiteShape shape = site_shape(config_, site);
    return checkpoint_.require("model." + linear_name(layer, site) + ".weight",
                               {shape.rows, shape.cols},
                               {TensorDType::bf16, TensorDType::f16, TensorDType::f32});
  }

  std::filesystem::path directory_;
  ModelConfig config_;
  Checkpoint checkpoint_;
  std::string tokenizer_name_;
};

}  // namespace

std::unique_ptr<WeightSource> open_checkpoint(const std::filesystem::path& directory) {
  return std::make_unique<CheckpointSource>(directory);
}

}  // namespace engine
