// A packed weight as operands of a parity case, made on the host by the reference of the layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/weight/packed_layout.h"
#include "tests/parity/parity_support.h"

namespace engine::test {

inline const char* kind_name(PackedKind kind) {
  const char* names[] = {"affine",  "codebook", "binary2", "mixed",
                         "salient", "regions",  "midrise", "lattice"};
  return names[static_cast<int>(kind)];
}

inline std::string shape_name(const PackedShape& s) {
  return std::string(kind_name(s.kind)) + std::to_string(s.bits) + "_g" + std::to_string(s.group) +
         "_" + dtype_name(s.scale_dtype) + (s.zeros ? "_zeros" : "") + "_" +
         std::to_string(s.rows) + "x" + std::to_string(s.cols);
}

inline PackedShape packed_shape(std::int64_t rows, std::int64_t cols, PackedKind kind, int bits,
                                std::int64_t group, DType scales, bool zeros) {
  PackedShape s;
  s.rows = rows;
  s.cols = cols;
  s.kind = kind;
  s.bits = bits;
  s.group = group;
  s.scale_dtype = scales;
  s.zeros = zeros && kind != PackedKind::codebook;
  return s;
}

// A weight, row-major in the order of its columns, and what an evaluation may add up for each:
// scale
// * (code + zero), as a product with the codes and one with the zeros do.
struct DecodedWeight {
  DecodedWeight(std::int64_t n, std::int64_t k)
      : rows(n), cols(k), value(static_cast<std::size_t>(n * k)), part(value.size()) {}
  explicit DecodedWeight(const Operand& dense) : DecodedWeight(dense.rows(), dense.cols()) {
    part = dense.values();
    for (std::size_t i = 0; i < part.size(); ++i) {
      value[i] = static_cast<float>(part[i]);
      part[i] = std::abs(part[i]);
    }
  }
  std::int64_t rows, cols;
  std::vector<float> value;
  std::vector<double> part;
};

struct PackedOperands {
  // Weights that share order_seed (and their columns) share their permutation.
  PackedOperands(const PackedShape& s, bool permuted, std::uint64_t seed,
                 Layout planes = Layout::tight, std::uint64_t order_seed = 1)
      : shape(s),
        codes(Role::input, DType::u8, s.rows, s.cols, planes),
        scales(Role::input, DType::f32, s.rows * s.terms(), s.groups(), planes),
        zeros(Role::input, DType::i32, s.zeros ? s.rows * s.terms() : 0, s.groups(), planes),
        records(Role::input, DType::u8, 1, s.records_bytes()),
        row_units(Role::input, DType::u8, s.group == 0 ? 1 : 0, s.row_unit_bytes()),
        book(Role::input, DType::f32, s.kind == PackedKind::codebook ? 1 : 0, 16),
        permutation(Role::input, DType::i32, permuted ? 1 : 0, s.cols) {
    codes.uniform(seed, std::int64_t{1} << s.bits);
    // Zeros within the codes, and some as large as a byte holds.
    const auto odd_one = [](std::uint64_t i) { return i % 37 == 36; };
    zeros.fill([&](std::int64_t r, std::int64_t c) {
      const auto i = static_cast<std::uint64_t>(r * zeros.cols() + c);
      const int top = s.kind == PackedKind::binary2 ? 2 : 1 << s.bits;
      return odd_one(i) ? 255.0 : std::floor(uniform_value(seed, 6, i) * top);
    });
    // Weights of a few hundredths, whatever the codes and zeros.
    scales.fill([&](std::int64_t r, std::int64_t c) {
      const auto i = static_cast<std::uint64_t>(r * scales.cols() + c);
      const int bits = s.zeros && odd_one(i) ? 8 : s.kind == PackedKind::codebook ? 0 : s.bits;
      const double v = 0.1 * std::ldexp(0.5 + uniform_value(seed, 5, i), -bits);
      return static_cast<double>(round_to(s.scale_dtype, static_cast<float>(v)));
    });
    book.fill(
        [](std::int64_t, std::int64_t c) { return std::sin(0.19 * static_cast<double>(c - 7)); });
    if (permuted) {
      const std::vector<std::int32_t> order = random_order(s.cols, order_seed);
      permutation.fill([&](std::int64_t, std::int64_t c) {
        return static_cast<double>(order[static_cast<std::size_t>(c)]);
      });
    }
    PackedWeight w = host_weight();
    pack_records(codes.host(), scales.host(), zeros.host(), w, 0, s.row_tiles());
  }

  [[nodiscard]] PackedWeight host_weight() {
    return {shape, records.host(), row_units.host(), book.host(), permutation.host()};
  }
  // The four operands that a packed weight consists of, to be appended to a case's list.
  void append_to(std::vector<const Operand*>& operands) const {
    operands.insert(operands.end(), {&records, &row_units, &book, &permutation});
  }
  // From the views of those operands, of which the first is views[first].
  [[nodiscard]] PackedWeight weight(const std::vector<View>& views, std::size_t first) const {
    return {shape, views.at(first), views.at(first + 1), views.at(first + 2), views.at(first + 3)};
  }

  // The weight by its definition, without the layout.
  [[nodiscard]] DecodedWeight decoded() const {
    const PackedShape& s = shape;
    DecodedWeight out(s.rows, s.cols);
    for (std::int64_t r = 0; r < s.rows; ++r) {
      for (std::int64_t c = 0; c < s.cols; ++c) {
        const std::int64_t unit = s.group == 0 ? 0 : c / s.group;
        const auto code = static_cast<int>(codes.get(r, c));
        float value = 0.0F;
        double part = 0.0;
        for (int t = 0; t < s.terms(); ++t) {
          const auto scale = static_cast<float>(scales.get(t * s.rows + r, unit));
          const double zero = s.zeros ? zeros.get(t * s.rows + r, unit) : implicit_zero(s);
          const int own = s.kind == PackedKind::binary2 ? code >> t & 1 : code;
          const bool coded = s.kind == PackedKind::codebook;
          const double entry = coded ? book.get(0, own) : 0.0;
          value += scale * static_cast<float>(coded ? entry : own - zero);
          part += static_cast<double>(scale) * (coded ? std::abs(entry) : own + zero);
        }
        const auto to =
            permutation.rows() == 0 ? c : static_cast<std::int64_t>(permutation.get(0, c));
        out.value[static_cast<std::size_t>(r * s.cols + to)] = value;
        out.part[static_cast<std::size_t>(r * s.cols + to)] = part;
      }
    }
    return out;
  }

  PackedShape shape;
  Operand codes, scales, zeros;
  Operand records, row_units, book, permutation;
};

// What the tolerance of a product with one row of a weight needs.
struct WeightRow {
  double norm = 0;     // 2-norm of what is added up
  double largest = 0;  // |w|
};

inline std::vector<WeightRow> weight_rows(const DecodedWeight& w) {
  std::vector<WeightRow> out(static_cast<std::size_t>(w.rows));
  for (std::size_t i = 0; i < w.value.size(); ++i) {
    WeightRow& row = out[i / static_cast<std::size_t>(w.cols)];
    row.norm += w.part[i] * w.part[i];
    row.largest = std::max(row.largest, static_cast<double>(std::abs(w.value[i])));
  }
  for (WeightRow& row : out) row.norm = std::sqrt(row.norm);
  return out;
}

// |a - b| of two evaluations of x w^T before they are stored: the order of the f32 sums; and, where
// one of them rounds weights (or the book) to `rounded`, that rounding: relative errors of at most
// u that behave as independent, so the sum is off by at most lambda * u * |x_i w_i|_2, lambda 4.
inline double product_tolerance(std::int64_t cols, double x_norm, const WeightRow& w, bool rounds,
                                DType rounded) {
  return sum_tolerance(cols, x_norm * w.norm) +
         (rounds ? 4.0 * roundoff(rounded) * x_norm * w.largest : 0.0);
}

}  // namespace engine::test
