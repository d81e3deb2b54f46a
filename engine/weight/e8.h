// Points of R^8 that stand for 8 neighbouring weights (QuIP#, Tseng et al., ICML 2024, section 4).
//   e8p: 2^16 points, a shifted piece of the lattice E8: all coordinates odd multiples of 1/4.
//   e8_byte: 256 points of E8 itself, for what a first code left over.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace engine {

enum class LatticeBook : std::uint8_t { e8p, e8_byte };

// Weights of one code.
inline constexpr std::int64_t lattice_columns = 8;

// The 256 patterns of absolute values of e8p: nibble sigma(i) of a word is 2 v_i + 8, where sigma =
// 0, 4, 1, 5, 2, 6, 3, 7 and v is the pattern with the last coordinate negated if the sum is odd.
[[nodiscard]] const std::array<std::uint32_t, 256>& e8p_words();

// Code c: pattern c >> 8; of the low byte s, f = parity of its bits; s ^= f; coordinate i negated
// where bit sigma(i) of s is set; then -1/4 (f = 1) or +1/4 (f = 0) added to all.
void e8p_point(std::uint16_t code, std::span<float, 8> out);
// The nearest point, exactly; of two as near, the one found first in the order of e8_search.h,
// which kernels use as well: the same code on every device.
[[nodiscard]] std::uint16_t e8p_nearest(std::span<const float, 8> x, std::span<float, 8> point);

// The points of e8_byte, [256][8].
[[nodiscard]] const std::array<std::array<float, 8>, 256>& e8_byte_points();
[[nodiscard]] std::uint8_t e8_byte_nearest(std::span<const float, 8> x, std::span<float, 8> point);

}  // namespace engine
