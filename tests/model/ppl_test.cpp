// Perplexity: the figure by hand from the decoder's logits, and the protocol around it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/quant/calibration.h"
#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

struct TokenStatistics {
  double loss = 0;      // -log p(next)
  double entropy = 0;   // of the prediction
  double variance = 0;  // of -log p under the prediction
};

// From logits at t and the token at t + 1.
TokenStatistics statistics(std::span<const float> row, std::int32_t next) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0, first = 0, second = 0;
  for (const float v : row) {
    const double e = std::exp(v - top);
    sum += e;
    first += e * (v - top);
    second += e * (v - top) * (v - top);
  }
  TokenStatistics s;
  const double mean = first / sum;
  s.loss = std::log(sum) - (row[static_cast<std::size_t>(next)] - top);
  s.entropy = std::log(sum) - mean;
  s.variance = second / sum - mean * mean;
  return s;
}

std::vector<PplResult> run(WeightSource& source, const std::vector<TokenWindows>& texts,
                           std::int64_t batch = 0, DType dtype = DType::f32) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  PplJob job;
  job.source = &source;
  job.ops = ops.get();
  job.ledger = &ledger;
  job.dtype = dtype;
  job.batch = batch;
  job.texts = texts;
  Report report("test");
  return perplexity(job, report);
}

// Packed blocks are the same weights: in f32 on the CPU only the order of sums may differ, which
// moves a logit by about 1e-5 (block_test.cpp) and the mean loss of some 500 tokens by less.
TEST(Perplexity, OfPackedBlocksIsThatOfDecodedOnes) {
  const TempDir dir;
  const auto source = open_checkpoint(data);
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 0, 3, 200);
  for (const char* options :
       {"--bits 4 --group 128 --scale-dtype f16", "--bits 3 --group 64", "--bits 2 --group 0"}) {
    SCOPED_TRACE(options);
    run_quantize(*source, {.method = "rtn", .options = options}, dir.path() / "a.qw");
    const auto packed = open_packed(dir.path() / "a.qw");
    const PplResult decoded = run(*packed, {tokens}).front();
    EXPECT_FALSE(close(decoded.perplexity, run(*source, {tokens}).front().perplexity, 1e-3));
    for (const PackedKernel kernel : {PackedKernel::automatic, PackedKernel::vector,
                                      PackedKernel::matrix, PackedKernel::expand}) {
      for (const bool poison : {false, true}) {
        Ledger ledger;
        const auto ops = make_cpu_ops(ledger, 2);
        PplJob job;
        job.source = packed.get();
        job.ops = ops.get();
        job.ledger = &ledger;
        job.dtype = DType::f32;
        job.batch = 2;
        job.texts = {tokens};
        job.exec = Exec::packed;
        job.kernel = kernel;
        job.poison = poison;
        Report report("test");
        const PplResult found = perplexity(job, report).front();
        EXPECT_TRUE(close(found.perplexity, decoded.perplexity, 1e-5))
            << found.perplexity << " " << decoded.perplexity;
        // One block at a time, in fewer bytes than decoded.
        const auto weights = static_cast<std::size_t>(MemTag::weights);
        const Ledger::Entry memory = ledger.entry(ops->memory().name());
        EXPECT_EQ(report.document()["plan"]["weights"].get<std::int64_t>(), memory.peak[weights]);
      }
    }
  }
}

// heldout.safetensors was sampled from the model at temperature 1, so the expected loss of each
// token is the entropy of its prediction: their differences are martingale increments, and the
// mean of all must be 0 within a few standard errors. A shift by one token, a wrong mask or a
// scaled logit would miss by far.
TEST(Perplexity, EqualsTheLossByHandAndTheEntropyOfTheModel) {
  const auto source = open_checkpoint(data);
  constexpr std::int64_t windows = 6, seq = 512;
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 0, windows, seq);
  const std::vector<PplResult> results = run(*source, {tokens});
  ASSERT_EQ(results.size(), 1U);
  ASSERT_EQ(results[0].window_nll.size(), 6U);
  double surprise = 0, variance = 0, mean = 0;
  std::vector<double> by_hand;
  for (std::int64_t w = 0; w < windows; ++w) {
    const auto ids = std::span(tokens.ids).subspan(index(w * seq), index(seq));
    const std::vector<float> logits = logits_of(*source, DType::f32, ids);
    const std::size_t vocab = logits.size() / ids.size();
    double loss = 0;
    for (std::size_t t = 0; t + 1 < ids.size(); ++t) {
      const TokenStatistics s = statistics(std::span(logits).subspan(t * vocab, vocab), ids[t + 1]);
      loss += s.loss;
      surprise += s.loss - s.entropy;
      variance += s.variance;
    }
    by_hand.push_back(loss / static_cast<double>(seq - 1));
    mean += by_hand.back() / static_cast<double>(windows);
    // Two f32 evaluations of the logits, 1e-5 apart at most (block_test.cpp), averaged.
    EXPECT_NEAR(results[0].window_nll[index(w)], by_hand.back(), 1e-5) << w;
  }
  EXPECT_NEAR(results[0].perplexity, std::exp(mean), 2e-5 * std::exp(mean));
  double spread = 0;
  for (const double x : by_hand) spread += (x - mean) * (x - mean);
  EXPECT_NEAR(results[0].standard_error, std::sqrt(spread / 5.0 / 6.0), 1e-5);
  EXPECT_LE(std::abs(surprise), 4.0 * std::sqrt(variance))
      << surprise << " against " << std::sqrt(variance);
  EXPECT_GT(variance, 1000.0);  // the model is uncertain: the check above means something
}

TEST(Perplexity, TextsDoNotSeeEachOther) {
  const auto source = open_checkpoint(data);
  const TokenWindows a = token_rows(data / "heldout.safetensors", 0, 3, 100);
  const TokenWindows b = token_rows(data / "heldout.safetensors", 10, 2, 100);
  const std::vector<PplResult> both = run(*source, {a, b});
  ASSERT_EQ(both.size(), 2U);
  EXPECT_EQ(both[0].window_nll, run(*source, {a})[0].window_nll);
  EXPECT_EQ(both[1].window_nll, run(*source, {b})[0].window_nll);
  EXPECT_EQ(both[0].window_nll.size(), 3U);
  EXPECT_EQ(both[1].window_nll.size(), 2U);
  for (const std::int64_t batch : {2, 3, 64}) {
    const std::vector<PplResult> again = run(*source, {a, b}, batch);
    EXPECT_EQ(again[0].window_nll, both[0].window_nll) << batch;
    EXPECT_EQ(again[1].window_nll, both[1].window_nll) << batch;
  }
  // Nor do windows.
  const TokenWindows last = token_rows(data / "heldout.safetensors", 2, 1, 100);
  EXPECT_EQ(run(*source, {last})[0].window_nll[0], both[0].window_nll[2]);
}

TEST(Perplexity, HalfPrecisionStaysNear) {
  const auto source = open_checkpoint(data);
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 20, 4, 512);
  const double exact = run(*source, {tokens})[0].perplexity;
  // Transformers in bf16 differs by up to 2.8e-4 on this model (reference_hf.json).
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const double half = run(*source, {tokens}, 0, dtype)[0].perplexity;
    EXPECT_TRUE(test::close(half, exact, 2e-3)) << half << " " << exact;
  }
}

class EvalWindowsTest : public ::testing::Test {
 protected:
  EvalWindowsTest() : source_(open_checkpoint(data)), tokenizer_(model_tokenizer(*source_)) {}
  EvalWindows windows(const std::string& file, std::int64_t seq, BosPolicy bos,
                      std::int64_t limit = 0) {
    return load_eval_windows({file, Dataset::plain}, *source_, tokenizer_.get(), seq, bos, limit);
  }
  std::unique_ptr<WeightSource> source_;
  std::unique_ptr<Tokenizer> tokenizer_;
  TempDir dir_;
};

TEST_F(EvalWindowsTest, BosGoesWhereThePolicySays) {
  std::string text = "The first sentence of a short text. ";
  for (int i = 0; i < 4; ++i) text += text;
  const std::string file = dir_.file("t.txt", text).string();
  const std::vector<std::int32_t> plain = tokenizer_->encode(text, SpecialText::parse);
  const std::int32_t bos = tokenizer_->bos_id();
  ASSERT_EQ(bos, 1792);
  const auto total = static_cast<std::int64_t>(plain.size());
  constexpr std::int64_t seq = 16;
  ASSERT_GT(total, 4 * seq);
  ASSERT_NE(total % seq, 0);

  const EvalWindows none = windows(file, seq, BosPolicy::none);
  EXPECT_EQ(none.tokens.windows, total / seq);
  EXPECT_EQ(none.tokens.ids,
            std::vector<std::int32_t>(plain.begin(), plain.begin() + none.tokens.rows()));
  EXPECT_EQ(none.protocol["bos"], "none");
  EXPECT_EQ(none.protocol["tokens"].get<std::int64_t>(), total);
  EXPECT_EQ(none.protocol["windows"].get<std::int64_t>(), total / seq);

  const EvalWindows start = windows(file, seq, BosPolicy::stream_start);
  std::vector<std::int32_t> with_bos(plain);
  with_bos.insert(with_bos.begin(), bos);
  EXPECT_EQ(start.tokens.windows, (total + 1) / seq);
  EXPECT_EQ(start.tokens.ids,
            std::vector<std::int32_t>(with_bos.begin(), with_bos.begin() + start.tokens.rows()));

  const EvalWindows each = windows(file, seq, BosPolicy::per_window);
  EXPECT_EQ(each.tokens.windows, total / (seq - 1));
  for (std::int64_t w = 0; w < each.tokens.windows; ++w) {
    EXPECT_EQ(each.tokens.ids[index(w * seq)], bos);
    EXPECT_TRUE(std::equal(plain.begin() + w * (seq - 1), plain.begin() + (w + 1) * (seq - 1),
                           each.tokens.ids.begin() + w * seq + 1));
  }

  const EvalWindows model = windows(file, seq, BosPolicy::model);
  EXPECT_EQ(model.tokens.ids, tokenizer_->adds_bos() ? start.tokens.ids : none.tokens.ids);
  EXPECT_EQ(model.protocol["bos"], tokenizer_->adds_bos() ? "stream-start" : "none");
}

TEST_F(EvalWindowsTest, LimitKeepsTheFirstWindows) {
  const std::string file = (data / "heldout.txt").string();
  const EvalWindows all = windows(file, 256, BosPolicy::none);
  const EvalWindows some = windows(file, 256, BosPolicy::none, 5);
  ASSERT_GT(all.tokens.windows, 5);
  EXPECT_EQ(some.tokens.windows, 5);
  EXPECT_EQ(some.tokens.ids,
            std::vector<std::int32_t>(all.tokens.ids.begin(), all.tokens.ids.begin() + 5 * 256));
  // The hash names the text, not the part of it that was used.
  EXPECT_EQ(some.protocol["tokens_sha256"], all.protocol["tokens_sha256"]);
  EXPECT_EQ(windows(file, 256, BosPolicy::none, 1'000'000).tokens.windows, all.tokens.windows);
}

TEST_F(EvalWindowsTest, TokenTensorsAreTakenAsTheyAre) {
  const std::string file = (data / "heldout.safetensors").string() + ":tokens";
  const EvalWindows w = windows(file, 512, BosPolicy::model);
  EXPECT_EQ(w.tokens.windows, 64);
  EXPECT_EQ(w.tokens.ids, token_rows(data / "heldout.safetensors", 0, 64, 512).ids);
  // 64 * 512 tokens in windows of 100: the last 68 are dropped.
  EXPECT_EQ(windows(file, 100, BosPolicy::model).tokens.windows, 327);
  expect_contains(error_of([&] { windows(file, 512, BosPolicy::none); }), "--bos");
  expect_contains(error_of([&] { windows(file, 40000, BosPolicy::model); }), "40000");
}

TEST_F(EvalWindowsTest, SyntheticTokensNeedNoTokenizer) {
  const EvalWindows w = load_eval_windows({"synthetic:1000", Dataset::plain}, *source_, nullptr, 64,
                                          BosPolicy::model, 0);
  EXPECT_EQ(w.tokens.windows, 15);
  const auto [low, high] = std::minmax_element(w.tokens.ids.begin(), w.tokens.ids.end());
  EXPECT_GE(*low, 0);
  EXPECT_LT(*high, 2048);
  EXPECT_GT(*high - *low, 1900);
  for (const char* bad : {"synthetic:", "synthetic:12x", "synthetic:-5"}) {
    expect_contains(error_of([&] { windows(bad, 64, BosPolicy::model); }), "synthetic:COUNT");
  }
  const std::string file = (data / "heldout.txt").string();
  expect_contains(
      error_of([&] {
        load_eval_windows({file, Dataset::plain}, *source_, nullptr, 64, BosPolicy::model, 0);
      }),
      "tokenizer");
}

}  // namespace
}  // namespace engine::test
