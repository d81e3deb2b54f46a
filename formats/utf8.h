// UTF-8 as the tokenizers need it: strict validation and code point access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace engine {

// Offset of the first byte that does not belong to a well-formed sequence (overlong forms,
// surrogates and values above U+10FFFF are malformed), or text.size() if there is none.
std::size_t utf8_valid_prefix(std::string_view text);

// Throws FormatError naming the byte offset when `text` is not valid UTF-8. `what` names the
// source.
void check_utf8(std::string_view text, const std::string& what);

// State of the sequence that starts at text[0] (text is not empty).
struct Utf8Step {
  enum class State : std::uint8_t { complete, incomplete, invalid };
  State state;
  std::size_t length;       // complete: 1..4. Otherwise: the bytes one U+FFFD would replace.
  std::uint32_t codepoint;  // complete only
};
Utf8Step utf8_step(std::string_view text);

// Appends a Unicode scalar value.
void append_utf8(std::string& out, std::uint32_t codepoint);

}  // namespace engine
