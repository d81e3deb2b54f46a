// Choice tasks: questions as tokens, and accuracies from log-likelihoods.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "eval/tasks.h"
#include "tests/formats/temp_dir.h"
#include "tests/formats/tokenizer_fixtures.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::Ids;

constexpr std::int32_t kBos = 300;

// A token per byte, but "x=" and "=y" are one each, the one that begins first: what a text's last
// character becomes depends on what follows.
class CrossingTokenizer final : public Tokenizer {
 public:
  CrossingTokenizer() : Tokenizer(bos_info(), testing::byte_tokens({"x=", "=y"})) {
    index_added_tokens();
  }

 private:
  static TokenizerInfo bos_info() {
    TokenizerInfo info;
    info.bos_id = kBos;
    info.added = {{kBos, "<bos>", true, false}};
    return info;
  }
  void encode_segments(std::span<const Segment> segments, SpecialText,
                       std::vector<std::int32_t>& out) const override {
    for (const Segment& segment : segments) {
      if (segment.id >= 0) {
        out.push_back(segment.id);
        continue;
      }
      for (std::size_t i = 0; i < segment.text.size(); ++i) {
        const std::string_view two = segment.text.substr(i, 2);
        if (two == "x=" || two == "=y") {
          out.push_back(two == "x=" ? 256 : 257);
          ++i;
        } else {
          out.push_back(static_cast<unsigned char>(segment.text[i]));
        }
      }
    }
  }
};

Task one_question(std::vector<std::pair<std::string, std::string>> choices, bool bare = false) {
  Task task;
  task.name = "made";
  task.preambles.resize(1);
  Question question;
  for (auto& [context, continuation] : choices) {
    Choice choice;
    choice.context = context;
    choice.continuation = continuation;
    choice.bare = bare;
    question.choices.push_back(choice);
  }
  task.questions = {question};
  return task;
}

struct Made {
  std::vector<Ids> tokens;
  std::vector<std::int64_t> scored;
  Json protocol;
};

Made make(const Task& task, const Tokenizer& tokenizer, Encoding encoding,
          std::int64_t max_inputs = 0) {
  Made out;
  for (ScoreRequest& r : make_requests(task, tokenizer, encoding, max_inputs, out.protocol)) {
    out.tokens.push_back(r.tokens);
    out.scored.push_back(r.scored);
  }
  return out;
}

TEST(TaskRequests, SeparateJointAndBos) {
  const CrossingTokenizer tokenizer;
  const Task task = one_question({{"a=", "y"}, {"x ", "=y"}});
  const Made separate = make(task, tokenizer, Encoding::separate);
  EXPECT_EQ(separate.tokens, (std::vector<Ids>{{'a', '=', 'y'}, {'x', ' ', 257}}));
  EXPECT_EQ(separate.scored, (std::vector<std::int64_t>{1, 1}));
  EXPECT_EQ(separate.protocol["encoding"], "lmeval-0.3");
  EXPECT_EQ(separate.protocol["bos"], false);

  // The space moves to the continuation: "x" and " =y".
  const Task moved = one_question({{"b", " =y"}, {"x ", "=y"}});
  const Made joint = make(moved, tokenizer, Encoding::joint);
  EXPECT_EQ(joint.tokens, (std::vector<Ids>{{'b', ' ', 257}, {'x', ' ', 257}}));
  EXPECT_EQ(joint.scored, (std::vector<std::int64_t>{2, 2}));
  EXPECT_EQ(joint.protocol["encoding"], "lmeval-0.4");

  const Made with_bos = make(moved, tokenizer, Encoding::joint_bos);
  EXPECT_EQ(with_bos.tokens, (std::vector<Ids>{{kBos, 'b', ' ', 257}, {kBos, 'x', ' ', 257}}));
  EXPECT_EQ(with_bos.scored, (std::vector<std::int64_t>{2, 2}));
  EXPECT_EQ(with_bos.protocol["encoding"], "lmeval-0.4.10");
  EXPECT_EQ(with_bos.protocol["bos"], true);
  EXPECT_EQ(with_bos.protocol["longest_request"], 4);
}

TEST(TaskRequests, JointTakesWhatIsBeyondTheContextsTokens) {
  const CrossingTokenizer tokenizer;
  // Whole: x= y, two tokens; the context has one. Separately the second token would be "=y".
  const Made joint = make(one_question({{"x", "=y"}, {"z", "=y"}}), tokenizer, Encoding::joint);
  EXPECT_EQ(joint.tokens, (std::vector<Ids>{{256, 'y'}, {'z', 257}}));
  EXPECT_EQ(joint.scored, (std::vector<std::int64_t>{1, 1}));
  // Here the continuation vanishes inside the context's token.
  expect_contains(error_of([&] {
                    (void)make(one_question({{"z", "q"}, {"x", "="}}), tokenizer, Encoding::joint);
                  }),
                  "made: question 1, choice 2: expected at least one token of context and one to "
                  "score, found 1 and 0");
  expect_contains(error_of([&] {
                    (void)make(one_question({{"", "q"}, {"x", "y"}}), tokenizer, Encoding::joint);
                  }),
                  "question 1, choice 1: expected at least one token of context and one to score, "
                  "found 0 and 1");
}

TEST(TaskRequests, SentencepieceDiffersBetweenTheProtocols) {
  const auto tokenizer = testing::tiny_spm();
  const Task task = one_question({{"c", " ab"}, {"c", " b"}});
  // Each alone begins with the dummy prefix, so " ab" is two spaces and a word.
  const Made separate = make(task, *tokenizer, Encoding::separate);
  const Made joint = make(task, *tokenizer, Encoding::joint);
  EXPECT_EQ(separate.tokens[0], (Ids{264, 267, 264, 263}));
  EXPECT_EQ(joint.tokens[0], (Ids{264, 267, 263}));
  EXPECT_EQ(separate.scored, (std::vector<std::int64_t>{2, 2}));
  EXPECT_EQ(joint.scored, (std::vector<std::int64_t>{1, 2}));
}

TEST(TaskRequests, BareIsTheLastTokenOfTheTextAlone) {
  const auto tokenizer = testing::tiny_spm();
  const Task task = one_question({{"c", "ab"}, {"c", "b"}}, true);
  for (const Encoding encoding : {Encoding::separate, Encoding::joint}) {
    const Made made = make(task, *tokenizer, encoding);
    EXPECT_EQ(made.tokens, (std::vector<Ids>{{264, 267, 263}, {264, 267, 266}}));
    EXPECT_EQ(made.scored, (std::vector<std::int64_t>{1, 1}));
  }
  EXPECT_EQ(make(task, *tokenizer, Encoding::joint_bos).tokens[1], (Ids{1, 264, 267, 266}));
}

TEST(TaskRequests, NamesOfSpecialTokensBecomeTheirIds) {
  const CrossingTokenizer tokenizer;
  const Task task = one_question({{"<bos>a", "b<bos>"}, {"a", "b"}});
  EXPECT_EQ(make(task, tokenizer, Encoding::joint).tokens[0], (Ids{kBos, 'a', 'b', kBos}));
  // A text that begins with BOS gets no second one.
  EXPECT_EQ(make(task, tokenizer, Encoding::joint_bos).tokens[0], (Ids{kBos, 'a', 'b', kBos}));
}

TEST(TaskRequests, LongOnesLoseTokensAtTheFront) {
  const CrossingTokenizer tokenizer;
  const Task task = one_question({{"abcd", "ef"}, {"ab", "e"}});
  const Made made = make(task, tokenizer, Encoding::joint_bos, 3);
  EXPECT_EQ(made.tokens, (std::vector<Ids>{{'c', 'd', 'e', 'f'}, {kBos, 'a', 'b', 'e'}}));
  EXPECT_EQ(made.scored, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(made.protocol["truncated_requests"], 1);
  EXPECT_EQ(made.protocol["longest_request"], 7);
  expect_contains(error_of([&] { (void)make(task, tokenizer, Encoding::joint, 1); }),
                  "question 1, choice 1: expected at least one token of context and one to score "
                  "with 1 inputs, found 0 and 2");
}

TEST(TaskRequests, ShotsAreDroppedFromTheEnd) {
  const CrossingTokenizer tokenizer;
  Task task = one_question({{"q", "A"}, {"q", "B"}});
  task.preambles[0].header = "H";
  task.preambles[0].shots = {"11", "22", "33"};
  task.questions.push_back(task.questions[0]);
  task.preambles.push_back({"", {"1"}});
  task.questions[1].preamble = 1;
  EXPECT_EQ(make(task, tokenizer, Encoding::joint).tokens[0],
            (Ids{'H', '1', '1', '2', '2', '3', '3', 'q', 'A'}));
  EXPECT_FALSE(make(task, tokenizer, Encoding::joint).protocol.contains("prompts_that_lost_shots"));
  task.max_prompt_tokens = 8;
  EXPECT_EQ(make(task, tokenizer, Encoding::joint).protocol["prompts_that_lost_shots"], 0);
  // BOS counts.
  const Made made = make(task, tokenizer, Encoding::joint_bos);
  EXPECT_EQ(made.tokens[1], (Ids{kBos, 'H', '1', '1', '2', '2', 'q', 'B'}));
  EXPECT_EQ(made.tokens[2], (Ids{kBos, '1', 'q', 'A'}));
  EXPECT_EQ(made.protocol["prompts_that_lost_shots"], 1);
  task.max_prompt_tokens = 1;  // the question itself always stays
  EXPECT_EQ(make(task, tokenizer, Encoding::joint).tokens[0], (Ids{'H', 'q', 'A'}));
}

TEST(TaskRequests, BosMustExist) {
  const auto tokenizer = make_bpe_from_ranks(testing::byte_tokens(), {});
  expect_contains(
      error_of([&] {
        (void)make(one_question({{"a", "b"}, {"a", "c"}}), *tokenizer, Encoding::joint_bos);
      }),
      "lmeval-0.4.10: expected a tokenizer with a BOS token");
  EXPECT_EQ(encoding_from_name("lmeval-0.4"), Encoding::joint);
  expect_contains(error_of([] { (void)encoding_from_name("0.4"); }),
                  "expected one of lmeval-0.3, lmeval-0.4, lmeval-0.4.10, found \"0.4\"");
}

TEST(TaskRequests, OrderDoesNotDependOnThreads) {
  const CrossingTokenizer tokenizer;
  Task task = one_question({{"q0", "A"}, {"q0", "B"}});
  for (int q = 1; q < 500; ++q) {
    Question question = task.questions[0];
    const std::string context = "q" + std::to_string(q);
    question.choices.resize(q % 3 == 0 ? 3 : 2, question.choices[0]);
    for (Choice& choice : question.choices) choice.context = context;
    task.questions.push_back(question);
  }
  const Made made = make(task, tokenizer, Encoding::joint);
  std::size_t at = 0;
  for (const Question& question : task.questions) {
    for (const Choice& choice : question.choices) {
      ASSERT_EQ(tokenizer.decode(made.tokens.at(at++)), choice.context + choice.continuation);
    }
  }
  EXPECT_EQ(at, made.tokens.size());
}

// Questions with two choices each of the given lengths.
Task with_lengths(const std::vector<std::vector<std::int64_t>>& lengths,
                  const std::vector<std::int64_t>& gold) {
  Task task;
  task.name = "made";
  for (std::size_t q = 0; q < lengths.size(); ++q) {
    Question question;
    for (const std::int64_t length : lengths[q]) {
      Choice choice;
      choice.code_points = length;
      question.choices.push_back(choice);
    }
    question.gold = gold[q];
    task.questions.push_back(question);
  }
  return task;
}

TEST(TaskResults, AccuraciesTiesAndStandardErrors) {
  const Task task = with_lengths({{1, 10}, {4, 4, 2}, {5, 5}, {2, 4}}, {1, 0, 1, 0});
  // Right by acc: no (-2 > -10), yes (a tie of three goes to the first), no (a tie), yes.
  // By acc_norm: yes (-1 > -2), yes (-0.5 twice), no (a tie), no (-1 < -0.75).
  const std::vector<double> scores = {-2, -10, -2, -2, -2, -7, -7, -2, -3};
  const Json result = task_results(task, scores);
  EXPECT_EQ(result["task"], "made");
  EXPECT_EQ(result["n"], 4);
  EXPECT_EQ(result["acc"], 0.5);
  EXPECT_EQ(result["acc_norm"], 0.5);
  EXPECT_DOUBLE_EQ(result["acc_stderr"].get<double>(), std::sqrt(0.25 / 3));
  EXPECT_DOUBLE_EQ(result["acc_norm_stderr"].get<double>(), std::sqrt(0.25 / 3));
  EXPECT_FALSE(result.contains("subjects"));

  Task plain = task;
  plain.has_acc_norm = false;
  EXPECT_FALSE(task_results(plain, scores).contains("acc_norm"));
}

TEST(TaskResults, OneQuestionHasNoStandardError) {
  const Json result = task_results(with_lengths({{0, 3}}, {1}), std::vector<double>{-1, -9});
  EXPECT_EQ(result["acc"], 0.0);
  EXPECT_EQ(result["acc_norm"], 1.0);  // a choice without characters cannot win
  EXPECT_FALSE(result.contains("acc_stderr"));
  EXPECT_FALSE(result.contains("acc_norm_stderr"));
}

TEST(TaskResults, MmluBySubjectAndCategory) {
  Task task = with_lengths({{1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}, {0, 0, 0, 0, 0});
  task.has_acc_norm = false;
  task.subjects = {"anatomy", "astronomy", "virology"};
  const std::vector<std::int64_t> subjects = {0, 0, 0, 1, 2};
  for (std::size_t q = 0; q < 5; ++q) task.questions[q].subject = subjects[q];
  // Right: two of anatomy's three, astronomy's, not virology's.
  const std::vector<double> scores = {-1, -2, -1, -2, -2, -1, -1, -2, -2, -1};
  const Json result = task_results(task, scores);
  EXPECT_EQ(result["acc"], 0.6);  // micro: of all questions
  EXPECT_DOUBLE_EQ(result["macro"].get<double>(), (2.0 / 3 + 1 + 0) / 3);
  EXPECT_EQ(result["categories"].size(), 2U);
  EXPECT_EQ(result["categories"]["other"]["n"], 4);
  EXPECT_EQ(result["categories"]["other"]["acc"], 0.5);
  EXPECT_DOUBLE_EQ(result["categories"]["other"]["acc_stderr"].get<double>(), std::sqrt(0.25 / 3));
  EXPECT_EQ(result["categories"]["stem"]["acc"], 1.0);
  EXPECT_FALSE(result["categories"]["stem"].contains("acc_stderr"));
  ASSERT_EQ(result["subjects"].size(), 3U);
  EXPECT_EQ(result["subjects"][0]["subject"], "anatomy");
  EXPECT_EQ(result["subjects"][0]["n"], 3);
  EXPECT_EQ(result["subjects"][0]["acc"], 2.0 / 3);
  EXPECT_EQ(result["subjects"][2]["acc"], 0.0);
}

TEST(TaskResults, RefusesWhatIsNoLogLikelihood) {
  const Task task = with_lengths({{1, 1}, {1, 1}}, {0, 0});
  const auto message = [&](const std::vector<double>& scores) {
    return error_of([&] { (void)task_results(task, scores); });
  };
  expect_contains(message({-1, -2, -3, std::nan("")}),
                  "made: question 2, choice 2: expected a finite log-likelihood, found nan");
  expect_contains(message({-std::numeric_limits<double>::infinity(), -2, -3, -4}),
                  "question 1, choice 1");
  expect_contains(message({-1, -2, -3}), "fewer log-likelihoods than choices");
  expect_contains(message({-1, -2, -3, -4, -5}), "more log-likelihoods than choices");
}

TEST(TaskResults, PairedDifferences) {
  const Task task = with_lengths({{1, 2}, {1, 2}, {1, 2}, {1, 2}}, {0, 0, 0, 0});
  const std::vector<double> model = {-1, -4, -1, -4, -1, -4, -4, -1};      // right: 1 1 1 0
  const std::vector<double> reference = {-4, -1, -1, -4, -4, -1, -1, -4};  // right: 0 1 0 1
  const Json result = paired_results(task, model, reference);
  EXPECT_EQ(result["task"], "made");
  EXPECT_EQ(result["difference"], 0.25);
  // Differences 1, 0, 1, -1: sum of squares about the mean 3 - 4 / 16 = 2.75.
  EXPECT_DOUBLE_EQ(result["stderr"].get<double>(), std::sqrt(2.75 / 3 / 4));
  EXPECT_EQ(result["difference_norm"], 0.25);
  EXPECT_DOUBLE_EQ(result["stderr_norm"].get<double>(), std::sqrt(2.75 / 3 / 4));
  EXPECT_EQ(paired_results(task, reference, model)["difference"], -0.25);

  Task plain = with_lengths({{1, 2}}, {0});
  plain.has_acc_norm = false;
  const Json one = paired_results(plain, std::vector<double>{-1, -2}, std::vector<double>{-2, -1});
  EXPECT_EQ(one["difference"], 1.0);
  EXPECT_FALSE(one.contains("stderr"));
  EXPECT_FALSE(one.contains("difference_norm"));
}

}  // namespace
}  // namespace engine
