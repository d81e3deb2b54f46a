// Packed weights to f32 on the CPU, at the speed of a product that needs them: a row tile at a
// time, words taken as they lie. Record kinds: same bits as decode_packed_row of
// engine/weight/packed_layout.h, which is the reference; others: decode_scheme_tile.
#pragma once

#include <cstdint>

#include "engine/weight/packed_weight.h"

namespace engine {

// The rows of W that row tile `tile` (0 .. row_tiles() - 1) has, 16 but in the last one; columns in
// the order of W. Row r of the tile goes to out + r * stride: cols floats, stride >= cols.
// `w` is on the host, checked (check_packed_weight), and its permutation is one.
void decode_packed_tile(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

}  // namespace engine
