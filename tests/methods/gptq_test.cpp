// GPTQ on whole models, calibrated on text that the embedded model wrote itself
// (docs/methods/gptq.md). The level of the ops is gptq_invariants_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/quant/calibration.h"
#include "engine/weight/codec.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";
const std::filesystem::path heldout = data / "heldout.safetensors";

class GptqTest : public ::testing::Test {
 protected:
  GptqTest()
      : source_(open_checkpoint(data)),
        calibration_(token_rows(heldout, 32, 8, 512)),
        evaluation_(token_rows(heldout, 0, 8, 512)) {}
  QuantOutcome quantize(const std::string& method, const std::string& options,
                        const std::string& name, std::int64_t blocks = 0) {
    return run_quantize(*source_,
                        {.method = method,
                         .options = options,
                         .calibration = calibration_,
                         .batch = 4,
                         .blocks = blocks},
                        file(name));
  }
  [[nodiscard]] std::filesystem::path file(const std::string& name) const {
    return dir_.path() / (name + ".qw");
  }
  double perplexity(const std::string& name) {
    return perplexity_of(*open_packed(file(name)), evaluation_);
  }

  TempDir dir_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows calibration_;
  TokenWindows evaluation_;
};

// tr(E H E^T) with H given by its lower triangle; E = decoded - original.
double layer_loss(Ops& ops, const LinearWeight& weight, const View& original, const View& hessian) {
  const std::int64_t rows = weight.rows, d = weight.cols;
  std::vector<float> w(index(rows * d)), e(w.size()), full(index(d * d)), product(w.size());
  ops.convert(original, host_view(w.data(), rows, d));
  decode_linear(weight, host_view(e.data(), rows, d));
  for (std::size_t i = 0; i < e.size(); ++i) e[i] -= w[i];
  const float* h = hessian.host<float>();
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      full[index(i * d + j)] = full[index(j * d + i)] = h[i * hessian.stride + j];
    }
  }
  ops.matmul(host_view(e.data(), rows, d), host_view(full.data(), d, d),
             host_view(product.data(), rows, d), false);
  double loss = 0;
  for (std::size_t i = 0; i < e.size(); ++i) {
    loss += static_cast<double>(e[i]) * static_cast<double>(product[i]);
  }
  return loss;
}

struct SiteLoss {
  std::string name;
  double gptq = 0;
  double rtn = 0;
  double reported = 0;  // by the method, with damping
  double expected = 0;  // what it should report
};

// GPTQ that also has RTN solve the same linears on the same statistics, and keeps both losses.
class Comparing final : public Method {
 public:
  Comparing(const std::string& options, const ModelConfig& config)
      : gptq_(method_with("gptq", options, config)), rtn_(method_with("rtn", options, config)) {}
  [[nodiscard]] const char* name() const override { return "gptq"; }
  [[nodiscard]] const char* summary() const override { return ""; }
  void declare_options(CLI::App&) override {}
  void check(const ModelConfig&) const override {}
  [[nodiscard]] Json options() const override { return gptq_->options(); }
  [[nodiscard]] Needs needs() const override { return gptq_->needs(); }
  std::vector<SiteResult> quantize_group(GroupPass& pass) override {
    std::vector<SiteResult> plain;
    {
      const Arena::Scope scope(pass.arena);
      plain = rtn_->quantize_group(pass);
    }
    std::vector<SiteResult> results = gptq_->quantize_group(pass);
    if (pass.dry()) return results;
    for (std::size_t i = 0; i < results.size(); ++i) {
      const SiteTask& task = pass.sites[i];
      SiteLoss loss{.name = linear_name(pass.layer, task.site)};
      loss.gptq = layer_loss(pass.ops, results[i].weight, task.weight, pass.hessian);
      loss.rtn = layer_loss(pass.ops, plain[i].weight, task.weight, pass.hessian);
      loss.reported = results[i].details["loss"].get<double>();
      // The solver's second moment is 2 / sequences times the sum, plus the damping.
      std::vector<float> w(index(task.weight.count())), q(w.size());
      const View wv = host_view(w.data(), task.weight.rows, task.weight.cols);
      const View qv = host_view(q.data(), task.weight.rows, task.weight.cols);
      pass.ops.convert(task.weight, wv);
      decode_linear(results[i].weight, qv);
      double squares = 0;
      for (std::size_t k = 0; k < w.size(); ++k) {
        const double e = static_cast<double>(q[k]) - static_cast<double>(w[k]);
        squares += e * e;
      }
      loss.expected = 2.0 / static_cast<double>(pass.sequences) * loss.gptq +
                      results[i].details["damping"].get<double>() * squares;
      losses.push_back(loss);
    }
    return results;
  }
  std::vector<SiteLoss> losses;

 private:
  std::unique_ptr<Method> gptq_, rtn_;
};

TEST_F(GptqTest, LayerLossIsBelowThatOfRoundToNearest) {
  for (const char* options : {"--bits 3 --group 0", "--bits 4 --group 0", "--bits 4 --group 128"}) {
    Comparing method(options, source_->config());
    run_quantize(*source_, {.method = "", .options = "", .calibration = calibration_, .batch = 4},
                 method, file("a"));
    ASSERT_EQ(method.losses.size(), 28U);
    for (const SiteLoss& loss : method.losses) {
      SCOPED_TRACE(std::string(options) + " " + loss.name);
      EXPECT_GT(loss.gptq, 0.0);
      EXPECT_LT(loss.gptq, loss.rtn);
      // The products here are rounded to f32; the method sums in double.
      EXPECT_TRUE(test::close(loss.reported, loss.expected, 1e-3))
          << loss.reported << " " << loss.expected;
    }
  }
}

TEST_F(GptqTest, ErrorFallsWithBits) {
  std::vector<double> last(14, 1e9);
  for (const int bits : {2, 3, 4, 8}) {
    const QuantOutcome o =
        quantize("gptq", "--bits " + std::to_string(bits) + " --group 128", "a", 2);
    ASSERT_EQ(o.report["linears"].size(), 14U);
    for (std::size_t i = 0; i < 14; ++i) {
      const double error = o.report["linears"][i]["relative_error"].get<double>();
      EXPECT_GT(error, 0.0);
      EXPECT_LT(error, 0.5 * last[i]) << bits << " " << o.report["linears"][i]["linear"];
      last[i] = error;
    }
  }
}

TEST_F(GptqTest, PerplexityHasTheExpectedOrder) {
  quantize("gptq", "--bits 4 --group 128", "g4");
  quantize("gptq", "--bits 3 --group 128", "g3");
  quantize("rtn", "--bits 4 --group 128", "r4");
  quantize("rtn", "--bits 3 --group 128", "r3");
  quantize("rtn", "--bits 2 --group 128", "r2");
  const double full = perplexity_of(*source_, evaluation_);
  const double g4 = perplexity("g4"), g3 = perplexity("g3"), r4 = perplexity("r4"),
               r3 = perplexity("r3"), r2 = perplexity("r2");
  EXPECT_LT(full, g4);
  EXPECT_LT(g4, r4);
  EXPECT_LT(r4, g3);
  EXPECT_LT(g3, r3);
  EXPECT_LT(r3, r2);
  ::testing::Test::RecordProperty(
      "perplexities", std::to_string(full) + " " + std::to_string(g4) + " " + std::to_string(r4) +
                          " " + std::to_string(g3) + " " + std::to_string(r3) + " " +
                          std::to_string(r2));
}

// The first stage sees the same inputs in both modes; every later one sees what came before it
// quantized.
TEST_F(GptqTest, TrueSequentialDiffersFromTheSecondStageOn) {
  quantize("gptq", "--bits 3 --group 128", "plain", 2);
  quantize("gptq", "--bits 3 --group 128 --true-sequential", "staged", 2);
  const PackedFileView plain(file("plain")), staged(file("staged"));
  for (const Site s : all_sites) {
    const std::string first = linear_name(0, s), second = linear_name(1, s);
    EXPECT_EQ(plain.bytes(first) == staged.bytes(first), tap_of(s) == Tap::attn_in) << first;
    EXPECT_FALSE(plain.bytes(second) == staged.bytes(second)) << second;
  }
  EXPECT_EQ(staged.model().directory["options"]["true_sequential"], true);
}

TEST_F(GptqTest, ActOrderIsValidThroughTheFile) {
  quantize("gptq", "--bits 3 --group 128 --act-order", "ordered");
  quantize("gptq", "--bits 3 --group 128 --act-order --static-groups", "static");
  quantize("rtn", "--bits 3 --group 128", "rtn");
  const PackedFileView ordered(file("ordered")), fixed(file("static"));
  for (const auto& [name, linear] : ordered.model().linears) {
    ASSERT_GE(linear.weight.permutation_plane, 0) << name;
    EXPECT_EQ(fixed.model().linears.at(name).weight.permutation_plane, -1) << name;
  }
  for (const Site s : all_sites) {
    const std::vector<float> original = load_weight(*source_, 3, s);
    // Without the permutation the columns would be unrelated and the error near 2.
    EXPECT_LT(relative_square_error(ordered.decode(linear_name(3, s)), original), 0.2);
    EXPECT_LT(relative_square_error(fixed.decode(linear_name(3, s)), original), 0.2);
  }
  const double limit = perplexity("rtn");
  EXPECT_LT(perplexity("ordered"), limit);
  EXPECT_LT(perplexity("static"), limit);
}

TEST_F(GptqTest, FirstBlocksDoNotDependOnLaterOnes) {
  quantize("gptq", "--bits 4 --group 128", "all");
  quantize("gptq", "--bits 4 --group 128", "two", 2);
  const PackedFileView all(file("all")), two(file("two"));
  EXPECT_EQ(two.model().config.layers, 2);
  EXPECT_EQ(two.model().linears.size(), 14U);
  for (const auto& [name, linear] : two.model().linears) {
    EXPECT_TRUE(two.bytes(name) == all.bytes(name)) << name;
  }
  EXPECT_TRUE(std::isfinite(perplexity("two")));
}

TEST_F(GptqTest, BatchOfSequencesChangesNothingButRounding) {
  QuantRun run{.method = "gptq",
               .options = "--bits 4 --group 128",
               .calibration = calibration_,
               .blocks = 1};
  run.batch = 1;
  run_quantize(*source_, run, file("one"));
  run.batch = 3;
  run_quantize(*source_, run, file("three"));
  const PackedFileView one(file("one")), three(file("three"));
  for (const Site s : all_sites) {
    const std::vector<float> a = one.decode(linear_name(0, s)), b = three.decode(linear_name(0, s));
    // The second moment is summed in another order; a code at a tie may fall the other way and
    // move a few after it.
    EXPECT_LT(differing(a, b), 0.02) << site_name(s);
    EXPECT_LT(relative_square_error(a, b), 1e-3) << site_name(s);
  }
}

// A norm weight of zero silences one input of the linears behind it: their weights there have no
// influence, and GPTQ sets them to zero.
TEST(GptqDeadColumns, WeightsOfSilentInputsBecomeZero) {
  const TempDir dir;
  TinyCheckpoint options;
  options.tokenizer = data / "tokenizer.json";
  options.edit = [](const std::string& name, std::vector<float>& values) {
    if (name == "model.layers.0.input_layernorm.weight") values[17] = values[90] = 0.0F;
    if (name == "model.layers.1.post_attention_layernorm.weight") values[3] = 0.0F;
  };
  write_tiny_checkpoint(dir.path() / "m", options);
  const auto source = open_checkpoint(dir.path() / "m");
  const TokenWindows tokens{synthetic_tokens(16 * 32, options.config.vocab, 5), 16, 32};
  for (const char* mode : {"--group 128", "--group 0", "--group 64 --act-order",
                           "--group 64 --act-order --static-groups", "--group 32 --sym"}) {
    run_quantize(
        *source,
        {.method = "gptq", .options = std::string("--bits 4 ") + mode, .calibration = tokens},
        dir.path() / "a.qw");
    const PackedFileView view(dir.path() / "a.qw");
    for (const auto& [name, linear] : view.model().linears) {
      SCOPED_TRACE(std::string(mode) + " " + name);
      const bool qkv = name.starts_with("layers.0.self_attn") && !name.ends_with("o_proj");
      const bool gate_up = name.starts_with("layers.1.mlp") && !name.ends_with("down_proj");
      const std::vector<std::int64_t> dead = qkv       ? std::vector<std::int64_t>{17, 90}
                                             : gate_up ? std::vector<std::int64_t>{3}
                                                       : std::vector<std::int64_t>{};
      EXPECT_EQ(view.entry(name)["dead_columns"].get<std::size_t>(), dead.size());
      const std::vector<float> w = view.decode(name);
      const std::int64_t rows = linear.weight.rows, cols = linear.weight.cols;
      std::vector<std::int64_t> zero_columns;
      for (std::int64_t j = 0; j < cols; ++j) {
        bool zero = true;
        for (std::int64_t r = 0; r < rows; ++r) zero = zero && w[index(r * cols + j)] == 0.0F;
        if (zero) zero_columns.push_back(j);
      }
      EXPECT_EQ(zero_columns, dead);
    }
  }
}

// Too few tokens leave the second moment singular: damping makes it solvable, and too little of it
// is reported in one line or, with more tries, raised.
TEST(GptqDamping, RankDeficientHessian) {
  const TempDir dir;
  TinyCheckpoint options;
  options.tokenizer = data / "tokenizer.json";
  write_tiny_checkpoint(dir.path() / "m", options);
  const auto source = open_checkpoint(dir.path() / "m");
  const TokenWindows tokens{synthetic_tokens(16, options.config.vocab, 5), 1, 16};
  const auto run = [&](const std::string& damping, const std::string& method = "gptq") {
    run_quantize(*source,
                 {.method = method, .options = "--factor f32 " + damping, .calibration = tokens},
                 dir.path() / "a.qw");
    return PackedFileView(dir.path() / "a.qw").entry("layers.0.mlp.down_proj");
  };
  EXPECT_EQ(run("--damp 0.01")["outcome"], "ok");
  const std::string message = testing::error_of([&] { run("--damp 1e-12"); });
  testing::expect_contains(message, "not positive definite");
  testing::expect_contains(message, "layers.0 ");
  EXPECT_FALSE(std::filesystem::exists(dir.path() / "a.qw.partial"));
  const Json raised = run("--damp 1e-12 --damp-tries 10");
  EXPECT_TRUE(raised["outcome"].get<std::string>().starts_with("damped(")) << raised["outcome"];
  // Other methods name their own option, with the value that was given.
  testing::expect_contains(testing::error_of([&] { run("--sigma-reg 1e-12", "quipsharp"); }),
                           "from --sigma-reg 1e-12 (raise --sigma-reg or");
  const std::string slim = "--bits 3 --group 8 --search-damp 1e-12 --damp 1e-12";
  testing::expect_contains(testing::error_of([&] { run(slim, "slimllm"); }),
                           "from --search-damp 1e-12 (raise --search-damp or");
  const std::string outcome = run(slim + " --damp-tries 10", "slimllm")["outcome"];
  EXPECT_TRUE(outcome.starts_with("damped(1e-")) << outcome;
}

}  // namespace
}  // namespace engine::test
