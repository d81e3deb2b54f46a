// AWQ: the ops against plain loops, whole models through the written file, and the block interface
// of the driver with a method whose result is known (docs/methods/awq.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/quant/method.h"
#include "engine/weight/codec.h"
#include "engine/weight/grid.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

std::vector<float> through_grid(std::vector<float> w, const GridSpec& spec) {
  const UnitGrid grid = find_unit_grid(w, spec);
  for (float& v : w) v = dequantize_value(quantize_value(v, grid, spec), grid, spec);
  return w;
}

GridSpec awq_grid(int bits, std::int64_t group) {
  GridSpec spec;
  spec.rule = GridRule::awq;
  spec.bits = bits;
  spec.group = group;
  return spec;
}

TEST(AwqOps, AbsoluteSumsAndScaling) {
  CpuOps ops(2);
  const std::int64_t m = 37, d = 150;
  std::vector<float> x = bell_matrix(m, d, 1);
  std::vector<double> sums(index(d), 1.0);
  ops.add_abs_sums(host_view(x.data(), m, d), host_view(sums.data(), 1, d));
  std::vector<float> s(index(d)), t(index(m)), out(x.size());
  for (std::int64_t j = 0; j < d; ++j) s[index(j)] = 0.5F + 0.01F * static_cast<float>(j);
  for (std::int64_t r = 0; r < m; ++r) t[index(r)] = 1.0F + 0.1F * static_cast<float>(r);
  ops.scale_weights(host_view(x.data(), m, d), host_view(s.data(), 1, d), host_view(t.data(), 1, m),
                    host_view(out.data(), m, d));
  for (std::int64_t j = 0; j < d; ++j) {
    double want = 1.0;
    for (std::int64_t r = 0; r < m; ++r) {
      const float v = x[index(r * d + j)];
      want += std::fabs(static_cast<double>(v));
      EXPECT_EQ(out[index(r * d + j)], v * s[index(j)] / t[index(r)]);
    }
    EXPECT_TRUE(close(sums[index(j)], want, 1e-12));
  }
}

TEST(AwqOps, RoundTripWithoutScalesIsRoundToNearest) {
  CpuOps ops(2);
  const std::int64_t rows = 20, d = 192;
  std::vector<float> w = bell_matrix(rows, d, 2, 0.05F), out(w.size());
  std::vector<float> s(index(d), 1.0F);
  for (const std::int64_t group : {0, 64}) {
    const GridSpec spec = awq_grid(3, group);
    ops.round_trip_scaled(host_view(w.data(), rows, d), host_view(s.data(), 1, d), spec,
                          host_view(out.data(), rows, d));
    for (std::int64_t at = 0; at < rows * d; at += spec.unit(d)) {
      const auto first = w.begin() + at;
      const std::vector<float> want = through_grid({first, first + spec.unit(d)}, spec);
      EXPECT_TRUE(std::equal(want.begin(), want.end(), out.begin() + at));
    }
  }
}

// The loss of a single linear through its inputs' second moment is the loss of its outputs.
TEST(AwqOps, MomentLossIsTheLossOfTheOutputs) {
  CpuOps ops(2);
  for (const std::int64_t d : {96, 300}) {
    const std::int64_t rows = 24, m = 400;
    std::vector<float> x = correlated_inputs(m, d, 3), h(index(d * d), 0.0F);
    std::vector<float> a = bell_matrix(rows, d, 4, 0.05F), b = bell_matrix(rows, d, 5, 0.05F);
    ops.gram(host_view(x.data(), m, d), host_view(h.data(), d, d));
    for (std::int64_t i = 0; i < d; ++i) {  // above the diagonal nothing is promised
      for (std::int64_t j = i + 1; j < d; ++j) {
        h[index(i * d + j)] = std::numeric_limits<float>::quiet_NaN();
      }
    }
    std::vector<std::uint8_t> workspace(index(ops.moment_loss_bytes(rows, d)));
    double loss = -1.0, want = 0.0;
    ops.moment_loss(host_view(a.data(), rows, d), host_view(b.data(), rows, d),
                    host_view(h.data(), d, d), host_view(&loss, 1, 1),
                    host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size())));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < m; ++i) {
        double y = 0.0;
        for (std::int64_t j = 0; j < d; ++j) {
          y += (static_cast<double>(a[index(r * d + j)]) -
                static_cast<double>(b[index(r * d + j)])) *
               static_cast<double>(x[index(i * d + j)]);
        }
        want += y * y;
      }
    }
    EXPECT_TRUE(close(loss, want, 1e-5)) << loss << " " << want;
  }
}

struct ClipRun {
  std::vector<float> w;
  std::vector<std::uint8_t> choice;
  std::vector<float> loss, plain;
};

ClipRun clip(CpuOps& ops, std::vector<float> w, std::vector<float> x, std::int64_t rows,
             const GridSpec& grid, bool ends) {
  const auto d = static_cast<std::int64_t>(w.size()) / rows;
  const auto n = static_cast<std::int64_t>(x.size()) / d;
  const std::int64_t groups = grid.groups(d);
  ClipRun run{.w = std::move(w), .choice = {}, .loss = {}, .plain = {}};
  run.choice.resize(index(rows * groups));
  run.loss.resize(run.choice.size());
  run.plain.resize(run.choice.size());
  std::vector<std::uint8_t> workspace(index(ops.awq_clip_bytes(rows, d, grid, n)));
  AwqClipProblem p;
  p.grid = grid;
  p.ends = ends;
  p.w = host_view(run.w.data(), rows, d);
  p.x = host_view(x.data(), n, d);
  p.choice = host_view(run.choice.data(), rows, groups);
  p.loss = host_view(run.loss.data(), rows, groups);
  p.plain_loss = host_view(run.plain.data(), rows, groups);
  p.workspace = host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size()));
  ops.awq_clip(p);
  return run;
}

// Token by token in double, as the method is defined: through the samples' moment (groups shorter
// than the sample) and through the samples themselves. Near ties may fall the other way.
TEST(AwqOps, ClipSearchIsThatOfTheTokens) {
  CpuOps ops(2);
  const std::int64_t rows = 9, d = 128;
  const std::vector<float> w = bell_matrix(rows, d, 6, 0.05F);
  for (const std::int64_t n : {40, 100}) {
    const std::vector<float> x = correlated_inputs(n, d, 7);
    for (const std::int64_t group : {0, 32, 64}) {
      for (const bool ends : {false, true}) {
        SCOPED_TRACE(std::to_string(n) + " " + std::to_string(group));
        const GridSpec grid = awq_grid(3, group);
        const ClipRun run = clip(ops, w, x, rows, grid, ends);
        const std::int64_t unit = grid.unit(d), units = rows * d / unit;
        std::int64_t other = 0, clipped = 0;
        for (std::int64_t u = 0; u < units; ++u) {
          const std::vector<float> plain(w.begin() + u * unit, w.begin() + (u + 1) * unit);
          const auto [lo, hi] = std::minmax_element(plain.begin(), plain.end());
          const float most = std::max(-*lo, *hi);
          double best = std::numeric_limits<double>::infinity();
          int index_of_best = 0;
          for (int i = 0; i < 10; ++i) {
            const auto shrink = static_cast<float>(1.0 - i / 20.0);
            const float from = ends ? *lo * shrink : -most * shrink;
            const float to = ends ? *hi * shrink : most * shrink;
            std::vector<float> q = plain;
            for (float& v : q) v = std::clamp(v, from, to);
            if (i == run.choice[index(u)]) {
              EXPECT_TRUE(std::equal(q.begin(), q.end(), run.w.begin() + u * unit));
            }
            q = through_grid(q, grid);
            double loss = 0.0;
            for (std::int64_t t = 0; t < n; ++t) {
              double y = 0.0;
              for (std::int64_t j = 0; j < unit; ++j) {
                y += (static_cast<double>(q[index(j)]) - static_cast<double>(plain[index(j)])) *
                     static_cast<double>(x[index(t * d + u * unit % d + j)]);
              }
              loss += y * y;
            }
            loss /= static_cast<double>(n);
            if (i == 0) {
              EXPECT_TRUE(close(run.plain[index(u)], loss, 1e-4));
            }
            if (loss < best) {
              best = loss;
              index_of_best = i;
            }
          }
          other += run.choice[index(u)] == index_of_best ? 0 : 1;
          clipped += index_of_best > 0 ? 1 : 0;
          EXPECT_TRUE(close(run.loss[index(u)], best, 1e-4));
          EXPECT_LE(run.loss[index(u)], run.plain[index(u)]);
        }
        EXPECT_LE(other * 50, units);
        EXPECT_GT(clipped * 4, units);
      }
    }
  }
}

TEST(AwqOps, ClipSearchIgnoresTheSizeOfTheInputsAndTheThreads) {
  CpuOps ops(2), one(1);
  const std::vector<float> w = bell_matrix(16, 128, 8, 0.05F);
  std::vector<float> x = correlated_inputs(100, 128, 9);
  const ClipRun plain = clip(ops, w, x, 16, awq_grid(4, 64), false);
  const ClipRun single = clip(one, w, x, 16, awq_grid(4, 64), false);
  EXPECT_EQ(plain.choice, single.choice);
  EXPECT_EQ(plain.loss, single.loss);
  for (float& v : x) v *= 0x1p-7F;
  const ClipRun small = clip(ops, w, x, 16, awq_grid(4, 64), false);
  EXPECT_EQ(plain.choice, small.choice);
  EXPECT_EQ(plain.w, small.w);
}

class AwqTest : public ::testing::Test {
 protected:
  AwqTest() {
    checkpoint_.config = small_config();
    checkpoint_.tokenizer =
        std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3" / "tokenizer.json";
    calibration_.windows = 6;
    calibration_.seq = 50;
    for (std::int64_t i = 0; i < calibration_.rows(); ++i) {
      calibration_.ids.push_back(
          static_cast<std::int32_t>(uniform_value(11, 0, static_cast<std::uint64_t>(i)) * 0.999 *
                                    static_cast<double>(checkpoint_.config.vocab)));
    }
  }
  void open() {
    write_tiny_checkpoint(dir_.path() / "model", checkpoint_);
    source_ = open_checkpoint(dir_.path() / "model");
  }
  QuantOutcome quantize(const std::string& options, const std::string& name = "a",
                        const std::string& method = "awq") {
    return run_quantize(*source_,
                        {.method = method,
                         .options = options,
                         .calibration = calibration_,
                         .batch = 4,
                         .poison = true},
                        file(name));
  }
  [[nodiscard]] std::filesystem::path file(const std::string& name) const {
    return dir_.path() / (name + ".qw");
  }
  std::vector<float> norm(WeightSource& source, const std::string& name) {
    Ledger ledger;
    const auto ops = make_cpu_ops(ledger, 1);
    std::vector<float> out(index(source.config().hidden));
    Arena plan = Arena::measuring(ops->kind());
    const Loader sized(*ops, ledger, plan, source.config());
    Arena arena(ops->memory(), ledger, plan.peak());
    Loader loader(*ops, ledger, arena, source.config());
    source.load_dense(name, loader, host_view(out.data(), 1, source.config().hidden));
    return out;
  }

  TempDir dir_;
  TinyCheckpoint checkpoint_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows calibration_;
};

TEST_F(AwqTest, WhatIsChosenLosesNoMoreThanDoingNothing) {
  open();
  for (const char* options :
       {"--bits 3 --group 64", "--bits 3 --group 0 --clip asym --clip-stride coprime",
        "--bits 4 --group 32 --search-samples 2 --arithmetic f16 --scale-dtype f16"}) {
    quantize(options);
    const PackedFileView view(file("a"));
    int scaled = 0, clipped = 0;
    for (const auto& [name, linear] : view.model().linears) {
      SCOPED_TRACE(std::string(options) + " " + name);
      const Json& entry = linear.entry;
      const bool o = name.find("o_proj") != std::string::npos;
      const bool qk =
          name.find("q_proj") != std::string::npos || name.find("k_proj") != std::string::npos;
      EXPECT_EQ(entry.contains("loss"), !o);  // v and o differ in shape
      EXPECT_EQ(entry.contains("clip_loss"), !qk);
      if (!o) {
        EXPECT_LE(entry["loss"].get<double>(), entry["unscaled_loss"].get<double>());
        EXPECT_GT(entry["loss"].get<double>(), 0.0);
        scaled += entry["ratio"].get<double>() > 0 ? 1 : 0;
      }
      if (!qk) {
        EXPECT_LE(entry["clip_loss"].get<double>(), entry["unclipped_loss"].get<double>());
        clipped += entry["clipped_groups"].get<double>() > 0 ? 1 : 0;
      }
      EXPECT_GT(entry["relative_error"].get<double>(), 0.0);
      EXPECT_LT(entry["relative_error"].get<double>(), 0.2);
    }
    EXPECT_GT(scaled, 0);
    EXPECT_GT(clipped, 5);
  }
}

// q, k and v share their scales with the norm before them; gate and up theirs; down's are taken
// from the rows of up. The file's norms and weights say the same: dividing them out again leaves
// the original weights, up to rounding at 8 bits.
TEST_F(AwqTest, ScalesAreFoldedIntoWhatComesBefore) {
  // A few loud channels, so that the scales differ much.
  checkpoint_.edit = [](const std::string& name, std::vector<float>& v) {
    if (name.find("layernorm") == std::string::npos) return;
    for (std::size_t i = 0; i < v.size(); i += 17) v[i] *= 20.0F;
  };
  open();
  quantize("--bits 8 --group 32 --clip none");
  const PackedFileView view(file("a"));
  const auto packed = open_packed(file("a"));
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    for (const Tap tap : {Tap::attn_in, Tap::mlp_in}) {
      const std::string name = prefix + (tap == Tap::attn_in ? "input_layernorm.weight"
                                                             : "post_attention_layernorm.weight");
      EXPECT_EQ(packed->dense_info(name).dtype, DType::f32);
      const std::vector<float> before = norm(*source_, name), after = norm(*packed, name);
      std::vector<float> s(before.size());
      for (std::size_t j = 0; j < s.size(); ++j) s[j] = before[j] / after[j];
      const auto [lo, hi] = std::minmax_element(s.begin(), s.end());
      EXPECT_TRUE(close(*lo * *hi, 1.0, 1e-4)) << *lo << " " << *hi;
      EXPECT_GT(*hi, 1.05F);
      for (const Site site : all_sites) {
        if (tap_of(site) != tap || site == Site::up) continue;
        const std::vector<float> w = load_weight(*source_, layer, site);
        std::vector<float> q = view.decode(linear_name(layer, site));
        for (std::size_t i = 0; i < q.size(); ++i) q[i] /= s[i % s.size()];
        EXPECT_LT(relative_square_error(q, w), 2e-4) << linear_name(layer, site);
      }
    }
  }
  // The whole function is the original's.
  const TokenWindows tokens = calibration_;
  const double original = perplexity_of(*source_, tokens);
  EXPECT_TRUE(close(perplexity_of(*packed, tokens), original, 0.01));
}

TEST_F(AwqTest, WithoutScalesAndClippingItIsRoundToNearest) {
  open();
  quantize("--bits 3 --group 64 --ratios 1 --clip none --division exact", "awq");
  quantize("--bits 3 --group 64 --rule awq", "rtn", "rtn");
  const PackedFileView a(file("awq")), b(file("rtn"));
  ASSERT_EQ(a.model().linears.size(), 14U);
  for (const auto& [name, linear] : a.model().linears) {
    EXPECT_TRUE(a.bytes(name) == b.bytes(name)) << name;
    EXPECT_EQ(linear.entry["relative_error"], b.entry(name)["relative_error"]) << name;
  }
  const std::string name = "layers.1.input_layernorm.weight";
  EXPECT_EQ(norm(*open_packed(file("awq")), name), norm(*source_, name));
}

TEST_F(AwqTest, OutputsAreScaledWhereValuesFeedThemChannelByChannel) {
  checkpoint_.config.kv_heads = checkpoint_.config.heads;
  checkpoint_.config.head_dim = checkpoint_.config.hidden / checkpoint_.config.heads;
  open();
  quantize("--bits 8 --group 32 --clip none");
  const PackedFileView view(file("a"));
  EXPECT_TRUE(view.entry("layers.0.self_attn.o_proj").contains("ratio"));
  EXPECT_TRUE(close(perplexity_of(*open_packed(file("a")), calibration_),
                    perplexity_of(*source_, calibration_), 0.01));
}

TEST_F(AwqTest, ADeadInputDoesNoHarm) {
  checkpoint_.edit = [](const std::string& name, std::vector<float>& v) {
    if (name.find("layernorm") != std::string::npos) v[3] = 0.0F;
  };
  open();
  quantize("--bits 4 --group 64");
  const auto packed = open_packed(file("a"));
  EXPECT_EQ(norm(*packed, "layers.0.input_layernorm.weight")[3], 0.0F);
  const double ppl = perplexity_of(*packed, calibration_);
  EXPECT_TRUE(std::isfinite(ppl));
  EXPECT_LT(ppl, 1.5 * perplexity_of(*source_, calibration_));
}

TEST_F(AwqTest, ImpossibleOptionsAreRefused) {
  for (const char* options :
       {"--sym", "--mse", "--ratios 0", "--clip-steps 0", "--max-shrink 0", "--max-shrink 1.5",
        "--max-shrink nan", "--clip-tokens 0", "--search-samples -1", "--group 48",
        "--arithmetic f16 --scale-dtype bf16", "--clip both"}) {
    EXPECT_THROW(static_cast<void>(method_with("awq", options, checkpoint_.config)), Error)
        << options;
  }
  EXPECT_NO_THROW(static_cast<void>(method_with("awq", "--rule gptq --sym", checkpoint_.config)));
}

// The driver's block interface with a result that is known: factors moved into the norms and the
// rows of up, the weights stored as they are. Nothing may change.
class Folding final : public Method {
 public:
  explicit Folding(bool original_stream) : original_stream_(original_stream) {}
  [[nodiscard]] const char* name() const override { return "folding"; }
  [[nodiscard]] const char* summary() const override { return ""; }
  void declare_options(CLI::App&) override {}
  void check(const ModelConfig&) const override {}
  [[nodiscard]] Json options() const override { return Json::object(); }
  [[nodiscard]] Needs needs() const override {
    return {.block = true, .original_stream = original_stream_};
  }
  std::vector<SiteResult> quantize_block(BlockPass& pass) override {
    std::vector<SiteResult> results;
    for (const Site site : all_sites) {
      const View original = pass.stream.weights[site].dense;
      const Arena::Scope scope(pass.arena);
      const View w = pass.arena.make(MemTag::solver, DType::f32, original.rows, original.cols);
      SiteResult r;
      if (!pass.dry()) {
        std::vector<float> s = factors(tap_of(site), original.cols, pass.layer);
        std::vector<float> t = factors(Tap::mlp_out, original.rows, pass.layer);
        pass.ops.scale_weights(original, host_view(s.data(), 1, original.cols),
                               site == Site::up ? host_view(t.data(), 1, original.rows) : View{},
                               w);
      }
      Plane plane{.role = "dense",
                  .dtype = DType::f32,
                  .bits = 0,
                  .rows = w.rows,
                  .cols = w.cols,
                  .data = {}};
      if (!pass.dry()) {
        r.codes = Buffer(host_memory(), pass.ledger, MemTag::staging, DType::u8, 1, w.bytes());
        plane.data = r.codes.view();
        std::memcpy(plane.data.data, w.data, index(w.bytes()));
      }
      r.weight.rows = w.rows;
      r.weight.cols = w.cols;
      r.weight.planes.push_back(plane);
      Term term;
      term.kind = TermKind::dense;
      term.codes_plane = 0;
      r.weight.terms.push_back(term);
      results.push_back(std::move(r));
    }
    pass.norms_changed = true;
    if (pass.dry()) return results;
    for (const View& norm : {pass.attn_norm, pass.mlp_norm}) {
      std::vector<float> s = factors(Tap::attn_in, norm.cols, pass.layer);
      pass.ops.scale_weights(norm.reshape(norm.cols, 1), View{}, host_view(s.data(), 1, norm.cols),
                             norm.reshape(norm.cols, 1));
    }
    return results;
  }

 private:
  static std::vector<float> factors(Tap tap, std::int64_t n, std::int64_t layer) {
    std::vector<float> s(index(n), 1.0F);
    if (tap == Tap::attn_out) return s;
    for (std::int64_t j = 0; j < n; ++j) {
      s[index(j)] = static_cast<float>(
          std::exp2(4.0 * uniform_value(21, static_cast<std::uint64_t>(layer), index(j)) - 2.0));
    }
    return s;
  }
  bool original_stream_;
};

TEST_F(AwqTest, FactorsMovedIntoNormsLeaveTheFunctionAlone) {
  open();
  const std::span ids(calibration_.ids.data(), 50);
  const std::vector<float> want = logits_of(*source_, DType::f32, ids);
  for (const bool original_stream : {true, false}) {
    Folding method(original_stream);
    const QuantOutcome outcome = run_quantize(
        *source_,
        {.method = "", .options = "", .calibration = calibration_, .batch = 4, .poison = true},
        method, file("a"));
    const auto packed = open_packed(file("a"));
    EXPECT_GT(relative_square_error(norm(*packed, "layers.0.input_layernorm.weight"),
                                    norm(*source_, "layers.0.input_layernorm.weight")),
              0.1);
    EXPECT_LT(relative_square_error(logits_of(*packed, DType::f32, ids), want), 1e-10);
    ASSERT_EQ(outcome.report["blocks"].size(), 2U);
    for (const Json& block : outcome.report["blocks"]) {
      EXPECT_LT(block["output_relative_error"].get<double>(), 1e-10);
    }
  }
}

}  // namespace
}  // namespace engine::test
