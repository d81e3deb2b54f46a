// Axes: which range, which ticks, and how they are drawn.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "eval/svg_canvas.h"

namespace engine {

enum class AxisScale : std::uint8_t { linear, log10 };
enum class AxisDirection : std::uint8_t { horizontal, vertical };

struct AxisSpec {
  std::string title = {};  // with its unit
  AxisScale scale = AxisScale::linear;
  bool integers = false;             // no ticks between whole numbers
  bool bars = false;                 // begins at 0, or on a log axis at a tick below all values
  bool tight = false;                // ends at the values, without padding
  std::vector<double> include = {};  // values that the axis covers besides the data's
};

struct AxisTick {
  double value = 0;
  std::string label;  // empty: a minor tick
};

class Axis {
 public:
  // `values`: the data; those that do not fit the scale are passed over. `length` in px decides how
  // many labelled ticks there is room for.
  Axis(AxisSpec spec, std::span<const double> values, double length, AxisDirection direction);

  // Whether a value can be shown: finite, of reasonable size, and above 0 on a log axis.
  [[nodiscard]] static bool shows(AxisScale scale, double value);

  [[nodiscard]] bool empty() const { return empty_; }  // no value could be shown
  // px from the axis' beginning (left or bottom); clipped to 0..length.
  [[nodiscard]] double position(double value) const;
  [[nodiscard]] double length() const { return length_; }
  [[nodiscard]] double low() const { return low_; }
  [[nodiscard]] double high() const { return high_; }
  [[nodiscard]] const std::vector<AxisTick>& ticks() const { return ticks_; }  // by value
  [[nodiscard]] const AxisSpec& spec() const { return spec_; }

  // px beside the plot: the vertical axis' labels and title to the left of it, the horizontal
  // axis' below it, and what the horizontal axis' last label needs right of the plot's end.
  [[nodiscard]] double margin() const;
  [[nodiscard]] double overhang() const;

 private:
  void find_range(std::span<const double> values);
  void find_ticks();
  void linear_ticks();
  void log_ticks();
  [[nodiscard]] bool labels_fit(std::span<const AxisTick> ticks) const;
  [[nodiscard]] double transformed(double value) const;

  AxisSpec spec_;
  double length_;
  AxisDirection direction_;
  bool empty_ = false;
  double low_ = 0, high_ = 1;    // data units
  double first_ = 0, last_ = 1;  // what is covered, without padding
  std::vector<AxisTick> ticks_;
};

// Grid lines across the plot, ticks, labels and title. `plot` is where the data are.
void draw_axis(SvgCanvas& canvas, const Axis& axis, AxisDirection direction, const SvgBox& plot);

}  // namespace engine
