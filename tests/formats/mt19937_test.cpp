#include "formats/mt19937.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "formats/error.h"

namespace engine {
namespace {

std::vector<std::int64_t> draws(std::int64_t seed, std::int64_t high, int count) {
  PythonRandom random(seed);
  std::vector<std::int64_t> out;
  for (int i = 0; i < count; ++i) out.push_back(random.randint(0, high));
  return out;
}

// Recorded from CPython's random module: getrandbits(32) and randint after seed(n).
TEST(PythonRandom, MatchesCPython) {
  struct Case {
    std::int64_t seed;
    std::vector<std::uint32_t> words;
    std::vector<std::int64_t> numbers;  // randint(0, 999999)
  };
  const std::vector<Case> cases = {
      {0,
       {3626764237U, 1654615998U, 3255389356U, 3823568514U},
       {885440, 403958, 794772, 933488, 441001, 42450, 271493, 536110}},
      {2,
       {4106135923U, 3707026329U, 4070888059U, 3646664648U},
       {905035, 993869, 890298, 59298, 96033, 88994, 378596, 876084}},
  };
  for (const Case& c : cases) {
    PythonRandom random(c.seed);
    for (const std::uint32_t word : c.words) EXPECT_EQ(random.next_u32(), word) << c.seed;
    EXPECT_EQ(draws(c.seed, 999'999, 8), c.numbers) << c.seed;
  }
  using Numbers = std::vector<std::int64_t>;
  EXPECT_EQ(draws(0, 356'316, 4), (Numbers{201'979, 220'500, 21'225, 135'746}));
  EXPECT_EQ(draws(0, 45'575, 4), (Numbers{25'247, 27'562, 2'653, 16'968}));
}

// Also recorded from CPython: a seed of two words, the 2000th word (past three refills) and a
// range that starts below zero.
TEST(PythonRandom, MatchesCPythonBeyondTheFirstState) {
  PythonRandom wide((std::int64_t{1} << 40) + 5);
  for (const std::uint32_t word : {2166296868U, 2220160828U, 1153647273U, 2850991874U}) {
    EXPECT_EQ(wide.next_u32(), word);
  }
  PythonRandom longer(12345);
  std::uint32_t last = 0;
  for (int i = 0; i < 2000; ++i) last = longer.next_u32();
  EXPECT_EQ(last, 3083619685U);
  PythonRandom negative(7);
  for (const std::int64_t number : {-1, -2, 0, 2, -3, -3, 3, 1}) {
    EXPECT_EQ(negative.randint(-3, 3), number);
  }
}

TEST(PythonRandom, TheSignOfTheSeedDoesNotMatter) {
  EXPECT_EQ(draws(-2, 999'999, 8), draws(2, 999'999, 8));
  EXPECT_NE(draws(3, 999'999, 8), draws(2, 999'999, 8));
}

TEST(PythonRandom, RangesAreChecked) {
  PythonRandom random(0);
  EXPECT_EQ(random.randint(5, 5), 5);
  EXPECT_THROW((void)random.randint(1, 0), Error);
  EXPECT_THROW((void)random.randint(0, std::int64_t{1} << 32), Error);
  EXPECT_THROW((void)random.randint(INT64_MIN, INT64_MAX), Error);
  for (int i = 0; i < 1000; ++i) {
    const std::int64_t value = random.randint(-3, 3);
    ASSERT_TRUE(value >= -3 && value <= 3) << value;
  }
}

}  // namespace
}  // namespace engine
