// Weights with transforms on a device, against the reference decoding, within the planned memory.
#include "engine/model/install_transform.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "engine/model/install.h"
#include "tests/support/compare.h"
#include "tests/support/tiny_checkpoint.h"
#include "tests/support/transform_weights.h"

namespace engine::test {
namespace {

// The reference has the transforms in f64, ops have them in f32: an element is a sum of d values
// twice, each sum off by a few sqrt(d) u |row|, and rounded to the output's dtype once.
TEST(InstallTransform, EqualsTheReferenceWithinPlannedMemory) {
  for (const auto& [rows, cols] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{24, 48}, {112, 256}, {320, 96}}) {
    for (const auto& [name, w] : transformed_weights(rows, cols)) {
      SCOPED_TRACE(name);
      ASSERT_TRUE(needs_transform_install(w.weight));
      std::vector<float> expected(index(rows * cols));
      decode_linear(w.weight, host_view(expected.data(), rows, cols));
      double norm = 0;
      for (const float v : expected) norm = std::fmax(norm, std::fabs(static_cast<double>(v)));
      ASSERT_GT(norm, 0.0);
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Ledger ledger;
        const auto ops = make_cpu_ops(ledger, 2);
        Arena only = Arena::measuring(ops->kind());
        plan_install(w.weight, only);
        std::vector<float> found(index(rows * cols));
        const auto layout = [&](Arena& arena) {
          Loader loader(*ops, ledger, arena, small_config());
          const View out = arena.make(MemTag::weights, dtype, rows, cols);
          const std::int64_t before = arena.peak();
          install_linear(w.weight, "linear", loader, out, 2);
          EXPECT_EQ(arena.peak(), before + only.peak());
          if (!arena.is_measuring()) ops->convert(out, host_view(found.data(), rows, cols));
        };
        Arena plan = Arena::measuring(ops->kind());
        layout(plan);
        Arena arena(ops->memory(), ledger, plan.peak(), true);
        layout(arena);
        EXPECT_EQ(arena.peak(), plan.peak());
        const double d = static_cast<double>(std::max(rows, cols));
        const double error = 8 * std::sqrt(d) * roundoff(DType::f32) * norm;
        const Comparison c = compare_close(
            found, expected,
            {.absolute = error, .relative = dtype == DType::f32 ? 0 : roundoff(dtype)});
        EXPECT_TRUE(c) << c.message;
      }
    }
  }
}

TEST(InstallTransform, OrdinaryWeightsDoNotComeHere) {
  const std::vector<float> values = bell_matrix(16, 16, 1);
  EXPECT_FALSE(needs_transform_install(dense_linear(host_view(values.data(), 16, 16)).weight));
}

TEST(InstallTransform, DamagedPlanesAreErrors) {
  OwnedLinear w = quipsharp_weight(24, 48, true);
  Plane& signs = w.weight.planes[index(w.weight.left.signs_plane)];
  signs.data.cols -= 1;
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 1);
  Arena arena(ops->memory(), ledger, std::int64_t{64} << 20U);
  Loader loader(*ops, ledger, arena, small_config());
  std::vector<float> out(24 * 48);
  EXPECT_THROW(install_linear(w.weight, "linear", loader, host_view(out.data(), 24, 48)),
               FormatError);
}

}  // namespace
}  // namespace engine::test
