// The scheme layout of column blocks with widths of their own.
#include <span>
#include <vector>

#include "engine/weight/scheme_parts.h"
#include "formats/bits.h"

namespace engine::schemes {
namespace {

// Which term a column block belongs to, where its codes are, and its unit.
struct MixedBlock {
  const Term* term = nullptr;
  std::int64_t slot = 0;  // column of its first code in the term's plane
  std::int64_t unit = 0;
  [[nodiscard]] int width() const { return term->kind == TermKind::sign ? 0 : term->bits; }
};

std::vector<MixedBlock> mixed_blocks(const LinearWeight& w, const std::string& name) {
  std::vector<MixedBlock> blocks(static_cast<std::size_t>(w.cols / record_cols));
  for (const Term& t : w.terms) {
    const bool all = t.support.columns == Select::all;
    const std::int64_t n = all ? w.cols : w.plane(t.support.columns_plane).cols;
    const auto id = [&](std::int64_t i) -> std::int64_t {
      return all ? i : read_element<std::int32_t>(w.plane(t.support.columns_plane), 0, i);
    };
    const auto unit = [&](std::int64_t column) -> std::int64_t {
      if (t.grid.kind == GridKind::row) return 0;
      return t.grid.column_group_plane < 0
                 ? column / t.grid.group
                 : read_element<std::int32_t>(w.plane(t.grid.column_group_plane), 0, column);
    };
    for (std::int64_t k = 0; k < n; k += record_cols) {
      const std::int64_t first = id(k);
      // Ids increase: the last one tells whether all between are there.
      bool whole = first % record_cols == 0 && id(k + record_cols - 1) == first + record_cols - 1;
      for (std::int64_t i = 0; whole && i < record_cols; ++i) {
        whole = unit(first + i) == unit(first);
      }
      if (!whole) refuse(name, "column sets and groups of whole blocks of 128 columns");
      MixedBlock& block = blocks[static_cast<std::size_t>(first / record_cols)];
      if (block.term != nullptr) refuse(name, "column sets that do not overlap");
      block = {&t, t.support.compact ? k : first, unit(first)};
    }
  }
  return blocks;
}

}  // namespace

void prepare_mixed(const LinearWeight& w, const PackedShape& s, const std::string& name,
                   std::byte* to) {
  std::uint32_t at = 0;
  std::int64_t i = 0;
  for (const MixedBlock& block : mixed_blocks(w, name)) {
    write_at(to + 4 * i++, at * 16 + static_cast<std::uint32_t>(block.width()));
    at += static_cast<std::uint32_t>(mixed_record_bytes(s, block.width()) / 16);
  }
}

void build_mixed(const LinearWeight& w, const PackedShape& s, std::int64_t first, std::int64_t last,
                 std::byte* to) {
  const SchemePlaces places = scheme_places(s);
  const std::vector<MixedBlock> blocks = mixed_blocks(w, "mixed widths");
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(w.cols));
  std::vector<RecordCodes> all(blocks.size());
  for (std::int64_t tile = first; tile < last; ++tile) {
    for (RecordCodes& record : all) record = {};
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      const std::int64_t row = tile * record_rows + r;
      for (const Term& t : w.terms) {
        const Plane& plane = w.plane(t.codes_plane);
        unpack_row({plane_row(plane, row), static_cast<std::size_t>(plane.row_bytes())},
                   static_cast<unsigned>(plane.bits),
                   std::span(codes).first(static_cast<std::size_t>(plane.cols)));
        for (std::size_t i = 0; i < blocks.size(); ++i) {
          if (blocks[i].term != &t) continue;
          std::memcpy(all[i][static_cast<std::size_t>(r)].data(), codes.data() + blocks[i].slot,
                      static_cast<std::size_t>(record_cols));
        }
      }
    }
    std::byte* record = to + places.records + tile * places.tile_bytes;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const MixedBlock& block = blocks[i];
      const Term& t = *block.term;
      const std::int64_t bytes = mixed_record_bytes(s, block.width());
      std::memset(record, 0, static_cast<std::size_t>(bytes));
      pack_record_codes(t.bits, all[i], record);
      std::byte* scales = record + 256 * t.bits;
      std::byte* second = scales + record_rows * element(s);
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        const std::int64_t row = tile * record_rows + r, place = row_place(r);
        write_coefficient(s.scale_dtype, scales, place,
                          read_float(w.plane(t.grid.scale_plane), row, block.unit));
        if (t.kind == TermKind::sign) {
          write_coefficient(
              s.scale_dtype, second, place,
              t.mu_plane < 0 ? -0.0F : read_float(w.plane(t.mu_plane), row, block.unit));
        } else {
          const std::int64_t zero = t.grid.zero_plane < 0
                                        ? std::int64_t{1} << (t.bits - 1)
                                        : read_integer(w.plane(t.grid.zero_plane), row, block.unit);
          second[place] = static_cast<std::byte>(zero);
        }
      }
      record += bytes;
    }
  }
}

void decode_mixed(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride) {
  const PackedShape& s = w.shape;
  const SchemePlaces places = scheme_places(s);
  const auto* base = static_cast<const std::byte*>(w.records.data);
  RecordCodes codes;
  for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
    const auto entry = read_at<std::uint32_t>(base + 4 * block);
    const int width = static_cast<int>(entry % 16), bits = std::max(width, 1);
    const std::byte* record =
        base + places.records + tile * places.tile_bytes + std::int64_t{entry / 16} * 16;
    unpack_record_codes(bits, record, codes);
    const std::byte* scales = record + 256 * bits;
    const std::byte* second = scales + record_rows * element(s);
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      const std::int64_t place = row_place(r);
      const float scale = read_coefficient(s.scale_dtype, scales, place);
      const float mean = width == 0 ? read_coefficient(s.scale_dtype, second, place) : 0.0F;
      const int zero = width == 0 ? 0 : std::to_integer<int>(second[place]);
      for (std::int64_t c = 0; c < record_cols; ++c) {
        const int code = codes[static_cast<std::size_t>(r)][static_cast<std::size_t>(c)];
        out[r * stride + block * record_cols + c] = width == 0
                                                        ? mean + (code != 0 ? scale : -scale)
                                                        : scale * static_cast<float>(code - zero);
      }
    }
  }
}

std::optional<PackedShape> match_mixed(const LinearWeight& w, PackedShape s) {
  if (w.cols % record_cols != 0) return std::nullopt;
  s.kind = PackedKind::mixed;
  s.group = record_cols;
  s.bits = 0;
  s.zeros = false;
  std::int64_t covered = 0;
  for (const Term& t : w.terms) {
    if (t.kind != TermKind::affine && t.kind != TermKind::sign) return std::nullopt;
    const Support& on = t.support;
    if (on.bitmap != Select::all || on.columns == Select::not_in) return std::nullopt;
    if (!fits_grid(w, t, record_cols, s.scale_dtype)) return std::nullopt;
    const std::int64_t n = on.columns == Select::all ? w.cols : w.plane(on.columns_plane).cols;
    if (n % record_cols != 0) return std::nullopt;
    const int width = t.kind == TermKind::sign ? 0 : t.bits;
    s.width_blocks[static_cast<std::size_t>(width)] += n / record_cols;
    s.bits = std::max(s.bits, t.bits);
    covered += n;
  }
  if (covered != w.cols) return std::nullopt;
  return s;
}

}  // namespace engine::schemes
