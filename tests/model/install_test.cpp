// Weights without a decoder on the device: decoded on the host in slices, within the planned
// memory (engine/model/install.h).
#include "engine/model/install.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

// Signs off a bitmap and 5-bit codes on it, both compact; a permutation.
OwnedLinear two_terms(std::int64_t rows, std::int64_t cols) {
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  std::vector<std::uint8_t> bits(index(rows * cols)), low, high;
  for (std::size_t i = 0; i < bits.size(); ++i) {
    const double u = uniform_value(3, 0, i);
    bits[i] = u < 0.1 ? 1 : 0;
    if (bits[i] != 0) {
      high.push_back(static_cast<std::uint8_t>(u * 320));
    } else {
      low.push_back(u < 0.5 ? 1 : 0);
    }
  }
  const auto plane = [&](const std::vector<std::uint8_t>& codes, int width) {
    return w.add(pack_codes_plane(
        host_view(codes.data(), 1, static_cast<std::int64_t>(codes.size())), width));
  };
  const auto scales = [&](std::uint64_t seed) {
    const std::vector<float> values = bell_matrix(rows, 1, seed);
    return w.add(scales_plane(host_view(values.data(), rows, 1), DType::f32));
  };
  const int bitmap = w.add(pack_codes_plane(host_view(bits.data(), rows, cols), 1));
  Term sign;
  sign.kind = TermKind::sign;
  sign.bits = 1;
  sign.support = {.bitmap = Select::not_in, .bitmap_plane = bitmap, .compact = true};
  sign.codes_plane = plane(low, 1);
  sign.grid.scale_plane = scales(5);
  Term affine;
  affine.bits = 5;
  affine.support = {.bitmap = Select::in, .bitmap_plane = bitmap, .compact = true};
  affine.codes_plane = plane(high, 5);
  affine.grid.scale_plane = scales(6);
  w.weight.terms = {sign, affine};
  std::vector<std::int32_t> order(index(cols));
  for (std::size_t j = 0; j < order.size(); ++j) {
    order[j] = static_cast<std::int32_t>((j + 7) % order.size());
  }
  w.weight.permutation_plane = w.add(indices_plane(order, "permutation"));
  return w;
}

TEST(Install, AnyWeightInSlicesWithoutDeviceScratch) {
  // 18.9 MB in f32: more than one slice.
  const std::int64_t rows = 2049, cols = 2304;
  const OwnedLinear w = two_terms(rows, cols);
  ASSERT_FALSE(match_affine(w.weight) || match_dense(w.weight));
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 2);
    std::vector<std::byte> expected(index(rows * cols) * dtype_bytes(dtype));
    const View reference = make_view(expected.data(), dtype, DeviceKind::cpu, rows, cols);
    decode_linear(w.weight, reference);
    const auto layout = [&](Arena& arena) {
      Loader loader(*ops, ledger, arena, small_config());
      const View out = arena.make(MemTag::weights, dtype, rows, cols);
      const std::int64_t before = arena.peak();
      install_linear(w.weight, "linear", loader, out, 3);
      EXPECT_EQ(arena.peak(), before);
      if (!arena.is_measuring()) {
        EXPECT_EQ(std::memcmp(out.data, expected.data(), expected.size()), 0) << dtype_name(dtype);
      }
    };
    Arena plan = Arena::measuring(ops->kind());
    layout(plan);
    Arena arena(ops->memory(), ledger, plan.peak(), true);
    layout(arena);
    EXPECT_EQ(arena.peak(), plan.peak());
  }
}

TEST(Install, DamagedPlanesAreErrors) {
  OwnedLinear w = two_terms(8, 64);
  Plane& codes = w.weight.planes[index(w.weight.terms[0].codes_plane)];
  codes.cols -= 9;  // fewer codes than the bitmap asks for
  codes.data.cols = codes.raw_bytes();
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 1);
  Arena plan = Arena::measuring(ops->kind());
  { const Loader loader(*ops, ledger, plan, small_config()); }
  Arena arena(ops->memory(), ledger, plan.peak());
  Loader loader(*ops, ledger, arena, small_config());
  std::vector<float> out(8 * 64);
  EXPECT_THROW(install_linear(w.weight, "linear", loader, host_view(out.data(), 8, 64)),
               FormatError);
}

}  // namespace
}  // namespace engine::test
