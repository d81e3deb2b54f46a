// The tables that the paper does not have.
#include "eval/study_cells.h"

namespace engine {
namespace {

// Columns that tell rows of a table of our own apart.
std::vector<StudyCell> setting_cells(const StudyRow& row) {
  return {text_cell(row.model), text_cell(row.label.empty() ? method_title(row.method) : row.label),
          text_cell(bits_text(row.weight_bits)), text_cell(std::to_string(row.activation_bits)),
          text_cell(group_text(row.group))};
}

}  // namespace

StudyTable real_bits_table(const std::vector<StudyRow>& all) {
  StudyTable table;
  table.stem = "real_bits";
  table.title = "Bits per weight and file sizes";
  table.columns = {
      "Model",    "Method", "#W", "#A", "#G", "nominal", "stored", "on disk", "whole model on disk",
      "file (GB)"};
  for (const StudyRow& row : all) {
    if (!row.bits_nominal && !row.bits_stored && !row.bits_on_disk && !row.file_bytes) continue;
    std::vector<StudyCell> cells = setting_cells(row);
    for (const auto& bits :
         {row.bits_nominal, row.bits_stored, row.bits_on_disk, row.model_bits_on_disk}) {
      cells.push_back(number_cell(bits, 3));
    }
    std::optional<double> gigabytes;
    if (row.file_bytes) gigabytes = static_cast<double>(*row.file_bytes) * 1e-9;
    cells.push_back(number_cell(gigabytes, 3));
    table.rows.push_back({std::move(cells), ""});
  }
  table.notes = {
      "Bits per weight of the quantized linears: codes alone, with scales, zeros and maps, and in "
      "the file after lossless compression. Whole model: with embeddings and head."};
  return table;
}

StudyTable divergence_table(const std::vector<StudyRow>& all) {
  StudyTable table;
  table.stem = "divergence";
  table.title = "Divergence from the unquantized model";
  table.columns = {"Model",
                   "Method",
                   "#W",
                   "#A",
                   "#G",
                   "text",
                   "mean",
                   "median",
                   "99 %",
                   "maximum",
                   "same top token (%)"};
  for (const StudyRow& row : all) {
    for (const StudyRow::Divergence& d : row.divergence) {
      std::vector<StudyCell> cells = setting_cells(row);
      cells.push_back(text_cell(d.text));
      for (const double nats : {d.mean, d.median, d.p99, d.maximum}) {
        cells.push_back(number_cell(nats, 4));
      }
      cells.push_back(number_cell(100 * d.same_top, 2));
      table.rows.push_back({std::move(cells), ""});
    }
  }
  table.notes = {"Kullback-Leibler divergence of the next token's distribution, in nats."};
  return table;
}

}  // namespace engine
