// Any bytes as a safetensors file: parsed, or refused by Error; accepted ranges must be inside.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "formats/error.h"
#include "formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    std::uint64_t covered = 0;
    for (const engine::TensorInfo& info : engine::parse_safetensors(bytes, "fuzz").tensors) {
      if (info.begin > info.end || info.end > size || info.begin < covered) std::abort();
      covered = info.end;
    }
  } catch (const engine::Error&) {
    // The expected way to refuse.
  }
  return 0;
}
