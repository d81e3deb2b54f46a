#include "eval/study_plots.h"

#include <cmath>
#include <set>
#include <system_error>

#include "eval/paper_rows.h"
#include "eval/study_plots_parts.h"
#include "eval/svg_axis.h"
#include "eval/svg_text.h"
#include "formats/atomic_file.h"
#include "formats/error.h"

namespace engine {
namespace {

constexpr std::size_t longest_name_part = 80;  // bytes of a file name

}  // namespace

std::string safe_file_name(std::string_view name) {
  std::string out;
  for (const char c : name.substr(0, longest_name_part)) {
    const bool kept = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      c == '.' || c == '_' || c == '-';
    out += kept ? c : '_';
  }
  if (out.empty()) out = "_";
  if (out[0] == '.') out[0] = '_';
  return out;
}

std::string joined_names(const std::vector<std::string>& names, const char* between) {
  std::string out;
  for (const std::string& n : names) out += (out.empty() ? "" : between) + n;
  return out;
}

bool spans_ratio(const std::vector<double>& values, double ratio) {
  double low = 0, high = 0;
  for (const double v : values) {
    if (!Axis::shows(AxisScale::log10, v)) continue;
    low = low == 0 ? v : std::min(low, v);
    high = std::max(high, v);
  }
  return high > ratio * low;
}

std::string SettingName::short_text() const {
  return bits + (bits.empty() || variant.empty() ? "" : " ") + variant;
}

std::string SettingName::text() const {
  const std::string rest = short_text();
  return method + (rest.empty() ? "" : " ") + rest;
}

SettingName setting_name(const StudyRow& row) {
  SettingName name{.method = method_title(row.method), .bits = "", .variant = ""};
  if (is_quantized(row) && std::isfinite(row.weight_bits)) {
    name.bits =
        decimal_text(row.weight_bits, row.weight_bits == std::floor(row.weight_bits) ? 0 : 1) + "b";
  }
  // The label's words, less the method and "3 bits", which are known better.
  std::vector<std::string> words;
  for (std::size_t at = 0; at < row.label.size();) {
    const std::size_t end = std::min(row.label.find(' ', at), row.label.size());
    if (end > at) words.push_back(row.label.substr(at, end - at));
    at = end + 1;
  }
  if (!words.empty() && words[0] == row.method) words.erase(words.begin());
  if (words.size() >= 2 && (words[1] == "bits" || words[1] == "bit")) {
    words.erase(words.begin(), words.begin() + 2);
  }
  name.variant = joined_names(words, " ");
  return name;
}

std::vector<std::filesystem::path> write_study_plots(const std::vector<StudyRow>& rows,
                                                     const std::filesystem::path& folder) {
  std::error_code problem;
  std::filesystem::create_directories(folder, problem);
  if (problem) throw IoError(folder.string(), "cannot make the folder", problem.value());
  std::vector<std::string> models;
  PlotModel shared;
  for (const StudyRow& row : rows) {
    add_once(models, row.model);
    if (is_quantized(row))
      shared.styles.try_emplace(row.method, series_style(shared.styles.size()));
  }
  std::set<std::string> used;
  std::vector<std::filesystem::path> written;
  for (const std::string& name : models) {
    PlotModel model = shared;
    model.name = name;
    for (const StudyRow& row : rows) {
      if (row.model != name) continue;
      model.rows.push_back(&row);
      if (is_quantized(row)) {
        model.quantized.push_back(&row);
      } else if (model.full_precision == nullptr) {
        model.full_precision = &row;
      }
    }
    for (const auto& plots : {trade_off_plots(model), error_plots(model), cost_plots(model)}) {
      for (const StudyPlot& plot : plots) {
        if (plot.svg.empty()) continue;
        const std::string stem = safe_file_name(name) + "." + plot.file;
        std::string file = stem;
        for (int n = 2; !used.insert(file).second; ++n) file = stem + "-" + std::to_string(n);
        written.push_back(folder / (file + ".svg"));
        write_file_atomically(written.back(), plot.svg);
      }
    }
  }
  return written;
}

}  // namespace engine
