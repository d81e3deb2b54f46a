// What the device reaches, measured: the ceilings that reports compare with. Buffers come from the
// ops' memory (tag workspace) and are given back.
#pragma once

#include "engine/ops/ops.h"

namespace engine {

// Flop/s of a large square matrix product of random data in `dtype`: the median of several.
[[nodiscard]] double measured_matmul_flops(Ops& ops, Ledger& ledger, DType dtype);

// Bytes per second of Ops::copy within the device's memory, read and written bytes both counted.
[[nodiscard]] double measured_copy_bandwidth(Ops& ops, Ledger& ledger);

// Bytes per second of reading alone: count_nonfinite over bf16 elements far beyond any cache. From
// the difference between two lengths, the median of several pairs, so that what a call costs by
// itself does not count.
[[nodiscard]] double measured_read_bandwidth(Ops& ops, Ledger& ledger);

}  // namespace engine
