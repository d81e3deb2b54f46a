// The published figures that `bench table6` puts beside its own.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "eval/paper_rows.h"

namespace engine {

using PaperRow = PaperCost;

// The row of a method for a model of this shape at this width; null if nothing was published.
[[nodiscard]] inline const PaperRow* find_paper_row(std::string_view method,
                                                    const ModelConfig& config, std::int64_t bits) {
  if (bits != paper_bits) return nullptr;
  const std::string model = paper_model_of_shape(config);
  for (const PaperRow& row : paper_table6) {
    if (row.method == method && row.model == model) return &row;
  }
  return nullptr;
}

// The row's speed, which holds for its group only.
[[nodiscard]] inline std::optional<double> published_speed(const PaperRow& row,
                                                           std::int64_t group) {
  return group == paper_group ? row.token_per_s : std::nullopt;
}

}  // namespace engine
