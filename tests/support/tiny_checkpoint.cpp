#include "tests/support/tiny_checkpoint.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <span>

#include "engine/core/rng.h"
#include "engine/model/llama.h"

namespace engine::test {

namespace {

std::size_t count_of(const TensorDecl& decl) {
  std::size_t n = 1;
  for (const std::int64_t extent : decl.shape) n *= static_cast<std::size_t>(extent);
  return n;
}

std::vector<TensorDecl> declarations(const TinyCheckpoint& o) {
  const ModelConfig& c = o.config;
  std::vector<TensorDecl> all = {{"model.embed_tokens.weight", o.dtype, {c.vocab, c.hidden}}};
  for (std::int64_t layer = 0; layer < c.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    all.push_back({prefix + "input_layernorm.weight", o.dtype, {c.hidden}});
    all.push_back({prefix + "post_attention_layernorm.weight", o.dtype, {c.hidden}});
    for (const Site s : all_sites) {
      const SiteShape shape = site_shape(c, s);
      all.push_back({prefix + site_name(s) + ".weight", o.dtype, {shape.rows, shape.cols}});
    }
  }
  all.push_back({"model.norm.weight", o.dtype, {c.hidden}});
  if (!c.tie_embeddings) all.push_back({"lm_head.weight", o.dtype, {c.vocab, c.hidden}});
  return all;
}

// Norms near 1; linears that keep the size of their input; embeddings of size 1.
std::vector<float> random_values(const TensorDecl& decl, std::uint64_t seed, std::uint64_t stream) {
  std::vector<float> v(count_of(decl));
  const bool norm = decl.shape.size() == 1;
  const bool table = decl.name == "model.embed_tokens.weight";
  const float scale = norm ? 0.1F : table ? 1.0F : 1.0F / std::sqrt(float(decl.shape[1]));
  for (std::size_t i = 0; i < v.size(); ++i) {
    v[i] = (norm ? 1.0F : 0.0F) + scale * bell_value(seed, stream, i);
  }
  return v;
}

std::vector<std::byte> rounded_bytes(std::vector<float>& values, TensorDType dtype) {
  std::vector<std::byte> bytes(values.size() * dtype_size(dtype));
  if (dtype == TensorDType::f32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const bool half = dtype == TensorDType::f16;
    const std::uint16_t bits = half ? to_f16(values[i]).bits : to_bf16(values[i]).bits;
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
    values[i] = half ? to_float(f16{bits}) : to_float(bf16{bits});
  }
  return bytes;
}

}  // namespace

ModelConfig small_config() {
  ModelConfig c;
  c.hidden = 128;
  c.intermediate = 384;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 64;
  c.vocab = 320;
  c.max_positions = 512;
  c.rms_eps = 1e-5;
  c.bos = 1;
  c.eos = {2};
  return c;
}

NamedTensors write_tiny_checkpoint(const std::filesystem::path& directory,
                                   const TinyCheckpoint& o) {
  std::filesystem::create_directories(directory);
  ModelConfig config = o.config;
  config.torch_dtype = o.dtype;
  std::ofstream(directory / "config.json", std::ios::binary) << config_to_json(config);
  if (!o.tokenizer.empty()) {
    std::filesystem::copy_file(o.tokenizer, directory / o.tokenizer.filename());
  }
  const std::vector<TensorDecl> decls = declarations(o);
  ShardedCheckpointWriter writer(directory, decls, o.max_shard_bytes);
  NamedTensors tensors;
  for (std::size_t i = 0; i < decls.size(); ++i) {
    std::vector<float> values = random_values(decls[i], o.seed, i);
    if (o.edit) o.edit(decls[i].name, values);
    writer.append(decls[i].name, rounded_bytes(values, o.dtype));
    tensors.emplace(decls[i].name, std::move(values));
  }
  writer.commit();
  return tensors;
}

}  // namespace engine::test
