// The ops of a decoding step on the CPU against naive formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "engine/core/rng.h"
#include "engine/ops/cpu_ops.h"
#include "tests/unit/cpu_test_matrix.h"

namespace engine {
namespace {

using testing::close;
using testing::Matrix;

View position_view(std::int32_t& position) { return host_view(&position, 1, 1); }

// An 8-bit cache on the host.
struct CodeCache {
  std::vector<std::uint8_t> k, v;
  std::vector<float> k_scale, v_scale;
  KvCache cache;
  CodeCache(std::int64_t batch, std::int64_t capacity, std::int64_t heads, std::int64_t head_dim) {
    const std::int64_t rows = batch * capacity;
    k.assign(static_cast<std::size_t>(rows * heads * head_dim), 0xFF);
    v = k;
    k_scale.assign(static_cast<std::size_t>(rows * heads), std::numeric_limits<float>::quiet_NaN());
    v_scale = k_scale;
    cache = {host_view(k.data(), rows, heads * head_dim),
             host_view(v.data(), rows, heads * head_dim),
             host_view(k_scale.data(), rows, heads),
             host_view(v_scale.data(), rows, heads),
             batch,
             capacity};
  }
};

TEST(CpuStep, CodesFollowTheFormula) {
  CpuOps ops(2);
  // Head 0: largest 127, so the scale is 1 and ties go to even. Head 1: zeros. Head 2: subnormal.
  const float tiny = std::numeric_limits<float>::denorm_min();
  std::vector<float> x = {127.0F, 2.5F, 3.5F, -2.5F,      0.0F,        0.0F,
                          -0.0F,  0.0F, 0.0F, 190 * tiny, -190 * tiny, 0.0F};
  std::vector<float> y = {1.0F, -2.0F, 0.5F, 0.0F, -4.0F, 4.0F, 1.0F, 3.0F, 1e30F, 0, 0, -1e30F};
  CodeCache c(1, 2, 3, 4);
  std::int32_t position = 1;
  ops.kv_append_step(host_view(x.data(), 1, 12), host_view(y.data(), 1, 12), 4, c.cache,
                     position_view(position));
  const std::vector<std::uint8_t> k(c.k.begin() + 12, c.k.end());
  EXPECT_EQ(k,
            (std::vector<std::uint8_t>{255, 130, 132, 126, 128, 128, 128, 128, 128, 255, 1, 128}));
  EXPECT_EQ(c.k_scale[3], 1.0F);
  EXPECT_EQ(c.k_scale[4], 1.0F);
  EXPECT_EQ(c.k_scale[5], tiny);
  EXPECT_EQ(c.v_scale[3], 2.0F / 127.0F);
  EXPECT_EQ(c.v[12], 192);  // 63.5 to even
  EXPECT_EQ(c.v[13], 1);
  EXPECT_EQ(c.v[20], 255);
  EXPECT_EQ(c.v[23], 1);
  // Token 0 is untouched.
  EXPECT_TRUE(std::all_of(c.k.begin(), c.k.begin() + 12, [](int b) { return b == 0xFF; }));
  EXPECT_TRUE(std::isnan(c.k_scale[0]) && std::isnan(c.k_scale[2]));
  Matrix k_out(DType::f32, 2, 12);
  Matrix v_out(DType::f32, 2, 12);
  ops.kv_read(c.cache, 4, 0, k_out.view(), v_out.view());
  EXPECT_EQ(k_out.get(1, 0), 127.0);
  EXPECT_EQ(k_out.get(1, 1), 2.0);
  EXPECT_EQ(k_out.get(1, 2), 4.0);
  EXPECT_EQ(v_out.get(1, 1), static_cast<double>(2.0F / 127.0F * -127.0F));
}

TEST(CpuStep, RefusesPositionsOutsideTheCacheAndTheTables) {
  CpuOps ops(1);
  CodeCache c(1, 2, 1, 4);
  Matrix x = Matrix::random(DType::f32, 1, 4, 0, 1);
  Matrix table = Matrix::random(DType::f32, 2, 2, 0, 2);
  const AttnShape shape{1, 1, 4};
  for (std::int32_t position : {-1, 2}) {
    const View at = position_view(position);
    EXPECT_THROW(ops.kv_append_step(x.view(), x.view(), 4, c.cache, at), Error);
    EXPECT_THROW(ops.rope_step(x.view(), 4, table.view(), table.view(), at), Error);
    EXPECT_THROW(ops.attention_step(x.view(), c.cache, shape, at, x.view(), {}), Error);
  }
  EXPECT_THROW(ops.kv_append(x.view(), x.view(), 4, c.cache, 0, 1, 2), Error);
  EXPECT_THROW(ops.kv_append(x.view(), x.view(), 4, c.cache, 1, 1, 0), Error);
  EXPECT_THROW(ops.kv_append(x.view(), x.view(), 2, c.cache, 0, 1, 0), Error);  // two heads
}

// Attention over an 8-bit cache is attention over what kv_read gives, which is checked against
// naive loops elsewhere.
TEST(CpuStep, AttentionOverCodesIsAttentionOverTheirValues) {
  CpuOps ops(2);
  const std::int64_t batch = 2, capacity = 90, len = 77;
  const AttnShape shape{6, 2, 32};
  for (const DType dtype : testing::float_dtypes) {
    Matrix k = Matrix::random(dtype, batch * len, 64, 3, 1, 2.0F);
    Matrix v = Matrix::random(dtype, batch * len, 64, 1, 2);
    Matrix q = Matrix::random(dtype, batch, 192, 5, 3, 2.0F);
    CodeCache c(batch, capacity, 2, 32);
    ops.kv_append(k.view(), v.view(), 32, c.cache, 0, batch, 0);
    Matrix out(dtype, batch, 192, 2);
    std::int32_t position = static_cast<std::int32_t>(len) - 1;
    ops.attention_step(q.view(), c.cache, shape, position_view(position), out.view(), {});
    out.expect_gaps_untouched();
    for (std::int64_t b = 0; b < batch; ++b) {
      Matrix k_read(dtype, len, 64);
      Matrix v_read(dtype, len, 64);
      ops.kv_read(c.cache, 32, b, k_read.view(), v_read.view());
      Matrix want(dtype, 1, 192);
      ops.attention(q.view().row_range(b, 1), k_read.view(), v_read.view(), shape, 1, want.view(),
                    {});
      for (std::int64_t i = 0; i < 192; ++i) {
        const double w = want.get(0, i);
        const double tolerance = 1e-5 + 2.0 * testing::roundoff(dtype) * std::abs(w);
        ASSERT_TRUE(close(out.get(b, i), w, tolerance)) << out.get(b, i) << ", expected " << w;
      }
    }
  }
}

TEST(CpuStep, PlainAttentionReadsEachSequenceUpToThePosition) {
  CpuOps ops(2);
  const std::int64_t batch = 3, capacity = 20;
  const AttnShape shape{4, 2, 16};
  Matrix k = Matrix::random(DType::bf16, batch * capacity, 32, 4, 1);
  Matrix v = Matrix::random(DType::bf16, batch * capacity, 32, 4, 2);
  Matrix q = Matrix::random(DType::bf16, batch, 64, 0, 3);
  KvCache cache{k.view(), v.view(), {}, {}, batch, capacity};
  for (std::int32_t position : {0, 7, 19}) {
    Matrix out(DType::bf16, batch, 64);
    ops.attention_step(q.view(), cache, shape, position_view(position), out.view(), {});
    for (std::int64_t b = 0; b < batch; ++b) {
      Matrix want(DType::bf16, 1, 64);
      ops.attention(q.view().row_range(b, 1), k.view().row_range(b * capacity, position + 1),
                    v.view().row_range(b * capacity, position + 1), shape, 1, want.view(), {});
      for (std::int64_t i = 0; i < 64; ++i) ASSERT_EQ(out.get(b, i), want.get(0, i));
    }
  }
}

// A state on the host, and what was sampled.
struct Sampler {
  CpuOps ops{2};
  std::int64_t batch;
  std::vector<std::int32_t> token, history;
  std::int32_t position = 0, step = 0, bad = 0;
  Sampler(std::int64_t rows, std::int64_t steps)
      : batch(rows),
        token(static_cast<std::size_t>(rows), -1),
        history(static_cast<std::size_t>(rows * steps), -1) {}
  void sample(std::vector<float>& logits, const SampleOptions& options) {
    const auto vocab = static_cast<std::int64_t>(logits.size()) / batch;
    const auto steps = static_cast<std::int64_t>(history.size()) / batch;
    ops.sample_step(
        host_view(logits.data(), batch, vocab), options,
        {host_view(token.data(), batch, 1), host_view(&position, 1, 1), host_view(&step, 1, 1),
         host_view(history.data(), batch, steps), host_view(&bad, 1, 1)},
        {});
  }
};

TEST(CpuStep, GreedyTakesTheLowestOfEqualMaximaAndCountsBadRows) {
  Sampler s(3, 2);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> logits = {1, 5, 5, 0, -2, nan, 9, 1, -3, -4, -5, -1};
  s.sample(logits, {});
  EXPECT_EQ(s.token, (std::vector<std::int32_t>{1, 0, 3}));
  EXPECT_EQ(s.bad, 1);
  logits[5] = -std::numeric_limits<float>::infinity();
  s.sample(logits, {});
  EXPECT_EQ(s.history, (std::vector<std::int32_t>{1, 1, 0, 0, 3, 3}));
  logits[5] = 0;
  s.sample(logits, {});  // beyond the history
  EXPECT_EQ(s.token, (std::vector<std::int32_t>{1, 2, 3}));
  EXPECT_EQ(s.history, (std::vector<std::int32_t>{1, 1, 0, 0, 3, 3}));
  EXPECT_EQ(s.bad, 2);
  EXPECT_EQ(s.step, 3);
  EXPECT_EQ(s.position, 3);
}

// How often each token is drawn in `steps` steps.
std::vector<double> frequencies(std::vector<float> logits, const SampleOptions& options,
                                std::int64_t steps) {
  Sampler s(1, steps);
  for (std::int64_t i = 0; i < steps; ++i) s.sample(logits, options);
  std::vector<double> out(logits.size(), 0.0);
  for (const std::int32_t t : s.history) {
    out[static_cast<std::size_t>(t)] += 1.0 / static_cast<double>(steps);
  }
  return out;
}

TEST(CpuStep, DrawsByTheProbabilities) {
  const std::vector<float> logits = {0.5F, -1.0F, 2.0F, 0.5F, 1.0F};
  const std::int64_t steps = 20000;
  for (const float temperature : {0.5F, 1.0F, 3.0F}) {
    std::vector<double> p;
    for (const float l : logits) p.push_back(std::exp(static_cast<double>(l / temperature)));
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    const std::vector<double> found = frequencies(logits, {temperature, 1.0F, 11}, steps);
    for (std::size_t i = 0; i < p.size(); ++i) {
      // Five deviations of a share of `steps` independent draws.
      const double share = p[i] / total;
      EXPECT_NEAR(found[i], share, 5.0 * std::sqrt(share / static_cast<double>(steps))) << i;
    }
  }
}

TEST(CpuStep, TopPKeepsTheSmallestSetThatReachesIt) {
  // Probabilities 0.4, 0.2, 0.2, 0.2 at ids 2, 0, 1, 3.
  const std::vector<float> logits = {0.0F, 0.0F, std::log(2.0F), 0.0F};
  const auto drawn = [&](float top_p) {
    std::vector<bool> seen;
    for (const double f : frequencies(logits, {1.0F, top_p, 3}, 2000)) seen.push_back(f > 0);
    return seen;
  };
  EXPECT_EQ(drawn(0.1F), (std::vector<bool>{false, false, true, false}));
  EXPECT_EQ(drawn(0.39F), (std::vector<bool>{false, false, true, false}));
  EXPECT_EQ(drawn(0.5F), (std::vector<bool>{true, false, true, false}));
  EXPECT_EQ(drawn(0.7F), (std::vector<bool>{true, true, true, false}));
  EXPECT_EQ(drawn(0.9F), (std::vector<bool>{true, true, true, true}));
  EXPECT_EQ(drawn(1.0F), (std::vector<bool>{true, true, true, true}));
}

TEST(CpuStep, TopPTakesTheLikelierFirstAndOfEqualsTheLowerId) {
  // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, in another order.
  std::vector<float> logits;
  for (const float p : {0.0625F, 0.25F, 0.5F, 0.0625F, 0.125F}) logits.push_back(std::log(p));
  const auto drawn = [&](float top_p) {
    std::vector<bool> seen;
    for (const double f : frequencies(logits, {1.0F, top_p, 5}, 4000)) seen.push_back(f > 0);
    return seen;
  };
  EXPECT_EQ(drawn(0.49F), (std::vector<bool>{false, false, true, false, false}));
  EXPECT_EQ(drawn(0.6F), (std::vector<bool>{false, true, true, false, false}));
  EXPECT_EQ(drawn(0.8F), (std::vector<bool>{false, true, true, false, true}));
  EXPECT_EQ(drawn(0.9F), (std::vector<bool>{true, true, true, false, true}));
  EXPECT_EQ(drawn(0.99F), (std::vector<bool>(5, true)));
  EXPECT_EQ(frequencies({-3.0F}, {1.0F, 1.0F, 5}, 1), std::vector<double>{1.0});
}

TEST(CpuStep, DrawsDependOnSeedAndStepOnly) {
  std::vector<float> logits(1000);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = bell_value(1, 1, i);
  const auto draw = [&](std::uint64_t seed) {
    Sampler s(1, 50);
    for (int i = 0; i < 50; ++i) s.sample(logits, {1.0F, 0.95F, seed});
    return s.history;
  };
  const std::vector<std::int32_t> ids = draw(1);
  EXPECT_EQ(draw(1), ids);
  EXPECT_NE(draw(2), ids);
  EXPECT_NE(std::count(ids.begin(), ids.end(), ids[0]), 50);
}

TEST(CpuStep, SequencesDrawFromSeedsOfTheirOwn) {
  std::vector<float> logits(3 * 50, 0.0F);
  Sampler all(3, 20);
  for (int i = 0; i < 20; ++i) all.sample(logits, {1.0F, 1.0F, 40});
  for (std::int64_t b = 0; b < 3; ++b) {
    Sampler one(1, 20);
    std::vector<float> row(50, 0.0F);
    for (int i = 0; i < 20; ++i) {
      one.sample(row, {1.0F, 1.0F, 40 + static_cast<std::uint64_t>(b)});
      // Equal weights: the token is the random number's place among 50.
      const double u = uniform_value(40 + static_cast<std::uint64_t>(b), sampling_stream,
                                     static_cast<std::uint64_t>(i));
      EXPECT_EQ(one.token[0], static_cast<std::int32_t>(u * 50.0));
    }
    const auto first = all.history.begin() + b * 20;
    EXPECT_EQ(one.history, std::vector<std::int32_t>(first, first + 20));
  }
}

TEST(CpuStep, RefusesBadOptions) {
  Sampler s(1, 1);
  std::vector<float> logits(4, 0.0F);
  for (const SampleOptions& o :
       {SampleOptions{-1.0F, 1.0F, 0}, SampleOptions{1.0F, 0.0F, 0}, SampleOptions{1.0F, 1.5F, 0},
        SampleOptions{std::numeric_limits<float>::quiet_NaN(), 1.0F, 0}}) {
    EXPECT_THROW(s.sample(logits, o), Error);
  }
  EXPECT_EQ(s.step, 0);
}

}  // namespace
}  // namespace engine
