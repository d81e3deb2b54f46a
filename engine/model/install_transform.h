// Decoding on the device of what QuIP and QuIP# store: weights with transforms, terms of lattice
// points, and affine terms without a zero code (docs/weights.md).
#pragma once

#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// By structure only: a transform on either side, a lattice term or a midrise grid.
[[nodiscard]] bool needs_transform_install(const LinearWeight& weight);

// out [rows, cols], f32, f16 or bf16, for any weight that needs it. Validates first; takes memory
// from the loader's arena within a scope. The sum of the terms is decoded on the device if all
// terms are lattices or the only one is affine over everything, else on the host by `threads`
// threads (0: all). Transforms in f32: decode_linear (codec.h) has them in f64. Synchronises.
void install_transformed(const LinearWeight& weight, const std::string& name, Loader& loader,
                         View out, int threads);

// The memory alone, for plans.
void plan_install_transformed(const LinearWeight& weight, Arena& arena);

}  // namespace engine
