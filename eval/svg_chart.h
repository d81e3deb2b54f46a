// Charts as SVG files: points and lines, bars, heat maps. Deterministic: the same input gives the
// same bytes. Everything that a chart shows is inside it, and no text covers data or other text;
// the drawing grows with its legend and labels. A chart without a value to draw is an empty string.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "eval/svg_axis.h"
#include "eval/svg_canvas.h"

namespace engine {

struct ChartPoint {
  double x = 0, y = 0;
  std::optional<double> y_error = {};  // half length of the error bar
  std::string label = {};              // beside the point; empty: none
  bool label_needed = true;            // else left out where there is no place near the point
  std::string name = {};               // whole, for the key below the chart and for notes
};

struct ChartSeries {
  std::string name = {};  // in the legend; empty: not there
  SeriesStyle style = {};
  bool line = true;
  bool markers = true;
  bool step = false;  // the line keeps its y until the next point's x
  std::vector<ChartPoint> points = {};
};

// A horizontal line across the plot.
struct ReferenceLine {
  std::string name;
  double y = 0;
  SeriesStyle style;
};

struct XyChart {
  ChartText text;
  AxisSpec x, y;
  double plot_width = 620, plot_height = 480;  // px
  std::vector<ChartSeries> series;             // the first is drawn first
  std::vector<ReferenceLine> lines;            // covered by the axis
};

// Points that an axis cannot show (not finite, or 0 and less on a log axis) are left out and named
// in a note. Labels that find no place become numbers with a key below.
[[nodiscard]] std::string xy_chart_svg(const XyChart& chart);

// Horizontal bars, grouped, with one panel beside the other.
struct BarChart {
  struct Group {
    std::string name;  // above its bars
    SeriesStyle style;
    std::vector<std::string> bars;  // the label of each
  };
  struct Panel {
    AxisSpec axis;
    std::vector<std::optional<double>> values;  // of the bars of all groups, in order
  };
  ChartText text;
  std::vector<Group> groups;
  std::vector<Panel> panels;
  double panel_width = 300;  // px
};
// Throws Error(internal) if a panel has not one value per bar.
[[nodiscard]] std::string bar_chart_svg(const BarChart& chart);

struct HeatMap {
  ChartText text;
  std::string x_title, y_title;
  std::vector<std::string> columns, rows;     // labels; the first row is on top
  std::vector<std::optional<double>> values;  // row by row; absent or not shown: a crossed cell
  AxisSpec colour;
};
// Throws Error(internal) if there is not one value per cell.
[[nodiscard]] std::string heat_map_svg(const HeatMap& chart);

// Indices of the points that no other point beats in both coordinates, by rising x: low x is good,
// and low y (or high y if `high_y`). Of equal points the first. Points that are not finite never.
[[nodiscard]] std::vector<std::size_t> pareto_front(std::span<const SvgPoint> points, bool high_y);

}  // namespace engine
