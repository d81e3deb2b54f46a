// Whole studies as a user runs them: computed once, continued after anything, and honest about jobs
// that fail.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <csignal>
#include <limits>

#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/program.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

namespace fs = std::filesystem;

// RTN at 2 and 4 bits of the checkpoint of the tests, with perplexity on a few windows.
Json small_study() {
  Json c;
  c["name"] = "small";
  c["device"] = "cpu";
  c["models"] = Json::array({{{"name", "tiny"}, {"path", tiny_llama3().string()}}});
  c["quantize"] = Json::array({{{"methods", {"rtn"}}, {"bits", {2, 4}}, {"groups", {64}}}});
  c["evaluate"] = Json::array({{{"kind", "ppl"},
                                {"name", "heldout"},
                                {"text", (tiny_llama3() / "heldout.txt").string()},
                                {"seq", 256},
                                {"limit", 4}}});
  c["report"] = {{"plots", false}};
  return c;
}

class Study : public testing::Test {
 protected:
  [[nodiscard]] fs::path out() const { return directory_.path() / "study-small"; }
  [[nodiscard]] Arguments command(const Json& config, const Arguments& more = {}) const {
    write_bytes(directory_.path() / "study.json", config.dump());
    return Arguments{"study", "--config", directory_.path() / "study.json"} + more;
  }
  [[nodiscard]] Json results() const { return Json::parse(read_bytes(out() / "results.json")); }
  [[nodiscard]] std::size_t count(const std::string& end) const {
    std::size_t n = 0;
    for (const auto& [name, size] : contents(out())) n += name.ends_with(end) ? 1U : 0U;
    return n;
  }

  // The same results but for what is measured anew each time: times, and the peak of memory, in
  // which on a CPU the packed bytes count that wait to be written.
  static void expect_same(Json found, Json expected) {
    for (Json* j : {&found, &expected}) {
      for (Json& row : j->at("rows")) {
        row.erase("quantize_s");
        row.erase("quantize_peak_bytes");
      }
      for (Json& job : j->at("jobs")) job.erase("resumed");
    }
    EXPECT_EQ(Json::diff(found, expected).dump(1), "[]");
  }

  TemporaryDirectory directory_;
};

TEST_F(Study, RunsOnceAndIsThenCached) {
  const Arguments run = command(small_study());
  const Outcome first = run_program(run);
  ASSERT_EQ(first.exit_code, 0) << first.err;
  EXPECT_NE(first.out.find("5 jobs, 0 cached, 5 to run"), std::string::npos) << first.out;
  EXPECT_NE(first.out.find("[5 of 5] tiny, rtn 4 bits g64: ppl heldout: "), std::string::npos)
      << first.out;
  const Json found = results();
  ASSERT_EQ(found.at("rows").size(), 3U);
  const auto ppl = [&](std::size_t row) {
    return found.at("rows").at(row).at("perplexity").at(0).at("perplexity").get<double>();
  };
  EXPECT_EQ(found["rows"][0]["method"], "fp");
  EXPECT_EQ(found["rows"][2]["label"], "rtn 4 bits g64");
  EXPECT_GT(ppl(1), 2 * ppl(0));
  EXPECT_GT(ppl(2), ppl(0));
  EXPECT_LT(ppl(2), 1.5 * ppl(0));
  EXPECT_EQ(found["rows"][1]["linear_error"].size(), 28U);
  EXPECT_GT(found["rows"][1]["quantize_peak_bytes"].get<std::int64_t>(), 100'000);
  EXPECT_TRUE(fs::exists(out() / "tables/table1.md"));
  EXPECT_EQ(count(".qw"), 0U) << "quantized models stay only on request";

  const std::string before = read_bytes(out() / "results.json");
  const Outcome second = run_program(run);
  ASSERT_EQ(second.exit_code, 0) << second.err;
  EXPECT_NE(second.out.find("5 jobs, 5 cached, 0 to run"), std::string::npos) << second.out;
  EXPECT_EQ(second.out.find(" of 5] "), std::string::npos) << second.out;
  EXPECT_EQ(read_bytes(out() / "results.json"), before);
}

TEST_F(Study, DryRunPlansAndWritesNothing) {
  const Outcome plan = run_program(command(small_study(), {"--dry-run"}));
  ASSERT_EQ(plan.exit_code, 0) << plan.err;
  EXPECT_NE(plan.out.find("tiny, rtn 2 bits g64: quantize: run, "), std::string::npos) << plan.out;
  EXPECT_NE(plan.out.find("5 jobs, 0 cached, 5 to run; about "), std::string::npos) << plan.out;
  EXPECT_FALSE(fs::exists(out()));
}

TEST_F(Study, AddsOnlyWhatIsNewAndQuantizesAgainForIt) {
  ASSERT_EQ(run_program(command(small_study())).exit_code, 0);
  Json more = small_study();
  more["threads"] = 1;
  more["quantize"][0]["bits"] = {2, 3, 4};
  const Outcome wider = run_program(command(more));
  ASSERT_EQ(wider.exit_code, 0) << wider.err;
  EXPECT_NE(wider.out.find("7 jobs, 5 cached, 2 to run"), std::string::npos) << wider.out;
  // Another window length: every evaluation, and the models they need, which are gone.
  more["evaluate"][0]["seq"] = 128;
  const Outcome other = run_program(command(more));
  ASSERT_EQ(other.exit_code, 0) << other.err;
  EXPECT_NE(other.out.find("7 jobs, 0 cached, 7 to run"), std::string::npos) << other.out;
}

TEST_F(Study, KeepsModelsOnRequest) {
  Json c = small_study();
  c["keep_models"] = true;
  ASSERT_EQ(run_program(command(c)).exit_code, 0);
  EXPECT_EQ(count(".qw"), 2U);
  c["evaluate"][0]["limit"] = 2;
  const Outcome again = run_program(command(c));
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_NE(again.out.find("5 jobs, 2 cached, 3 to run"), std::string::npos) << again.out;
}

TEST_F(Study, ContinuesWhereItWasKilled) {
  ASSERT_EQ(run_program(command(small_study())).exit_code, 0);
  const Json whole = results();
  for (const bool early : {true, false}) {
    fs::remove_all(out());
    {
      Program program(command(small_study()));
      // Once at its very start, once as soon as the first report is there.
      const std::string first = whole["jobs"][0]["key"].get<std::string>() + ".json";
      ASSERT_TRUE(program.runs_until_exists(early ? out() / "cache" : out() / "cache" / first));
      program.send(SIGKILL);
      EXPECT_EQ(program.wait().signal, SIGKILL);
    }
    EXPECT_FALSE(fs::exists(out() / "results.json"));
    const Outcome continued = run_program(command(small_study()));
    ASSERT_EQ(continued.exit_code, 0) << continued.err;
    expect_same(results(), whole);
  }
}

TEST_F(Study, ContinuesAKilledQuantizationFromItsBlocks) {
  Json c = small_study();
  c["quantize"] = Json::array({{{"methods", {"gptq"}}, {"bits", {3}}, {"groups", {64}}}});
  c["calibration"] = {
      {"file", (tiny_llama3() / "calib.txt").string()}, {"samples", 64}, {"seq", 256}};
  c["evaluate"][0]["limit"] = 1;
  const RunLimits limits{.timeout = std::chrono::seconds(300)};
  ASSERT_EQ(run_program(command(c), limits).exit_code, 0);
  const Json whole = results();
  fs::remove_all(out());
  const std::string key = whole["jobs"][1]["key"].get<std::string>();
  {
    Program program(command(c), limits);
    ASSERT_TRUE(program.runs_until_exists(out() / "cache" / (key + ".qw.journal")));
    program.send(SIGKILL);
    EXPECT_EQ(program.wait().signal, SIGKILL);
  }
  const Outcome continued = run_program(command(c), limits);
  ASSERT_EQ(continued.exit_code, 0) << continued.err;
  expect_same(results(), whole);
  // The time of the second half is not given out as the whole.
  EXPECT_TRUE(results()["jobs"][1].value("resumed", false)) << results().dump(1);
  EXPECT_FALSE(results()["rows"][1].contains("quantize_s"));
}

TEST_F(Study, InterruptionStopsTheJobAndSaysHowToGoOn) {
  Json c = small_study();
  c["evaluate"][0]["limit"] = 0;
  const Arguments run = command(c);
  Program program(run);
  ASSERT_TRUE(program.runs_until_exists(out() / "cache"));
  program.send(SIGINT);
  expect_one_error(program.wait(), run, 130, {"Ctrl-C"});
  EXPECT_FALSE(fs::exists(out() / "results.json"));
}

TEST_F(Study, AFailedJobDoesNotEndIt) {
  // Weights without a finite loss: the model itself is refused, in every job that reads it.
  const fs::path broken = directory_.path() / "broken";
  write_small_model(broken);
  set_element(broken / "model.safetensors", "model.layers.1.self_attn.q_proj.weight", 37,
              std::numeric_limits<float>::quiet_NaN());
  Json c = small_study();
  Json model;
  model["name"] = "broken";
  model["path"] = broken.string();
  c["models"] = Json::array({model, c["models"][0]});
  c["quantize"][0]["groups"] = {32};
  const Arguments run = command(c);
  const Outcome outcome = run_program(run);
  expect_one_error(outcome, run, 1, {"5 of 10 failed or skipped", "3 of 6 rows"});
  const Json found = results();
  EXPECT_NE(found["rows"][1]["failed"].get<std::string>().find("q_proj"), std::string::npos)
      << found["rows"][1].dump(1);
  EXPECT_EQ(found["jobs"][2]["status"], "skipped");
  for (std::size_t row = 3; row < 6; ++row) {
    EXPECT_FALSE(found["rows"][row].contains("failed"));
    EXPECT_EQ(found["rows"][row]["perplexity"].size(), 1U);
  }
  // What failed is tried again, the rest is not.
  const Outcome again = run_program(run);
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_NE(again.out.find("10 jobs, 5 cached, 5 to run"), std::string::npos) << again.out;
}

TEST_F(Study, ASecondOneInTheSameFolderIsRefused) {
  fs::create_directories(out());
  const int fd = ::open((out() / "lock").c_str(), O_RDWR | O_CREAT, 0644);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::flock(fd, LOCK_EX | LOCK_NB), 0);
  const Arguments run = command(small_study());
  expect_one_error(run_program(run), run, 2, {"study-small", "no other study"});
  ::close(fd);
  EXPECT_EQ(run_program(run).exit_code, 0);
}

TEST_F(Study, TakesReportsOfOtherBuildsOnlyWhenAsked) {
  ASSERT_EQ(run_program(command(small_study())).exit_code, 0);
  // The same folder as another build would have left it: other keys, other build.
  for (const auto& [name, size] : contents(out() / "cache")) {
    if (!name.ends_with(".job.json")) continue;
    const std::string key = name.substr(0, name.find('.'));
    const std::string other = std::string(64 - 8, '0') + key.substr(0, 8);
    edit_json(out() / "cache" / name, [&](Json& j) {
      j["key"] = other;
      j["build"] = std::string(64, 'b');
    });
    fs::rename(out() / "cache" / name, out() / "cache" / (other + ".job.json"));
    fs::rename(out() / "cache" / (key + ".json"), out() / "cache" / (other + ".json"));
  }
  const Outcome plan = run_program(command(small_study(), {"--dry-run"}));
  EXPECT_NE(plan.out.find("0 cached, 5 to run"), std::string::npos) << plan.out;
  const Outcome taken = run_program(command(small_study(), {"--accept-other-builds"}));
  ASSERT_EQ(taken.exit_code, 0) << taken.err;
  EXPECT_NE(taken.out.find("5 cached, 0 to run"), std::string::npos) << taken.out;
  EXPECT_NE(taken.out.find("5 reports are of other builds: bbbbbbbbbbbb"), std::string::npos)
      << taken.out;
  EXPECT_EQ(results()["jobs"][0]["other_build"], std::string(64, 'b'));
}

TEST_F(Study, BadConfigurationsAreRefusedBeforeAnyWork) {
  Json unknown = small_study();
  unknown["evaluate"][0]["sequence"] = 4;
  Arguments run = command(unknown);
  expect_one_error(run_program(run), run, 3, {"study.json", "evaluate[0].sequence", "unknown key"});
  Json missing = small_study();
  missing["evaluate"][0]["text"] = "no-such-file.txt";
  run = command(missing);
  expect_one_error(run_program(run), run, 4, {"no-such-file.txt", "cannot open"});
  EXPECT_FALSE(fs::exists(out()));
}

}  // namespace
}  // namespace engine::test
