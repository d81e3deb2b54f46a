#include "eval/svg_canvas.h"

#include <array>
#include <cmath>
#include <numbers>

#include "eval/svg_text.h"

namespace engine {
namespace {

// Dark and light alternate, so that neighbours differ in grey too.
constexpr std::array<const char*, 8> palette = {"#0072b2", "#e69f00", "#882255", "#56b4e9",
                                                "#009e73", "#cc79a7", "#444444", "#d55e00"};
constexpr std::size_t marker_count = 9;

std::string_view dash_array(Dash dash) {
  switch (dash) {
    case Dash::dashed:
      return "6 3";
    case Dash::dotted:
      return "2 3";
    case Dash::dash_dot:
      return "8 3 2 3";
    case Dash::solid:
      break;
  }
  return "";
}

std::string attribute(std::string_view name, std::string_view value) {
  return " " + std::string(name) + "=\"" + std::string(value) + "\"";
}

std::string attribute(std::string_view name, double value) {
  return attribute(name, svg_number(value));
}

std::string stroke(std::string_view colour, double width, Dash dash) {
  std::string text = attribute("stroke", colour) + attribute("stroke-width", width);
  if (dash != Dash::solid) text += attribute("stroke-dasharray", dash_array(dash));
  return text;
}

std::string point_list(std::span<const SvgPoint> points) {
  std::string text;
  for (const SvgPoint& p : points) {
    if (!text.empty()) text += ' ';
    text += svg_number(p.x) + "," + svg_number(p.y);
  }
  return text;
}

// Corners of a regular polygon, or of a star when the radii differ; the first one at `start` turns
// clockwise from the top.
std::vector<SvgPoint> ring(SvgPoint centre, int corners, double start, double outer, double inner) {
  std::vector<SvgPoint> points;
  for (int i = 0; i < corners; ++i) {
    const double angle = (start + static_cast<double>(i) / corners) * 2 * std::numbers::pi;
    const double radius = i % 2 == 0 ? outer : inner;
    points.push_back({centre.x + radius * std::sin(angle), centre.y - radius * std::cos(angle)});
  }
  return points;
}

std::vector<SvgPoint> plus_shape(SvgPoint centre, double radius, double turn) {
  const double arm = 0.36 * radius;
  const std::array<SvgPoint, 12> corners = {{{-arm, -radius},
                                             {arm, -radius},
                                             {arm, -arm},
                                             {radius, -arm},
                                             {radius, arm},
                                             {arm, arm},
                                             {arm, radius},
                                             {-arm, radius},
                                             {-arm, arm},
                                             {-radius, arm},
                                             {-radius, -arm},
                                             {-arm, -arm}}};
  std::vector<SvgPoint> points;
  for (const SvgPoint& c : corners) {
    points.push_back({centre.x + c.x * std::cos(turn) - c.y * std::sin(turn),
                      centre.y + c.x * std::sin(turn) + c.y * std::cos(turn)});
  }
  return points;
}

// The factors make the shapes look equally large.
std::vector<SvgPoint> shape(SvgPoint centre, double radius, Marker marker) {
  switch (marker) {
    case Marker::circle:
      return {};
    case Marker::square:
      return ring(centre, 4, 0.125, 1.25 * radius, 1.25 * radius);
    case Marker::triangle_up:
      return ring({centre.x, centre.y + 0.2 * radius}, 3, 0, 1.35 * radius, 1.35 * radius);
    case Marker::triangle_down:
      return ring({centre.x, centre.y - 0.2 * radius}, 3, 0.5, 1.35 * radius, 1.35 * radius);
    case Marker::diamond:
      return ring(centre, 4, 0, 1.35 * radius, 1.35 * radius);
    case Marker::plus:
      return plus_shape(centre, 1.25 * radius, 0);
    case Marker::star:
      return ring(centre, 10, 0, 1.5 * radius, 0.65 * radius);
    case Marker::hexagon:
      return ring(centre, 6, 0, 1.15 * radius, 1.15 * radius);
    case Marker::cross:
      return plus_shape(centre, 1.25 * radius, std::numbers::pi / 4);
  }
  return {};
}

}  // namespace

SeriesStyle series_style(std::size_t index) {
  SeriesStyle style;
  style.colour = palette[index % palette.size()];
  style.marker = static_cast<Marker>(index % marker_count);
  return style;
}

void SvgCanvas::line(SvgPoint from, SvgPoint to, std::string_view colour, double width, Dash dash) {
  body_ += "<line" + attribute("x1", from.x) + attribute("y1", from.y) + attribute("x2", to.x) +
           attribute("y2", to.y) + stroke(colour, width, dash) + "/>\n";
}

void SvgCanvas::polyline(std::span<const SvgPoint> points, std::string_view colour, double width,
                         Dash dash) {
  body_ += "<polyline" + attribute("points", point_list(points)) + attribute("fill", "none") +
           stroke(colour, width, dash) + attribute("stroke-linejoin", "round") + "/>\n";
}

void SvgCanvas::rect(const SvgBox& box, std::string_view fill, std::string_view stroke_colour,
                     double opacity) {
  body_ += "<rect" + attribute("x", box.left) + attribute("y", box.top) +
           attribute("width", box.width()) + attribute("height", box.height()) +
           attribute("fill", fill);
  if (opacity < 1) body_ += attribute("fill-opacity", opacity);
  if (stroke_colour != "none") body_ += stroke(stroke_colour, 1, Dash::solid);
  body_ += "/>\n";
}

void SvgCanvas::marker(SvgPoint centre, double radius, const SeriesStyle& style) {
  const bool full = style.fill == MarkerFill::full;
  const auto draw = [&](const std::string& paint) {
    if (style.marker == Marker::circle) {
      body_ += "<circle" + attribute("cx", centre.x) + attribute("cy", centre.y) +
               attribute("r", 1.08 * radius) + paint + "/>\n";
      return;
    }
    const std::vector<SvgPoint> corners = shape(centre, radius, style.marker);
    body_ += "<polygon" + attribute("points", point_list(corners)) + paint + "/>\n";
  };
  // A white rim keeps full markers apart where they meet.
  draw(attribute("fill", full ? std::string_view(style.colour) : "#ffffff") +
       (full ? stroke("#ffffff", 0.6, Dash::solid) : stroke(style.colour, 1.5, Dash::solid)));
  if (style.fill == MarkerFill::tinted) {
    draw(attribute("fill", style.colour) + attribute("fill-opacity", 0.4));
  } else if (style.fill == MarkerFill::dotted) {
    body_ += "<circle" + attribute("cx", centre.x) + attribute("cy", centre.y) +
             attribute("r", 0.35 * radius) + attribute("fill", style.colour) + "/>\n";
  }
}

void SvgCanvas::text(SvgPoint at, std::string_view text, const TextStyle& style) {
  body_ += "<text" + attribute("x", at.x) + attribute("y", at.y) +
           attribute("font-size", style.size) + attribute("fill", style.colour);
  if (style.anchor != TextAnchor::start) {
    body_ += attribute("text-anchor", style.anchor == TextAnchor::middle ? "middle" : "end");
  }
  if (style.bold) body_ += attribute("font-weight", "bold");
  if (style.upwards) {
    body_ +=
        attribute("transform", "rotate(-90 " + svg_number(at.x) + " " + svg_number(at.y) + ")");
  }
  body_ += ">" + xml_text(text) + "</text>\n";
}

double SvgCanvas::text_lines(SvgPoint at, std::span<const std::string> lines,
                             const TextStyle& style) {
  for (const std::string& line : lines) {
    text(at, line, style);
    at.y += style.size * svg_look::line_height;
  }
  return at.y;
}

std::string SvgCanvas::document(double width, double height, std::string_view title) const {
  const std::string w = svg_number(std::ceil(width)), h = svg_number(std::ceil(height));
  return "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
         "<svg xmlns=\"http://www.w3.org/2000/svg\"" +
         attribute("width", w) + attribute("height", h) +
         attribute("viewBox", "0 0 " + w + " " + h) + attribute("font-family", "sans-serif") +
         ">\n<title>" + xml_text(title) + "</title>\n<rect" + attribute("width", w) +
         attribute("height", h) + attribute("fill", "#ffffff") + "/>\n" + body_ + "</svg>\n";
}

double draw_head(SvgCanvas& canvas, const ChartText& text, double width) {
  using namespace svg_look;
  const double inner = width - 2 * edge;
  double y = edge + title_size;
  if (!text.title.empty()) {
    y = canvas.text_lines({edge, y}, wrap_text(text.title, title_size, inner, true),
                          {.size = title_size, .bold = true});
  }
  if (!text.subtitle.empty()) {
    y = canvas.text_lines({edge, y}, wrap_text(text.subtitle, subtitle_size, inner),
                          {.size = subtitle_size, .colour = grey_ink});
  }
  return y;
}

double draw_notes(SvgCanvas& canvas, std::span<const std::string> notes, double top, double width) {
  using namespace svg_look;
  double y = top + note_size;
  for (const std::string& note : notes) {
    y = canvas.text_lines({edge, y}, wrap_text(note, note_size, width - 2 * edge),
                          {.size = note_size, .colour = grey_ink}) +
        2;
  }
  return (notes.empty() ? top : y - note_size) + edge;
}

}  // namespace engine
