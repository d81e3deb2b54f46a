// Which tokens of a set of requests are computed, in which order, and what each attends to.
//
// The inputs of all requests (their tokens without the last) form a prefix tree. A segment is an
// edge of it: tokens that the same requests share. Every segment is computed once and attends to
// the chain of segments above it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/ops/eval_ops.h"
#include "eval/score.h"

namespace engine {

struct Segment {
  std::int64_t parent = -1;    // index into ScorePlan::segments, before this one; -1: none
  std::int64_t request = 0;    // one that contains it
  std::int64_t position = 0;   // of its first token in that request
  std::int64_t rows = 0;       // tokens, at least 1
  std::int64_t first_row = 0;  // of the pass; segments lie in order
};

// A token to be predicted from a row.
struct ScoreTarget {
  std::int64_t row = 0;
  std::int32_t token = 0;
  std::int64_t request = 0;
};

struct ScoreOptions {
  bool share = true;
  bool pack = true;
  std::int64_t batch_rows = 16384;
};

// Rows of keys and values moved to the front, where the batches to come find them.
struct KeptCopy {
  std::int64_t from = 0, to = 0, rows = 0;
};

// Neighbouring segments that are computed together.
struct ScoreBatch {
  std::int64_t first_row = 0, rows = 0;
  std::int64_t first_run = 0, runs = 0;  // into ScorePlan::runs
  std::vector<KeptCopy> copies;          // after the batch
};

struct ScorePlan {
  std::vector<Segment> segments;
  std::vector<ScoreTarget> targets;     // by row, then request
  std::vector<std::int32_t> ids;        // token of each row
  std::vector<std::int32_t> positions;  // of each row in its sequence
  std::vector<std::int32_t> runs;       // rows of run_columns, for all batches
  std::vector<ScoreBatch> batches;
  std::int64_t kept = 0;        // rows of keys and values kept in front of a batch's own
  std::int64_t batch_rows = 0;  // the largest batch
  std::int64_t longest = 0;     // tokens of the longest sequence
  std::int64_t pairs = 0;       // visible (query, key) pairs

  [[nodiscard]] std::int64_t rows() const { return static_cast<std::int64_t>(ids.size()); }
};

// `order`: indices of the requests to plan, sorted by sorted_requests(). Two equal inputs are one.
[[nodiscard]] ScorePlan plan_scores(std::span<const ScoreRequest> requests,
                                    std::span<const std::int64_t> order,
                                    const ScoreOptions& options);

// Indices of all requests, by their tokens.
[[nodiscard]] std::vector<std::int64_t> sorted_requests(std::span<const ScoreRequest> requests);

}  // namespace engine
