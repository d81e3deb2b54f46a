#include "engine/model/install_transform.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/core/parallel.h"
#include "engine/model/install.h"
#include "engine/ops/transform_view.h"
#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"
#include "engine/weight/plane_read.h"
#include "engine/weight/row_decoder.h"

namespace engine {
namespace {

constexpr std::int64_t max_slice_bytes = std::int64_t{16} << 20U;  // of rows decoded on the host

enum class How : std::uint8_t { lattice, midrise, affine, host };

// w without what stands around its terms.
LinearWeight bare(const LinearWeight& w) {
  LinearWeight out = w;
  out.permutation_plane = out.diagonal_plane = -1;
  out.left = out.right = Transform{};
  return out;
}

How how_to_decode(const LinearWeight& w) {
  const auto lattice = [](const Term& t) {
    return t.kind == TermKind::lattice && t.grid.product == DType::f32;
  };
  if (std::ranges::all_of(w.terms, lattice)) return How::lattice;
  const Term& t = w.terms[0];
  if (w.terms.size() == 1 && t.kind == TermKind::affine && t.support.everything() &&
      t.grid.midrise && t.grid.kind != GridKind::group && t.grid.product == DType::f32) {
    return How::midrise;
  }
  return match_affine(bare(w)) ? How::affine : How::host;
}

// Takes the memory and, unless the arena only measures, does the work.
class Installer {
 public:
  Installer(const LinearWeight& w, Arena& arena, Loader* loader, int threads)
      : w_(w), arena_(arena), loader_(loader), threads_(threads) {}

  void run(View out) {
    const Arena::Scope scope(arena_);
    const View t = make(DType::f32, w_.rows, w_.cols);
    {
      const Arena::Scope inner(arena_);
      decode_terms(t);
    }
    undo(w_.right, t, w_.cols);
    if (w_.left.kind != TransformKind::none) {
      const Arena::Scope inner(arena_);
      const View columns = make(DType::f32, w_.cols, w_.rows);
      if (!dry()) ops().transpose(t, columns);
      undo(w_.left, columns, w_.rows);
      if (!dry()) ops().transpose(columns, t);
    }
    const View permutation = raw(w_.permutation_plane);
    const View diagonal = floats(w_.diagonal_plane);
    if (dry()) return;
    ops().place_columns(t, permutation, diagonal, out);
    ops().synchronize();  // the host bytes may go now
  }

 private:
  [[nodiscard]] bool dry() const { return arena_.is_measuring(); }
  [[nodiscard]] Ops& ops() const { return loader_->ops(); }
  View make(DType dtype, std::int64_t rows, std::int64_t cols) {
    return arena_.make(MemTag::staging, dtype, rows, cols);
  }

  // A plane's bytes on the device; empty for no plane.
  View raw(int index) {
    if (index < 0) return {};
    const Plane& p = w_.plane(index);
    const View out = make(p.dtype, p.rows, p.packed() ? p.row_bytes() : p.cols);
    if (!dry()) {
      ops().upload(make_view(p.data.data, out.dtype, DeviceKind::cpu, out.rows, out.cols), out);
    }
    return out;
  }
  // A plane of real numbers as f32.
  View floats(int index) {
    const View stored = raw(index);
    if (stored.empty() || stored.dtype == DType::f32) return stored;
    const View out = make(DType::f32, stored.rows, stored.cols);
    if (!dry()) ops().convert(stored, out);
    return out;
  }
  // A plane of packed codes, one per byte.
  View codes(int index) {
    const Plane& p = w_.plane(index);
    const View packed = raw(index);
    if (p.bits == 8) return packed;
    const View out = make(DType::u8, p.rows, p.cols);
    if (!dry()) ops().unpack_codes(packed, p.bits, out);
    return out;
  }

  void decode_terms(const View& t) {
    switch (how_to_decode(w_)) {
      case How::lattice:
        for (const Term& term : w_.terms) {
          const View points = raw(term.codes_plane), scales = floats(term.grid.scale_plane);
          if (!dry())
            ops().decode_lattice(points, term.lattice, scales, &term != &w_.terms.front(), t);
        }
        return;
      case How::midrise: {
        const View c = codes(w_.terms[0].codes_plane);
        const View scales = floats(w_.terms[0].grid.scale_plane);
        if (!dry()) ops().decode_midrise(c, w_.terms[0].bits, scales, t);
        return;
      }
      case How::affine:
        return decode_affine(t);
      case How::host:
        if (!dry()) decode_on_host(t);
    }
  }

  void decode_affine(const View& t) {
    const LinearWeight terms = bare(w_);
    const AffinePattern p = *match_affine(terms);
    const View c = codes(p.codes), scales = floats(p.scales);
    const View zeros = make(DType::i32, scales.rows, scales.cols);
    const View groups = raw(p.column_groups);
    if (dry()) return;
    std::vector<std::int32_t> host(static_cast<std::size_t>(zeros.count()), 1 << (p.grid.bits - 1));
    if (p.zeros >= 0) {
      const Plane& plane = w_.plane(p.zeros);
      read_zeros(plane, static_cast<const std::byte*>(plane.data.data), host);
    }
    ops().upload(host_view(host.data(), zeros.rows, zeros.cols), zeros);
    ops().dequantize_codes(c, p.grid, scales, zeros, groups, View{}, t);
    ops().synchronize();
  }

  void decode_on_host(const View& t) {
    const RowDecoder decoder(w_);
    const std::int64_t row_bytes = t.cols * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t slice = std::clamp<std::int64_t>(max_slice_bytes / row_bytes, 1, t.rows);
    ThreadPool pool(threads_);
    for (std::int64_t first = 0; first < t.rows; first += slice) {
      const std::int64_t n = std::min(slice, t.rows - first);
      const View host =
          make_view(loader_->stage(slice * row_bytes), DType::f32, DeviceKind::cpu, n, t.cols);
      pool.run(n, 1, [&](std::int64_t begin, std::int64_t end) {
        decoder.decode_terms(first + begin, host.row_range(begin, end - begin));
      });
      ops().upload(host, t.row_range(first, n));
      loader_->staged();
    }
  }

  // Rows of x [m, d] by the inverse of the transform.
  void undo(const Transform& transform, const View& x, std::int64_t d) {
    if (transform.kind == TransformKind::none) return;
    const Arena::Scope scope(arena_);
    if (dry()) {
      static_cast<void>(take_transform_view(arena_, MemTag::staging, transform, d));
      return;
    }
    const TransformView q = make_transform_view(ops(), arena_, MemTag::staging, transform,
                                                read_signs(w_, transform), d, threads_);
    ops().transform_rows(x, q, true, x);
  }

  const LinearWeight& w_;
  Arena& arena_;
  Loader* loader_;
  int threads_;
};

}  // namespace

bool needs_transform_install(const LinearWeight& w) {
  return w.left.kind != TransformKind::none || w.right.kind != TransformKind::none ||
         std::ranges::any_of(
             w.terms, [](const Term& t) { return t.kind == TermKind::lattice || t.grid.midrise; });
}

void plan_install_transformed(const LinearWeight& w, Arena& arena) {
  Installer(w, arena, nullptr, 1).run(View{});
}

void install_transformed(const LinearWeight& w, const std::string& name, Loader& loader, View out,
                         int threads) {
  validate(w, "memory", name);  // a plane of a wrong size must not be read past its end
  Installer(w, loader.arena(), &loader, threads).run(out);
}

}  // namespace engine
