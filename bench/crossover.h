// The table that the automatic choice of a packed product's kernel is set from.
#pragma once

#include <regex>
#include <string>
#include <vector>

#include "engine/ops/ops.h"
#include "formats/json.h"

namespace engine {

// For every linear shape of `models` and every width of codes (group 128, zeros stored) whose name
// "llama3-8b/gate/b4g128" matches `filter`: microseconds of the vector, matrix and expand kernels
// for 1 to `max_rows` rows of x, what `automatic` takes, and which kernel wins.
[[nodiscard]] Json measure_crossover(Ops& ops, Ledger& ledger,
                                     const std::vector<std::string>& models,
                                     const std::regex& filter, int repeat, std::int64_t max_rows);

// One Markdown table per shape.
[[nodiscard]] std::string crossover_tables(const Json& rows);

}  // namespace engine
