// Calibration tokens: cut from a text as GPTQ does, taken as they are from a tensor, or synthetic.
#pragma once

#include <memory>
#include <string>

#include "engine/model/stream.h"
#include "formats/dataset.h"
#include "formats/tokenizer.h"

namespace engine {

struct CalibrationRequest {
  std::string file;  // text, FILE.safetensors[:TENSOR] (default tensor "calibration"), or
                     // "synthetic"
  Dataset dataset = Dataset::plain;
  std::int64_t samples = 128;
  std::int64_t seq = 2048;
  std::int64_t seed = 0;
};

struct Calibration {
  TokenWindows tokens;
  Json protocol;  // source, hashes, sampling, seed, BOS policy
};

// Throws Error(usage) for impossible --samples or --seq.
void check_request(const CalibrationRequest& request);

// The tokenizer of a model, or null if it has none (synthetic).
std::unique_ptr<Tokenizer> model_tokenizer(const WeightSource& source);

// Throws Error(usage) for a text shorter than one window, a tensor of another shape, or a text
// together with a model that has no tokenizer.
Calibration load_calibration(const CalibrationRequest& request, const WeightSource& source);

// An integer matrix from FILE.safetensors:TENSOR.
struct TokenMatrix {
  std::vector<std::int32_t> ids;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::string sha256;  // of the ids as little-endian int32
};
TokenMatrix load_token_matrix(const std::string& file_and_tensor,
                              const std::string& default_tensor);
[[nodiscard]] bool names_token_matrix(const std::string& file);

// `count` ids below the vocabulary from the counter RNG.
std::vector<std::int32_t> synthetic_tokens(std::int64_t count, std::int64_t vocab,
                                           std::uint64_t seed);

}  // namespace engine
