#include "engine/weight/packed_layout.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

constexpr int part_bits = 4;  // the widest plane
constexpr int lane_words(int bits) { return 2 * bits; }

std::uint32_t read_word(const std::byte* at) {
  std::uint32_t word = 0;
  std::memcpy(&word, at, sizeof word);
  return word;
}

void set_bit(std::byte* at, int bit) {
  const std::uint32_t word = read_word(at) | std::uint32_t{1} << static_cast<unsigned>(bit);
  std::memcpy(at, &word, sizeof word);
}

float read_scale(DType dtype, const std::byte* at) {
  const auto read = [at](auto v) {
    std::memcpy(&v, at, sizeof v);
    return to_float(v);
  };
  if (dtype == DType::f16) return read(f16{});
  if (dtype == DType::bf16) return read(bf16{});
  return read(float{});
}

void write_scale(DType dtype, std::byte* at, float value) {
  const auto write = [at, value](auto v) {
    store(v, value);
    std::memcpy(at, &v, sizeof v);
  };
  if (dtype == DType::f16) return write(f16{});
  if (dtype == DType::bf16) return write(bf16{});
  write(float{});
}

// The rows that a tile has: 16 but in the last one.
std::int64_t tile_rows(const PackedShape& s, std::int64_t tile) {
  return std::min(record_rows, s.rows - tile * record_rows);
}

// First unit that a column block has coefficients for, and how many (group > 0).
std::int64_t first_unit(const PackedShape& s, std::int64_t col_block) {
  return col_block * record_cols / s.group;
}

void check_bytes(const char* op, const char* what, const View& v, std::int64_t bytes,
                 DeviceKind device) {
  REQUIRE(v.dtype == DType::u8 && v.rows == 1 && v.cols == bytes && v.data != nullptr &&
              v.device == device && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0,
          std::string(op) + ": " + what + ": expected u8 [1, " + std::to_string(bytes) +
              "] at a multiple of 16 bytes on the device, found " + v.shape());
}

void pack_unit(const PackedShape& s, View scales, View zeros, std::int64_t tile, std::int64_t unit,
               std::byte* to) {
  const float* scale = scales.host<float>();
  const std::int32_t* zero = s.zeros ? zeros.host<std::int32_t>() : nullptr;
  for (int term = 0; term < s.terms(); ++term) {
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      const std::int64_t plane_row = term * s.rows + tile * record_rows + r;
      write_scale(s.scale_dtype, to + unit_scale_byte(s, term, r),
                  scale[plane_row * scales.stride + unit]);
      if (zero == nullptr) continue;
      const std::int32_t z = zero[plane_row * zeros.stride + unit];
      REQUIRE(z >= 0 && z <= 255, "repack: a zero is " + std::to_string(z));
      to[unit_zero_byte(s, term, r)] = static_cast<std::byte>(z);
    }
  }
}

}  // namespace

void check_packed_shape(const PackedShape& s) {
  const auto fail = [](const std::string& what) { REQUIRE(false, "packed shape: " + what); };
  if (s.rows < 1 || s.cols < 1 || s.rows > INT32_MAX || s.cols > INT32_MAX) {
    fail("[" + std::to_string(s.rows) + ", " + std::to_string(s.cols) + "]");
  }
  if (s.scale_dtype != DType::f32 && s.scale_dtype != DType::f16 && s.scale_dtype != DType::bf16) {
    fail(std::string("scales of ") + dtype_name(s.scale_dtype));
  }
  if (!is_record_kind(s.kind)) return check_scheme_shape(s);
  const bool bits_fit = s.kind == PackedKind::affine     ? s.bits >= 1 && s.bits <= 8
                        : s.kind == PackedKind::codebook ? s.bits == 4
                                                         : s.bits == 2;
  if (!bits_fit) fail(std::to_string(s.bits) + " bits");
  const bool group_fits =
      s.group == 0 || s.group == 32 || s.group == 64 || (s.group > 0 && s.group % record_cols == 0);
  if (!group_fits) fail("group " + std::to_string(s.group));
  if (s.kind == PackedKind::codebook && s.zeros) fail("a codebook with zeros");
}

void check_packed_weight(const char* op, const PackedWeight& w, DeviceKind device) {
  const PackedShape& s = w.shape;
  check_packed_shape(s);
  check_bytes(op, "records", w.records, s.records_bytes(), device);
  if (s.row_unit_bytes() > 0) {
    check_bytes(op, "row units", w.row_units, s.row_unit_bytes(), device);
  } else {
    REQUIRE(w.row_units.empty(), std::string(op) + ": row units of a weight with groups");
  }
  if (s.kind == PackedKind::codebook) {
    REQUIRE(w.book.dtype == DType::f32 && w.book.rows == 1 && w.book.cols == 16 &&
                w.book.device == device && w.book.data != nullptr,
            std::string(op) + ": book " + w.book.shape());
  } else {
    REQUIRE(w.book.empty(), std::string(op) + ": a book without a codebook");
  }
  if (w.permutation.empty()) return;
  REQUIRE(w.permutation.dtype == DType::i32 && w.permutation.rows == 1 &&
              w.permutation.cols == s.cols && w.permutation.device == device,
          std::string(op) + ": permutation " + w.permutation.shape());
}

void check_packed_planes(const char* op, const PackedShape& s, View codes, View scales, View zeros,
                         bool no_zeros, DeviceKind device) {
  const auto check = [&](const char* what, const View& v, DType dtype, std::int64_t rows,
                         std::int64_t cols) {
    REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols && v.device == device &&
                v.data != nullptr && (v.stride >= cols || rows == 1),
            std::string(op) + ": " + what + ": expected " + dtype_name(dtype) + " [" +
                std::to_string(rows) + ", " + std::to_string(cols) + "] on the device, found " +
                v.shape());
  };
  check("codes", codes, DType::u8, s.rows, s.cols);
  check("scales", scales, DType::f32, s.rows * s.terms(), s.groups());
  if (no_zeros) {
    REQUIRE(zeros.empty(), std::string(op) + ": zeros " + zeros.shape() + " that are not stored");
  } else {
    check("zeros", zeros, DType::i32, s.rows * s.terms(), s.groups());
  }
}

std::int32_t implicit_zero(const PackedShape& s) {
  if (s.kind == PackedKind::codebook) return 0;
  const int term_bits = s.kind == PackedKind::binary2 ? 1 : s.bits;
  return std::int32_t{1} << (term_bits - 1);
}

CodeParts code_parts(const PackedShape& s) {
  // binary2 packs two codes of one bit; otherwise the low four bits come first.
  const int low = s.kind == PackedKind::binary2 ? 1 : std::min(s.bits, part_bits);
  CodeParts parts;
  parts.part[0] = {0, low, 0};
  if (s.bits > low) {
    parts.part[1] = {low, s.bits - low, std::int64_t{256} * low};
    parts.count = 2;
  }
  return parts;
}

LanePlace lane_place(std::int64_t row, std::int64_t col) {
  // Lane 4 g + t has rows g and g + 8, and of every 32 columns eight neighbours.
  const std::int64_t g = row % 8;
  const std::int64_t t = col % 32 / 8;
  const std::int64_t e = col % 8;
  const std::int64_t step = 2 * (col / 32) + e / 4;               // one tensor core product
  const std::int64_t reg = (e % 4 / 2) * 2 + (row >= 8 ? 1 : 0);  // its register a0..a3
  return {static_cast<int>(4 * g + t), static_cast<int>(4 * step + reg), static_cast<int>(e % 2)};
}

std::int64_t lane_word_byte(int bits, int lane, int word) {
  const int whole = lane_words(bits) / 4;  // chunks of four words per lane; then one of two
  const std::int64_t chunk = std::int64_t{512} * (word / 4);
  const int words = word / 4 < whole ? 4 : 2;
  return chunk + std::int64_t{4} * (words * lane + word % 4);
}

BitPlace code_bit_place(int bits, const LanePlace& p, int k) {
  if (bits == 3) {
    // Three words for half of the columns. A byte of them has two codes and two bits to spare; the
    // six spare bits of the same byte of each word hold two codes more.
    const int first = 3 * (p.pair / 16);
    const int byte = 16 * p.half + 8 * (p.pair / 2 % 2);
    const int code = p.pair / 8 % 2 * 4 + p.pair / 4 % 2 * 2 + p.pair % 2;  // 0..7 of this byte
    if (code < 6) return {first + code / 2, byte + 3 * (code % 2) + k};
    const int spare = 3 * (code - 6) + k;
    return {first + spare / 2, byte + 6 + spare % 2};
  }
  const int per_word = 16 / bits;  // a pair's codes lie at the same bit of a word's two halves
  return {p.pair / per_word, 16 * p.half + bits * (p.pair % per_word) + k};
}

unsigned read_record_code(const PackedShape& s, const std::byte* record, std::int64_t row,
                          std::int64_t col) {
  const LanePlace place = lane_place(row, col);
  const CodeParts parts = code_parts(s);
  unsigned code = 0;
  for (int i = 0; i < parts.count; ++i) {
    const CodePart& part = parts.part[static_cast<std::size_t>(i)];
    const std::byte* plane = record + part.offset;
    const auto shifted_word = [&](const BitPlace& at) {
      return read_word(plane + lane_word_byte(part.bits, place.lane, at.word)) >>
             static_cast<unsigned>(at.bit);
    };
    const BitPlace lowest = code_bit_place(part.bits, place, 0);
    const auto first_bit = static_cast<unsigned>(part.first_bit);
    if (code_bit_place(part.bits, place, part.bits - 1).word == lowest.word) {
      code |= (shifted_word(lowest) & ((1U << static_cast<unsigned>(part.bits)) - 1U)) << first_bit;
      continue;
    }
    for (int k = 0; k < part.bits; ++k) {
      const unsigned bit = shifted_word(code_bit_place(part.bits, place, k)) & 1U;
      code |= bit << (first_bit + static_cast<unsigned>(k));
    }
  }
  return code;
}

void write_record_code(const PackedShape& s, std::byte* record, std::int64_t row, std::int64_t col,
                       unsigned code) {
  const LanePlace place = lane_place(row, col);
  const CodeParts parts = code_parts(s);
  for (int i = 0; i < parts.count; ++i) {
    const CodePart& part = parts.part[static_cast<std::size_t>(i)];
    for (int k = 0; k < part.bits; ++k) {
      if ((code >> static_cast<unsigned>(part.first_bit + k) & 1U) == 0) continue;
      const BitPlace at = code_bit_place(part.bits, place, k);
      set_bit(record + part.offset + lane_word_byte(part.bits, place.lane, at.word), at.bit);
    }
  }
}

std::int64_t unit_scale_byte(const PackedShape& s, int term, std::int64_t row) {
  const std::int64_t position = 2 * (row % 8) + row / 8;  // 0, 8, 1, 9, ...
  return (term * record_rows + position) * static_cast<std::int64_t>(dtype_bytes(s.scale_dtype));
}

std::int64_t unit_zero_byte(const PackedShape& s, int term, std::int64_t row) {
  const std::int64_t position = 2 * (row % 8) + row / 8;
  return unit_scale_byte(s, s.terms(), 0) + term * record_rows + position;
}

float read_unit_scale(const PackedShape& s, const std::byte* unit, int term, std::int64_t row) {
  return read_scale(s.scale_dtype, unit + unit_scale_byte(s, term, row));
}

std::int32_t read_unit_zero(const PackedShape& s, const std::byte* unit, int term,
                            std::int64_t row) {
  if (!s.zeros) return implicit_zero(s);
  return std::to_integer<std::int32_t>(unit[unit_zero_byte(s, term, row)]);
}

std::byte* packed_record(const PackedWeight& w, std::int64_t row_tile, std::int64_t col_block) {
  return static_cast<std::byte*>(w.records.data) +
         (row_tile * w.shape.col_blocks() + col_block) * w.shape.record_bytes();
}

std::byte* packed_unit(const PackedWeight& w, std::int64_t row_tile, std::int64_t col_block,
                       std::int64_t unit) {
  const PackedShape& s = w.shape;
  if (s.group == 0) {
    return static_cast<std::byte*>(w.row_units.data) + row_tile * s.unit_bytes();
  }
  return packed_record(w, row_tile, col_block) + s.code_bytes() +
         (unit - first_unit(s, col_block)) * s.unit_bytes();
}

void pack_records(View codes, View scales, View zeros, const PackedWeight& w, std::int64_t first,
                  std::int64_t last) {
  const PackedShape& s = w.shape;
  const std::uint8_t* code = codes.host<std::uint8_t>();
  for (std::int64_t tile = first; tile < last; ++tile) {
    if (s.group == 0) {
      std::byte* unit = packed_unit(w, tile, 0, 0);
      std::memset(unit, 0, static_cast<std::size_t>(s.unit_bytes()));
      pack_unit(s, scales, zeros, tile, 0, unit);
    }
    for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
      std::byte* record = packed_record(w, tile, block);
      std::memset(record, 0, static_cast<std::size_t>(s.record_bytes()));
      const std::int64_t width = std::min(record_cols, s.cols - block * record_cols);
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        const std::uint8_t* from =
            code + (tile * record_rows + r) * codes.stride + block * record_cols;
        for (std::int64_t c = 0; c < width; ++c) {
          REQUIRE(from[c] >> s.bits == 0, "repack: a code is " + std::to_string(from[c]) + " at " +
                                              std::to_string(s.bits) + " bits");
          write_record_code(s, record, r, c, from[c]);
        }
      }
      for (std::int64_t i = 0; i < s.groups_per_record(); ++i) {
        const std::int64_t unit = first_unit(s, block) + i;
        if (unit < s.groups()) {
          pack_unit(s, scales, zeros, tile, unit, packed_unit(w, tile, block, unit));
        }
      }
    }
  }
}

void unpack_records(const PackedWeight& w, View codes, View scales, View zeros, std::int64_t first,
                    std::int64_t last) {
  const PackedShape& s = w.shape;
  std::uint8_t* code = codes.host<std::uint8_t>();
  float* scale = scales.host<float>();
  std::int32_t* zero = zeros.empty() ? nullptr : zeros.host<std::int32_t>();
  for (std::int64_t row = first * record_rows; row < std::min(last * record_rows, s.rows); ++row) {
    const std::int64_t tile = row / record_rows;
    const std::int64_t r = row % record_rows;
    for (std::int64_t c = 0; c < s.cols; ++c) {
      code[row * codes.stride + c] = static_cast<std::uint8_t>(
          read_record_code(s, packed_record(w, tile, c / record_cols), r, c % record_cols));
    }
    for (std::int64_t u = 0; u < s.groups(); ++u) {
      const std::byte* unit = packed_unit(w, tile, u * s.group / record_cols, u);
      for (int term = 0; term < s.terms(); ++term) {
        const std::int64_t plane_row = term * s.rows + row;
        scale[plane_row * scales.stride + u] = read_unit_scale(s, unit, term, r);
        if (zero != nullptr) zero[plane_row * zeros.stride + u] = read_unit_zero(s, unit, term, r);
      }
    }
  }
}

void decode_packed_row(const PackedWeight& w, std::int64_t row, float* out) {
  const PackedShape& s = w.shape;
  const std::int64_t tile = row / record_rows;
  const std::int64_t r = row % record_rows;
  REQUIRE(is_record_kind(s.kind), "decode_packed_row: not a record kind");
  const float* book = s.kind == PackedKind::codebook ? w.book.host<float>() : nullptr;
  const auto* perm = w.permutation.empty() ? nullptr : w.permutation.host<std::int32_t>();
  const std::int64_t span = s.group == 0 ? record_cols : std::min(s.group, record_cols);
  for (std::int64_t from = 0; from < s.cols; from += span) {
    const std::int64_t block = from / record_cols;
    const std::byte* record = packed_record(w, tile, block);
    const std::byte* unit = packed_unit(w, tile, block, s.group == 0 ? 0 : from / s.group);
    std::array<float, 2> scale{};
    std::array<std::int32_t, 2> zero{};
    for (int term = 0; term < s.terms(); ++term) {
      scale[static_cast<std::size_t>(term)] = read_unit_scale(s, unit, term, r);
      zero[static_cast<std::size_t>(term)] = read_unit_zero(s, unit, term, r);
    }
    const auto affine = [&](std::size_t term, unsigned code) {
      return scale[term] * static_cast<float>(static_cast<std::int32_t>(code) - zero[term]);
    };
    for (std::int64_t c = from; c < std::min(from + span, s.cols); ++c) {
      const std::int64_t to = perm != nullptr ? perm[c] : c;
      const unsigned code = read_record_code(s, record, r, c % record_cols);
      switch (s.kind) {
        case PackedKind::affine:
          out[to] = affine(0, code);
          break;
        case PackedKind::codebook:
          out[to] = scale[0] * book[code];
          break;
        case PackedKind::binary2:
          out[to] = affine(0, code & 1U) + affine(1, code >> 1U);
          break;
        default:
          break;
      }
    }
  }
}

}  // namespace engine
