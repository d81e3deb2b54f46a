// What a study measures of quality against the bits that the weights really take.
#include <cmath>
#include <functional>
#include <optional>

#include "eval/paper_rows.h"
#include "eval/study_plots_parts.h"
#include "eval/svg_chart.h"
#include "eval/svg_text.h"

namespace engine {
namespace {

constexpr double log_bits_range = 3;  // largest stored bits by the smallest, then a log axis

// What guessing gives; the tasks that the zero-shot average is made of.
struct TaskChance {
  std::string_view name;
  double chance;
};
constexpr TaskChance zero_shot_tasks[] = {{"piqa", 0.5},
                                          {"arc_easy", 0.25},
                                          {"arc_challenge", 0.25},
                                          {"hellaswag", 0.25},
                                          {"winogrande", 0.5}};
constexpr double mmlu_chance = 0.25;

constexpr const char* bits_title = "stored bits per weight (scales and all else included)";

SeriesStyle plain_line(const char* colour, Dash dash, double width) {
  SeriesStyle style;
  style.colour = colour;
  style.dash = dash;
  style.line_width = width;
  return style;
}

struct Measured {
  double value = 0;
  std::optional<double> error;
};
using Measure = std::function<std::optional<Measured>(const StudyRow&)>;

// One value of every row against the bits that its weights really take.
struct TradeOff {
  ChartText text;
  AxisSpec y;
  bool high_is_good = false;
  Measure measure;
  std::string unit;  // of the full-precision value in the legend
  std::vector<ReferenceLine> lines;
};

class TradeOffPlots {
 public:
  explicit TradeOffPlots(const PlotModel& model) : model_(model) {}

  std::vector<StudyPlot> run() {
    plot_perplexity();
    plot_accuracy();
    plot_mmlu();
    plot_divergence();
    return std::move(plots_);
  }

 private:
  // The variant that most settings of a method have is drawn filled, the others hollow.
  static std::string main_variant(const StudyRows& rows) {
    std::vector<std::pair<std::string, std::size_t>> counts;
    for (const StudyRow* row : rows) {
      const std::string variant = setting_name(*row).variant;
      const auto found = std::find_if(counts.begin(), counts.end(),
                                      [&](const auto& c) { return c.first == variant; });
      if (found == counts.end()) {
        counts.emplace_back(variant, 1);
      } else {
        ++found->second;
      }
    }
    return std::max_element(counts.begin(), counts.end(),
                            [](const auto& a, const auto& b) { return a.second < b.second; })
        ->first;
  }

  void plot_trade_off(const std::string& file, TradeOff plot) {
    std::vector<double> bits;
    std::vector<SvgPoint> points;
    StudyRows shown, without_bits, failed;
    for (const StudyRow* row : model_.quantized) {
      const std::optional<Measured> m = plot.measure(*row);
      if (!m) {
        if (!row->failed.empty()) failed.push_back(row);
        continue;
      }
      if (!row->bits_stored) {
        without_bits.push_back(row);
        continue;
      }
      shown.push_back(row);
      bits.push_back(*row->bits_stored);
      const bool visible = Axis::shows(plot.y.scale, m->value);
      points.push_back({bits.back(), visible ? m->value : std::nan("")});
    }
    XyChart chart;
    chart.x.title = bits_title;
    if (spans_ratio(bits, log_bits_range)) chart.x.scale = AxisScale::log10;
    chart.lines = std::move(plot.lines);
    chart.series.push_back(front_series(points, plot.high_is_good));
    const bool hollow = add_method_series(chart, shown, plot.measure);
    add_full_precision(chart, plot);
    chart.y = std::move(plot.y);
    chart.text = std::move(plot.text);
    if (hollow) {
      chart.text.notes.emplace_back(
          "Filled: the setting in the legend. Hollow: other settings of the same method. \"3b\": 3 "
          "bits, \"g128\": groups of 128.");
    }
    note_rows(chart, "Not shown, because the stored bits are not known: ", without_bits);
    note_rows(chart, "Not shown, because a job failed: ", failed);
    plots_.push_back({file, xy_chart_svg(chart)});
  }

  static void note_rows(XyChart& chart, const char* text, const StudyRows& rows) {
    if (rows.empty()) return;
    std::vector<std::string> names;
    for (const StudyRow* row : rows) names.push_back(setting_name(*row).text());
    chart.text.notes.push_back(text + joined_names(names) + ".");
  }

  static ChartSeries front_series(const std::vector<SvgPoint>& points, bool high_is_good) {
    ChartSeries front{.name = "Pareto front", .style = plain_line("#b0b0b0", Dash::solid, 4)};
    front.markers = false;
    front.step = true;
    for (const std::size_t i : pareto_front(points, high_is_good)) {
      front.points.push_back({
          .x = points[i].x,
          .y = points[i].y,
      });
    }
    if (front.points.size() < 2) front.name.clear();  // nothing to see
    return front;
  }

  // Its bits alone would look like those of the filled points.
  static std::string hollow_label(const SettingName& name) {
    return name.variant.empty() ? name.bits + " no group" : name.short_text();
  }

  // One series per method and variant; returns whether some are hollow.
  bool add_method_series(XyChart& chart, const StudyRows& rows, const Measure& measure) const {
    std::vector<std::string> methods;
    for (const StudyRow* row : rows) add_once(methods, row->method);
    bool any_hollow = false;
    for (const std::string& method : methods) {
      StudyRows own;
      for (const StudyRow* row : rows) {
        if (row->method == method) own.push_back(row);
      }
      const std::string main = main_variant(own);
      std::vector<std::string> variants = {main};
      for (const StudyRow* row : own) add_once(variants, setting_name(*row).variant);
      for (const std::string& variant : variants) {
        ChartSeries series{.style = model_.styles.at(method)};
        const bool hollow = variant != main;
        any_hollow = any_hollow || hollow;
        if (hollow) {
          // Their labels say which they are; lines would be too many.
          series.line = false;
          series.style.fill = MarkerFill::hollow;
        } else {
          series.name = method_title(method) + (main.empty() ? "" : " " + main);
        }
        for (const StudyRow* row : own) {
          const SettingName name = setting_name(*row);
          if (name.variant != variant) continue;
          const Measured m = *measure(*row);
          series.points.push_back(
              {.x = *row->bits_stored,
               .y = m.value,
               .y_error = m.error,
               .label = hollow ? hollow_label(name) : name.bits,
               .label_needed = hollow || *row->bits_stored >= row->weight_bits + 1,
               .name = name.text()});
        }
        std::stable_sort(series.points.begin(), series.points.end(),
                         [](const ChartPoint& a, const ChartPoint& b) { return a.x < b.x; });
        chart.series.push_back(std::move(series));
      }
    }
    return any_hollow;
  }

  void add_full_precision(XyChart& chart, const TradeOff& plot) const {
    if (model_.full_precision == nullptr) return;
    const std::optional<Measured> m = plot.measure(*model_.full_precision);
    if (!m || !Axis::shows(plot.y.scale, m->value)) return;
    chart.lines.push_back({"full precision: " + value_text(m->value) + plot.unit, m->value,
                           plain_line("#222222", Dash::dashed, 1.3)});
  }

  // The names that `list` gives for the rows, each once, in order.
  template <typename List>
  std::vector<std::string> names_in(List list) const {
    std::vector<std::string> names;
    for (const StudyRow* row : model_.rows) {
      for (const auto& entry : list(*row)) add_once(names, entry);
    }
    return names;
  }

  void plot_perplexity() {
    const auto find = [](const StudyRow& row, const std::string& text) {
      return std::find_if(row.perplexity.begin(), row.perplexity.end(),
                          [&](const auto& p) { return p.text == text; });
    };
    const std::vector<std::string> texts = names_in([](const StudyRow& row) {
      std::vector<std::string> names;
      for (const auto& p : row.perplexity) names.push_back(p.text);
      return names;
    });
    for (const std::string& text : texts) {
      std::vector<std::string> protocols;
      for (const StudyRow* row : model_.rows) {
        const auto found = find(*row, text);
        if (found != row->perplexity.end()) add_once(protocols, found->protocol);
      }
      TradeOff plot;
      plot.text.title = model_.name + ": perplexity of " + text;
      plot.text.subtitle = protocols.size() == 1 ? "Protocol " + protocols[0] + ". Lower is better."
                                                 : "Lower is better.";
      if (protocols.size() > 1) {
        plot.text.notes.push_back("Not all by one protocol: " + joined_names(protocols) + ".");
      }
      plot.y = {.title = "perplexity", .scale = AxisScale::log10};
      plot.measure = [&](const StudyRow& row) -> std::optional<Measured> {
        const auto found = find(row, text);
        if (found == row.perplexity.end()) return std::nullopt;
        return Measured{found->value, {}};
      };
      plot_trade_off("perplexity." + safe_file_name(text), std::move(plot));
    }
  }

  void plot_divergence() {
    const auto find = [](const StudyRow& row, const std::string& text) {
      return std::find_if(row.divergence.begin(), row.divergence.end(),
                          [&](const auto& d) { return d.text == text; });
    };
    const std::vector<std::string> texts = names_in([](const StudyRow& row) {
      std::vector<std::string> names;
      for (const auto& d : row.divergence) names.push_back(d.text);
      return names;
    });
    for (const std::string& text : texts) {
      TradeOff plot;
      plot.text.title = model_.name + ": divergence from the unquantized model on " + text;
      plot.text.subtitle = "Mean over tokens of the Kullback-Leibler divergence. Lower is better.";
      plot.y = {.title = "mean divergence (nat)", .scale = AxisScale::log10};
      plot.measure = [&](const StudyRow& row) -> std::optional<Measured> {
        const auto found = find(row, text);
        if (found == row.divergence.end() || !is_quantized(row)) return std::nullopt;
        return Measured{found->mean, {}};
      };
      plot_trade_off("divergence." + safe_file_name(text), std::move(plot));
    }
  }

  // Mean accuracy in percent over tasks; nullopt unless the row has them all.
  static std::optional<Measured> mean_accuracy(const StudyRow& row,
                                               const std::vector<std::string>& tasks) {
    double sum = 0, variance = 0;
    bool errors = true;
    for (const std::string& task : tasks) {
      const auto found = std::find_if(row.scores.begin(), row.scores.end(),
                                      [&](const auto& s) { return s.name == task; });
      if (found == row.scores.end()) return std::nullopt;
      sum += found->acc;
      errors = errors && found->acc_stderr.has_value();
      if (errors) variance += *found->acc_stderr * *found->acc_stderr;
    }
    const double percent = 100 / static_cast<double>(tasks.size());
    Measured mean{percent * sum, {}};
    if (errors) mean.error = percent * std::sqrt(variance);
    return mean;
  }

  static std::vector<std::string> zero_shot_scores(const StudyRow& row) {
    std::vector<std::string> names;
    for (const TaskChance& task : zero_shot_tasks) {
      if (mean_accuracy(row, {std::string(task.name)})) names.emplace_back(task.name);
    }
    return names;
  }

  void plot_scores(const std::string& file, const std::string& title,
                   const std::vector<std::string>& tasks, double chance) {
    TradeOff plot;
    plot.text.title = title;
    plot.text.subtitle = "Higher is better. Bars: one standard error.";
    plot.y.title = "accuracy (%)";
    plot.high_is_good = true;
    plot.unit = " %";
    plot.measure = [&](const StudyRow& row) { return mean_accuracy(row, tasks); };
    plot.lines.push_back({"chance: " + value_text(100 * chance) + " %", 100 * chance,
                          plain_line("#555555", Dash::dotted, 1.3)});
    plot_trade_off(file, std::move(plot));
  }

  void plot_accuracy() {
    // A row that a failed job left with fewer tasks does not take them from all others.
    std::vector<std::string> tasks = names_in(zero_shot_scores);
    for (const StudyRow* row : model_.rows) {
      const std::vector<std::string> own = zero_shot_scores(*row);
      if (own.empty() || !row->failed.empty()) continue;
      std::erase_if(tasks, [&](const std::string& task) {
        return std::find(own.begin(), own.end(), task) == own.end();
      });
    }
    if (tasks.empty()) return;
    double chance = 0;
    for (const TaskChance& task : zero_shot_tasks) {
      if (std::find(tasks.begin(), tasks.end(), task.name) != tasks.end()) chance += task.chance;
    }
    const std::string what =
        tasks.size() == 1 ? "zero-shot accuracy, " : "zero-shot accuracy, mean of ";
    plot_scores("accuracy", model_.name + ": " + what + joined_names(tasks), tasks,
                chance / static_cast<double>(tasks.size()));
  }

  void plot_mmlu() { plot_scores("mmlu", model_.name + ": MMLU accuracy", {"mmlu"}, mmlu_chance); }

  const PlotModel& model_;
  std::vector<StudyPlot> plots_;
};

}  // namespace

std::vector<StudyPlot> trade_off_plots(const PlotModel& model) {
  return TradeOffPlots(model).run();
}

}  // namespace engine
