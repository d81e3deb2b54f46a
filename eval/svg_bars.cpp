// Horizontal bars: long labels read best beside them, and every bar has its value at its end.
#include <algorithm>
#include <cmath>

#include "engine/core/error.h"
#include "eval/svg_chart.h"
#include "eval/svg_text.h"

namespace engine {
namespace {

using namespace svg_look;

constexpr double bar_pitch = 17, bar_height = 12, group_head = 20, group_gap = 5;
constexpr double longest_label = 240;  // px before it is wrapped
constexpr double panel_gap = 30, value_gap = 5;

struct Row {
  double top = 0, height = 0;
  std::vector<std::string> lines;
  const SeriesStyle* style = nullptr;
};

class BarDrawing {
 public:
  explicit BarDrawing(const BarChart& chart) : chart_(chart) {
    double y = group_gap;
    for (const BarChart::Group& g : chart.groups) {
      heads_.push_back(y);
      label_width_ = std::max(label_width_, text_width(g.name, tick_size, true));
      y += group_head;
      for (const std::string& label : g.bars) {
        Row row{.top = y, .lines = wrap_text(label, tick_size, longest_label), .style = &g.style};
        for (const std::string& line : row.lines) {
          label_width_ = std::max(label_width_, text_width(line, tick_size) + indent);
        }
        row.height =
            std::max(bar_pitch, static_cast<double>(row.lines.size()) * tick_size * line_height);
        y += row.height;
        rows_.push_back(std::move(row));
      }
      y += group_gap;
    }
    plot_height_ = y;
  }

  std::string run() {
    std::vector<Axis> axes;
    double width = edge + label_width_ + label_gap, bottom_margin = 0;
    bool empty = true;
    std::vector<double> lefts;
    for (const BarChart::Panel& p : chart_.panels) {
      REQUIRE(p.values.size() == rows_.size(), "one value per bar");
      std::vector<double> values;
      double value_width = 0;
      for (const std::optional<double>& v : p.values) {
        if (!v || !Axis::shows(p.axis.scale, *v)) continue;
        values.push_back(*v);
        value_width = std::max(value_width, text_width(value_text(*v), label_size));
      }
      empty = empty && values.empty();
      AxisSpec spec = p.axis;
      spec.bars = true;
      // The axis covers a little more than the values, so that their texts end inside the panel.
      Axis axis = fitted(spec, values, value_width + 2 * value_gap);
      lefts.push_back(width);
      width += chart_.panel_width + panel_gap;
      bottom_margin = std::max(bottom_margin, axis.margin());
      axes.push_back(std::move(axis));
    }
    if (empty) return "";
    width += edge - panel_gap + axes.back().overhang();
    const double top = draw_head(canvas_, chart_.text, width) + tick_size / 2;
    draw_row_labels(top);
    std::size_t left_out = 0;
    for (std::size_t i = 0; i < axes.size(); ++i) {
      left_out += draw_panel(axes[i], chart_.panels[i],
                             {lefts[i], top, lefts[i] + chart_.panel_width, top + plot_height_});
    }
    std::vector<std::string> notes = chart_.text.notes;
    if (left_out > 0)
      notes.emplace_back("A bar marked – has no value, or one that its axis cannot show.");
    const double height = draw_notes(canvas_, notes, top + plot_height_ + bottom_margin, width);
    return canvas_.document(width, height, chart_.text.title);
  }

 private:
  static constexpr double indent = 12, label_gap = 8;

  // Room of `beyond` px right of the longest bar.
  Axis fitted(AxisSpec spec, const std::vector<double>& values, double beyond) const {
    const Axis plain(spec, values, chart_.panel_width, AxisDirection::horizontal);
    if (values.empty()) return plain;
    const double most = *std::max_element(values.begin(), values.end());
    const double share = 1 - std::min(0.6, beyond / chart_.panel_width);
    const double low = plain.low();
    if (spec.scale == AxisScale::log10) {
      spec.include.push_back(low * std::pow(most / low, 1 / share));
    } else if (most > 0) {
      spec.include.push_back(most / share);
    }
    return Axis(spec, values, chart_.panel_width, AxisDirection::horizontal);
  }

  void draw_row_labels(double top) {
    for (std::size_t g = 0; g < chart_.groups.size(); ++g) {
      canvas_.text({edge, top + heads_[g] + 0.75 * group_head}, chart_.groups[g].name,
                   {.size = tick_size, .bold = true});
    }
    for (const Row& row : rows_) {
      const double first = top + row.top + (row.height - bar_pitch) / 2 + bar_pitch / 2 -
                           static_cast<double>(row.lines.size() - 1) * tick_size * line_height / 2;
      canvas_.text_lines({edge + label_width_, first + 0.36 * tick_size}, row.lines,
                         {.size = tick_size, .anchor = TextAnchor::end});
    }
  }

  // Returns how many bars have no value to show.
  std::size_t draw_panel(const Axis& axis, const BarChart::Panel& panel, const SvgBox& plot) {
    draw_axis(canvas_, axis, AxisDirection::horizontal, plot);
    std::size_t left_out = 0;
    const bool log = panel.axis.scale == AxisScale::log10;
    const double zero = log ? 0 : axis.position(0);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const double middle = plot.top + rows_[i].top + rows_[i].height / 2;
      const std::optional<double>& value = panel.values[i];
      double end = plot.left + zero;
      std::string text = "–";
      if (value && Axis::shows(panel.axis.scale, *value)) {
        const double at = axis.position(*value);
        canvas_.rect({plot.left + std::min(zero, at), middle - bar_height / 2,
                      plot.left + std::max(zero, at), middle + bar_height / 2},
                     rows_[i].style->colour);
        end = plot.left + std::max(zero, at);
        text = value_text(*value);
      } else {
        ++left_out;
      }
      // White behind the value, so that no grid line runs through it.
      const double begin = end + value_gap;
      canvas_.rect({end + 1, middle - bar_height / 2, begin + text_width(text, label_size) * 0.95,
                    middle + bar_height / 2},
                   "#ffffff");
      canvas_.text({begin, middle + 0.36 * label_size}, text, {.size = label_size});
    }
    canvas_.rect(plot, "none", grey_ink);
    return left_out;
  }

  const BarChart& chart_;
  std::vector<double> heads_;  // y of each group's name from the plot's top
  std::vector<Row> rows_;
  double label_width_ = 0, plot_height_ = 0;
  SvgCanvas canvas_;
};

}  // namespace

std::string bar_chart_svg(const BarChart& chart) { return BarDrawing(chart).run(); }

}  // namespace engine
