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
             (t.grid.zero_plane < 0 ? " sym" : " asym") + scale_name(w, t.grid) + where;
    case TermKind::codebook:
      return "codebook" + std::to_string(t.bits) + grid_name(t.grid) + scale_name(w, t.grid) +
             where;
    case TermKind::sign:
      return "sign" + grid_name(t.grid) + scale_name(w, t.grid) + (t.mu_plane >= 0 ? " mu" : "") +
             where;
  }
  throw Error(ErrorCode::internal, "unknown term kind");
}

}  // namespace

std::optional<AffinePattern> match_affine(const LinearWeight& w) {
  if (w.terms.size() != 1 || w.diagonal_plane >= 0) return std::nullopt;
  const Term& t = w.terms[0];
  if (t.kind != TermKind::affine || !t.support.everything()) return std::nullopt;
  if (t.grid.kind == GridKind::tensor) return std::nullopt;

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
  const Term& t = w.terms[0];
  if (t.kind != TermKind::dense || !t.support.everything()) return std::nullopt;
  return DensePattern{t.codes_plane, w.plane(t.codes_plane).dtype};
}

std::string scheme_name(const LinearWeight& w) {
  std::string out;
  for (const Term& t : w.terms) out += (out.empty() ? "" : " + ") + term_name(w, t);
  if (w.permutation_plane >= 0) out += " permuted";
  if (w.diagonal_plane >= 0) out += " diagonal";
  return out;
}

}  // namespace engine
