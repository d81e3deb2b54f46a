#include "engine/model/install_pbllm.h"

#include <vector>

#include "engine/model/install.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

struct Scratch {
  View bitmap, signs_and_codes, workspace;
  View scales_raw, means_raw, high_scales_raw;
  View scales, means, high_scales, high_zeros;
};

Scratch make_scratch(const LinearWeight& w, const PbllmPattern& p, Arena& arena) {
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return arena.make(MemTag::staging, dtype, r, c);
  };
  const auto like = [&](int plane) {
    return make(w.plane(plane).dtype, w.plane(plane).rows, w.plane(plane).cols);
  };
  const std::int64_t groups = w.plane(p.scales).cols;
  Scratch s;
  s.bitmap = make(DType::u8, w.rows, w.plane(p.bitmap).row_bytes());
  // As many as there could be: a plan is made before it is known how many weights are salient.
  s.signs_and_codes = make(DType::u8, 1, (w.rows * w.cols * p.high_bits) / 8 + 2);
  s.scales_raw = like(p.scales);
  s.high_scales_raw = like(p.high_scales);
  s.scales = make(DType::f32, w.rows, groups);
  s.high_scales = make(DType::f32, w.rows, 1);
  if (p.means >= 0) {
    s.means_raw = like(p.means);
    s.means = make(DType::f32, w.rows, groups);
  }
  s.high_zeros = make(DType::i32, w.rows, 1);
  s.workspace = make(DType::u8, 1, pbllm_decode_bytes(w.rows));
  return s;
}

// A term of one plane of coefficients, by row or by group without gaps, whose values are f32.
bool plain(const LinearWeight& w, const Term& t) {
  const Grid& g = t.grid;
  return g.kind != GridKind::tensor && g.column_group_plane < 0 && !g.midrise &&
         g.product == DType::f32 && (g.kind == GridKind::row || w.cols % g.group == 0);
}

}  // namespace

std::optional<PbllmPattern> match_pbllm(const LinearWeight& w) {
  if (w.terms.size() != 2 || w.permutation_plane >= 0 || w.diagonal_plane >= 0 ||
      w.left.kind != TransformKind::none || w.right.kind != TransformKind::none) {
    return std::nullopt;
  }
  const Term& low = w.terms[0];
  const Term& high = w.terms[1];
  const auto compact = [](const Term& t, Select side) {
    return t.support.bitmap == side && t.support.columns == Select::all && t.support.compact;
  };
  if (low.kind != TermKind::sign || !compact(low, Select::not_in) || !plain(w, low) ||
      high.kind != TermKind::affine || !compact(high, Select::in) || !plain(w, high) ||
      high.grid.kind != GridKind::row || low.support.bitmap_plane != high.support.bitmap_plane) {
    return std::nullopt;
  }
  return PbllmPattern{.bitmap = low.support.bitmap_plane,
                      .signs = low.codes_plane,
                      .scales = low.grid.scale_plane,
                      .means = low.mu_plane,
                      .high_bits = high.bits,
                      .high_codes = high.codes_plane,
                      .high_scales = high.grid.scale_plane,
                      .high_zeros = high.grid.zero_plane};
}

void plan_install_pbllm(const LinearWeight& w, const PbllmPattern& p, Arena& arena) {
  const Arena::Scope scope(arena);
  make_scratch(w, p, arena);
}

void install_pbllm(const LinearWeight& w, const PbllmPattern& p, const std::string& name,
                   Loader& loader, View out) {
  validate(w, "memory", name);  // a plane of a wrong size must not be read past its end
  Ops& ops = loader.ops();
  const Arena::Scope scope(loader.arena());
  const Scratch s = make_scratch(w, p, loader.arena());
  const auto upload = [&](int plane, const View& to) {
    ops.upload(make_view(w.plane(plane).data.data, to.dtype, DeviceKind::cpu, to.rows, to.cols),
               to);
  };
  PbllmDecode d;
  d.high_bits = p.high_bits;
  d.bitmap = s.bitmap;
  d.signs = s.signs_and_codes.col_range(0, w.plane(p.signs).raw_bytes());
  d.high = s.signs_and_codes.col_range(d.signs.cols, w.plane(p.high_codes).raw_bytes());
  d.means = s.means;
  d.scales = s.scales;
  d.high_scales = s.high_scales;
  d.high_zeros = s.high_zeros;
  d.out = out;
  d.workspace = s.workspace;
  upload(p.bitmap, d.bitmap);
  upload(p.signs, d.signs);
  upload(p.high_codes, d.high);
  upload(p.scales, s.scales_raw);
  ops.convert(s.scales_raw, s.scales);
  upload(p.high_scales, s.high_scales_raw);
  ops.convert(s.high_scales_raw, s.high_scales);
  if (p.means >= 0) {
    upload(p.means, s.means_raw);
    ops.convert(s.means_raw, s.means);
  }
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(w.rows), 1 << (p.high_bits - 1));
  if (p.high_zeros >= 0) {
    const Plane& plane = w.plane(p.high_zeros);
    read_zeros(plane, static_cast<const std::byte*>(plane.data.data), zeros);
  }
  ops.upload(host_view(zeros.data(), w.rows, 1), s.high_zeros);
  ops.pbllm_decode(d);
  ops.synchronize();
}

}  // namespace engine
