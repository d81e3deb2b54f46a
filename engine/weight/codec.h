// The reference codec of the weight algebra: checks a LinearWeight and decodes it on the host.
// It is the oracle that every kernel and every fast path is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/weight/linear_weight.h"

namespace engine {

// Everything that can be checked without the planes' data: counts, plane indices, dtypes, shapes,
// and that every plane is used. Throws FormatError(file, place + ".terms[0]...", ...).
void validate_structure(const LinearWeight& weight, const std::string& file,
                        const std::string& place);

// validate_structure, and then the data: sizes, column sets strictly increasing and in range,
// column groups in range, the permutation a permutation, the codes of compact terms as many as
// their supports, zero bits after the last code of every packed row. Coefficient values are not
// judged. Memory: O(cols).
void validate(const LinearWeight& weight, const std::string& file, const std::string& place);

// out [rows, cols], f32, f16 or bf16, host, any stride: the weight. Validates first (the errors
// then name "memory" as the file). Arithmetic: a term's value is computed in f32 from exact
// integers and rounded to grid.product; terms are added in f32 in their order; the diagonal
// multiplies in f32; the result is rounded once to out's dtype. Weights that no term covers are 0.
// Transforms are computed in f64, each rounded to f32: first the right one, then the left one.
// Other implementations compute them in f32.
void decode_linear(const LinearWeight& weight, View out);

// A plane with its bytes. Moving keeps `plane.data` valid; copying would not, so it is deleted.
struct OwnedPlane {
  OwnedPlane() = default;
  OwnedPlane(OwnedPlane&&) noexcept = default;
  OwnedPlane& operator=(OwnedPlane&&) noexcept = default;
  OwnedPlane(const OwnedPlane&) = delete;
  OwnedPlane& operator=(const OwnedPlane&) = delete;
  ~OwnedPlane() = default;
  Plane plane;
  std::vector<std::byte> bytes;
};

// A weight with the bytes of its planes. weight.planes[i] belongs to bytes[i].
struct OwnedLinear {
  OwnedLinear() = default;
  OwnedLinear(OwnedLinear&&) noexcept = default;
  OwnedLinear& operator=(OwnedLinear&&) noexcept = default;
  OwnedLinear(const OwnedLinear&) = delete;
  OwnedLinear& operator=(const OwnedLinear&) = delete;
  ~OwnedLinear() = default;
  LinearWeight weight;
  std::vector<std::vector<std::byte>> bytes;

  // Appends a plane and returns its index.
  int add(OwnedPlane owned);
};

// Encoders. All inputs are host views; all throw Error(mismatch) where a value would not survive.

// codes u8 [rows, cols], each below 2^bits, one per byte -> packed [rows, cols].
[[nodiscard]] OwnedPlane pack_codes_plane(View codes, int bits, const std::string& role = "codes");
// zeros i32 [rows, groups], each in 0..2^bits-1 -> packed [rows, groups].
[[nodiscard]] OwnedPlane pack_zeros(View zeros, int bits);
// zeros i32 [rows, groups] -> plain i16 or i32.
[[nodiscard]] OwnedPlane zeros_plane(View zeros, DType dtype);
// values f32 -> f32, f16 or bf16. The values must already be values of `dtype`: a scale is rounded
// before it is used, so that what is evaluated is what is stored. NaN is refused.
[[nodiscard]] OwnedPlane floats_plane(View values, DType dtype, const std::string& role);
[[nodiscard]] inline OwnedPlane scales_plane(View values, DType dtype) {
  return floats_plane(values, dtype, "scales");
}
// Codes of a lattice term, host. e8p: codes i16 [rows, cols / 8] -> plain i16. e8_byte: codes u8 ->
// packed with 8 bits.
[[nodiscard]] OwnedPlane lattice_codes_plane(View codes);
// Signs of a hadamard transform [d], +1 or -1.
[[nodiscard]] OwnedPlane signs_plane(std::span<const float> signs);
// i32 [1, n]: a permutation, a column set, column groups.
[[nodiscard]] OwnedPlane indices_plane(std::span<const std::int32_t> ids, const std::string& role);
// w f32, f16 or bf16, any stride -> the same elements.
[[nodiscard]] OwnedPlane dense_plane(View w);
// w as a LinearWeight with one dense term.
[[nodiscard]] OwnedLinear dense_linear(View w);

}  // namespace engine
