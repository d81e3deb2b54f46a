// The codes of one record (16 rows x 128 columns) into the order of lanes and back, a record at a
// time: engine/weight/packed_layout.h says where each bit lies.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "engine/weight/packed_weight.h"

namespace engine {

// One byte each.
using RecordCodes = std::array<std::array<std::uint8_t, record_cols>, record_rows>;

// Codes of `bits` bits (1..8): 256 * bits bytes, which are overwritten.
void pack_record_codes(int bits, const RecordCodes& codes, std::byte* to);
void unpack_record_codes(int bits, const std::byte* from, RecordCodes& codes);

// Two-bit codes of the scheme `regions`, 512 bytes: word u of lane 4 g + t has the codes of columns
// 32 u + 8 t + e; a pair of neighbours lies in neighbouring bytes. Pair (s, i) of the product s of
// these columns, register i: bytes 2 s and 2 s + 1, bits 2 i and 2 i + 1 of either.
void pack_region_codes(const RecordCodes& codes, std::byte* to);
void unpack_region_codes(const std::byte* from, RecordCodes& codes);

}  // namespace engine
