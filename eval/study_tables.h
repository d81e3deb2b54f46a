// A study's results in the layout of the paper's tables (eval/paper_rows.h), with the published
// figures beside them if wanted.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "eval/paper_rows.h"
#include "eval/study_record.h"
#include "formats/json.h"

namespace engine {

struct StudyCell {
  std::string text = "-";  // what Markdown shows: the setting, our figure, or "paper / ours / diff"
  bool figure = false;     // a number's place, not a setting's
  std::string paper_text = "-", ours_text = "-", difference_text = "-";
  std::optional<double> paper, ours, standard_error;
  Json details = Json::object();  // what else is known: acc_norm, questions, protocol
};

struct StudyTableRow {
  std::vector<StudyCell> cells;  // one per column
  std::string source;            // of its published figures; "": has none
};

struct StudyTable {
  int number = 0;    // as in the paper; 0: a table that it does not have
  std::string stem;  // of its files: "table1", "real_bits", "divergence"
  std::string title;
  std::vector<std::string> columns;
  std::vector<StudyTableRow> rows;
  std::vector<std::string> notes;
  bool with_paper = false;  // some cell holds a published figure
};

struct StudyTableOptions {
  // Published figures beside ours, and published rows that we have nothing for. Only for models
  // that the paper measured: as configured, or by their name (paper_model_of_name). Random weights
  // and other weights of a shape are compared by their costs only.
  bool paper = false;
};

// Tables 1 to 6 always, if only to say that nothing belongs there: 1 and 3 LLaMA3-8B and every
// model that the paper does not have, 2 and 4 LLaMA3-70B, 5 LLaMA-7B and LLaMA2-7B, 6 costs. Tables
// 7 (MMLU), 8 (fine-tuned models), 9, 11 and 12, "real_bits" and "divergence" if there is something
// for them. Rows: full precision, then the paper's methods in its order, then others; within a
// method groups of 128, other groups, none, each with decreasing bits. Figures that are not finite
// count as absent.
[[nodiscard]] std::vector<StudyTable> study_tables(const std::vector<StudyRow>& rows,
                                                   const StudyTableOptions& options = {});

// STEM.md, STEM.csv and STEM.json of every table, each written completely or not at all. The folder
// must exist. In CSV a figure with published ones is three columns. Throws IoError.
void write_study_tables(const std::vector<StudyTable>& tables, const std::filesystem::path& folder);

[[nodiscard]] std::string table_markdown(const StudyTable& table);
[[nodiscard]] std::string table_csv(const StudyTable& table);  // RFC 4180, but lines end in "\n"
[[nodiscard]] Json table_json(const StudyTable& table);

// 12.3; from 1000 on 1.2e3. Percent and points: 12.3. Costs below 10: 1.23.
[[nodiscard]] std::string figure_text(Figure figure, double value);
// As printed: 6.0, 1.75, 1.9e3 (perplexities from 100 on); whole minutes.
[[nodiscard]] std::string published_text(Figure figure, double value);

// What the row says about a figure; nullopt: nothing, or not finite.
struct OurFigure {
  double value = 0;  // in the units of Figure
  std::optional<double> standard_error;
  Json details = Json::object();
};
[[nodiscard]] std::optional<OurFigure> our_figure(const StudyRow& row, Figure figure);

// "C4", "ARC-c", "Speed (token/s)"
[[nodiscard]] std::string figure_title(Figure figure);

}  // namespace engine
