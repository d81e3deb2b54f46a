#include "eval/svg_axis.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "eval/svg_text.h"

namespace engine {
namespace {

using namespace svg_look;

constexpr double largest_value = 1e100;  // beyond it differences and ratios may overflow
constexpr double equal_within = 1e-9;    // relative; closer values are one value to a chart
constexpr double padding = 0.055;        // of the range, on both sides
constexpr double tick_length = 5, minor_tick_length = 3, label_gap = 4, title_gap = 8;

double power_of_ten(int exponent) { return std::pow(10.0, exponent); }

// "5", "0.25", "2.5×10⁸": neighbours `step` apart differ. Large and small ones are written with the
// power of ten `exponent`.
std::string tick_text(double value, double step, int exponent) {
  if (std::abs(value) < step * 1e-6) return "0";
  const int step_exponent = static_cast<int>(std::floor(std::log10(step) + 1e-9));
  if (exponent < 7 && step_exponent >= -4) {
    return decimal_text(value, std::max(0, -step_exponent));
  }
  const int decimals = std::clamp(exponent - step_exponent, 0, 15);
  return decimal_text(value / power_of_ten(exponent), decimals) + "×" + power_of_ten_text(exponent);
}

// "0.5", "1", "2000", "10⁴", "2×10⁴": a mantissa and a decade.
std::string log_tick_text(double mantissa, int exponent) {
  const bool whole = mantissa == std::floor(mantissa);
  if (exponent >= -3 && exponent < 4) {
    return decimal_text(mantissa * power_of_ten(exponent), std::max(0, (whole ? 0 : 1) - exponent));
  }
  if (mantissa == 1) return power_of_ten_text(exponent);
  return decimal_text(mantissa, whole ? 0 : 1) + "×" + power_of_ten_text(exponent);
}

}  // namespace

Axis::Axis(AxisSpec spec, std::span<const double> values, double length, AxisDirection direction)
    : spec_(std::move(spec)), length_(length), direction_(direction) {
  find_range(values);
  find_ticks();
}

bool Axis::shows(AxisScale scale, double value) {
  if (!std::isfinite(value) || std::abs(value) > largest_value) return false;
  return scale == AxisScale::linear || value >= 1 / largest_value;
}

double Axis::transformed(double value) const {
  return spec_.scale == AxisScale::log10 ? std::log10(value) : value;
}

double Axis::position(double value) const {
  if (spec_.scale == AxisScale::log10 && !(value > 0)) return 0;
  const double low = transformed(low_), high = transformed(high_);
  return std::clamp((transformed(value) - low) / (high - low), 0.0, 1.0) * length_;
}

void Axis::find_range(std::span<const double> values) {
  const bool log = spec_.scale == AxisScale::log10;
  empty_ = true;
  const auto cover = [&](double v) {
    if (!shows(spec_.scale, v)) return;
    low_ = empty_ ? v : std::min(low_, v);
    high_ = empty_ ? v : std::max(high_, v);
    empty_ = false;
  };
  for (const double v : values) cover(v);
  if (empty_) {
    low_ = log ? 1 : 0;
    high_ = log ? 10 : 1;
    return;
  }
  for (const double v : spec_.include) cover(v);
  if (spec_.bars && !log) cover(0);
  first_ = low_;
  last_ = high_;
  const double scale = std::max(std::abs(low_), std::abs(high_));
  if (high_ - low_ <= equal_within * scale) {
    const double around = scale == 0 ? 1 : 0.25 * scale;
    low_ = log ? low_ / 1.5 : low_ - (spec_.integers ? 1 : around);
    high_ = log ? high_ * 1.5 : high_ + (spec_.integers ? 1 : around);
  }
  if (spec_.tight && first_ < last_) return;
  if (log) {
    const double factor = std::pow(high_ / low_, padding);
    if (spec_.bars) {
      // The shortest bar still has a length to see.
      const double below = low_ / std::max(1.25, factor);
      const double decade = power_of_ten(static_cast<int>(std::floor(std::log10(below))));
      low_ = below >= 5 * decade ? 5 * decade : below >= 2 * decade ? 2 * decade : decade;
    } else {
      low_ /= factor;
    }
    high_ *= factor;
  } else {
    const double pad = padding * (high_ - low_);
    if (!spec_.bars || low_ < 0) low_ -= pad;
    if (!spec_.bars || high_ > 0) high_ += pad;
  }
}

bool Axis::labels_fit(std::span<const AxisTick> ticks) const {
  const bool horizontal = direction_ == AxisDirection::horizontal;
  double previous_end = -1e9;
  for (const AxisTick& t : ticks) {
    if (t.label.empty()) continue;
    const double at = position(t.value);
    const double half = horizontal ? text_width(t.label, tick_size) / 2 : tick_size / 2;
    if (at - half < previous_end) return false;
    previous_end = at + half + (horizontal ? 11 : 12);
  }
  return true;
}

void Axis::find_ticks() {
  if (spec_.scale == AxisScale::log10 && high_ / low_ > 2.5) {
    log_ticks();
  } else {
    linear_ticks();
  }
}

void Axis::linear_ticks() {
  const double range = high_ - low_;
  const int first = static_cast<int>(std::floor(std::log10(range))) - 2;
  for (int exponent = first;; ++exponent) {
    for (const int mantissa : {1, 2, 5}) {
      if (spec_.integers && exponent < 0) continue;
      const double step = mantissa * power_of_ten(exponent);
      if (range / step > 12) continue;  // more would crowd even a long axis
      ticks_.clear();
      const int parts = mantissa == 2 ? 4 : 5;
      const double minor = step / parts;
      const auto begin = static_cast<std::int64_t>(std::ceil(low_ / minor - 1e-9));
      const auto end = static_cast<std::int64_t>(std::floor(high_ / minor + 1e-9));
      const double size = std::max(std::abs(low_), std::abs(high_));
      const int size_exponent = static_cast<int>(std::floor(std::log10(size) + 1e-12));
      std::size_t labels = 0;
      for (std::int64_t i = begin; i <= end; ++i) {
        const bool major = i % parts == 0;
        const double value = static_cast<double>(i) * minor;
        // Whole numbers count things: none between them, none that there is not.
        if (spec_.integers && ((!major && minor < 1) || value < first_ || value > last_)) continue;
        ticks_.push_back({value, major ? tick_text(value, step, size_exponent) : ""});
        labels += major ? 1 : 0;
      }
      if (labels_fit(ticks_) || labels <= 1) return;  // so the loop ends
    }
  }
}

void Axis::log_ticks() {
  static constexpr double dense[] = {1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9};
  static constexpr double less[] = {1, 1.5, 2, 3, 4, 5, 6, 8};
  static constexpr double few[] = {1, 2, 3, 5};
  static constexpr double three[] = {1, 2, 5};
  static constexpr double one[] = {1};
  static constexpr std::array<std::span<const double>, 5> sets = {dense, less, few, three, one};
  const int first = static_cast<int>(std::floor(std::log10(low_)));
  const int last = static_cast<int>(std::floor(std::log10(high_)));
  const bool minors = last - first <= 12;
  const auto collect = [&](std::span<const double> labelled, int decades) {
    ticks_.clear();
    for (int exponent = first; exponent <= last; ++exponent) {
      const double decade = power_of_ten(exponent);
      const bool labels = exponent % decades == 0;
      const auto add = [&](double mantissa, bool major) {
        const double value = mantissa * decade;
        if (value < low_ * (1 - equal_within) || value > high_ * (1 + equal_within)) return;
        ticks_.push_back({value, major ? log_tick_text(mantissa, exponent) : ""});
      };
      std::size_t next = 0;
      for (int m = 1; m <= 9; ++m) {
        for (; next < labelled.size() && labelled[next] < m; ++next) {
          if (labels) add(labelled[next], true);
        }
        const bool named = next < labelled.size() && labelled[next] == m;
        if (named) ++next;
        if (named && labels) {
          add(m, true);
        } else if (minors || m == 1) {
          add(m, false);
        }
      }
    }
  };
  for (const std::span<const double> set : sets) {
    collect(set, 1);
    if (labels_fit(ticks_)) return;
  }
  for (int decades = 2;; ++decades) {
    collect(one, decades);
    if (labels_fit(ticks_)) return;
  }
}

double Axis::margin() const {
  const bool horizontal = direction_ == AxisDirection::horizontal;
  double labels = horizontal ? tick_size : 0;
  if (!horizontal) {
    for (const AxisTick& t : ticks_) labels = std::max(labels, text_width(t.label, tick_size));
  }
  double margin = tick_length + label_gap + labels + edge;
  if (!spec_.title.empty()) {
    const std::size_t lines = wrap_text(spec_.title, axis_title_size, length_).size();
    margin += title_gap + static_cast<double>(lines) * axis_title_size * line_height;
  }
  return margin;
}

double Axis::overhang() const {
  double most = 0;
  for (const AxisTick& t : ticks_) {
    most = std::max(most, position(t.value) + text_width(t.label, tick_size) / 2 - length_);
  }
  return most;
}

void draw_axis(SvgCanvas& canvas, const Axis& axis, AxisDirection direction, const SvgBox& plot) {
  const bool horizontal = direction == AxisDirection::horizontal;
  double labels = 0;
  // Minor lines first, so that the labelled ones lie on top.
  for (const bool major : {false, true}) {
    for (const AxisTick& t : axis.ticks()) {
      if (t.label.empty() == major) continue;
      const double p = axis.position(t.value);
      const char* colour = major ? grid : minor_grid;
      const double tick = major ? tick_length : minor_tick_length;
      // Between labels of a linear axis lines would say nothing.
      const bool line = major || axis.spec().scale == AxisScale::log10;
      if (horizontal) {
        const double x = plot.left + p;
        if (line) canvas.line({x, plot.top}, {x, plot.bottom}, colour, 1);
        canvas.line({x, plot.bottom}, {x, plot.bottom + tick}, grey_ink, 1);
        if (major) {
          canvas.text({x, plot.bottom + tick + label_gap + 0.8 * tick_size}, t.label,
                      {.size = tick_size, .anchor = TextAnchor::middle});
        }
      } else {
        const double y = plot.bottom - p;
        if (line) canvas.line({plot.left, y}, {plot.right, y}, colour, 1);
        canvas.line({plot.left - tick, y}, {plot.left, y}, grey_ink, 1);
        if (major) {
          labels = std::max(labels, text_width(t.label, tick_size));
          canvas.text({plot.left - tick - label_gap, y + 0.36 * tick_size}, t.label,
                      {.size = tick_size, .anchor = TextAnchor::end});
        }
      }
    }
  }
  if (axis.spec().title.empty()) return;
  std::vector<std::string> lines = wrap_text(axis.spec().title, axis_title_size, axis.length());
  TextStyle style{.size = axis_title_size, .anchor = TextAnchor::middle, .upwards = !horizontal};
  if (horizontal) {
    canvas.text_lines(
        {(plot.left + plot.right) / 2,
         plot.bottom + tick_length + label_gap + tick_size + title_gap + 0.8 * axis_title_size},
        lines, style);
    return;
  }
  double x = plot.left - tick_length - label_gap - labels - title_gap;
  for (std::size_t i = lines.size(); i-- > 0; x -= axis_title_size * line_height) {
    canvas.text({x, (plot.top + plot.bottom) / 2}, lines[i], style);
  }
}

}  // namespace engine
