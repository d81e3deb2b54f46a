// What quantizing and running cost.
#include <optional>

#include "eval/paper_rows.h"
#include "eval/study_plots_parts.h"
#include "eval/svg_chart.h"

namespace engine {
namespace {

constexpr double wide_range = 30;  // the longest bar by the shortest, then a log axis

class CostPlots {
 public:
  explicit CostPlots(const PlotModel& model) : model_(model) {}

  std::vector<StudyPlot> run() {
    plot_costs();
    plot_speed();
    return std::move(plots_);
  }

 private:
  // Leaves out panels without values; writes nothing if none is left.
  void plot_bars(const std::string& file, BarChart chart) {
    std::erase_if(chart.panels, [](const BarChart::Panel& p) {
      return std::none_of(p.values.begin(), p.values.end(), [](const auto& v) { return v; });
    });
    if (chart.panels.empty()) return;
    for (BarChart::Panel& p : chart.panels) {
      std::vector<double> values;
      for (const auto& v : p.values) {
        if (v && Axis::shows(AxisScale::linear, *v)) values.push_back(*v);
      }
      if (!spans_ratio(values, wide_range)) continue;
      p.axis.scale = AxisScale::log10;
      p.axis.title += ", logarithmic";
    }
    std::vector<std::string> devices;
    for (const StudyRow* row : model_.rows) {
      if (!row->device.empty()) add_once(devices, row->device);
    }
    chart.text.subtitle = joined_names(devices);
    plots_.push_back({file, bar_chart_svg(chart)});
  }

  // The bars of the rows that `takes` says, grouped by method; `visit` sees the rows in bar order.
  template <typename Takes, typename Visit>
  BarChart grouped_bars(Takes takes, Visit visit) const {
    BarChart chart;
    std::vector<std::string> methods;
    for (const StudyRow* row : model_.rows) {
      if (takes(*row)) add_once(methods, row->method);
    }
    for (const std::string& method : methods) {
      BarChart::Group group;
      const auto style = model_.styles.find(method);
      group.name = style == model_.styles.end() ? "full precision" : method_title(method);
      if (style != model_.styles.end()) group.style = style->second;
      for (const StudyRow* row : model_.rows) {
        if (row->method != method || !takes(*row)) continue;
        group.bars.push_back(setting_name(*row).short_text());
        visit(*row);
      }
      chart.groups.push_back(std::move(group));
    }
    return chart;
  }

  void plot_costs() {
    BarChart::Panel time, memory;
    BarChart chart = grouped_bars(
        [](const StudyRow& row) {
          return is_quantized(row) && (row.quantize_s || row.quantize_peak_bytes);
        },
        [&](const StudyRow& row) {
          time.values.push_back(row.quantize_s);
          std::optional<double> gigabytes;
          if (row.quantize_peak_bytes) {
            gigabytes = static_cast<double>(*row.quantize_peak_bytes) * 1e-9;
          }
          memory.values.push_back(gigabytes);
        });
    double longest = 0;
    for (const auto& v : time.values) longest = std::max(longest, v.value_or(0));
    const bool minutes = longest > 600;
    if (minutes) {
      for (auto& v : time.values) {
        if (v) *v /= 60;
      }
    }
    time.axis.title = minutes ? "time to quantize (min)" : "time to quantize (s)";
    memory.axis.title = "peak device memory (GB)";
    chart.panels = {std::move(time), std::move(memory)};
    chart.text.title = model_.name + ": cost of quantizing";
    plot_bars("cost", std::move(chart));
  }

  void plot_speed() {
    BarChart::Panel decode, prefill;
    BarChart chart = grouped_bars(
        [](const StudyRow& row) { return row.decode_token_per_s || row.prefill_token_per_s; },
        [&](const StudyRow& row) {
          decode.values.push_back(row.decode_token_per_s);
          prefill.values.push_back(row.prefill_token_per_s);
        });
    decode.axis.title = "decoding (token/s)";
    prefill.axis.title = "prefill (token/s)";
    chart.panels = {std::move(decode), std::move(prefill)};
    chart.text.title = model_.name + ": speed";
    plot_bars("speed", std::move(chart));
  }

  const PlotModel& model_;
  std::vector<StudyPlot> plots_;
};

}  // namespace

std::vector<StudyPlot> cost_plots(const PlotModel& model) { return CostPlots(model).run(); }

}  // namespace engine
