// Round to nearest on the embedded model: against figures of the official code, and what must hold
// whatever the weights (docs/methods/rtn.md).
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "engine/weight/grid.h"
#include "formats/json.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";
const std::filesystem::path golden =
    std::filesystem::path(LOWBIT_TEST_DATA).parent_path() / "golden" / "rtn_tiny.json";

struct Sums {
  double sum = 0, absolute = 0, square = 0;
};

Sums sums_of(const std::vector<float>& w) {
  Sums s;
  for (const float v : w) {
    const double x = v;
    s.sum += x;
    s.absolute += std::abs(x);
    s.square += x * x;
  }
  return s;
}

std::string grid_options_of(const Json& setting) {
  return "--bits " + std::to_string(setting["bits"].get<int>()) + " --group " +
         std::to_string(setting["group"].get<int>());
}

// The figures were made in f32 on a GPU. A quotient that falls within an ulp of a tie may round
// the other way there; one such weight moves a sum by one step, far above the bound on sums here,
// so the test also says that there is none.
TEST(Rtn, WeightsEqualThoseOfTheOfficialCode) {
  const auto source = open_checkpoint(data);
  const TempDir dir;
  const Json document = read_json_file(golden);
  ASSERT_EQ(document["settings"].size(), 5U);
  for (const Json& setting : document["settings"]) {
    const std::filesystem::path file = dir.path() / "a.qw";
    run_quantize(*source, {.method = "rtn", .options = grid_options_of(setting)}, file);
    const PackedFileView view(file);
    ASSERT_EQ(setting["linears"].size(), 14U);
    for (const auto& [name, figures] : setting["linears"].items()) {
      SCOPED_TRACE(setting["setting"].get<std::string>() + " " + name);
      const std::vector<float> w = view.decode(name);
      const auto row = figures["row0"].get<std::vector<double>>();
      ASSERT_EQ(row.size(), 8U);
      for (std::size_t i = 0; i < row.size(); ++i) {
        EXPECT_NEAR(static_cast<double>(w[i]), row[i], 1e-7 * std::abs(row[i])) << i;
      }
      const Sums s = sums_of(w);
      const double absolute = figures["abssum"].get<double>();
      EXPECT_NEAR(s.sum, figures["sum"].get<double>(), 1e-6 * absolute);
      EXPECT_NEAR(s.absolute, absolute, 1e-6 * absolute);
      const double square = figures["sqsum"].get<double>();
      EXPECT_NEAR(s.square, square, 1e-6 * square);
    }
  }
}

TEST(Rtn, ErrorFallsWithBits) {
  const auto source = open_checkpoint(data);
  const TempDir dir;
  for (const char* group : {"128", "0"}) {
    std::map<std::string, double> last;
    for (int bits = 1; bits <= 8; ++bits) {
      const QuantOutcome o = run_quantize(
          *source,
          {.method = "rtn", .options = "--bits " + std::to_string(bits) + " --group " + group},
          dir.path() / "a.qw");
      ASSERT_EQ(o.report["linears"].size(), 28U);
      for (const Json& row : o.report["linears"]) {
        const auto name = row["linear"].get<std::string>();
        const double error = row["relative_error"].get<double>();
        EXPECT_GT(error, 0.0) << name;
        // From 3 bits on a bit is worth nearly 6 dB.
        const double bound = bits == 1 ? 2.0 : last.at(name) * (bits > 3 ? 0.35 : 1.0);
        EXPECT_LT(error, bound) << name << " " << bits;
        last[name] = error;
      }
    }
  }
}

TEST(Rtn, NoWeightIsOffByMoreThanHalfAStep) {
  const auto source = open_checkpoint(data);
  const TempDir dir;
  for (const int bits : {2, 4, 8}) {
    run_quantize(*source,
                 {.method = "rtn", .options = "--bits " + std::to_string(bits) + " --group 128"},
                 dir.path() / "a.qw");
    const PackedFileView view(dir.path() / "a.qw");
    for (const Site site : all_sites) {
      const std::vector<float> w = load_weight(*source, 2, site);
      const std::vector<float> q = view.decode(linear_name(2, site));
      ASSERT_EQ(w.size(), q.size());
      std::int64_t outside = 0;
      for (std::size_t unit = 0; unit < w.size(); unit += 128) {
        GridSpec spec;
        spec.bits = bits;
        const UnitGrid grid = find_unit_grid(std::span(w).subspan(unit, 128), spec);
        for (std::size_t i = unit; i < unit + 128; ++i) {
          // The quotient and the product are each rounded once, by 2^-24 of themselves; bf16
          // weights sit on ties often enough for that to show.
          const double size = std::abs(double(w[i])), step = grid.scale;
          const bool inside =
              std::abs(double(w[i]) - double(q[i])) <= 0.5 * step + 0x1p-23 * (size + step);
          outside += inside ? 0 : 1;
        }
      }
      EXPECT_EQ(outside, 0) << site_name(site) << " " << bits;
    }
  }
}

TEST(Rtn, OneBlockIsAModelOfItsOwn) {
  const auto source = open_checkpoint(data);
  const TempDir dir;
  run_quantize(*source, {.method = "rtn", .options = "--bits 4"}, dir.path() / "all.qw");
  run_quantize(*source, {.method = "rtn", .options = "--bits 4", .blocks = 2},
               dir.path() / "two.qw");
  const PackedFileView all(dir.path() / "all.qw"), two(dir.path() / "two.qw");
  EXPECT_EQ(all.model().config.layers, 4);
  EXPECT_EQ(two.model().config.layers, 2);
  EXPECT_EQ(two.model().linears.size(), 14U);
  for (const auto& [name, linear] : two.model().linears) {
    EXPECT_TRUE(two.bytes(name) == all.bytes(name)) << name;
  }
  const auto packed = open_packed(dir.path() / "two.qw");
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 0, 2, 128);
  const double ppl = perplexity_of(*packed, tokens);
  EXPECT_TRUE(std::isfinite(ppl));
  // A model without its last two blocks has learned less than the whole one.
  EXPECT_GT(ppl, perplexity_of(*source, tokens));
}

}  // namespace
}  // namespace engine::test
