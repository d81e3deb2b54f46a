// The study's figures as SVG files, from the rows that its tables are made of.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "eval/study_record.h"

namespace engine {

// Writes, for every model (in order of its first row), the charts that its rows have data for:
//   MODEL.perplexity.TEXT.svg    perplexity against stored bits per weight, with the Pareto front
//   MODEL.accuracy.svg           zero-shot accuracy, the mean of the tasks that all rows have
//   MODEL.mmlu.svg               MMLU accuracy
//   MODEL.divergence.TEXT.svg    mean KL divergence from the unquantized model
//   MODEL.block_error.BITS.svg   error of each block's output, a line per setting; BITS is "2-bits"
//                                for 2 bits and less; ".part-2" and so on follows if the lines of
//                                one width fill more than one chart
//   MODEL.linear_error.SETTING.svg  error of each linear, block by site
//   MODEL.cost.svg               time and memory of quantizing
//   MODEL.speed.svg              tokens per second
// Names are made safe: letters, digits, "._-" of ASCII, other bytes become "_"; a name that is
// taken gets "-2" and so on. The folder is made if it is not there. Returns the files in the order
// written. Throws IoError.
std::vector<std::filesystem::path> write_study_plots(const std::vector<StudyRow>& rows,
                                                     const std::filesystem::path& folder);

// The parts of a setting that a chart's legend and labels show apart.
struct SettingName {
  std::string method;   // as a person writes it: "GPTQ"
  std::string bits;     // "3b", "1.1b"
  std::string variant;  // what else the row's label says: "g128", "g128 f16"; may be empty
  [[nodiscard]] std::string text() const;        // "GPTQ 3b g128"
  [[nodiscard]] std::string short_text() const;  // "3b g128"
};
[[nodiscard]] SettingName setting_name(const StudyRow& row);

}  // namespace engine
