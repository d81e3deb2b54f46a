// From the planes of a packed linear to a dense matrix on the device: what every use of a packed
// model runs through ("--exec decoded"), quantization included.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// out [rows, cols], f32, f16 or bf16. Any valid weight; planes are host bytes. Dense weights,
// one affine term over full support (pattern.h), PB-LLM's two terms (install_pbllm.h), groups of
// mixed widths (install_mixed.h) and weights with transforms or lattice terms (install_transform.h)
// are decoded on the device, all others on the host (weight/row_decoder.h) by `threads` threads (0:
// all) through the loader's stages. On a measuring arena only the scratch is counted (planes may be
// null then).
void install_linear(const LinearWeight& weight, const std::string& name, Loader& loader, View out,
                    int threads = 0);

// A zero plane's values, row by row; `bytes` is its data.
void read_zeros(const Plane& plane, const std::byte* bytes, std::span<std::int32_t> out);

// The scratch alone, for plans: same layout as install_linear.
void plan_install(const LinearWeight& weight, Arena& arena);

}  // namespace engine
