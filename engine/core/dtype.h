// Element types and their exact conversions on the host.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace engine {

enum class DType : std::uint8_t { f32, f16, bf16, f64, i32, i16, u8 };

[[nodiscard]] std::size_t dtype_bytes(DType dtype);
[[nodiscard]] const char* dtype_name(DType dtype);
// Accepts the names that dtype_name prints; throws Error(usage) naming the valid ones.
[[nodiscard]] DType parse_dtype(std::string_view name);
[[nodiscard]] inline bool is_float(DType d) {
  return d == DType::f32 || d == DType::f16 || d == DType::bf16 || d == DType::f64;
}

// Storage-only 16-bit floats: arithmetic happens in float.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}
[[nodiscard]] float to_float(f16 v);

// Round to nearest even; NaN stays NaN, overflow becomes infinity.
inline bf16 to_bf16(float v) {
  const auto u = std::bit_cast<std::uint32_t>(v);
  if ((u & 0x7fffffffU) > 0x7f800000U) return {static_cast<std::uint16_t>((u >> 16) | 0x40U)};
  return {static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16)};
}
[[nodiscard]] f16 to_f16(float v);

inline void store(float& out, float v) { out = v; }
inline void store(bf16& out, float v) { out = to_bf16(v); }
inline void store(f16& out, float v) { out = to_f16(v); }

// The value that survives a round trip through `dtype` (f32, f16 or bf16).
[[nodiscard]] float round_to(DType dtype, float v);

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<f16>() {
  return DType::f16;
}
template <>
constexpr DType dtype_of<bf16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<std::int16_t>() {
  return DType::i16;
}
template <>
constexpr DType dtype_of<std::uint8_t>() {
  return DType::u8;
}

}  // namespace engine
