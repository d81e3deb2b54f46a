// SVG elements, collected in drawing order, and the look that all charts share. Coordinates are px,
// y downwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace engine {

struct SvgPoint {
  double x = 0, y = 0;
};

struct SvgBox {
  double left = 0, top = 0, right = 0, bottom = 0;

  [[nodiscard]] double width() const { return right - left; }
  [[nodiscard]] double height() const { return bottom - top; }
  // Boxes that only touch do not overlap.
  [[nodiscard]] bool overlaps(const SvgBox& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
  [[nodiscard]] bool contains(const SvgBox& other) const {
    return left <= other.left && top <= other.top && other.right <= right && other.bottom <= bottom;
  }
};

namespace svg_look {
inline constexpr double title_size = 16, subtitle_size = 12, axis_title_size = 13, tick_size = 12,
                        legend_size = 12, label_size = 10.5, note_size = 11;
inline constexpr double line_height = 1.35;  // of the font size, between base lines
inline constexpr double edge = 14;           // px around everything
inline constexpr const char* ink = "#222222";
inline constexpr const char* grey_ink = "#555555";
inline constexpr const char* grid = "#dddddd";
inline constexpr const char* minor_grid = "#efefef";
}  // namespace svg_look

// Shapes with an area each, so that every one of them can be filled or hollow.
enum class Marker : std::uint8_t {
  circle,
  square,
  triangle_up,
  diamond,
  triangle_down,
  plus,
  star,
  hexagon,
  cross,
};
// How a marker is filled: with its colour, white, a light tint, or white with a dot.
enum class MarkerFill : std::uint8_t { full, hollow, tinted, dotted };
enum class Dash : std::uint8_t { solid, dashed, dotted, dash_dot };

struct SeriesStyle {
  std::string colour = "#222222";
  Marker marker = Marker::circle;
  MarkerFill fill = MarkerFill::full;
  Dash dash = Dash::solid;
  double line_width = 1.6;  // px
};

// Colours that the common kinds of colour blindness and a grey print keep apart as far as eight
// can be, each with a marker shape of its own; the first 72 pairs of colour and marker differ.
[[nodiscard]] SeriesStyle series_style(std::size_t index);

enum class TextAnchor : std::uint8_t { start, middle, end };

struct TextStyle {
  double size = svg_look::tick_size;
  TextAnchor anchor = TextAnchor::start;
  bool bold = false;
  bool upwards = false;  // turned by -90 degrees around its anchor
  const char* colour = svg_look::ink;
};

class SvgCanvas {
 public:
  void line(SvgPoint from, SvgPoint to, std::string_view colour, double width,
            Dash dash = Dash::solid);
  void polyline(std::span<const SvgPoint> points, std::string_view colour, double width, Dash dash);
  // `opacity`: of the fill.
  void rect(const SvgBox& box, std::string_view fill, std::string_view stroke = "none",
            double opacity = 1);
  // `radius` is half the height of the shape, about.
  void marker(SvgPoint centre, double radius, const SeriesStyle& style);
  // `at` is the anchor on the base line.
  void text(SvgPoint at, std::string_view text, const TextStyle& style);
  // Lines below each other, the first one's base line at at.y; returns the y below the last.
  double text_lines(SvgPoint at, std::span<const std::string> lines, const TextStyle& style);

  // The file: white background, viewBox, and the title for readers that speak it.
  [[nodiscard]] std::string document(double width, double height, std::string_view title) const;

 private:
  std::string body_;
};

// What stands above and below the plot of every kind of chart.
struct ChartText {
  std::string title;
  std::string subtitle;
  std::vector<std::string> notes;  // one paragraph each
};

// Draws title and subtitle, wrapped, from the top; returns the y where the plot may begin.
double draw_head(SvgCanvas& canvas, const ChartText& text, double width);
// Draws the paragraphs below `top`; returns the height of the whole drawing.
double draw_notes(SvgCanvas& canvas, std::span<const std::string> notes, double top, double width);

}  // namespace engine
