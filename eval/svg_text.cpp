#include "eval/svg_text.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "formats/utf8.h"

namespace engine {
namespace {

constexpr std::uint32_t replacement = 0xFFFD;

struct WidthClass {
  double em;
  std::string_view characters;
};
// The widest common faces decide (those of the Verdana family); most others are about 10 %
// narrower.
constexpr WidthClass width_classes[] = {
    {0.30, "'ijl"},
    {0.37, " ,.f"},
    {0.46, "IJ()[]t!r\"/:;\\|-"},
    {0.57, "szc?L"},
    {0.645, "$0123456789{}FkvxyPToaehnubdgpqEY*_`"},
    {0.74, "KAVXZBRCSU"},
    {0.85, "NHDGOQw&#+<=>^~M"},
    {1.08, "%mW@"},
};
constexpr double other_width = 1.08;
constexpr double superscript_width = 0.55;
constexpr double bold_factor = 1.2;

constexpr std::array<double, 128> make_ascii_widths() {
  std::array<double, 128> widths{};
  widths.fill(other_width);
  for (const WidthClass& c : width_classes) {
    for (const char character : c.characters) widths[static_cast<std::size_t>(character)] = c.em;
  }
  return widths;
}
constexpr std::array<double, 128> ascii_widths = make_ascii_widths();

bool is_superscript(std::uint32_t c) {
  return c == 0xB9 || c == 0xB2 || c == 0xB3 || (c >= 0x2070 && c <= 0x207B);
}

double character_width(std::uint32_t c) {
  if (c < ascii_widths.size()) return ascii_widths[c];
  return is_superscript(c) ? superscript_width : other_width;
}

// XML's Char production without what would be a line break or a tab in a label.
bool is_xml_character(std::uint32_t c) {
  return c >= 0x20 && c != 0x7F && c != 0xFFFE && c != 0xFFFF;
}

// The next character; one that the chart cannot show is U+FFFD, white space of any kind is a space.
std::uint32_t next_character(std::string_view& text) {
  const Utf8Step step = utf8_step(text);
  text.remove_prefix(step.length);
  if (step.state != Utf8Step::State::complete) return replacement;
  if (step.codepoint == '\n' || step.codepoint == '\r' || step.codepoint == '\t') return ' ';
  return is_xml_character(step.codepoint) ? step.codepoint : replacement;
}

}  // namespace

double text_width(std::string_view text, double size, bool bold) {
  double em = 0;
  while (!text.empty()) em += character_width(next_character(text));
  return em * size * (bold ? bold_factor : 1.0);
}

std::vector<std::string> wrap_text(std::string_view text, double size, double width, bool bold) {
  const double scale = size * (bold ? bold_factor : 1.0);
  std::vector<std::string> lines;
  std::string line, word;
  double line_width = 0, word_width = 0;
  const auto end_line = [&] {
    while (!line.empty() && line.back() == ' ') line.pop_back();
    lines.push_back(line);
    line.clear();
    line_width = 0;
  };
  const auto end_word = [&] {
    if (!line.empty() && line_width + word_width > width) end_line();
    line += word;
    line_width += word_width;
    word.clear();
    word_width = 0;
  };
  while (!text.empty()) {
    const std::uint32_t c = next_character(text);
    const double w = character_width(c) * scale;
    if (c == ' ') {
      end_word();
      if (!line.empty()) {
        line += ' ';
        line_width += w;
      }
      continue;
    }
    if (!word.empty() && word_width + w > width) end_word();
    append_utf8(word, c);
    word_width += w;
  }
  end_word();
  if (!line.empty() || lines.empty()) end_line();
  return lines;
}

std::string xml_text(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const std::uint32_t c = next_character(text);
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        append_utf8(out, c);
    }
  }
  return out;
}

std::string decimal_text(double value, int decimals) {
  // The longest double has 309 digits before the point.
  std::array<char, 400> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                    std::chars_format::fixed, decimals);
  std::string text(buffer.data(), result.ptr);
  if (text.starts_with('-') && text.find_first_of("123456789") == std::string::npos)
    text.erase(0, 1);
  return text;
}

std::string svg_number(double value) {
  std::string text = decimal_text(value, 2);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text;
}

std::string power_of_ten_text(int exponent) {
  static constexpr std::string_view digits[] = {"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
  std::string text = "10";
  if (exponent < 0) text += "⁻";
  for (const char c : std::to_string(std::abs(exponent))) {
    text += digits[static_cast<std::size_t>(c - '0')];
  }
  return text;
}

std::string value_text(double value, int digits) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  if (value == 0) return "0";
  // Scientific notation gives the exponent after rounding: 999.9 is 1.00e3.
  std::array<char, 64> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                    std::chars_format::scientific, digits - 1);
  const std::string text(buffer.data(), result.ptr);
  const std::size_t mark = text.find('e');
  const int exponent = std::atoi(text.c_str() + mark + 1);
  if (exponent >= -4 && exponent < 6) {
    const int decimals = digits - 1 - exponent;
    return decimal_text(value, decimals > 0 ? decimals : 0);
  }
  return text.substr(0, mark) + "×" + power_of_ten_text(exponent);
}

}  // namespace engine
