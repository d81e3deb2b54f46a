// What the files of study_plots share: a model's rows, and charts before they are written.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "eval/study_plots.h"
#include "eval/svg_canvas.h"

namespace engine {

using StudyRows = std::vector<const StudyRow*>;

struct PlotModel {
  std::string name;
  StudyRows rows;       // all of the model
  StudyRows quantized;  // those of a method
  const StudyRow* full_precision = nullptr;
  std::map<std::string, SeriesStyle> styles;  // of every method; the same for all models
};

struct StudyPlot {
  std::string file;  // behind the model's name: "perplexity.c4"
  std::string svg;   // empty: nothing to draw
};

[[nodiscard]] std::vector<StudyPlot> trade_off_plots(const PlotModel& model);
[[nodiscard]] std::vector<StudyPlot> error_plots(const PlotModel& model);
[[nodiscard]] std::vector<StudyPlot> cost_plots(const PlotModel& model);

[[nodiscard]] inline bool is_quantized(const StudyRow& row) { return row.method != "fp"; }

// Letters, digits and "._-" of ASCII, not hidden, not long.
[[nodiscard]] std::string safe_file_name(std::string_view name);

[[nodiscard]] std::string joined_names(const std::vector<std::string>& names,
                                       const char* between = ", ");

inline void add_once(std::vector<std::string>& names, const std::string& name) {
  if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
}

// Whether the largest of the values that a logarithmic axis can show is more than `ratio` times the
// smallest.
[[nodiscard]] bool spans_ratio(const std::vector<double>& values, double ratio);

}  // namespace engine
