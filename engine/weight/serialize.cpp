#include "engine/weight/serialize.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string_view>
#include <tuple>
#include <utility>

#include "engine/weight/codec.h"

namespace engine {
namespace {

// Indexed by the enums' values.
constexpr std::array<std::string_view, 5> term_names = {"dense", "affine", "codebook", "sign",
                                                        "lattice"};
constexpr std::array<std::string_view, 2> lattice_names = {"e8p", "e8_byte"};
constexpr std::array<std::string_view, 3> transform_names = {"none", "hadamard", "butterfly"};
constexpr std::array<std::string_view, 3> grid_names = {"tensor", "row", "group"};
constexpr std::array<std::string_view, 3> select_names = {"all", "in", "not_in"};

template <class Enum, std::size_t N>
std::string name_of(const std::array<std::string_view, N>& names, Enum value) {
  const auto i = static_cast<std::size_t>(value);
  REQUIRE(i < N, "unknown kind");
  return std::string(names[i]);
}

Json grid_json(const Grid& g) {
  Json out = {{"kind", name_of(grid_names, g.kind)}};
  if (g.kind == GridKind::group) out["group"] = g.group;
  out["scales"] = g.scale_plane;
  if (g.zero_plane >= 0) out["zeros"] = g.zero_plane;
  if (g.midrise) out["midrise"] = true;
  if (g.column_group_plane >= 0) out["column_groups"] = g.column_group_plane;
  out["product"] = dtype_name(g.product);
  return out;
}

Json support_json(const Support& s) {
  Json out = Json::object();
  if (s.columns != Select::all) {
    out["columns"] = {{"select", name_of(select_names, s.columns)}, {"plane", s.columns_plane}};
  }
  if (s.bitmap != Select::all) {
    out["bitmap"] = {{"select", name_of(select_names, s.bitmap)}, {"plane", s.bitmap_plane}};
  }
  if (s.compact) out["compact"] = true;
  return out;
}

Json term_json(const Term& t) {
  Json out = {{"kind", name_of(term_names, t.kind)}};
  if (t.kind != TermKind::dense) out["bits"] = t.bits;
  if (t.kind == TermKind::lattice) out["book"] = name_of(lattice_names, t.lattice);
  out["codes"] = t.codes_plane;
  if (t.kind != TermKind::dense) out["grid"] = grid_json(t.grid);
  if (t.codebook_plane >= 0) out["codebook"] = t.codebook_plane;
  if (t.mu_plane >= 0) out["mu"] = t.mu_plane;
  if (!t.support.everything()) out["support"] = support_json(t.support);
  return out;
}

Json transform_json(const Transform& t) {
  Json out = {{"kind", name_of(transform_names, t.kind)}};
  if (t.kind == TransformKind::hadamard) {
    out["signs"] = t.signs_plane;
    return out;
  }
  out["seed"] = t.seed;
  out["stream"] = t.stream;
  if (t.shared) out["shared"] = true;
  if (!t.permuted) out["permuted"] = false;
  return out;
}

Json plane_json(const Plane& p, std::uint32_t id) {
  Json out = {{"id", id}, {"role", p.role}, {"dtype", dtype_name(p.dtype)}};
  if (p.packed()) out["bits"] = p.bits;
  out["rows"] = p.rows;
  out["cols"] = p.cols;
  return out;
}

// Refuses keys that are not in `known`.
void only_keys(const JsonObject& object, std::initializer_list<std::string_view> known) {
  for (const auto& item : object.value().items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      throw FormatError(object.file(), object.path_of(describe(Json(item.key()))), "no such key",
                        describe(item.value()));
    }
  }
}

template <class Enum, std::size_t N>
Enum enum_from(const JsonObject& object, std::string_view key,
               const std::array<std::string_view, N>& names, std::size_t first = 0) {
  const std::string text = object.text(key);
  std::string expected;
  for (std::size_t i = first; i < N; ++i) {
    if (text == names[i]) return static_cast<Enum>(i);
    expected += (i == first ? "" : ", ") + std::string(names[i]);
  }
  object.fail(key, "one of " + expected);
}

DType dtype_from(const JsonObject& object, std::string_view key,
                 std::initializer_list<DType> allowed) {
  const std::string text = object.text(key);
  std::string expected;
  for (const DType d : allowed) {
    if (text == dtype_name(d)) return d;
    expected += (expected.empty() ? "" : ", ") + std::string(dtype_name(d));
  }
  object.fail(key, "one of " + expected);
}

// The elements of an array of at most `limit`; counted before anything is made of them.
const Json& array_from(const JsonObject& object, std::string_view key, std::size_t limit) {
  const Json* value = object.find(key);
  if (value == nullptr || !value->is_array() || value->empty() || value->size() > limit) {
    object.fail(key, "an array of 1 to " + std::to_string(limit) + " elements");
  }
  return *value;
}

class Reader {
 public:
  explicit Reader(std::size_t planes) : planes_(planes) {}

  [[nodiscard]] int plane(const JsonObject& object, std::string_view key) const {
    return static_cast<int>(object.integer(key, 0, static_cast<std::int64_t>(planes_) - 1));
  }
  [[nodiscard]] int optional_plane(const JsonObject& object, std::string_view key) const {
    return object.has(key) ? plane(object, key) : -1;
  }

  [[nodiscard]] Grid grid(const JsonObject& object) const {
    only_keys(object, {"kind", "group", "scales", "zeros", "midrise", "column_groups", "product"});
    Grid out;
    out.kind = enum_from<GridKind>(object, "kind", grid_names);
    if (out.kind == GridKind::group) {
      out.group = object.integer("group", 1, max_dimension);
    } else if (object.has("group")) {
      object.fail("group", "nothing unless the grid is by groups");
    }
    out.scale_plane = plane(object, "scales");
    out.zero_plane = optional_plane(object, "zeros");
    out.midrise = object.boolean("midrise", false);
    out.column_group_plane = optional_plane(object, "column_groups");
    out.product = dtype_from(object, "product", {DType::f32, DType::f16});
    return out;
  }

  [[nodiscard]] Support support(const JsonObject& object) const {
    only_keys(object, {"columns", "bitmap", "compact"});
    Support out;
    if (object.has("columns")) {
      std::tie(out.columns, out.columns_plane) = selection(object.object("columns"));
    }
    if (object.has("bitmap")) {
      std::tie(out.bitmap, out.bitmap_plane) = selection(object.object("bitmap"));
    }
    out.compact = object.boolean("compact", false);
    return out;
  }

  [[nodiscard]] Term term(const JsonObject& object) const {
    only_keys(object, {"kind", "bits", "book", "codes", "grid", "codebook", "mu", "support"});
    Term out;
    out.kind = enum_from<TermKind>(object, "kind", term_names);
    out.codes_plane = plane(object, "codes");
    if (out.kind == TermKind::dense) {
      for (const char* key : {"bits", "grid"}) {
        if (object.has(key)) object.fail(key, "nothing for a dense term");
      }
    } else {
      out.bits = static_cast<int>(object.integer("bits", 1, 8));
      out.grid = grid(object.object("grid"));
    }
    if (out.kind == TermKind::lattice) {
      out.lattice = enum_from<LatticeBook>(object, "book", lattice_names);
    } else if (object.has("book")) {
      object.fail("book", "nothing unless the term is a lattice");
    }
    out.codebook_plane = optional_plane(object, "codebook");
    out.mu_plane = optional_plane(object, "mu");
    if (object.has("support")) out.support = support(object.object("support"));
    return out;
  }

  // The transform under `key`, or none.
  [[nodiscard]] Transform transform(const JsonObject& parent, std::string_view key) const {
    Transform out;
    if (!parent.has(key)) return out;
    const JsonObject object = parent.object(key);
    out.kind = enum_from<TransformKind>(object, "kind", transform_names, 1);
    if (out.kind == TransformKind::hadamard) {
      only_keys(object, {"kind", "signs"});
      out.signs_plane = plane(object, "signs");
      return out;
    }
    only_keys(object, {"kind", "seed", "stream", "shared", "permuted"});
    out.seed = static_cast<std::uint64_t>(object.integer("seed", 0, INT64_MAX));
    out.stream = static_cast<std::uint64_t>(object.integer("stream", 0, INT64_MAX));
    out.shared = object.boolean("shared", false);
    out.permuted = object.boolean("permuted", true);
    return out;
  }

 private:
  [[nodiscard]] std::pair<Select, int> selection(const JsonObject& object) const {
    only_keys(object, {"select", "plane"});
    return {enum_from<Select>(object, "select", select_names, 1), plane(object, "plane")};
  }

  std::size_t planes_;
};

Plane plane_from(const JsonObject& object, std::vector<std::uint32_t>& ids) {
  only_keys(object, {"id", "role", "dtype", "bits", "rows", "cols"});
  const auto id = static_cast<std::uint32_t>(object.integer("id", 0, UINT32_MAX));
  if (std::find(ids.begin(), ids.end(), id) != ids.end()) object.fail("id", "each plane once");
  ids.push_back(id);
  Plane out;
  out.role = object.text("role");
  out.dtype = dtype_from(object, "dtype",
                         {DType::f32, DType::f16, DType::bf16, DType::i32, DType::i16, DType::u8});
  out.bits = static_cast<int>(object.integer("bits", 1, 8, 0));
  out.rows = object.integer("rows", 1, max_dimension);
  out.cols = object.integer("cols", 1, max_dimension);
  return out;
}

std::string element_path(const JsonObject& object, std::string_view key, std::size_t i) {
  return object.path_of(key) + "[" + std::to_string(i) + "]";
}

}  // namespace

Json describe(const LinearWeight& w, std::span<const std::uint32_t> plane_ids) {
  REQUIRE(plane_ids.size() == w.planes.size(), "one id per plane");
  Json out = {{"rows", w.rows}, {"cols", w.cols}};
  Json terms = Json::array();
  for (const Term& t : w.terms) terms.push_back(term_json(t));
  out["terms"] = std::move(terms);
  if (w.permutation_plane >= 0) out["permutation"] = w.permutation_plane;
  if (w.diagonal_plane >= 0) out["diagonal"] = w.diagonal_plane;
  if (w.left.kind != TransformKind::none) out["left"] = transform_json(w.left);
  if (w.right.kind != TransformKind::none) out["right"] = transform_json(w.right);
  Json planes = Json::array();
  for (std::size_t i = 0; i < w.planes.size(); ++i) {
    planes.push_back(plane_json(w.planes[i], plane_ids[i]));
  }
  out["planes"] = std::move(planes);
  return out;
}

LinearWeight linear_from_json(const Json& json, const std::string& file, const std::string& place,
                              std::vector<std::uint32_t>& plane_ids) {
  const JsonObject object(json, file, place);
  only_keys(object,
            {"rows", "cols", "terms", "permutation", "diagonal", "left", "right", "planes"});
  LinearWeight out;
  out.rows = object.integer("rows", 1, max_dimension);
  out.cols = object.integer("cols", 1, max_dimension);
  const Json& planes = array_from(object, "planes", max_planes);
  const Json& terms = array_from(object, "terms", max_terms);
  plane_ids.clear();
  for (std::size_t i = 0; i < planes.size(); ++i) {
    const JsonObject element(planes[i], file, element_path(object, "planes", i));
    out.planes.push_back(plane_from(element, plane_ids));
  }
  const Reader reader(planes.size());
  for (std::size_t i = 0; i < terms.size(); ++i) {
    const JsonObject element(terms[i], file, element_path(object, "terms", i));
    out.terms.push_back(reader.term(element));
  }
  out.permutation_plane = reader.optional_plane(object, "permutation");
  out.diagonal_plane = reader.optional_plane(object, "diagonal");
  out.left = reader.transform(object, "left");
  out.right = reader.transform(object, "right");
  validate_structure(out, file, place);
  return out;
}

}  // namespace engine
