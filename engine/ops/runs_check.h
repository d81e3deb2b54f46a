// Checks of EvalOps::rope_rows and attention_runs. Each throws Error(internal) naming what does not
// fit.
#pragma once

#include <cstdint>

#include "engine/ops/eval_ops.h"

namespace engine {

// Shapes and dtypes, the same on every backend; no tensor is read.
void check_rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions);
void check_attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out);

// What a backend that can read them checks of the values: positions within tables of `table_rows`;
// runs inside `query_rows` and `key_rows` as the contract says. Host views.
void check_positions(View positions, std::int64_t table_rows);
void check_runs(View runs, std::int64_t query_rows, std::int64_t key_rows);

}  // namespace engine
