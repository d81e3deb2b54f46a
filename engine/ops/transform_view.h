// From what a file or a method says about a transform to its numbers on the device.
#pragma once

#include <cstdint>
#include <span>

#include "engine/core/memory.h"
#include "engine/ops/ops.h"

namespace engine {

// Takes the memory from the arena and fills it; on a measuring arena it is only taken.
// signs f32 [d], +1 or -1, for hadamard only (unread on a measuring arena). d as hadamard_order and
// make_butterfly (engine/weight/transform.h) demand. threads 0: all. Synchronises.
[[nodiscard]] TransformView make_transform_view(Ops& ops, Arena& arena, MemTag tag,
                                                const Transform& transform,
                                                std::span<const float> signs, std::int64_t d,
                                                int threads);

// The memory alone, for plans.
[[nodiscard]] TransformView take_transform_view(Arena& arena, MemTag tag,
                                                const Transform& transform, std::int64_t d);

// What every backend demands of TransformOps::transform_rows. x and out may be one view.
void require_transform(const View& x, const TransformView& q, const View& out);

}  // namespace engine
