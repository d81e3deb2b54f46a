// Fuzzes the description of a packed linear: bytes -> JSON -> structure checks -> bit accounting.
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "engine/weight/pattern.h"
#include "engine/weight/serialize.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const engine::Json json =
        engine::parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    std::vector<std::uint32_t> planes;
    const engine::LinearWeight weight = engine::linear_from_json(json, "fuzz", "linear", planes);
    static_cast<void>(engine::scheme_name(weight));
    static_cast<void>(engine::match_affine(weight));
    static_cast<void>(engine::describe(weight, planes));
  } catch (const engine::Error&) {
    // Refused: fine.
  }
  return 0;
}
