#include "engine/weight/plane_read.h"

#include <algorithm>
#include <bit>

namespace engine {

float read_float(const Plane& plane, std::int64_t r, std::int64_t c) {
  REQUIRE(!plane.packed(), "a packed plane read as floats");
  switch (plane.dtype) {
    case DType::f32:
      return read_element<float>(plane, r, c);
    case DType::f16:
      return to_float(read_element<f16>(plane, r, c));
    case DType::bf16:
      return to_float(read_element<bf16>(plane, r, c));
    default:
      throw Error(ErrorCode::internal,
                  std::string("not a float plane: ") + dtype_name(plane.dtype));
  }
}

std::int64_t read_integer(const Plane& plane, std::int64_t r, std::int64_t c) {
  if (plane.packed()) return read_code(plane, r, c);
  switch (plane.dtype) {
    case DType::i16:
      return read_element<std::int16_t>(plane, r, c);
    case DType::i32:
      return read_element<std::int32_t>(plane, r, c);
    default:
      throw Error(ErrorCode::internal,
                  std::string("not an integer plane: ") + dtype_name(plane.dtype));
  }
}

void read_point(const LinearWeight& weight, const Term& term, std::int64_t r, std::int64_t k,
                std::span<float, 8> out) {
  const Plane& codes = weight.plane(term.codes_plane);
  if (term.lattice == LatticeBook::e8p) {
    return e8p_point(static_cast<std::uint16_t>(read_element<std::int16_t>(codes, r, k)), out);
  }
  std::ranges::copy(e8_byte_points()[read_code(codes, r, k)], out.begin());
}

std::vector<float> read_signs(const LinearWeight& weight, const Transform& transform) {
  std::vector<float> signs;
  if (transform.kind != TransformKind::hadamard) return signs;
  const Plane& plane = weight.plane(transform.signs_plane);
  signs.resize(static_cast<std::size_t>(plane.cols));
  for (std::int64_t i = 0; i < plane.cols; ++i) {
    signs[static_cast<std::size_t>(i)] = read_code(plane, 0, i) != 0 ? -1.0F : 1.0F;
  }
  return signs;
}

SupportMask::SupportMask(const LinearWeight& weight, const Support& support)
    : rows_(weight.rows),
      column_in_(static_cast<std::size_t>(weight.cols), support.columns != Select::in) {
  columns_ = weight.cols;
  if (support.columns != Select::all) {
    const Plane& ids = weight.plane(support.columns_plane);
    for (std::int64_t i = 0; i < ids.cols; ++i) {
      column_in_[static_cast<std::size_t>(read_element<std::int32_t>(ids, 0, i))] =
          support.columns == Select::in;
    }
    columns_ = support.columns == Select::in ? ids.cols : weight.cols - ids.cols;
  }
  if (support.bitmap != Select::all) {
    bitmap_ = &weight.plane(support.bitmap_plane);
    bitmap_value_ = support.bitmap == Select::in;
  }
  column_bits_.resize((column_in_.size() + 7) / 8);
  for (std::size_t c = 0; c < column_in_.size(); ++c) {
    if (column_in_[c] != 0) column_bits_[c / 8] |= std::byte{1} << static_cast<int>(c % 8);
  }
}

template <class F>
void SupportMask::for_words(std::int64_t r, F&& body) const {
  const std::byte* row = bitmap_ != nullptr ? plane_row(*bitmap_, r) : nullptr;
  const std::uint64_t flip = bitmap_value_ ? 0 : ~std::uint64_t{0};
  for (std::size_t at = 0; at < column_bits_.size(); at += 8) {
    const std::size_t n = std::min<std::size_t>(8, column_bits_.size() - at);
    std::uint64_t bits = ~std::uint64_t{0}, columns = 0;
    if (row != nullptr) {
      bits = 0;
      std::memcpy(&bits, row + at, n);
      bits ^= flip;
    }
    std::memcpy(&columns, column_bits_.data() + at, n);
    body(bits & columns, static_cast<std::int64_t>(8 * at));
  }
}

void SupportMask::find_row(std::int64_t r, std::vector<std::int32_t>& columns) const {
  columns.resize(column_in_.size());
  std::size_t n = 0;
  for_words(r, [&](std::uint64_t word, std::int64_t first) {
    for (; word != 0; word &= word - 1) {
      columns[n++] = static_cast<std::int32_t>(first + std::countr_zero(word));
    }
  });
  columns.resize(n);
}

std::int64_t SupportMask::count_row(std::int64_t r) const {
  if (bitmap_ == nullptr) return columns_;
  std::int64_t total = 0;
  for_words(r, [&](std::uint64_t word, std::int64_t) { total += std::popcount(word); });
  return total;
}

std::int64_t SupportMask::count() const {
  if (bitmap_ == nullptr) return rows_ * columns_;
  std::int64_t total = 0;
  for (std::int64_t r = 0; r < rows_; ++r) total += count_row(r);
  return total;
}

}  // namespace engine
