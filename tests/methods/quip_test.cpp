// What must hold for QuIP: sweep and greedy passes against direct implementations, the properties
// that the method rests on, and whole models through the written file (docs/methods/quip.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/transform_view.h"
#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/gptq_reference.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

// One sweep: targets in units of codes and a moment, columns in solving order.
struct LdlqCase {
  int bits = 2;
  std::int64_t rows = 24;
  std::int64_t d = 300;
  float spread = 1.0F;  // standard deviation of the targets around the middle, in codes
  DType factor = DType::f64;
  int threads = 2;
};

struct LdlqRun {
  std::vector<float> targets, error;
  std::vector<double> damped, r;  // [d, d]
  std::vector<std::uint8_t> codes;
  std::vector<double> loss;
};

LdlqRun run_ldlq(Ops& ops, int bits, std::vector<float> targets, const std::vector<double>& r,
                 std::int64_t d, DType factor = DType::f64) {
  LdlqRun out;
  const auto rows = static_cast<std::int64_t>(targets.size()) / d;
  out.targets = targets;
  out.error = std::move(targets);
  out.r = r;
  out.codes.resize(out.error.size());
  out.loss.resize(index(rows));
  const std::vector<float> narrow(r.begin(), r.end());
  LdlqProblem p;
  p.bits = bits;
  p.w = host_view(out.error.data(), rows, d);
  p.r = factor == DType::f64 ? host_view(r.data(), d, d) : host_view(narrow.data(), d, d);
  p.codes = host_view(out.codes.data(), rows, d);
  p.loss = host_view(out.loss.data(), rows, 1);
  std::vector<double> work(index(ops.ldlq_workspace_bytes(rows, d) / 8 + 1));
  p.workspace = make_view(work.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(work.size()) * 8);
  ops.ldlq_sweep(p);
  return out;
}

LdlqRun run_case(const LdlqCase& c) {
  CpuOps ops(c.threads);
  GptqCase g;  // for its factor
  g.rows = 1;
  g.d = c.d;
  g.w = bell_matrix(1, c.d, 5);
  g.h = test_hessian(c.d, 11);
  g.grid = {.bits = 8, .group = 0};
  const GptqRun solve = run_gptq(ops, g);
  EXPECT_TRUE(solve.factored);
  const auto top = static_cast<float>((1 << c.bits) - 1);
  std::vector<float> targets = bell_matrix(c.rows, c.d, 12, c.spread);
  for (float& t : targets) t = std::clamp(t + top / 2, 0.0F, top);
  LdlqRun out = run_ldlq(ops, c.bits, std::move(targets), solve.r, c.d, c.factor);
  out.damped = solve.damped;
  return out;
}

// The card's line in double, from the Cholesky factor of the matrix itself: columns n - 1 down to 0
// of the reversed problem, H = C C^T, feedback by C diag(1 / C_jj) - I.
std::vector<std::uint8_t> ldlq_reference(const LdlqRun& run, int bits, std::int64_t d) {
  Matrix reversed(index(d * d));
  for (std::int64_t i = 0; i < d * d; ++i) reversed[index(i)] = run.damped[index(d * d - 1 - i)];
  const Matrix c = cholesky_lower(reversed, d);
  const double top = (1 << bits) - 1;
  std::vector<std::uint8_t> codes(run.codes.size());
  const auto rows = static_cast<std::int64_t>(run.codes.size()) / d;
  std::vector<double> error(index(d));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = d - 1; i >= 0; --i) {
      const std::size_t at = index(row * d + d - 1 - i);
      double value = run.targets[at];
      for (std::int64_t k = i + 1; k < d; ++k) {
        value += error[index(k)] * c[index(k * d + i)] / c[index(i * d + i)];
      }
      const double code = std::clamp(std::floor(value + 0.5), 0.0, top);
      error[index(i)] = static_cast<double>(run.targets[at]) - code;
      codes[at] = static_cast<std::uint8_t>(code);
    }
  }
  return codes;
}

TEST(Quip, SweepEqualsADirectImplementation) {
  for (const LdlqCase& c : {LdlqCase{}, LdlqCase{.bits = 4, .rows = 7, .d = 129, .spread = 4.0F},
                            LdlqCase{.bits = 3, .rows = 9, .d = 128, .factor = DType::f32},
                            LdlqCase{.bits = 8, .rows = 3, .d = 1, .spread = 40.0F}}) {
    SCOPED_TRACE(c.d);
    const LdlqRun run = run_case(c);
    // A value next to a boundary may fall on its other side, and with it some after it.
    EXPECT_LT(differing(run.codes, ldlq_reference(run, c.bits, c.d)), 0.002);
    for (std::size_t i = 0; i < run.codes.size(); ++i) {
      ASSERT_EQ(run.error[i], static_cast<float>(run.codes[i]) - run.targets[i]) << i;
    }
  }
}

TEST(Quip, LossIsTheQuadraticForm) {
  const LdlqRun run = run_case({.bits = 3, .spread = 2.0F});
  for (std::size_t r = 0; r < run.loss.size(); ++r) {
    EXPECT_TRUE(
        close(run.loss[r], quadratic_loss(run.error.data() + r * 300, run.damped, 300), 1e-4))
        << r;
  }
}

TEST(Quip, TiesGoUp) {
  CpuOps ops(1);
  const LdlqRun run = run_ldlq(ops, 2, {0.5F, 1.5F, 2.5F, 2.4999F}, {1, 0, 0, 1}, 2);
  EXPECT_EQ(run.codes, (std::vector<std::uint8_t>{1, 2, 3, 2}));
}

TEST(Quip, ThreadsDoNotMatter) {
  const LdlqRun one = run_case({.threads = 1}), many = run_case({.threads = 5});
  EXPECT_TRUE(one.codes == many.codes);
  EXPECT_TRUE(one.loss == many.loss);
}

// On a grid that is fixed beforehand this is GPTQ, whose own direct implementation goes through the
// inverse of H, in the same solving order.
TEST(Quip, SweepIsGptqOnAFixedGrid) {
  CpuOps ops(2);
  for (const int bits : {2, 3, 4}) {
    SCOPED_TRACE(bits);
    GptqCase g;
    g.rows = 24;
    g.d = 256;
    g.w = bell_matrix(g.rows, g.d, 21, 0.02F);
    g.h = test_hessian(g.d, 22);
    g.grid = {.bits = bits, .group = 0};
    const GptqRun gptq = run_gptq(ops, g);
    ASSERT_TRUE(gptq.factored);
    // Not code_targets: it clamps before the sweep, which GPTQ does not.
    std::vector<float> targets(gptq.w.size());
    for (std::size_t i = 0; i < targets.size(); ++i) {
      const std::size_t row = i / index(g.d);
      targets[i] = gptq.w[i] / gptq.scales[row] + static_cast<float>(gptq.zeros[row]);
    }
    const LdlqRun run = run_ldlq(ops, bits, targets, gptq.r, g.d);
    EXPECT_LT(differing(run.codes, gptq.codes), 0.002);
    EXPECT_LT(differing(run.codes, gptq_reference(g, gptq).codes), 0.002);
  }
}

// Where nothing clamps, rounding errors are uniform and independent: a loss of tr(D) / 12 a row
// with feedback, D the squared diagonal of the factor, and of tr(H) / 12 without.
TEST(Quip, FeedbackLowersTheLossAsPredicted) {
  const std::int64_t d = 300, rows = 200;
  const LdlqRun run = run_case({.bits = 8, .rows = rows, .d = d, .spread = 12.0F});
  double traces[2] = {0, 0};
  for (std::int64_t j = 0; j < d; ++j) {
    traces[0] += run.r[index(j * d + j)] * run.r[index(j * d + j)] / 12;
    traces[1] += run.damped[index(j * d + j)] / 12;
  }
  double nearest = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<float> e(index(d));
    for (std::int64_t j = 0; j < d; ++j) {
      const float t = run.targets[index(r * d + j)];
      e[index(j)] = std::floor(t + 0.5F) - t;
    }
    nearest += quadratic_loss(e.data(), run.damped, d);
  }
  EXPECT_NEAR(total(run.loss) / static_cast<double>(rows), traces[0], 0.05 * traces[0]);
  EXPECT_NEAR(nearest / static_cast<double>(rows), traces[1], 0.15 * traces[1]);
  EXPECT_LT(traces[0], 0.7 * traces[1]);
}

// Normal values on the tensor's grid of 2.4 root mean squares, each rounded by itself.
TEST(Quip, GaussianErrorOfTheGrids) {
  CpuOps ops(2);
  const std::int64_t d = 512, rows = 1024;
  // Sums of uniforms are not normal enough in their tails: Box and Muller's method.
  std::vector<float> w(index(rows * d));
  for (std::size_t i = 0; i < w.size(); i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(uniform_value(31, 0, i) + 0x1p-33));
    const double angle = 6.283185307179586 * uniform_value(31, 1, i);
    w[i] = static_cast<float>(radius * std::cos(angle));
    w[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  std::vector<std::int32_t> order(index(d));
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> identity(index(d * d), 0.0);
  for (std::int64_t j = 0; j < d; ++j) identity[index(j * d + j)] = 1.0;
  for (const auto& [bits, expected] :
       {std::pair{2, 0.2146}, std::pair{3, 0.0419}, std::pair{4, 0.01173}}) {
    const auto top = static_cast<float>((1 << bits) - 1);
    const float scale = 2 * 2.4F / top;
    std::vector<float> targets(w.size());
    ops.code_targets(host_view(w.data(), rows, d), host_view(order.data(), 1, d),
                     host_view(&scale, 1, 1), View{}, bits, host_view(targets.data(), rows, d));
    const LdlqRun run = run_ldlq(ops, bits, targets, identity, d);
    double sum = 0;
    for (std::size_t i = 0; i < w.size(); ++i) {
      const double e = scale * (static_cast<float>(run.codes[i]) - top / 2) - w[i];
      sum += e * e;
    }
    EXPECT_NEAR(sum / static_cast<double>(w.size()), expected, 0.02 * expected) << bits;
  }
}

struct GreedyRun {
  std::vector<float> e;
  std::vector<std::uint8_t> codes;
  std::vector<std::int32_t> changed;
};

GreedyRun run_greedy(const LdlqRun& from, int bits, std::int64_t d) {
  CpuOps ops(2);
  const auto rows = static_cast<std::int64_t>(from.codes.size()) / d;
  GreedyRun out{from.error, from.codes, std::vector<std::int32_t>(index(rows), -1)};
  const std::vector<float> h(from.damped.begin(), from.damped.end());
  std::vector<double> work(index(ops.greedy_workspace_bytes(rows, d) / 8 + 1));
  GreedyProblem p;
  p.bits = bits;
  p.e = host_view(out.e.data(), rows, d);
  p.h = host_view(h.data(), d, d);
  p.codes = host_view(out.codes.data(), rows, d);
  p.changed = host_view(out.changed.data(), rows, 1);
  p.workspace = make_view(work.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(work.size()) * 8);
  ops.ldlq_greedy(p);
  return out;
}

TEST(Quip, GreedyPassEqualsADirectImplementation) {
  const std::int64_t d = 300;
  for (const int bits : {2, 4}) {
    const LdlqRun start = run_case({.bits = bits, .spread = bits == 2 ? 1.0F : 3.0F});
    const GreedyRun run = run_greedy(start, bits, d);
    const double top = (1 << bits) - 1;
    std::vector<std::uint8_t> codes(start.codes);
    for (std::int64_t r = 0; r < 24; ++r) {
      std::vector<double> e(start.error.begin() + r * d, start.error.begin() + (r + 1) * d);
      std::int32_t changed = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        double product = 0;
        for (std::int64_t k = 0; k < d; ++k)
          product += e[index(k)] * start.damped[index(k * d + j)];
        std::uint8_t& code = codes[index(r * d + j)];
        const double step = code - std::nearbyint(code - product / start.damped[index(j * d + j)]);
        e[index(j)] -= step;
        const auto after = static_cast<std::uint8_t>(std::clamp(code - step, 0.0, top));
        changed += after == code ? 0 : 1;
        code = after;
      }
      if (std::equal(codes.begin() + r * d, codes.begin() + (r + 1) * d,
                     run.codes.begin() + r * d)) {
        EXPECT_EQ(run.changed[index(r)], changed) << r;
        EXPECT_LT(quadratic_loss(run.e.data() + r * d, start.damped, d),
                  start.loss[index(r)] * 1.0001);
      }
    }
    EXPECT_LT(differing(run.codes, codes), 0.004);
    EXPECT_GT(*std::max_element(run.changed.begin(), run.changed.end()), 0);
  }
}

// ||W||, tr H and the proxy loss do not depend on the basis, and what was rotated comes back.
TEST(Quip, BasesAreEqual) {
  CpuOps ops(2);
  const std::int64_t m = 48, n = 224;
  for (const bool shared : {false, true}) {
    Ledger ledger;
    Arena arena(host_memory(), ledger, 64 << 20);
    Transform t;
    t.kind = TransformKind::butterfly;
    t.seed = 5;
    t.shared = shared;
    const TransformView right = make_transform_view(ops, arena, MemTag::solver, t, {}, n, 1);
    t.stream = 1;
    const TransformView left = make_transform_view(ops, arena, MemTag::solver, t, {}, m, 1);
    const std::vector<float> w = bell_matrix(m, n, 61), h = test_hessian(n, 62);
    std::vector<float> wr(w), wt(w.size()), hr(h), ht(h.size());
    const View a = host_view(wr.data(), m, n), b = host_view(wt.data(), n, m);
    ops.transform_rows(a, right, false, a);
    ops.transpose(a, b);
    ops.transform_rows(b, left, false, b);
    ops.transpose(b, a);
    const View c = host_view(hr.data(), n, n), e = host_view(ht.data(), n, n);
    ops.transform_rows(c, right, false, c);
    ops.transpose(c, e);
    ops.transform_rows(e, right, false, e);
    const auto measure = [&](const std::vector<float>& v, const std::vector<float>& moment) {
      const std::vector<double> wide(moment.begin(), moment.end());
      std::vector<double> out(3, 0.0);
      for (const float x : v) out[0] += static_cast<double>(x) * static_cast<double>(x);
      for (std::int64_t j = 0; j < n; ++j) out[1] += wide[index(j * n + j)];
      for (std::int64_t r = 0; r < m; ++r) out[2] += quadratic_loss(v.data() + r * n, wide, n);
      return out;
    };
    const std::vector<double> before = measure(w, h), after = measure(wr, ht);
    for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(close(after[i], before[i], 1e-5)) << i;
    EXPECT_GT(differing(wr, w), 0.99);
    ops.transform_rows(a, right, true, a);
    ops.transpose(a, b);
    ops.transform_rows(b, left, true, b);
    ops.transpose(b, a);
    for (std::size_t i = 0; i < w.size(); ++i) ASSERT_NEAR(wr[i], w[i], 1e-5) << i;
  }
}

TEST(Quip, SmallOpsByHand) {
  CpuOps ops(1);
  std::vector<float> w = {1, 2, -3, 4, 0.5F, 1};
  std::vector<double> sums(3);
  ops.column_squares(host_view(w.data(), 2, 3), host_view(sums.data(), 1, 3));
  EXPECT_EQ(sums, (std::vector<double>{17, 4.25, 10}));

  const float nan = std::nanf("");
  std::vector<float> h = {1, nan, 2, 8}, s = {2, 0.5F}, out(4);
  ops.scale_moment(host_view(h.data(), 2, 2), host_view(s.data(), 1, 2), 3.0,
                   host_view(out.data(), 2, 2));
  EXPECT_EQ(out, (std::vector<float>{12, 6, 6, 6}));
  ops.scale_moment(host_view(h.data(), 2, 2), View{}, 1.0, host_view(out.data(), 2, 2));
  EXPECT_EQ(out, (std::vector<float>{1, 2, 2, 8}));

  std::vector<std::int32_t> perm = {2, 1, 0}, zeros = {1, 2};
  std::vector<float> scale = {2, 0.5F}, targets(6);
  ops.code_targets(host_view(w.data(), 2, 3), host_view(perm.data(), 1, 3),
                   host_view(scale.data(), 1, 1), View{}, 2, host_view(targets.data(), 2, 3));
  EXPECT_EQ(targets, (std::vector<float>{0, 2.5F, 2, 2, 1.75F, 3}));
  ops.code_targets(host_view(w.data(), 2, 3), host_view(perm.data(), 1, 3),
                   host_view(scale.data(), 2, 1), host_view(zeros.data(), 2, 1), 2,
                   host_view(targets.data(), 2, 3));
  EXPECT_EQ(targets, (std::vector<float>{0, 2, 1.5F, 3, 3, 3}));
}

class QuipModelTest : public ::testing::Test {
 protected:
  QuipModelTest() {
    TinyCheckpoint options;
    options.tokenizer = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3/tokenizer.json";
    tensors_ = write_tiny_checkpoint(dir_.path() / "model", options);
    source_ = open_checkpoint(dir_.path() / "model");
    tokens_ = {synthetic_tokens(4 * 64, source_->config().vocab, 3), 4, 64};
  }
  // The run fails if it takes other memory than planned; what is never written is NaN.
  QuantOutcome quantize(const std::string& options, const char* name = "a.qw") {
    return run_quantize(
        *source_, {.method = "quip", .options = options, .calibration = tokens_, .poison = true},
        file(name));
  }
  [[nodiscard]] std::filesystem::path file(const char* name = "a.qw") const {
    return dir_.path() / name;
  }

  TempDir dir_;
  NamedTensors tensors_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

TEST_F(QuipModelTest, FileDecodesAndTakesTheBitsItSays) {
  struct Case {
    const char* options;
    int bits;
    std::int64_t diagonal;  // bytes of an element
    bool rows;              // a scale and a zero for each
    double error;           // relative and squared, at most
  };
  for (const Case& c :
       {Case{"--bits 4", 4, 2, false, 0.03},
        Case{"--bits 8 --transform kronecker", 8, 2, false, 0.01},
        Case{"--bits 3 --transform plain-butterfly --diagonal-dtype f32", 3, 4, false, 0.12},
        Case{"--bits 2 --order ldlqRG --passes 3", 2, 2, false, 0.7},
        Case{"--bits 4 --transform none --no-rescale --grid row", 4, 0, true, 0.06},
        Case{"--bits 4 --transform none --factor f32", 4, 2, false, 0.05}}) {
    SCOPED_TRACE(c.options);
    quantize(c.options);
    const PackedFileView view(file());
    const auto packed = open_packed(file());
    for (const Site site : all_sites) {
      const std::string name = linear_name(1, site);
      SCOPED_TRACE(name);
      const std::vector<float> expected = view.decode(name);
      const std::vector<float> found = load_weight(*packed, 1, site);
      EXPECT_LT(relative_square_error(found, expected), 1e-10);
      const double error = relative_square_error(found, tensors_.at("model." + name + ".weight"));
      EXPECT_LT(error, c.error);
      EXPECT_GT(error, 0);
      const SiteShape shape = site_shape(source_->config(), site);
      std::int64_t bytes = shape.rows * ((shape.cols * c.bits + 7) / 8) + shape.cols * c.diagonal;
      bytes += c.rows ? shape.rows * 5 : 4;
      EXPECT_EQ(view.entry(name)["bytes_stored"].get<std::int64_t>(), bytes);
      EXPECT_EQ(view.entry(name)["bits_nominal"].get<double>(), c.bits);
      const bool passes = std::string(c.options).find("--passes") != std::string::npos;
      EXPECT_EQ(view.entry(name).contains("sweep_loss"), passes);
      EXPECT_EQ(view.entry(name).contains("loss"), !passes);
    }
  }
}

TEST_F(QuipModelTest, SeedsGiveOtherRotationsAndRunsRepeat) {
  quantize("--bits 2 --transform-seed 1", "a.qw");
  quantize("--bits 2 --transform-seed 1", "b.qw");
  quantize("--bits 2 --transform-seed 2", "c.qw");
  const PackedFileView a(file("a.qw")), b(file("b.qw")), c(file("c.qw"));
  const std::string name = linear_name(0, Site::q);
  EXPECT_TRUE(a.bytes(name) == b.bytes(name));
  EXPECT_FALSE(a.bytes(name) == c.bytes(name));
  // The linears of one input have rotations of their own.
  EXPECT_FALSE(a.bytes(linear_name(0, Site::k)) == a.bytes(linear_name(0, Site::v)));
}

TEST_F(QuipModelTest, ImpossibleOptionsAreErrors) {
  for (const char* options : {"--bits 1", "--bits 9", "--rho 0", "--rho=-1", "--rho nan",
                              "--passes=-1", "--passes 101", "--damp 0", "--damp-tries 0"}) {
    EXPECT_THROW(static_cast<void>(method_with("quip", options, source_->config())), Error)
        << options;
  }
  ModelConfig config = source_->config();
  config.intermediate = 2 * 1031;  // 1031 is prime
  EXPECT_THROW(static_cast<void>(method_with("quip", "", config)), Error);
  EXPECT_NO_THROW(static_cast<void>(method_with("quip", "--transform none", config)));
}

}  // namespace
}  // namespace engine::test
