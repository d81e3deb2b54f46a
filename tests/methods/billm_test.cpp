// What must hold for BiLLM: the sweep against a direct implementation, the weight algebra that its
// results go into, and whole models through the written file (docs/methods/billm.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/quant/calibration.h"
#include "engine/weight/pattern.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/billm_run.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

// A few columns are large, as in trained layers.
std::vector<float> test_weights(std::int64_t rows, std::int64_t d, std::uint64_t seed) {
  std::vector<float> w = bell_matrix(rows, d, seed, 0.02F);
  for (std::int64_t j = 5; j < d; j += 23) {
    for (std::int64_t r = 0; r < rows; ++r) w[index(r * d + j)] *= 3.0F;
  }
  return w;
}

BillmCase make_case(std::int64_t rows, std::int64_t d, std::vector<std::int64_t> dead = {}) {
  BillmCase c;
  c.rows = rows;
  c.d = d;
  c.w = test_weights(rows, d, 301);
  c.h = test_hessian(d, 302, dead);
  return c;
}

// A second moment without correlations: nothing is compensated, every block sees its own weights.
BillmCase diagonal_case(std::int64_t rows, std::int64_t d) {
  BillmCase c = make_case(rows, d);
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j < d; ++j) {
      if (i != j) c.h[index(i * d + j)] = 0.0F;
    }
  }
  return c;
}

struct Mode {
  const char* name;
  BillmProblem options;
  DType factor = DType::f64;
};

std::vector<Mode> modes() {
  std::vector<Mode> all;
  const auto add = [&](const char* name) -> BillmProblem& {
    all.push_back({name, {}, DType::f64});
    return all.back().options;
  };
  add("default");
  add("magnitude").metric = BillmMetric::magnitude;
  add("weight search").search = BillmSearch::weight;
  add("one pass over the rest").rest_passes = 1;
  add("no mean").with_mean = false;
  add("few columns").max_salient = 3;
  add("f16").scale_dtype = DType::f16;
  add("small blocks").block = 32;
  BillmProblem& paper = add("paper");
  paper.search = BillmSearch::weight;
  paper.rest_passes = 1;
  paper.with_mean = false;
  paper.scale_dtype = DType::bf16;
  all.push_back({"f32 factor", {}, DType::f32});
  return all;
}

TEST(BillmSweep, EqualsTheDirectImplementation) {
  CpuOps ops(2);
  for (const Mode& mode : modes()) {
    SCOPED_TRACE(mode.name);
    BillmCase c = make_case(24, 384, {7, 200});
    c.options = mode.options;
    c.factor = mode.factor;
    const BillmRun run = run_billm(ops, c);
    ASSERT_TRUE(run.factored);
    const BillmReference direct = BillmDirect(c, run).solve();
    EXPECT_EQ(run.salient, direct.salient);
    EXPECT_EQ(run.percent, direct.percent);
    EXPECT_TRUE(close(total(run.loss), direct.loss, 1e-3)) << total(run.loss) << " " << direct.loss;
    double far = 0, square = 0, error = 0;
    std::size_t moved = 0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t j = 0; j < c.d; ++j) {
        const std::size_t at = index(row * c.d + j);
        if (run.salient[index(j)] == 0 && run.second[at] != direct.sparse[at]) ++moved;
        const double q = direct.quantized[at];
        const double e = static_cast<double>(run.value(c, row, j)) - q;
        ASSERT_TRUE(std::isfinite(e));
        error += e * e;
        square += q * q;
        far += std::fabs(e) > 1e-4 * std::fabs(q) + 1e-6 ? 1.0 : 0.0;
      }
    }
    // A weight within rounding of a mean or of the break point may fall on the other side.
    EXPECT_LE(static_cast<double>(moved), 0.002 * static_cast<double>(run.w.size()));
    EXPECT_LE(far, 0.03 * static_cast<double>(run.w.size()));
    EXPECT_LE(error, 1e-3 * square);
  }
}

TEST(BillmSweep, GroupsPartitionTheBlock) {
  CpuOps ops(2);
  for (const Mode& mode : modes()) {
    SCOPED_TRACE(mode.name);
    BillmCase c = make_case(40, 256);
    c.options = mode.options;
    const std::int64_t b = c.options.block;
    const BillmRun run = run_billm(ops, c);
    ASSERT_TRUE(run.factored);
    for (std::int64_t unit = 0; unit < c.d / b; ++unit) {
      std::int64_t columns = 0, below = 0;
      for (std::int64_t k = 0; k < b; ++k) {
        const std::int64_t j = unit * b + k;
        ASSERT_LE(run.salient[index(j)], 1);
        columns += run.salient[index(j)];
        for (std::int64_t row = 0; row < c.rows; ++row) {
          const std::size_t at = index(row * c.d + j);
          ASSERT_LE(run.first[at], 1);
          ASSERT_LE(run.second[at], 1);
          if (run.salient[index(j)] == 0) below += run.second[at] == 0 ? 1 : 0;
        }
      }
      EXPECT_GE(columns, 1);
      EXPECT_LE(columns, std::min(c.options.max_salient, b - 1));
      // The break point is a quantile of the block in which salient columns are zeros.
      const std::int32_t percent = run.percent[index(unit)];
      EXPECT_GE(percent, 10);
      EXPECT_LE(percent, 90);
      const double below_quantile = static_cast<double>(c.rows * b - 1) * percent / 100.0;
      EXPECT_NEAR(static_cast<double>(below + columns * c.rows),
                  std::max(below_quantile, static_cast<double>(columns * c.rows)), 1.01);
      // At most four values on either side of the column set, per row.
      for (std::int64_t row = 0; row < c.rows; ++row) {
        std::set<float> normal, salient;
        for (std::int64_t j = unit * b; j < (unit + 1) * b; ++j) {
          (run.salient[index(j)] == 1 ? salient : normal).insert(run.value(c, row, j));
        }
        EXPECT_LE(normal.size(), 4U);
        EXPECT_LE(salient.size(), 4U);
      }
    }
  }
}

TEST(BillmSweep, SecondPassNeverAddsError) {
  CpuOps ops(2);
  BillmCase c = diagonal_case(64, 256);
  const BillmRun run = run_billm(ops, c);
  ASSERT_TRUE(run.factored);
  const std::int64_t b = c.options.block, units = c.d / b;
  double once_all = 0, twice_all = 0;
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t unit = 0; unit < units; ++unit) {
      double once = 0, twice = 0;
      for (std::int64_t j = unit * b; j < (unit + 1) * b; ++j) {
        if (run.salient[index(j)] == 0) continue;
        const std::size_t at = index(row * c.d + j), u = index(row * units + unit);
        const double w = run.w[at];
        const double first =
            static_cast<double>(run.means[billm_salient][u]) +
            (run.first[at] == 1 ? 1.0 : -1.0) * static_cast<double>(run.scales[billm_salient][u]);
        const double second = run.value(c, row, j);
        once += (w - first) * (w - first);
        twice += (w - second) * (w - second);
      }
      EXPECT_LE(twice, once * (1 + 1e-5) + 1e-12) << row << " " << unit;
      once_all += once;
      twice_all += twice;
    }
  }
  EXPECT_LT(twice_all, 0.8 * once_all);
}

// Mean and scale of the group are what the method says, and the bit is the side of the mean.
TEST(BillmSweep, CoefficientsAreMeanAndMeanDistance) {
  CpuOps ops(2);
  BillmCase c = diagonal_case(16, 256);
  const BillmRun run = run_billm(ops, c);
  ASSERT_TRUE(run.factored);
  const std::int64_t b = c.options.block, units = c.d / b;
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t unit = 0; unit < units; ++unit) {
      for (const std::size_t group : {std::size_t{billm_concentrated}, std::size_t{billm_sparse},
                                      std::size_t{billm_salient}}) {
        std::vector<std::int64_t> members;
        for (std::int64_t j = unit * b; j < (unit + 1) * b; ++j) {
          const std::size_t own = run.salient[index(j)] == 1 ? std::size_t{billm_salient}
                                  : run.second[index(row * c.d + j)] == 1
                                      ? std::size_t{billm_sparse}
                                      : std::size_t{billm_concentrated};
          if (own == group) members.push_back(j);
        }
        const float stored_mean = run.means[group][index(row * units + unit)];
        const float stored_scale = run.scales[group][index(row * units + unit)];
        double mean = 0, scale = 0;
        for (const std::int64_t j : members) mean += run.w[index(row * c.d + j)];
        if (!members.empty()) mean /= static_cast<double>(members.size());
        for (const std::int64_t j : members) {
          const double w = run.w[index(row * c.d + j)];
          scale += std::fabs(w - mean);
          EXPECT_EQ(run.first[index(row * c.d + j)], w >= static_cast<double>(stored_mean) ? 1 : 0);
        }
        if (!members.empty()) scale /= static_cast<double>(members.size());
        EXPECT_NEAR(stored_mean, mean, 1e-7);
        EXPECT_NEAR(stored_scale, scale, 1e-7);
      }
    }
  }
}

TEST(BillmSweep, LossCountsWhatTheCodecDecodes) {
  CpuOps ops(2);
  for (const DType scale : {DType::f32, DType::f16, DType::bf16}) {
    BillmCase c = diagonal_case(16, 256);
    c.options.scale_dtype = scale;
    const BillmRun run = run_billm(ops, c);
    ASSERT_TRUE(run.factored);
    for (std::int64_t row = 0; row < c.rows; ++row) {
      double loss = 0;
      for (std::int64_t j = 0; j < c.d; ++j) {
        // U_jj = 1 / R_jj.
        const double e = (static_cast<double>(run.w[index(row * c.d + j)]) -
                          static_cast<double>(run.value(c, row, j))) *
                         run.r[index(j * c.d + j)];
        loss += e * e;
      }
      EXPECT_TRUE(close(run.loss[index(row)], loss, 1e-5)) << run.loss[index(row)] << " " << loss;
    }
    for (std::size_t g = 0; g < billm_groups; ++g) {
      for (std::size_t i = 0; i < run.scales[g].size(); ++i) {
        ASSERT_EQ(run.scales[g][i], round_to(scale, run.scales[g][i]));
        ASSERT_EQ(run.means[g][i], round_to(scale, run.means[g][i]));
        ASSERT_GE(run.scales[g][i], 0.0F);
      }
    }
  }
}

TEST(BillmSweep, ThreadsAndTheScaleOfTheHessianChangeNothing) {
  CpuOps one(1), three(3);
  BillmCase c = make_case(50, 384);
  const BillmRun a = run_billm(one, c), b = run_billm(three, c);
  ASSERT_TRUE(a.factored && b.factored);
  EXPECT_EQ(a.first, b.first);
  EXPECT_EQ(a.second, b.second);
  EXPECT_EQ(a.salient, b.salient);
  EXPECT_EQ(a.scales, b.scales);
  EXPECT_EQ(a.means, b.means);
  EXPECT_EQ(a.loss, b.loss);
  for (float& h : c.h) h *= 4.0F;  // a power of two: every product scales exactly
  const BillmRun scaled = run_billm(one, c);
  ASSERT_TRUE(scaled.factored);
  EXPECT_EQ(a.first, scaled.first);
  EXPECT_EQ(a.second, scaled.second);
  EXPECT_EQ(a.salient, scaled.salient);
  EXPECT_EQ(a.scales, scaled.scales);
}

// Of the two targets the weights' own is the better one for the weights.
TEST(BillmSweep, SearchOnWeightsReconstructsThemBetter) {
  CpuOps ops(2);
  const auto error_of = [&](BillmSearch search) {
    BillmCase c = diagonal_case(64, 384);
    c.options.search = search;
    const BillmRun run = run_billm(ops, c);
    double error = 0, square = 0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      for (std::int64_t j = 0; j < c.d; ++j) {
        const double w = run.w[index(row * c.d + j)];
        error += std::pow(w - static_cast<double>(run.value(c, row, j)), 2);
        square += w * w;
      }
    }
    return error / square;
  };
  const double saliency = error_of(BillmSearch::saliency), weight = error_of(BillmSearch::weight);
  EXPECT_LT(weight, saliency);
  EXPECT_LT(saliency, 0.4);
  EXPECT_GT(weight, 0.02);
}

// ---- through the file ----

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

class BillmModel : public ::testing::Test {
 protected:
  BillmModel() {
    TinyCheckpoint options;
    options.tokenizer = data / "tokenizer.json";
    // A silent input of the first block's attention.
    options.edit = [](const std::string& name, std::vector<float>& values) {
      if (name == "model.layers.0.input_layernorm.weight") values[17] = 0.0F;
    };
    write_tiny_checkpoint(dir_.path() / "m", options);
    source_ = open_checkpoint(dir_.path() / "m");
    tokens_ = {synthetic_tokens(16 * 32, options.config.vocab, 5), 16, 32};
  }
  QuantOutcome quantize(const std::string& options, const std::string& name, bool poison = false) {
    return run_quantize(
        *source_, {.method = "billm", .options = options, .calibration = tokens_, .poison = poison},
        file(name));
  }
  [[nodiscard]] std::filesystem::path file(const std::string& name) const {
    return dir_.path() / (name + ".qw");
  }

  TempDir dir_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

TEST_F(BillmModel, AlgebraHoldsWhatTheSweepFound) {
  for (const std::string options : {"", "--scale-dtype f16 --search weight", "--no-mean"}) {
    SCOPED_TRACE(options);
    quantize(options, "a");
    const PackedFileView view(file("a"));
    const auto packed = open_packed(file("a"));
    const int coefficient_bits = options.find("f16") != std::string::npos ? 16 : 32;
    const int coefficients = options == "--no-mean" ? 4 : 8;
    for (const auto& [name, linear] : view.model().linears) {
      SCOPED_TRACE(name);
      const LinearWeight& w = linear.weight;
      ASSERT_EQ(w.terms.size(), 4U) << scheme_name(w);
      // The three terms of first order cover each weight once, and read one plane of signs.
      EXPECT_EQ(w.terms[0].codes_plane, w.terms[1].codes_plane);
      EXPECT_EQ(w.terms[0].codes_plane, w.terms[2].codes_plane);
      EXPECT_EQ(w.terms[0].support.columns, Select::in);
      EXPECT_EQ(w.terms[1].support.columns, Select::not_in);
      EXPECT_EQ(w.terms[2].support.columns, Select::not_in);
      EXPECT_EQ(w.terms[1].support.bitmap, Select::in);
      EXPECT_EQ(w.terms[2].support.bitmap, Select::not_in);
      EXPECT_EQ(w.terms[1].support.bitmap_plane, w.terms[2].support.bitmap_plane);
      EXPECT_TRUE(w.terms[3].support.compact);
      for (const Term& t : w.terms) {
        EXPECT_EQ(t.kind, TermKind::sign);
        EXPECT_EQ(t.support.columns_plane, w.terms[0].support.columns_plane);
        EXPECT_EQ(t.grid.group, 128);
        EXPECT_EQ(t.mu_plane >= 0, coefficients == 8);
      }
      // Bits: one sign and one group flag a weight, a second sign and an index a salient column,
      // coefficients per row and block.
      const auto rows = static_cast<double>(w.rows), cols = static_cast<double>(w.cols);
      const auto salient = static_cast<double>(w.plane(w.terms[0].support.columns_plane).cols);
      const Json& entry = view.entry(name);
      EXPECT_NEAR(entry["bits_nominal"].get<double>(), 1 + salient / cols, 1e-9);
      EXPECT_NEAR(entry["salient_share"].get<double>(), salient / cols, 1e-9);
      const double residual_bytes = std::ceil(salient / 8) * rows;
      EXPECT_NEAR(entry["bits_stored"].get<double>(),
                  2 + (8 * residual_bytes + 32 * salient) / (rows * cols) +
                      coefficients * coefficient_bits / 128.0,
                  1e-9);
      const bool qkv = name.starts_with("layers.0.self_attn") && !name.ends_with("o_proj");
      EXPECT_EQ(entry["dead_columns"].get<int>(), qkv ? 1 : 0);
    }
    // The path that runs decodes to the same bits as the reference codec.
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      for (const Site s : all_sites) {
        const std::vector<float> decoded = view.decode(linear_name(layer, s));
        EXPECT_TRUE(decoded == load_weight(*packed, layer, s)) << linear_name(layer, s);
        const double error = relative_square_error(decoded, load_weight(*source_, layer, s));
        EXPECT_GT(error, 0.02);
        EXPECT_LT(error, 0.5);
      }
    }
  }
}

// Compares with a sweep of the first linear outside the driver.
TEST_F(BillmModel, FileHoldsTheSweepsWeights) {
  class Capturing final : public Method {
   public:
    explicit Capturing(const ModelConfig& config) : billm_(method_with("billm", "", config)) {}
    [[nodiscard]] const char* name() const override { return "billm"; }
    [[nodiscard]] const char* summary() const override { return ""; }
    void declare_options(CLI::App&) override {}
    void check(const ModelConfig&) const override {}
    [[nodiscard]] Json options() const override { return billm_->options(); }
    [[nodiscard]] Needs needs() const override { return billm_->needs(); }
    std::vector<SiteResult> quantize_group(GroupPass& pass) override {
      if (!pass.dry() && pass.layer == 1 && pass.tap == Tap::attn_in) {
        const std::int64_t d = pass.hessian.cols;
        h.resize(index(d * d));
        for (std::int64_t i = 0; i < d; ++i) {
          for (std::int64_t j = 0; j < d; ++j) {
            h[index(i * d + j)] =
                pass.hessian.host<float>()[std::max(i, j) * pass.hessian.stride + std::min(i, j)];
          }
        }
        // As the method scales the sum, a power of two here.
        for (float& v : h) v *= 2.0F / static_cast<float>(pass.sequences);
      }
      return billm_->quantize_group(pass);
    }
    std::vector<float> h;

   private:
    std::unique_ptr<Method> billm_;
  };
  Capturing method(source_->config());
  run_quantize(*source_, {.method = "", .options = "", .calibration = tokens_}, method, file("a"));
  BillmCase c;
  c.w = load_weight(*source_, 1, Site::q);
  c.h = method.h;
  c.d = source_->config().hidden;
  c.rows = static_cast<std::int64_t>(c.w.size()) / c.d;
  CpuOps ops(2);
  const BillmRun run = run_billm(ops, c);
  ASSERT_TRUE(run.factored);
  const std::vector<float> decoded = PackedFileView(file("a")).decode(linear_name(1, Site::q));
  for (std::int64_t row = 0; row < c.rows; ++row) {
    for (std::int64_t j = 0; j < c.d; ++j) {
      ASSERT_EQ(decoded[index(row * c.d + j)], run.value(c, row, j)) << row << " " << j;
    }
  }
}

TEST_F(BillmModel, RunsRepeat) {
  quantize("--block 64 --max-salient 10 --rest-passes 1", "a");
  quantize("--block 64 --max-salient 10 --rest-passes 1", "b", true);
  const PackedFileView a(file("a")), b(file("b"));
  for (const auto& [name, linear] : a.model().linears) {
    EXPECT_TRUE(a.bytes(name) == b.bytes(name)) << name;
    EXPECT_LE(a.entry(name)["salient_share"].get<double>(), 10.0 / 64);
  }
}

TEST_F(BillmModel, ImpossibleOptionsAreRefused) {
  const auto refuse = [&](const std::string& options, const std::string& part) {
    testing::expect_contains(
        testing::error_of([&] { method_with("billm", options, source_->config()); }), part);
  };
  refuse("--block 1", "--block: expected 2 to 128, found 1");
  refuse("--block 256", "--block: expected 2 to 128, found 256");
  refuse("--block 96", "--block: expected a divisor of");
  refuse("--max-salient 0", "--max-salient: expected a positive number, found 0");
  refuse("--rest-passes 3", "--rest-passes: expected 1 or 2, found 3");
  refuse("--damp 0", "--damp: expected a positive number");
  refuse("--damp-tries 11", "--damp-tries: expected 1 to 10, found 11");
  refuse("--metric size", "--metric: expected hessian|magnitude");
  refuse("--search all", "--search: expected saliency|weight");
}

}  // namespace
}  // namespace engine::test
