// Plans of shared and packed sequences: what every row attends to, checked by walking the runs.
#include "eval/score_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

namespace engine::test {
namespace {

using Ids = std::vector<std::int32_t>;

// Requests that share beginnings at several levels, some equal, some a beginning of others.
std::vector<ScoreRequest> random_requests(std::uint32_t seed, std::size_t count,
                                          std::size_t longest) {
  std::mt19937 random(seed);
  const auto below = [&](std::size_t n) { return random() % n; };
  std::vector<ScoreRequest> requests;
  while (requests.size() < count) {
    ScoreRequest r;
    if (!requests.empty() && below(5) > 0) {
      const Ids& other = requests[below(requests.size())].tokens;
      r.tokens.assign(other.begin(), other.begin() + static_cast<long>(below(other.size()) + 1));
    }
    const std::size_t size = std::max<std::size_t>(2, r.tokens.size() + below(longest));
    while (r.tokens.size() < size) r.tokens.push_back(static_cast<std::int32_t>(below(3)));
    r.scored = 1 + static_cast<std::int64_t>(below(r.tokens.size() - 1));
    requests.push_back(std::move(r));
  }
  return requests;
}

struct Key {
  std::int32_t token = -1;
  std::int32_t position = -1;
};

// Runs the plan with tokens in the place of keys: returns, per row, the sequence it sees.
std::vector<Ids> seen_by_rows(const ScorePlan& plan) {
  std::vector<Ids> seen(static_cast<std::size_t>(plan.rows()));
  std::vector<Key> keys(static_cast<std::size_t>(plan.kept + plan.batch_rows));
  std::int64_t next_row = 0, next_run = 0;
  for (const ScoreBatch& batch : plan.batches) {
    EXPECT_EQ(batch.first_row, next_row);
    EXPECT_EQ(batch.first_run, next_run);
    EXPECT_LE(batch.rows, plan.batch_rows);
    next_row += batch.rows;
    next_run += batch.runs;
    for (std::int64_t r = 0; r < batch.rows; ++r) {
      const auto at = static_cast<std::size_t>(batch.first_row + r);
      keys[static_cast<std::size_t>(plan.kept + r)] = {plan.ids[at], plan.positions[at]};
    }
    for (std::int64_t i = batch.first_run; i < batch.first_run + batch.runs; ++i) {
      const std::int32_t* run = plan.runs.data() + i * run_columns;
      Ids chain;
      for (std::int64_t s = 0; s < run_spans; ++s) {
        for (std::int32_t k = 0; k < run[3 + 2 * s]; ++k) {
          const Key& key = keys.at(static_cast<std::size_t>(run[2 + 2 * s] + k));
          EXPECT_EQ(key.position, static_cast<std::int32_t>(chain.size()));
          chain.push_back(key.token);
        }
      }
      EXPECT_GE(run[1], 1);
      EXPECT_LE(run[1], run_queries);
      for (std::int32_t q = 0; q < run[1]; ++q) {
        const auto visible = static_cast<std::ptrdiff_t>(chain.size()) - run[1] + q + 1;
        Ids& own = seen[static_cast<std::size_t>(batch.first_row + run[0] + q)];
        EXPECT_TRUE(own.empty()) << "a row in two runs";
        own.assign(chain.begin(), chain.begin() + visible);
      }
    }
    // Two copies of a batch must not depend on their order.
    std::set<std::int64_t> written;
    for (const KeptCopy& c : batch.copies) {
      for (std::int64_t k = 0; k < c.rows; ++k) written.insert(c.to + k);
    }
    for (const KeptCopy& c : batch.copies) {
      for (std::int64_t k = 0; k < c.rows; ++k) {
        EXPECT_FALSE(written.contains(c.from + k));
        EXPECT_LT(c.to + k, plan.kept);
        keys.at(static_cast<std::size_t>(c.to + k)) = keys.at(static_cast<std::size_t>(c.from + k));
      }
    }
    // The next batch must not find this one's rows.
    std::fill(keys.begin() + plan.kept, keys.end(), Key{});
  }
  EXPECT_EQ(next_row, plan.rows());
  EXPECT_EQ(next_run * run_columns, static_cast<std::int64_t>(plan.runs.size()));
  return seen;
}

void expect_right(const std::vector<ScoreRequest>& requests, const ScoreOptions& options) {
  const auto order = sorted_requests(requests);
  const ScorePlan plan = plan_scores(requests, order, options);
  const std::vector<Ids> seen = seen_by_rows(plan);
  std::map<std::int64_t, std::multiset<std::size_t>> found;
  std::int64_t last_row = 0;
  for (const ScoreTarget& t : plan.targets) {
    EXPECT_GE(t.row, last_row);
    last_row = t.row;
    const Ids& tokens = requests[static_cast<std::size_t>(t.request)].tokens;
    const Ids& context = seen[static_cast<std::size_t>(t.row)];
    ASSERT_LT(context.size(), tokens.size());
    EXPECT_TRUE(std::equal(context.begin(), context.end(), tokens.begin()));
    EXPECT_EQ(t.token, tokens[context.size()]);
    found[t.request].insert(context.size());
  }
  for (std::size_t r = 0; r < requests.size(); ++r) {
    std::multiset<std::size_t> expected;
    const std::size_t n = requests[r].tokens.size();
    for (auto i = n - static_cast<std::size_t>(requests[r].scored); i < n; ++i) expected.insert(i);
    EXPECT_EQ(found[static_cast<std::int64_t>(r)], expected) << "request " << r;
  }
  std::int64_t pairs = 0;
  for (const Ids& s : seen) pairs += static_cast<std::int64_t>(s.size());
  EXPECT_EQ(pairs, plan.pairs);
}

TEST(ScorePlan, EveryRowSeesItsSequence) {
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(seed);
    const auto requests = random_requests(seed, 1 + seed * 3, seed % 4 == 0 ? 200 : 12);
    for (const std::int64_t rows : {1, 17, 64, 100000}) {
      for (const bool share : {true, false}) {
        for (const bool pack : {true, false}) {
          expect_right(requests, {.share = share, .pack = pack, .batch_rows = rows});
        }
      }
    }
  }
}

TEST(ScorePlan, LettersOfOneQuestionShareItsLastRow) {
  Ids context(100, 7);
  std::vector<ScoreRequest> requests;
  for (std::int32_t letter = 0; letter < 4; ++letter) {
    requests.push_back({context, 1});
    requests.back().tokens.push_back(letter);
  }
  const ScorePlan plan = plan_scores(requests, sorted_requests(requests), {});
  EXPECT_EQ(plan.rows(), 100);
  ASSERT_EQ(plan.targets.size(), 4U);
  for (const ScoreTarget& t : plan.targets) EXPECT_EQ(t.row, 99);
}

TEST(ScorePlan, ShotsAreComputedOnce) {
  std::vector<ScoreRequest> requests;
  for (std::int32_t q = 0; q < 50; ++q) {
    Ids tokens(600, 1);
    for (std::int32_t i = 0; i < 30; ++i) tokens.push_back(2 + (q * 31 + i) % 97);
    requests.push_back({tokens, 1});
  }
  const auto order = sorted_requests(requests);
  EXPECT_LE(plan_scores(requests, order, {}).rows(), 600 + 50 * 29);
  EXPECT_EQ(plan_scores(requests, order, {.share = false}).rows(), 50 * 629);
}

// A chain may have run_spans pieces only; the levels below are computed once per sequence.
TEST(ScorePlan, DeepTreesEndAtTheLastSpan) {
  std::vector<ScoreRequest> requests;
  for (std::int32_t depth = 1; depth < 12; ++depth) {
    Ids tokens(static_cast<std::size_t>(depth) * 40, 1);
    for (const std::int32_t next : {2, 3}) {
      tokens.resize(static_cast<std::size_t>(depth) * 40);
      tokens.insert(tokens.end(), 10, next);
      requests.push_back({tokens, 3});
    }
  }
  expect_right(requests, {});
  const ScorePlan plan = plan_scores(requests, sorted_requests(requests), {});
  std::int64_t deepest = 0;
  for (std::int64_t s = 0; s < static_cast<std::int64_t>(plan.segments.size()); ++s) {
    std::int64_t chain = 0;
    for (std::int64_t i = s; i >= 0; i = plan.segments[static_cast<std::size_t>(i)].parent) ++chain;
    deepest = std::max(deepest, chain);
  }
  EXPECT_EQ(deepest, run_spans);
}

}  // namespace
}  // namespace engine::test
