#include "engine/core/dtype.h"

#include "engine/core/error.h"

namespace engine {

std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
      return 2;
    case DType::u8:
      return 1;
  }
  throw Error(ErrorCode::internal, "unknown dtype");
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::f64:
      return "f64";
    case DType::i32:
      return "i32";
    case DType::i16:
      return "i16";
    case DType::u8:
      return "u8";
  }
  throw Error(ErrorCode::internal, "unknown dtype");
}

DType parse_dtype(std::string_view name) {
  for (const DType d :
       {DType::f32, DType::f16, DType::bf16, DType::f64, DType::i32, DType::i16, DType::u8}) {
    if (name == dtype_name(d)) return d;
  }
  throw Error(ErrorCode::usage,
              "dtype: expected one of f32, f16, bf16, f64, i32, i16, u8, found \"" +
                  std::string(name) + "\"");
}

float to_float(f16 v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000U) << 16;
  const std::uint32_t exponent = (v.bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = v.bits & 0x3ffU;
  if (exponent == 0x1fU) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (mantissa << 13));
  // Zero or subnormal: mantissa * 2^-24 is exact in float.
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
  return sign != 0 ? -magnitude : magnitude;
}

f16 to_f16(float v) {
  const auto u = std::bit_cast<std::uint32_t>(v);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000U);
  const std::uint32_t magnitude = u & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (magnitude >= 0x477ff000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};  // >= 65520
  if (magnitude < 0x38800000U) {
    // Below 2^-14: round to a multiple of 2^-24 with the FPU's own half-even rule.
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p24F;
    return {static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(scaled)))};
  }
  const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};
}

float round_to(DType dtype, float v) {
  switch (dtype) {
    case DType::f32:
      return v;
    case DType::f16:
      return to_float(to_f16(v));
    case DType::bf16:
      return to_float(to_bf16(v));
    default:
      throw Error(ErrorCode::internal, "round_to: not a 16- or 32-bit float dtype");
  }
}

}  // namespace engine
