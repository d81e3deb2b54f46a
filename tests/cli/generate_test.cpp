// engine generate and ppl on a packed model: held packed or decoded, one sequence or several, with
// either cache, the same text.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/program.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

class Generate : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TemporaryDirectory;
    const Outcome outcome =
        run_program({"quantize", "--model", tiny_llama3(), "--method", "rtn", "--bits", "4",
                     "--group", "64", "--out", path("a.qw"), "--device", "cpu"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  }
  static void TearDownTestSuite() { delete directory_; }
  static fs::path path(const std::string& name) { return directory_->path() / name; }

  struct Result {
    std::string text;
    Json report;
  };
  static Result generated(const fs::path& model, const Arguments& more) {
    const fs::path report = path("report.json");
    const Outcome outcome =
        run_program(Arguments{"generate", "--model", model, "--prompt", "In the year",
                              "--max-tokens", "20", "--device", "cpu", "--report", report} +
                    more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return {outcome.out, Json::parse(read_bytes(report))};
  }

 private:
  static inline TemporaryDirectory* directory_ = nullptr;
};

TEST_F(Generate, PackedAndDecodedWriteTheSameText) {
  const Result standard = generated(path("a.qw"), {});
  const Result packed = generated(path("a.qw"), {"--exec", "packed", "--no-graph"});
  const Result decoded = generated(path("a.qw"), {"--exec", "decoded"});
  EXPECT_GT(standard.text.size(), 10U);
  EXPECT_EQ(packed.text, standard.text);
  EXPECT_EQ(decoded.text, standard.text);
  EXPECT_EQ(standard.report.at("exec"), "decoded");  // which the CPU is quick at
  EXPECT_EQ(packed.report.at("exec"), "packed");
  EXPECT_EQ(decoded.report.at("exec"), "decoded");
  // Of 32 bits per weight 4 remain, coefficients aside; embedding, head and norms stay.
  EXPECT_LT(2 * packed.report.at("weight_bytes").get<std::int64_t>(),
            decoded.report.at("weight_bytes").get<std::int64_t>());
  EXPECT_EQ(packed.report.at("graph"), false);  // the CPU records nothing
  EXPECT_EQ(packed.report.at("kv_bits"), 32);
  EXPECT_GT(packed.report.at("step_tokens_per_s").get<double>(), 0.0);
  EXPECT_EQ(packed.report.at("generated_tokens"), 20);
  EXPECT_EQ(packed.report.at("steps"), 19);  // the first token comes with the prompt
  // A checkpoint is dense.
  EXPECT_EQ(generated(tiny_llama3(), {}).report.at("exec"), "decoded");
}

TEST_F(Generate, AnEightBitCacheTakesAQuarter) {
  const Result plain = generated(path("a.qw"), {"--exec", "packed", "--kv", "16"});
  const Result narrow = generated(path("a.qw"), {"--exec", "packed", "--kv", "8"});
  EXPECT_GT(narrow.text.size(), 10U);
  EXPECT_EQ(narrow.report.at("kv_bits"), 8);
  const auto wide_bytes = plain.report.at("kv_bytes").get<std::int64_t>();
  const auto narrow_bytes = narrow.report.at("kv_bytes").get<std::int64_t>();
  EXPECT_LT(narrow_bytes, wide_bytes / 2);
  EXPECT_GT(narrow_bytes, wide_bytes / 4);  // and a scale per head
}

// 18 samples: a full batch and one that is filled up with samples nobody asked for.
TEST_F(Generate, ManySamplesAreThoseOfSeparateRuns) {
  const Arguments sampling = {"--exec",  "packed", "--temperature", "1",
                              "--top-p", "0.9",    "--ignore-eos"};
  const fs::path together = path("together.txt");
  generated(path("a.qw"),
            sampling + Arguments{"--seed", "40", "--samples", "18", "--text-out", together});
  std::string separate;
  std::set<std::string> different;
  for (const int s : {0, 1, 15, 16, 17}) {
    const fs::path alone = path("alone.txt");
    generated(path("a.qw"),
              sampling + Arguments{"--seed", std::to_string(40 + s), "--text-out", alone});
    const std::string text = read_bytes(alone);
    EXPECT_NE(read_bytes(together).find(text), std::string::npos) << s << ": " << text;
    different.insert(text);
    separate += text;
  }
  EXPECT_EQ(different.size(), 5U);
  // In their order: the first two begin the file, the last two end it.
  EXPECT_EQ(read_bytes(together).find(separate.substr(0, 20)), 0U);
}

TEST_F(Generate, PerplexityOfPackedBlocksIsTheSame) {
  const auto perplexity = [&](const Arguments& more) {
    const fs::path report = path("ppl.json");
    const Outcome outcome = run_program(
        Arguments{"ppl", "--model", path("a.qw"), "--text", tiny_llama3() / "heldout.txt", "--seq",
                  "128", "--limit", "4", "--device", "cpu", "--report", report} +
        more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Json::parse(read_bytes(report));
  };
  const auto figure = [](const Json& j) {
    return j.at("results").at(0).at("perplexity").get<double>();
  };
  const Json decoded = perplexity({});
  const Json packed = perplexity({"--exec", "packed", "--packed-kernel", "vector"});
  EXPECT_EQ(decoded.at("numerics").at("exec"), "decoded");
  EXPECT_FALSE(decoded.at("numerics").contains("packed_kernel"));
  EXPECT_EQ(packed.at("numerics").at("exec"), "packed");
  EXPECT_EQ(packed.at("numerics").at("packed_kernel"), "vector");
  ASSERT_TRUE(std::isfinite(figure(decoded)));
  // f32 sums in another order at most (tests/model/ppl_test.cpp).
  EXPECT_LE(std::fabs(figure(packed) - figure(decoded)), 1e-5 * figure(decoded));
}

}  // namespace
}  // namespace engine::test
