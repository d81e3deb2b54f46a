// What the device reaches, measured: the ceilings that reports compare with.
#pragma once

#include "engine/ops/ops.h"

namespace engine {

// Flop/s of a large square matrix product of random data in `dtype`: the median of several.
[[nodiscard]] double measured_matmul_flops(Ops& ops, Ledger& ledger, DType dtype);

}  // namespace engine
