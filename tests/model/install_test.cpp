// Weights without a decoder on the device: decoded on the host in slices, within the planned
// memory (engine/model/install.h).
#include "engine/model/install.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "engine/model/install_mixed.h"
#include "engine/model/install_pbllm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/trace_ops.h"
#include "engine/weight/codec.h"
#include "engine/weight/pattern.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

// Signs off a bitmap and 5-bit codes on it, both compact; a permutation if `permuted`, else means
// and scales in groups of 32 and zeros; with `far_zeros` those are the ends of i32.
OwnedLinear two_terms(std::int64_t rows, std::int64_t cols, bool permuted = true,
                      bool far_zeros = false) {
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
  const auto scales = [&](std::uint64_t seed, std::int64_t groups = 1) {
    const std::vector<float> values = bell_matrix(rows, groups, seed);
    return w.add(scales_plane(host_view(values.data(), rows, groups), DType::f32));
  };
  const int bitmap = w.add(pack_codes_plane(host_view(bits.data(), rows, cols), 1));
  Term sign;
  sign.kind = TermKind::sign;
  sign.bits = 1;
  sign.support = {.bitmap = Select::not_in, .bitmap_plane = bitmap, .compact = true};
  sign.codes_plane = plane(low, 1);
  sign.grid.scale_plane = scales(5, permuted ? 1 : cols / 32);
  if (!permuted) {
    sign.grid.kind = GridKind::group;
    sign.grid.group = 32;
    sign.mu_plane = scales(7, cols / 32);
  }
  Term affine;
  affine.bits = 5;
  affine.support = {.bitmap = Select::in, .bitmap_plane = bitmap, .compact = true};
  affine.codes_plane = plane(high, 5);
  affine.grid.scale_plane = scales(6);
  if (!permuted) {
    std::vector<std::int32_t> zeros(index(rows));
    for (std::size_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<std::int32_t>(i % 32);
    if (far_zeros) {
      using Ends = std::numeric_limits<std::int32_t>;
      for (std::size_t i = 0; i < zeros.size(); ++i)
        zeros[i] = i % 2 == 0 ? Ends::min() : Ends::max();
    }
    const View values = host_view(zeros.data(), rows, 1);
    affine.grid.zero_plane =
        w.add(far_zeros ? zeros_plane(values, DType::i32) : pack_zeros(values, 5));
  }
  w.weight.terms = {sign, affine};
  if (!permuted) return w;
  std::vector<std::int32_t> order(index(cols));
  for (std::size_t j = 0; j < order.size(); ++j) {
    order[j] = static_cast<std::int32_t>((j + 7) % order.size());
  }
  w.weight.permutation_plane = w.add(indices_plane(order, "permutation"));
  return w;
}

// The installed weight is what the reference codec reads, bit for bit, in the planned memory: with
// or without scratch on the device.
void installs_what_is_decoded(const LinearWeight& w, std::initializer_list<DType> dtypes,
                              bool scratch) {
  for (const DType dtype : dtypes) {
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 2);
    std::vector<std::byte> expected(index(w.rows * w.cols) * dtype_bytes(dtype));
    decode_linear(w, make_view(expected.data(), dtype, DeviceKind::cpu, w.rows, w.cols));
    const auto layout = [&](Arena& arena) {
      Loader loader(*ops, ledger, arena, small_config());
      const View out = arena.make(MemTag::weights, dtype, w.rows, w.cols);
      const std::int64_t before = arena.peak();
      install_linear(w, "linear", loader, out, 3);
      EXPECT_EQ(arena.peak() > before, scratch);
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

TEST(Install, AnyWeightInSlicesWithoutDeviceScratch) {
  // 18.9 MB in f32: more than one slice.
  const std::int64_t rows = 2049, cols = 2304;
  const OwnedLinear w = two_terms(rows, cols);
  ASSERT_FALSE(match_affine(w.weight) || match_dense(w.weight));
  installs_what_is_decoded(w.weight, {DType::f32, DType::bf16}, false);
}

// PB-LLM's two terms take memory on the device, as planned, and give what the reference codec
// reads.
void signs_and_salient_codes(bool far_zeros) {
  const std::int64_t rows = 131, cols = 96;
  const OwnedLinear w = two_terms(rows, cols, false, far_zeros);
  ASSERT_TRUE(match_pbllm(w.weight));
  ASSERT_FALSE(match_pbllm(two_terms(rows, cols).weight)) << "no permutations";
  installs_what_is_decoded(w.weight, {DType::f32, DType::f16, DType::bf16}, true);
}

TEST(Install, SignsAndSalientCodesOnTheDevice) { signs_and_salient_codes(false); }

TEST(Install, SalientCodesWithZerosAtTheEndsOfInt32) { signs_and_salient_codes(true); }

// Five groups of 32 columns: the first and third of 2 bits, the second and last of 3, the fourth of
// signs. With `whole` false one column of the second group has changed places with one of the
// first. Without `mu` the signs have scales of 0.
OwnedLinear mixed_widths(std::int64_t rows, bool whole, bool mu) {
  constexpr std::int64_t size = 32, groups = 5, cols = groups * size;
  OwnedLinear w;
  w.weight.rows = rows;
  w.weight.cols = cols;
  const auto floats = [&](std::uint64_t seed, std::int64_t n, const char* role) {
    const std::vector<float> values = bell_matrix(rows, n, seed);
    return w.add(floats_plane(host_view(values.data(), rows, n), DType::f32, role));
  };
  std::vector<std::int32_t> zeros(index(rows * groups));
  for (std::size_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<std::int32_t>(i * i % 8);
  const int scales = floats(5, groups, "scales");
  const int zero_plane = w.add(pack_zeros(host_view(zeros.data(), rows, groups), 3));
  for (const auto& [bits, chosen] : {std::pair(2, std::vector<std::int64_t>{0, 2}),
                                     std::pair(3, std::vector<std::int64_t>{1, 4}),
                                     std::pair(1, std::vector<std::int64_t>{3})}) {
    std::vector<std::int32_t> columns;
    for (const std::int64_t g : chosen) {
      for (std::int64_t j = g * size; j < (g + 1) * size; ++j) {
        const bool moved = !whole && (j == size - 1 || j == size);
        columns.push_back(static_cast<std::int32_t>(!moved ? j : j == size ? size - 1 : size));
      }
    }
    const auto n = static_cast<std::int64_t>(columns.size());
    std::vector<std::uint8_t> codes(index(rows * n));
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<std::uint8_t>(uniform_value(3, index(bits), i) *
                                           static_cast<float>(1 << bits));
    }
    Term term;
    term.kind = bits == 1 ? TermKind::sign : TermKind::affine;
    term.bits = bits;
    term.grid.kind = GridKind::group;
    term.grid.group = size;
    term.support.columns = Select::in;
    term.support.columns_plane = w.add(indices_plane(columns, "columns"));
    term.support.compact = true;
    term.codes_plane = w.add(pack_codes_plane(host_view(codes.data(), rows, n), bits));
    const std::vector<float> none(index(rows), 0.0F);
    term.grid.scale_plane =
        bits > 1 ? scales
        : mu     ? floats(6, 1, "scales1")
                 : w.add(floats_plane(host_view(none.data(), rows, 1), DType::f32, "scales1"));
    if (bits == 1) {
      const std::vector<std::int32_t> ranks(index(cols), 0);
      term.grid.column_group_plane = w.add(indices_plane(ranks, "column_groups"));
      if (mu) term.mu_plane = floats(7, 1, "mu");
    } else {
      term.grid.zero_plane = zero_plane;
    }
    w.weight.terms.push_back(term);
  }
  return w;
}

// On the device when the groups are whole, otherwise on the host; both give what the reference
// codec reads.
TEST(Install, GroupsOfMixedWidths) {
  const std::int64_t rows = 67, cols = 160;
  for (const auto& [whole, mu] :
       {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
    const OwnedLinear w = mixed_widths(rows, whole, mu);
    ASSERT_TRUE(is_mixed(w.weight));
    validate(w.weight, "memory", "linear");
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      Ledger ledger;
      CpuOps cpu(2);
      TraceOps ops(cpu);
      std::vector<std::byte> expected(index(rows * cols) * dtype_bytes(dtype));
      const View reference = make_view(expected.data(), dtype, DeviceKind::cpu, rows, cols);
      decode_linear(w.weight, reference);
      const auto layout = [&](Arena& arena) {
        Loader loader(ops, ledger, arena, small_config());
        const View out = arena.make(MemTag::weights, dtype, rows, cols);
        install_linear(w.weight, "linear", loader, out, 2);
        if (arena.is_measuring()) return;
        EXPECT_EQ(std::memcmp(out.data, expected.data(), expected.size()), 0) << dtype_name(dtype);
      };
      Arena plan = Arena::measuring(ops.kind());
      layout(plan);
      Arena arena(ops.memory(), ledger, plan.peak(), true);
      layout(arena);
      EXPECT_EQ(ops.stats().at("slim_decode").calls, whole ? 1 : 0);
    }
  }
}

void damaged_planes(bool permuted) {
  OwnedLinear w = two_terms(8, 64, permuted);
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

TEST(Install, DamagedPlanesAreErrors) {
  damaged_planes(true);
  damaged_planes(false);
}

}  // namespace
}  // namespace engine::test
