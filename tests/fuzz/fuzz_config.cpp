// Any bytes as config.json: refused by Error, or a config that survives a round trip.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "engine/model/config.h"
#include "formats/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  engine::ModelConfig config;
  try {
    config = engine::config_from_json(text, "fuzz");
  } catch (const engine::Error&) {
    return 0;  // the expected way to refuse
  }
  if (engine::config_from_json(engine::config_to_json(config), "fuzz") != config) std::abort();
  if (engine::parameter_count(config) <= 0) std::abort();
  const auto frequencies = engine::rope_inverse_frequencies(config);
  if (frequencies.size() != static_cast<std::size_t>(config.head_dim / 2)) std::abort();
  return 0;
}
