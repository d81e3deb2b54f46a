// Log-likelihoods: against perplexity's losses and plain logits, and the same however the sequences
// are shared, packed and split into passes.
#include "eval/score.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/formats/temp_dir.h"
#include "tests/support/model_runs.h"

namespace engine::test {
namespace {

const std::filesystem::path data = std::filesystem::path(LOWBIT_TEST_DATA) / "tiny-llama3";

struct Scores {
  std::vector<double> values;
  Json packing;
};

Scores run(WeightSource& source, std::vector<ScoreRequest> requests, bool share, bool pack,
           std::int64_t batch_rows = 0, std::int64_t pass_rows = 0, bool poison = false) {
  Ledger ledger;
  const auto ops = make_cpu_ops(ledger, 2);
  ScoreJob job;
  job.source = &source;
  job.ops = ops.get();
  job.ledger = &ledger;
  job.dtype = DType::f32;
  job.requests = std::move(requests);
  job.share = share;
  job.pack = pack;
  job.batch_rows = batch_rows;
  job.pass_rows = pass_rows;
  job.poison = poison;
  Report report("test");
  Scores out;
  out.values = score(job, report).log_likelihood;
  out.packing = report["packing"];
  EXPECT_EQ(ledger.entry("cpu").live_total, 0);
  return out;
}

// Questions with choices behind three sets of shots, from the repository's held-out tokens.
std::vector<ScoreRequest> questions() {
  const TokenWindows t = token_rows(data / "heldout.safetensors", 0, 12, 300);
  const auto piece = [&](std::int64_t row, std::int64_t from, std::int64_t n) {
    const auto at = t.ids.begin() + row * t.seq + from;
    return std::vector<std::int32_t>(at, at + n);
  };
  std::vector<ScoreRequest> requests;
  for (std::int64_t subject = 0; subject < 3; ++subject) {
    for (std::int64_t question = 0; question < 4; ++question) {
      for (std::int64_t choice = 0; choice < 3; ++choice) {
        ScoreRequest r;
        r.tokens = piece(subject, 0, 150 + 13 * subject);
        const auto add = [&](const std::vector<std::int32_t>& more) {
          r.tokens.insert(r.tokens.end(), more.begin(), more.end());
        };
        add(piece(3 + question, 20, 17 + 5 * question));
        add(piece(7 + choice, 40, 1 + 6 * choice));
        r.scored = 1 + 6 * choice;
        requests.push_back(std::move(r));
      }
    }
  }
  return requests;
}

TEST(Score, IsTheLossOfPerplexity) {
  const auto source = open_checkpoint(data);
  const TokenWindows tokens = token_rows(data / "heldout.safetensors", 0, 3, 200);
  std::vector<ScoreRequest> requests;
  for (std::int64_t w = 0; w < tokens.windows; ++w) {
    const auto first = tokens.ids.begin() + w * tokens.seq;
    requests.push_back({{first, first + tokens.seq}, tokens.seq - 1});
  }
  const Scores all = run(*source, requests, true, true);
  double mean = 0;
  for (const double v : all.values) mean -= v / static_cast<double>(tokens.seq - 1) / 3;
  EXPECT_NEAR(std::exp(mean) / perplexity_of(*source, tokens), 1, 1e-6);
}

TEST(Score, IsTheLogSoftmaxOfTheLogits) {
  const auto source = open_checkpoint(data);
  const std::vector<ScoreRequest> requests = questions();
  const Scores all = run(*source, requests, true, true);
  const auto vocab = static_cast<std::size_t>(source->config().vocab);
  for (const std::size_t r : {std::size_t{0}, std::size_t{17}, requests.size() - 1}) {
    const std::vector<std::int32_t>& tokens = requests[r].tokens;
    const std::vector<float> logits =
        logits_of(*source, DType::f32, std::span(tokens).first(tokens.size() - 1));
    double sum = 0;
    for (auto i = tokens.size() - static_cast<std::size_t>(requests[r].scored); i < tokens.size();
         ++i) {
      const auto row = std::span(logits).subspan((i - 1) * vocab, vocab);
      double total = 0;
      const double top = *std::ranges::max_element(row);
      for (const float v : row) total += std::exp(v - top);
      sum += row[static_cast<std::size_t>(tokens[i])] - top - std::log(total);
    }
    EXPECT_NEAR(all.values[r], sum, 1e-4) << "request " << r;
  }
}

TEST(Score, SharingPackingAndPassesChangeRoundingOnly) {
  const auto source = open_checkpoint(data);
  const std::vector<ScoreRequest> requests = questions();
  const Scores alone = run(*source, requests, false, false);
  EXPECT_EQ(alone.packing["batches"], 36);
  struct Case {
    bool share, pack;
    std::int64_t batch, pass;
    bool poison;
  };
  for (const Case& c :
       {Case{true, true, 0, 0, true}, Case{true, true, 70, 0, false}, Case{true, false, 0, 0, true},
        Case{false, true, 0, 0, false}, Case{true, true, 300, 700, true}}) {
    const Scores other = run(*source, requests, c.share, c.pack, c.batch, c.pass, c.poison);
    for (std::size_t r = 0; r < requests.size(); ++r) {
      EXPECT_NEAR(other.values[r], alone.values[r], 1e-4) << "request " << r;
    }
    if (c.pass > 0) {
      EXPECT_GT(other.packing["passes"], 1);
    }
    if (c.share && c.pass == 0) {
      // Three sets of shots instead of 36.
      EXPECT_LT(other.packing["tokens_computed"].get<double>(),
                0.3 * alone.packing["tokens_computed"].get<double>());
    }
  }
}

TEST(Score, ImpossibleRequestsAreRefused) {
  const auto source = open_checkpoint(data);
  const auto message = [&](std::vector<ScoreRequest> requests) {
    return ::engine::testing::error_of([&] { run(*source, std::move(requests), true, true); });
  };
  using ::engine::testing::expect_contains;
  expect_contains(message({}), "found no request");
  expect_contains(message({{{5}, 1}}), "request 0: expected at least one scored token");
  expect_contains(message({{{5, 6}, 2}}), "found 2 tokens, 2 scored");
  expect_contains(message({{{5, 999999}, 1}}), "found 999999");
  expect_contains(message({{std::vector<std::int32_t>(8194, 3), 1}}), "8192 positions, found 8193");
}

}  // namespace
}  // namespace engine::test
