// Text as a chart needs it: widths without a font, line breaks, numbers, XML.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace engine {

// Width in px of one line in any usual sans-serif font: an upper bound for all but exotic fonts,
// from classes of character widths. `size` is the font size in px.
[[nodiscard]] double text_width(std::string_view text, double size, bool bold = false);

// Lines no wider than `width` px, broken at spaces, inside a word only if it is wider than a line
// alone. Never empty: an empty text is one empty line.
[[nodiscard]] std::vector<std::string> wrap_text(std::string_view text, double size, double width,
                                                 bool bold = false);

// Text for XML content and attributes: markup escaped, bytes that are not UTF-8 and characters that
// XML does not allow replaced by U+FFFD, line breaks and tabs by spaces.
[[nodiscard]] std::string xml_text(std::string_view text);

// A coordinate: at most two decimals, no exponent, the same in every locale.
[[nodiscard]] std::string svg_number(double value);

// A value with so many decimals, the same in every locale; never "-0".
[[nodiscard]] std::string decimal_text(double value, int decimals);

// A value for people, so many significant digits: "0.0012", "33.4", "15000", "1.2×10⁶".
[[nodiscard]] std::string value_text(double value, int digits = 3);

// "10⁶".
[[nodiscard]] std::string power_of_ten_text(int exponent);

}  // namespace engine
