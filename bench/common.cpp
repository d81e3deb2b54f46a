#include "bench/common.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace engine {

void declare_bench_device(CLI::App& app, DeviceOptions& device, bool runs_model) {
  app.add_option("--device", device.device, "cpu, cuda:N, or auto (cuda:0 if there is a GPU)")
      ->capture_default_str();
  app.add_option("--threads", device.threads, "CPU threads; 0: all")->capture_default_str();
  app.add_option("--report", device.report, "Also write the report as JSON to this file");
  if (runs_model) device.declare_dtype(app);
}

std::vector<std::string> parse_names(const std::string& option, const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (const std::string& part : parts) {
    if (part.empty()) {
      throw Error(ErrorCode::usage,
                  option + ": expected names with commas between them, found \"" + text + "\"");
    }
  }
  return parts;
}

std::vector<std::int64_t> parse_numbers(const std::string& option, const std::string& text,
                                        std::int64_t low, std::int64_t high) {
  constexpr std::size_t most = 64;
  std::vector<std::int64_t> values;
  for (const std::string& part : parse_names(option, text)) {
    std::int64_t value = 0;
    const char* end = part.data() + part.size();
    const auto [stop, status] = std::from_chars(part.data(), end, value);
    if (status != std::errc{} || stop != end || value < low || value > high ||
        values.size() == most) {
      throw Error(ErrorCode::usage, option + ": expected at most " + std::to_string(most) +
                                        " numbers from " + std::to_string(low) + " to " +
                                        std::to_string(high) + " with commas, found \"" + text +
                                        "\"");
    }
    values.push_back(value);
  }
  return values;
}

void check_range(const std::string& option, std::int64_t value, std::int64_t low,
                 std::int64_t high) {
  if (value >= low && value <= high) return;
  throw Error(ErrorCode::usage, option + ": expected " + std::to_string(low) + " to " +
                                    std::to_string(high) + ", found " + std::to_string(value));
}

std::string markdown_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width(rows.front().size(), 3);
  for (const auto& row : rows) {
    REQUIRE(row.size() == width.size(), "a row of another length");
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  std::string out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    out += "|";
    for (std::size_t i = 0; i < width.size(); ++i) {
      const std::string pad(width[i] - rows[r][i].size(), ' ');
      out += " " + (i == 0 ? rows[r][i] + pad : pad + rows[r][i]) + " |";
    }
    out += "\n";
    if (r > 0) continue;
    out += "|";
    for (std::size_t i = 0; i < width.size(); ++i) {
      out += std::string(width[i] + 1, '-') + (i == 0 ? "-|" : ":|");
    }
    out += "\n";
  }
  return out;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string percent(double share) { return fixed(100 * share, 1) + " %"; }

void require_finite(const Json& document, const std::string& place) {
  if (document.is_number_float() && !std::isfinite(document.get<double>())) {
    throw Error(ErrorCode::numeric, place + ": a measurement is not finite");
  }
  if (!document.is_structured()) return;
  for (const auto& [key, value] : document.items()) require_finite(value, place + "." + key);
}

std::exception_ptr measure_rows(Report& report, Json& rows, const std::vector<std::string>& names,
                                const std::function<Json(std::size_t)>& measure) {
  for (std::size_t i = 0; i < names.size(); ++i) {
    try {
      rows.push_back(measure(i));
    } catch (const std::exception& e) {
      if (rows.empty()) throw;
      Json& note = report["incomplete"];
      note["error"] = e.what();
      note["missing"] = Json::array();
      for (std::size_t k = i; k < names.size(); ++k) note["missing"].push_back(names[k]);
      return std::current_exception();
    }
  }
  return nullptr;
}

ClockNotes::ClockNotes(Report& report, const std::string& device)
    : report_(report), clocks_(device) {
  report_["clocks"]["before"] = clocks_.read();
}

void ClockNotes::finish() { report_["clocks"]["after"] = clocks_.read(); }

}  // namespace engine
