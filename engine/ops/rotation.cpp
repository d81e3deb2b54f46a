#include "engine/ops/rotation.h"

#include <string>
#include <tuple>
#include <vector>

#include "engine/weight/plane_read.h"

namespace engine {
namespace {

TransformView take_side(Arena& arena, MemTag tag, const RotationSide& side, std::int64_t d,
                        bool inverse) {
  TransformView q;
  q.kind = side.kind;
  q.d = d;
  if (q.kind == TransformKind::hadamard) {
    q.order = hadamard_order(d);
    REQUIRE(q.order > 0, "no Hadamard matrix of size " + std::to_string(d));
    q.signs = arena.make(tag, DType::f32, 1, d);
    if (q.order > 1) q.small = arena.make(tag, DType::f32, q.order, q.order);
  } else if (q.kind == TransformKind::butterfly) {
    std::tie(q.p1, q.p2) = butterfly_sides(d);
    if (inverse) std::swap(q.p1, q.p2);
    q.shared = side.shared;
    q.first = arena.make(tag, DType::f16, (q.shared ? 1 : q.p2) * q.p1, q.p1);
    q.second = arena.make(tag, DType::f16, (q.shared ? 1 : q.p1) * q.p2, q.p2);
    if (side.permuted || inverse) {
      q.perm_in = arena.make(tag, DType::i32, 1, d);
      q.perm_out = arena.make(tag, DType::i32, 1, d);
    }
  }
  return q;
}

View take_places(Arena& arena, MemTag tag, const TransformView& q) {
  return q.perm_out.empty() ? View{} : arena.make(tag, DType::i32, 1, q.d);
}

class Filler {
 public:
  Filler(Ops& ops, const LinearWeight& w, int threads) : ops_(ops), w_(w), threads_(threads) {}

  void diagonal(const View& to) const {
    if (to.empty()) return;
    const Plane& plane = w_.plane(w_.diagonal_plane);
    std::vector<float> values(static_cast<std::size_t>(to.cols));
    for (std::int64_t j = 0; j < to.cols; ++j) {
      values[static_cast<std::size_t>(j)] = read_float(plane, 0, j);
    }
    put(values, to);
    ops_.synchronize();
  }

  void side(const Transform& transform, bool inverse, const TransformView& q,
            const View& places) const {
    if (q.kind == TransformKind::hadamard) {
      const std::vector<float> signs = read_signs(w_, transform);
      const std::vector<float> small = hadamard_matrix(q.order);
      put(signs, q.signs);
      put(small, q.small);
      ops_.synchronize();
    } else if (q.kind == TransformKind::butterfly) {
      Butterfly b = make_butterfly(transform, q.d, threads_);
      if (inverse) b = inverse_butterfly(b);
      const std::vector<f16> first = rounded(b.first), second = rounded(b.second);
      const std::vector<std::int32_t> inverse_out = inverse_permutation(b.perm_out);
      put(first, q.first);
      put(second, q.second);
      put(b.perm_in, q.perm_in);
      put(b.perm_out, q.perm_out);
      put(inverse_out, places);
      ops_.synchronize();
    }
  }

 private:
  static std::vector<f16> rounded(const std::vector<float>& from) {
    std::vector<f16> out(from.size());
    for (std::size_t i = 0; i < from.size(); ++i) store(out[i], from[i]);
    return out;
  }
  template <class T>
  void put(const std::vector<T>& from, const View& to) const {
    if (to.empty()) return;
    REQUIRE(std::ssize(from) == to.count(), "rotation: numbers for " + to.shape());
    ops_.upload(host_view(from.data(), to.rows, to.cols), to);
  }

  Ops& ops_;
  const LinearWeight& w_;
  int threads_;
};

RotationSide side_of(const TransformView& q, const RotationSide& shape) {
  return {q.kind, q.shared, q.kind == TransformKind::butterfly && shape.permuted};
}

}  // namespace

Rotation take_rotation(Arena& arena, MemTag tag, const PackedShape& s) {
  Rotation r;
  if (s.diagonal) r.diagonal = arena.make(tag, DType::f32, 1, s.cols);
  r.in = take_side(arena, tag, s.right, s.cols, false);
  r.out = take_side(arena, tag, s.left, s.rows, true);
  r.in_places = take_places(arena, tag, r.in);
  r.out_places = take_places(arena, tag, r.out);
  return r;
}

void fill_rotation(Ops& ops, const Rotation& to, const LinearWeight& w, int threads) {
  const Filler fill(ops, w, threads);
  fill.diagonal(to.diagonal);
  fill.side(w.right, false, to.in, to.in_places);
  fill.side(w.left, true, to.out, to.out_places);
}

PackedWeight without_rotation(const PackedWeight& w) {
  PackedWeight out = w;
  out.rotation = {};
  out.shape.left = out.shape.right = {};
  out.shape.diagonal = false;
  return out;
}

void check_rotation(const char* op, const PackedWeight& w, DeviceKind device) {
  const PackedShape& s = w.shape;
  const Rotation& r = w.rotation;
  const auto here = [&](const View& v) {
    REQUIRE(v.empty() || v.device == device,
            std::string(op) + ": a view of a rotation is elsewhere: " + v.shape());
  };
  REQUIRE(side_of(r.in, s.right) == s.right && side_of(r.out, s.left) == s.left &&
              (s.right.kind == TransformKind::none || r.in.d == s.cols) &&
              (s.left.kind == TransformKind::none || r.out.d == s.rows) &&
              r.diagonal.empty() == !s.diagonal && r.diagonal.cols == (s.diagonal ? s.cols : 0),
          std::string(op) + ": the rotation is not that of the shape");
  REQUIRE(r.in_places.cols == r.in.perm_out.cols && r.out_places.cols == r.out.perm_out.cols,
          std::string(op) + ": places of a rotation");
  for (const TransformView* q : {&r.in, &r.out}) {
    for (const View& v : {q->signs, q->small, q->first, q->second, q->perm_in, q->perm_out}) {
      here(v);
    }
  }
  for (const View& v : {r.diagonal, r.in_places, r.out_places}) here(v);
}

}  // namespace engine
