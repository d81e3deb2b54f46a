// The kernel layout: how packed linears lie in device memory while a model runs. It is made at load
// from the planes of a file (QuantOps codes, scales and zeros -> PackedOps::repack), never stored,
// and holds the same integers and coefficients: unpack(repack(w)) == w, bit for bit.
//
// docs/kernels.md draws the layout; engine/weight/packed_layout.h computes it on the host.
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/rotation.h"

namespace engine {

// A record is 16 rows x 128 columns: the codes in the order in which the lanes of a warp need them
// as fragments of m16n8k16 tensor core products, followed by the coefficients of these rows for the
// groups that begin in these columns. A row tile's records follow each other by column, then comes
// the next row tile.
inline constexpr std::int64_t record_rows = 16;
inline constexpr std::int64_t record_cols = 128;

enum class PackedKind : std::uint8_t {
  affine,    // scale * (code - zero)
  codebook,  // scale * book[code], 4-bit codes
  binary2,   // scale_0 * (code_0 - zero_0) + scale_1 * (code_1 - zero_1), two one-bit codes
  // Schemes with a layout of their own (engine/weight/scheme_layout.h).
  mixed,    // each 128 columns with a width of their own: affine, or mu +- alpha
  salient,  // mu +- alpha, but for some weights scale * (code - zero), one such unit per row
  regions,  // mu +- alpha in two groups; some columns the sum of two such values
  midrise,  // scale * (code - (2^bits - 1) / 2), one scale for the whole matrix
  lattice,  // points of e8p (e8.h) with one scale; in 3 and 4 bits plus points of e8_byte or e8p
};

// The kinds whose records are all of one size, with one kind of unit: what repack makes, unpack
// reads and the tuned kernels stream. The others are built on the host and only read.
[[nodiscard]] constexpr bool is_record_kind(PackedKind kind) { return kind < PackedKind::mixed; }

struct PackedShape;
// Bytes of a weight of another kind.
[[nodiscard]] std::int64_t scheme_bytes(const PackedShape& shape);

struct PackedShape {
  std::int64_t rows = 0;  // outputs
  std::int64_t cols = 0;  // inputs
  PackedKind kind = PackedKind::affine;
  int bits = 4;              // affine 1..8; codebook 4; binary2 2 (code = code_0 + 2 * code_1)
  std::int64_t group = 128;  // 32, 64, or a multiple of 128; 0: one unit per row
  DType scale_dtype = DType::f16;  // f32, f16 or bf16
  // Zeros are stored, one byte each (0..255). Otherwise every zero is 2^(bits - 1) for the bits of
  // a term's code: 1 for both terms of binary2, whose codes have one bit. A codebook has none.
  bool zeros = true;
  // mixed (group 128): how many column blocks are sign (0) or affine with 1..8 bits.
  std::array<std::int64_t, 9> width_blocks = {};
  // salient (group 0 or a multiple of 128): weights with a code of `bits` bits.
  std::int64_t salient = 0;
  // midrise (2, 3, 4 bits) and lattice (2, 3, 4), both with group 0, f32 scales and no zeros: what
  // stands around the terms.
  RotationSide left, right;
  bool diagonal = false;  // with a transform of the inputs only

  [[nodiscard]] bool rotated() const {
    return left.kind != TransformKind::none || right.kind != TransformKind::none;
  }
  [[nodiscard]] std::int64_t row_tiles() const { return (rows + record_rows - 1) / record_rows; }
  [[nodiscard]] std::int64_t col_blocks() const { return (cols + record_cols - 1) / record_cols; }
  // Terms, and so sets of coefficients per unit.
  [[nodiscard]] int terms() const { return kind == PackedKind::binary2 ? 2 : 1; }
  // Units per row.
  [[nodiscard]] std::int64_t groups() const { return group == 0 ? 1 : (cols + group - 1) / group; }
  // Units that a record has coefficients for. Groups of more than 128 columns are repeated in each
  // of their records; those of whole rows lie in a plane of their own.
  [[nodiscard]] std::int64_t groups_per_record() const {
    return group == 0 ? 0 : group >= record_cols ? 1 : record_cols / group;
  }
  [[nodiscard]] std::int64_t code_bytes() const { return 256 * bits; }
  // Coefficients of one unit of 16 rows: for each term 16 scales, then for each term 16 zeros; in
  // both the order of rows is 0, 8, 1, 9, 2, 10, ... 7, 15.
  [[nodiscard]] std::int64_t unit_bytes() const {
    const auto scale = static_cast<std::int64_t>(dtype_bytes(scale_dtype));
    return terms() * record_rows * (scale + (zeros ? 1 : 0));
  }
  [[nodiscard]] std::int64_t record_bytes() const {
    return code_bytes() + groups_per_record() * unit_bytes();
  }
  [[nodiscard]] std::int64_t records_bytes() const {
    return is_record_kind(kind) ? row_tiles() * col_blocks() * record_bytes() : scheme_bytes(*this);
  }
  // Record kinds with group == 0 only: one unit per row tile.
  [[nodiscard]] std::int64_t row_unit_bytes() const {
    return group == 0 && is_record_kind(kind) ? row_tiles() * unit_bytes() : 0;
  }
};

// Device views of one packed linear.
struct PackedWeight {
  PackedShape shape;
  View records;      // u8 [1, records_bytes], at a multiple of 16 bytes
  View row_units;    // u8 [1, row_unit_bytes], at a multiple of 16 bytes; empty unless group is 0
  View book;         // f32 [1, 16], codebook only
  View permutation;  // i32 [1, cols] or empty: column j of the codes is column perm[j] of W
  Rotation rotation = {};
  [[nodiscard]] std::int64_t bytes() const {
    return records.bytes() + row_units.bytes() + book.bytes() + permutation.bytes() +
           rotation.bytes();
  }
};

// A linear as the model holds it: a dense matrix or a packed weight.
struct Linear {
  View dense;  // [rows, cols]; empty if packed
  PackedWeight packed;

  [[nodiscard]] bool is_packed() const { return dense.empty(); }
  [[nodiscard]] std::int64_t rows() const { return is_packed() ? packed.shape.rows : dense.rows; }
  [[nodiscard]] std::int64_t cols() const { return is_packed() ? packed.shape.cols : dense.cols; }
  // What one pass over the weight reads.
  [[nodiscard]] std::int64_t bytes() const { return is_packed() ? packed.bytes() : dense.bytes(); }
};

}  // namespace engine
