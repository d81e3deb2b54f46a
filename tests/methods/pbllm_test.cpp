// What must hold for PB-LLM: the choice of salient weights and the sweep against a direct
// implementation, and whole models through the written file (docs/methods/pbllm.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "engine/model/decoder.h"
#include "engine/ops/cpu_ops.h"
#include "engine/quant/calibration.h"
#include "engine/weight/grid.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/gptq_reference.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

constexpr std::int64_t rows = 24;
constexpr std::int64_t d = 256;

struct PbCase {
  double salient = 0.1;
  std::int64_t group = 0;
  PbllmMetric metric = PbllmMetric::hessian;
  std::int64_t block = 128;
  bool compensate = true;
  DType scale_dtype = DType::f32;
  std::vector<std::int64_t> dead = {};
  int threads = 2;
};

struct PbRun {
  GptqRun solve;  // of GPTQ in 8 bits by row on the same problem: factor, weights, grids, codes
  GptqCase gptq;
  std::vector<std::uint8_t> salient, codes;
  std::vector<float> means, scales, error;
  std::vector<double> loss;
  std::int64_t groups = 1;
  [[nodiscard]] float weight(std::int64_t r, std::int64_t j) const {
    return solve.w[index(r * d + j)];
  }
};

PbRun run_case(const PbCase& c) {
  CpuOps ops(c.threads);
  PbRun out;
  out.gptq.rows = rows;
  out.gptq.d = d;
  out.gptq.w = bell_matrix(rows, d, 401, 0.02F);
  out.gptq.h = test_hessian(d, 402, c.dead);
  out.gptq.grid = {.bits = 8, .group = 0, .scale_dtype = c.scale_dtype};
  out.gptq.block = c.block;
  out.solve = run_gptq(ops, out.gptq);
  out.groups = c.group == 0 ? 1 : d / c.group;
  out.error = out.solve.w;
  out.salient.resize(out.error.size());
  out.codes.resize(out.error.size());
  out.means.resize(index(rows * out.groups));
  out.scales.resize(out.means.size());
  out.loss.resize(index(rows));

  PbllmSelect s;
  s.metric = c.metric;
  s.group = c.group;
  s.low_share = 1.0 - c.salient;
  s.scale_dtype = c.scale_dtype;
  s.w = host_view(out.error.data(), rows, d);
  s.r = host_view(out.solve.r.data(), d, d);
  s.salient = host_view(out.salient.data(), rows, d);
  s.means = host_view(out.means.data(), rows, out.groups);
  s.scales = host_view(out.scales.data(), rows, out.groups);
  std::vector<std::int64_t> counts(index(ops.pbllm_select_bytes(rows, d, out.groups) / 8));
  s.workspace = make_view(counts.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(counts.size()) * 8);
  ops.pbllm_select(s);

  PbllmProblem p;
  p.high = out.gptq.grid;
  p.block = c.block;
  p.compensate = c.compensate;
  p.w = s.w;
  p.r = s.r;
  p.salient = s.salient;
  p.means = s.means;
  p.scales = s.scales;
  p.high_scales = host_view(out.solve.scales.data(), rows, 1);
  p.high_zeros = host_view(out.solve.zeros.data(), rows, 1);
  p.codes = host_view(out.codes.data(), rows, d);
  p.loss = host_view(out.loss.data(), rows, 1);
  std::vector<double> work(index(ops.pbllm_workspace_bytes(rows, d, c.block, DType::f64) / 8 + 1));
  p.workspace = make_view(work.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(work.size()) * 8);
  ops.pbllm_sweep(p);
  return out;
}

// The value that a code stands for.
float value_of(const PbRun& run, std::int64_t r, std::int64_t j) {
  const std::size_t at = index(r * d + j);
  if (run.salient[at] != 0) {
    return dequantize_value(run.codes[at], {run.solve.scales[index(r)], run.solve.zeros[index(r)]},
                            run.gptq.grid);
  }
  const std::size_t unit = index(r * run.groups + j / (d / run.groups));
  return run.means[unit] + (run.codes[at] == 1 ? run.scales[unit] : -run.scales[unit]);
}

// The card's steps in double and plain loops, with the factor of the inverse.
struct PbReference {
  std::vector<std::uint8_t> salient, codes;
  std::vector<double> means, scales;
  std::vector<double> values;
};

PbReference reference(const PbCase& c, const PbRun& run) {
  const Matrix lower =
      cholesky_lower(inverse_from_cholesky(cholesky_lower(run.solve.damped, d), d), d);
  const auto u = [&](std::int64_t i, std::int64_t k) { return lower[index(k * d + i)]; };
  PbReference out;
  out.salient.resize(index(rows * d));
  out.codes.resize(out.salient.size());
  out.values.resize(out.salient.size());
  out.means.resize(run.means.size());
  out.scales.resize(run.means.size());
  const std::int64_t width = d / run.groups;
  for (std::int64_t g = 0; g < run.groups; ++g) {
    const auto score = [&](std::int64_t r, std::int64_t j) {
      const double w = run.weight(r, j);
      return c.metric == PbllmMetric::magnitude ? std::fabs(w) : w * w / (u(j, j) * u(j, j));
    };
    std::vector<double> sorted;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = g * width; j < (g + 1) * width; ++j) sorted.push_back(score(r, j));
    }
    std::sort(sorted.begin(), sorted.end());
    const double threshold =
        sorted[static_cast<std::size_t>(static_cast<double>(rows * width) * (1.0 - c.salient))];
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = 0, distance = 0;
      for (std::int64_t j = g * width; j < (g + 1) * width; ++j) {
        out.salient[index(r * d + j)] = score(r, j) > threshold * (1 + 1e-6) ? 1 : 0;
        if (out.salient[index(r * d + j)] == 0) sum += run.weight(r, j);
      }
      const double mean = sum / static_cast<double>(width);
      for (std::int64_t j = g * width; j < (g + 1) * width; ++j) {
        const bool high = out.salient[index(r * d + j)] != 0;
        distance += high ? std::fabs(mean) : std::fabs(run.weight(r, j) - mean);
      }
      out.means[index(r * run.groups + g)] = mean;
      out.scales[index(r * run.groups + g)] = distance / static_cast<double>(width);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<double> w(index(d));
    for (std::int64_t j = 0; j < d; ++j) w[index(j)] = run.weight(r, j);
    const UnitGrid grid{run.solve.scales[index(r)], run.solve.zeros[index(r)]};
    for (std::int64_t j = 0; j < d; ++j) {
      const std::size_t at = index(r * d + j), unit = index(r * run.groups + j / width);
      if (out.salient[at] != 0) {
        out.codes[at] = quantize_value(static_cast<float>(w[index(j)]), grid, run.gptq.grid);
        out.values[at] = dequantize_value(out.codes[at], grid, run.gptq.grid);
      } else {
        out.codes[at] = w[index(j)] >= out.means[unit] ? 1 : 0;
        out.values[at] = out.means[unit] + (out.codes[at] == 1 ? 1 : -1) * out.scales[unit];
      }
      const double err = (w[index(j)] - out.values[at]) / u(j, j);
      for (std::int64_t k = j + 1; k < d && c.compensate; ++k) w[index(k)] -= err * u(j, k);
    }
  }
  return out;
}

const std::vector<PbCase>& cases() {
  static const std::vector<PbCase> all = {
      {},
      {.salient = 1.0 / 7},
      {.salient = 0.1, .group = 128},
      {.salient = 0.37, .group = 64, .metric = PbllmMetric::magnitude},
      {.salient = 0.01, .group = 32, .block = 64},
      {.salient = 0.5, .dead = {3, 100, 255}},
      {.salient = 0.1, .metric = PbllmMetric::magnitude, .compensate = false},
  };
  return all;
}

TEST(Pbllm, EqualsADirectImplementation) {
  for (std::size_t i = 0; i < cases().size(); ++i) {
    SCOPED_TRACE(i);
    const PbRun run = run_case(cases()[i]);
    ASSERT_TRUE(run.solve.factored);
    const PbReference expected = reference(cases()[i], run);
    EXPECT_TRUE(run.salient == expected.salient);
    for (std::size_t k = 0; k < expected.means.size(); ++k) {
      EXPECT_NEAR(run.means[k], expected.means[k], 1e-8) << k;
      EXPECT_TRUE(close(run.scales[k], expected.scales[k], 1e-5)) << k;
    }
    // A weight next to a boundary may fall on its other side, and with it some after it.
    EXPECT_LT(differing(run.codes, expected.codes), 0.002);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t j = 0; j < d; ++j) {
        const std::size_t at = index(r * d + j);
        EXPECT_EQ(run.error[at], value_of(run, r, j) - run.weight(r, j)) << r << ", " << j;
      }
    }
  }
}

TEST(Pbllm, BinarizedShareIsTheOrderStatistics) {
  for (const std::int64_t group : {std::int64_t{0}, std::int64_t{128}, std::int64_t{32}}) {
    for (const double share : {0.001, 0.1, 1.0 / 7, 0.5, 0.999, 1.0}) {
      const PbRun run = run_case({.salient = share, .group = group});
      const std::int64_t width = d / run.groups;
      for (std::int64_t g = 0; g < run.groups; ++g) {
        std::int64_t low = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t j = g * width; j < (g + 1) * width; ++j) {
            low += run.salient[index(r * d + j)] == 0 ? 1 : 0;
          }
        }
        EXPECT_EQ(low,
                  static_cast<std::int64_t>(static_cast<double>(rows * width) * (1.0 - share)) + 1);
      }
    }
  }
}

// With everything but one weight salient this is GPTQ in 8 bits by row.
TEST(Pbllm, AllSalientIsGptqByRow) {
  const PbRun run = run_case({.salient = 1.0});
  const auto lows = std::count(run.salient.begin(), run.salient.end(), std::uint8_t{0});
  ASSERT_EQ(lows, 1);
  std::int64_t equal = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto begin = r * d, end = begin + d;
    if (std::count(run.salient.begin() + begin, run.salient.begin() + end, 0) > 0) continue;
    EXPECT_TRUE(std::equal(run.codes.begin() + begin, run.codes.begin() + end,
                           run.solve.codes.begin() + begin))
        << r;
    ++equal;
  }
  EXPECT_EQ(equal, rows - 1);
}

TEST(Pbllm, LossIsTheQuadraticForm) {
  for (const PbCase& c : {PbCase{}, PbCase{.salient = 0.3, .group = 64, .block = 32}}) {
    const PbRun run = run_case(c);
    for (std::int64_t r = 0; r < rows; ++r) {
      const double expected = quadratic_loss(run.error.data() + r * d, run.solve.damped, d);
      EXPECT_TRUE(close(run.loss[index(r)], expected, 1e-3)) << r;
    }
  }
}

// What the compensation is for: on correlated inputs it loses less than rounding alone.
TEST(Pbllm, CompensationLowersTheLoss) {
  const PbRun with = run_case({}), without = run_case({.compensate = false});
  EXPECT_TRUE(with.salient == without.salient);
  const auto loss = [](const PbRun& run) {
    double sum = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      sum += quadratic_loss(run.error.data() + r * d, run.solve.damped, d);
    }
    return sum;
  };
  EXPECT_LT(loss(with), 0.8 * loss(without));
}

TEST(Pbllm, DeadColumnsAreBinarized) {
  const std::vector<std::int64_t> dead = {3, 100, 255};
  const PbRun run = run_case({.salient = 0.5, .dead = dead});
  for (std::int64_t r = 0; r < rows; ++r) {
    const float mean = run.means[index(r)];
    for (const std::int64_t j : dead) {
      EXPECT_EQ(run.salient[index(r * d + j)], 0);
      EXPECT_EQ(value_of(run, r, j),
                mean + (mean > 0 ? -run.scales[index(r)] : run.scales[index(r)]));
    }
  }
}

// The salient weights count as zeros in both averages.
TEST(Pbllm, LevelsByHand) {
  CpuOps ops(1);
  std::vector<float> w = {1.0F, -2.0F, 8.0F, 5.0F};
  std::vector<std::uint8_t> salient(4);
  std::vector<float> mean(1), scale(1);
  std::vector<std::int64_t> counts(256);
  PbllmSelect s;
  s.metric = PbllmMetric::magnitude;
  s.low_share = 0.5;  // place 2 of 1 2 5 8
  s.w = host_view(w.data(), 1, 4);
  s.salient = host_view(salient.data(), 1, 4);
  s.means = host_view(mean.data(), 1, 1);
  s.scales = host_view(scale.data(), 1, 1);
  s.workspace = make_view(counts.data(), DType::u8, DeviceKind::cpu, 1, 2048);
  ops.pbllm_select(s);
  EXPECT_EQ(salient, (std::vector<std::uint8_t>{0, 0, 1, 0}));
  EXPECT_EQ(mean[0], 1.0F);   // (1 - 2 + 5) / 4
  EXPECT_EQ(scale[0], 2.0F);  // (0 + 3 + 4 + 1) / 4
  // Ties at the threshold are binarized, here all of them.
  w = {3.0F, -3.0F, 3.0F, 3.0F};
  ops.pbllm_select(s);
  EXPECT_EQ(salient, (std::vector<std::uint8_t>{0, 0, 0, 0}));
  s.low_share = 1.0;  // would index past the end
  EXPECT_THROW(ops.pbllm_select(s), Error);
}

TEST(Pbllm, ThreadsAndBlocksDoNotMatter) {
  const PbRun one = run_case({.group = 64, .threads = 1});
  const PbRun many = run_case({.group = 64, .threads = 5});
  EXPECT_TRUE(one.salient == many.salient);
  EXPECT_TRUE(one.codes == many.codes);
  EXPECT_TRUE(one.loss == many.loss);
  const PbRun blocks = run_case({.group = 64, .block = 48});
  EXPECT_TRUE(one.salient == blocks.salient);
  EXPECT_LT(differing(one.codes, blocks.codes), 0.002);
}

TEST(Pbllm, CoefficientsAreRoundedBeforeUse) {
  const PbRun run = run_case({.group = 64, .scale_dtype = DType::f16});
  for (const std::vector<float>* v : {&run.means, &run.scales}) {
    for (const float x : *v) EXPECT_EQ(x, round_to(DType::f16, x));
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    EXPECT_EQ(run.error[index(r * d)], value_of(run, r, 0) - run.weight(r, 0));
  }
}

class PbllmModelTest : public ::testing::Test {
 protected:
  PbllmModelTest() {
    TinyCheckpoint options;
    options.tokenizer = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3/tokenizer.json";
    tensors_ = write_tiny_checkpoint(dir_.path() / "model", options);
    source_ = open_checkpoint(dir_.path() / "model");
    tokens_ = {synthetic_tokens(4 * 64, source_->config().vocab, 3), 4, 64};
  }
  QuantOutcome quantize(const std::string& options) {
    return run_quantize(
        *source_, {.method = "pbllm", .options = options, .calibration = tokens_, .poison = true},
        file());
  }
  [[nodiscard]] std::filesystem::path file() const { return dir_.path() / "a.qw"; }

  TempDir dir_;
  NamedTensors tensors_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

struct FileCase {
  const char* options;
  double share;
  std::int64_t group;
  std::int64_t coefficient;  // bytes
  int high_bits;
};

TEST_F(PbllmModelTest, FileDecodesAndTakesTheBitsItSays) {
  for (const FileCase& c :
       {FileCase{"", 0.1, 0, 4, 8},
        FileCase{"--bits 2 --group 128 --scale-dtype f16", 1.0 / 7, 128, 2, 8},
        FileCase{"--salient 0.3 --high-bits 5 --group 64 --metric magnitude", 0.3, 64, 4, 5},
        FileCase{"--no-compensation --bits 1.05 --scale-dtype bf16", (1.05 - 1.0) / 7, 0, 2, 8}}) {
    SCOPED_TRACE(c.options);
    quantize(c.options);
    const PackedFileView view(file());
    const auto packed = open_packed(file());
    for (const Site site : all_sites) {
      const std::string name = linear_name(1, site);
      SCOPED_TRACE(name);
      const std::vector<float> expected = view.decode(name);
      const std::vector<float> found = load_weight(*packed, 1, site);
      const Comparison same = compare_bytes(std::as_bytes(std::span(found)),
                                            std::as_bytes(std::span(expected)), sizeof(float));
      EXPECT_TRUE(same) << same.message;
      const double error = relative_square_error(found, tensors_.at("model." + name + ".weight"));
      EXPECT_LT(error, 1.0);
      EXPECT_TRUE(test::close(error, view.entry(name)["relative_error"].get<double>(), 1e-5));

      const SiteShape shape = site_shape(source_->config(), site);
      const std::int64_t n = shape.rows * shape.cols;
      const std::int64_t groups = c.group == 0 ? 1 : shape.cols / c.group;
      const PackedLinear& linear = view.model().linears.at(name);
      const int bitmap = linear.weight.terms.at(0).support.bitmap_plane;
      ASSERT_GE(bitmap, 0);
      const std::vector<std::byte> bits = view.plane(linear.planes.at(index(bitmap)));
      std::int64_t low = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        low += bitmap_test(bits, static_cast<std::uint64_t>(i)) ? 0 : 1;
      }
      // The order statistic of each group is binarized and its ties are, of which bf16 has some.
      const std::int64_t least =
          groups *
          (static_cast<std::int64_t>(static_cast<double>(n / groups) * (1.0 - c.share)) + 1);
      EXPECT_GE(low, least);
      EXPECT_LE(low, least + n / 50);
      EXPECT_DOUBLE_EQ(
          view.entry(name)["bits_nominal"].get<double>(),
          1.0 + (c.high_bits - 1) * static_cast<double>(n - low) / static_cast<double>(n));
      const std::int64_t bytes =
          shape.rows * ((shape.cols + 7) / 8) + (low + 7) / 8 + ((n - low) * c.high_bits + 7) / 8 +
          shape.rows * groups * 2 * c.coefficient + shape.rows * (c.coefficient + 1);
      EXPECT_EQ(view.entry(name)["bytes_stored"].get<std::int64_t>(), bytes);
      EXPECT_DOUBLE_EQ(view.entry(name)["bits_stored"].get<double>(),
                       8.0 * static_cast<double>(bytes) / static_cast<double>(n));
      // Two values per row and group off the mask.
      const std::int64_t width = shape.cols / groups;
      for (std::int64_t unit = 0; unit < shape.rows * groups; ++unit) {
        std::set<float> levels;
        for (std::int64_t i = unit * width; i < (unit + 1) * width; ++i) {
          if (!bitmap_test(bits, static_cast<std::uint64_t>(i))) levels.insert(expected[index(i)]);
        }
        EXPECT_LE(levels.size(), 2U) << unit;
      }
    }
  }
}

TEST_F(PbllmModelTest, LoadsDecodedAndRefusesPackedKernels) {
  quantize("--bits 1.7 --group 64");
  const auto packed = open_packed(file());
  const double perplexity = perplexity_of(*packed, tokens_);
  EXPECT_TRUE(std::isfinite(perplexity));
  Ledger ledger;
  CpuOps ops(1);
  const Decoder decoder(*packed, ops, ledger, {.capacity = 4, .exec = Exec::decoded});
  try {
    require_packed(*packed);
    ADD_FAILURE() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::usage);
    EXPECT_NE(std::string(e.what()).find("no packed kernel for the scheme sign"), std::string::npos)
        << e.what();
    EXPECT_NE(std::string(e.what()).find("--exec decoded"), std::string::npos) << e.what();
  }
}

TEST_F(PbllmModelTest, ImpossibleOptionsAreErrors) {
  for (const char* options :
       {"--bits 1", "--bits 8.5", "--bits 0.9", "--bits nan", "--salient 0", "--salient 1.01",
        "--salient=-0.5", "--high-bits 1", "--high-bits 9", "--bits 4 --high-bits 3", "--group 100",
        "--group=-1", "--block 0", "--block 129", "--damp 0", "--salient 1e-17",
        "--bits 1.0000000000000002"}) {
    EXPECT_THROW(static_cast<void>(method_with("pbllm", options, source_->config())), Error)
        << options;
  }
  EXPECT_THROW(static_cast<void>(method_with("pbllm", "--bits 2 --salient 0.1", source_->config())),
               CLI::ParseError);
  const Json j = method_with("pbllm", "--bits 2", source_->config())->options();
  EXPECT_DOUBLE_EQ(j["salient"].get<double>(), 1.0 / 7);
  EXPECT_DOUBLE_EQ(
      method_with("pbllm", "--salient 0.1", source_->config())->options()["bits"].get<double>(),
      1.7);
}

}  // namespace
}  // namespace engine::test
