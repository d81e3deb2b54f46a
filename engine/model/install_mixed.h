// Decoding on the device of one pattern of the weight algebra: groups of columns whose codes have
// widths of their own, affine ones and signs, as encode_mixed stores them
// (docs/methods/slimllm.md).
#pragma once

#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// By structure only, like the patterns of engine/weight/pattern.h: two or more affine and sign
// terms on compact column sets of all columns together, by groups of one size.
[[nodiscard]] bool is_mixed(const LinearWeight& weight);

// out [rows, cols], f32, f16 or bf16. False when the column sets are not made of whole groups, each
// in one of them: then nothing was done. Validates first; takes memory from the loader's arena
// within a scope. Waits until the host bytes are no longer needed.
[[nodiscard]] bool install_mixed(const LinearWeight& weight, const std::string& name,
                                 Loader& loader, View out);

// The memory alone, for plans; the same whatever the widths.
void plan_install_mixed(const LinearWeight& weight, Arena& arena);

}  // namespace engine
