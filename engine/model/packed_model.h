// The directory of a packed model: what the planes of a .qw file mean (docs/weights.md).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"
#include "formats/json.h"
#include "formats/packed.h"

namespace engine {

struct PackedLinear {
  LinearWeight weight;                // planes described, their data null
  std::vector<std::uint32_t> planes;  // ids in the file, in the order of weight.planes
  Json entry;                         // the whole directory entry: outcome, errors, bits
};

struct PackedDense {
  std::uint32_t plane = 0;
  DenseInfo info;
};

struct PackedModel {
  ModelConfig config;
  Json directory;
  std::string tokenizer_name;
  std::uint32_t tokenizer_plane = 0;            // meaningful if tokenizer_name is not empty
  std::map<std::string, PackedLinear> linears;  // by linear_name()
  std::map<std::string, PackedDense> dense;     // by dense_names()
};

// Reads and checks the directory: every linear and dense tensor of the config is there with its
// shape, every plane exists with its size. FormatError naming file and key otherwise.
PackedModel read_packed_model(const PackedReader& reader);

// One linear's directory entry, and back (also used for resuming).
Json linear_entry(const LinearWeight& weight, std::span<const std::uint32_t> planes);
PackedLinear parse_linear_entry(const Json& entry, const std::string& file,
                                const std::string& name);

}  // namespace engine
