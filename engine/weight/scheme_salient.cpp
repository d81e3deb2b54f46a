// The scheme layout of signs with salient weights between them.
#include <array>
#include <bit>
#include <utility>
#include <vector>

#include "engine/weight/scheme_parts.h"

namespace engine::schemes {
namespace {

// Sixteen rows' alpha and mu of one unit.
void write_levels(const LinearWeight& w, const PackedShape& s, std::int64_t tile, std::int64_t unit,
                  std::byte* to) {
  const Term& low = w.terms[0];
  for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
    const std::int64_t row = tile * record_rows + r;
    write_coefficient(s.scale_dtype, to, row_place(r),
                      read_float(w.plane(low.grid.scale_plane), row, unit));
    write_coefficient(s.scale_dtype, to, record_rows + row_place(r),
                      low.mu_plane < 0 ? -0.0F : read_float(w.plane(low.mu_plane), row, unit));
  }
}

void write_row_unit(const LinearWeight& w, const PackedShape& s, std::int64_t tile, std::byte* to) {
  const Term& high = w.terms[1];
  std::byte* zeros = to + record_rows * element(s);
  for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
    const std::int64_t row = tile * record_rows + r;
    write_coefficient(s.scale_dtype, to, row_place(r),
                      read_float(w.plane(high.grid.scale_plane), row, 0));
    const std::int64_t zero = high.grid.zero_plane < 0
                                  ? std::int64_t{1} << (high.bits - 1)
                                  : read_integer(w.plane(high.grid.zero_plane), row, 0);
    zeros[row_place(r)] = static_cast<std::byte>(zero);
  }
  if (s.group == 0) write_levels(w, s, tile, 0, zeros + record_rows);
}

// Puts each lane's entries in an order in which few lanes' i-th ones read the same bank of shared
// memory, where a column of x is half a word.
void spread_banks(std::array<std::vector<std::uint16_t>, 32>& lists) {
  std::size_t longest = 0;
  for (const auto& list : lists) longest = std::max(longest, list.size());
  for (std::size_t i = 0; i < longest; ++i) {
    std::array<std::uint8_t, 32> load{};
    std::array<bool, 128> read{};  // words: the same one is read once for all
    for (std::size_t lane = 0; lane < 32; ++lane) {
      auto& list = lists[lane];
      if (i >= list.size()) continue;
      const auto word = [&](std::size_t j) { return list[j] % 256U / 4 + 64 * (lane % 2); };
      const auto cost = [&](std::size_t j) { return read[word(j)] ? 0 : 1 + load[word(j) % 32]; };
      std::size_t best = i;
      for (std::size_t j = i + 1; j < list.size() && cost(best) > 1; ++j) {
        if (cost(j) < cost(best)) best = j;
      }
      std::swap(list[i], list[best]);
      if (cost(i) > 0) ++load[word(i) % 32];
      read[word(i)] = true;
    }
  }
}

}  // namespace

// Bits of a bitmap row from column 128 * block on.
std::array<std::uint64_t, 2> block_bits(const Plane& bitmap, std::int64_t r, std::int64_t block) {
  std::array<std::uint64_t, 2> bits{};
  const std::int64_t at = 16 * block, n = std::min<std::int64_t>(16, bitmap.row_bytes() - at);
  if (n > 0) std::memcpy(bits.data(), plane_row(bitmap, r) + at, static_cast<std::size_t>(n));
  return bits;
}
std::int64_t block_count(const Plane& bitmap, std::int64_t r, std::int64_t block) {
  const auto bits = block_bits(bitmap, r, block);
  return std::popcount(bits[0]) + std::popcount(bits[1]);
}

void prepare_salient(const LinearWeight& w, const PackedShape& s, std::byte* to) {
  const SchemePlaces places = scheme_places(s);
  const Plane& bitmap = w.plane(w.terms[0].support.bitmap_plane);
  std::int64_t at = 0, index = 0, high = 0;
  for (std::int64_t tile = 0; tile < s.row_tiles(); ++tile) {
    write_at(to + tile * places.row_units, high);  // for build_salient, which writes over it
    for (std::int64_t pair = 0; pair < places.units; ++pair) {
      write_at(to + places.table + 4 * index++, static_cast<std::uint32_t>(at / 16));
      std::int64_t n = 0;  // pairs of entries
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        for (std::int64_t h = 0; h < 2; ++h) {
          const std::int64_t count = block_count(bitmap, tile * record_rows + r, 2 * pair + h);
          n += (count + 1) / 2;
          high += count;
        }
      }
      at += places.fixed + align_up(4 * n, 16);
    }
  }
  write_at(to + places.table + 4 * index, static_cast<std::uint32_t>(at / 16));
  REQUIRE(places.records + at <= places.total, "salient weights beyond their room");
  std::memset(to + places.records + at, 0,
              static_cast<std::size_t>(places.total - places.records - at));
}

void build_salient(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to) {
  const SchemePlaces places = scheme_places(s);
  const Plane& bitmap = w.plane(w.terms[0].support.bitmap_plane);
  const Plane& signs = w.plane(w.terms[0].codes_plane);
  const Plane& bytes = w.plane(w.terms[1].codes_plane);
  // Salient weights before the row's next one.
  auto high = read_at<std::int64_t>(to + first * places.row_units);
  const auto pairs = static_cast<std::size_t>(places.units);
  std::vector<RecordCodes> codes(2 * pairs);
  std::vector<std::array<std::vector<std::uint16_t>, 32>> lists(pairs);
  for (std::int64_t tile = first; tile < last; ++tile) {
    for (RecordCodes& record : codes) record = {};
    for (auto& record : lists) {
      for (auto& list : record) list.clear();
    }
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      const std::int64_t row = tile * record_rows + r;
      std::int64_t low = row * s.cols - high;
      for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
        const auto on = block_bits(bitmap, row, block);
        auto& list =
            lists[static_cast<std::size_t>(block / 2)][static_cast<std::size_t>(2 * r + block % 2)];
        auto& to_row = codes[static_cast<std::size_t>(block)][static_cast<std::size_t>(r)];
        for (std::int64_t c = 0; c < block_cols(s, block); ++c) {
          if ((on[static_cast<std::size_t>(c / 64)] >> (c % 64) & 1U) != 0) {
            list.push_back(static_cast<std::uint16_t>(read_code(bytes, 0, high++) * 256 +
                                                      2 * static_cast<unsigned>(c)));
          } else {
            to_row[static_cast<std::size_t>(c)] =
                static_cast<std::uint8_t>(read_code(signs, 0, low++));
          }
        }
      }
    }
    std::byte* unit = to + tile * places.row_units;
    std::memset(unit, 0, static_cast<std::size_t>(places.row_units));
    write_row_unit(w, s, tile, unit);
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      const std::byte* table =
          to + places.table + 4 * (tile * places.units + static_cast<std::int64_t>(pair));
      const std::int64_t from = 16 * std::int64_t{read_at<std::uint32_t>(table)};
      const std::int64_t end = 16 * std::int64_t{read_at<std::uint32_t>(table + 4)};
      std::byte* record = to + places.records + from;
      std::memset(record, 0, static_cast<std::size_t>(end - from));
      pack_record_codes(1, codes[2 * pair], record);
      pack_record_codes(1, codes[2 * pair + 1], record + 256);
      std::byte* entry = record + places.fixed;
      std::size_t pairs_before = 0;
      spread_banks(lists[pair]);
      for (std::size_t lane = 0; lane < 32; ++lane) {
        const auto& list = lists[pair][lane];
        for (std::size_t i = 0; i < list.size(); ++i) {
          write_at(entry + 4 * pairs_before + 2 * i, list[i]);
        }
        pairs_before += (list.size() + 1) / 2;
        write_at(record + 512 + 2 * lane,
                 static_cast<std::uint16_t>(2 * pairs_before + list.size() % 2));
      }
      if (s.group != 0) {
        for (std::int64_t h = 0; h < 2; ++h) {
          const std::int64_t block = 2 * static_cast<std::int64_t>(pair) + h;
          if (block >= s.col_blocks()) break;
          write_levels(w, s, tile, block * record_cols / s.group,
                       record + salient_head + h * 2 * record_rows * element(s));
        }
      }
    }
  }
}

void decode_salient(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride) {
  const PackedShape& s = w.shape;
  const SchemePlaces places = scheme_places(s);
  const auto* base = static_cast<const std::byte*>(w.records.data);
  const std::byte* unit = base + tile * places.row_units;
  const std::byte* zeros = unit + record_rows * element(s);
  RecordCodes codes;
  for (std::int64_t pair = 0; pair < places.units; ++pair) {
    const auto at = read_at<std::uint32_t>(base + places.table + 4 * (tile * places.units + pair));
    const std::byte* record = base + places.records + 16 * std::int64_t{at};
    for (std::int64_t h = 0; h < 2; ++h) {
      const std::int64_t block = 2 * pair + h;
      if (block >= s.col_blocks()) break;
      unpack_record_codes(1, record + 256 * h, codes);
      const std::byte* levels = s.group == 0
                                    ? zeros + record_rows
                                    : record + salient_head + h * 2 * record_rows * element(s);
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        const float alpha = read_coefficient(s.scale_dtype, levels, row_place(r));
        const float mu = read_coefficient(s.scale_dtype, levels, record_rows + row_place(r));
        for (std::int64_t c = 0; c < block_cols(s, block); ++c) {
          const bool up = codes[static_cast<std::size_t>(r)][static_cast<std::size_t>(c)] != 0;
          out[r * stride + block * record_cols + c] = mu + (up ? alpha : -alpha);
        }
      }
    }
    int first = 0;  // pair of entries
    for (std::int64_t lane = 0; lane < 32; ++lane) {
      const int word = read_at<std::uint16_t>(record + 512 + 2 * lane);
      const std::int64_t r = lane / 2;
      const float scale = read_coefficient(s.scale_dtype, unit, row_place(r));
      const int zero = std::to_integer<int>(zeros[row_place(r)]);
      const int last = word / 2 * 2 - word % 2;
      for (int i = 2 * std::exchange(first, word / 2); i < last; ++i) {
        const unsigned e = read_at<std::uint16_t>(record + places.fixed + 2 * i);
        const std::int64_t column = (2 * pair + lane % 2) * record_cols + e % 256 / 2;
        out[r * stride + column] = scale * static_cast<float>(static_cast<int>(e / 256) - zero);
      }
    }
  }
}

std::optional<PackedShape> match_salient(const LinearWeight& w, PackedShape s) {
  if (w.terms.size() != 2) return std::nullopt;
  const Term &low = w.terms[0], &high = w.terms[1];
  const Support &off = low.support, &on = high.support;
  const bool fits = low.kind == TermKind::sign && high.kind == TermKind::affine &&
                    off.columns == Select::all && on.columns == Select::all &&
                    off.bitmap == Select::not_in && on.bitmap == Select::in && off.compact &&
                    on.compact && off.bitmap_plane == on.bitmap_plane &&
                    fits_grid(w, low, record_cols, s.scale_dtype) &&
                    fits_grid(w, high, record_cols, s.scale_dtype) &&
                    low.grid.column_group_plane < 0 && high.grid.kind == GridKind::row;
  if (!fits) return std::nullopt;
  s.kind = PackedKind::salient;
  s.bits = high.bits;
  s.group = low.grid.kind == GridKind::row ? 0 : low.grid.group;
  s.zeros = true;
  s.salient = w.plane(high.codes_plane).cols;
  return s;
}

}  // namespace engine::schemes
