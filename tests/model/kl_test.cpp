// Distance from a reference: against a naive computation from whole logits, and the stored form
// against the recomputed one.
#include "eval/kl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"
#include "tests/support/quant_fixtures.h"
#include "tests/support/tiny_checkpoint.h"

namespace engine::test {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::TempDir;

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

struct KlRun {
  WeightSource* reference = nullptr;  // or stored
  const StoredReference* stored = nullptr;
  WeightSource* model = nullptr;
  std::vector<TokenWindows> texts = {};
  DType dtype = DType::f32;
  std::int64_t batch = 0;
  bool noise_floor = false;
  std::filesystem::path save = {};
  bool poison = false;
  Exec exec = Exec::decoded;
};

struct KlOutcome {
  KlResult result;
  Json report;
  Ledger::Entry memory;
};

KlOutcome run(const KlRun& r) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  KlJob job;
  job.reference.source = r.reference;
  job.reference.ops = ops.get();
  job.reference.ledger = &ledger;
  job.reference.dtype = r.dtype;
  job.stored = r.stored;
  job.model = job.reference;
  job.model.source = r.model;
  job.model.exec = r.exec;
  job.batch = r.batch;
  job.texts = r.texts;
  job.noise_floor = r.noise_floor;
  job.save = r.save;
  job.poison = r.poison;
  Report report("test");
  KlOutcome o;
  o.result = kl_divergence(job, report);
  o.report = report.document();
  o.memory = ledger.entry(ops->memory().name());
  return o;
}

// Logits [rows, vocab] from a stored reference, in f32.
std::vector<float> stored_logits(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  const auto matrix = [&](const char* name) {
    const TensorInfo& info = *file.find(name);
    std::vector<float> values(index(info.shape[0] * info.shape[1]));
    EXPECT_EQ(file.bytes(info).size(), 4 * values.size());
    std::memcpy(values.data(), file.bytes(info).data(), 4 * values.size());
    return values;
  };
  const std::vector<float> hidden = matrix("hidden"), head = matrix("head");
  const std::int64_t cols = file.find("head")->shape[1], vocab = file.find("head")->shape[0];
  const std::int64_t rows = file.find("hidden")->shape[0];
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 1);
  std::vector<float> logits(index(rows * vocab));
  ops->matmul(host_view(hidden.data(), rows, cols), host_view(head.data(), vocab, cols),
              host_view(logits.data(), rows, vocab), false);
  return logits;
}

// log softmax in double.
std::vector<double> log_softmax(std::span<const float> row) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float v : row) sum += std::exp(v - top);
  std::vector<double> out;
  for (const float v : row) out.push_back(v - top - std::log(sum));
  return out;
}

// The statistics the long way round: of every scored position from both rows of logits.
struct Naive {
  std::vector<double> kl, change, window_kl, window_p, window_q;
  double same = 0;
};

Naive naive(const std::vector<float>& p, const std::vector<float>& q, const TokenWindows& tokens) {
  const std::size_t vocab = p.size() / index(tokens.rows());
  Naive n;
  for (std::int64_t w = 0; w < tokens.windows; ++w) {
    double kl_sum = 0, p_sum = 0, q_sum = 0;
    for (std::int64_t t = 0; t + 1 < tokens.seq; ++t) {
      const std::size_t row = index(w * tokens.seq + t);
      const auto p_row = std::span(p).subspan(row * vocab, vocab);
      const auto q_row = std::span(q).subspan(row * vocab, vocab);
      const std::vector<double> lp = log_softmax(p_row), lq = log_softmax(q_row);
      double kl = 0;
      for (std::size_t j = 0; j < vocab; ++j) kl += std::exp(lp[j]) * (lp[j] - lq[j]);
      const std::size_t next = index(tokens.ids[row + 1]);
      n.kl.push_back(kl);
      n.change.push_back(std::exp(lq[next]) - std::exp(lp[next]));
      const auto top = [](std::span<const float> r) {
        return std::max_element(r.begin(), r.end()) - r.begin();
      };
      n.same += top(p_row) == top(q_row) ? 1 : 0;
      kl_sum += kl;
      p_sum -= lp[next];
      q_sum -= lq[next];
    }
    const auto scored = static_cast<double>(tokens.seq - 1);
    n.window_kl.push_back(kl_sum / scored);
    n.window_p.push_back(p_sum / scored);
    n.window_q.push_back(q_sum / scored);
  }
  return n;
}

double mean(const std::vector<double>& v) { return total(v) / static_cast<double>(v.size()); }

double standard_error(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += (x - mean(v)) * (x - mean(v));
  const auto n = static_cast<double>(v.size());
  return std::sqrt(sum / (n - 1) / n);
}

double ranked(std::vector<double> v, double q) {
  std::sort(v.begin(), v.end());
  const double at = q * static_cast<double>(v.size() - 1);
  const auto low = static_cast<std::size_t>(std::floor(at));
  const auto high = static_cast<std::size_t>(std::ceil(at));
  const double share = at - std::floor(at);
  return v[low] * (1 - share) + v[high] * share;
}

class Kl : public ::testing::Test {
 protected:
  Kl()
      : source_(open_checkpoint(data)),
        a_(token_rows(data / "heldout.safetensors", 0, 3, 120)),
        b_(token_rows(data / "heldout.safetensors", 10, 2, 120)) {}
  std::unique_ptr<WeightSource> quantized(const std::string& options) {
    run_quantize(*source_, {.method = "rtn", .options = options}, dir_.path() / "a.qw");
    return open_packed(dir_.path() / "a.qw");
  }
  std::unique_ptr<WeightSource> source_;
  TokenWindows a_, b_;
  TempDir dir_;
};

TEST_F(Kl, OfAModelAndItselfIsExactlyZero) {
  const auto again = open_checkpoint(data);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const KlOutcome o = run({.reference = source_.get(),
                             .model = again.get(),
                             .texts = {a_, b_},
                             .dtype = dtype,
                             .noise_floor = true});
    ASSERT_EQ(o.result.texts.size(), 2U);
    EXPECT_EQ(o.result.texts[0].positions, 3 * 119);
    EXPECT_EQ(o.result.texts[1].positions, 2 * 119);
    EXPECT_EQ(o.result.all.windows, 5);
    ASSERT_TRUE(o.result.noise.has_value());
    for (const KlStatistics& s :
         {o.result.texts[0], o.result.texts[1], o.result.all, o.result.noise->statistics}) {
      EXPECT_EQ(s.kl.maximum, 0.0);
      EXPECT_EQ(s.kl.mean, 0.0);
      EXPECT_EQ(s.same_top, 1.0);
      EXPECT_EQ(s.change.rms, 0.0);
      EXPECT_EQ(s.log_ratio, 0.0);
      EXPECT_EQ(s.perplexity, s.reference_perplexity);
      EXPECT_GT(s.perplexity, 2.0);
    }
    EXPECT_EQ(o.result.texts[0].perplexity, perplexity_of(*source_, a_, dtype));
    // The floor was computed in other batches, and says that it is exactly 0.
    EXPECT_NE(o.result.noise->batch, o.result.noise->other_batch);
    expect_contains(to_json(*o.result.noise)["note"].get<std::string>(), "exactly 0");
  }
}

TEST_F(Kl, EqualsTheNaiveComputationFromWholeLogits) {
  const auto model = quantized("--bits 3 --group 64");
  const KlOutcome o = run({.reference = source_.get(), .model = model.get(), .texts = {a_, b_}});
  for (WeightSource* s : {source_.get(), model.get()}) {
    run({.reference = s,
         .texts = {a_, b_},
         .save = dir_.path() / (s == model.get() ? "q.safetensors" : "p.safetensors")});
  }
  const std::vector<float> p = stored_logits(dir_.path() / "p.safetensors");
  const std::vector<float> q = stored_logits(dir_.path() / "q.safetensors");
  TokenWindows both = a_;
  both.ids.insert(both.ids.end(), b_.ids.begin(), b_.ids.end());
  both.windows += b_.windows;
  const Naive n = naive(p, q, both);
  const KlStatistics& s = o.result.all;
  EXPECT_GT(s.kl.mean, 1e-3);
  EXPECT_LT(s.same_top, 1.0);
  const auto expect_near = [](const char* what, double found, double expected) {
    EXPECT_TRUE(close(found, expected, 1e-6)) << what << " " << found << " " << expected;
  };
  expect_near("mean", s.kl.mean, mean(n.kl));
  expect_near("standard error", s.kl.standard_error, standard_error(n.window_kl));
  expect_near("median", s.kl.median, ranked(n.kl, 0.5));
  expect_near("p90", s.kl.p90, ranked(n.kl, 0.9));
  expect_near("p95", s.kl.p95, ranked(n.kl, 0.95));
  expect_near("p99", s.kl.p99, ranked(n.kl, 0.99));
  expect_near("p99.9", s.kl.p99_9, ranked(n.kl, 0.999));
  expect_near("maximum", s.kl.maximum, *std::max_element(n.kl.begin(), n.kl.end()));
  EXPECT_DOUBLE_EQ(s.same_top, n.same / static_cast<double>(n.kl.size()));
  // Probabilities come from f32 sums: the logarithms are off by up to 3e-7.
  double squares = 0;
  for (const double x : n.change) squares += x * x;
  EXPECT_NEAR(s.change.mean, mean(n.change), 3e-7);
  EXPECT_NEAR(s.change.rms, std::sqrt(squares / static_cast<double>(n.change.size())), 3e-7);
  EXPECT_NEAR(s.change.p1, ranked(n.change, 0.01), 6e-7);
  EXPECT_NEAR(s.change.p5, ranked(n.change, 0.05), 6e-7);
  EXPECT_NEAR(s.change.median, ranked(n.change, 0.5), 6e-7);
  EXPECT_NEAR(s.change.p95, ranked(n.change, 0.95), 6e-7);
  EXPECT_NEAR(s.change.p99, ranked(n.change, 0.99), 6e-7);
  EXPECT_GT(s.change.rms, 1e-3);
  expect_near("perplexity", s.perplexity, std::exp(mean(n.window_q)));
  expect_near("perplexity of the reference", s.reference_perplexity, std::exp(mean(n.window_p)));
  std::vector<double> ratio;
  for (std::size_t w = 0; w < 5; ++w) ratio.push_back(n.window_q[w] - n.window_p[w]);
  EXPECT_NEAR(s.log_ratio, mean(ratio), 6e-7);
  EXPECT_NEAR(s.log_ratio_standard_error, standard_error(ratio), 6e-7);
  EXPECT_GT(s.log_ratio_standard_error, 1e-4);

  // The decoder's logits come by another path, 1e-5 apart at most (block_test.cpp).
  std::vector<float> p_decoded, q_decoded;
  for (std::int64_t w = 0; w < both.windows; ++w) {
    const auto ids = std::span(both.ids).subspan(index(w * both.seq), index(both.seq));
    for (const auto& [from, to] :
         {std::pair(source_.get(), &p_decoded), std::pair(model.get(), &q_decoded)}) {
      const std::vector<float> logits = logits_of(*from, DType::f32, ids);
      to->insert(to->end(), logits.begin(), logits.end());
    }
  }
  EXPECT_TRUE(close(s.kl.mean, mean(naive(p_decoded, q_decoded, both).kl), 1e-3));

  // Texts do not see each other, and batches change nothing.
  for (const std::int64_t batch : {1, 2, 64}) {
    const KlOutcome one =
        run({.reference = source_.get(), .model = model.get(), .texts = {b_}, .batch = batch});
    EXPECT_EQ(to_json(one.result.texts[0]), to_json(o.result.texts[1])) << batch;
  }
  // Packed linears are the same weights.
  const KlOutcome packed = run(
      {.reference = source_.get(), .model = model.get(), .texts = {a_, b_}, .exec = Exec::packed});
  EXPECT_TRUE(close(packed.result.all.kl.mean, s.kl.mean, 1e-3));
}

TEST_F(Kl, AStoredReferenceIsTheRecomputedOneToTheBit) {
  const auto model = quantized("--bits 4 --group 128");
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    SCOPED_TRACE(dtype_name(dtype));
    const std::filesystem::path file = dir_.path() / "r.safetensors";
    const KlOutcome direct = run({.reference = source_.get(),
                                  .model = model.get(),
                                  .texts = {a_, b_},
                                  .dtype = dtype,
                                  .save = file});
    const StoredReference stored(file);
    const KlOutcome again =
        run({.stored = &stored, .model = model.get(), .texts = {a_, b_}, .dtype = dtype});
    EXPECT_EQ(to_json(again.result.all), to_json(direct.result.all));
    EXPECT_GT(again.result.all.kl.mean, 1e-4);
    // Logits that differ in one bit would be at a distance.
    const KlOutcome self =
        run({.stored = &stored, .model = source_.get(), .texts = {a_, b_}, .dtype = dtype});
    EXPECT_EQ(self.result.all.kl.maximum, 0.0);
    EXPECT_EQ(self.result.all.change.rms, 0.0);
    EXPECT_EQ(self.result.all.perplexity, direct.result.all.reference_perplexity);
    // Head and hidden states, and a header.
    const auto element = static_cast<std::uintmax_t>(dtype_bytes(dtype));
    const ModelConfig& c = source_->config();
    const auto payload = static_cast<std::uintmax_t>((600 + c.vocab) * c.hidden) * element;
    EXPECT_GT(std::filesystem::file_size(file), payload);
    EXPECT_LT(std::filesystem::file_size(file), payload + 600 * 4 + 4096);
    EXPECT_EQ(stored.describe()["model"]["name"], "tiny-llama3");
  }
}

TEST_F(Kl, AStoredReferenceOfSomethingElseIsRefused) {
  const std::filesystem::path file = dir_.path() / "r.safetensors";
  run({.reference = source_.get(), .texts = {a_}, .save = file});
  const StoredReference stored(file);
  const ReferenceKey good{DType::f32, source_->config().vocab, tokenizer_sha256(*source_)};
  ASSERT_EQ(good.tokenizer_sha256.size(), 64U);
  stored.check(good, a_);
  const auto refused = [&](const ReferenceKey& key, const TokenWindows& tokens) {
    try {
      stored.check(key, tokens);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::mismatch);
      expect_contains(e.what(), "r.safetensors");
      return std::string(e.what());
    }
    ADD_FAILURE() << "accepted";
    return std::string();
  };
  ReferenceKey key = good;
  key.dtype = DType::bf16;
  expect_contains(refused(key, a_), "expected bf16 as in this run, found f32");
  key = good;
  key.vocab = 2049;
  expect_contains(refused(key, a_), "expected 2049");
  key = good;
  key.tokenizer_sha256.clear();
  expect_contains(refused(key, a_), "expected none");
  TokenWindows tokens = a_;
  tokens.ids[57] ^= 1;
  expect_contains(refused(good, tokens), "SHA-256 of the tokens");
  expect_contains(refused(good, b_), "[3, 120]");
  tokens = a_;
  std::swap(tokens.windows, tokens.seq);
  expect_contains(refused(good, tokens), "[120, 3]");
  // The job checks, too.
  expect_contains(
      error_of([&] { run({.stored = &stored, .model = source_.get(), .texts = {b_}}); }),
      "stored reference");
}

TEST_F(Kl, ModelsOfOtherVocabulariesOrTokenizersAreRefused) {
  const auto other = open_synthetic("tiny-test");
  const auto compare = [&](WeightSource& p, WeightSource& q) {
    return error_of([&] { run({.reference = &p, .model = &q, .texts = {a_}}); });
  };
  expect_contains(compare(*source_, *other), "vocabulary: expected 2048");
  TinyCheckpoint options;
  options.config = source_->config();
  options.config.layers = 1;
  options.tokenizer =
      dir_.file("t/tokenizer.json", read_text_file(data / "tokenizer.json", 1 << 26) + "\n");
  write_tiny_checkpoint(dir_.path() / "m", options);
  const auto renamed = open_checkpoint(dir_.path() / "m");
  expect_contains(compare(*source_, *renamed), "tokenizer SHA-256: expected");
}

TEST_F(Kl, KeepsItsPlanAndReadsNothingUnwritten) {
  const auto model = quantized("--bits 4 --group 128");
  const std::filesystem::path file = dir_.path() / "r.safetensors";
  KlRun r{.reference = source_.get(),
          .model = model.get(),
          .texts = {a_, b_},
          .noise_floor = true,
          .save = file};
  const auto hidden_stream = static_cast<std::size_t>(MemTag::hidden_stream);
  const auto expect_plan_kept = [&](const KlOutcome& o) {
    EXPECT_EQ(o.report["plan"]["device_bytes"], o.report["plan"]["arena_peak_bytes"]);
    EXPECT_EQ(o.memory.reserved, 0);
    EXPECT_EQ(o.memory.live_total, 0);
    // The hidden states of two models at once, and one window more for the noise floor.
    const std::int64_t stream = 600 * source_->config().hidden * 4;
    EXPECT_EQ(o.report["plan"]["hidden_stream"].get<std::int64_t>(), o.memory.peak[hidden_stream]);
    EXPECT_GE(o.memory.peak[hidden_stream], 2 * stream);
    EXPECT_LE(o.memory.peak[hidden_stream], 2 * stream + stream / 5 + 1024);
  };
  const KlOutcome plain = run(r);
  expect_plan_kept(plain);
  r.poison = true;
  const KlOutcome poisoned = run(r);
  expect_plan_kept(poisoned);
  EXPECT_EQ(to_json(poisoned.result.all), to_json(plain.result.all));
  const StoredReference stored(file);
  r.reference = nullptr;
  r.stored = &stored;
  r.noise_floor = false;
  r.save.clear();
  const KlOutcome from_file = run(r);
  expect_plan_kept(from_file);
  EXPECT_EQ(to_json(from_file.result.all), to_json(plain.result.all));
}

// Rows {kl, same top, log p, log q} of two windows of four positions, the last of which counts not.
TEST(KlStatistics, ByHand) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> rows;
  for (int w = 0; w < 2; ++w) {
    for (int t = 0; t < 4; ++t) {
      const double kl = 3 * w + t;  // 0 1 2, 3 4 5
      const double p = 0.5, q = 0.5 + 0.01 * (3 * w + t - 1);
      const bool scored = t < 3;
      rows.insert(rows.end(), {scored ? kl : nan, t == 0 ? 0.0 : 1.0, std::log(p), std::log(q)});
    }
  }
  const KlStatistics s = kl_statistics(rows, 2, 4);
  EXPECT_EQ(s.windows, 2);
  EXPECT_EQ(s.positions, 6);
  EXPECT_DOUBLE_EQ(s.kl.mean, 2.5);
  EXPECT_DOUBLE_EQ(s.kl.standard_error, 1.5);  // window means 1 and 4
  EXPECT_DOUBLE_EQ(s.kl.median, 2.5);
  EXPECT_DOUBLE_EQ(s.kl.p90, 4.5);
  EXPECT_DOUBLE_EQ(s.kl.p99, 4.95);
  EXPECT_DOUBLE_EQ(s.kl.maximum, 5.0);
  EXPECT_DOUBLE_EQ(s.same_top, 4.0 / 6.0);
  EXPECT_NEAR(s.change.mean, 0.015, 1e-15);
  EXPECT_NEAR(s.change.rms, 0.01 * std::sqrt((1 + 0 + 1 + 4 + 9 + 16) / 6.0), 1e-15);
  EXPECT_NEAR(s.change.median, 0.015, 1e-15);
  EXPECT_NEAR(s.change.p5, -0.01 + 0.25 * 0.01, 1e-15);
  EXPECT_NEAR(s.reference_perplexity, 2.0, 1e-14);
  const double first = std::log(0.49) + std::log(0.5) + std::log(0.51);
  const double second = std::log(0.52) + std::log(0.53) + std::log(0.54);
  EXPECT_NEAR(s.log_ratio, std::log(0.5) - (first + second) / 6, 1e-15);
  EXPECT_NEAR(s.log_ratio_standard_error, (second - first) / 6, 1e-14);
  EXPECT_NEAR(s.perplexity, std::exp(-(first + second) / 6), 1e-14);

  // One window has no spread.
  EXPECT_EQ(kl_statistics(std::span(rows).first(16), 1, 4).kl.standard_error, 0.0);
  rows[4 * 6] = nan;
  expect_contains(error_of([&] { static_cast<void>(kl_statistics(rows, 2, 4)); }),
                  "window 1, position 2");
}

}  // namespace
}  // namespace engine::test
