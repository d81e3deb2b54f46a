// The kernel layout of the schemes that have no records of one size: mixed widths, salient weights
// between signs, regions of signs (docs/kernels.md). Built on the host from the planes of a file,
// one row tile (16 rows) at a time, and never stored.
//
// All bytes lie in PackedWeight::records: tables first, then records. Coefficients have the shape's
// scale_dtype; "16 of" means rows 0, 8, 1, 9, ... 7, 15 of a tile. Codes of a lane are in the order
// of packed_layout.h. A mean that is not stored is -0: -0 + v is v, whatever v.
//
// mixed    u32 [col_blocks]: 16 * (offset in the tile / 16) + width, 0 for signs; then the tiles:
//          for each column block codes of its width (256 bytes per bit), 16 of scale, then 16 of
//          u8 zero (affine) or 16 of mu (sign).
// salient  for each tile 16 of salient scale, 16 of u8 salient zero, and with group 0 16 of alpha,
//          16 of mu; then u32 [tiles * col pairs + 1]: offset of each record / 16, and of the end.
//          A record is 16 x 256: two planes of signs (0 where salient), u16 [32] ends, with groups
//          for both column blocks 16 of alpha and 16 of mu; then u16 entries, code * 256 + 2 *
//          column, by lanes: lane 2 r + h has the salient weights of row r in column block h. An
//          end is 2 * (pairs of entries up to the lane's last) + (1 if that pair is a single entry,
//          followed by a 0).
// regions  u32 [col_blocks]: salient columns; u8 [col_blocks, 128]: the column of the block that
//          stands at each place, salient ones at places of rank 0, 1, ... (region_place); then
//          records: two-bit codes, sign + 2 * (group or second sign), and [16 rows][8]: mean and
//          scale of concentrated, sparse, salient, residual.
// midrise  f32 scale; at byte 256 the records: codes of 16 x 128 weights.
// lattice  f32 scale of the first term, of the second; at byte 256 u32 [3][256]: the words of e8p's
//          patterns (e8p_words()), what the low byte of a code flips in them (14 in the nibble of a
//          negated coordinate, the last bit of all nibbles for -1/4; then a coordinate is
//          (nibble - 7.5) / 2), e8_byte's points (nibble = 2 v + 8). Records: lane 4 g + t has the
//          codes of columns 32 u + 8 t + 0..7 as words u, row g in the low half, row g + 8 in the
//          high half (512 bytes); then those of a second e8p, or the bytes of e8_byte, by u and
//          row.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "engine/weight/linear_weight.h"
#include "engine/weight/packed_weight.h"

namespace engine {

// The shape of a weight that is one of these schemes, from its structure alone. nullopt otherwise.
[[nodiscard]] std::optional<PackedShape> match_scheme(const LinearWeight& weight);

// REQUIREs a shape of these kinds that makes sense; rows, cols and scale_dtype are already checked.
void check_scheme_shape(const PackedShape& shape);

// Where things lie, bytes from the start.
struct SchemePlaces {
  std::int64_t row_units = 0;   // salient: bytes of a tile's coefficients, from 0
  std::int64_t table = 0;       // the u32s
  std::int64_t order = 0;       // regions: the columns by place
  std::int64_t records = 0;     // at a multiple of 256
  std::int64_t fixed = 0;       // salient: bytes of a record before its entries; regions: all
  std::int64_t tile_bytes = 0;  // mixed, regions: of a row tile's records
  std::int64_t units = 0;       // records of a row tile
  std::int64_t total = 0;
};
[[nodiscard]] SchemePlaces scheme_places(const PackedShape& shape);
// mixed: bytes of a record; width 0..8.
[[nodiscard]] std::int64_t mixed_record_bytes(const PackedShape& shape, int width);
// salient: bytes of a record's signs and ends.
inline constexpr std::int64_t salient_head = 512 + 2 * 32;
// regions: the place in a block of the column of rank 0..127: ranks fill one tensor core product
// (16 columns) after the other.
[[nodiscard]] constexpr int region_place(int rank) {
  return rank / 32 * 32 + rank % 16 / 4 * 8 + rank % 32 / 16 * 4 + rank % 4;
}

// Writes the tables. `to`: scheme_bytes of memory. Throws Error(usage) naming the linear for what
// the layout cannot hold (columns that are no blocks of 128; zeros outside 0..255). The weight has
// been validated, and its coefficients are finite.
void prepare_scheme(const LinearWeight& weight, const PackedShape& shape, const std::string& name,
                    std::byte* to);
// Writes the records and coefficients of row tiles [first, last), after prepare_scheme, once for
// each; calls for different tiles may run side by side.
void build_scheme(const LinearWeight& weight, const PackedShape& shape, std::int64_t first,
                  std::int64_t last, std::byte* to);

// As decode_packed_tile (packed_decode.h), for these kinds.
void decode_scheme_tile(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

}  // namespace engine
