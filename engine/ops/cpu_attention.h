// Causal attention on the CPU in blocks, without the score matrix.
#pragma once

#include <cstdint>

#include "engine/core/parallel.h"
#include "engine/core/view.h"
#include "engine/ops/attn_ops.h"
#include "engine/ops/cpu_kernels.h"

namespace engine {

// AttnOps::attention with the instruction set as an argument.
void cpu_attention(ThreadPool& pool, View q, View k, View v, const AttnShape& shape,
                   std::int64_t batch, View out, Isa isa = best_isa());

}  // namespace engine
