#include "engine/ops/runs_check.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "engine/core/error.h"

namespace engine {
namespace {

constexpr std::int64_t max_head_dim = 256;
constexpr std::int64_t max_keys = 1 << 30;  // positions are i32

bool is_small_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

// The keys of run `r`, whose columns are `run`.
std::int64_t check_spans(const std::int32_t* run, std::int64_t r, std::int64_t key_rows) {
  std::int64_t keys = 0;
  bool ended = false;
  for (std::int64_t s = 0; s < run_spans; ++s) {
    const std::int64_t first = run[2 + 2 * s];
    const std::int64_t n = run[3 + 2 * s];
    const auto span = [&] {
      return "attention_runs: run " + std::to_string(r) + ", span " + std::to_string(s) + ": ";
    };
    if (n == 0) {
      REQUIRE(first == 0,
              span() + "expected row 0 of an unused span, found " + std::to_string(first));
      ended = true;
      continue;
    }
    REQUIRE(!ended,
            span() + "expected none after an unused one, found " + std::to_string(n) + " keys");
    REQUIRE(first >= 0 && n > 0 && first + n <= key_rows,
            span() + "expected rows within " + std::to_string(key_rows) + ", found " +
                std::to_string(n) + " from " + std::to_string(first));
    keys += n;
  }
  return keys;
}

}  // namespace

void check_rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) {
  REQUIRE(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0 && is_small_float(x.dtype),
          "rope_rows of " + x.shape() + " with heads of " + std::to_string(head_dim));
  REQUIRE(cos.cols == head_dim / 2 && sin.cols == head_dim / 2 && cos.rows == sin.rows &&
              cos.dtype == DType::f32 && sin.dtype == DType::f32,
          "rope_rows with tables " + cos.shape() + " and " + sin.shape());
  REQUIRE(x.empty() ||
              (positions.rows == x.rows && positions.cols == 1 && positions.dtype == DType::i32),
          "rope_rows: expected positions i32 [" + std::to_string(x.rows) + ", 1], found " +
              positions.shape());
}

void check_attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out) {
  REQUIRE(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 &&
              shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= max_head_dim,
          "attention_runs with " + std::to_string(shape.heads) + " heads, " +
              std::to_string(shape.kv_heads) + " kv heads of " + std::to_string(shape.head_dim) +
              " (even, at most 256)");
  REQUIRE(q.cols == shape.heads * shape.head_dim && k.cols == shape.kv_heads * shape.head_dim &&
              v.rows == k.rows && v.cols == k.cols && out.rows == q.rows && out.cols == q.cols,
          "attention_runs of " + q.shape() + " over " + k.shape() + " and " + v.shape() + " into " +
              out.shape());
  REQUIRE(
      is_small_float(q.dtype) && q.dtype == k.dtype && q.dtype == v.dtype && q.dtype == out.dtype,
      "attention_runs of several dtypes: " + q.shape() + ", " + k.shape() + ", " + v.shape() +
          ", " + out.shape());
  REQUIRE(runs.empty() || (runs.cols == run_columns && runs.dtype == DType::i32),
          "attention_runs: expected runs i32 [runs, " + std::to_string(run_columns) + "], found " +
              runs.shape());
}

void check_positions(View positions, std::int64_t table_rows) {
  const std::int32_t* at = positions.host<std::int32_t>();
  for (std::int64_t r = 0; r < positions.rows; ++r) {
    const std::int64_t position = at[r * positions.stride];
    REQUIRE(position >= 0 && position < table_rows,
            "rope_rows: row " + std::to_string(r) + ": expected a position below " +
                std::to_string(table_rows) + ", found " + std::to_string(position));
  }
}

void check_runs(View runs, std::int64_t query_rows, std::int64_t key_rows) {
  const std::int32_t* at = runs.host<std::int32_t>();
  std::vector<std::pair<std::int64_t, std::int64_t>> written;  // first row, end
  written.reserve(static_cast<std::size_t>(runs.rows));
  for (std::int64_t r = 0; r < runs.rows; ++r) {
    const std::int32_t* run = at + r * runs.stride;
    const std::int64_t first = run[0];
    const std::int64_t n = run[1];
    REQUIRE(n >= 1 && n <= run_queries && first >= 0 && first + n <= query_rows,
            "attention_runs: run " + std::to_string(r) + ": expected 1 to " +
                std::to_string(run_queries) + " queries within " + std::to_string(query_rows) +
                " rows, found " + std::to_string(n) + " from " + std::to_string(first));
    const std::int64_t keys = check_spans(run, r, key_rows);
    REQUIRE(n <= keys && keys <= max_keys, "attention_runs: run " + std::to_string(r) +
                                               ": expected " + std::to_string(n) +
                                               " to 2^30 keys, found " + std::to_string(keys));
    written.emplace_back(first, first + n);
  }
  std::sort(written.begin(), written.end());
  for (std::size_t i = 1; i < written.size(); ++i) {
    REQUIRE(written[i - 1].second <= written[i].first,
            "attention_runs: two runs write row " + std::to_string(written[i].first));
  }
}

}  // namespace engine
