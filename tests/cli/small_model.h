// A LLaMA checkpoint that quantizes in milliseconds, and the ways to break it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "formats/json.h"

namespace engine::test {

// The directory of the checkpoint that comes with the tests.
std::filesystem::path tiny_llama3();

// Two blocks, hidden 64, random weights (f32), and the tokenizer of tiny_llama3(), in a new
// directory: config.json, model.safetensors, tokenizer.json. With fewer than 2048 tokens, the
// tokenizer is that of another model.
void write_small_model(const std::filesystem::path& directory, std::int64_t vocab = 2048);
// The same tensors in two shards with an index.
void write_small_model_in_shards(const std::filesystem::path& directory);

inline constexpr const char* first_shard = "model-00001-of-00002.safetensors";
inline constexpr const char* second_shard = "model-00002-of-00002.safetensors";

// Rewrites a JSON file after a change.
void edit_json(const std::filesystem::path& file, const std::function<void(Json&)>& change);
// Rewrites the header of a safetensors file after a change; the data stays as it is.
void edit_header(const std::filesystem::path& file, const std::function<void(Json&)>& change);
// Puts `value` in place of element `index` of an f32 tensor.
void set_element(const std::filesystem::path& file, const std::string& tensor, std::size_t index,
                 float value);

}  // namespace engine::test
