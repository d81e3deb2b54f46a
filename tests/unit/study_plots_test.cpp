// The study's figures: which files there are, what stands in them, and that they are readable.
#include "eval/study_plots.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/error.h"
#include "formats/json.h"
#include "tests/unit/svg_check.h"

namespace engine {
namespace {

using test::check_svg;

class Folder {
 public:
  Folder() {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("study_plots_" + std::to_string(getpid()) + "_" + std::to_string(count++));
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::string content(const std::filesystem::path& path) { return read_text_file(path, 1 << 24); }

StudyRow row_of(const std::string& method, double bits, std::int64_t group, double perplexity) {
  StudyRow row;
  row.model = "small model";
  row.method = method;
  row.weight_bits = bits;
  row.group = group;
  row.device = "a device";
  row.perplexity.push_back({"c4", "c4-2048", perplexity, 0.01});
  for (const char* task : {"piqa", "arc_easy", "winogrande"}) {
    StudyRow::Score score;
    score.name = task;
    score.acc = 0.5;
    score.acc_stderr = 0.01;
    row.scores.push_back(score);
  }
  if (method == "fp") {
    row.label = "unquantized";
    return row;
  }
  row.label = method + " " + std::to_string(static_cast<int>(bits)) + " bits" +
              (group > 0 ? " g" + std::to_string(group) : "");
  row.bits_stored = bits + (group > 0 ? 36.0 / static_cast<double>(group) : 0);
  row.divergence.push_back({"c4", perplexity / 100, 0, 0, 0, 0.9});
  for (int block = 0; block < 4; ++block) {
    row.block_error.push_back(0.01 * (block + 1) / bits);
    for (const char* site : {"self_attn.q_proj", "mlp.up_proj"}) {
      row.linear_error.push_back({"layers." + std::to_string(block) + "." + site, 0.02 / bits});
    }
  }
  row.quantize_s = 20 * bits;
  row.quantize_peak_bytes = 3'000'000'000;
  row.decode_token_per_s = 200;
  return row;
}

std::vector<StudyRow> some_rows() {
  return {row_of("fp", 16, 0, 6),        row_of("rtn", 2, 128, 900),   row_of("rtn", 4, 128, 7.1),
          row_of("gptq", 2, 128, 200),   row_of("gptq", 3, 128, 8.2),  row_of("gptq", 3, 64, 8),
          row_of("quipsharp", 2, 0, 15), row_of("billm", 1.1, 128, 60)};
}

std::vector<std::string> names_of(const std::vector<std::filesystem::path>& paths) {
  std::vector<std::string> names;
  for (const auto& p : paths) names.push_back(p.filename().string());
  return names;
}

TEST(StudyPlots, WritesWhatTheRowsHaveDataFor) {
  const Folder folder;
  const auto written = write_study_plots(some_rows(), folder.path() / "plots");
  EXPECT_EQ(
      names_of(written),
      (std::vector<std::string>{
          "small_model.perplexity.c4.svg", "small_model.accuracy.svg",
          "small_model.divergence.c4.svg", "small_model.block_error.2-bits.svg",
          "small_model.block_error.3-bits.svg", "small_model.block_error.4-bits.svg",
          "small_model.linear_error.rtn-2b_g128.svg", "small_model.linear_error.rtn-4b_g128.svg",
          "small_model.linear_error.gptq-2b_g128.svg", "small_model.linear_error.gptq-3b_g128.svg",
          "small_model.linear_error.gptq-3b_g64.svg", "small_model.linear_error.quipsharp-2b.svg",
          "small_model.linear_error.billm-1.1b_g128.svg", "small_model.cost.svg",
          "small_model.speed.svg"}));
  for (const auto& path : written) {
    const auto check = check_svg(content(path));
    EXPECT_TRUE(check.good()) << path << check.text();
  }
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path() / "plots")) {
    files += entry.is_regular_file() ? 1 : 0;
  }
  EXPECT_EQ(files, written.size());
}

TEST(StudyPlots, SameRowsSameBytes) {
  const Folder one, other;
  const auto first = write_study_plots(some_rows(), one.path());
  const auto second = write_study_plots(some_rows(), other.path());
  ASSERT_EQ(names_of(first), names_of(second));
  for (std::size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(content(first[i]), content(second[i])) << first[i];
  }
}

std::string plot(const std::vector<StudyRow>& rows, const std::string& name) {
  const Folder folder;
  for (const auto& path : write_study_plots(rows, folder.path())) {
    if (path.filename() == name) return content(path);
  }
  return "";
}

bool has(const std::string& svg, const std::string& text) {
  return svg.find(text) != std::string::npos;
}

TEST(StudyPlots, PerplexityNamesMethodsSettingsAndFullPrecision) {
  const std::string svg = plot(some_rows(), "small_model.perplexity.c4.svg");
  for (const char* text : {">RTN g128<", ">GPTQ g128<", ">QuIP#<", ">BiLLM g128<", ">3b g64<",
                           ">full precision: 6.00<", ">Pareto front<", ">1.1b<",
                           "small model: perplexity of c4", "Protocol c4-2048"}) {
    EXPECT_TRUE(has(svg, text)) << text;
  }
}

TEST(StudyPlots, InfiniteAndMissingValuesAreNamed) {
  std::vector<StudyRow> rows = some_rows();
  rows[1].perplexity[0].value = std::numeric_limits<double>::infinity();
  rows[2].bits_stored.reset();
  rows[3].perplexity.clear();
  rows[3].failed = "out of memory";
  const std::string svg = plot(rows, "small_model.perplexity.c4.svg");
  EXPECT_TRUE(has(svg, "RTN 2b g128 (inf)"));
  EXPECT_TRUE(has(svg, "the stored bits are not known: RTN 4b g128."));
  EXPECT_TRUE(has(svg, "because a job failed: GPTQ 2b g128."));
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
}

TEST(StudyPlots, AccuracyIsTheMeanOfTheTasksThatAllRowsHave) {
  std::vector<StudyRow> rows = some_rows();
  EXPECT_TRUE(has(plot(rows, "small_model.accuracy.svg"), "mean of piqa, arc_easy, winogrande"));
  rows[3].scores.pop_back();
  const std::string two = plot(rows, "small_model.accuracy.svg");
  EXPECT_TRUE(has(two, "mean of piqa, arc_easy<"));
  EXPECT_TRUE(has(two, ">chance: 37.5 %<"));
  EXPECT_TRUE(has(two, ">full precision: 50.0 %<"));
  // A failed row gives way to the others.
  rows[3].failed = "no space left";
  const std::string three = plot(rows, "small_model.accuracy.svg");
  EXPECT_TRUE(has(three, "mean of piqa, arc_easy, winogrande"));
  EXPECT_TRUE(has(three, "because a job failed: GPTQ 2b g128."));
  EXPECT_EQ(plot(rows, "small_model.mmlu.svg"), "");
  for (StudyRow& row : rows) {
    StudyRow::Score mmlu;
    mmlu.name = "mmlu";
    mmlu.acc = 0.4;
    row.scores = {mmlu};
  }
  EXPECT_EQ(plot(rows, "small_model.accuracy.svg"), "");
  EXPECT_TRUE(has(plot(rows, "small_model.mmlu.svg"), ">chance: 25.0 %<"));
}

TEST(StudyPlots, ManySettingsOfAWidthFillSeveralCharts) {
  std::vector<StudyRow> rows;
  for (int i = 0; i < 23; ++i) rows.push_back(row_of("gptq", 4, 16 + i, 10));
  const Folder folder;
  std::vector<std::string> names;
  std::size_t lines = 0;
  for (const auto& path : write_study_plots(rows, folder.path())) {
    if (!has(path.filename().string(), "block_error")) continue;
    names.push_back(path.filename().string());
    const std::string svg = content(path);
    for (std::size_t at = svg.find("<polyline"); at != std::string::npos;
         at = svg.find("<polyline", at + 1)) {
      ++lines;
    }
    EXPECT_TRUE(has(svg, "of 3)"));
  }
  EXPECT_EQ(names, (std::vector<std::string>{"small_model.block_error.4-bits.part-1.svg",
                                             "small_model.block_error.4-bits.part-2.svg",
                                             "small_model.block_error.4-bits.part-3.svg"}));
  EXPECT_EQ(lines, 23U);
}

TEST(StudyPlots, CostsChooseUnitsAndScales) {
  std::vector<StudyRow> rows = some_rows();
  std::string svg = plot(rows, "small_model.cost.svg");
  EXPECT_TRUE(has(svg, ">time to quantize (s)<"));
  EXPECT_TRUE(has(svg, ">peak device memory (GB)<"));
  EXPECT_TRUE(has(svg, ">3.00<"));
  rows[2].quantize_s = 6000;
  svg = plot(rows, "small_model.cost.svg");
  EXPECT_TRUE(has(svg, ">time to quantize (min), logarithmic<"));
  EXPECT_TRUE(has(svg, ">100<"));
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
}

TEST(StudyPlots, NamesOfFilesAreSafeAndUnique) {
  const Folder folder;
  std::vector<StudyRow> rows = some_rows();
  rows.resize(3);
  rows[0].model = "../a/b";
  rows[1].model = "../a?b";
  rows[2].model = std::string(300, 'm') + "<&>";
  for (StudyRow& row : rows) {
    row.perplexity[0].text = "x/y\n";
    row.bits_stored = 3;
    row.method = "rtn";
    row.label.clear();
  }
  for (const auto& path : write_study_plots(rows, folder.path())) {
    EXPECT_EQ(path.parent_path(), folder.path());
    EXPECT_LT(path.filename().string().size(), 250U);
    EXPECT_TRUE(std::filesystem::exists(path));
    EXPECT_TRUE(check_svg(content(path)).good()) << path << check_svg(content(path)).text();
  }
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "_._a_b.perplexity.x_y_.svg"));
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "_._a_b.perplexity.x_y_-2.svg"));
}

TEST(StudyPlots, HostileRowsAreHarmless) {
  std::vector<StudyRow> rows = some_rows();
  const double nan_value = std::numeric_limits<double>::quiet_NaN();
  rows[1].weight_bits = nan_value;
  rows[2].weight_bits = 1e300;
  rows[3].block_error = {nan_value, 0, -1, 1e300};
  rows[3].bits_stored = -4;
  rows[4].linear_error = {
      {"layers.99999999999999999999.q", 1}, {"layers.", 1},   {"", 1},
      {"layers.999999.q", nan_value},       {"layers.1.", 2}, {"layers.7.q", 1}};
  rows[5].quantize_s = -5;
  rows[5].quantize_peak_bytes = 0;
  rows[6].label = "\xff\x01<script>";
  rows[7].scores[0].acc = nan_value;
  const Folder folder;
  const auto written = write_study_plots(rows, folder.path());
  EXPECT_GE(written.size(), 8U);
  for (const auto& path : written) {
    EXPECT_TRUE(check_svg(content(path)).good()) << path << check_svg(content(path)).text();
  }
  EXPECT_TRUE(write_study_plots({}, folder.path()).empty());
}

TEST(StudyPlots, AFolderThatCannotBeMadeIsAnError) {
  const Folder folder;
  std::filesystem::create_directories(folder.path());
  write_study_plots(some_rows(), folder.path());
  EXPECT_THROW(write_study_plots(some_rows(), folder.path() / "small_model.cost.svg"), IoError);
}

TEST(SettingNames, ComeFromTheLabel) {
  StudyRow row = row_of("pbllm", 2, 128, 10);
  row.label = "pbllm 2 bits g128 --scale-dtype f16";
  EXPECT_EQ(setting_name(row).text(), "PB-LLM 2b g128 --scale-dtype f16");
  EXPECT_EQ(setting_name(row).variant, "g128 --scale-dtype f16");
  row.weight_bits = 1.7;
  EXPECT_EQ(setting_name(row).bits, "1.7b");
  row.label = "";
  EXPECT_EQ(setting_name(row).short_text(), "1.7b");
  row.label = "as I like it";
  EXPECT_EQ(setting_name(row).short_text(), "1.7b as I like it");
  EXPECT_EQ(setting_name(row_of("fp", 16, 0, 6)).short_text(), "unquantized");
}

}  // namespace
}  // namespace engine
