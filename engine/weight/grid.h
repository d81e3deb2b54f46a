// Uniform grids as pure functions on floats: the grid of one unit, one value onto it and back.
// Every backend and every test means these (docs/methods/rtn.md, section 2).
//
// Each operation is rounded to spec.arithmetic. For f16 that is done by computing in f32 and
// rounding the result, which is exact: f32 has more than twice the significand bits of f16.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "engine/weight/grid_spec.h"

namespace engine {

// w^ = scale * (code - zero).
struct UnitGrid {
  float scale = 1.0F;
  std::int32_t zero = 0;
};

// REQUIREs that the spec makes sense: bits 1..8, group >= 0, arithmetic f32 or f16, scale_dtype
// f32, f16 or bf16, symmetric and mse with the rule gptq only.
void check_grid_spec(const GridSpec& spec);

// The grid of a unit of finite weights (at least one). The scale is rounded to spec.scale_dtype
// before the zero follows from it. Two additions to the published rules, which divide by zero
// there: a scale that would round to 0 or overflow becomes the nearest positive finite one, and
// under the rule `paper` a unit of one repeated value v gets scale |v| (1 if v is 0), which keeps
// it exactly.
[[nodiscard]] UnitGrid find_unit_grid(std::span<const float> w, const GridSpec& spec);

// The result of one operation in spec.arithmetic.
[[nodiscard]] inline float in_arithmetic(const GridSpec& spec, float v) {
  return spec.arithmetic == DType::f32 ? v : round_to(spec.arithmetic, v);
}

// clamp(rne(w / scale) + zero, 0, 2^bits - 1), half to even, IEEE division. NaN becomes 0.
[[nodiscard]] inline std::uint8_t quantize_value(float w, const UnitGrid& grid,
                                                 const GridSpec& spec) {
  const float quotient = in_arithmetic(spec, in_arithmetic(spec, w) / grid.scale);
  const float code = in_arithmetic(spec, std::nearbyint(quotient) + static_cast<float>(grid.zero));
  const auto top = static_cast<float>(spec.max_code());
  if (!(code > 0.0F)) return 0;
  return static_cast<std::uint8_t>(code < top ? code : top);
}

// scale * (code - zero).
[[nodiscard]] inline float dequantize_value(std::uint8_t code, const UnitGrid& grid,
                                            const GridSpec& spec) {
  const float steps = in_arithmetic(spec, static_cast<float>(code) - static_cast<float>(grid.zero));
  return in_arithmetic(spec, grid.scale * steps);
}

}  // namespace engine
