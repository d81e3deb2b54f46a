#include "engine/model/install_mixed.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "engine/weight/codec.h"
#include "engine/weight/plane_read.h"

namespace engine {
namespace {

struct Scratch {
  View packed, compact, codes;  // the first two for one width at a time
  View bits, scales, means, zeros;
};

Scratch make_scratch(const LinearWeight& w, Arena& arena) {
  const std::int64_t groups = w.cols / w.terms[0].grid.group;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return arena.make(MemTag::staging, dtype, r, c);
  };
  Scratch s;
  s.packed = make(DType::u8, 1, w.rows * w.cols);
  s.compact = make(DType::u8, 1, w.rows * w.cols);
  s.codes = make(DType::u8, w.rows, w.cols);
  s.bits = make(DType::u8, 1, groups);
  s.scales = make(DType::f32, w.rows, groups);
  s.means = make(DType::f32, w.rows, groups);
  s.zeros = make(DType::i32, w.rows, groups);
  return s;
}

// Where the codes of one group lie: `columns` of the term, `unit` of its coefficients.
struct Place {
  const Term* term = nullptr;
  std::int64_t first = 0;
  std::int64_t unit = 0;
};

// Of each group; nullopt unless every group lies in one term as a whole.
std::optional<std::vector<Place>> find_places(const LinearWeight& w) {
  const std::int64_t size = w.terms[0].grid.group;
  std::vector<Place> places(static_cast<std::size_t>(w.cols / size));
  for (const Term& t : w.terms) {
    const Plane& columns = w.plane(t.support.columns_plane);
    if (columns.cols % size != 0) return std::nullopt;
    const auto unit = [&](std::int64_t column) {
      if (t.grid.column_group_plane < 0) return column / size;
      return std::int64_t{
          read_element<std::int32_t>(w.plane(t.grid.column_group_plane), 0, column)};
    };
    for (std::int64_t first = 0; first < columns.cols; first += size) {
      const std::int64_t start = read_element<std::int32_t>(columns, 0, first);
      Place& place = places[static_cast<std::size_t>(start / size)];
      if (start % size != 0 || place.term != nullptr) return std::nullopt;
      place = {&t, first, unit(start)};
      for (std::int64_t j = 1; j < size; ++j) {
        // Columns increase, so the last one of the group settles the others.
        if (unit(start + j) != place.unit) return std::nullopt;
      }
      if (read_element<std::int32_t>(columns, 0, first + size - 1) != start + size - 1) {
        return std::nullopt;
      }
    }
  }
  return places;  // all groups: the terms have as many columns as there are, each group once
}

}  // namespace

bool is_mixed(const LinearWeight& w) {
  if (w.terms.size() < 2 || w.permutation_plane >= 0 || w.diagonal_plane >= 0 ||
      w.left.kind != TransformKind::none || w.right.kind != TransformKind::none) {
    return false;
  }
  const std::int64_t group = w.terms[0].grid.group;
  std::int64_t columns = 0;
  for (const Term& t : w.terms) {
    const bool coded = t.kind == TermKind::affine || t.kind == TermKind::sign;
    if (!coded || t.grid.kind != GridKind::group || t.grid.group != group || t.grid.midrise ||
        t.grid.product != DType::f32 || t.support.columns != Select::in ||
        t.support.bitmap != Select::all || !t.support.compact ||
        (t.kind == TermKind::affine && t.bits < 2)) {
      return false;
    }
    columns += w.plane(t.support.columns_plane).cols;
  }
  return columns == w.cols && w.cols % group == 0;
}

void plan_install_mixed(const LinearWeight& w, Arena& arena) {
  const Arena::Scope scope(arena);
  make_scratch(w, arena);
}

bool install_mixed(const LinearWeight& w, const std::string& name, Loader& loader, View out) {
  validate(w, "memory", name);  // a plane of a wrong size must not be read past its end
  const auto places = find_places(w);
  if (!places) return false;
  Ops& ops = loader.ops();
  const Arena::Scope scope(loader.arena());
  const Scratch s = make_scratch(w, loader.arena());
  const std::int64_t group = w.terms[0].grid.group;
  const auto groups = static_cast<std::int64_t>(places->size());

  for (const Term& t : w.terms) {
    const Plane& plane = w.plane(t.codes_plane);
    const View packed = s.packed.col_range(0, plane.raw_bytes()).reshape(w.rows, plane.row_bytes());
    const View compact = s.compact.col_range(0, w.rows * plane.cols).reshape(w.rows, plane.cols);
    ops.upload(make_view(plane.data.data, DType::u8, DeviceKind::cpu, w.rows, plane.row_bytes()),
               packed);
    ops.unpack_codes(packed, plane.bits, compact);
    for (std::int64_t g = 0; g < groups; ++g) {
      const Place& place = (*places)[static_cast<std::size_t>(g)];
      if (place.term != &t) continue;
      ops.copy(compact.col_range(place.first, group), s.codes.col_range(g * group, group));
    }
  }

  std::vector<std::uint8_t> bits;
  for (const Place& p : *places) bits.push_back(static_cast<std::uint8_t>(p.term->bits));
  const auto n = static_cast<std::size_t>(w.rows * groups);
  std::vector<float> scales(n), means(n, -0.0F);  // an absent mu changes no sign of zero
  std::vector<std::int32_t> zeros(n, 0);
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t row = static_cast<std::int64_t>(i) / groups;
    const Place& p = (*places)[i % places->size()];
    const Term& t = *p.term;
    scales[i] = read_float(w.plane(t.grid.scale_plane), row, p.unit);
    if (t.kind == TermKind::sign) {
      if (t.mu_plane >= 0) means[i] = read_float(w.plane(t.mu_plane), row, p.unit);
    } else {
      zeros[i] =
          t.grid.zero_plane < 0
              ? 1 << (t.bits - 1)
              : static_cast<std::int32_t>(read_integer(w.plane(t.grid.zero_plane), row, p.unit));
    }
  }
  const auto upload = [&](auto& values, const View& to) {
    ops.upload(host_view(values.data(), to.rows, to.cols), to);
  };
  upload(bits, s.bits);
  upload(scales, s.scales);
  upload(means, s.means);
  upload(zeros, s.zeros);
  ops.slim_decode({.group = group,
                   .bits = s.bits,
                   .codes = s.codes,
                   .scales = s.scales,
                   .means = s.means,
                   .zeros = s.zeros,
                   .out = out});
  ops.synchronize();  // the host bytes may go now
  return true;
}

}  // namespace engine
