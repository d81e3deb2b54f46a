#include "formats/utf8.h"

#include <cstring>

#include "formats/error.h"

namespace engine {
namespace {

std::string hex_byte(unsigned char byte) {
  constexpr char digits[] = "0123456789ABCDEF";
  return std::string("byte 0x") + digits[byte >> 4] + digits[byte & 15];
}

}  // namespace

Utf8Step utf8_step(std::string_view text) {
  using State = Utf8Step::State;
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = at(0);
  if (lead < 0x80) return {State::complete, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {State::invalid, 1, 0};
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range is narrower after four lead bytes; this is what excludes overlong
  // forms, surrogates and values past U+10FFFF.
  unsigned low = 0x80;
  unsigned high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  std::uint32_t value = lead & (0xFFU >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if (i >= text.size()) return {State::incomplete, i, 0};
    const unsigned byte = at(i);
    if (byte < low || byte > high) return {State::invalid, i, 0};
    value = (value << 6) | (byte & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {State::complete, length, value};
}

std::size_t utf8_valid_prefix(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    std::uint64_t word = 0;
    if (text.size() - at >= sizeof(word)) {
      std::memcpy(&word, text.data() + at, sizeof(word));
      if ((word & 0x8080808080808080U) == 0) {
        at += sizeof(word);
        continue;
      }
    }
    const Utf8Step step = utf8_step(text.substr(at));
    if (step.state != Utf8Step::State::complete) return at;
    at += step.length;
  }
  return at;
}

void check_utf8(std::string_view text, const std::string& what) {
  const std::size_t good = utf8_valid_prefix(text);
  if (good == text.size()) return;
  throw FormatError(what, "byte offset " + std::to_string(good), "valid UTF-8",
                    hex_byte(static_cast<unsigned char>(text[good])));
}

void append_utf8(std::string& out, std::uint32_t codepoint) {
  const auto put = [&](std::uint32_t byte) {
    out.push_back(static_cast<char>(static_cast<unsigned char>(byte)));
  };
  const auto tail = [&](unsigned shift) { put(0x80 | ((codepoint >> shift) & 0x3F)); };
  if (codepoint < 0x80) {
    put(codepoint);
  } else if (codepoint < 0x800) {
    put(0xC0 | (codepoint >> 6));
    tail(0);
  } else if (codepoint < 0x10000) {
    put(0xE0 | (codepoint >> 12));
    tail(6);
    tail(0);
  } else {
    put(0xF0 | (codepoint >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

}  // namespace engine
