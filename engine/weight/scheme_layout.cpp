#include "engine/weight/scheme_layout.h"

#include <algorithm>
#include <cstring>

#include "engine/weight/scheme_parts.h"

namespace engine {

using namespace schemes;

std::optional<PackedShape> match_scheme(const LinearWeight& w) {
  if (const auto found = match_lattice(w)) return found;
  if (w.terms.empty() || w.diagonal_plane >= 0 || w.permutation_plane >= 0 ||
      w.left.kind != TransformKind::none || w.right.kind != TransformKind::none) {
    return std::nullopt;
  }
  const int scale = w.terms[0].grid.scale_plane;
  if (scale < 0) return std::nullopt;
  PackedShape s;
  s.rows = w.rows;
  s.cols = w.cols;
  s.scale_dtype = w.plane(scale).dtype;
  for (const auto match : {match_salient, match_regions, match_mixed}) {
    if (auto found = match(w, s)) return found;
  }
  return std::nullopt;
}

void check_scheme_shape(const PackedShape& s) {
  const auto check = [](bool holds, const std::string& what) {
    REQUIRE(holds, "packed shape: " + what);
  };
  if (s.kind == PackedKind::salient) {
    check(s.bits >= 1 && s.bits <= 8, std::to_string(s.bits) + " bits");
    check(s.group >= 0 && s.group % record_cols == 0, "group " + std::to_string(s.group));
    check(s.salient >= 0 && s.salient <= s.rows * s.cols, "salient weights");
    return;
  }
  if (is_lattice(s)) {
    check(s.bits >= 2 && s.bits <= 4, std::to_string(s.bits) + " bits");
    check(s.group == 0 && !s.zeros && s.scale_dtype == DType::f32, "one f32 scale");
    check(s.kind == PackedKind::midrise || s.cols % 8 == 0, std::to_string(s.cols) + " columns");
    check(!s.diagonal || s.right.kind != TransformKind::none, "a diagonal without a transform");
    return;
  }
  check(s.group == record_cols, "group " + std::to_string(s.group));
  if (s.kind != PackedKind::mixed) return;
  std::int64_t blocks = 0;
  for (const std::int64_t n : s.width_blocks) {
    check(n >= 0, "blocks of a width");
    blocks += n;
  }
  check(blocks == s.col_blocks(), "blocks of all widths");
}

std::int64_t mixed_record_bytes(const PackedShape& s, int width) {
  return 256 * std::max(width, 1) + record_rows * (element(s) + (width == 0 ? element(s) : 1));
}

SchemePlaces scheme_places(const PackedShape& s) {
  if (is_lattice(s)) return lattice_places(s);
  SchemePlaces p;
  if (s.kind == PackedKind::salient) {
    p.units = (s.col_blocks() + 1) / 2;
    const std::int64_t levels = 2 * record_rows * element(s);
    p.row_units = record_rows * (element(s) + 1) + (s.group == 0 ? levels : 0);
    p.table = align_up(s.row_tiles() * p.row_units, 256);
    p.records = align_up(p.table + 4 * (s.row_tiles() * p.units + 1), 256);
    p.fixed = salient_head + (s.group == 0 ? 0 : 2 * levels);
    const std::int64_t records = s.row_tiles() * p.units;
    // Wherever the entries are: each lane may have one too many, and those of each record end at a
    // multiple of 16 bytes.
    p.total = p.records + records * p.fixed + align_up(2 * s.salient + (2 * 32 + 14) * records, 16);
    return p;
  }
  p.units = s.col_blocks();
  p.order = align_up(4 * s.col_blocks(), 256);
  if (s.kind == PackedKind::regions) {
    p.records = align_up(p.order + s.col_blocks() * record_cols, 256);
    p.fixed = 512 + 8 * record_rows * element(s);
    p.tile_bytes = s.col_blocks() * p.fixed;
  } else {
    p.records = p.order;
    for (int width = 0; width <= 8; ++width) {
      p.tile_bytes +=
          s.width_blocks[static_cast<std::size_t>(width)] * mixed_record_bytes(s, width);
    }
  }
  p.total = p.records + s.row_tiles() * p.tile_bytes;
  return p;
}

std::int64_t scheme_bytes(const PackedShape& shape) { return scheme_places(shape).total; }

void prepare_scheme(const LinearWeight& w, const PackedShape& s, const std::string& name,
                    std::byte* to) {
  std::memset(to, 0, static_cast<std::size_t>(scheme_places(s).records));
  if (is_lattice(s)) return prepare_lattice(w, s, to);
  for (const Term& t : w.terms) check_zeros(w, t, name);
  if (s.kind == PackedKind::mixed) return prepare_mixed(w, s, name, to);
  if (s.kind == PackedKind::salient) return prepare_salient(w, s, to);
  prepare_regions(w, s, to);
}

void build_scheme(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                  std::int64_t last, std::byte* to) {
  if (is_lattice(s)) return build_lattice(w, s, first, last, to);
  if (s.kind == PackedKind::mixed) return build_mixed(w, s, first, last, to);
  if (s.kind == PackedKind::salient) return build_salient(w, s, first, last, to);
  build_regions(w, s, first, last, to);
}

void decode_scheme_tile(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride) {
  if (is_lattice(w.shape)) return decode_lattice_tile(w, tile, out, stride);
  if (w.shape.kind == PackedKind::mixed) return decode_mixed(w, tile, out, stride);
  if (w.shape.kind == PackedKind::salient) return decode_salient(w, tile, out, stride);
  decode_regions(w, tile, out, stride);
}

}  // namespace engine
