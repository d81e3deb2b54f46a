// SliM-LLM on whole models, through the written file (docs/methods/slimllm.md). The level of the
// ops is slimllm_ops_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "formats/bits.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

using testing::TempDir;

// Groups of 32 give every linear of the embedded model enough of them to search.

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

class SlimLlmTest : public ::testing::Test {
 protected:
  SlimLlmTest()
      : source_(open_checkpoint(data)),
        calibration_(token_rows(data / "heldout.safetensors", 32, 4, 256)) {}
  QuantOutcome quantize(const std::string& options, const std::string& name,
                        std::int64_t blocks = 1, std::int64_t batch = 2) {
    return run_quantize(*source_,
                        {.method = "slimllm",
                         .options = options,
                         .calibration = calibration_,
                         .batch = batch,
                         .blocks = blocks,
                         .poison = true},
                        file(name));
  }
  [[nodiscard]] std::filesystem::path file(const std::string& name) const {
    return dir_.path() / (name + ".qw");
  }
  // What the file says about the linears of the first `blocks` blocks.
  [[nodiscard]] std::vector<Json> entries(const std::string& name, std::int64_t blocks = 1) const {
    const PackedFileView view(file(name));
    std::vector<Json> out;
    for (std::int64_t layer = 0; layer < blocks; ++layer) {
      for (const Site site : all_sites) out.push_back(view.entry(linear_name(layer, site)));
    }
    return out;
  }
  TempDir dir_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows calibration_;
};

std::int64_t count_of(const std::string& text, int digit) {
  return std::count(text.begin(), text.end(), static_cast<char>('0' + digit));
}

TEST_F(SlimLlmTest, AsManyNarrowGroupsAsWideOnes) {
  for (const int bits : {2, 3, 4}) {
    const std::int64_t blocks = bits == 2 ? 2 : 1;
    const QuantOutcome o = quantize("--bits " + std::to_string(bits) + " --group 32", "a", blocks);
    EXPECT_EQ(o.report["plan"]["arena_peak_bytes"].get<std::int64_t>(), o.plan.device_bytes);
    for (const Json& row : entries("a", blocks)) {
      SCOPED_TRACE(row.dump());
      const auto widths = row["group_bits"].get<std::string>();
      const std::int64_t low = count_of(widths, bits - 1), high = count_of(widths, bits + 1);
      EXPECT_EQ(low, high);
      EXPECT_GE(low, 1);
      EXPECT_EQ(low + high + count_of(widths, bits), static_cast<std::int64_t>(widths.size()));
      const auto losses = row["search_loss"].get<std::vector<double>>();
      ASSERT_EQ(losses.size(), widths.size() / 2 - 1);
      const auto best = std::min_element(losses.begin(), losses.end());
      EXPECT_EQ(low, best - losses.begin() + 1);
      for (const double l : losses) EXPECT_GT(l, 0.0);
      EXPECT_NEAR(row["bits_nominal"].get<double>(), bits, 1e-12);
    }
    const PackedFileView view(file("a"));
    for (const Site site : all_sites) {
      // What the file holds is near the original: the reference codec reads it.
      const std::vector<float> w = load_weight(*source_, 0, site);
      const std::vector<float> q = view.decode(linear_name(0, site));
      EXPECT_LT(relative_square_error(q, w), bits == 2 ? 0.5 : 0.2) << site_name(site);
    }
  }
}

TEST_F(SlimLlmTest, BatchSizeChangesNothing) {
  quantize("--bits 3 --group 32", "one", 1, 1);
  quantize("--bits 3 --group 32", "three", 1, 3);
  const std::vector<Json> one = entries("one"), three = entries("three");
  for (std::size_t i = 0; i < 7; ++i) {
    const auto a = one[i]["search_loss"].get<std::vector<double>>();
    const auto b = three[i]["search_loss"].get<std::vector<double>>();
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t k = 0; k < a.size(); ++k) EXPECT_TRUE(close(a[k], b[k], 1e-4));
  }
}

TEST_F(SlimLlmTest, FewGroupsKeepOneWidthAndUniformIsGptq) {
  // Groups of 128: two of them in most linears, six in the last.
  quantize("--bits 3", "a");
  for (const Json& row : entries("a")) {
    const auto widths = row["group_bits"].get<std::string>();
    if (widths.size() < 4) {
      EXPECT_EQ(widths, std::string(widths.size(), '3'));
      EXPECT_FALSE(row.contains("search_loss"));
    } else {
      EXPECT_NE(widths, std::string(widths.size(), '3'));
    }
  }
  quantize("--bits 3 --allocation uniform --no-scale-search", "slim");
  run_quantize(*source_,
               {.method = "gptq",
                .options = "--bits 3",
                .calibration = calibration_,
                .batch = 2,
                .blocks = 1},
               file("gptq"));
  const PackedFileView slim(file("slim")), gptq(file("gptq"));
  for (const Site site : all_sites) {
    const std::string name = linear_name(0, site);
    const std::vector<float> a = slim.decode(name), b = gptq.decode(name);
    EXPECT_LE(differing(a, b), 0.002) << name;  // the damping is the same up to its last bits
  }
}

TEST_F(SlimLlmTest, ATableReplacesTheSearch) {
  quantize("--bits 2 --group 32", "searched");
  const std::vector<Json> searched = entries("searched");
  Json table = Json::object();
  for (std::int64_t layer = 0; layer < source_->config().layers; ++layer) {
    for (std::size_t s = 0; s < 7; ++s) {
      table[linear_name(layer, all_sites[s])] = searched[s]["group_bits"];
    }
  }
  const std::filesystem::path path = dir_.path() / "table.json";
  const auto write = [&] { std::ofstream(path) << table.dump(); };
  write();
  const std::string options = "--bits 2 --group 32 --bit-table " + path.string();
  quantize(options, "tabled");
  const std::vector<Json> tabled = entries("tabled");
  for (std::size_t s = 0; s < 7; ++s) {
    const Json& row = tabled[s];
    EXPECT_EQ(row["group_bits"], searched[s]["group_bits"]);
    EXPECT_FALSE(row.contains("search_loss"));
  }
  // Any widths, one of them everywhere included.
  for (auto& [name, widths] : table.items()) {
    std::string text(widths.get<std::string>().size(), '1');
    if (name.find("q_proj") == std::string::npos) text[0] = '5';
    widths = text;
  }
  write();
  const QuantOutcome odd = quantize(options, "odd");
  EXPECT_NEAR(entries("odd")[0]["bits_nominal"].get<double>(), 1.0, 1e-12);
  EXPECT_NEAR(entries("odd")[0]["bits_nominal"].get<double>(), 1.0, 1e-12);
  const PackedFileView view(file("odd"));
  for (const Site site : all_sites)
    EXPECT_EQ(view.decode(linear_name(0, site)).size(), load_weight(*source_, 0, site).size());

  table.erase("layers.1.mlp.up_proj");
  write();
  EXPECT_THROW((void)method_with("slimllm", options, source_->config()), Error);
}

// Zeros of the groups before the first one of --bits or more.
TEST_F(SlimLlmTest, LeadingNarrowGroupsHaveTheMiddleZero) {
  for (const bool middle : {true, false}) {
    quantize(std::string("--bits 3 --group 32") + (middle ? "" : " --no-leading-middle-zero"), "a");
    const PackedFileView view(file("a"));
    std::int64_t leading = 0, other_leading = 0, others = 0;
    for (const Site site : all_sites) {
      const PackedLinear& linear = view.model().linears.at(linear_name(0, site));
      const auto widths = linear.entry["group_bits"].get<std::string>();
      const std::size_t first = widths.find_first_not_of('2');
      for (std::size_t i = 0; i < linear.planes.size(); ++i) {
        const Plane& plane = linear.weight.planes[i];
        if (plane.role != "zeros") continue;
        const std::vector<std::byte> bytes = view.plane(linear.planes[i]);
        const auto row_bytes = index(plane.row_bytes());
        std::vector<std::uint8_t> row(widths.size());
        for (std::size_t r = 0; r < index(plane.rows); ++r) {
          unpack_row(std::span(bytes).subspan(r * row_bytes, row_bytes),
                     static_cast<unsigned>(plane.bits), row);
          for (std::size_t g = 0; g < row.size(); ++g) {
            if (widths[g] != '2') continue;
            leading += g < first ? 1 : 0;
            (g < first ? other_leading : others) += row[g] != 2 ? 1 : 0;
          }
        }
      }
    }
    ASSERT_GT(leading, 0);
    EXPECT_GT(others, 0);
    if (middle) {
      EXPECT_EQ(other_leading, 0);
    } else {
      EXPECT_GT(other_leading, 0);
    }
  }
}

TEST_F(SlimLlmTest, ImpossibleOptionsAreUsageErrors) {
  for (const char* options :
       {"--bits 1", "--bits 8", "--group 0", "--group 256", "--group 96", "--damp 0",
        "--search-damp 0", "--lambda -1", "--lambda 2 --no-scale-search", "--damp-tries 0"}) {
    try {
      (void)method_with("slimllm", options, source_->config());
      ADD_FAILURE() << options;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::usage) << options;
    }
  }
}

TEST_F(SlimLlmTest, EveryVariantRuns) {
  quantize("--bits 3 --group 64", "a");
  const double plain = entries("a")[6]["loss"].get<double>();
  for (const char* options :
       {"--salience inverse", "--divergence original", "--lambda 4", "--no-leading-middle-zero",
        "--scale-dtype f16", "--factor f32", "--damp 0.02", "--search-damp 1"}) {
    quantize(std::string("--bits 3 --group 64 ") + options, "b");
    const double loss = entries("b")[6]["loss"].get<double>();
    EXPECT_GT(loss, 0.0) << options;
    EXPECT_LT(loss, 3.0 * plain) << options;
  }
}

}  // namespace
}  // namespace engine::test
