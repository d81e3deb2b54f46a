#include "tests/cli/small_model.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "engine/core/rng.h"
#include "formats/safetensors.h"
#include "tests/cli/program.h"

namespace engine::test {
namespace {

constexpr std::int64_t hidden = 64, inner = 128, heads = 4, kv_heads = 2;

Json small_config(std::int64_t vocab) {
  return Json{{"architectures", {"LlamaForCausalLM"}},
              {"model_type", "llama"},
              {"hidden_act", "silu"},
              {"hidden_size", hidden},
              {"intermediate_size", inner},
              {"num_hidden_layers", 2},
              {"num_attention_heads", heads},
              {"num_key_value_heads", kv_heads},
              {"vocab_size", vocab},
              {"max_position_embeddings", 512},
              {"rms_norm_eps", 1e-5},
              {"rope_theta", 10000.0},
              {"rope_scaling", nullptr},
              {"tie_word_embeddings", false},
              {"torch_dtype", "float32"},
              {"bos_token_id", vocab - 256},
              {"eos_token_id", vocab - 255}};
}

std::vector<TensorDecl> small_tensors(std::int64_t vocab) {
  std::vector<TensorDecl> t;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
    t.push_back({name, TensorDType::f32, std::move(shape)});
  };
  constexpr std::int64_t kv = hidden / heads * kv_heads;
  add("model.embed_tokens.weight", {vocab, hidden});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string block = "model.layers." + std::to_string(layer) + ".";
    add(block + "input_layernorm.weight", {hidden});
    add(block + "self_attn.q_proj.weight", {hidden, hidden});
    add(block + "self_attn.k_proj.weight", {kv, hidden});
    add(block + "self_attn.v_proj.weight", {kv, hidden});
    add(block + "self_attn.o_proj.weight", {hidden, hidden});
    add(block + "post_attention_layernorm.weight", {hidden});
    add(block + "mlp.gate_proj.weight", {inner, hidden});
    add(block + "mlp.up_proj.weight", {inner, hidden});
    add(block + "mlp.down_proj.weight", {hidden, inner});
  }
  add("model.norm.weight", {hidden});
  add("lm_head.weight", {vocab, hidden});
  return t;
}

void write_side_files(const std::filesystem::path& directory, std::int64_t vocab) {
  std::filesystem::create_directories(directory);
  write_bytes(directory / "config.json", small_config(vocab).dump(2));
  std::filesystem::copy_file(tiny_llama3() / "tokenizer.json", directory / "tokenizer.json");
}

template <class Writer>
void fill(Writer& writer, const std::vector<TensorDecl>& tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t count = declared_bytes(tensors[i]) / sizeof(float);
    std::vector<float> values(count);
    const bool norm = tensors[i].shape.size() == 1;
    for (std::uint64_t k = 0; k < count; ++k) {
      values[k] = norm ? 1.0F : 0.1F * bell_value(7, i, k);
    }
    writer.append(tensors[i].name, std::as_bytes(std::span(values)));
  }
  writer.commit();
}

struct Safetensors {
  Json header;
  std::string data;
};

Safetensors read_safetensors(const std::filesystem::path& file) {
  const std::string bytes = read_bytes(file);
  std::uint64_t size = 0;
  if (bytes.size() < sizeof size) throw std::runtime_error("not a safetensors file");
  std::memcpy(&size, bytes.data(), sizeof size);
  return {Json::parse(bytes.substr(8, size)), bytes.substr(8 + size)};
}

void write_safetensors(const std::filesystem::path& file, const Safetensors& s) {
  const std::string header = s.header.dump();
  const std::uint64_t size = header.size();
  std::string bytes(sizeof size, '\0');
  std::memcpy(bytes.data(), &size, sizeof size);
  write_bytes(file, bytes + header + s.data);
}

}  // namespace

std::filesystem::path tiny_llama3() {
  return std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";
}

void write_small_model(const std::filesystem::path& directory, std::int64_t vocab) {
  write_side_files(directory, vocab);
  const std::vector<TensorDecl> tensors = small_tensors(vocab);
  SafetensorsWriter writer(directory / "model.safetensors", tensors);
  fill(writer, tensors);
}

void write_small_model_in_shards(const std::filesystem::path& directory) {
  write_side_files(directory, 2048);
  const std::vector<TensorDecl> tensors = small_tensors(2048);
  std::uint64_t total = 0;
  for (const TensorDecl& t : tensors) total += declared_bytes(t);
  ShardedCheckpointWriter writer(directory, tensors, total / 2 + total / 8);
  fill(writer, tensors);
}

void edit_json(const std::filesystem::path& file, const std::function<void(Json&)>& change) {
  Json json = Json::parse(read_bytes(file));
  change(json);
  write_bytes(file, json.dump(2));
}

void edit_header(const std::filesystem::path& file, const std::function<void(Json&)>& change) {
  Safetensors s = read_safetensors(file);
  change(s.header);
  write_safetensors(file, s);
}

void set_element(const std::filesystem::path& file, const std::string& tensor, std::size_t index,
                 float value) {
  Safetensors s = read_safetensors(file);
  const auto begin = s.header.at(tensor).at("data_offsets").at(0).get<std::size_t>();
  std::memcpy(s.data.data() + begin + index * sizeof value, &value, sizeof value);
  write_safetensors(file, s);
}

}  // namespace engine::test
