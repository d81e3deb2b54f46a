#include "engine/weight/e8.h"

#include <algorithm>

#include "engine/weight/e8_search.h"

namespace engine {
namespace {

constexpr E8Tables tables = make_e8_tables();

constexpr std::array<std::uint32_t, 256> copy_words() {
  std::array<std::uint32_t, 256> words{};
  for (std::size_t i = 0; i < 256; ++i) words[i] = tables.words[i];
  return words;
}
constexpr std::array<std::uint32_t, 256> words = copy_words();

constexpr std::array<std::array<float, 8>, 256> make_byte_points() {
  std::array<std::array<float, 8>, 256> points{};
  for (int i = 0; i < 8; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      for (int signs = 0; signs < 4; ++signs) {
        auto& p = points[tables.of_pair[(8 * i + j) * 4 + signs]];
        p[static_cast<std::size_t>(i)] = (signs & 2) != 0 ? -1.0F : 1.0F;
        p[static_cast<std::size_t>(j)] = (signs & 1) != 0 ? -1.0F : 1.0F;
      }
    }
  }
  std::size_t at = 113;
  for (int positive = 0; positive < 256; ++positive) {  // bit 7 - i: coordinate i is +1/2
    int count = 0;
    for (int i = 0; i < 8; ++i) count += positive >> i & 1;
    if (count % 2 != 0) continue;
    for (int i = 0; i < 8; ++i) {
      points[at][static_cast<std::size_t>(i)] = (positive >> (7 - i) & 1) != 0 ? 0.5F : -0.5F;
    }
    ++at;
  }
  for (std::size_t i = 0; i < 8; ++i) points[at++][i] = 2.0F;
  for (std::size_t i = 0; i < 7; ++i) points[at++][i] = -2.0F;
  return points;
}
constexpr std::array<std::array<float, 8>, 256> byte_points = make_byte_points();

template <class Search>
auto nearest(std::span<const float, 8> x, std::span<float, 8> point, const Search& search) {
  float in[8], out[8];
  std::copy(x.begin(), x.end(), in);
  const auto code = search(in, tables, out);
  std::copy(out, out + 8, point.begin());
  return code;
}

}  // namespace

const std::array<std::uint32_t, 256>& e8p_words() { return words; }

void e8p_point(std::uint16_t code, std::span<float, 8> out) {
  const std::uint32_t word = words[code >> 8];
  unsigned signs = code & 255U;
  const bool lowered = e8_odd_bits(static_cast<int>(signs));
  if (lowered) signs ^= 1U;
  for (int i = 0; i < 8; ++i) {
    const int place = e8p_place(i);
    const float v = (static_cast<float>(word >> (4 * place) & 15U) - 8.0F) * 0.5F;
    out[static_cast<std::size_t>(i)] =
        ((signs >> place & 1U) != 0 ? -v : v) + (lowered ? -0.25F : 0.25F);
  }
}

std::uint16_t e8p_nearest(std::span<const float, 8> x, std::span<float, 8> point) {
  return nearest(x, point, e8p_search);
}

const std::array<std::array<float, 8>, 256>& e8_byte_points() { return byte_points; }

std::uint8_t e8_byte_nearest(std::span<const float, 8> x, std::span<float, 8> point) {
  return nearest(x, point, e8_byte_search);
}

}  // namespace engine
