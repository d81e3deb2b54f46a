// The study's tables: where rows go, how numbers are written, what stands beside them.
#include "eval/study_tables.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

StudyRow make_row(const std::string& model, const std::string& method, double bits,
                  std::int64_t group) {
  StudyRow row;
  row.model = model;
  row.method = method;
  row.label = method + " " + std::to_string(static_cast<int>(bits)) + " bits";
  row.weight_bits = bits;
  row.group = group;
  return row;
}

StudyRow with_perplexity(StudyRow row, double wikitext2, double c4, double ptb) {
  row.perplexity = {{"wikitext2", "wikitext2-2048", wikitext2, 0.01},
                    {"c4", "c4-old-2048", c4, 0.02},
                    {"ptb", "ptb-old-2048", ptb, 0.03}};
  return row;
}

StudyRow::Score make_score(const std::string& name, std::int64_t n, double acc) {
  StudyRow::Score score;
  score.name = name;
  score.n = n;
  score.acc = acc;
  score.acc_stderr = std::sqrt(acc * (1 - acc) / static_cast<double>(n - 1));
  return score;
}

const StudyTable& find_table(const std::vector<StudyTable>& tables, const std::string& stem) {
  for (const StudyTable& t : tables) {
    if (t.stem == stem) return t;
  }
  throw Error(ErrorCode::usage, "no table " + stem);
}

std::vector<std::string> texts_of(const StudyTableRow& row) {
  std::vector<std::string> out;
  for (const StudyCell& c : row.cells) out.push_back(c.text);
  return out;
}

// The settings of a table's rows: "GPTQ 4/16/128".
std::vector<std::string> settings_of(const StudyTable& table) {
  std::vector<std::string> out;
  for (const StudyTableRow& row : table.rows) {
    std::string text = row.cells[0].text + " ";
    for (std::size_t i = 1; i < row.cells.size() && !row.cells[i].figure; ++i) {
      text += (i > 1 ? "/" : "") + row.cells[i].text;
    }
    out.push_back(text);
  }
  return out;
}

bool has_note(const StudyTable& table, const std::string& part) {
  return std::any_of(table.notes.begin(), table.notes.end(),
                     [&](const std::string& note) { return note.find(part) != std::string::npos; });
}

using Texts = std::vector<std::string>;

// --- Numbers ---

TEST(StudyTables, our_numbers) {
  EXPECT_EQ(figure_text(Figure::c4, 6.138), "6.1");
  EXPECT_EQ(figure_text(Figure::c4, 320.04), "320.0");
  EXPECT_EQ(figure_text(Figure::c4, 999.94), "999.9");
  EXPECT_EQ(figure_text(Figure::c4, 999.96), "1.0e3");
  EXPECT_EQ(figure_text(Figure::c4, 1.7234e6), "1.7e6");
  EXPECT_EQ(figure_text(Figure::c4, 1e300), "1.0e300");
  EXPECT_EQ(figure_text(Figure::piqa, 79.86), "79.9");
  EXPECT_EQ(figure_text(Figure::mme_perception, 1588.26), "1588.3");
  EXPECT_EQ(figure_text(Figure::minutes, 0.372), "0.37");
  EXPECT_EQ(figure_text(Figure::minutes, 9.996), "10.0");
  EXPECT_EQ(figure_text(Figure::token_per_s, 594.23), "594.2");
}

TEST(StudyTables, published_numbers_as_printed) {
  EXPECT_EQ(published_text(Figure::wikitext2, 6), "6.0");
  EXPECT_EQ(published_text(Figure::wikitext2, 95.6), "95.6");
  EXPECT_EQ(published_text(Figure::wikitext2, 1.75), "1.75");
  EXPECT_EQ(published_text(Figure::wikitext2, 210), "2.1e2");
  EXPECT_EQ(published_text(Figure::wikitext2, 1.9e3), "1.9e3");
  EXPECT_EQ(published_text(Figure::average, 36), "36.0");
  EXPECT_EQ(published_text(Figure::mme_perception, 1588.3), "1588.3");
  EXPECT_EQ(published_text(Figure::memory_gb, 30.61), "30.61");
  EXPECT_EQ(published_text(Figure::memory_gb, 16), "16.0");
  EXPECT_EQ(published_text(Figure::minutes, 307), "307");
}

TEST(StudyTables, average_needs_all_five_tasks) {
  StudyRow row = make_row("m", "rtn", 4, 128);
  for (const char* name : {"piqa", "arc_easy", "arc_challenge", "hellaswag"}) {
    row.scores.push_back(make_score(name, 101, 0.5));
  }
  EXPECT_EQ(our_figure(row, Figure::average), std::nullopt);
  row.scores.push_back(make_score("winogrande", 101, 0.75));
  const auto average = our_figure(row, Figure::average);
  ASSERT_TRUE(average);
  EXPECT_NEAR(average->value, 55.0, 1e-12);
  // sqrt(4 * 0.25 / 100 + 0.1875 / 100) / 5, in percent.
  ASSERT_TRUE(average->standard_error);
  EXPECT_NEAR(*average->standard_error, 100 * std::sqrt(0.011875) / 5, 1e-9);
  row.scores.back().acc_stderr.reset();
  EXPECT_FALSE(our_figure(row, Figure::average)->standard_error);
}

TEST(StudyTables, figures_that_are_not_finite_are_absent) {
  StudyRow row = with_perplexity(make_row("m", "rtn", 2, 0), std::nan(""), 12.0, 13.0);
  EXPECT_EQ(our_figure(row, Figure::wikitext2), std::nullopt);
  EXPECT_NEAR(our_figure(row, Figure::c4)->value, 12.0, 0);
  EXPECT_NEAR(*our_figure(row, Figure::c4)->standard_error, 0.24, 1e-12);
  row.perplexity[1].standard_error = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(our_figure(row, Figure::c4)->standard_error);
  row.quantize_s = std::numeric_limits<double>::infinity();
  EXPECT_EQ(our_figure(row, Figure::minutes), std::nullopt);
}

TEST(StudyTables, text_by_name_before_its_variants) {
  StudyRow row = make_row("m", "rtn", 4, 0);
  row.perplexity = {{"c4-new", "c4-new-2048", 9.5, 0}, {"c4", "c4-old-2048", 8.9, 0}};
  EXPECT_EQ(our_figure(row, Figure::c4)->value, 8.9);
  row.perplexity.pop_back();
  EXPECT_EQ(our_figure(row, Figure::c4)->value, 9.5);
  EXPECT_EQ(our_figure(row, Figure::ptb), std::nullopt);
}

// --- Layout ---

TEST(StudyTables, six_tables_whatever_there_is) {
  const std::vector<StudyTable> tables = study_tables({});
  ASSERT_EQ(tables.size(), 6u);
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(tables[i].number, static_cast<int>(i) + 1);
    EXPECT_EQ(tables[i].stem, "table" + std::to_string(i + 1));
    EXPECT_TRUE(tables[i].rows.empty());
    EXPECT_TRUE(has_note(tables[i], "Nothing in this study belongs here"));
  }
  EXPECT_EQ(tables[0].columns, Texts({"Method", "#W", "#A", "#G", "WikiText2", "C4", "PTB"}));
  EXPECT_EQ(tables[1].columns, tables[0].columns);
  EXPECT_EQ(tables[2].columns, Texts({"Method", "#W", "#A", "#G", "PIQA", "ARC-e", "ARC-c",
                                      "HellaSwag", "Wino", "Avg."}));
  EXPECT_EQ(tables[3].columns, tables[2].columns);
  EXPECT_EQ(tables[4].columns, Texts({"Method", "#W", "#A", "#G", "LLaMA-7B WikiText2",
                                      "LLaMA-7B C4", "LLaMA2-7B WikiText2", "LLaMA2-7B C4"}));
  EXPECT_EQ(tables[5].columns,
            Texts({"Method", "#W", "LLaMA2-7B Memory (GB)", "LLaMA2-7B Time (min)",
                   "LLaMA2-7B Speed (token/s)", "LLaMA3-8B Memory (GB)", "LLaMA3-8B Time (min)",
                   "LLaMA3-8B Speed (token/s)"}));
  // Published rows do not fill a table that we have nothing for.
  for (const StudyTable& t : study_tables({}, {.paper = true})) EXPECT_TRUE(t.rows.empty());
}

TEST(StudyTables, rows_in_the_papers_order) {
  const char* m = "LLaMA3-8B";
  std::vector<StudyRow> rows;
  for (const auto& [method, bits, group] : std::vector<std::tuple<const char*, double, int>>{
           {"quipsharp", 2, 0},
           {"pbllm", 1.7, 128},
           {"pbllm", 2, 128},
           {"gptq", 2, 0},
           {"gptq", 4, 64},
           {"gptq", 2, 128},
           {"gptq", 4, 128},
           {"gptq", 4, 0},
           {"rtn", 4, 128},
           {"fp", 16, 0},
           {"slimllm", 3, 128},
       }) {
    rows.push_back(with_perplexity(make_row(m, method, bits, group), 7, 8, 9));
  }
  const std::vector<StudyTable> tables = study_tables(rows);
  EXPECT_EQ(settings_of(find_table(tables, "table1")),
            Texts({"LLaMA3 16/16/-", "RTN 4/16/128", "GPTQ 4/16/128", "GPTQ 2/16/128",
                   "GPTQ 4/16/64", "GPTQ 4/16/-", "GPTQ 2/16/-", "SliM-LLM 3/16/128",
                   "PB-LLM 2/16/128", "PB-LLM 1.7/16/128", "QuIP# 2/16/-"}));
  EXPECT_TRUE(find_table(tables, "table2").rows.empty());
  EXPECT_TRUE(find_table(tables, "table5").rows.empty());
  EXPECT_FALSE(find_table(tables, "table1").with_paper);
}

TEST(StudyTables, published_figures_beside_ours) {
  std::vector<StudyRow> rows = {
      with_perplexity(make_row("LLaMA3-8B", "fp", 16, 0), 6.138, 8.88, 10.6),
      with_perplexity(make_row("LLaMA3-8B", "rtn", 2, 128), 1500, 300, 1.8e4),
      with_perplexity(make_row("LLaMA3-8B", "quipsharp", 2, 0), 8.02, 11, 12),
  };
  rows[1].perplexity.pop_back();
  const StudyTable table = find_table(study_tables(rows, {.paper = true}), "table1");
  ASSERT_EQ(table.rows.size(), 42u);  // the paper's 41, and QuIP#
  EXPECT_EQ(table.title, "Post-training quantization of LLaMA3-8B: perplexity");
  EXPECT_EQ(texts_of(table.rows[0]), Texts({"LLaMA3", "16", "16", "-", "6.1 / 6.1 / 0.0",
                                            "9.2 / 8.9 / -0.3", "10.6 / 10.6 / 0.0"}));
  EXPECT_EQ(texts_of(table.rows[1]),
            Texts({"RTN", "4", "16", "128", "8.5 / - / -", "13.4 / - / -", "14.5 / - / -"}));
  EXPECT_EQ(texts_of(table.rows[3]), Texts({"RTN", "2", "16", "128", "1.9e3 / 1.5e3 / -400.0",
                                            "2.5e4 / 300.0 / -2.5e4", "1.8e4 / - / -"}));
  EXPECT_EQ(texts_of(table.rows[41]),
            Texts({"QuIP#", "2", "16", "-", "- / 8.0 / -", "- / 11.0 / -", "- / 12.0 / -"}));
  EXPECT_EQ(table.rows[0].source, "arXiv 2404.14047v3, Table 1");
  EXPECT_EQ(table.rows[41].source, "");
  EXPECT_TRUE(has_note(table, "Published / ours / difference"));
  EXPECT_TRUE(has_note(table, "mixes variants"));
  EXPECT_TRUE(has_note(table, "c4: protocol c4-old-2048."));
  // All of the paper's rows, in its order.
  std::size_t i = 0;
  for (const PaperFigures& paper : paper_figures()) {
    if (paper.table != 1) continue;
    const StudyTableRow& row = table.rows[i++];
    if (paper.setting.method != "fp") {
      EXPECT_EQ(row.cells[0].text, method_title(paper.setting.method)) << i;
    }
    for (std::size_t f = 0; f < 3; ++f) {
      const auto value = row.cells[4 + f].paper;
      EXPECT_EQ(value.value_or(not_published), paper.values[f]) << i << ' ' << f;
    }
  }
  EXPECT_EQ(i, 41u);
}

TEST(StudyTables, without_the_option_only_ours) {
  const StudyTable table = find_table(
      study_tables({with_perplexity(make_row("LLaMA3-8B", "gptq", 3, 128), 8.1, 12, 13)}),
      "table1");
  ASSERT_EQ(table.rows.size(), 1u);
  EXPECT_EQ(texts_of(table.rows[0]), Texts({"GPTQ", "3", "16", "128", "8.1", "12.0", "13.0"}));
  EXPECT_FALSE(has_note(table, "Published"));
}

TEST(StudyTables, other_models_stand_alone) {
  const std::vector<StudyRow> rows = {
      with_perplexity(make_row("tiny", "gptq", 3, 128), 57.3, 60, 61),
      with_perplexity(make_row("tiny", "fp", 16, 0), 50, 51, 52)};
  const StudyTable table = find_table(study_tables(rows, {.paper = true}), "table1");
  EXPECT_EQ(table.title, "Post-training quantization: perplexity");
  EXPECT_EQ(table.columns.front(), "Model");
  ASSERT_EQ(table.rows.size(), 2u);
  EXPECT_EQ(texts_of(table.rows[0]),
            Texts({"tiny", "FP", "16", "16", "-", "50.0", "51.0", "52.0"}));
  EXPECT_EQ(texts_of(table.rows[1]),
            Texts({"tiny", "GPTQ", "3", "16", "128", "57.3", "60.0", "61.0"}));
  EXPECT_TRUE(has_note(table, "tiny: the paper's rows are of LLaMA3-8B, so only ours are shown."));
  EXPECT_FALSE(table.with_paper);
}

TEST(StudyTables, two_models_in_one_table) {
  const std::vector<StudyRow> rows = {
      with_perplexity(make_row("tiny", "gptq", 3, 128), 57.3, 60, 61),
      with_perplexity(make_row("LLaMA3-8B", "gptq", 3, 128), 8.3, 12, 13)};
  const StudyTable table = find_table(study_tables(rows, {.paper = true}), "table1");
  ASSERT_EQ(table.rows.size(), 42u);
  EXPECT_EQ(table.rows[0].cells[0].text, "LLaMA3-8B");
  EXPECT_EQ(table.rows[9].cells[5].text, "8.2 / 8.3 / +0.1");
  EXPECT_EQ(texts_of(table.rows[41]),
            Texts({"tiny", "GPTQ", "3", "16", "128", "57.3", "60.0", "61.0"}));
}

TEST(StudyTables, which_model_it_is) {
  StudyRow row = with_perplexity(make_row("mine", "fp", 16, 0), 6.1, 9, 10);
  const auto with_paper = [&](const char* stem) {
    return find_table(study_tables({row}, {.paper = true}), stem).with_paper;
  };
  EXPECT_FALSE(with_paper("table1"));
  row.shape = "llama3-8b";  // other weights of this shape
  EXPECT_FALSE(with_paper("table1"));
  row.compared_with = "llama3-8b";
  EXPECT_TRUE(with_paper("table1"));
  row.compared_with = "llama3-70b";
  EXPECT_FALSE(with_paper("table1"));
  EXPECT_TRUE(with_paper("table2"));
  row.compared_with = "";
  row.model = "LLaMA3-8B";
  EXPECT_TRUE(with_paper("table1"));
  row.shape = "";
  EXPECT_TRUE(with_paper("table1"));
  row.shape = "llama2-7b";  // contradicts the name
  EXPECT_FALSE(with_paper("table1"));
  EXPECT_EQ(find_table(study_tables({row}), "table1").rows.size(), 1u);
  row.shape = "llama3-8b";
  row.synthetic = true;  // random weights have no perplexity to compare, but costs
  row.method = "gptq";
  row.weight_bits = 4;
  row.group = 128;
  row.quantize_s = 60;
  EXPECT_FALSE(with_paper("table1"));
  EXPECT_TRUE(with_paper("table6"));
  row.shape = "";
  row.synthetic = false;
  row.model = "synthetic:llama3-8b";
  EXPECT_FALSE(with_paper("table1"));
  EXPECT_TRUE(with_paper("table6"));
}

TEST(StudyTables, accuracies_and_short_sets) {
  StudyRow row = make_row("LLaMA3-8B", "awq", 4, 128);
  for (const auto& [name, n, acc] :
       std::vector<std::tuple<const char*, int, double>>{{"piqa", 1838, 0.791},
                                                         {"arc_easy", 2376, 0.797},
                                                         {"arc_challenge", 1150, 0.493},
                                                         {"hellaswag", 10042, 0.591},
                                                         {"winogrande", 1267, 0.74}}) {
    row.scores.push_back(make_score(name, n, acc));
    row.scores.back().protocol = "lmeval-0.4, 0-shot";
  }
  row.scores[2].acc_norm = 0.52;
  row.scores[2].note = "the data is a filtered copy";
  const StudyTable table = find_table(study_tables({row}, {.paper = true}), "table3");
  const auto found = std::find_if(table.rows.begin(), table.rows.end(), [](const auto& r) {
    return r.cells[0].text == "AWQ" && r.cells[1].text == "4" && r.cells[3].text == "128";
  });
  ASSERT_NE(found, table.rows.end());
  EXPECT_EQ(texts_of(*found), Texts({"AWQ", "4", "16", "128", "79.1 / 79.1 / 0.0",
                                     "79.7 / 79.7 / 0.0", "49.3 / 49.3 / 0.0", "59.1 / 59.1 / 0.0",
                                     "74.0 / 74.0 / 0.0", "68.2 / 68.2 / 0.0"}));
  EXPECT_TRUE(has_note(table, "ARC-c: 1150 questions; the full set has 1172."));
  EXPECT_FALSE(has_note(table, "PIQA: 1838"));
  EXPECT_TRUE(has_note(table, "ARC-c: the data is a filtered copy"));
  EXPECT_TRUE(has_note(table, "Protocol: lmeval-0.4, 0-shot."));
  const Json json = table_json(table);
  const auto index = static_cast<std::size_t>(found - table.rows.begin());
  const Json& cell = json.at("rows").at(index).at("cells").at(6);
  EXPECT_EQ(cell.at("column"), "ARC-c");
  EXPECT_EQ(cell.at("details").at("acc_norm"), 0.52);
  EXPECT_EQ(cell.at("details").at("questions"), 1150);
  EXPECT_NEAR(cell.at("standard_error").get<double>(), 1.4749, 1e-3);
  EXPECT_NEAR(cell.at("difference").get<double>(), 0.0, 1e-9);
  // No perplexities, so no Table 1.
  EXPECT_TRUE(find_table(study_tables({row}), "table1").rows.empty());
}

TEST(StudyTables, mmlu_goes_to_table_7_and_fine_tuning_to_8) {
  StudyRow fp = make_row("LLaMA3-8B", "fp", 16, 0);
  fp.scores = {make_score("mmlu", 14042, 0.651), make_score("mmlu.stem", 3018, 0.55),
               make_score("piqa", 1838, 0.8)};
  StudyRow gptq = make_row("LLaMA3-8B", "gptq", 4, 128);
  gptq.scores = {make_score("mmlu", 14042, 0.63), make_score("piqa", 1838, 0.79)};
  std::vector<StudyTable> tables = study_tables({gptq, fp}, {.paper = true});
  ASSERT_EQ(tables.size(), 7u);
  const StudyTable& mmlu = find_table(tables, "table7");
  EXPECT_EQ(mmlu.columns,
            Texts({"Method", "#W", "#G", "Hums.", "STEM", "Social", "Other", "Avg."}));
  EXPECT_EQ(settings_of(mmlu),
            Texts({"LLaMA3 16/-", "NormalFloat 4/-", "QLoRA 4/-", "IR-QLoRA 4/-", "GPTQ 4/128"}));
  EXPECT_EQ(mmlu.rows[0].cells[7].text, "64.8 / 65.1 / +0.3");
  EXPECT_EQ(mmlu.rows[0].cells[3].text, "59.0 / - / -");
  StudyRow qlora = make_row("LLaMA3-8B", "qlora", 4, 64);
  qlora.scores = {make_score("piqa", 1838, 0.77)};
  tables = study_tables({fp, qlora, gptq}, {.paper = true});
  const StudyTable& tuned = find_table(tables, "table8");
  EXPECT_EQ(settings_of(tuned),
            Texts({"LLaMA3 16/-", "NormalFloat 4/-", "QLoRA 4/64", "IR-QLoRA 4/-"}));
  EXPECT_EQ(tuned.rows[0].cells[3].text, "79.9 / 80.0 / +0.1");
  EXPECT_EQ(tuned.rows[2].cells[3].text, "76.6 / 77.0 / +0.4");
  for (const std::string& s : settings_of(find_table(tables, "table3"))) {
    EXPECT_EQ(s.find("QLoRA"), std::string::npos);
  }
}

TEST(StudyTables, the_two_small_models_share_lines) {
  std::vector<StudyRow> rows = {
      with_perplexity(make_row("LLaMA2-7B", "gptq", 3, 128), 6.34, 7.96, 40),
      with_perplexity(make_row("LLaMA-7B", "gptq", 3, 128), 6.53, 7.84, 9)};
  const StudyTable plain = find_table(study_tables(rows), "table5");
  ASSERT_EQ(plain.rows.size(), 1u);
  EXPECT_EQ(plain.columns,
            Texts({"Method", "#W", "#A", "#G", "LLaMA-7B WikiText2", "LLaMA-7B C4", "LLaMA-7B ptb",
                   "LLaMA2-7B WikiText2", "LLaMA2-7B C4", "LLaMA2-7B ptb"}));
  EXPECT_EQ(texts_of(plain.rows[0]),
            Texts({"GPTQ", "3", "16", "128", "6.5", "7.8", "9.0", "6.3", "8.0", "40.0"}));
  for (StudyRow& row : rows) row.perplexity.pop_back();
  rows.erase(rows.begin() + 1);
  const StudyTable table = find_table(study_tables(rows, {.paper = true}), "table5");
  ASSERT_EQ(table.rows.size(), 25u);
  EXPECT_EQ(table.rows[5].cells[4].text, "6.6 / - / -");
  EXPECT_EQ(table.rows[5].cells[6].text, "6.3 / 6.3 / 0.0");
  EXPECT_EQ(table.rows[4].cells[7].text, "-");  // neither has it
}

TEST(StudyTables, costs) {
  std::vector<StudyRow> rows;
  for (const std::int64_t group : {128, 64}) {
    StudyRow row = make_row("LLaMA3-8B", "gptq", 4, group);
    row.quantize_peak_bytes = 6'010'000'000;
    row.quantize_s = 22.3;
    row.decode_token_per_s = 594.2;
    row.device = "NVIDIA H200";
    rows.push_back(row);
  }
  StudyRow fp = make_row("LLaMA3-8B", "fp", 16, 0);
  fp.decode_token_per_s = 252.4;
  rows.push_back(fp);
  StudyRow tiny = make_row("tiny", "rtn", 4, 128);
  tiny.quantize_s = 3;
  rows.push_back(tiny);
  const StudyTable table = find_table(study_tables(rows, {.paper = true}), "table6");
  ASSERT_EQ(table.columns.size(), 12u);
  EXPECT_EQ(table.columns[6], "LLaMA3-8B Memory (GB)");
  EXPECT_EQ(table.columns[10], "tiny Time (min)");
  EXPECT_EQ(settings_of(table), Texts({"FP 16/-", "GPTQ 4/128", "GPTQ 4/64", "SmoothQuant 4/128",
                                       "AWQ 4/128", "OmniQuant 4/128", "RTN 4/128"}));
  const auto cells = [&](std::size_t row) {
    const Texts all = texts_of(table.rows[row]);
    return Texts(all.begin() + 3, all.begin() + 9);
  };
  EXPECT_EQ(cells(0), Texts({"-", "-", "-", "-", "-", "- / 252.4 / -"}));
  EXPECT_EQ(cells(1), Texts({"26.4 / - / -", "17 / - / -", "159.4 / - / -", "40.3 / 6.01 / -34.3",
                             "19 / 0.37 / -18.6", "61.2 / 594.2 / +533.0"}));
  // The published speed holds for groups of 128 only.
  EXPECT_EQ(cells(2)[5], "- / 594.2 / -");
  EXPECT_EQ(cells(3), Texts({"13.5 / - / -", "7 / - / -", "-", "16.0 / - / -", "15 / - / -", "-"}));
  EXPECT_EQ(table.rows[6].cells[10].text, "0.05");
  EXPECT_TRUE(has_note(table, "Device: NVIDIA H200."));
  EXPECT_TRUE(has_note(table, "tiny: the paper's rows are of LLaMA2-7B, LLaMA3-8B"));
}

TEST(StudyTables, rows_alike_are_told_apart) {
  StudyRow a = with_perplexity(make_row("LLaMA3-8B", "gptq", 4, 128), 6.5, 9, 10);
  StudyRow b = a;
  b.label = "gptq 4 bits g128 act-order";
  b.perplexity[0].value = 6.4;
  const StudyTable table = find_table(study_tables({a, b}, {.paper = true}), "table1");
  ASSERT_EQ(table.rows.size(), 42u);
  EXPECT_EQ(table.rows[8].cells[0].text, "GPTQ (gptq 4 bits)");
  EXPECT_EQ(table.rows[9].cells[0].text, "GPTQ (gptq 4 bits g128 act-order)");
  EXPECT_EQ(table.rows[9].cells[4].text, "6.5 / 6.4 / -0.1");
}

TEST(StudyTables, failed_rows_are_named) {
  StudyRow row = make_row("LLaMA3-8B", "pbllm", 2, 128);
  row.failed = "damping: expected a positive definite matrix, found pivot -0.1";
  const StudyTable table = find_table(study_tables({row}), "table1");
  ASSERT_EQ(table.rows.size(), 1u);
  EXPECT_EQ(texts_of(table.rows[0]), Texts({"PB-LLM", "2", "16", "128", "-", "-", "-"}));
  EXPECT_TRUE(has_note(table, "LLaMA3-8B, pbllm 2 bits: failed: damping: expected"));
}

TEST(StudyTables, notes_of_rows) {
  StudyRow fp = with_perplexity(make_row("m", "fp", 16, 0), 5, 6, 7);
  StudyRow a = with_perplexity(make_row("m", "gptq", 4, 128), 5, 6, 7);
  StudyRow b = with_perplexity(make_row("m", "awq", 4, 128), 5, 6, 7);
  a.notes = {"Calibration: 128 x 2048", "seed 1"};
  b.notes = {"Calibration: 128 x 2048"};
  const StudyTable table = find_table(study_tables({fp, a, b}), "table1");
  EXPECT_EQ(std::count(table.notes.begin(), table.notes.end(), "Calibration: 128 x 2048"), 1);
  EXPECT_TRUE(has_note(table, "m, gptq 4 bits: seed 1"));
}

TEST(StudyTables, texts_that_the_paper_lacks_are_more_columns) {
  StudyRow row = with_perplexity(make_row("LLaMA3-8B", "fp", 16, 0), 6.1, 8.9, 10.6);
  row.perplexity.push_back({"c4-new", "c4-new-2048", 9.45, 0.01});
  const StudyTable table = find_table(study_tables({row}, {.paper = true}), "table1");
  EXPECT_EQ(table.columns.back(), "c4-new");
  EXPECT_EQ(table.rows[0].cells[5].text, "9.2 / 8.9 / -0.3");
  EXPECT_EQ(table.rows[0].cells[7].text, "9.4");
  EXPECT_EQ(table.rows[1].cells[7].text, "-");
}

TEST(StudyTables, bits_and_divergence) {
  StudyRow row = make_row("m", "billm", 1.1, 128);
  row.label = "";
  row.bits_nominal = 1.19;
  row.bits_stored = 3.19;
  row.file_bytes = 4'870'000'000;
  row.divergence = {{"wikitext2", 0.12345, 0.05, 0.9, 3.0, 0.876}};
  const std::vector<StudyTable> tables = study_tables({make_row("m", "fp", 16, 0), row});
  const StudyTable& bits = find_table(tables, "real_bits");
  ASSERT_EQ(bits.rows.size(), 1u);
  EXPECT_EQ(bits.number, 0);
  EXPECT_EQ(texts_of(bits.rows[0]),
            Texts({"m", "BiLLM", "1.1", "16", "128", "1.190", "3.190", "-", "-", "4.870"}));
  const StudyTable& divergence = find_table(tables, "divergence");
  EXPECT_EQ(texts_of(divergence.rows.at(0)),
            Texts({"m", "BiLLM", "1.1", "16", "128", "wikitext2", "0.1235", "0.0500", "0.9000",
                   "3.0000", "87.60"}));
  EXPECT_EQ(divergence.columns.size(), divergence.rows[0].cells.size());
  EXPECT_EQ(bits.columns.size(), bits.rows[0].cells.size());
}

// --- Files ---

StudyTable strange_table() {
  StudyTable table;
  table.number = 1;
  table.stem = "table1";
  table.title = "A | B";
  table.columns = {"Method", "C4"};
  StudyCell name, figure;
  name.text = "a|b, \"c\"\n*d*";
  figure.figure = true;
  figure.ours = 6.123456;
  figure.ours_text = figure.text = "6.1";
  table.rows = {{{name, figure}, ""}};
  table.notes = {"one <two>"};
  return table;
}

TEST(StudyTables, markdown_escapes) {
  EXPECT_EQ(table_markdown(strange_table()),
            "# Table 1. A \\| B\n\n"
            "| Method          |  C4 |\n"
            "|-----------------|----:|\n"
            "| a\\|b, \"c\" \\*d\\* | 6.1 |\n"
            "\n- one \\<two\\>\n");
}

TEST(StudyTables, csv_escapes_and_splits) {
  StudyTable table = strange_table();
  EXPECT_EQ(table_csv(table), "Method,C4\n\"a|b, \"\"c\"\"\n*d*\",6.1\n");
  table.rows.push_back(table.rows[0]);
  StudyCell& cell = table.rows[1].cells[1];
  table.rows[1].cells[0].text = "GPTQ";
  cell.paper = 6.5;
  cell.paper_text = "6.5";
  cell.difference_text = "-0.4";
  cell.text = "6.5 / 6.1 / -0.4";
  EXPECT_EQ(table_csv(table),
            "Method,C4 paper,C4 ours,C4 difference\n"
            "\"a|b, \"\"c\"\"\n*d*\",-,6.1,-\nGPTQ,6.5,6.1,-0.4\n");
}

TEST(StudyTables, json_has_all_digits) {
  const Json json = table_json(strange_table());
  EXPECT_EQ(json.at("table"), 1);
  EXPECT_EQ(json.at("rows").at(0).at("cells").at(1).at("ours"), 6.123456);
  EXPECT_FALSE(json.at("rows").at(0).at("cells").at(1).contains("paper"));
  EXPECT_FALSE(json.at("rows").at(0).contains("source"));
}

TEST(StudyTables, files_of_every_table) {
  const testing::TempDir dir;
  StudyRow row = with_perplexity(make_row("LLaMA3-8B", "rtn", 4, 128), 8.4, 13, 14);
  row.label = "bytes \xff";  // not UTF-8
  row.failed = "later";
  write_study_tables(study_tables({row}, {.paper = true}), dir.path());
  for (int n = 1; n <= 6; ++n) {
    for (const char* ext : {".md", ".csv", ".json"}) {
      EXPECT_TRUE(std::filesystem::exists(dir.path() / ("table" + std::to_string(n) + ext)));
    }
  }
  const Json json = read_json_file(dir.path() / "table1.json");
  EXPECT_EQ(json.at("rows").at(1).at("cells").at(4).at("ours"), 8.4);
  EXPECT_EQ(json.at("rows").at(1).at("cells").at(4).at("paper"), 8.5);
  EXPECT_EQ(json.at("rows").at(1).at("source"), "arXiv 2404.14047v3, Table 1");
  EXPECT_THROW(write_study_tables(study_tables({row}), dir.path() / "absent"), IoError);
}

}  // namespace
}  // namespace engine
