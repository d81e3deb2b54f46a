#include "engine/weight/grid.h"

#include <algorithm>
#include <limits>
#include <string>

namespace engine {

namespace {

struct Range {
  float lo = 0.0F;
  float hi = 0.0F;
};

Range plain_range(std::span<const float> w, const GridSpec& spec) {
  // Rounding is monotone, so rounding the ends is rounding every weight first.
  const auto [lo, hi] = std::minmax_element(w.begin(), w.end());
  return {in_arithmetic(spec, *lo), in_arithmetic(spec, *hi)};
}

// hi - lo over the number of steps.
float plain_scale(Range range, const GridSpec& spec) {
  const float width = in_arithmetic(spec, range.hi - range.lo);
  return in_arithmetic(spec, width / static_cast<float>(spec.max_code()));
}

// The scale as it will be stored: rounded, but never 0 and never infinite.
float stored_scale(float scale, const GridSpec& spec) {
  const bool half = spec.scale_dtype == DType::f16 || spec.arithmetic == DType::f16;
  float smallest = std::numeric_limits<float>::denorm_min();
  float largest = std::numeric_limits<float>::max();
  if (half) {
    smallest = 0x1p-24F;
    largest = 65504.0F;
  } else if (spec.scale_dtype == DType::bf16) {
    smallest = 0x1p-133F;
    largest = 0x1.FEp127F;
  }
  return round_to(spec.scale_dtype, std::clamp(scale, smallest, largest));
}

// A rounded zero as an integer; saturates, because the rule `paper` has no clamp of its own. NaN,
// which needs a range that overflows the arithmetic, becomes 0.
std::int32_t to_zero(float rounded) {
  if (std::isnan(rounded)) return 0;
  constexpr float limit = 2147483520.0F;  // the largest float below 2^31
  return static_cast<std::int32_t>(std::clamp(rounded, -limit, limit));
}

// V-G. Zero lies in the range, so it is representable and its code fits the bits.
Range gptq_range(std::span<const float> w, const GridSpec& spec) {
  Range range = plain_range(w, spec);
  range.lo = std::min(range.lo, 0.0F);
  range.hi = std::max(range.hi, 0.0F);
  if (spec.symmetric) {
    range.hi = std::max(-range.lo, range.hi);
    if (range.lo < 0.0F) range.lo = -range.hi;
  }
  if (range.lo == 0.0F && range.hi == 0.0F) range = {-1.0F, 1.0F};
  return range;
}

UnitGrid gptq_grid(Range range, const GridSpec& spec) {
  const float scale = stored_scale(plain_scale(range, spec), spec);
  if (spec.symmetric) return {scale, (spec.max_code() + 1) / 2};
  const float zero = std::nearbyint(in_arithmetic(spec, -range.lo / scale));
  // Within 0..N by itself unless the scale was rounded among subnormals.
  return {scale, std::clamp(to_zero(zero), 0, spec.max_code())};
}

// V-G's optional search: the range shrunk by 0 to 79 %, whichever loses least.
UnitGrid gptq_mse_grid(std::span<const float> w, Range range, const GridSpec& spec) {
  UnitGrid best;
  double best_loss = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 80; ++i) {
    const auto shrink = static_cast<float>(1.0 - static_cast<double>(i) / 100.0);
    const Range shrunk = {in_arithmetic(spec, shrink * range.lo),
                          in_arithmetic(spec, shrink * range.hi)};
    const UnitGrid grid = gptq_grid(shrunk, spec);
    double loss = 0.0;
    for (const float v : w) {
      const float error = dequantize_value(quantize_value(v, grid, spec), grid, spec) - v;
      loss += static_cast<double>(std::pow(std::fabs(error), 2.4F));
    }
    if (loss < best_loss || i == 0) {
      best_loss = loss;
      best = grid;
    }
  }
  return best;
}

// V-A. On one-signed units the clamped zero cannot follow the range: that is the published rule.
UnitGrid awq_grid(Range range, const GridSpec& spec) {
  const float width =
      std::max(in_arithmetic(spec, range.hi - range.lo), in_arithmetic(spec, 1e-5F));
  const auto steps = static_cast<float>(spec.max_code());
  const float step = spec.reciprocal ? width * (1.0F / steps) : width / steps;
  const float scale = stored_scale(in_arithmetic(spec, step), spec);
  const float zero = -std::nearbyint(in_arithmetic(spec, range.lo / scale));
  return {scale, to_zero(std::clamp(zero, 0.0F, static_cast<float>(spec.max_code())))};
}

// V-O.
UnitGrid omniquant_grid(Range range, const GridSpec& spec) {
  const float scale =
      stored_scale(std::clamp(plain_scale(range, spec), in_arithmetic(spec, 1e-5F), 1e4F), spec);
  const float zero = std::clamp(in_arithmetic(spec, -range.lo / scale), -1e4F, 1e4F);
  return {scale, to_zero(std::nearbyint(zero))};
}

// V-P.
UnitGrid paper_grid(Range range, const GridSpec& spec) {
  float step = plain_scale(range, spec);
  if (range.lo == range.hi) step = range.lo == 0.0F ? 1.0F : std::fabs(range.lo);
  const float scale = stored_scale(step, spec);
  return {scale, to_zero(-std::nearbyint(in_arithmetic(spec, range.lo / scale)))};
}

}  // namespace

void check_grid_spec(const GridSpec& spec) {
  REQUIRE(spec.bits >= 1 && spec.bits <= 8, "grid of " + std::to_string(spec.bits) + " bits");
  REQUIRE(spec.group >= 0, "group of " + std::to_string(spec.group));
  REQUIRE(spec.arithmetic == DType::f32 || spec.arithmetic == DType::f16,
          std::string("grid arithmetic ") + dtype_name(spec.arithmetic));
  REQUIRE(spec.scale_dtype == DType::f32 || spec.scale_dtype == DType::f16 ||
              spec.scale_dtype == DType::bf16,
          std::string("scale dtype ") + dtype_name(spec.scale_dtype));
  REQUIRE(spec.rule == GridRule::gptq || (!spec.symmetric && !spec.mse),
          "symmetric and mse belong to the rule gptq");
  REQUIRE(spec.rule == GridRule::awq || !spec.reciprocal, "reciprocal belongs to the rule awq");
}

UnitGrid find_unit_grid(std::span<const float> w, const GridSpec& spec) {
  check_grid_spec(spec);
  REQUIRE(!w.empty(), "a unit without weights");
  switch (spec.rule) {
    case GridRule::gptq: {
      const Range range = gptq_range(w, spec);
      return spec.mse ? gptq_mse_grid(w, range, spec) : gptq_grid(range, spec);
    }
    case GridRule::awq:
      return awq_grid(plain_range(w, spec), spec);
    case GridRule::omniquant:
      return omniquant_grid(plain_range(w, spec), spec);
    case GridRule::paper:
      return paper_grid(plain_range(w, spec), spec);
  }
  throw Error(ErrorCode::internal, "unknown grid rule");
}

}  // namespace engine
