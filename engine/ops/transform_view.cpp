#include "engine/ops/transform_view.h"

#include <string>
#include <tuple>
#include <vector>

namespace engine {

TransformView take_transform_view(Arena& arena, MemTag tag, const Transform& transform,
                                  std::int64_t d) {
  TransformView q;
  q.kind = transform.kind;
  q.d = d;
  if (q.kind == TransformKind::hadamard) {
    q.order = hadamard_order(d);
    REQUIRE(q.order > 0, "no Hadamard matrix of size " + std::to_string(d));
    q.signs = arena.make(tag, DType::f32, 1, d);
    if (q.order > 1) q.small = arena.make(tag, DType::f32, q.order, q.order);
  } else if (q.kind == TransformKind::butterfly) {
    std::tie(q.p1, q.p2) = butterfly_sides(d);
    q.shared = transform.shared;
    q.first = arena.make(tag, DType::f32, (q.shared ? 1 : q.p2) * q.p1, q.p1);
    q.second = arena.make(tag, DType::f32, (q.shared ? 1 : q.p1) * q.p2, q.p2);
    if (transform.permuted) {
      q.perm_in = arena.make(tag, DType::i32, 1, d);
      q.perm_out = arena.make(tag, DType::i32, 1, d);
    }
  }
  return q;
}

TransformView make_transform_view(Ops& ops, Arena& arena, MemTag tag, const Transform& transform,
                                  std::span<const float> signs, std::int64_t d, int threads) {
  const TransformView q = take_transform_view(arena, tag, transform, d);
  if (arena.is_measuring()) return q;
  const auto upload = [&](const auto& from, const View& to) {
    if (!to.empty()) ops.upload(host_view(from.data(), to.rows, to.cols), to);
  };
  if (q.kind == TransformKind::hadamard) {
    REQUIRE(static_cast<std::int64_t>(signs.size()) == d, "one sign per element");
    const std::vector<float> small = hadamard_matrix(q.order);
    upload(signs, q.signs);
    upload(small, q.small);
    ops.synchronize();
  } else if (q.kind == TransformKind::butterfly) {
    const Butterfly b = make_butterfly(transform, d, threads);
    upload(b.first, q.first);
    upload(b.second, q.second);
    upload(b.perm_in, q.perm_in);
    upload(b.perm_out, q.perm_out);
    ops.synchronize();
  }
  return q;
}

void require_transform(const View& x, const TransformView& q, const View& out) {
  const auto is_small_float = [](DType d) {
    return d == DType::f32 || d == DType::f16 || d == DType::bf16;
  };
  REQUIRE(is_small_float(x.dtype) && is_small_float(out.dtype),
          "transform_rows: from " + x.shape() + " to " + out.shape());
  REQUIRE(x.rows == out.rows && x.cols == out.cols && x.cols == q.d,
          "transform_rows of size " + std::to_string(q.d) + ": from " + x.shape() + " to " +
              out.shape());
  REQUIRE(x.data != out.data || (x.dtype == out.dtype && x.stride == out.stride),
          "transform_rows: in place from " + x.shape() + " to " + out.shape());
  const auto expect = [](const char* what, const View& v, std::int64_t rows, std::int64_t cols) {
    REQUIRE(v.rows == rows && v.cols == cols && v.contiguous(),
            std::string("transform_rows: ") + what + " is " + v.shape());
  };
  if (q.kind == TransformKind::hadamard) {
    REQUIRE(q.order > 0 && q.order == hadamard_order(q.d), "transform_rows: the order is wrong");
    expect("signs", q.signs, 1, q.d);
    REQUIRE(q.signs.dtype == DType::f32, "transform_rows: signs are f32");
    if (q.order > 1) {
      expect("H_K", q.small, q.order, q.order);
      REQUIRE(q.small.dtype == DType::f32, "transform_rows: H_K is f32");
    }
  } else if (q.kind == TransformKind::butterfly) {
    REQUIRE(q.p1 > 0 && q.p2 > 0 && q.p1 * q.p2 == q.d && has_butterfly(q.d),
            "transform_rows: sides of another size");
    expect("A", q.first, (q.shared ? 1 : q.p2) * q.p1, q.p1);
    expect("B", q.second, (q.shared ? 1 : q.p1) * q.p2, q.p2);
    REQUIRE(q.first.dtype == q.second.dtype &&
                (q.first.dtype == DType::f32 || q.first.dtype == DType::f16),
            "transform_rows: rotations are f32 or f16");
    REQUIRE(q.perm_in.empty() == q.perm_out.empty(), "transform_rows: one permutation of two");
    if (!q.perm_in.empty()) {
      expect("a permutation", q.perm_in, 1, q.d);
      expect("a permutation", q.perm_out, 1, q.d);
    }
  }
}

}  // namespace engine
