// Models quantized by QuIP and QuIP# run packed as they run decoded.
#include <gtest/gtest.h>

#include <cmath>

#include "engine/model/packed_install.h"
#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

struct RotatedCase {
  std::string method, options;
};

class RotatedModel : public ::testing::TestWithParam<RotatedCase> {
 protected:
  RotatedModel() {
    TinyCheckpoint options;
    options.tokenizer = data / "tokenizer.json";
    write_tiny_checkpoint(dir_.path() / "m", options);
    source_ = open_checkpoint(dir_.path() / "m");
    tokens_ = {synthetic_tokens(4 * 64, options.config.vocab, 3), 4, 64};
    const std::filesystem::path file = dir_.path() / "a.qw";
    run_quantize(
        *source_,
        {.method = GetParam().method, .options = GetParam().options, .calibration = tokens_}, file);
    packed_ = open_packed(file);
  }
  TempDir dir_;
  std::unique_ptr<WeightSource> source_, packed_;
  TokenWindows tokens_;
};

INSTANTIATE_TEST_SUITE_P(
    Rotated, RotatedModel,
    ::testing::Values(RotatedCase{"quip", "--bits 2"},
                      RotatedCase{"quip", "--bits 3 --transform kronecker --diagonal-dtype f32"},
                      RotatedCase{"quip", "--bits 4 --transform plain-butterfly --no-rescale"},
                      RotatedCase{"quipsharp", "--bits 2 --tune-iters 0"},
                      RotatedCase{"quipsharp", "--bits 3 --tune-iters 0"},
                      RotatedCase{"quipsharp", "--bits 4 --tune-iters 0"}),
    [](const auto& info) {
      return info.param.method + "_" + info.param.options.substr(7, 1) + "_bits";
    });

// The terms read back from the device are what the reference decodes, and the plan is exact.
TEST_P(RotatedModel, LinearsAreVerifiedAtLoad) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  Arena plan = Arena::measuring(ops->kind());
  std::int64_t weights = 0;
  const auto load = [&](Arena& arena) {
    Loader loader(*ops, ledger, arena, packed_->config());
    loader.verify = true;
    const BlockWeights w = make_block_weights(arena, *packed_, 1, DType::f32);
    weights = 0;
    for (const Site s : all_sites) {
      EXPECT_TRUE(w[s].packed.shape.rotated());
      EXPECT_GT(w[s].packed.rotation.bytes(), 0);
      weights += w[s].packed.bytes();
    }
    load_block(*packed_, 1, loader, w);
  };
  load(plan);
  const std::int64_t planned = weights;
  Arena arena(ops->memory(), ledger, plan.peak(), true);
  load(arena);
  EXPECT_EQ(arena.peak(), plan.peak());
  EXPECT_EQ(weights, planned);
}

// Hadamard: the same weights in another order of f32 sums, which moves a logit by about 1e-5 either
// way and the mean over 256 tokens by a tenth of that. Butterflies: rotations in f16, each element
// off by 2^-12 of 1 at most, and four stages to a linear: its outputs move by some 2^-11 of their
// size either way, the mean over the tokens by a sixteenth, 3e-5; up to 5e-5 was seen.
TEST_P(RotatedModel, PerplexityAndTokensArePackedWhatTheyAreDecoded) {
  const bool exact = GetParam().method == "quipsharp";
  const double decoded = perplexity_of(*packed_, tokens_);
  const double found = perplexity_of(*packed_, tokens_, DType::f32, Exec::packed);
  EXPECT_TRUE(std::isfinite(decoded));
  EXPECT_LE(std::abs(found - decoded), (exact ? 1e-6 : 2e-4) * decoded) << found << " " << decoded;
  const std::vector<std::int32_t> tokens = tokens_of(*packed_, Exec::packed);
  EXPECT_EQ(tokens.size(), 9U);
  // The first token: later ones may part where two logits are close.
  const std::vector<std::int32_t> expected = tokens_of(*packed_, Exec::decoded);
  ASSERT_EQ(expected.size(), tokens.size());
  EXPECT_EQ(tokens.front(), expected.front());
  if (exact) {
    EXPECT_EQ(tokens, expected);
  }
}

}  // namespace
}  // namespace engine::test
