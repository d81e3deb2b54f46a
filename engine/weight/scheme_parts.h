// What the builders of scheme_layout.h share, and their parts by kind. Internal.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "engine/weight/plane_read.h"
#include "engine/weight/scheme_codes.h"
#include "engine/weight/scheme_layout.h"

namespace engine::schemes {

inline std::int64_t align_up(std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; }
inline std::int64_t element(const PackedShape& s) {
  return static_cast<std::int64_t>(dtype_bytes(s.scale_dtype));
}

template <class T>
T read_at(const std::byte* at) {
  T v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
template <class T>
inline void write_at(std::byte* at, T v) {
  std::memcpy(at, &v, sizeof v);
}

// Coefficient `i` of the shape's dtype at `at`.
inline float read_coefficient(DType dtype, const std::byte* at, std::int64_t i) {
  if (dtype == DType::f16) return to_float(read_at<f16>(at + 2 * i));
  if (dtype == DType::bf16) return to_float(read_at<bf16>(at + 2 * i));
  return read_at<float>(at + 4 * i);
}
inline void write_coefficient(DType dtype, std::byte* at, std::int64_t i, float value) {
  const auto write = [&](auto v) {
    store(v, value);
    write_at(at + i * static_cast<std::int64_t>(sizeof v), v);
  };
  if (dtype == DType::f16) return write(f16{});
  if (dtype == DType::bf16) return write(bf16{});
  write(float{});
}

// Where row r of a tile stands among sixteen.
inline std::int64_t row_place(std::int64_t r) { return 2 * (r % 8) + r / 8; }
inline std::int64_t tile_rows(const PackedShape& s, std::int64_t tile) {
  return std::min(record_rows, s.rows - tile * record_rows);
}
inline std::int64_t block_cols(const PackedShape& s, std::int64_t block) {
  return std::min(record_cols, s.cols - block * record_cols);
}

[[noreturn]] inline void refuse(const std::string& name, const std::string& expected) {
  throw Error(ErrorCode::usage,
              name + ": packed kernels: expected " + expected + "; use --exec decoded");
}

inline void check_zeros(const LinearWeight& w, const Term& t, const std::string& name) {
  if (t.kind != TermKind::affine || t.grid.zero_plane < 0) return;
  const Plane& zeros = w.plane(t.grid.zero_plane);
  if (zeros.packed()) return;
  for (std::int64_t r = 0; r < zeros.rows; ++r) {
    for (std::int64_t u = 0; u < zeros.cols; ++u) {
      const std::int64_t z = read_integer(zeros, r, u);
      if (z < 0 || z > 255) refuse(name, "zeros of 0 to 255, found " + std::to_string(z));
    }
  }
}

// A grid of column blocks or rows whose coefficients have the dtype of the others.
inline bool fits_grid(const LinearWeight& w, const Term& t, std::int64_t multiple, DType dtype) {
  const Grid& g = t.grid;
  const bool units = g.kind == GridKind::row ||
                     (g.kind == GridKind::group && g.group % multiple == 0 && g.group > 0);
  return units && g.product == DType::f32 && !g.midrise && w.plane(g.scale_plane).dtype == dtype &&
         (t.mu_plane < 0 || w.plane(t.mu_plane).dtype == dtype);
}

// For each kind: whether a weight is one, with rows, cols and scale_dtype of the shape set; and
// prepare_scheme, build_scheme and decode_scheme_tile.

[[nodiscard]] std::optional<PackedShape> match_mixed(const LinearWeight& w, PackedShape s);
void prepare_mixed(const LinearWeight& w, const PackedShape& s, const std::string& name,
                   std::byte* to);
void build_mixed(const LinearWeight& w, const PackedShape& s, std::int64_t first, std::int64_t last,
                 std::byte* to);
void decode_mixed(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

[[nodiscard]] std::optional<PackedShape> match_salient(const LinearWeight& w, PackedShape s);
void prepare_salient(const LinearWeight& w, const PackedShape& s, std::byte* to);
void build_salient(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to);
void decode_salient(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

[[nodiscard]] std::optional<PackedShape> match_regions(const LinearWeight& w, PackedShape s);
void prepare_regions(const LinearWeight& w, const PackedShape& s, std::byte* to);
void build_regions(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to);
void decode_regions(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

// midrise and lattice, with whatever transforms; these set the whole shape.
inline bool is_lattice(const PackedShape& s) {
  return s.kind == PackedKind::midrise || s.kind == PackedKind::lattice;
}
inline constexpr std::int64_t lattice_table_bytes = 3 * 256 * 4;
[[nodiscard]] std::optional<PackedShape> match_lattice(const LinearWeight& w);
[[nodiscard]] SchemePlaces lattice_places(const PackedShape& s);
void prepare_lattice(const LinearWeight& w, const PackedShape& s, std::byte* to);
void build_lattice(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to);
void decode_lattice_tile(const PackedWeight& w, std::int64_t tile, float* out, std::int64_t stride);

}  // namespace engine::schemes
