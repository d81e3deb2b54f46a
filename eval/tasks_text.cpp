#include <array>

#include "eval/tasks_parts.h"
#include "formats/utf8.h"

namespace engine::tasks {
namespace {

// What Python's str.strip() removes.
bool is_space(std::uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

// Start of the last character of `text`, which is not empty.
std::size_t last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0U) == 0x80U) --at;
  return at;
}

// Capital letters first, first + step, ... last; the small one is `delta` further.
struct CaseRange {
  std::uint32_t first, last, step;
  std::int32_t delta;
};
constexpr std::array kCaseRanges = {
    CaseRange{'A', 'Z', 1, 32},
    // Latin
    CaseRange{0xC0, 0xD6, 1, 32},
    CaseRange{0xD8, 0xDE, 1, 32},
    CaseRange{0x100, 0x12E, 2, 1},
    CaseRange{0x132, 0x136, 2, 1},
    CaseRange{0x139, 0x147, 2, 1},
    CaseRange{0x14A, 0x176, 2, 1},
    CaseRange{0x178, 0x178, 1, -121},
    CaseRange{0x179, 0x17D, 2, 1},
    CaseRange{0x1A0, 0x1A4, 2, 1},
    CaseRange{0x1AF, 0x1AF, 1, 1},
    CaseRange{0x1CD, 0x1DB, 2, 1},
    CaseRange{0x1DE, 0x1EE, 2, 1},
    CaseRange{0x1F8, 0x21E, 2, 1},
    CaseRange{0x222, 0x232, 2, 1},
    CaseRange{0x1E00, 0x1E94, 2, 1},
    CaseRange{0x1EA0, 0x1EFE, 2, 1},
    // Greek
    CaseRange{0x386, 0x386, 1, 38},
    CaseRange{0x388, 0x38A, 1, 37},
    CaseRange{0x38C, 0x38C, 1, 64},
    CaseRange{0x38E, 0x38F, 1, 63},
    CaseRange{0x391, 0x3A1, 1, 32},
    CaseRange{0x3A3, 0x3AB, 1, 32},
    // Cyrillic
    CaseRange{0x400, 0x40F, 1, 80},
    CaseRange{0x410, 0x42F, 1, 32},
    CaseRange{0x460, 0x480, 2, 1},
    CaseRange{0x48A, 0x4BE, 2, 1},
    CaseRange{0x4C1, 0x4CD, 2, 1},
    CaseRange{0x4D0, 0x52E, 2, 1},
    // Armenian
    CaseRange{0x531, 0x556, 1, 48},
    // full width
    CaseRange{0xFF21, 0xFF3A, 1, 32},
};

std::uint32_t shifted(std::uint32_t c, std::int32_t by) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(c) + by);
}

std::uint32_t lower(std::uint32_t c) {
  for (const CaseRange& r : kCaseRanges) {
    if (c >= r.first && c <= r.last && (c - r.first) % r.step == 0) return shifted(c, r.delta);
  }
  return c;
}

std::uint32_t title(std::uint32_t c) {
  for (const CaseRange& r : kCaseRanges) {
    const std::uint32_t capital = shifted(c, -r.delta);
    if (capital >= r.first && capital <= r.last && (capital - r.first) % r.step == 0) {
      return capital;
    }
  }
  return c;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  std::string out;
  std::size_t at = 0;
  for (std::size_t found; (found = text.find(from, at)) != std::string::npos;) {
    out.append(text, at, found - at);
    out += to;
    at = found + from.size();
  }
  out.append(text, at);
  text = std::move(out);
}

// Without every [...] on one line, each from its [ to the nearest ].
std::string without_brackets(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end =
        text[at] == '[' ? text.find_first_of("]\n", at) : std::string_view::npos;
    if (end != std::string_view::npos && text[end] == ']') {
      at = end + 1;
    } else {
      out += text[at++];
    }
  }
  return out;
}

}  // namespace

std::string_view stripped_right(std::string_view text) {
  while (!text.empty()) {
    const std::size_t at = last_character(text);
    const Utf8Step step = utf8_step(text.substr(at));
    if (step.state != Utf8Step::State::complete || !is_space(step.codepoint)) break;
    text = text.substr(0, at);
  }
  return text;
}

std::string_view stripped(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step step = utf8_step(text);
    if (step.state != Utf8Step::State::complete || !is_space(step.codepoint)) break;
    text.remove_prefix(step.length);
  }
  return stripped_right(text);
}

std::int64_t count_code_points(std::string_view text) {
  std::int64_t count = 0;
  for (const char c : text) count += (static_cast<unsigned char>(c) & 0xC0U) != 0x80U ? 1 : 0;
  return count;
}

std::string capitalized(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (bool first = true; !text.empty(); first = false) {
    const Utf8Step step = utf8_step(text);
    if (step.state == Utf8Step::State::complete) {
      append_utf8(out, first ? title(step.codepoint) : lower(step.codepoint));
    } else {
      out += text.substr(0, step.length);
    }
    text.remove_prefix(step.length);
  }
  return out;
}

std::string without_markup(std::string_view text) {
  std::string out(stripped(text));
  replace_all(out, " [title]", ". ");
  out = without_brackets(out);
  replace_all(out, "  ", " ");
  return out;
}

}  // namespace engine::tasks
