// Where the errors are: block by block, and linear by linear.
#include <cmath>
#include <cstdint>
#include <iterator>
#include <optional>
#include <set>

#include "eval/study_plots_parts.h"
#include "eval/svg_chart.h"

namespace engine {
namespace {

constexpr std::size_t most_lines = 10;  // of one chart of block errors

class ErrorPlots {
 public:
  explicit ErrorPlots(const PlotModel& model) : model_(model) {}

  std::vector<StudyPlot> run() {
    plot_block_errors();
    plot_linear_errors();
    return std::move(plots_);
  }

 private:
  // The charts that a setting belongs to; few settings have less than 2 bits, so they join those.
  static int width_of(const StudyRow& row) {
    return std::isnan(row.weight_bits)
               ? 2
               : static_cast<int>(std::ceil(std::clamp(row.weight_bits, 2.0, 64.0)));
  }
  static std::string width_text(int width) {
    return std::to_string(width) + (width == 2 ? " bits and less" : " bits");
  }

  void plot_block_errors() {
    std::map<int, StudyRows> by_width;
    for (const StudyRow* row : model_.quantized) {
      if (row->block_error.empty()) continue;
      by_width[width_of(*row)].push_back(row);
    }
    for (const auto& [width, rows] : by_width) {
      // Charts of one width are to be compared: they share their y axis.
      std::vector<double> all;
      for (const StudyRow* row : rows) {
        all.insert(all.end(), row->block_error.begin(), row->block_error.end());
      }
      const std::size_t parts = (rows.size() + most_lines - 1) / most_lines;
      for (std::size_t part = 0; part < parts; ++part) {
        const auto at = [&](std::size_t p) {
          return rows.begin() + static_cast<std::ptrdiff_t>(rows.size() * p / parts);
        };
        const std::string number = std::to_string(part + 1);
        XyChart chart = block_error_chart(StudyRows(at(part), at(part + 1)), all);
        chart.text.title = model_.name + ": error of each block's output, " +
                           std::to_string(width) + (width == 2 ? " bits and less" : " bits");
        if (parts > 1) {
          chart.text.title += " (part " + number + " of " + std::to_string(parts) + ")";
        }
        plots_.push_back({"block_error." + std::to_string(width) + "-bits" +
                              (parts > 1 ? ".part-" + number : ""),
                          xy_chart_svg(chart)});
      }
    }
  }

  XyChart block_error_chart(const StudyRows& rows, const std::vector<double>& range) const {
    XyChart chart;
    chart.text.subtitle = "Squared error relative to the unquantized block's output.";
    chart.x = {.title = "transformer block", .integers = true};
    chart.y = {.title = "relative squared error", .scale = AxisScale::log10, .include = range};
    constexpr Dash dashes[] = {Dash::solid, Dash::dashed, Dash::dotted, Dash::dash_dot};
    std::map<std::string, std::size_t> seen;
    bool repeats = false;
    for (const StudyRow* row : rows) repeats = ++seen[row->method] > std::size(dashes) || repeats;
    seen.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t nth = seen[rows[i]->method]++;
      ChartSeries series{.name = setting_name(*rows[i]).text()};
      // The method's own look, a dash pattern and a filling for each of its settings, as long as
      // those last.
      series.style = repeats ? series_style(i) : model_.styles.at(rows[i]->method);
      if (!repeats) {
        series.style.dash = dashes[nth];
        series.style.fill = static_cast<MarkerFill>(nth);
      }
      for (std::size_t b = 0; b < rows[i]->block_error.size(); ++b) {
        series.points.push_back({.x = static_cast<double>(b),
                                 .y = rows[i]->block_error[b],
                                 .name = series.name + ", block " + std::to_string(b)});
      }
      chart.series.push_back(std::move(series));
    }
    return chart;
  }

  // "layers.3.mlp.up_proj" as 3 and "mlp.up_proj"; nullopt for any other name.
  static std::optional<std::pair<std::int64_t, std::string>> block_and_site(
      const std::string& name) {
    constexpr std::string_view prefix = "layers.";
    if (!name.starts_with(prefix)) return std::nullopt;
    std::size_t at = prefix.size();
    std::int64_t block = 0;
    for (; at < name.size() && name[at] >= '0' && name[at] <= '9'; ++at) {
      block = block * 10 + (name[at] - '0');
      if (block > 1'000'000) return std::nullopt;
    }
    if (at == prefix.size() || at + 1 >= name.size() || name[at] != '.') return std::nullopt;
    return std::pair{block, name.substr(at + 1)};
  }

  void plot_linear_errors() {
    // Settings of one width are to be compared: they share their colours.
    std::map<int, std::vector<double>> by_width;
    for (const StudyRow* row : model_.quantized) {
      for (const auto& e : row->linear_error) by_width[width_of(*row)].push_back(e.relative_error);
    }
    for (const StudyRow* row : model_.quantized) {
      std::set<std::int64_t> blocks;
      std::vector<std::string> sites;
      std::map<std::pair<std::int64_t, std::string>, double> errors;
      for (const auto& e : row->linear_error) {
        const auto place = block_and_site(e.name);
        if (!place) continue;
        blocks.insert(place->first);
        add_once(sites, place->second);
        errors.try_emplace(*place, e.relative_error);
      }
      HeatMap chart;
      chart.text.title = model_.name + ": error of each linear, " + setting_name(*row).text();
      chart.text.subtitle = std::string("The colours mean the same in all settings of ") +
                            width_text(width_of(*row)) + ".";
      chart.x_title = "transformer block";
      chart.rows = sites;
      chart.colour = {.title = "relative error",
                      .scale = AxisScale::log10,
                      .include = by_width[width_of(*row)]};
      for (const std::int64_t block : blocks) chart.columns.push_back(std::to_string(block));
      for (const std::string& site : sites) {
        for (const std::int64_t block : blocks) {
          const auto found = errors.find({block, site});
          chart.values.push_back(found == errors.end() ? std::nullopt
                                                       : std::optional<double>(found->second));
        }
      }
      const SettingName name = setting_name(*row);
      plots_.push_back({"linear_error." + safe_file_name(row->method + "-" + name.short_text()),
                        heat_map_svg(chart)});
    }
  }

  const PlotModel& model_;
  std::vector<StudyPlot> plots_;
};

}  // namespace

std::vector<StudyPlot> error_plots(const PlotModel& model) { return ErrorPlots(model).run(); }

}  // namespace engine
