// The options of a uniform grid, shared by the methods that end in one.
#pragma once

#include <CLI/CLI.hpp>

#include "engine/model/config.h"
#include "engine/weight/grid_spec.h"
#include "formats/json.h"

namespace engine {

// --bits --group --sym --mse --scale-dtype
void declare_grid_options(CLI::App& app, GridSpec& spec);
// Bits in range, a group that divides every linear's inputs, options that exclude each other.
void check_grid_options(const GridSpec& spec, const ModelConfig& config);
[[nodiscard]] Json grid_options(const GridSpec& spec);

[[nodiscard]] const char* grid_rule_name(GridRule rule);

}  // namespace engine
