// The weight algebra: a linear layer's weight as a short sum of terms over shared planes.
//
//   T[r, j] = sum over terms t, in order, of decode(t)[r, j] where (r, j) is in t's support
//   W[r, perm[j]] = T[r, j] * diagonal[perm[j]]
//
// that is W = T P D: the permutation first, then the diagonal, which is indexed by columns of W.
// With transforms, orthogonal matrices L of the outputs and R of the inputs, L^T T R stands in the
// place of T: W = L^T T R P D, so that W x = L^T (T (R (P D x))).
// Everything inside a term (supports, column groups) is indexed by columns of T.
// docs/weights.md describes every field and how the methods map onto it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/core/view.h"
#include "engine/weight/e8.h"
#include "engine/weight/transform.h"
#include "formats/bits.h"

namespace engine {

inline constexpr std::size_t max_terms = 8;
inline constexpr std::size_t max_planes = 64;
inline constexpr std::int64_t max_dimension = INT32_MAX;  // column ids are i32
inline constexpr std::int64_t max_elements = std::int64_t{1} << 40;

// One rectangular array of the file. Planes are referred to by index, so that terms share them.
struct Plane {
  std::string role;         // for people: "codes", "scales", "permutation", ...; decides nothing
  DType dtype = DType::u8;  // u8 when packed
  int bits = 0;             // 0: plain elements of `dtype`; 1..8: codes packed LSB first (formats/
                            // bits.h), every row at a byte boundary
  std::int64_t rows = 0;    // logical extents: codes or elements, not bytes
  std::int64_t cols = 0;
  View data;  // host bytes u8 [1, raw_bytes()]; null while a plane is only described. Any alignment

  [[nodiscard]] bool packed() const { return bits != 0; }
  // Meaningful for planes within the caps above: validate_structure checks them.
  [[nodiscard]] std::int64_t row_bytes() const {
    return packed() ? static_cast<std::int64_t>(packed_row_bytes(static_cast<std::uint64_t>(cols),
                                                                 static_cast<unsigned>(bits)))
                    : cols * static_cast<std::int64_t>(dtype_bytes(dtype));
  }
  [[nodiscard]] std::int64_t raw_bytes() const { return rows * row_bytes(); }
};

enum class Select : std::uint8_t { all, in, not_in };

// Which weights a term covers: the intersection of a column set and a bitmap.
struct Support {
  Select columns = Select::all;
  int columns_plane = -1;  // i32 [1, n], strictly increasing column ids
  Select bitmap = Select::all;
  int bitmap_plane = -1;  // 1-bit codes [rows, cols]
  // The term's codes hold only the supported slots, in row-major order: as [rows, k] when the
  // bitmap selects all (every row has the same k columns), else as [1, count].
  bool compact = false;

  [[nodiscard]] bool everything() const { return columns == Select::all && bitmap == Select::all; }
};

enum class GridKind : std::uint8_t { tensor, row, group };

// Which coefficients a weight takes. Coefficient planes (scales, zeros, mu) are all [1, 1] for
// tensor, [rows, 1] for row, and [rows, groups] for group.
struct Grid {
  GridKind kind = GridKind::row;
  std::int64_t group = 0;  // columns per group for kind group, else 0
  int scale_plane = -1;    // f32, f16 or bf16
  int zero_plane = -1;     // affine only: packed codes, i16 or i32; -1: symmetric, 2^(bits-1)
  // affine without a zero plane only: the zero is (2^bits - 1) / 2, between the two middle codes.
  bool midrise = false;
  // kind group only: i32 [1, cols], the group of each column; -1: column j is in group j / group.
  int column_group_plane = -1;
  DType product = DType::f32;  // f32 or f16: what a term's value is rounded to before the sum
};

enum class TermKind : std::uint8_t {
  dense,     // the element itself
  affine,    // scale * (code - zero)
  codebook,  // scale * book[code]
  sign,      // mu + alpha for code 1, mu - alpha for code 0; sign(0) = +1 is code 1
  lattice,   // scale * coordinate j % 8 of a point of R^8; one code for 8 columns (e8.h)
};

struct Term {
  TermKind kind = TermKind::affine;
  int bits = 0;  // dense 0, affine 1..8, codebook 1..4, sign 1; lattice: per weight,
                 // 2 for book e8p, 1 for e8_byte
  LatticeBook lattice = LatticeBook::e8p;  // lattice only
  // dense: the elements (f32, f16 or bf16); lattice, [rows, cols / 8]: i16 elements, the bits of an
  // unsigned code (e8p), or packed codes of 8 bits (e8_byte)
  int codes_plane = -1;
  Grid grid;                // not for dense; sign: alpha is grid.scale_plane
  int codebook_plane = -1;  // codebook only: f32, f16 or bf16 [1, 2^bits]
  int mu_plane = -1;        // sign only: f32, f16 or bf16; -1: 0
  Support support;
};

struct LinearWeight {
  std::int64_t rows = 0;  // outputs
  std::int64_t cols = 0;  // inputs
  std::vector<Term> terms;
  std::vector<Plane> planes;
  int permutation_plane = -1;  // i32 [1, cols]: column j of the terms is column perm[j] of W
  int diagonal_plane = -1;     // f32, f16 or bf16 [1, cols], by columns of W
  Transform left;              // L, of size rows
  Transform right;             // R, of size cols

  [[nodiscard]] const Plane& plane(int index) const {
    REQUIRE(index >= 0 && static_cast<std::size_t>(index) < planes.size(), "no such plane");
    return planes[static_cast<std::size_t>(index)];
  }
};

}  // namespace engine
