#include "engine/weight/pattern.h"

namespace engine {
namespace {

std::string grid_name(const Grid& g) {
  std::string out;
  switch (g.kind) {
    case GridKind::tensor:
      out = " tensor";
      break;
    case GridKind::row:
      out = " row";
      break;
    case GridKind::group:
      out = " g" + std::to_string(g.group);
      break;
  }
  return out;
}

std::string scale_name(const LinearWeight& w, const Grid& g) {
  std::string out = std::string(" ") + dtype_name(w.plane(g.scale_plane).dtype) + "-scale";
  if (g.product != DType::f32) out += std::string(" ") + dtype_name(g.product) + "-product";
  if (g.column_group_plane >= 0) out += " column-groups";
  return out;
}

std::string support_name(const Support& s) {
  std::string out;
  if (s.columns != Select::all) out += s.columns == Select::in ? " on-columns" : " off-columns";
  if (s.bitmap != Select::all) out += s.bitmap == Select::in ? " on-bitmap" : " off-bitmap";
  if (s.compact) out += " compact";
  return out;
}

std::string term_name(const LinearWeight& w, const Term& t) {
  const std::string where = support_name(t.support);
  switch (t.kind) {
    case TermKind::dense:
      return std::string("dense ") + dtype_name(w.plane(t.codes_plane).dtype) + where;
    case TermKind::affine:
      return "affine" + std::to_string(t.bits) + grid_name(t.grid) +
             (t.grid.midrise ? " midrise" : (t.grid.zero_plane < 0 ? " sym" : " asym")) +
             scale_name(w, t.grid) + where;
    case TermKind::codebook:
      return "codebook" + std::to_string(t.bits) + grid_name(t.grid) + scale_name(w, t.grid) +
             where;
    case TermKind::lattice:
      return std::string("lattice ") + (t.lattice == LatticeBook::e8p ? "e8p" : "e8-byte") +
             grid_name(t.grid) + scale_name(w, t.grid);
    case TermKind::sign:
      return "sign" + grid_name(t.grid) + scale_name(w, t.grid) + (t.mu_plane >= 0 ? " mu" : "") +
             where;
  }
  throw Error(ErrorCode::internal, "unknown term kind");
}

// " hadamard28-in": the order of the small matrix, unless that is 1.
std::string transform_name(const Transform& t, std::int64_t d, const char* side) {
  if (t.kind == TransformKind::none) return "";
  if (t.kind == TransformKind::butterfly) {
    return std::string(t.shared ? " kronecker" : " butterfly") + (t.permuted ? "" : "-plain") +
           side;
  }
  const std::int64_t order = hadamard_order(d);
  return " hadamard" + (order == 1 ? "" : std::to_string(order)) + side;
}

bool has_transforms(const LinearWeight& w) {
  return w.left.kind != TransformKind::none || w.right.kind != TransformKind::none;
}

}  // namespace

std::optional<AffinePattern> match_affine(const LinearWeight& w) {
  if (w.terms.size() != 1 || w.diagonal_plane >= 0 || has_transforms(w)) return std::nullopt;
  const Term& t = w.terms[0];
  if (t.kind != TermKind::affine || !t.support.everything()) return std::nullopt;
  if (t.grid.kind == GridKind::tensor || t.grid.midrise) return std::nullopt;

  AffinePattern out;
  out.grid.bits = t.bits;
  out.grid.group = t.grid.kind == GridKind::row ? 0 : t.grid.group;
  out.grid.symmetric = t.grid.zero_plane < 0;
  out.grid.arithmetic = t.grid.product;
  out.grid.scale_dtype = w.plane(t.grid.scale_plane).dtype;
  // Column groups may be fewer than cols / group; the ops assume exactly that many.
  if (w.plane(t.grid.scale_plane).cols != out.grid.groups(w.cols)) return std::nullopt;
  out.codes = t.codes_plane;
  out.scales = t.grid.scale_plane;
  out.zeros = t.grid.zero_plane;
  out.permutation = w.permutation_plane;
  out.column_groups = t.grid.column_group_plane;
  return out;
}

std::optional<DensePattern> match_dense(const LinearWeight& w) {
  if (w.terms.size() != 1 || w.diagonal_plane >= 0 || w.permutation_plane >= 0) return std::nullopt;
  if (has_transforms(w)) return std::nullopt;
  const Term& t = w.terms[0];
  if (t.kind != TermKind::dense || !t.support.everything()) return std::nullopt;
  return DensePattern{t.codes_plane, w.plane(t.codes_plane).dtype};
}

std::optional<PackedPattern> match_packable(const LinearWeight& w) {
  if (w.terms.empty() || w.terms.size() > 2 || w.diagonal_plane >= 0) return std::nullopt;
  if (has_transforms(w)) return std::nullopt;
  const Term& first = w.terms[0];
  PackedPattern out;
  PackedShape& shape = out.shape;
  shape.rows = w.rows;
  shape.cols = w.cols;
  if (w.terms.size() == 2 && first.kind == TermKind::affine) {
    shape.kind = PackedKind::binary2;
    shape.bits = 2;
  } else if (w.terms.size() == 1 && first.kind == TermKind::affine) {
    shape.kind = PackedKind::affine;
    shape.bits = first.bits;
  } else if (w.terms.size() == 1 && first.kind == TermKind::codebook && first.bits == 4) {
    shape.kind = PackedKind::codebook;
    shape.bits = 4;
    out.book = first.codebook_plane;
  } else {
    return std::nullopt;
  }
  const Grid& grid = first.grid;
  if (grid.kind == GridKind::tensor) return std::nullopt;
  const std::int64_t units = w.plane(grid.scale_plane).cols;
  shape.group = grid.kind == GridKind::row || units == 1 ? 0 : grid.group;
  const bool fits = shape.group == 0 || shape.group == record_cols / 4 ||
                    shape.group == record_cols / 2 || shape.group % record_cols == 0;
  if (!fits || units != shape.groups()) return std::nullopt;
  shape.scale_dtype = w.plane(grid.scale_plane).dtype;
  shape.zeros = grid.zero_plane >= 0;
  out.permutation = w.permutation_plane;
  // With one unit per row it does not matter to which columns it belongs.
  out.column_groups = shape.group == 0 ? -1 : grid.column_group_plane;
  if (out.column_groups >= 0 && out.permutation < 0) return std::nullopt;

  for (std::size_t i = 0; i < w.terms.size(); ++i) {
    const Term& t = w.terms[i];
    if (!t.support.everything() || t.grid.midrise) return std::nullopt;
    if (w.terms.size() == 2) {
      if (t.kind != TermKind::affine || t.bits != 1) return std::nullopt;
      const Plane& scales = w.plane(t.grid.scale_plane);
      const bool same = t.grid.kind == grid.kind && t.grid.group == grid.group &&
                        t.grid.column_group_plane == grid.column_group_plane &&
                        (t.grid.zero_plane >= 0) == shape.zeros && scales.cols == units &&
                        scales.dtype == shape.scale_dtype;
      if (!same) return std::nullopt;
    }
    out.codes[i] = t.codes_plane;
    out.scales[i] = t.grid.scale_plane;
    out.zeros[i] = t.grid.zero_plane;
  }
  return out;
}

std::string scheme_name(const LinearWeight& w) {
  std::string out;
  for (const Term& t : w.terms) out += (out.empty() ? "" : " + ") + term_name(w, t);
  if (w.permutation_plane >= 0) out += " permuted";
  if (w.diagonal_plane >= 0) out += " diagonal";
  out += transform_name(w.right, w.cols, "-in") + transform_name(w.left, w.rows, "-out");
  return out;
}

}  // namespace engine
