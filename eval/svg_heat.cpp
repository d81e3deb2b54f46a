// Heat maps. The colours get lighter with the value, so that a grey print keeps their order.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "engine/core/error.h"
#include "eval/svg_chart.h"
#include "eval/svg_text.h"

namespace engine {
namespace {

using namespace svg_look;

constexpr double cell_height = 24, smallest_cell_width = 9, largest_cell_width = 60;
constexpr double wished_width = 560;  // px of all columns
constexpr double longest_label = 200, label_gap = 8, bar_width = 14, bar_gap = 22;
constexpr double overlap = 0.7;  // px
constexpr int bar_steps = 64;
constexpr double smallest_height = 150;  // px of the colour bar, so that it has room for ticks

struct Colour {
  double red, green, blue;
};
constexpr std::array<Colour, 6> ramp = {
    {{38, 20, 71}, {66, 62, 133}, {48, 110, 142}, {52, 158, 132}, {140, 200, 90}, {250, 230, 80}}};

std::string colour_of(double fraction) {
  const double at = std::clamp(fraction, 0.0, 1.0) * static_cast<double>(ramp.size() - 1);
  const std::size_t i = std::min(static_cast<std::size_t>(at), ramp.size() - 2);
  const double part = at - static_cast<double>(i);
  std::string text = "#";
  const auto add = [&](double from, double to) {
    static constexpr std::string_view digits = "0123456789abcdef";
    const auto level = static_cast<std::size_t>(std::lround(from + part * (to - from)));
    text += digits[level / 16];
    text += digits[level % 16];
  };
  add(ramp[i].red, ramp[i + 1].red);
  add(ramp[i].green, ramp[i + 1].green);
  add(ramp[i].blue, ramp[i + 1].blue);
  return text;
}

}  // namespace

std::string heat_map_svg(const HeatMap& chart) {
  REQUIRE(chart.values.size() == chart.rows.size() * chart.columns.size(), "one value per cell");
  std::vector<double> values;
  for (const std::optional<double>& v : chart.values) {
    if (v) values.push_back(*v);
  }
  const double cells_height = cell_height * static_cast<double>(chart.rows.size());
  const double height_of_bar = std::max(cells_height, smallest_height);
  AxisSpec scale = chart.colour;
  scale.tight = true;
  const Axis axis(scale, values, height_of_bar, AxisDirection::vertical);
  if (axis.empty()) return "";

  const auto columns = static_cast<double>(chart.columns.size());
  const double cell =
      std::floor(std::clamp(wished_width / columns, smallest_cell_width, largest_cell_width));
  double row_labels = 0;
  std::vector<std::vector<std::string>> rows;
  for (const std::string& label : chart.rows) {
    // One line: a cell has no room for more; what is cut shows that it is.
    std::vector<std::string> lines = wrap_text(label, tick_size, longest_label);
    if (lines.size() > 1) lines = {lines[0] + "…"};
    row_labels = std::max(row_labels, text_width(lines[0], tick_size));
    rows.push_back(std::move(lines));
  }
  const double y_title = chart.y_title.empty() ? 0 : axis_title_size * line_height + label_gap;
  const double left = std::ceil(edge + y_title + row_labels + label_gap);
  const double right = left + cell * columns;
  const double width = right + bar_gap + axis.margin() + bar_width;

  SvgCanvas canvas;
  const double top = std::ceil(draw_head(canvas, chart.text, width) + tick_size / 2);
  const SvgBox plot{left, top, right, top + cells_height};
  bool crossed = false;
  for (std::size_t r = 0; r < chart.rows.size(); ++r) {
    const double y = top + cell_height * static_cast<double>(r);
    canvas.text({left - label_gap, y + cell_height / 2 + 0.36 * tick_size}, rows[r][0],
                {.size = tick_size, .anchor = TextAnchor::end});
    for (std::size_t c = 0; c < chart.columns.size(); ++c) {
      const double x = left + cell * static_cast<double>(c);
      const SvgBox box{x, y, x + cell, y + cell_height};
      const std::optional<double>& value = chart.values[r * chart.columns.size() + c];
      if (value && Axis::shows(chart.colour.scale, *value)) {
        // A little too large, and painted over by the next cells: no seams.
        canvas.rect({x, y, std::min(x + cell + overlap, plot.right),
                     std::min(y + cell_height + overlap, plot.bottom)},
                    colour_of(axis.position(*value) / axis.length()));
        continue;
      }
      crossed = true;
      canvas.rect(box, "#ffffff");
      canvas.line({box.left, box.top}, {box.right, box.bottom}, grey_ink, 0.7);
      canvas.line({box.left, box.bottom}, {box.right, box.top}, grey_ink, 0.7);
    }
  }
  canvas.rect(plot, "none", grey_ink);

  // Column labels as many as fit.
  double widest = 1;
  for (const std::string& label : chart.columns) {
    widest = std::max(widest, text_width(label, tick_size));
  }
  std::size_t every = 1;
  for (const std::size_t step : {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000}) {
    every = step;
    if (static_cast<double>(step) * cell >= widest + 8) break;
  }
  double below = plot.bottom + 5;
  for (std::size_t c = 0; c < chart.columns.size(); c += every) {
    canvas.text({left + cell * (static_cast<double>(c) + 0.5), below + tick_size}, chart.columns[c],
                {.size = tick_size, .anchor = TextAnchor::middle});
  }
  below += tick_size + 10;
  below = canvas.text_lines({(plot.left + plot.right) / 2, below + axis_title_size},
                            wrap_text(chart.x_title, axis_title_size, right - left),
                            {.size = axis_title_size, .anchor = TextAnchor::middle}) -
          axis_title_size;
  if (!chart.y_title.empty()) {
    canvas.text({edge + axis_title_size, (plot.top + plot.bottom) / 2}, chart.y_title,
                {.size = axis_title_size, .anchor = TextAnchor::middle, .upwards = true});
  }

  // The colour bar and, to its left as on every vertical axis, its scale.
  const SvgBox bar{width - edge - bar_width, top, width - edge, top + height_of_bar};
  draw_axis(canvas, axis, AxisDirection::vertical, bar);
  // Each step reaches down to the end and is painted over by the next: no seams.
  for (int i = bar_steps; i-- > 0;) {
    const double step = bar.height() / bar_steps;
    canvas.rect({bar.left, bar.bottom - (i + 1) * step, bar.right, bar.bottom},
                colour_of((i + 0.5) / bar_steps));
  }
  canvas.rect(bar, "none", grey_ink);

  std::vector<std::string> notes = chart.text.notes;
  if (crossed)
    notes.emplace_back("Crossed cells have no value, or one that the scale cannot show.");
  const double height = draw_notes(canvas, notes, std::max(below, bar.bottom) + edge, width);
  return canvas.document(width, height, chart.text.title);
}

}  // namespace engine
