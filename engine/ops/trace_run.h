// How TraceOps counts one call; for the files that implement it.
#pragma once

#include <utility>

#include "engine/ops/trace_ops.h"

namespace engine {

// Far below the number of marks that a backend keeps.
inline constexpr std::size_t max_trace_spans = 2048;

template <class Call>
void TraceOps::run(const char* name, const OpCost& cost, Call&& call) {
  OpStats& s = entry(name);
  const bool timed = time_ && !recording_;
  const std::int64_t from = timed ? ops_.mark() : 0;
  call();
  if (timed) {
    spans_.push_back({&s, from, ops_.mark()});
    if (spans_.size() >= max_trace_spans) resolve_spans();
  }
  ++s.calls;
  s.bytes += cost.bytes;
  s.flops += cost.flops;
}

}  // namespace engine
