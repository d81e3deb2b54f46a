// Where everything lies in the kernel layout (engine/weight/packed_weight.h, drawn in
// docs/kernels.md), computed on the host. Written for reading: one code, one coefficient at a time.
// It is the reference that the device's kernels are compared with.
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/view.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// REQUIREs a shape that the layout has: rows and cols from 1, bits, group, scale dtype and zeros as
// the kind allows (a codebook stores no zeros).
void check_packed_shape(const PackedShape& shape);
// check_packed_shape, and that the views are where and as large as the shape says: on `device`, at
// multiples of 16 bytes, a book and row units exactly if they are needed. The permutation's values
// are not looked at. `op` begins the messages.
void check_packed_weight(const char* op, const PackedWeight& w, DeviceKind device);
// The planes of repack and unpack: codes u8 [rows, cols], scales f32 and zeros i32
// [rows * terms, groups]. Zeros must be absent if `no_zeros`.
void check_packed_planes(const char* op, const PackedShape& shape, View codes, View scales,
                         View zeros, bool no_zeros, DeviceKind device);

// The zero of every unit when none is stored: 2^(bits-1) of one term's code, so 1 for both terms of
// binary2; 0 for a codebook, which has no zeros.
[[nodiscard]] std::int32_t implicit_zero(const PackedShape& shape);

// ---- codes ----

// A code of more than four bits is split: low bits first, each part a plane of its own. The two
// codes of binary2 are planes, too.
struct CodePart {
  int first_bit = 0;        // of the code
  int bits = 0;             // 1..4
  std::int64_t offset = 0;  // bytes from the start of the record
};
struct CodeParts {
  std::array<CodePart, 2> part;
  int count = 1;
};
[[nodiscard]] CodeParts code_parts(const PackedShape& shape);

// Which register half of which lane holds the code at (row, col) of a record, 0 <= row < 16 and
// 0 <= col < 128. A pair is two neighbouring columns; `half` is 0 for the even one.
struct LanePlace {
  int lane = 0;  // 0..31
  int pair = 0;  // 0..31
  int half = 0;
};
[[nodiscard]] LanePlace lane_place(std::int64_t row, std::int64_t col);

// Byte within a plane of `bits` bits of word `word` (0 .. 2 * bits - 1) of a lane.
[[nodiscard]] std::int64_t lane_word_byte(int bits, int lane, int word);

// Where bit `k` of a plane's part of a code lies: which word of the lane, which bit of the word.
// Planes of three bits are laid out by bytes: each byte of a word has codes of one column only.
struct BitPlace {
  int word = 0;
  int bit = 0;
};
[[nodiscard]] BitPlace code_bit_place(int bits, const LanePlace& place, int k);

// One code of a record.
[[nodiscard]] unsigned read_record_code(const PackedShape& shape, const std::byte* record,
                                        std::int64_t row, std::int64_t col);
// The record's bytes must have been 0 there.
void write_record_code(const PackedShape& shape, std::byte* record, std::int64_t row,
                       std::int64_t col, unsigned code);

// ---- coefficients ----

// Byte within a unit (PackedShape::unit_bytes) of the scale and of the zero of a row of the tile.
[[nodiscard]] std::int64_t unit_scale_byte(const PackedShape& shape, int term, std::int64_t row);
[[nodiscard]] std::int64_t unit_zero_byte(const PackedShape& shape, int term, std::int64_t row);
// The scale and the zero (stored or implicit) of a row of the tile.
[[nodiscard]] float read_unit_scale(const PackedShape& shape, const std::byte* unit, int term,
                                    std::int64_t row);
[[nodiscard]] std::int32_t read_unit_zero(const PackedShape& shape, const std::byte* unit, int term,
                                          std::int64_t row);

// Unit `unit` (0 .. groups() - 1) of the row tile as column block `col_block` has it; with group 0
// it lies in row_units, whatever the block.
[[nodiscard]] std::byte* packed_unit(const PackedWeight& w, std::int64_t row_tile,
                                     std::int64_t col_block, std::int64_t unit);
[[nodiscard]] std::byte* packed_record(const PackedWeight& w, std::int64_t row_tile,
                                       std::int64_t col_block);

// ---- whole row tiles ----
// `w` is on the host and checked, like the planes. Row tiles [first, last): independent of others,
// so callers may work on several at once.

// As PackedOps::repack; REQUIREs codes and zeros in range.
void pack_records(View codes, View scales, View zeros, const PackedWeight& w, std::int64_t first,
                  std::int64_t last);
// As PackedOps::unpack. zeros may be empty for a codebook; if given it gets zeros.
void unpack_records(const PackedWeight& w, View codes, View scales, View zeros, std::int64_t first,
                    std::int64_t last);
// One row of W in f32, columns in the order of W (a permutation is applied). out: cols floats.
// scale * (code - zero) with one rounding; binary2: each product rounded, then the sum. Record kinds
// only.
void decode_packed_row(const PackedWeight& w, std::int64_t row, float* out);

}  // namespace engine
