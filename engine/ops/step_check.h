// Shape checks of StepOps, the same on every backend. Each throws Error(internal) naming what does
// not fit; none of them reads a tensor.
#pragma once

#include <cstdint>

#include "engine/ops/step_ops.h"

namespace engine {

// A cache of whole heads of head_dim, either plain in `dtype` or codes with their scales.
void check_cache(const char* op, const KvCache& cache, std::int64_t head_dim, DType dtype);
// position, step, ...: one i32.
void check_scalar(const char* op, View v);

void check_rope_step(View x, std::int64_t head_dim, View cos, View sin, View position);
// k and v as `rows` tokens for a fitting cache.
void check_append(const char* op, View k, View v, std::int64_t rows, std::int64_t head_dim,
                  const KvCache& cache);
// The tokens of StepOps::kv_append lie inside the cache.
void check_append_range(View k, const KvCache& cache, std::int64_t first, std::int64_t n,
                        std::int64_t start);
void check_read(const KvCache& cache, std::int64_t head_dim, std::int64_t sequence, View k, View v);
void check_attention_step(View q, const KvCache& cache, const AttnShape& shape, View position,
                          View out);
void check_sample_step(View logits, const SampleOptions& options, const StepState& state);

}  // namespace engine
