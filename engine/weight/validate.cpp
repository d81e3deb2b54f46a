// Checks of a LinearWeight, first its structure and then its data (declared in codec.h).
#include <algorithm>

#include "engine/weight/codec.h"
#include "engine/weight/plane_read.h"

namespace engine {
namespace {

std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

std::string plane_text(const Plane& p) {
  return (p.packed() ? std::to_string(p.bits) + "-bit codes "
                     : std::string(dtype_name(p.dtype)) + " ") +
         shape_text(p.rows, p.cols);
}

enum class Element : std::uint8_t { real, i32, integer, codes };

class Checker {
 public:
  Checker(const LinearWeight& w, const std::string& file, const std::string& place)
      : w_(w), file_(file), place_(place), used_(w.planes.size(), false) {}

  void structure() {
    range("rows", w_.rows, 1, max_dimension);
    range("cols", w_.cols, 1, max_dimension);
    range("weights", w_.rows * w_.cols, 1, max_elements);
    range("terms", static_cast<std::int64_t>(w_.terms.size()), 1, max_terms);
    range("planes", static_cast<std::int64_t>(w_.planes.size()), 1, max_planes);
    for (std::size_t i = 0; i < w_.planes.size(); ++i) plane_itself(i);
    for (std::size_t i = 0; i < w_.terms.size(); ++i) {
      term(w_.terms[i], "terms[" + std::to_string(i) + "]");
    }
    if (w_.permutation_plane != -1) {
      expect_shape("permutation", w_.permutation_plane, Element::i32, 1, w_.cols);
    }
    if (w_.diagonal_plane != -1) {
      expect_shape("diagonal", w_.diagonal_plane, Element::real, 1, w_.cols);
    }
    transform(w_.left, w_.rows, "left");
    transform(w_.right, w_.cols, "right");
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if (!used_[i]) fail(plane_name(i), "a plane that something refers to", "an unused one");
    }
  }

  void contents() {
    for (std::size_t i = 0; i < w_.planes.size(); ++i) plane_data(i);
    for (std::size_t i = 0; i < w_.terms.size(); ++i) {
      term_data(w_.terms[i], "terms[" + std::to_string(i) + "]");
    }
    if (w_.permutation_plane >= 0) permutation(w_.plane(w_.permutation_plane));
  }

 private:
  [[noreturn]] void fail(const std::string& where, const std::string& expected,
                         const std::string& found) const {
    throw FormatError(file_, place_ + "." + where, expected, found);
  }

  static std::string plane_name(std::size_t i) { return "planes[" + std::to_string(i) + "]"; }

  void range(const std::string& where, std::int64_t value, std::int64_t low,
             std::int64_t high) const {
    if (value < low || value > high) {
      fail(where, std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
    }
  }

  void plane_itself(std::size_t i) const {
    const Plane& p = w_.planes[i];
    const std::string where = plane_name(i);
    if (p.role.empty() || p.role.size() > 32)
      fail(where + ".role", "1 to 32 characters", std::to_string(p.role.size()));
    range(where + ".bits", p.bits, 0, 8);
    if (p.packed() && p.dtype != DType::u8) {
      fail(where + ".dtype", "u8 for packed codes", dtype_name(p.dtype));
    }
    range(where + ".rows", p.rows, 1, max_dimension);
    range(where + ".cols", p.cols, 1, max_dimension);
    range(where + " elements", p.rows * p.cols, 1, max_elements);
  }

  const Plane& use(const std::string& where, int index) {
    if (index < 0 || static_cast<std::size_t>(index) >= w_.planes.size()) {
      fail(where, "a plane index below " + std::to_string(w_.planes.size()), std::to_string(index));
    }
    used_[static_cast<std::size_t>(index)] = true;
    return w_.planes[static_cast<std::size_t>(index)];
  }

  const Plane& expect_element(const std::string& where, int index, Element element, int bits = 0) {
    const Plane& p = use(where, index);
    const bool real =
        !p.packed() && (p.dtype == DType::f32 || p.dtype == DType::f16 || p.dtype == DType::bf16);
    const bool i32 = !p.packed() && p.dtype == DType::i32;
    switch (element) {
      case Element::real:
        if (!real) fail(where, "a plane of f32, f16 or bf16", plane_text(p));
        break;
      case Element::i32:
        if (!i32) fail(where, "a plane of i32", plane_text(p));
        break;
      case Element::integer:
        if (!p.packed() && !i32 && p.dtype != DType::i16) {
          fail(where, "a plane of packed codes, i16 or i32", plane_text(p));
        }
        break;
      case Element::codes:
        if (p.bits != bits) {
          fail(where, "a plane of " + std::to_string(bits) + "-bit codes", plane_text(p));
        }
        break;
    }
    return p;
  }

  void expect_shape(const std::string& where, int index, Element element, std::int64_t rows,
                    std::int64_t cols, int bits = 0) {
    const Plane& p = expect_element(where, index, element, bits);
    if (p.rows != rows || p.cols != cols) {
      fail(where, "a plane of shape " + shape_text(rows, cols), plane_text(p));
    }
  }

  void absent(const std::string& where, int index, const std::string& why) const {
    if (index != -1) fail(where, "no plane " + why, std::to_string(index));
  }

  void term(const Term& t, const std::string& where) {
    switch (t.kind) {
      case TermKind::dense:
        range(where + ".bits", t.bits, 0, 0);
        absent(where + ".grid.scales", t.grid.scale_plane, "for a dense term");
        absent(where + ".grid.column_groups", t.grid.column_group_plane, "for a dense term");
        break;
      case TermKind::affine:
        range(where + ".bits", t.bits, 1, 8);
        break;
      case TermKind::codebook:
        range(where + ".bits", t.bits, 1, 4);
        expect_shape(where + ".codebook", t.codebook_plane, Element::real, 1,
                     std::int64_t{1} << t.bits);
        break;
      case TermKind::sign:
        range(where + ".bits", t.bits, 1, 1);
        break;
      case TermKind::lattice:
        lattice(t, where);
        break;
      default:
        fail(where + ".kind", "dense, affine, codebook, sign or lattice",
             std::to_string(static_cast<int>(t.kind)));
    }
    if (t.kind != TermKind::affine) {
      absent(where + ".grid.zeros", t.grid.zero_plane, "unless the term is affine");
    }
    if (t.kind != TermKind::codebook) {
      absent(where + ".codebook", t.codebook_plane, "unless the term is a codebook");
    }
    if (t.kind != TermKind::sign) {
      absent(where + ".mu", t.mu_plane, "unless the term is a sign");
    }
    if (t.kind != TermKind::dense) grid(t, where);
    support(t.support, where + ".support");
    codes(t, where + ".codes");
  }

  void lattice(const Term& t, const std::string& where) const {
    if (t.lattice != LatticeBook::e8p && t.lattice != LatticeBook::e8_byte) {
      fail(where + ".book", "e8p or e8_byte", std::to_string(static_cast<int>(t.lattice)));
    }
    const int bits = t.lattice == LatticeBook::e8p ? 2 : 1;
    range(where + ".bits", t.bits, bits, bits);
    if (w_.cols % lattice_columns != 0) {
      fail("cols", "a multiple of 8 for a lattice term", std::to_string(w_.cols));
    }
    if (t.grid.kind == GridKind::group) fail(where + ".grid.kind", "tensor or row", "group");
    if (!t.support.everything()) fail(where + ".support", "everything for a lattice term", "less");
  }

  void transform(const Transform& t, std::int64_t d, const std::string& where) {
    if (t.kind != TransformKind::hadamard) {
      absent(where + ".signs", t.signs_plane, "unless the transform is hadamard");
    }
    switch (t.kind) {
      case TransformKind::none:
        return;
      case TransformKind::hadamard:
        if (hadamard_order(d) == 0) {
          fail(where, "a size with a Hadamard matrix", std::to_string(d));
        }
        return expect_shape(where + ".signs", t.signs_plane, Element::codes, 1, d, 1);
      case TransformKind::butterfly: {
        if (!has_butterfly(d)) {
          const auto [p1, p2] = butterfly_sides(d);
          fail(where,
               "a size up to " + std::to_string(max_butterfly_size) + " with two sides up to " +
                   std::to_string(max_butterfly_side),
               std::to_string(d) + " = " + std::to_string(p1) + " * " + std::to_string(p2));
        }
        if (std::max(t.seed, t.stream) > static_cast<std::uint64_t>(INT64_MAX)) {
          fail(where, "seed and stream below 2^63", "more");
        }
        return;
      }
    }
    fail(where + ".kind", "none, hadamard or butterfly", std::to_string(static_cast<int>(t.kind)));
  }

  void grid(const Term& t, const std::string& where) {
    const Grid& g = t.grid;
    if (g.midrise && (t.kind != TermKind::affine || g.zero_plane != -1)) {
      fail(where + ".grid.midrise", "false unless the term is affine without zeros", "true");
    }
    if (g.product != DType::f32 && g.product != DType::f16) {
      fail(where + ".grid.product", "f32 or f16", dtype_name(g.product));
    }
    std::int64_t rows = w_.rows;
    std::int64_t cols = 1;
    switch (g.kind) {
      case GridKind::tensor:
        rows = 1;
        break;
      case GridKind::row:
        break;
      case GridKind::group:
        range(where + ".grid.group", g.group, 1, max_dimension);
        cols = (w_.cols + g.group - 1) / g.group;
        break;
      default:
        fail(where + ".grid.kind", "tensor, row or group",
             std::to_string(static_cast<int>(g.kind)));
    }
    if (g.kind != GridKind::group) {
      range(where + ".grid.group", g.group, 0, 0);
      absent(where + ".grid.column_groups", g.column_group_plane, "unless the grid is by groups");
    }
    if (g.column_group_plane != -1) {
      expect_shape(where + ".grid.column_groups", g.column_group_plane, Element::i32, 1, w_.cols);
      // The groups are then numbered by that plane: as many as there are columns of scales.
      cols = expect_element(where + ".grid.scales", g.scale_plane, Element::real).cols;
      range(where + ".grid.scales groups", cols, 1, w_.cols);
    }
    expect_shape(where + ".grid.scales", g.scale_plane, Element::real, rows, cols);
    if (g.zero_plane != -1) {
      expect_shape(where + ".grid.zeros", g.zero_plane, Element::integer, rows, cols);
    }
    if (t.mu_plane != -1) expect_shape(where + ".mu", t.mu_plane, Element::real, rows, cols);
  }

  void support(const Support& s, const std::string& where) {
    if (s.columns == Select::all) {
      absent(where + ".columns", s.columns_plane, "when all columns are selected");
    } else {
      const Plane& p = expect_element(where + ".columns", s.columns_plane, Element::i32);
      if (p.rows != 1 || p.cols > w_.cols) {
        fail(where + ".columns", "1 row of at most " + std::to_string(w_.cols) + " ids",
             plane_text(p));
      }
    }
    if (s.bitmap == Select::all) {
      absent(where + ".bitmap", s.bitmap_plane, "when the bitmap selects all");
    } else {
      expect_shape(where + ".bitmap", s.bitmap_plane, Element::codes, w_.rows, w_.cols, 1);
    }
    if (s.compact && s.everything()) {
      fail(where + ".compact", "false when everything is selected", "true");
    }
  }

  void codes(const Term& t, const std::string& where) {
    const Element element = t.kind == TermKind::dense ? Element::real : Element::codes;
    const Support& s = t.support;
    if (t.kind == TermKind::lattice) {
      const bool words = t.lattice == LatticeBook::e8p;
      if (words) {
        const Plane& p = use(where, t.codes_plane);
        if (p.packed() || p.dtype != DType::i16) fail(where, "a plane of i16", plane_text(p));
      }
      expect_shape(where, t.codes_plane, words ? Element::integer : Element::codes, w_.rows,
                   w_.cols / lattice_columns, words ? 0 : 8);
    } else if (!s.compact) {
      expect_shape(where, t.codes_plane, element, w_.rows, w_.cols, t.bits);
    } else if (s.bitmap == Select::all) {
      const std::int64_t ids = w_.plane(s.columns_plane).cols;
      expect_shape(where, t.codes_plane, element, w_.rows,
                   s.columns == Select::in ? ids : w_.cols - ids, t.bits);
    } else {
      const Plane& p = expect_element(where, t.codes_plane, element, t.bits);
      if (p.rows != 1) fail(where, "1 row of the supported weights", plane_text(p));
      range(where + " codes", p.cols, 1, w_.rows * w_.cols);
    }
  }

  void plane_data(std::size_t i) const {
    const Plane& p = w_.planes[i];
    const View& d = p.data;
    if (d.data == nullptr || d.dtype != DType::u8 || d.device != DeviceKind::cpu || d.rows != 1 ||
        d.cols != p.raw_bytes()) {
      fail(plane_name(i), std::to_string(p.raw_bytes()) + " bytes on the host for " + plane_text(p),
           d.data == nullptr ? "none" : d.shape());
    }
    const auto used = static_cast<unsigned>(p.cols % 8 * p.bits % 8);
    if (!p.packed() || used == 0) return;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      if ((std::to_integer<unsigned>(plane_row(p, r)[p.row_bytes() - 1]) >> used) != 0) {
        fail(plane_name(i), "zero bits after the last code of row " + std::to_string(r), "ones");
      }
    }
  }

  void term_data(const Term& t, const std::string& where) const {
    if (t.grid.column_group_plane >= 0) {
      const Plane& p = w_.plane(t.grid.column_group_plane);
      const std::int64_t groups = w_.plane(t.grid.scale_plane).cols;
      for (std::int64_t c = 0; c < p.cols; ++c) {
        const std::int64_t group = read_element<std::int32_t>(p, 0, c);
        range(where + ".grid.column_groups[" + std::to_string(c) + "]", group, 0, groups - 1);
      }
    }
    if (t.support.columns_plane >= 0) {
      const Plane& p = w_.plane(t.support.columns_plane);
      std::int64_t low = 0;
      for (std::int64_t i = 0; i < p.cols; ++i) {
        const std::int64_t id = read_element<std::int32_t>(p, 0, i);
        if (id < low || id >= w_.cols) {
          fail(where + ".support.columns[" + std::to_string(i) + "]",
               "increasing ids, here " + std::to_string(low) + " to " + std::to_string(w_.cols - 1),
               std::to_string(id));
        }
        low = id + 1;
      }
    }
    if (t.support.compact && t.support.bitmap != Select::all) {
      const std::int64_t count = SupportMask(w_, t.support).count();
      const Plane& p = w_.plane(t.codes_plane);
      if (p.cols != count) {
        fail(where + ".codes", std::to_string(count) + " codes, one per supported weight",
             std::to_string(p.cols));
      }
    }
  }

  void permutation(const Plane& p) const {
    std::vector<bool> seen(static_cast<std::size_t>(p.cols), false);
    for (std::int64_t j = 0; j < p.cols; ++j) {
      const std::string where = "permutation[" + std::to_string(j) + "]";
      const std::int64_t to = read_element<std::int32_t>(p, 0, j);
      range(where, to, 0, p.cols - 1);
      if (seen[static_cast<std::size_t>(to)]) {
        fail(where, "each column once", std::to_string(to) + " again");
      }
      seen[static_cast<std::size_t>(to)] = true;
    }
  }

  const LinearWeight& w_;
  const std::string& file_;
  const std::string& place_;
  std::vector<bool> used_;
};

}  // namespace

void validate_structure(const LinearWeight& weight, const std::string& file,
                        const std::string& place) {
  Checker(weight, file, place).structure();
}

void validate(const LinearWeight& weight, const std::string& file, const std::string& place) {
  Checker checker(weight, file, place);
  checker.structure();
  checker.contents();
}

}  // namespace engine
