#include "engine/weight/packed_decode.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "engine/weight/packed_layout.h"
#include "engine/weight/scheme_layout.h"

namespace engine {
namespace {

// The codes of one record, a byte each.
using RecordCodes = std::array<std::array<std::uint8_t, record_cols>, record_rows>;

// A lane's words of a plane of kBits bits: chunks of four words, then one of two.
template <int kBits>
struct LaneWords {
  std::array<std::uint32_t, 2 * kBits> w;

  LaneWords(const std::byte* plane, std::size_t lane) {
    constexpr std::size_t fours = kBits / 2;
    for (std::size_t c = 0; c < fours; ++c) {
      std::memcpy(w.data() + 4 * c, plane + 512 * c + 16 * lane, 16);
    }
    if constexpr (kBits % 2 != 0) {
      std::memcpy(w.data() + 4 * fours, plane + 512 * fours + 8 * lane, 8);
    }
  }

  // The four codes of row g (upper 0) or g + 8 (upper 1) in the columns of product j, one in each
  // byte: columns 0, 2, 1, 3, as words have the odd columns in their high halves.
  template <unsigned j, unsigned upper>
  [[nodiscard]] std::uint32_t four_codes() const {
    if constexpr (kBits == 4) {
      return w[j] >> (4 * upper) & 0x0F0F0F0FU;
    } else if constexpr (kBits == 3) {
      constexpr unsigned first = j / 4 * 3;
      constexpr unsigned r = j % 4 * 2 + upper;  // of eight codes in this byte of three words
      if constexpr (r < 6) return w[first + r / 2] >> (3 * (r % 2)) & 0x07070707U;
      if constexpr (r == 6) {
        return (w[first] >> 6 & 0x03030303U) | (w[first + 1] >> 4 & 0x04040404U);
      }
      return (w[first + 1] >> 7 & 0x01010101U) | (w[first + 2] >> 5 & 0x06060606U);
    } else {
      // The codes of columns 2 and 3 follow those of 0 and 1 (of both rows) in the same half-words.
      constexpr unsigned per_word = 16 / kBits;
      constexpr std::uint32_t mask = 0x00010001U * ((1U << kBits) - 1U);
      const std::uint32_t v = w[4 * j / per_word] >> (kBits * (4 * j % per_word + upper));
      return (v & mask) | (v << (8 - 2 * kBits) & mask << 8U);
    }
  }
};

// Codes of kLow + kHigh bits; two planes of one bit may be the two codes of binary2.
template <int kLow, int kHigh>
struct LaneCodes {
  LaneWords<kLow> low;
  LaneWords<kHigh> high;
  LaneCodes(const std::byte* record, std::size_t lane)
      : low(record, lane), high(record + 256 * kLow, lane) {}
  template <unsigned j, unsigned upper>
  [[nodiscard]] std::uint32_t four_codes() const {
    return low.template four_codes<j, upper>() | high.template four_codes<j, upper>() << kLow;
  }
};
template <int kLow>
struct LaneCodes<kLow, 0> {
  LaneWords<kLow> low;
  LaneCodes(const std::byte* record, std::size_t lane) : low(record, lane) {}
  template <unsigned j, unsigned upper>
  [[nodiscard]] std::uint32_t four_codes() const {
    return low.template four_codes<j, upper>();
  }
};

// Bytes 0, 2, 1, 3.
inline std::uint32_t in_order(std::uint32_t v) {
  return (v & 0xFF0000FFU) | (v & 0xFF00U) << 8 | (v >> 8 & 0xFF00U);
}

template <int kLow, int kHigh>
void read_codes(const std::byte* record, RecordCodes& out) {
  for (std::size_t lane = 0; lane < 32; ++lane) {
    const LaneCodes<kLow, kHigh> codes(record, lane);
    const auto store = [&]<unsigned j, unsigned upper>() {
      const std::uint32_t four = in_order(codes.template four_codes<j, upper>());
      const std::size_t col = 32 * (j / 2) + 8 * (lane % 4) + 4 * (j % 2);
      std::memcpy(out[lane / 4 + 8 * upper].data() + col, &four, sizeof four);
    };
    [&]<unsigned... i>(std::integer_sequence<unsigned, i...>) {
      (store.template operator()<i % 8, i / 8>(), ...);
    }
    (std::make_integer_sequence<unsigned, 16>{});
  }
}

using ReadCodes = void (*)(const std::byte*, RecordCodes&);

ReadCodes codes_reader(const PackedShape& shape) {
  constexpr ReadCodes by_bits[] = {read_codes<1, 0>, read_codes<2, 0>, read_codes<3, 0>,
                                   read_codes<4, 0>, read_codes<4, 1>, read_codes<4, 2>,
                                   read_codes<4, 3>, read_codes<4, 4>};
  return shape.kind == PackedKind::binary2 ? read_codes<1, 1> : by_bits[shape.bits - 1];
}

// The coefficients of one row for one unit.
struct RowUnit {
  std::array<float, 2> scale{};
  std::array<float, 2> zero{};

  RowUnit(const PackedShape& shape, const std::byte* unit, std::int64_t row) {
    for (int t = 0; t < shape.terms(); ++t) {
      const auto i = static_cast<std::size_t>(t);
      scale[i] = read_unit_scale(shape, unit, t, row);
      zero[i] = static_cast<float>(read_unit_zero(shape, unit, t, row));
    }
  }
};

// Differences of codes and zeros are exact in f32, so these are the roundings of decode_packed_row.
void decode_run(const PackedWeight& w, const RowUnit& unit, const std::uint8_t* codes,
                std::int64_t n, float* out) {
  const float scale = unit.scale[0];
  const float zero = unit.zero[0];
  if (w.shape.kind == PackedKind::codebook) {
    const float* book = w.book.host<float>();
    for (std::int64_t i = 0; i < n; ++i) out[i] = scale * book[codes[i]];
    return;
  }
  if (w.shape.kind == PackedKind::affine) {
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] = scale * (static_cast<float>(static_cast<int>(codes[i])) - zero);
    }
    return;
  }
  const float scale1 = unit.scale[1];
  const float zero1 = unit.zero[1];
  for (std::int64_t i = 0; i < n; ++i) {
    const int code = codes[i];
    const float first = scale * (static_cast<float>(code & 1) - zero);
    out[i] = first + scale1 * (static_cast<float>(code >> 1) - zero1);
  }
}

}  // namespace

void decode_packed_tile(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride) {
  const PackedShape& s = w.shape;
  if (!is_record_kind(s.kind)) return decode_scheme_tile(w, tile, out, stride);
  const ReadCodes read = codes_reader(s);
  const auto* perm = w.permutation.empty() ? nullptr : w.permutation.host<std::int32_t>();
  const std::int64_t rows = std::min(record_rows, s.rows - tile * record_rows);
  const std::int64_t span = s.group == 0 ? record_cols : std::min(s.group, record_cols);
  RecordCodes codes;
  float values[record_cols];
  for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
    read(packed_record(w, tile, block), codes);
    const std::int64_t first = block * record_cols;
    const std::int64_t last = std::min(first + record_cols, s.cols);
    for (std::int64_t from = first; from < last; from += span) {
      const std::byte* unit = packed_unit(w, tile, block, s.group == 0 ? 0 : from / s.group);
      const std::int64_t n = std::min(span, last - from);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::uint8_t* code = codes[static_cast<std::size_t>(r)].data() + (from - first);
        float* row = out + r * stride;
        decode_run(w, RowUnit(s, unit, r), code, n, perm == nullptr ? row + from : values);
        if (perm == nullptr) continue;
        for (std::int64_t i = 0; i < n; ++i) row[perm[from + i]] = values[i];
      }
    }
  }
}

}  // namespace engine
