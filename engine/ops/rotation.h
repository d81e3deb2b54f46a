// The rotations around packed weights: memory, numbers, and what every backend does with them.
#pragma once

#include "engine/core/memory.h"
#include "engine/ops/ops.h"
#include "engine/weight/linear_weight.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// Memory for what stands around the terms of a weight of this shape; nothing if it has none.
[[nodiscard]] Rotation take_rotation(Arena& arena, MemTag tag, const PackedShape& shape);

// Fills memory taken for the weight's shape. The weight is validated, its planes have their data.
// threads 0: all. Synchronises.
void fill_rotation(Ops& ops, const Rotation& to, const LinearWeight& weight, int threads);

// The weight between the transforms.
[[nodiscard]] PackedWeight without_rotation(const PackedWeight& w);

// REQUIREs views that fit the shape, on `device`.
void check_rotation(const char* op, const PackedWeight& w, DeviceKind device);

}  // namespace engine
