// Causal attention on the CPU in blocks, without the score matrix.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>

#include "engine/core/parallel.h"
#include "engine/core/view.h"
#include "engine/ops/attn_ops.h"
#include "engine/ops/cpu_kernels.h"
#include "engine/ops/eval_ops.h"

namespace engine {

// AttnOps::attention with the instruction set as an argument.
void cpu_attention(ThreadPool& pool, View q, View k, View v, const AttnShape& shape,
                   std::int64_t batch, View out, Isa isa = best_isa());

// EvalOps::attention_runs, likewise.
void cpu_attention_runs(ThreadPool& pool, View q, View k, View v, const AttnShape& shape, View runs,
                        View out, Isa isa = best_isa());

// A piece of neighbouring key rows.
struct KeySpan {
  std::int64_t row = 0;
  std::int64_t keys = 0;
};

// Neighbouring query rows over a chain of keys: of its K keys (the sum over `spans`, whose unused
// ones are empty and last), query i of n sees the first K - n + i + 1. n <= K.
struct QueryRun {
  std::int64_t first_query = 0;
  std::int64_t queries = 0;
  std::array<KeySpan, run_spans> spans;
};

// The attention of both ops, of checked runs. A run's heads that share a key head are one task, so
// n times their number should not be far above attention_lanes; runs start in the order given.
inline constexpr std::int64_t attention_lanes = 256;
void cpu_attend(ThreadPool& pool, View q, View k, View v, const AttnShape& shape,
                std::span<const QueryRun> runs, View out, Isa isa);

// AttnOps::rope with row r at position(r), which lies within the tables.
void cpu_rope(ThreadPool& pool, View x, std::int64_t head_dim, View cos, View sin,
              const std::function<std::int64_t(std::int64_t)>& position);

}  // namespace engine
