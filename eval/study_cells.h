// Parts that the tables of a study are put together from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "eval/study_tables.h"

namespace engine {

// A place of a setting.
[[nodiscard]] StudyCell text_cell(std::string text);

// `beside`: published figures belong here, whether or not this one is known.
[[nodiscard]] StudyCell figure_cell(Figure figure, std::optional<OurFigure> ours,
                                    std::optional<double> paper, bool beside);

// A number of ours that the paper has no place for.
[[nodiscard]] StudyCell number_cell(std::optional<double> value, int digits);

// The perplexity of one text by its name; `row` may be null.
[[nodiscard]] StudyCell perplexity_cell(const StudyRow* row, const std::string& text);

// "4", "1.7"
[[nodiscard]] std::string bits_text(double bits);
// "128"; "-" for no groups
[[nodiscard]] std::string group_text(std::int64_t group);

// What the paper's layout cannot hold. Without rows if there is nothing.
[[nodiscard]] StudyTable real_bits_table(const std::vector<StudyRow>& rows);
[[nodiscard]] StudyTable divergence_table(const std::vector<StudyRow>& rows);

}  // namespace engine
