// Models quantized to schemes with a kernel layout of their own run packed as they run decoded.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "engine/model/packed_install.h"
#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

class SchemeModel : public ::testing::Test {
 protected:
  SchemeModel() {
    TinyCheckpoint options;
    options.tokenizer = data / "tokenizer.json";
    write_tiny_checkpoint(dir_.path() / "m", options);
    source_ = open_checkpoint(dir_.path() / "m");
    tokens_ = {synthetic_tokens(8 * 64, options.config.vocab, 3), 8, 64};
    // Widths 1, 2, 3, ... in turn for the groups of every linear.
    Json table;
    for (std::int64_t layer = 0; layer < options.config.layers; ++layer) {
      for (const Site s : all_sites) {
        std::string digits;
        for (std::int64_t g = 0; g < site_shape(options.config, s).cols / 128; ++g) {
          digits += static_cast<char>('1' + (g + layer) % 4);
        }
        table[linear_name(layer, s)] = digits;
      }
    }
    std::ofstream(dir_.path() / "table.json") << table.dump();
  }
  std::unique_ptr<WeightSource> quantized(const std::string& method, const std::string& options) {
    const std::filesystem::path file = dir_.path() / "a.qw";
    run_quantize(*source_, {.method = method, .options = options, .calibration = tokens_}, file);
    return open_packed(file);
  }
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> schemes() const {
    return {{"slimllm", "--bits 2 --bit-table " + (dir_.path() / "table.json").string()},
            {"slimllm",
             "--bits 2 --scale-dtype f16 --bit-table " + (dir_.path() / "table.json").string()},
            {"pbllm", "--bits 1.7 --group 128"},
            {"pbllm", "--bits 2 --scale-dtype f16"},
            {"billm", ""},
            {"billm", "--scale-dtype f16 --no-mean"}};
  }

  TempDir dir_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

// Every linear read back from the device is what the reference decodes, and the plan is exact.
TEST_F(SchemeModel, LinearsAreVerifiedAtLoad) {
  for (const auto& [method, options] : schemes()) {
    SCOPED_TRACE(method + " " + options);
    const auto packed = quantized(method, options);
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 2);
    Arena plan = Arena::measuring(ops->kind());
    const auto load = [&](Arena& arena) {
      Loader loader(*ops, ledger, arena, packed->config());
      loader.verify = true;
      const BlockWeights w = make_block_weights(arena, *packed, 1, DType::f32);
      std::size_t schemes = 0;
      for (const Site s : all_sites) {
        EXPECT_TRUE(w[s].is_packed());
        schemes += is_record_kind(w[s].packed.shape.kind) ? 0 : 1;
      }
      // Linears whose groups all have one width of two or more bits are affine records.
      if (method == "slimllm") {
        EXPECT_GT(schemes, 0U);
      } else {
        EXPECT_EQ(schemes, all_sites.size());
      }
      load_block(*packed, 1, loader, w);
    };
    load(plan);
    Arena arena(ops->memory(), ledger, plan.peak(), true);
    load(arena);
    EXPECT_EQ(arena.peak(), plan.peak());
  }
}

// The same weights in another order of sums: a logit moves by about 1e-5 either way, the mean over
// the tokens by a tenth of that.
TEST_F(SchemeModel, PerplexityAndTokensArePackedWhatTheyAreDecoded) {
  for (const auto& [method, options] : schemes()) {
    SCOPED_TRACE(method + " " + options);
    const auto packed = quantized(method, options);
    const double decoded = perplexity_of(*packed, tokens_);
    const double found = perplexity_of(*packed, tokens_, DType::f32, Exec::packed);
    EXPECT_TRUE(std::isfinite(decoded));
    EXPECT_LE(std::abs(found - decoded), 1e-6 * decoded) << found << " " << decoded;
    EXPECT_EQ(tokens_of(*packed, Exec::packed), tokens_of(*packed, Exec::decoded));
  }
}

}  // namespace
}  // namespace engine::test
