// Any bytes as a tokenizer file: an Error or a tokenizer that round-trips text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "formats/error.h"
#include "formats/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = engine::tokenizer_from_bytes(bytes, "fuzz");
    const std::string_view text = "It's 12345 <s> caf\xC3\xA9\n\n  \xF0\x9F\x98\x80 <|eot_id|>";
    const auto plain = tokenizer->encode(text, engine::SpecialText::plain);
    for (const std::int32_t id : tokenizer->encode(text, engine::SpecialText::parse)) {
      if (!tokenizer->contains(id)) std::abort();
    }
    engine::StreamDecoder stream(*tokenizer, false);
    for (const std::int32_t id : plain) stream.push(id);
    stream.flush();
    if (tokenizer->decode(plain, true).empty()) std::abort();
  } catch (const engine::Error&) {
    // Most inputs are no tokenizers.
  }
  return 0;
}
