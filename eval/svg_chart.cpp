#include "eval/svg_chart.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "eval/svg_labels.h"
#include "eval/svg_legend.h"
#include "eval/svg_text.h"

namespace engine {
namespace {

using namespace svg_look;

constexpr double legend_gap = 26;
constexpr std::size_t many_points = 40;  // of a series: smaller markers
constexpr std::size_t named_in_note = 8;

class XyDrawing {
 public:
  explicit XyDrawing(const XyChart& chart)
      : chart_(chart),
        x_(chart.x, x_values(), chart.plot_width, AxisDirection::horizontal),
        y_(y_spec(), y_values(), chart.plot_height, AxisDirection::vertical) {
    for (const ChartSeries& s : chart.series) {
      if (s.points.size() > many_points) radius_ = 2.6;
    }
  }

  std::string run() {
    if (x_.empty() || y_.empty()) return "";
    const Legend legend(legend_entries(), chart_.plot_height, chart_.plot_width);
    const double beside = legend.width() > 0 ? legend_gap + legend.width() : 0;
    const double left = y_.margin();
    const double width = left + chart_.plot_width + std::max(beside, x_.overhang()) + edge;
    const double top = draw_head(canvas_, chart_.text, width) + tick_size / 2;
    plot_ = {left, top, left + chart_.plot_width, top + chart_.plot_height};

    draw_axis(canvas_, x_, AxisDirection::horizontal, plot_);
    draw_axis(canvas_, y_, AxisDirection::vertical, plot_);
    canvas_.rect(plot_, "none", grey_ink);
    for (const ReferenceLine& l : chart_.lines) {
      if (!Axis::shows(chart_.y.scale, l.y)) continue;
      const double y = plot_.bottom - y_.position(l.y);
      draw_line({{plot_.left, y}, {plot_.right, y}}, l.style);
      obstacles_.no_text.push_back({plot_.left, y - 1.5, plot_.right, y + 1.5});
    }
    for (const ChartSeries& s : chart_.series) draw_lines(s);
    for (const ChartSeries& s : chart_.series) draw_points(s);
    std::vector<std::string> notes = draw_labels();
    notes.insert(notes.end(), chart_.text.notes.begin(), chart_.text.notes.end());
    note_left_out(notes);
    legend.draw(canvas_, {plot_.right + legend_gap, plot_.top});

    const double bottom = std::max(plot_.bottom + x_.margin(), plot_.top + legend.height() + edge);
    const double height = draw_notes(canvas_, notes, bottom, width);
    return canvas_.document(width, height, chart_.text.title);
  }

 private:
  bool shown(const ChartPoint& p) const {
    return Axis::shows(chart_.x.scale, p.x) && Axis::shows(chart_.y.scale, p.y);
  }

  // Half the error bar, 0 if there is none that can be drawn.
  static double error_of(const ChartPoint& p) {
    return p.y_error && std::isfinite(*p.y_error) && *p.y_error > 0 ? *p.y_error : 0;
  }

  std::vector<double> x_values() const {
    std::vector<double> values;
    for (const ChartSeries& s : chart_.series) {
      for (const ChartPoint& p : s.points) {
        if (shown(p)) values.push_back(p.x);
      }
    }
    return values;
  }

  std::vector<double> y_values() const {
    std::vector<double> values;
    for (const ChartSeries& s : chart_.series) {
      for (const ChartPoint& p : s.points) {
        if (!shown(p)) continue;
        for (const double y : {p.y, p.y - error_of(p), p.y + error_of(p)}) values.push_back(y);
      }
    }
    return values;
  }

  AxisSpec y_spec() const {
    AxisSpec spec = chart_.y;
    for (const ReferenceLine& l : chart_.lines) spec.include.push_back(l.y);
    return spec;
  }

  std::vector<LegendEntry> legend_entries() const {
    std::vector<LegendEntry> entries;
    for (const ChartSeries& s : chart_.series) {
      if (std::any_of(s.points.begin(), s.points.end(), [&](const auto& p) { return shown(p); })) {
        entries.push_back({s.name, s.style, s.line, s.markers});
      }
    }
    for (const ReferenceLine& l : chart_.lines) {
      if (Axis::shows(chart_.y.scale, l.y)) entries.push_back({l.name, l.style, true, false});
    }
    return entries;
  }

  SvgPoint place(double x, double y) const {
    return {plot_.left + x_.position(x), plot_.bottom - y_.position(y)};
  }

  void draw_line(const std::vector<SvgPoint>& points, const SeriesStyle& style) {
    if (points.size() < 2) return;
    canvas_.polyline(points, style.colour, style.line_width, style.dash);
    for (std::size_t i = 0; i + 1 < points.size(); ++i) {
      obstacles_.line_from.push_back(points[i]);
      obstacles_.line_to.push_back(points[i + 1]);
    }
  }

  // A point that is not shown interrupts the line.
  void draw_lines(const ChartSeries& series) {
    if (!series.line) return;
    std::vector<SvgPoint> run;
    for (const ChartPoint& p : series.points) {
      if (!shown(p)) {
        draw_line(run, series.style);
        run.clear();
        continue;
      }
      const SvgPoint at = place(p.x, p.y);
      if (series.step && !run.empty()) run.push_back({at.x, run.back().y});
      run.push_back(at);
    }
    draw_line(run, series.style);
  }

  void draw_points(const ChartSeries& series) {
    if (!series.markers) return;
    for (const ChartPoint& p : series.points) {
      if (!shown(p)) continue;
      const SvgPoint at = place(p.x, p.y);
      if (error_of(p) > 0) {
        const double top = place(p.x, p.y + error_of(p)).y;
        const double bottom = place(p.x, p.y - error_of(p)).y;
        canvas_.line({at.x, top}, {at.x, bottom}, series.style.colour, 1);
        for (const double y : {top, bottom}) {
          canvas_.line({at.x - 3, y}, {at.x + 3, y}, series.style.colour, 1);
        }
        obstacles_.boxes.push_back({at.x - 3, top, at.x + 3, bottom});
      }
      canvas_.marker(at, radius_, series.style);
      const double clearance = 1.4 * radius_;
      if (p.label.empty()) {
        obstacles_.boxes.push_back(
            {at.x - clearance, at.y - clearance, at.x + clearance, at.y + clearance});
        continue;
      }
      requests_.push_back({.point = at,
                           .clearance = clearance,
                           .width = text_width(p.label, label_size),
                           .height = label_size,
                           .needed = p.label_needed});
      labelled_.push_back(&p);
    }
  }

  // Returns the key of the numbers that stand for labels, as a note.
  std::vector<std::string> draw_labels() {
    obstacles_.bounds = {plot_.left + 2, plot_.top + 2, plot_.right - 2, plot_.bottom - 2};
    const double widest = text_width(std::to_string(requests_.size()), label_size, true);
    for (LabelRequest& r : requests_) r.number_width = widest;
    const std::vector<LabelPlace> places = place_labels(requests_, obstacles_);
    std::string key, none;
    int number = 0;
    for (std::size_t i = 0; i < places.size(); ++i) {
      const LabelPlace& p = places[i];
      if (p.leader) canvas_.line(p.leader_from, p.leader_to, "#888888", 0.7);
      std::string label = labelled_[i]->label;
      const std::string name = labelled_[i]->name.empty() ? label : labelled_[i]->name;
      if (p.kind == LabelKind::none) {
        if (labelled_[i]->label_needed) none += (none.empty() ? "" : "; ") + name;
        continue;
      }
      const bool numbered = p.kind == LabelKind::number;
      if (numbered) {
        label = std::to_string(++number);
        key += (key.empty() ? "" : "; ") + label + ": " + name;
      }
      canvas_.rect(p.box, "#ffffff", "none", 0.7);  // lines behind it must not make it unreadable
      canvas_.text({(p.box.left + p.box.right) / 2, p.box.bottom - 0.14 * p.box.height()}, label,
                   {.size = label_size, .anchor = TextAnchor::middle, .bold = numbered});
    }
    std::vector<std::string> notes;
    if (!key.empty()) notes.push_back("Numbers: " + key + ".");
    if (!none.empty()) notes.push_back("Without a label for want of space: " + none + ".");
    return notes;
  }

  void note_left_out(std::vector<std::string>& notes) const {
    std::string names;
    std::size_t count = 0;
    for (const ChartSeries& s : chart_.series) {
      if (!s.markers) continue;
      for (const ChartPoint& p : s.points) {
        if (shown(p) || ++count > named_in_note) continue;
        const bool x_fails = !Axis::shows(chart_.x.scale, p.x);
        const std::string name = p.name.empty() ? s.name : p.name;
        names += (names.empty() ? "" : ", ") + name + " (" + value_text(x_fails ? p.x : p.y) + ")";
      }
    }
    if (count == 0) return;
    if (count > named_in_note) {
      names += " and " + std::to_string(count - named_in_note) + " more";
    }
    const bool log = chart_.x.scale == AxisScale::log10 || chart_.y.scale == AxisScale::log10;
    notes.push_back(
        "Not shown, because " +
        std::string(log ? "not finite or not above 0 on a logarithmic axis: " : "not finite: ") +
        names + ".");
  }

  const XyChart& chart_;
  Axis x_, y_;
  double radius_ = 4.2;
  SvgCanvas canvas_;
  SvgBox plot_;
  LabelObstacles obstacles_;
  std::vector<LabelRequest> requests_;
  std::vector<const ChartPoint*> labelled_;
};

}  // namespace

std::string xy_chart_svg(const XyChart& chart) { return XyDrawing(chart).run(); }

std::vector<std::size_t> pareto_front(std::span<const SvgPoint> points, bool high_y) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (std::isfinite(points[i].x) && std::isfinite(points[i].y)) order.push_back(i);
  }
  const auto cost = [&](std::size_t i) { return high_y ? -points[i].y : points[i].y; };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return points[a].x != points[b].x ? points[a].x < points[b].x : cost(a) < cost(b);
  });
  std::vector<std::size_t> front;
  for (const std::size_t i : order) {
    if (front.empty() || cost(i) < cost(front.back())) front.push_back(i);
  }
  return front;
}

}  // namespace engine
