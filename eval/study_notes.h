// Which of the paper's models and tables a result belongs to, and the notes below a table.
#pragma once

#include <string>
#include <vector>

#include "eval/study_tables.h"

namespace engine {

// The paper's model whose perplexities and accuracies the row's stand beside: the configured one,
// or the one that its name says and its shape does not contradict (a shape alone does not tell a
// fine-tuned model from its base); "": none, as for random weights.
[[nodiscard]] std::string quality_model(const StudyRow& row);
// The same for costs, for which the shape is enough.
[[nodiscard]] std::string cost_model(const StudyRow& row);

// Table 8, which has full precision beside its rows only.
inline constexpr int fine_tuning_table = 8;

// Whether the row has a line in this table for its own sake.
[[nodiscard]] bool belongs(const StudyRow& row, const PaperTable& table);

// Adds the notes of a table that is filled with these rows.
void add_notes(StudyTable& table, const std::vector<const StudyRow*>& rows,
               const StudyTableOptions& options);

}  // namespace engine
