#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/weight/grid.h"
#include "tests/support/quant_fixtures.h"

namespace engine {
namespace {

using test::bell_matrix;
using test::index;

std::vector<GridSpec> some_specs() {
  std::vector<GridSpec> specs;
  for (const std::int64_t group : {0, 32, 48}) {
    for (const GridRule rule :
         {GridRule::gptq, GridRule::awq, GridRule::omniquant, GridRule::paper}) {
      GridSpec spec;
      spec.bits = group == 48 ? 3 : 4;
      spec.group = group;
      spec.rule = rule;
      specs.push_back(spec);
      spec.arithmetic = DType::f16;
      spec.scale_dtype = DType::f16;
      specs.push_back(spec);
    }
    GridSpec spec;
    spec.bits = 2;
    spec.group = group;
    spec.symmetric = true;
    specs.push_back(spec);
    spec.mse = true;
    specs.push_back(spec);
  }
  return specs;
}

// Ops against the pure functions, unit by unit; 100 columns end in a short unit.
TEST(CpuQuant, GridsCodesAndWeightsFollowThePureFunctions) {
  constexpr std::int64_t rows = 19, cols = 100;
  const std::vector<float> w = bell_matrix(rows, cols, 1, 0.05F);
  CpuOps ops(2);
  for (const GridSpec& spec : some_specs()) {
    const std::int64_t groups = spec.groups(cols);
    std::vector<float> scales(index(rows * groups)), out(w.size());
    std::vector<std::int32_t> zeros(scales.size());
    std::vector<std::uint8_t> codes(w.size());
    const View s = host_view(scales.data(), rows, groups),
               z = host_view(zeros.data(), rows, groups);
    const View c = host_view(codes.data(), rows, cols), wv = host_view(w.data(), rows, cols);
    ops.find_grid(wv, spec, s, z);
    ops.quantize_codes(wv, spec, s, z, {}, c);
    ops.dequantize_codes(c, spec, s, z, {}, {}, host_view(out.data(), rows, cols));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < cols; ++j) {
        const std::int64_t u = j / spec.unit(cols), first = u * spec.unit(cols);
        const std::int64_t n = std::min(spec.unit(cols), cols - first);
        const UnitGrid grid = find_unit_grid({w.data() + r * cols + first, index(n)}, spec);
        const auto at = index(r * cols + j);
        ASSERT_EQ(scales[index(r * groups + u)], grid.scale);
        ASSERT_EQ(zeros[index(r * groups + u)], grid.zero);
        ASSERT_EQ(codes[at], quantize_value(w[at], grid, spec));
        ASSERT_EQ(out[at], dequantize_value(codes[at], grid, spec));
      }
    }
  }
}

template <class T>
void expect_narrow_as_wide() {
  constexpr std::int64_t rows = 6, cols = 64;
  const std::vector<float> exact = bell_matrix(rows, cols, 2);
  std::vector<T> narrow(exact.size());
  std::vector<float> wide(exact.size());
  for (std::size_t i = 0; i < exact.size(); ++i) {
    store(narrow[i], exact[i]);
    wide[i] = to_float(narrow[i]);
  }
  CpuOps ops(2);
  const GridSpec spec{.bits = 4, .group = 32};
  std::vector<float> sa(rows * 2), sb(rows * 2), back(exact.size());
  std::vector<std::int32_t> za(rows * 2), zb(rows * 2);
  std::vector<std::uint8_t> ca(exact.size()), cb(exact.size());
  const auto solve = [&](View w, std::vector<float>& s, std::vector<std::int32_t>& z,
                         std::vector<std::uint8_t>& c) {
    const View sv = host_view(s.data(), rows, 2), zv = host_view(z.data(), rows, 2);
    ops.find_grid(w, spec, sv, zv);
    ops.quantize_codes(w, spec, sv, zv, {}, host_view(c.data(), rows, cols));
  };
  solve(host_view(narrow.data(), rows, cols), sa, za, ca);
  solve(host_view(wide.data(), rows, cols), sb, zb, cb);
  EXPECT_EQ(sa, sb);
  EXPECT_EQ(za, zb);
  EXPECT_EQ(ca, cb);
  // The result is rounded once, to the output's dtype.
  const View sv = host_view(sa.data(), rows, 2), zv = host_view(za.data(), rows, 2);
  const View cv = host_view(ca.data(), rows, cols);
  ops.dequantize_codes(cv, spec, sv, zv, {}, {}, host_view(back.data(), rows, cols));
  ops.dequantize_codes(cv, spec, sv, zv, {}, {}, host_view(narrow.data(), rows, cols));
  for (std::size_t i = 0; i < back.size(); ++i) {
    ASSERT_EQ(to_float(narrow[i]), round_to(dtype_of<T>(), back[i]));
  }
}

TEST(CpuQuant, SixteenBitWeightsArePromoted) {
  expect_narrow_as_wide<f16>();
  expect_narrow_as_wide<bf16>();
}

TEST(CpuQuant, ColumnGroupsAndPermutation) {
  constexpr std::int64_t rows = 5, cols = 8;
  const GridSpec spec{.bits = 4, .group = 4};
  const std::vector<float> w = bell_matrix(rows, cols, 3);
  std::vector<std::int32_t> perm{6, 1, 4, 0, 7, 3, 2, 5}, unit;
  for (const std::int32_t j : perm) unit.push_back(j / 4);
  std::vector<float> permuted(w.size()), scales(rows * 2), plain(w.size()), restored(w.size());
  std::vector<std::int32_t> zeros(rows * 2);
  std::vector<std::uint8_t> codes(w.size()), permuted_codes(w.size());
  CpuOps ops(2);
  const View wv = host_view(w.data(), rows, cols), s = host_view(scales.data(), rows, 2);
  const View z = host_view(zeros.data(), rows, 2), c = host_view(codes.data(), rows, cols);
  const View pc = host_view(permuted_codes.data(), rows, cols), p = host_view(perm.data(), 1, cols);
  const View pw = host_view(permuted.data(), rows, cols), g = host_view(unit.data(), 1, cols);
  ops.find_grid(wv, spec, s, z);
  ops.quantize_codes(wv, spec, s, z, {}, c);
  ops.dequantize_codes(c, spec, s, z, {}, {}, host_view(plain.data(), rows, cols));
  // In another column order with the units named per column, then put back.
  ops.gather_columns(wv, p, {}, pw);
  ops.quantize_codes(pw, spec, s, z, g, pc);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < cols; ++j) {
      EXPECT_EQ(permuted[index(r * cols + j)], w[index(r * cols + perm[index(j)])]);
      EXPECT_EQ(permuted_codes[index(r * cols + j)], codes[index(r * cols + perm[index(j)])]);
    }
  }
  ops.dequantize_codes(pc, spec, s, z, g, p, host_view(restored.data(), rows, cols));
  EXPECT_EQ(restored, plain);

  perm[0] = 1;  // twice
  EXPECT_THROW(ops.dequantize_codes(pc, spec, s, z, g, p, host_view(restored.data(), rows, cols)),
               Error);
  unit[2] = 2;  // there are two units
  EXPECT_THROW(ops.quantize_codes(pw, spec, s, z, g, pc), Error);
}

TEST(CpuQuant, GatherZeroesDeadColumnsOfTheResult) {
  const std::vector<float> w{1, 2, 3, 4, 5, 6};
  std::vector<std::int32_t> perm{2, 0, 1};
  std::vector<std::uint8_t> dead{0, 1, 0};
  std::vector<float> out(6);
  CpuOps ops(2);
  ops.gather_columns(host_view(w.data(), 2, 3), host_view(perm.data(), 1, 3),
                     host_view(dead.data(), 1, 3), host_view(out.data(), 2, 3));
  EXPECT_EQ(out, (std::vector<float>{3, 0, 2, 6, 0, 5}));
  const std::vector<bf16> narrow{to_bf16(1.5F), to_bf16(-2.0F)};
  std::vector<float> wide(2);
  ops.gather_columns(host_view(narrow.data(), 1, 2), {}, {}, host_view(wide.data(), 1, 2));
  EXPECT_EQ(wide, (std::vector<float>{1.5F, -2.0F}));
}

TEST(CpuQuant, PackingIsLeastSignificantBitFirst) {
  CpuOps ops(2);
  const std::vector<std::uint8_t> codes{1, 2, 7, 0, 5, 4, 3, 6};  // two rows of four 3-bit codes
  std::vector<std::uint8_t> packed(4), back(8);
  ops.pack_codes(host_view(codes.data(), 2, 4), 3, host_view(packed.data(), 2, 2));
  // Row 0: 1 | 2 << 3 | 7 << 6 | 0 << 9 = 0x1D1; row 1: 5 | 4 << 3 | 3 << 6 | 6 << 9 = 0xCE5.
  EXPECT_EQ(packed, (std::vector<std::uint8_t>{0xD1, 0x01, 0xE5, 0x0C}));
  ops.unpack_codes(host_view(packed.data(), 2, 2), 3, host_view(back.data(), 2, 4));
  EXPECT_EQ(back, codes);
}

TEST(CpuQuant, PackingRoundTripsEveryWidth) {
  CpuOps ops(2);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const std::int64_t cols : {1, 7, 8, 9, 64, 131}) {
      constexpr std::int64_t rows = 11;
      std::vector<std::uint8_t> codes(index(rows * cols)), back(codes.size());
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint8_t>(philox(4, 0, i).v[0] & ((1U << bits) - 1U));
      }
      const std::int64_t bytes = (cols * bits + 7) / 8;
      // Wider strides than rows: the gaps stay as they were.
      std::vector<std::uint8_t> packed(index(rows * (bytes + 3)), 0xAB);
      View p = host_view(packed.data(), rows, bytes + 3).col_range(0, bytes);
      ops.pack_codes(host_view(codes.data(), rows, cols), bits, p);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t gap = bytes; gap < bytes + 3; ++gap) {
          ASSERT_EQ(packed[index(r * (bytes + 3) + gap)], 0xAB);
        }
        for (std::int64_t k = 0; k < cols * bits; ++k) {  // bit k of the row, by definition
          const int bit = packed[index(r * (bytes + 3) + k / 8)] >> (k % 8) & 1;
          ASSERT_EQ(bit, codes[index(r * cols + k / bits)] >> (k % bits) & 1);
        }
      }
      ops.unpack_codes(p, bits, host_view(back.data(), rows, cols));
      ASSERT_EQ(back, codes) << bits << " bits, " << cols << " columns";
    }
  }
  const std::vector<std::uint8_t> large{4};
  std::vector<std::uint8_t> packed(1);
  EXPECT_THROW(ops.pack_codes(host_view(large.data(), 1, 1), 2, host_view(packed.data(), 1, 1)),
               Error);
}

TEST(CpuQuant, RefusesWrongShapes) {
  CpuOps ops(2);
  std::vector<float> w(64), scales(4);
  std::vector<std::int32_t> zeros(4);
  const GridSpec spec{.bits = 4, .group = 16};
  EXPECT_THROW(ops.find_grid(host_view(w.data(), 2, 32), spec, host_view(scales.data(), 2, 1),
                             host_view(zeros.data(), 2, 2)),
               Error);
  EXPECT_THROW(ops.find_grid(host_view(w.data(), 2, 32), spec, host_view(scales.data(), 2, 2),
                             host_view(zeros.data(), 1, 4)),
               Error);
}

}  // namespace
}  // namespace engine
