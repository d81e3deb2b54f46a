// From the planes of a packed linear to a dense matrix on the device: what every use of a packed
// model runs through ("--exec decoded"), quantization included.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "engine/model/source.h"
#include "engine/weight/linear_weight.h"

namespace engine {

// out [rows, cols], any float dtype. Planes are host bytes. Patterns with a device decoder: dense,
// and one affine term over full support (pattern.h); anything else throws Error(usage) naming the
// scheme. On a measuring arena only the scratch is counted (planes may be null then).
void install_linear(const LinearWeight& weight, const std::string& name, Loader& loader, View out);

// A zero plane's values, row by row; `bytes` is its data.
void read_zeros(const Plane& plane, const std::byte* bytes, std::span<std::int32_t> out);

// The scratch alone, for plans: same layout as install_linear.
void plan_install(const LinearWeight& weight, const std::string& name, Arena& arena);

}  // namespace engine
