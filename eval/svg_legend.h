// The legend: beside the plot, in columns, never on data.
#pragma once

#include <string>
#include <vector>

#include "eval/svg_canvas.h"

namespace engine {

struct LegendEntry {
  std::string name;
  SeriesStyle style;
  bool line = true, marker = true;
};

class Legend {
 public:
  // Entries without a name are left out. Further columns are begun when one is higher than
  // `height` px, as long as all fit `max_width` px; after that the legend grows downwards.
  Legend(const std::vector<LegendEntry>& entries, double height, double max_width);

  [[nodiscard]] double width() const { return width_; }    // px; 0: no entries
  [[nodiscard]] double height() const { return height_; }  // px
  void draw(SvgCanvas& canvas, SvgPoint top_left) const;

 private:
  struct Row {
    LegendEntry entry;
    std::vector<std::string> lines;
    double left = 0, top = 0;
  };
  [[nodiscard]] double row_height(const Row& row) const;
  // Heights follow from the order of rows; returns the highest column.
  double arrange(double column_height, double column_width);

  std::vector<Row> rows_;
  double width_ = 0, height_ = 0;
};

}  // namespace engine
