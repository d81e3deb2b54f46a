// The scheme layout of signs in regions.
#include <array>
#include <numeric>
#include <vector>

#include "engine/weight/scheme_parts.h"
#include "formats/bits.h"

namespace engine::schemes {
namespace {

// The terms of regions by their place among a row's coefficients.
enum Region : std::size_t { concentrated, sparse, salient, residual, region_count };
using Regions = std::array<const Term*, region_count>;

std::optional<Regions> find_regions(const LinearWeight& w) {
  if (w.terms.size() != region_count) return std::nullopt;
  Regions found{};
  for (const Term& t : w.terms) {
    const Support& on = t.support;
    std::size_t which = region_count;
    if (on.columns == Select::in && on.bitmap == Select::all) {
      which = on.compact ? residual : salient;
    } else if (on.columns == Select::not_in && on.bitmap != Select::all && !on.compact) {
      which = on.bitmap == Select::in ? sparse : concentrated;
    }
    if (which == region_count || found[which] != nullptr || t.kind != TermKind::sign ||
        t.grid.kind != GridKind::group || t.grid.group != record_cols ||
        t.grid.column_group_plane >= 0 ||
        !fits_grid(w, t, record_cols, w.plane(w.terms[0].grid.scale_plane).dtype)) {
      return std::nullopt;
    }
    found[which] = &t;
  }
  const auto same = [&](auto&& of) {
    return of(*found[concentrated]) == of(*found[sparse]) &&
           of(*found[sparse]) == of(*found[salient]);
  };
  const int columns = found[residual]->support.columns_plane;
  for (const Term* t : found) {
    if (t->support.columns_plane != columns) return std::nullopt;
  }
  if (!same([](const Term& t) { return t.codes_plane; }) ||
      found[sparse]->support.bitmap_plane != found[concentrated]->support.bitmap_plane) {
    return std::nullopt;
  }
  return found;
}

// Salient columns of each block, and all columns of a block by rank.
struct RegionColumns {
  std::vector<std::int64_t> before;  // salient columns before block b; one more at the end
  std::vector<std::int32_t> ids;
};
RegionColumns region_columns(const LinearWeight& w, const PackedShape& s, const Term& on) {
  RegionColumns out;
  const Plane& plane = w.plane(on.support.columns_plane);
  out.before.assign(static_cast<std::size_t>(s.col_blocks()) + 1, 0);
  for (std::int64_t i = 0; i < plane.cols; ++i) {
    out.ids.push_back(read_element<std::int32_t>(plane, 0, i));
    ++out.before[static_cast<std::size_t>(out.ids.back() / record_cols) + 1];
  }
  std::partial_sum(out.before.begin(), out.before.end(), out.before.begin());
  return out;
}

}  // namespace

std::optional<PackedShape> match_regions(const LinearWeight& w, PackedShape s) {
  if (!find_regions(w)) return std::nullopt;
  s.kind = PackedKind::regions;
  s.bits = 2;
  s.group = record_cols;
  s.zeros = false;
  return s;
}

void prepare_regions(const LinearWeight& w, const PackedShape& s, std::byte* to) {
  const SchemePlaces places = scheme_places(s);
  const Regions terms = *find_regions(w);
  const RegionColumns columns = region_columns(w, s, *terms[residual]);
  for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
    const auto b = static_cast<std::size_t>(block);
    const std::int64_t n = columns.before[b + 1] - columns.before[b];
    write_at(to + 4 * block, static_cast<std::uint32_t>(n));
    std::array<bool, record_cols> is_salient{};
    for (std::int64_t i = columns.before[b]; i < columns.before[b + 1]; ++i) {
      is_salient[static_cast<std::size_t>(columns.ids[static_cast<std::size_t>(i)] % record_cols)] =
          true;
    }
    std::byte* order = to + places.order + block * record_cols;
    std::int64_t front = 0, back = n;
    for (std::int64_t c = 0; c < record_cols; ++c) {
      const std::int64_t rank = is_salient[static_cast<std::size_t>(c)] ? front++ : back++;
      order[region_place(static_cast<int>(rank))] = static_cast<std::byte>(c);
    }
  }
}

void build_regions(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to) {
  const SchemePlaces places = scheme_places(s);
  const Regions terms = *find_regions(w);
  const RegionColumns columns = region_columns(w, s, *terms[residual]);
  const Plane& signs = w.plane(terms[sparse]->codes_plane);
  const Plane& groups = w.plane(terms[sparse]->support.bitmap_plane);
  const Plane& seconds = w.plane(terms[residual]->codes_plane);
  std::vector<RecordCodes> all(static_cast<std::size_t>(s.col_blocks()));
  std::vector<std::uint8_t> sign(static_cast<std::size_t>(s.cols)), group(sign.size()),
      second(static_cast<std::size_t>(seconds.cols));
  const auto unpack = [](const Plane& plane, std::int64_t row, std::vector<std::uint8_t>& codes) {
    unpack_row({plane_row(plane, row), static_cast<std::size_t>(plane.row_bytes())}, 1, codes);
  };
  for (std::int64_t tile = first; tile < last; ++tile) {
    for (RecordCodes& record : all) record = {};
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      const std::int64_t row = tile * record_rows + r;
      unpack(signs, row, sign);
      unpack(groups, row, group);
      unpack(seconds, row, second);
      for (std::size_t i = 0; i < second.size(); ++i) {
        group[static_cast<std::size_t>(columns.ids[i])] = second[i];
      }
      for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
        const std::byte* order = to + places.order + block * record_cols;
        auto& codes = all[static_cast<std::size_t>(block)][static_cast<std::size_t>(r)];
        for (std::size_t place = 0; place < codes.size(); ++place) {
          const std::int64_t c = block * record_cols + std::to_integer<std::int64_t>(order[place]);
          if (c >= s.cols) continue;
          const auto i = static_cast<std::size_t>(c);
          codes[place] = static_cast<std::uint8_t>(sign[i] + 2 * group[i]);
        }
      }
    }
    std::byte* record = to + places.records + tile * places.tile_bytes;
    for (std::int64_t block = 0; block < s.col_blocks(); ++block) {
      std::memset(record, 0, static_cast<std::size_t>(places.fixed));
      pack_region_codes(all[static_cast<std::size_t>(block)], record);
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        const std::int64_t row = tile * record_rows + r;
        for (std::size_t k = 0; k < region_count; ++k) {
          const Term& t = *terms[k];
          const std::int64_t at = 8 * r + 2 * static_cast<std::int64_t>(k);
          write_coefficient(s.scale_dtype, record + 512, at,
                            t.mu_plane < 0 ? -0.0F : read_float(w.plane(t.mu_plane), row, block));
          write_coefficient(s.scale_dtype, record + 512, at + 1,
                            read_float(w.plane(t.grid.scale_plane), row, block));
        }
      }
      record += places.fixed;
    }
  }
}

void decode_regions(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride) {
  const PackedShape& s = w.shape;
  const SchemePlaces places = scheme_places(s);
  const auto* base = static_cast<const std::byte*>(w.records.data);
  const std::byte* record = base + places.records + tile * places.tile_bytes;
  RecordCodes codes;
  for (std::int64_t block = 0; block < s.col_blocks(); ++block, record += places.fixed) {
    const auto n = static_cast<int>(read_at<std::uint32_t>(base + 4 * block));
    const std::byte* order = base + places.order + block * record_cols;
    unpack_region_codes(record, codes);
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      std::array<float, 8> c;
      for (std::int64_t i = 0; i < 8; ++i) {
        c[static_cast<std::size_t>(i)] = read_coefficient(s.scale_dtype, record + 512, 8 * r + i);
      }
      const auto level = [&](std::size_t k, bool up) {
        return c[2 * k] + (up ? c[2 * k + 1] : -c[2 * k + 1]);
      };
      for (int rank = 0; rank < record_cols; ++rank) {
        const auto place = static_cast<std::size_t>(region_place(rank));
        const std::int64_t column =
            block * record_cols + std::to_integer<std::int64_t>(order[place]);
        if (column >= s.cols) continue;
        const unsigned code = codes[static_cast<std::size_t>(r)][place];
        const bool up = (code & 1U) != 0, other = code > 1;
        out[r * stride + column] = rank < n ? level(salient, up) + level(residual, other)
                                   : other  ? level(sparse, up)
                                            : level(concentrated, up);
      }
    }
  }
}

}  // namespace engine::schemes
