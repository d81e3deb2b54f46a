// Contract: what evaluation needs beyond the other ops: sequences of different lengths that share
// their beginnings, and distances between distributions.
#pragma once

#include <cstdint>

#include "engine/core/view.h"
#include "engine/ops/attn_ops.h"

namespace engine {

// A run: up to run_queries neighbouring query rows that see one chain of keys. The chain is up to
// run_spans pieces of neighbouring key rows, first to last; of its K keys, query i of n sees the
// first K - n + i + 1. As a row of i32 [runs, run_columns]:
// {first query row, n, then run_spans pairs (first key row, keys)}; unused pairs are 0, 0 and last.
inline constexpr std::int64_t run_queries = 64;
inline constexpr std::int64_t run_spans = 4;
inline constexpr std::int64_t run_columns = 2 + 2 * run_spans;

class EvalOps {
 public:
  virtual ~EvalOps() = default;

  // AttnOps::rope with row r of x at positions[r]. positions i32 [rows, 1], each within the tables
  // (checked on cpu; on cuda the caller guarantees it).
  virtual void rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) = 0;

  // AttnOps::attention for runs. q, out [rows, heads * head_dim]; k, v [key rows, kv_heads *
  // head_dim]; runs as above: they lie inside q and k, 1 <= n <= run_queries, n <= K (checked on
  // cpu; on cuda the caller guarantees it), and no two write the same row. Rows of out that are in
  // no run are left alone. One dtype. Needs no workspace.
  virtual void attention_runs(View q, View k, View v, const AttnShape& shape, View runs,
                              View out) = 0;

  // Distance of q = softmax(logits[r]) from p = softmax(reference[r]), f64 [rows, 4]:
  // {sum_j p_j (log p_j - log q_j) in nats, at least 0; 1 if both have the same first maximum, else
  // 0; log p_t; log q_t with t = target[r]}. A negative target gives 0 for the last two. Logits and
  // reference f32 [rows, vocab], target i32 [rows, 1]. Maxima and log-sum-exp as in row_nll, sums
  // in f64 (cpu) or f32 partial sums of f64 totals (cuda). NaN or infinity in a row give NaN.
  virtual void compare_logits(View reference, View logits, View target, View out) = 0;
};

}  // namespace engine
