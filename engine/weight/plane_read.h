// Element access to planes and supports: plain, one element at a time, for the reference codec.
#pragma once

#include <cstring>
#include <span>
#include <vector>

#include "engine/weight/linear_weight.h"

namespace engine {

[[nodiscard]] inline const std::byte* plane_row(const Plane& plane, std::int64_t r) {
  return static_cast<const std::byte*>(plane.data.data) + r * plane.row_bytes();
}

// Code c of row r of a packed plane.
[[nodiscard]] inline unsigned read_code(const Plane& plane, std::int64_t r, std::int64_t c) {
  const std::byte* row = plane_row(plane, r);
  const std::int64_t first_bit = c * plane.bits;
  const std::int64_t byte = first_bit / 8;
  const auto shift = static_cast<unsigned>(first_bit % 8);
  unsigned window = std::to_integer<unsigned>(row[byte]);
  // A code of at most 8 bits touches at most two bytes; the second is read only if it is needed.
  if (shift + static_cast<unsigned>(plane.bits) > 8) {
    window |= std::to_integer<unsigned>(row[byte + 1]) << 8U;
  }
  return (window >> shift) & ((1U << static_cast<unsigned>(plane.bits)) - 1U);
}

template <class T>
[[nodiscard]] T read_element(const Plane& plane, std::int64_t r, std::int64_t c) {
  T value;  // by memcpy: a plane may lie at any address
  std::memcpy(&value, plane_row(plane, r) + c * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// An element of an f32, f16 or bf16 plane.
[[nodiscard]] float read_float(const Plane& plane, std::int64_t r, std::int64_t c);

// The point of R^8 of code k of row r of a lattice term, times nothing.
void read_point(const LinearWeight& weight, const Term& term, std::int64_t r, std::int64_t k,
                std::span<float, 8> out);

// +1 and -1, the signs of a hadamard transform; empty for others.
[[nodiscard]] std::vector<float> read_signs(const LinearWeight& weight, const Transform& transform);

// An element of a packed, i16 or i32 plane.
[[nodiscard]] std::int64_t read_integer(const Plane& plane, std::int64_t r, std::int64_t c);

// Walks the support of one term. The planes it names must have data and be validated.
class SupportMask {
 public:
  SupportMask(const LinearWeight& weight, const Support& support);
  [[nodiscard]] bool test(std::int64_t r, std::int64_t c) const {
    if (!column_in_[static_cast<std::size_t>(c)]) return false;
    if (bitmap_ == nullptr) return true;
    return (read_code(*bitmap_, r, c) != 0) == bitmap_value_;
  }
  // Puts the columns of a row's supported weights, in order, in the place of `columns`.
  void find_row(std::int64_t r, std::vector<std::int32_t>& columns) const;
  // Supported weights of one row, and of the whole matrix.
  [[nodiscard]] std::int64_t count_row(std::int64_t r) const;
  [[nodiscard]] std::int64_t count() const;

 private:
  // body(word, first): the support of columns [first, first + 64) as bits, for each such word.
  template <class F>
  void for_words(std::int64_t r, F&& body) const;

  std::int64_t rows_;
  std::vector<char> column_in_;
  std::vector<std::byte> column_bits_;  // the same as a bitmap's row
  std::int64_t columns_ = 0;            // how many are in
  const Plane* bitmap_ = nullptr;
  bool bitmap_value_ = true;
};

}  // namespace engine
