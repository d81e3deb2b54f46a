// The part of TraceOps for evaluation ops and fused ops.
#include "engine/ops/trace_run.h"

namespace engine {

// EvalOps

void TraceOps::rope_rows(View x, std::int64_t head_dim, View cos, View sin, View positions) {
  run("rope_rows", cost::rope_rows(x, positions),
      [&] { ops_.rope_rows(x, head_dim, cos, sin, positions); });
}

void TraceOps::attention_runs(View q, View k, View v, const AttnShape& shape, View runs, View out) {
  run("attention_runs", cost::attention_runs(q, k, v, runs, out),
      [&] { ops_.attention_runs(q, k, v, shape, runs, out); });
}

void TraceOps::compare_logits(View reference, View logits, View target, View out) {
  run("compare_logits", cost::compare_logits(reference, logits, out),
      [&] { ops_.compare_logits(reference, logits, target, out); });
}

// Fused ops

void TraceOps::qkv_step(const QkvStep& s) {
  run("qkv_step", cost::qkv_step(s), [&] { ops_.qkv_step(s); });
}

void TraceOps::gate_up(const GateUp& s) {
  run("gate_up", cost::gate_up(s), [&] { ops_.gate_up(s); });
}

void TraceOps::norm_linear(const NormLinear& s) {
  run("norm_linear", cost::norm_linear(s), [&] { ops_.norm_linear(s); });
}

void TraceOps::block_tail(const BlockTail& s) {
  run("block_tail", cost::block_tail(s), [&] { ops_.block_tail(s); });
}

void TraceOps::linear(View x, const Linear& w, View out, bool accumulate, View workspace,
                      PackedKernel kernel) {
  run("linear", cost::linear(x, w, out, accumulate),
      [&] { ops_.linear(x, w, out, accumulate, workspace, kernel); });
}

void TraceOps::linears(View x, std::span<const LinearOut> all, View workspace) {
  OpCost cost;
  for (const LinearOut& one : all) {
    const OpCost own = cost::linear(x, *one.w, one.out, false);
    cost.bytes += own.bytes - (&one == all.data() ? 0 : x.bytes());  // x is read once
    cost.flops += own.flops;
  }
  run("linears", cost, [&] { ops_.linears(x, all, workspace); });
}

}  // namespace engine
