// The scheme layouts of lattice points and of midrise grids with one scale for the whole matrix.
#include <array>
#include <vector>

#include "engine/weight/e8.h"
#include "engine/weight/e8_search.h"
#include "engine/weight/scheme_parts.h"
#include "formats/bits.h"

namespace engine::schemes {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// 3 bits: the second term's codes are bytes.
bool bytes_follow(const PackedShape& s) { return s.bits == 3; }
int lattice_terms(const PackedShape& s) { return s.bits > 2 ? 2 : 1; }

// Of code k (8 columns) of row r in a record.
std::int64_t word_place(std::int64_t r, std::int64_t k) {
  return 16 * (4 * (r % 8) + k % 4) + 4 * (k / 4) + 2 * (r / 8);
}
std::int64_t byte_place(std::int64_t r, std::int64_t k) {
  return 8 * (4 * (r % 8) + k % 4) + 2 * (k / 4) + r / 8;
}

// What code c of e8p flips in its pattern's word: 14 in the nibble of each negated coordinate, and
// the last bit of all nibbles if it is lowered.
std::uint32_t e8p_flips(unsigned c) {
  const bool lowered = e8_odd_bits(static_cast<int>(c));
  const unsigned signs = lowered ? c ^ 1U : c;
  std::uint32_t word = lowered ? 0x11111111U : 0U;
  for (unsigned place = 0; place < 8; ++place) {
    if ((signs >> place & 1U) != 0) word ^= 14U << (4 * place);
  }
  return word;
}

std::uint32_t byte_word(std::size_t code) {
  std::uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const auto nibble = static_cast<std::uint32_t>(2.0F * e8_byte_points()[code][at(i)] + 8.0F);
    word |= nibble << (4 * e8p_place(i));
  }
  return word;
}

bool tensor_term(const Term& t) {
  return t.grid.kind == GridKind::tensor && t.grid.product == DType::f32 && t.support.everything();
}

RotationSide side_of(const Transform& t) {
  const bool butterfly = t.kind == TransformKind::butterfly;
  return {t.kind, butterfly && t.shared, butterfly && t.permuted};
}

}  // namespace

std::optional<PackedShape> match_lattice(const LinearWeight& w) {
  if (w.permutation_plane >= 0 || w.terms.empty() || w.terms.size() > 2) return std::nullopt;
  for (const Term& t : w.terms) {
    if (!tensor_term(t)) return std::nullopt;
  }
  PackedShape s;
  s.rows = w.rows;
  s.cols = w.cols;
  s.group = 0;
  s.scale_dtype = DType::f32;
  s.zeros = false;
  const Term& first = w.terms[0];
  if (first.kind == TermKind::affine) {
    if (w.terms.size() > 1 || !first.grid.midrise || first.bits < 2 || first.bits > 4) {
      return std::nullopt;
    }
    s.kind = PackedKind::midrise;
    s.bits = first.bits;
  } else {
    for (const Term& t : w.terms) {
      if (t.kind != TermKind::lattice) return std::nullopt;
    }
    if (first.lattice != LatticeBook::e8p) return std::nullopt;
    s.kind = PackedKind::lattice;
    s.bits = w.terms.size() == 1 ? 2 : w.terms[1].lattice == LatticeBook::e8p ? 4 : 3;
  }
  s.left = side_of(w.left);
  s.right = side_of(w.right);
  s.diagonal = w.diagonal_plane >= 0;
  // The diagonal is applied on the way into the transform.
  if (s.diagonal && s.right.kind == TransformKind::none) return std::nullopt;
  return s;
}

SchemePlaces lattice_places(const PackedShape& s) {
  SchemePlaces p;
  p.table = 256;
  p.units = s.col_blocks();
  p.fixed = 256 * s.bits;
  p.tile_bytes = p.units * p.fixed;
  p.records = s.kind == PackedKind::lattice ? 256 + lattice_table_bytes : 256;
  p.total = p.records + s.row_tiles() * p.tile_bytes;
  return p;
}

void prepare_lattice(const LinearWeight& w, const PackedShape& s, std::byte* to) {
  for (std::size_t i = 0; i < w.terms.size(); ++i) {
    write_at(to + 4 * i, read_float(w.plane(w.terms[i].grid.scale_plane), 0, 0));
  }
  if (s.kind != PackedKind::lattice) return;
  std::byte* const tables = to + lattice_places(s).table;
  for (std::size_t c = 0; c < 256; ++c) {
    write_at(tables + 4 * c, e8p_words()[c]);
    write_at(tables + 1024 + 4 * c, e8p_flips(static_cast<unsigned>(c)));
    write_at(tables + 2048 + 4 * c, byte_word(c));
  }
}

void build_lattice(const LinearWeight& w, const PackedShape& s, std::int64_t first,
                   std::int64_t last, std::byte* to) {
  const SchemePlaces places = lattice_places(s);
  std::vector<std::uint8_t> row_codes(at(w.cols));
  std::vector<RecordCodes> all(at(s.kind == PackedKind::midrise ? places.units : 0));
  for (std::int64_t tile = first; tile < last; ++tile) {
    std::byte* const records = to + places.records + tile * places.tile_bytes;
    std::memset(records, 0, at(places.tile_bytes));
    if (s.kind == PackedKind::midrise) {
      const Plane& plane = w.plane(w.terms[0].codes_plane);
      for (RecordCodes& record : all) record = {};
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        unpack_row({plane_row(plane, tile * record_rows + r), at(plane.row_bytes())},
                   static_cast<unsigned>(plane.bits), row_codes);
        for (std::int64_t b = 0; b < places.units; ++b) {
          std::memcpy(all[at(b)][at(r)].data(), row_codes.data() + b * record_cols,
                      at(block_cols(s, b)));
        }
      }
      for (std::int64_t b = 0; b < places.units; ++b) {
        pack_record_codes(s.bits, all[at(b)], records + b * places.fixed);
      }
      continue;
    }
    for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
      for (int term = 0; term < lattice_terms(s); ++term) {
        const Plane& plane = w.plane(w.terms[at(term)].codes_plane);
        const std::byte* codes = plane_row(plane, tile * record_rows + r);
        for (std::int64_t k = 0; k < w.cols / lattice_columns; ++k) {
          std::byte* const record = records + k / 16 * places.fixed + 512 * term;
          if (term == 1 && bytes_follow(s)) {
            record[byte_place(r, k % 16)] = codes[k];
          } else {
            std::memcpy(record + word_place(r, k % 16), codes + 2 * k, 2);
          }
        }
      }
    }
  }
}

void decode_lattice_tile(const PackedWeight& w, std::int64_t tile, float* out,
                         std::int64_t stride) {
  const PackedShape& s = w.shape;
  const SchemePlaces places = lattice_places(s);
  const auto* base = static_cast<const std::byte*>(w.records.data);
  const std::byte* records = base + places.records + tile * places.tile_bytes;
  const auto scale = read_at<float>(base);
  if (s.kind == PackedKind::midrise) {
    const float zero = static_cast<float>((1 << s.bits) - 1) * 0.5F;
    RecordCodes codes;
    for (std::int64_t b = 0; b < places.units; ++b) {
      unpack_record_codes(s.bits, records + b * places.fixed, codes);
      for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
        for (std::int64_t c = 0; c < block_cols(s, b); ++c) {
          out[r * stride + b * record_cols + c] =
              scale * (static_cast<float>(codes[at(r)][at(c)]) - zero);
        }
      }
    }
    return;
  }
  const auto second = read_at<float>(base + 4);
  std::array<float, lattice_columns> point{}, more{};
  for (std::int64_t r = 0; r < tile_rows(s, tile); ++r) {
    for (std::int64_t k = 0; k < s.cols / lattice_columns; ++k) {
      const std::byte* record = records + k / 16 * places.fixed;
      float* to = out + r * stride + k * lattice_columns;
      e8p_point(read_at<std::uint16_t>(record + word_place(r, k % 16)), point);
      if (s.bits == 4) {
        e8p_point(read_at<std::uint16_t>(record + 512 + word_place(r, k % 16)), more);
      } else if (s.bits == 3) {
        more = e8_byte_points()[std::to_integer<std::size_t>(record[512 + byte_place(r, k % 16)])];
      }
      for (std::size_t i = 0; i < point.size(); ++i) {
        const float value = scale * point[i];
        to[i] = s.bits == 2 ? value : value + second * more[i];
      }
    }
  }
}

}  // namespace engine::schemes
