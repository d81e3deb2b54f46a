// The published figures: complete, consistent, and found for the right models and settings.
#include "eval/paper_rows.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>
#include <tuple>

namespace engine {
namespace {

TEST(PaperRows, every_row_fills_the_columns_of_its_table) {
  std::map<int, int> rows;
  for (const PaperFigures& row : paper_figures()) {
    const PaperTable* table = find_paper_table(row.table);
    ASSERT_NE(table, nullptr) << row.table;
    ++rows[row.table];
    for (std::size_t i = 0; i < max_figures; ++i) {
      const double v = row.values[i];
      EXPECT_TRUE(v > 0 || v == not_published || v == no_answers) << row.table << ' ' << v;
      EXPECT_TRUE(i < table->columns.size() || v == not_published) << row.table;
    }
  }
  const std::map<int, int> expected = {{1, 41}, {2, 22}, {3, 37}, {4, 22},  {5, 25},
                                       {7, 4},  {8, 4},  {9, 4},  {11, 13}, {12, 13}};
  EXPECT_EQ(rows, expected);
}

TEST(PaperRows, no_setting_twice_in_a_table) {
  std::set<std::tuple<int, std::string_view, double, std::int64_t, std::int64_t>> seen;
  for (const PaperFigures& row : paper_figures()) {
    const Setting& s = row.setting;
    EXPECT_TRUE(
        seen.insert({row.table, s.method, s.weight_bits, s.activation_bits, s.group}).second)
        << row.table << ' ' << s.method << ' ' << s.weight_bits;
  }
}

TEST(PaperRows, averages_are_the_means_of_the_five_tasks) {
  int rows = 0, misprints = 0;
  for (const PaperFigures& row : paper_figures()) {
    if (row.table != 3 && row.table != 4 && row.table != 8) continue;
    const double mean = std::accumulate(row.values.begin(), row.values.begin() + 5, 0.0) / 5;
    const Setting& s = row.setting;
    ++rows;
    if (row.table == 3 && s.method == "rtn" && s.weight_bits == 3 && s.group == 0) {
      EXPECT_NEAR(mean - row.values[5], 2.0, 0.05);  // as printed
      ++misprints;
      continue;
    }
    // Both the figures and the average are rounded to a tenth.
    EXPECT_NEAR(mean, row.values[5], 0.1) << row.table << ' ' << s.method << ' ' << s.weight_bits;
  }
  EXPECT_EQ(rows, 63);
  EXPECT_EQ(misprints, 1);
}

TEST(PaperRows, mmlu_averages_are_over_questions) {
  int rows = 0;
  for (const PaperFigures& row : paper_figures()) {
    if (row.table != 7 && row.table != 9) continue;
    const double mean = (4705 * row.values[0] + 3018 * row.values[1] + 3077 * row.values[2] +
                         3242 * row.values[3]) /
                        14042;
    EXPECT_NEAR(mean, row.values[4], 0.1) << row.table << ' ' << row.setting.method;
    ++rows;
  }
  EXPECT_EQ(rows, 8);
}

TEST(PaperRows, full_precision_is_the_same_in_all_tables) {
  const Setting fp;
  for (const Figure f : {Figure::piqa, Figure::arc_easy, Figure::hellaswag, Figure::average}) {
    EXPECT_EQ(published_figure(3, fp, "llama3-8b", f), published_figure(8, fp, "llama3-8b", f));
  }
  EXPECT_EQ(published_figure(3, fp, "llama3-8b", Figure::average), 68.6);
  EXPECT_EQ(published_figure(1, fp, "llama3-70b", Figure::c4), std::nullopt);
  EXPECT_EQ(published_figure(6, fp, "llama3-8b", Figure::c4), std::nullopt);
}

TEST(PaperRows, no_quantized_average_is_above_full_precision_at_3_bits_and_less) {
  for (const PaperFigures& row : paper_figures()) {
    if ((row.table != 3 && row.table != 4) || row.setting.weight_bits > 3) continue;
    EXPECT_LT(row.values[5], row.table == 3 ? 68.6 : 75.3) << row.setting.method;
    EXPECT_GT(row.values[5], 33.0) << row.setting.method;  // chance is 35
  }
}

TEST(PaperRows, models_by_name) {
  EXPECT_EQ(paper_model_of_name("LLaMA3-8B"), "llama3-8b");
  EXPECT_EQ(paper_model_of_name("models/Meta-Llama-3-8B/"), "llama3-8b");
  EXPECT_EQ(paper_model_of_name("llama3_70b"), "llama3-70b");
  EXPECT_EQ(paper_model_of_name("Llama-2-7b-hf"), "llama2-7b");
  EXPECT_EQ(paper_model_of_name("LLaMA-7B"), "llama-7b");
  for (const char* other : {"", "/", "Meta-Llama-3-8B-Instruct", "Llama-3.1-8B", "tiny-llama3",
                            "synthetic:llama3-8b", "Llama-2-13b-hf"}) {
    EXPECT_EQ(paper_model_of_name(other), "") << other;
  }
}

TEST(PaperRows, models_by_shape) {
  for (const std::string& name : paper_models()) {
    EXPECT_EQ(paper_model_of_shape(synthetic_config(name)), name);
  }
  EXPECT_EQ(paper_model_of_shape(synthetic_config("tiny-test")), "");
  ModelConfig longer = synthetic_config("llama3-8b");
  longer.max_positions = 131072;  // LLaMA 3.1
  EXPECT_EQ(paper_model_of_shape(longer), "");
}

TEST(PaperRows, settings_match_by_method_bits_and_group) {
  const Setting published = {"gptq", 3, 16, 128};
  EXPECT_TRUE(same_setting({"gptq", 3, 16, 128}, published));
  EXPECT_FALSE(same_setting({"gptq", 3, 16, 0}, published));
  EXPECT_FALSE(same_setting({"gptq", 3, 8, 128}, published));
  EXPECT_FALSE(same_setting({"gptq", 2.5, 16, 128}, published));
  EXPECT_FALSE(same_setting({"awq", 3, 16, 128}, published));
  EXPECT_TRUE(same_setting({"billm", 1.19, 16, 0}, {"billm", 1.1, 16, 128}));
  EXPECT_FALSE(same_setting({"billm", 1.19, 16, 64}, {"billm", 1.1, 16, 128}));
  EXPECT_TRUE(same_setting({"fp", 32, 32, 0}, {}));
}

}  // namespace
}  // namespace engine
