#include "eval/svg_legend.h"

#include <algorithm>
#include <cmath>

#include "eval/svg_text.h"

namespace engine {
namespace {

using namespace svg_look;

constexpr double longest_line = 230;  // px of text before it is wrapped
constexpr double sample_width = 26, sample_gap = 7, column_gap = 18, row_gap = 4;
constexpr double marker_radius = 4;

}  // namespace

double Legend::row_height(const Row& row) const {
  return static_cast<double>(row.lines.size()) * legend_size * line_height + row_gap;
}

double Legend::arrange(double column_height, double column_width) {
  double left = 0, top = 0, highest = 0;
  for (Row& row : rows_) {
    const double height = row_height(row);
    if (top > 0 && top + height > column_height) {
      left += column_width + column_gap;
      top = 0;
    }
    row.left = left;
    row.top = top;
    top += height;
    highest = std::max(highest, top);
  }
  width_ = left + column_width;
  return highest;
}

Legend::Legend(const std::vector<LegendEntry>& entries, double height, double max_width) {
  double text = 0, total = 0;
  for (const LegendEntry& e : entries) {
    if (e.name.empty()) continue;
    Row row{.entry = e, .lines = wrap_text(e.name, legend_size, longest_line)};
    for (const std::string& line : row.lines) text = std::max(text, text_width(line, legend_size));
    total += row_height(row);
    rows_.push_back(std::move(row));
  }
  if (rows_.empty()) return;
  const double column = sample_width + sample_gap + text;
  const double most = std::max(1.0, std::floor((max_width + column_gap) / (column + column_gap)));
  // Rows of several lines leave columns unequal: the height that keeps to `most` is searched.
  double limit = std::max(height, total / most);
  height_ = arrange(limit, column);
  while (width_ > most * (column + column_gap)) {
    limit *= 1.1;
    height_ = arrange(limit, column);
  }
}

void Legend::draw(SvgCanvas& canvas, SvgPoint top_left) const {
  for (const Row& row : rows_) {
    const double x = top_left.x + row.left, y = top_left.y + row.top;
    const double middle = y + 0.5 * legend_size * line_height;
    const LegendEntry& e = row.entry;
    if (e.line) {
      canvas.line({x, middle}, {x + sample_width, middle}, e.style.colour, e.style.line_width,
                  e.style.dash);
    }
    if (e.marker) canvas.marker({x + sample_width / 2, middle}, marker_radius, e.style);
    canvas.text_lines({x + sample_width + sample_gap, middle + 0.36 * legend_size}, row.lines,
                      {.size = legend_size});
  }
}

}  // namespace engine
