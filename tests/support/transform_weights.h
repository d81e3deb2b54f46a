// Weights as QuIP and QuIP# store them, with random codes, for the tests of every decoder.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "engine/weight/codec.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {

inline int add_floats(OwnedLinear& w, std::int64_t rows, std::int64_t cols, DType dtype,
                      std::uint64_t seed) {
  std::vector<float> values = bell_matrix(rows, cols, seed);
  for (float& v : values) v = round_to(dtype, 0.25F + std::fabs(v));
  return w.add(floats_plane(host_view(values.data(), rows, cols), dtype, "values"));
}

inline int add_codes(OwnedLinear& w, std::int64_t rows, std::int64_t cols, int bits,
                     std::uint64_t seed) {
  std::vector<std::uint8_t> codes(index(rows * cols));
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>(uniform_value(seed, 1, i) * (1 << bits));
  }
  return w.add(pack_codes_plane(host_view(codes.data(), rows, cols), bits));
}

inline Transform hadamard_with(OwnedLinear& w, std::int64_t d, std::uint64_t seed) {
  std::vector<float> signs(index(d));
  for (std::size_t i = 0; i < signs.size(); ++i) {
    signs[i] = uniform_value(seed, 2, i) < 0.5 ? -1.0F : 1.0F;
  }
  Transform t;
  t.kind = TransformKind::hadamard;
  t.signs_plane = w.add(signs_plane(signs));
  return t;
}

// A midrise grid over the whole matrix, butterflies, a permutation and a diagonal.
inline OwnedLinear quip_weight(std::int64_t rows, std::int64_t cols, int bits) {
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  Term t;
  t.kind = TermKind::affine;
  t.bits = bits;
  t.grid.kind = GridKind::tensor;
  t.grid.midrise = true;
  t.grid.scale_plane = add_floats(w, 1, 1, DType::f32, 1);
  t.codes_plane = add_codes(w, rows, cols, bits, 2);
  w.weight.terms.push_back(t);
  std::vector<std::int32_t> order(index(cols));
  for (std::size_t j = 0; j < order.size(); ++j) {
    order[j] = static_cast<std::int32_t>((j + 5) % order.size());
  }
  w.weight.permutation_plane = w.add(indices_plane(order, "permutation"));
  w.weight.diagonal_plane = add_floats(w, 1, cols, DType::f16, 3);
  w.weight.left.kind = w.weight.right.kind = TransformKind::butterfly;
  w.weight.left.seed = w.weight.right.seed = 9;
  w.weight.left.stream = 4;
  w.weight.right.stream = 3;
  w.weight.right.shared = true;
  w.weight.right.permuted = false;
  return w;
}

// One or two lattice terms between Hadamard transforms.
inline OwnedLinear quipsharp_weight(std::int64_t rows, std::int64_t cols, bool residual) {
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  Term t;
  t.kind = TermKind::lattice;
  t.lattice = LatticeBook::e8p;
  t.bits = 2;
  t.grid.kind = GridKind::tensor;
  t.grid.scale_plane = add_floats(w, 1, 1, DType::f32, 4);
  std::vector<std::int16_t> codes(index(rows * cols / 8));
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::int16_t>(uniform_value(6, 3, i) * 65536 - 32768);
  }
  t.codes_plane = w.add(lattice_codes_plane(host_view(codes.data(), rows, cols / 8)));
  w.weight.terms.push_back(t);
  if (residual) {
    t.lattice = LatticeBook::e8_byte;
    t.bits = 1;
    t.grid.kind = GridKind::row;
    t.grid.scale_plane = add_floats(w, rows, 1, DType::f16, 5);
    std::vector<std::uint8_t> bytes(index(rows * cols / 8));
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<std::uint8_t>(uniform_value(7, 3, i) * 256);
    }
    t.codes_plane = w.add(lattice_codes_plane(host_view(bytes.data(), rows, cols / 8)));
    w.weight.terms.push_back(t);
  }
  w.weight.left = hadamard_with(w, rows, 8);
  w.weight.right = hadamard_with(w, cols, 9);
  return w;
}

// Rows with zeros of their own, transformed on one side; T as the affine pattern decodes it.
inline OwnedLinear row_grid_weight(std::int64_t rows, std::int64_t cols) {
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  Term t;
  t.kind = TermKind::affine;
  t.bits = 3;
  t.grid.kind = GridKind::row;
  t.grid.scale_plane = add_floats(w, rows, 1, DType::bf16, 1);
  t.grid.zero_plane = add_codes(w, rows, 1, 3, 5);
  t.codes_plane = add_codes(w, rows, cols, 3, 2);
  w.weight.terms.push_back(t);
  w.weight.diagonal_plane = add_floats(w, 1, cols, DType::f32, 3);
  w.weight.right.kind = TransformKind::butterfly;
  return w;
}

// A midrise term and a lattice term: no path of its own on a device.
inline OwnedLinear mixed_weight(std::int64_t rows, std::int64_t cols) {
  OwnedLinear w = quipsharp_weight(rows, cols, false);
  Term t;
  t.kind = TermKind::affine;
  t.bits = 8;
  t.grid.kind = GridKind::row;
  t.grid.midrise = true;
  t.grid.scale_plane = add_floats(w, rows, 1, DType::f32, 1);
  t.codes_plane = add_codes(w, rows, cols, 8, 2);
  w.weight.terms.push_back(t);
  return w;
}

struct NamedWeight {
  std::string name;
  OwnedLinear w;
};

inline std::vector<NamedWeight> transformed_weights(std::int64_t rows, std::int64_t cols) {
  std::vector<NamedWeight> all;
  for (const int bits : {1, 2, 3, 4, 8}) {
    all.push_back({"quip " + std::to_string(bits), quip_weight(rows, cols, bits)});
  }
  all.push_back({"quipsharp 2", quipsharp_weight(rows, cols, false)});
  all.push_back({"quipsharp 3", quipsharp_weight(rows, cols, true)});
  all.push_back({"row grid", row_grid_weight(rows, cols)});
  all.push_back({"mixed", mixed_weight(rows, cols)});
  // Midrise and lattice terms without transforms are weights, too.
  OwnedLinear plain = quip_weight(rows, cols, 2);
  plain.weight.left = plain.weight.right = Transform{};
  all.push_back({"no transform", std::move(plain)});
  return all;
}

}  // namespace engine::test
