// Whole runs of the program: the same bytes every time, also after an interruption.
#include <gtest/gtest.h>

#include <cmath>
#include <csignal>

#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/program.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

// GPTQ of the checkpoint of the tests: a fraction of a second with few samples.
Arguments gptq(const fs::path& out, int samples, const Arguments& more = {}) {
  return Arguments{"quantize",
                   "--model",
                   tiny_llama3(),
                   "--method",
                   "gptq",
                   "--bits",
                   "3",
                   "--group",
                   "64",
                   "--calib",
                   tiny_llama3() / "calib.txt",
                   "--samples",
                   std::to_string(samples),
                   "--seq",
                   "256",
                   "--out",
                   out,
                   "--device",
                   "cpu"} +
         more;
}

void expect_success(const Arguments& arguments) {
  const Outcome outcome = run_program(arguments);
  ASSERT_EQ(outcome.exit_code, 0) << command_text(arguments) << "\n" << outcome.err;
  EXPECT_EQ(outcome.err, "") << command_text(arguments);
}

struct Paths {
  explicit Paths(const fs::path& directory)
      : out(directory / "o.qw"),
        partial(directory / "o.qw.partial"),
        journal(directory / "o.qw.journal") {}
  fs::path out, partial, journal;
};

enum class When { before_first_block, after_a_block };

// Runs GPTQ into `paths` and sends `signal` while it works; a run that was over before the signal
// could tell is repeated with more samples. Returns the samples of the run that was interrupted,
// 0 if there was none.
int interrupted_run(const Paths& paths, int signal, When when, Outcome& outcome) {
  for (int samples = 16; samples <= 1024; samples *= 4) {
    for (const fs::path& p : {paths.out, paths.partial, paths.journal}) fs::remove(p);
    Program program(gptq(paths.out, samples));
    const bool early = when == When::before_first_block;
    if (!program.runs_until_exists(early ? paths.partial : paths.journal)) continue;
    program.send(signal);
    outcome = program.wait();
    if (outcome.timed_out) return 0;
    if (outcome.exit_code == 0 || fs::exists(paths.out)) continue;
    if (early && outcome.err.find("--resume") != std::string::npos) continue;
    return samples;
  }
  return 0;
}

void expect_resumed_equals_uninterrupted(const Paths& paths, int samples) {
  expect_success(gptq(paths.out, samples, {"--resume"}));
  EXPECT_FALSE(fs::exists(paths.partial));
  EXPECT_FALSE(fs::exists(paths.journal));
  const TemporaryDirectory other;
  expect_success(gptq(other.path() / "whole.qw", samples));
  EXPECT_TRUE(read_bytes(paths.out) == read_bytes(other.path() / "whole.qw"));
}

TEST(Resume, RunsAreReproducibleWithAnyNumberOfThreads) {
  const TemporaryDirectory d;
  expect_success(gptq(d.path() / "one.qw", 8, {"--threads", "1"}));
  expect_success(gptq(d.path() / "two.qw", 8, {"--threads", "2"}));
  expect_success(gptq(d.path() / "again.qw", 8, {"--threads", "2"}));
  const std::string one = read_bytes(d.path() / "one.qw");
  EXPECT_GT(one.size(), 1'000'000U);
  EXPECT_TRUE(one == read_bytes(d.path() / "two.qw"));
  EXPECT_TRUE(one == read_bytes(d.path() / "again.qw"));
  // The comparison can tell: other calibration data give other bytes.
  expect_success(gptq(d.path() / "other.qw", 8, {"--seed", "1"}));
  EXPECT_FALSE(one == read_bytes(d.path() / "other.qw"));
}

TEST(Resume, ContinuesAKilledRun) {
  const TemporaryDirectory d;
  const Paths paths(d.path());
  Outcome outcome;
  const int samples = interrupted_run(paths, SIGKILL, When::after_a_block, outcome);
  ASSERT_GT(samples, 0);
  EXPECT_EQ(outcome.signal, SIGKILL);
  EXPECT_FALSE(fs::exists(paths.out));
  ASSERT_TRUE(fs::exists(paths.partial));
  ASSERT_TRUE(fs::exists(paths.journal));
  expect_resumed_equals_uninterrupted(paths, samples);
}

TEST(Resume, AKilledRunCanBeStartedAfresh) {
  const TemporaryDirectory d;
  const Paths paths(d.path());
  Outcome outcome;
  const int samples = interrupted_run(paths, SIGKILL, When::after_a_block, outcome);
  ASSERT_GT(samples, 0);
  // Finished blocks are not thrown away unasked.
  const auto kept = contents(d.path());
  const std::vector<std::string> again = gptq(paths.out, 8);
  expect_one_error(run_program(again), again, 2, {"o.qw", "--resume", "--restart"});
  EXPECT_TRUE(contents(d.path()) == kept);
  std::vector<std::string> restart = again;
  restart.emplace_back("--restart");
  expect_success(restart);
  EXPECT_EQ(contents(d.path()).size(), 1U);
  expect_success(gptq(d.path() / "whole.qw", 8));
  EXPECT_TRUE(read_bytes(paths.out) == read_bytes(d.path() / "whole.qw"));
}

TEST(Resume, ContinuesAnInterruptedRun) {
  const TemporaryDirectory d;
  const Paths paths(d.path());
  Outcome outcome;
  const int samples = interrupted_run(paths, SIGINT, When::after_a_block, outcome);
  ASSERT_GT(samples, 0);
  expect_one_error(outcome, gptq(paths.out, samples), 130,
                   {"Ctrl-C", "finished block", "--resume"});
  const auto kept = contents(d.path());
  EXPECT_EQ(kept.size(), 2U);
  ASSERT_TRUE(kept.contains("o.qw.partial"));
  ASSERT_TRUE(kept.contains("o.qw.journal"));

  // Other options cannot continue it, and do not touch it.
  const std::pair<Arguments, std::string> others[] = {
      {gptq(paths.out, samples, {"--damp", "0.02"}), "options"},
      {gptq(paths.out, samples, {"--seed", "1"}), "calibration"},
      {gptq(paths.out, samples, {"--zstd-level", "3"}), "zstd level"},
      {gptq(paths.out, samples, {"--blocks", "0:3"}), "config"}};
  for (const auto& [arguments, fragment] : others) {
    const Arguments resumed = arguments + Arguments{"--resume"};
    expect_one_error(run_program(resumed), resumed, 5, {"o.qw", "resume", fragment, "expected"});
    EXPECT_EQ(contents(d.path()), kept);
  }
  expect_resumed_equals_uninterrupted(paths, samples);
}

TEST(Resume, ContinuesATerminatedRun) {
  const TemporaryDirectory d;
  const Paths paths(d.path());
  Outcome outcome;
  const int samples = interrupted_run(paths, SIGTERM, When::after_a_block, outcome);
  ASSERT_GT(samples, 0);
  expect_one_error(outcome, gptq(paths.out, samples), 130, {"SIGTERM", "--resume"});
  expect_resumed_equals_uninterrupted(paths, samples);
}

TEST(Resume, NothingIsLeftOfARunInterruptedBeforeItsFirstBlock) {
  const TemporaryDirectory d;
  Outcome outcome;
  const int samples = interrupted_run(Paths(d.path()), SIGINT, When::before_first_block, outcome);
  ASSERT_GT(samples, 0);
  expect_one_error(outcome, gptq(d.path() / "o.qw", samples), 130, {"interrupted"});
  EXPECT_TRUE(contents(d.path()).empty());
}

// What an interrupted run left can be damaged before it is continued.
TEST(Resume, RefusesDamagedRemains) {
  const TemporaryDirectory d;
  const Paths paths(d.path());
  Outcome outcome;
  const int samples = interrupted_run(paths, SIGKILL, When::after_a_block, outcome);
  ASSERT_GT(samples, 0);
  const Arguments resume = gptq(paths.out, samples, {"--resume"});
  const std::string journal = read_bytes(paths.journal), partial = read_bytes(paths.partial);
  const auto restore = [&] {
    write_bytes(paths.journal, journal);
    write_bytes(paths.partial, partial);
  };
  std::string changed = journal;
  changed[journal.size() / 2] = static_cast<char>(changed[journal.size() / 2] ^ 1);
  write_bytes(paths.journal, changed);
  expect_one_error(run_program(resume), resume, 3, {"o.qw.journal", "expected", "found"});
  restore();
  write_bytes(paths.journal, journal.substr(0, journal.size() / 2));
  expect_one_error(run_program(resume), resume, 3, {"o.qw.journal", "expected", "found"});
  restore();
  write_bytes(paths.partial, partial.substr(0, 1000));
  expect_one_error(run_program(resume), resume, 3, {"o.qw.partial", "size", "found 1000"});
  restore();
  changed = partial;
  changed[2000] = static_cast<char>(changed[2000] ^ 1);  // inside the planes of the first block
  write_bytes(paths.partial, changed);
  expect_one_error(run_program(resume), resume, 3, {"o.qw.partial", "expected", "found"});
  fs::remove(paths.partial);
  expect_one_error(run_program(resume), resume, 4, {"o.qw.journal", "o.qw.partial", "does not"});
  EXPECT_FALSE(fs::exists(paths.out));
}

// A packed model and what the other commands make of it.
class Pipeline : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = new TemporaryDirectory;
    expect_success(gptq(path("a.qw"), 8));
    expect_success(gptq(path("b.qw"), 8, {"--damp", "0.05"}));
  }
  static void TearDownTestSuite() { delete directory_; }
  static fs::path path(const char* name) { return directory_->path() / name; }

  static double perplexity(const fs::path& model) {
    const fs::path report = path("ppl.json");
    expect_success({"ppl", "--model", model, "--text", tiny_llama3() / "heldout.txt", "--seq",
                    "256", "--limit", "8", "--device", "cpu", "--report", report});
    return Json::parse(read_bytes(report)).at("results").at(0).at("perplexity").get<double>();
  }
  static std::string generated(const Arguments& more) {
    const Outcome outcome =
        run_program(Arguments{"generate", "--model", path("a.qw"), "--prompt", "In the year",
                              "--max-tokens", "24", "--device", "cpu"} +
                    more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.out;
  }

 private:
  static inline TemporaryDirectory* directory_ = nullptr;
};

TEST_F(Pipeline, ADecodedModelHasThePerplexityOfThePackedOne) {
  expect_success({"decode", "--model", path("a.qw"), "--out", path("dense"), "--out-dtype", "f32",
                  "--device", "cpu"});
  const double packed = perplexity(path("a.qw"));
  const double dense = perplexity(path("dense"));
  ASSERT_TRUE(std::isfinite(packed));
  EXPECT_GT(packed, 1.0);
  EXPECT_LE(std::fabs(dense - packed), 1e-6 * packed) << packed << " " << dense;
  // Another quantization of the same model is told apart.
  const double other = perplexity(path("b.qw"));
  EXPECT_GT(std::fabs(other - packed), 1e-5 * packed) << packed << " " << other;
}

TEST_F(Pipeline, InspectShowsWhatDiffers) {
  const Outcome same = run_program({"inspect", "--json", path("a.qw"), path("a.qw")});
  ASSERT_EQ(same.exit_code, 0) << same.err;
  EXPECT_TRUE(Json::parse(same.out).at("differences").empty()) << same.out;
  const Outcome outcome = run_program({"inspect", "--json", path("a.qw"), path("b.qw")});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  bool damping = false, error = false;
  const Json document = Json::parse(outcome.out);
  for (const Json& row : document.at("differences")) {
    const std::string key = row.at("key").get<std::string>();
    if (key == "options.damp") {
      damping = true;
      EXPECT_EQ(row.at("first").get<double>(), 0.01);
      EXPECT_EQ(row.at("second").get<double>(), 0.05);
    }
    if (key == "linears[layers.0.self_attn.q_proj].relative_error") error = true;
  }
  EXPECT_TRUE(damping) << outcome.out;
  EXPECT_TRUE(error) << outcome.out;
}

TEST_F(Pipeline, GenerationIsReproducible) {
  const Arguments greedy = {"--temperature", "0"};
  const Arguments sampled = {"--temperature", "1", "--top-p", "0.95", "--seed", "5"};
  const std::string text = generated(greedy);
  EXPECT_GT(text.size(), 10U);
  EXPECT_EQ(text, generated(greedy));
  EXPECT_EQ(generated(sampled), generated(sampled));
  EXPECT_NE(generated(sampled), generated({"--temperature", "1", "--seed", "6"}));
}

}  // namespace
}  // namespace engine::test
