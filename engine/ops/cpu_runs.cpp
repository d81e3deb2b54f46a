// Rotation and attention of sequences that share their beginnings, on the CPU.
#include <algorithm>
#include <vector>

#include "engine/ops/cpu_attention.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/runs_check.h"

namespace engine {
namespace {

// The part [begin, end) of a run's queries, with the keys that its last one sees.
QueryRun part_of(const QueryRun& run, std::int64_t begin, std::int64_t end) {
  QueryRun part = run;
  part.first_query += begin;
  part.queries = end - begin;
  std::int64_t hidden = run.queries - end;
  for (auto span = part.spans.rbegin(); span != part.spans.rend(); ++span) {
    const std::int64_t cut = std::min(hidden, span->keys);
    span->keys -= cut;
    hidden -= cut;
  }
  return part;
}

}  // namespace

void cpu_attention_runs(ThreadPool& pool, View q, View k, View v, const AttnShape& shape, View runs,
                        View out, Isa isa) {
  check_attention_runs(q, k, v, shape, runs, out);
  REQUIRE(q.device == DeviceKind::cpu && k.device == DeviceKind::cpu &&
              v.device == DeviceKind::cpu && out.device == DeviceKind::cpu,
          "attention_runs: host views");
  if (runs.empty()) return;
  check_runs(runs, q.rows, k.rows);
  const std::int64_t queries =
      std::max<std::int64_t>(1, attention_lanes / (shape.heads / shape.kv_heads));
  const std::int32_t* at = runs.host<std::int32_t>();
  std::vector<QueryRun> parts;
  for (std::int64_t r = 0; r < runs.rows; ++r) {
    const std::int32_t* columns = at + r * runs.stride;
    QueryRun run{columns[0], columns[1], {}};
    for (std::size_t s = 0; s < run.spans.size(); ++s) {
      run.spans[s] = {columns[2 + 2 * s], columns[3 + 2 * s]};
    }
    for (std::int64_t end = run.queries; end > 0; end -= queries) {
      parts.push_back(part_of(run, std::max<std::int64_t>(0, end - queries), end));
    }
  }
  cpu_attend(pool, q, k, v, shape, parts, out, isa);
}

void CpuOps::attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out) {
  cpu_attention_runs(pool_, q, k, v, shape, runs, out);
}

void CpuOps::rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) {
  check_rope_rows(x, head_dim, cos, sin, positions);
  if (x.empty()) return;
  check_positions(positions, cos.rows);
  const std::int32_t* at = positions.host<std::int32_t>();
  cpu_rope(pool_, x, head_dim, cos, sin,
           [at, &positions](std::int64_t r) { return at[r * positions.stride]; });
}

}  // namespace engine
