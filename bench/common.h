// Options and output that the measurements share.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "bench/clocks.h"
#include "engine/cmd/command.h"

namespace engine {

// --device --threads --report, and --dtype with `runs_model`. No --trace: marks around every op
// would be in the way of what is measured.
void declare_bench_device(CLI::App& app, DeviceOptions& device, bool runs_model);

// "1,4,16" -> values in low..high, at most 64 of them; Error(usage) naming the option otherwise.
[[nodiscard]] std::vector<std::int64_t> parse_numbers(const std::string& option,
                                                      const std::string& text, std::int64_t low,
                                                      std::int64_t high);
// "a,b" -> its parts, none empty; Error(usage) otherwise.
[[nodiscard]] std::vector<std::string> parse_names(const std::string& option,
                                                   const std::string& text);
// Error(usage) "--option: expected LOW to HIGH, found VALUE".
void check_range(const std::string& option, std::int64_t value, std::int64_t low,
                 std::int64_t high);

// A table of GitHub's Markdown; the first row is the head, the first column is text.
[[nodiscard]] std::string markdown_table(const std::vector<std::vector<std::string>>& rows);
// A number with `digits` after the point.
[[nodiscard]] std::string fixed(double value, int digits);
// value / whole as "93.1 %".
[[nodiscard]] std::string percent(double share);

// Throws Error(numeric) naming the first number of the document that is not finite: a measurement
// that failed is never reported.
void require_finite(const Json& document, const std::string& place);

// Appends measure(i) to `rows` for each of `names`. If one throws after at least one row, notes the
// error and the names without a row in report["incomplete"] and returns the exception, so that the
// caller rethrows it once the rows it has are out; without a row it leaves at once.
[[nodiscard]] std::exception_ptr measure_rows(Report& report, Json& rows,
                                              const std::vector<std::string>& names,
                                              const std::function<Json(std::size_t)>& measure);

// Notes clocks before and after a run in report["clocks"].
class ClockNotes {
 public:
  ClockNotes(Report& report, const std::string& device);
  // Call when the measurements are done.
  void finish();

 private:
  Report& report_;
  Clocks clocks_;
};

}  // namespace engine
