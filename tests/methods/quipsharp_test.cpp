// What must hold for QuIP#: the sweeps against a direct implementation in the weight's own order of
// columns, and whole models through the written file (docs/methods/quipsharp.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/quant/calibration.h"
#include "engine/weight/e8.h"
#include "engine/weight/e8_search.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/compare.h"
#include "tests/support/gptq_reference.h"
#include "tests/support/model_runs.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::TempDir;

struct SharpCase {
  std::int64_t rows = 12;
  std::int64_t d = 296;  // two whole panels and a part of one
  int bits = 2;
  int tuning = 2;
  bool identity = false;  // H = I
  double ridge = 0.01;    // added to H, whose diagonal's mean is 1
  int threads = 2;
};

struct SharpRun {
  std::vector<float> w;  // [rows, d] in the weight's own order, as h
  std::vector<double> h;
  std::vector<float> e;  // in solving order
  std::vector<std::int16_t> codes;
  std::vector<std::int16_t> residual16;
  std::vector<std::uint8_t> residual8;
  std::vector<double> loss;
};

// The damped moment of correlated inputs, with a mean diagonal of 1 before the damping.
std::vector<double> damped_moment(const SharpCase& c) {
  std::vector<double> h(index(c.d * c.d), 0.0);
  const std::vector<float> moment = test_hessian(c.d, 77);
  double trace = 0;
  for (std::int64_t i = 0; i < c.d; ++i) trace += static_cast<double>(moment[index(i * c.d + i)]);
  for (std::int64_t i = 0; i < c.d * c.d; ++i) {
    const bool diagonal = i % (c.d + 1) == 0;
    h[index(i)] = c.identity
                      ? 0.0
                      : static_cast<double>(moment[index(i)]) * (static_cast<double>(c.d) / trace);
    if (diagonal) h[index(i)] += c.identity ? 1.0 : c.ridge;
    h[index(i)] = static_cast<double>(static_cast<float>(h[index(i)]));
  }
  return h;
}

template <class T>
std::vector<T> reversed(const std::vector<T>& m, std::int64_t rows, std::int64_t cols,
                        bool rows_too) {
  std::vector<T> out(m.size());
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = 0; j < cols; ++j) {
      out[index((rows_too ? rows - 1 - r : r) * cols + cols - 1 - j)] = m[index(r * cols + j)];
    }
  }
  return out;
}

SharpRun run_case(const SharpCase& c) {
  CpuOps ops(c.threads);
  SharpRun run;
  run.w = bell_matrix(c.rows, c.d, 91, c.bits == 3 ? 0.98F : 1.03F);
  run.h = damped_moment(c);
  std::vector<double> r = reversed(run.h, c.d, c.d, true);
  const std::vector<float> h(r.begin(), r.end());
  std::vector<float> w = reversed(run.w, c.rows, c.d, false);
  run.e.assign(w.size(), std::numeric_limits<float>::quiet_NaN());
  run.codes.assign(index(c.rows * c.d / 8), -1);
  run.loss.assign(index(c.rows), std::numeric_limits<double>::quiet_NaN());
  std::vector<double> factor_space(index(ops.factor_workspace_bytes(c.d, DType::f64) / 8 + 1));
  EXPECT_TRUE(ops.factor_upper(host_view(r.data(), c.d, c.d),
                               make_view(factor_space.data(), DType::u8, DeviceKind::cpu, 1,
                                         static_cast<std::int64_t>(factor_space.size()) * 8)));
  std::vector<double> space(index(ops.quipsharp_workspace_bytes(c.rows, c.d) / 8 + 1));
  QuipSharpProblem p;
  p.bits = c.bits;
  p.tuning = c.tuning;
  p.w = host_view(w.data(), c.rows, c.d);
  p.r = host_view(r.data(), c.d, c.d);
  p.h = host_view(h.data(), c.d, c.d);
  p.e = host_view(run.e.data(), c.rows, c.d);
  p.codes = host_view(run.codes.data(), c.rows, c.d / 8);
  if (c.bits == 3) {
    run.residual8.assign(run.codes.size(), 0xFF);
    p.residual = host_view(run.residual8.data(), c.rows, c.d / 8);
  } else if (c.bits == 4) {
    run.residual16.assign(run.codes.size(), -1);
    p.residual = host_view(run.residual16.data(), c.rows, c.d / 8);
  }
  p.loss = host_view(run.loss.data(), c.rows, 1);
  p.workspace = make_view(space.data(), DType::u8, DeviceKind::cpu, 1,
                          static_cast<std::int64_t>(space.size()) * 8);
  ops.quipsharp_sweep(p);
  return run;
}

// What the codes of a block stand for.
std::vector<double> values_of(const SharpCase& c, const SharpRun& run, std::int64_t block) {
  std::array<float, 8> point{}, rest{};
  e8p_point(static_cast<std::uint16_t>(run.codes[index(block)]), point);
  if (c.bits == 3) rest = e8_byte_points()[run.residual8[index(block)]];
  if (c.bits == 4) e8p_point(static_cast<std::uint16_t>(run.residual16[index(block)]), rest);
  std::vector<double> out;
  for (std::size_t i = 0; i < 8; ++i) {
    out.push_back(static_cast<double>(point[i]) +
                  static_cast<double>(rest[i]) / static_cast<double>(e8_residual_scale(c.bits)));
  }
  return out;
}

// D = w - w^ in the weight's own order, from the codes.
std::vector<double> residual_of(const SharpCase& c, const SharpRun& run) {
  std::vector<double> out;
  for (std::int64_t block = 0; block < c.rows * c.d / 8; ++block) {
    const std::vector<double> v = values_of(c, run, block);
    for (std::size_t i = 0; i < 8; ++i) {
      out.push_back(static_cast<double>(run.w[index(block * 8) + i]) - v[i]);
    }
  }
  return out;
}

double form_of(const double* x, const std::vector<double>& h, std::int64_t d) {
  double sum = 0;
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j < d; ++j) sum += x[i] * h[index(i * d + j)] * x[j];
  }
  return sum;
}

// The nearest value of the two books of these bits.
std::vector<double> rounded(const SharpCase& c, const std::vector<double>& t) {
  std::array<float, 8> x{}, q{}, rest{}, p{};
  for (std::size_t i = 0; i < 8; ++i) x[i] = static_cast<float>(t[i]);
  (void)e8p_nearest(x, q);
  const auto scale = static_cast<double>(e8_residual_scale(c.bits));
  for (std::size_t i = 0; i < 8; ++i) {
    rest[i] = static_cast<float>((static_cast<double>(x[i]) - static_cast<double>(q[i])) * scale);
  }
  if (c.bits == 3) (void)e8_byte_nearest(rest, p);
  if (c.bits == 4) (void)e8p_nearest(rest, p);
  std::vector<double> out;
  for (std::size_t i = 0; i < 8; ++i) {
    out.push_back(static_cast<double>(q[i]) + static_cast<double>(p[i]) / scale);
  }
  return out;
}

// Solves x s = b for a row b, s [8, 8], by elimination with pivoting.
std::vector<double> solve_right(const std::vector<double>& s, std::vector<double> b) {
  std::vector<double> a(64);
  for (std::size_t i = 0; i < 8; ++i) {
    for (std::size_t j = 0; j < 8; ++j) a[i * 8 + j] = s[j * 8 + i];
  }
  for (std::size_t k = 0; k < 8; ++k) {
    std::size_t best = k;
    for (std::size_t i = k; i < 8; ++i) {
      if (std::fabs(a[i * 8 + k]) > std::fabs(a[best * 8 + k])) best = i;
    }
    for (std::size_t j = 0; j < 8; ++j) std::swap(a[k * 8 + j], a[best * 8 + j]);
    std::swap(b[k], b[best]);
    for (std::size_t i = k + 1; i < 8; ++i) {
      const double f = a[i * 8 + k] / a[k * 8 + k];
      for (std::size_t j = k; j < 8; ++j) a[i * 8 + j] -= f * a[k * 8 + j];
      b[i] -= f * b[k];
    }
  }
  for (std::size_t k = 8; k-- > 0;) {
    for (std::size_t j = k + 1; j < 8; ++j) b[k] -= a[k * 8 + j] * b[j];
    b[k] /= a[k * 8 + k];
  }
  return b;
}

// The method as it is written down, last block first: H = L L^T, the feedback L_jk L_kk^-1; then
// passes of t = w^_k + (W - W^) H[:, k] H_kk^-1. Returns D.
std::vector<double> direct(const SharpCase& c, const SharpRun& run) {
  const std::int64_t d = c.d;
  const Matrix l = cholesky_lower(run.h, d);
  std::vector<double> result;
  for (std::int64_t r = 0; r < c.rows; ++r) {
    std::vector<double> w(index(d)), e(index(d), 0.0);
    for (std::int64_t j = 0; j < d; ++j) w[index(j)] = static_cast<double>(run.w[index(r * d + j)]);
    for (int pass = 0; pass <= c.tuning; ++pass) {
      const std::vector<double>& source = pass == 0 ? l : run.h;
      for (std::int64_t k = d - 8; k >= 0; k -= 8) {
        std::vector<double> sum(8, 0.0), block(64), t(8);
        for (std::int64_t j = pass == 0 ? k + 8 : 0; j < d; ++j) {
          for (std::int64_t i = 0; i < 8; ++i) {
            sum[index(i)] += e[index(j)] * source[index(j * d + k + i)];
          }
        }
        for (std::int64_t i = 0; i < 64; ++i) {
          block[index(i)] = source[index((k + i / 8) * d + k + i % 8)];
        }
        const std::vector<double> move = solve_right(block, sum);
        for (std::size_t i = 0; i < 8; ++i) {
          const std::size_t at = index(k) + i;
          t[i] = (pass == 0 ? w[at] : w[at] - e[at]) + move[i];
        }
        const std::vector<double> q = rounded(c, t);
        for (std::size_t i = 0; i < 8; ++i) e[index(k) + i] = w[index(k) + i] - q[i];
      }
    }
    result.insert(result.end(), e.begin(), e.end());
  }
  return result;
}

// A target within rounding of a border between two points may go to either, which changes what
// follows it in that row; here that happens in none or few of the rows.
TEST(QuipSharp, AgreesWithTheDirectForm) {
  for (const SharpCase& c :
       {SharpCase{}, SharpCase{.bits = 3}, SharpCase{.bits = 4}, SharpCase{.d = 64, .tuning = 0},
        SharpCase{.rows = 5, .d = 8, .tuning = 1}, SharpCase{.d = 128, .bits = 4, .tuning = 10}}) {
    SCOPED_TRACE(std::to_string(c.bits) + " bits, d " + std::to_string(c.d));
    const SharpRun run = run_case(c);
    const std::vector<double> expected = direct(c, run), found = residual_of(c, run);
    std::int64_t rows = 0;
    for (std::int64_t r = 0; r < c.rows; ++r) {
      bool same = true;
      for (std::int64_t j = r * c.d; j < (r + 1) * c.d; ++j) {
        same = same && std::fabs(expected[index(j)] - found[index(j)]) < 1e-5;
      }
      rows += same ? 1 : 0;
    }
    EXPECT_GE(rows, c.rows - 1);
  }
}

TEST(QuipSharp, ErrorsAndLossBelongToTheCodes) {
  for (const SharpCase& c :
       {SharpCase{}, SharpCase{.bits = 3, .tuning = 0}, SharpCase{.bits = 4, .tuning = 10}}) {
    SCOPED_TRACE(c.bits);
    const SharpRun run = run_case(c);
    const std::vector<double> own = residual_of(c, run);
    const std::vector<float> e = reversed(run.e, c.rows, c.d, false);
    for (std::size_t i = 0; i < own.size(); ++i) {
      ASSERT_NEAR(own[i], static_cast<double>(e[i]), 2e-6);
    }
    for (std::int64_t r = 0; r < c.rows; ++r) {
      EXPECT_TRUE(test::close(run.loss[index(r)], form_of(own.data() + r * c.d, run.h, c.d), 1e-4));
    }
  }
}

// A step goes to the point nearest to the best place, not to the one of the least loss, and is sure
// to gain only as far as H is even inside a block: so here H is, as it is after rotation.
TEST(QuipSharp, FeedbackAndTuningLowerTheLoss) {
  SharpCase c{.rows = 32, .tuning = 0, .ridge = 1.0};
  const SharpRun once = run_case(c);
  // Rounding alone is the sweep of an identity.
  SharpCase plain = c;
  plain.identity = true;
  const SharpRun nearest = run_case(plain);
  const std::vector<double> own = residual_of(plain, nearest);
  double alone = 0;
  for (std::int64_t r = 0; r < c.rows; ++r) alone += form_of(own.data() + r * c.d, once.h, c.d);
  c.tuning = 1;
  const SharpRun twice = run_case(c);
  c.tuning = 10;
  const SharpRun often = run_case(c);
  EXPECT_LT(total(once.loss), 0.95 * alone);
  EXPECT_LT(total(twice.loss), total(once.loss));
  EXPECT_LT(total(often.loss), total(once.loss));
}

// Mean square errors of Gaussian weights of the three sizes of code. 4096 blocks: the standard
// error is below 1 %; a bell of eight uniforms has lighter tails than a Gaussian, which costs less.
TEST(QuipSharp, ErrorsOfEachSize) {
  const double expected[] = {0.0915, 0.0294, 0.0096};
  for (int bits = 2; bits <= 4; ++bits) {
    const SharpCase c{.rows = 64, .d = 512, .bits = bits, .tuning = 0, .identity = true};
    const SharpRun run = run_case(c);
    const double scale = bits == 3 ? 0.98 : 1.03;
    EXPECT_NEAR(total(run.loss) / (64.0 * 512.0 * scale * scale), expected[bits - 2],
                0.04 * expected[bits - 2]);
  }
}

TEST(QuipSharp, ThreadsDoNotMatter) {
  const SharpRun one = run_case({.threads = 1}), many = run_case({.threads = 5});
  EXPECT_TRUE(one.codes == many.codes);
  EXPECT_TRUE(one.loss == many.loss);
}

TEST(QuipSharp, TargetsAreTurnedScaledAndReversed) {
  CpuOps ops(1);
  std::vector<float> w = {1, 2, 3, 4, 5, 6};  // [3, 2]: a weight of 2 rows and 3 columns
  const double squares = 91;
  std::vector<float> out(6);
  float scale = 0;
  ops.quipsharp_targets(host_view(w.data(), 3, 2), host_view(&squares, 1, 1), 0.9,
                        host_view(out.data(), 2, 3), host_view(&scale, 1, 1));
  EXPECT_FLOAT_EQ(scale, static_cast<float>(std::sqrt(91.0 / 6.0) / 0.9));
  const std::vector<float> expected = {5, 3, 1, 6, 4, 2};
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(out[i], expected[i] / scale);
  const double nothing = 0;
  std::fill(w.begin(), w.end(), 0.0F);
  ops.quipsharp_targets(host_view(w.data(), 3, 2), host_view(&nothing, 1, 1), 0.9,
                        host_view(out.data(), 2, 3), host_view(&scale, 1, 1));
  EXPECT_EQ(scale, 1.0F);
  EXPECT_EQ(out[0], 0.0F);
}

class QuipSharpModelTest : public ::testing::Test {
 protected:
  QuipSharpModelTest() {
    TinyCheckpoint options;
    options.tokenizer = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3/tokenizer.json";
    tensors_ = write_tiny_checkpoint(dir_.path() / "model", options);
    source_ = open_checkpoint(dir_.path() / "model");
    tokens_ = {synthetic_tokens(4 * 64, source_->config().vocab, 3), 4, 64};
  }
  QuantOutcome quantize(const std::string& options, const char* name = "a.qw") {
    return run_quantize(
        *source_,
        {.method = "quipsharp", .options = options, .calibration = tokens_, .poison = true},
        dir_.path() / name);
  }
  [[nodiscard]] std::filesystem::path file() const { return dir_.path() / "a.qw"; }

  TempDir dir_;
  NamedTensors tensors_;
  std::unique_ptr<WeightSource> source_;
  TokenWindows tokens_;
};

TEST_F(QuipSharpModelTest, FileDecodesAndTakesTheBitsItSays) {
  double last_error = 1.0;
  for (int bits = 2; bits <= 4; ++bits) {
    SCOPED_TRACE(bits);
    quantize("--tune-iters 2 --bits " + std::to_string(bits));
    const PackedFileView view(file());
    const auto packed = open_packed(file());
    double errors = 0;
    for (const Site site : all_sites) {
      const std::string name = linear_name(1, site);
      SCOPED_TRACE(name);
      const std::vector<float> expected = view.decode(name);
      const std::vector<float> found = load_weight(*packed, 1, site);
      // The host turns vectors in f64, the device path in f32: about 20 roundings.
      EXPECT_LT(relative_square_error(found, expected), 1e-12);
      const double error = relative_square_error(found, tensors_.at("model." + name + ".weight"));
      EXPECT_TRUE(test::close(error, view.entry(name)["relative_error"].get<double>(), 1e-5));
      errors += error;

      const SiteShape shape = site_shape(source_->config(), site);
      const std::int64_t n = shape.rows * shape.cols;
      EXPECT_DOUBLE_EQ(view.entry(name)["bits_nominal"].get<double>(), bits);
      const std::int64_t terms = bits == 2 ? 1 : 2;
      const std::int64_t bytes =
          n * bits / 8 + 4 * terms + (shape.rows + 7) / 8 + (shape.cols + 7) / 8;
      EXPECT_EQ(view.entry(name)["bytes_stored"].get<std::int64_t>(), bytes);
    }
    EXPECT_LT(errors, 0.6 * last_error * 7);
    last_error = errors / 7;
  }
}

TEST_F(QuipSharpModelTest, LinearsOfATapShareTheirInputSigns) {
  quantize("--tune-iters 0");
  const PackedFileView view(file());
  const auto signs = [&](Site site, bool left) {
    const PackedLinear& linear = view.model().linears.at(linear_name(0, site));
    const Transform& t = left ? linear.weight.left : linear.weight.right;
    EXPECT_EQ(t.kind, TransformKind::hadamard);
    return view.plane(linear.planes.at(index(t.signs_plane)));
  };
  EXPECT_TRUE(signs(Site::q, false) == signs(Site::v, false));
  EXPECT_TRUE(signs(Site::gate, false) == signs(Site::up, false));
  EXPECT_FALSE(signs(Site::gate, true) == signs(Site::up, true));
  EXPECT_FALSE(signs(Site::k, true) == signs(Site::v, true));
}

TEST_F(QuipSharpModelTest, SeedsDifferAndRepeat) {
  quantize("--tune-iters 0", "a.qw");
  quantize("--tune-iters 0", "b.qw");
  quantize("--tune-iters 0 --transform-seed 1", "c.qw");
  const PackedFileView a(dir_.path() / "a.qw"), b(dir_.path() / "b.qw"), c(dir_.path() / "c.qw");
  const std::string name = linear_name(0, Site::down);
  EXPECT_TRUE(a.bytes(name) == b.bytes(name));
  EXPECT_FALSE(a.bytes(name) == c.bytes(name));
  const std::vector<float>& original = tensors_.at("model." + name + ".weight");
  const double first = relative_square_error(a.decode(name), original);
  EXPECT_TRUE(test::close(relative_square_error(c.decode(name), original), first, 0.2));
}

// With the original stream a block's moments do not depend on how the blocks before it were
// quantized; the damping is a share of their diagonals.
TEST_F(QuipSharpModelTest, TheStreamIsTheOneAskedFor) {
  const auto damping = [&](const std::string& options) {
    quantize("--tune-iters 0 " + options);
    const PackedFileView view(file());
    return view.entry(linear_name(1, Site::q))["damping"].get<double>();
  };
  EXPECT_EQ(damping("--bits 2"), damping("--bits 4"));
  const double low = damping("--bits 2 --calibration-stream quantized");
  EXPECT_NE(low, damping("--bits 4 --calibration-stream quantized"));
  EXPECT_NE(low, damping("--bits 2"));
}

TEST_F(QuipSharpModelTest, ImpossibleOptionsAreErrors) {
  for (const char* options :
       {"--bits 5", "--bits 1", "--scale-factor -1", "--tune-iters -1", "--tune-iters 101",
        "--sigma-reg 0", "--damp-tries 0", "--calibration-stream other"}) {
    EXPECT_THROW(method_with("quipsharp", options, source_->config()), Error) << options;
  }
  ModelConfig config = source_->config();
  config.intermediate = 11 * 64;
  EXPECT_THROW(method_with("quipsharp", "", config), Error);
}

}  // namespace
}  // namespace engine::test
