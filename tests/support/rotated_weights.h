// Random weights as QuIP and QuIP# store them where packed kernels know them: one scale for the
// whole matrix.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/transform_weights.h"

namespace engine::test {

enum class RotatedMethod { quip, quipsharp };

struct RotatedOptions {
  RotatedMethod method = RotatedMethod::quip;
  int bits = 2;
  bool shared = false;   // quip
  bool permuted = true;  // quip
  bool diagonal = true;  // quip
  bool left = true, right = true;
  std::uint64_t seed = 1;
};

// Weights of a few hundredths.
inline OwnedLinear rotated_weight(std::int64_t rows, std::int64_t cols, const RotatedOptions& o) {
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  const auto scale_plane = [&](float scale) {
    return w.add(floats_plane(host_view(&scale, 1, 1), DType::f32, "scales"));
  };
  Term t;
  t.grid.kind = GridKind::tensor;
  if (o.method == RotatedMethod::quip) {
    t.kind = TermKind::affine;
    t.bits = o.bits;
    t.grid.midrise = true;
    t.grid.scale_plane = scale_plane(0.0731F / static_cast<float>(1 << o.bits));
    t.codes_plane = add_codes(w, rows, cols, o.bits, o.seed + 2);
    w.weight.terms.push_back(t);
    const auto butterfly = [&](std::uint64_t stream) {
      Transform b;
      b.kind = TransformKind::butterfly;
      b.seed = o.seed;
      b.stream = stream;
      b.shared = o.shared;
      b.permuted = o.permuted;
      return b;
    };
    if (o.left) w.weight.left = butterfly(4);
    if (o.right) w.weight.right = butterfly(3);
    if (o.diagonal && o.right) {
      w.weight.diagonal_plane = add_floats(w, 1, cols, DType::f16, o.seed + 3);
    }
    return w;
  }
  t.kind = TermKind::lattice;
  const auto add_term = [&](LatticeBook book, float scale, std::uint64_t seed) {
    t.lattice = book;
    t.bits = book == LatticeBook::e8p ? 2 : 1;
    t.grid.scale_plane = scale_plane(scale);
    const std::int64_t n = cols / 8;
    if (book == LatticeBook::e8p) {
      std::vector<std::int16_t> codes(index(rows * n));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::int16_t>(uniform_value(seed, 3, i) * 65536 - 32768);
      }
      t.codes_plane = w.add(lattice_codes_plane(host_view(codes.data(), rows, n)));
    } else {
      std::vector<std::uint8_t> codes(index(rows * n));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint8_t>(uniform_value(seed, 3, i) * 256);
      }
      t.codes_plane = w.add(lattice_codes_plane(host_view(codes.data(), rows, n)));
    }
    w.weight.terms.push_back(t);
  };
  add_term(LatticeBook::e8p, 0.0219F, o.seed + 6);
  if (o.bits > 2) {
    add_term(o.bits == 3 ? LatticeBook::e8_byte : LatticeBook::e8p, 0.0057F, o.seed + 7);
  }
  if (o.left) w.weight.left = hadamard_with(w, rows, o.seed + 8);
  if (o.right) w.weight.right = hadamard_with(w, cols, o.seed + 9);
  return w;
}

inline std::string rotated_name(const RotatedOptions& o) {
  return std::string(o.method == RotatedMethod::quip ? "quip" : "quipsharp") +
         std::to_string(o.bits) + (o.shared ? "_shared" : "") + (o.permuted ? "" : "_plain") +
         (o.diagonal ? "" : "_no_diagonal") + (o.left ? "" : "_no_left") +
         (o.right ? "" : "_no_right");
}

}  // namespace engine::test
