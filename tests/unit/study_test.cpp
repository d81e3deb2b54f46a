// Configurations, plans and keys of studies, without running a job.
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "eval/study_plan.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

namespace fs = std::filesystem;

const fs::path tiny = fs::path(LOWBIT_TEST_DATA) / "tiny-llama3";

Json grid_study() {
  return Json::parse(R"({
    "name": "grid", "device": "cpu",
    "models": [{"name": "tiny", "path": "synthetic:tiny-test"}],
    "quantize": [{"methods": ["rtn", "quip", "billm"], "bits": [3, 4], "groups": [32, 0]}],
    "evaluate": [
      {"kind": "ppl", "name": "a", "text": "synthetic:4096", "seq": 64},
      {"kind": "ppl", "name": "b", "text": "synthetic:8192", "seq": 64},
      {"kind": "ppl", "name": "c", "text": "synthetic:8192", "seq": 128},
      {"kind": "kl", "name": "a", "text": "synthetic:4096", "seq": 64}]
  })");
}

StudyConfig config_of(const Json& j) { return study_config_from_json(j, "folder/study.json"); }

// The message of the error, which must be of this code.
template <class F>
std::string message_of(ErrorCode code, F&& work) {
  try {
    work();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

void expect_refused(const Json& j, const std::vector<std::string>& fragments) {
  const std::string message =
      message_of(ErrorCode::format, [&] { static_cast<void>(config_of(j)); });
  for (const std::string& f : fragments) {
    EXPECT_NE(message.find(f), std::string::npos) << f << " in: " << message;
  }
}

TEST(StudyConfig, TomlAndJsonSayTheSame) {
  const Json from_toml = toml_to_json(R"(
name = "grid"
keep_models = true
[[models]]
name = "tiny"
path = "models/tiny"
[calibration]
file = "c.txt"
samples = 8
[[quantize]]
methods = ["gptq"]
bits = [3]
options.gptq = ["--act-order"]
)",
                                      "s.toml");
  const StudyConfig c = config_of(from_toml);
  EXPECT_EQ(c.models[0].path, "folder/models/tiny");
  EXPECT_EQ(c.calibration.file, "folder/c.txt");
  EXPECT_EQ(c.out, fs::path("folder/study-grid"));
  EXPECT_TRUE(c.keep_models);
  EXPECT_EQ(c.grids[0].method_options.at("gptq"), std::vector<std::string>{"--act-order"});
  const StudyConfig again = config_of(Json::parse(from_toml.dump()));
  EXPECT_EQ(again.grids[0].bits, c.grids[0].bits);
  EXPECT_EQ(again.calibration.samples, 8);
}

TEST(StudyConfig, TomlErrorsNameTheLine) {
  const std::string message = message_of(
      ErrorCode::format, [] { static_cast<void>(toml_to_json("a = 1\nb = = 2\n", "s.toml")); });
  EXPECT_NE(message.find("s.toml: line 2"), std::string::npos) << message;
  EXPECT_NE(message_of(ErrorCode::format,
                       [] { static_cast<void>(toml_to_json("a.b = [1, 2020-01-01]", "s.toml")); })
                .find("a.b[1]"),
            std::string::npos);
}

TEST(StudyConfig, RefusesWhatItDoesNotKnow) {
  Json j = grid_study();
  j["modles"] = 1;
  expect_refused(j, {"folder/study.json: modles", "models", "unknown key"});
  j = grid_study();
  j["models"][0]["nmae"] = "x";
  expect_refused(j, {"models[0].nmae", "unknown key"});
  j = grid_study();
  j["quantize"][0]["methods"] = {"rtm"};
  expect_refused(j, {"quantize[0].methods", "rtn, gptq", "rtm"});
  j = grid_study();
  j["quantize"][0]["bits"] = 4;
  expect_refused(j, {"quantize[0].bits", "a list", "4"});
  j = grid_study();
  j["quantize"][0]["groups"] = {1.5};
  expect_refused(j, {"quantize[0].groups", "whole numbers"});
  j = grid_study();
  j["quantize"][0]["models"] = {"huge"};
  expect_refused(j, {"quantize[0].models", "huge"});
  j = grid_study();
  j["evaluate"][0]["kind"] = "speed";
  expect_refused(j, {"evaluate[0].kind", "latency", "speed"});
  j = grid_study();
  j["evaluate"][1]["name"] = "a";
  expect_refused(j, {"evaluate[1].name", "twice"});
  j = grid_study();
  j["evaluate"][0]["dataset"] = "wikitext";
  expect_refused(j, {"evaluate[0].dataset", "wikitext2"});
  j = grid_study();
  j["evaluate"][0] = Json::parse(R"({"kind": "tasks", "tasks": ["piqa", "boolq"], "data": "d"})");
  expect_refused(j, {"evaluate[0].tasks", "winogrande", "boolq"});
  j["evaluate"][0] =
      Json::parse(R"({"kind": "tasks", "tasks": ["piqa"], "data": "d", "encoding": "lmeval-0.5"})");
  expect_refused(j, {"evaluate[0].encoding", "lmeval-0.4", "lmeval-0.5"});
  j = grid_study();
  j["name"] = "../grid";
  expect_refused(j, {"name", "../grid"});
  j = grid_study();
  j["report"] = {{"tables", {7}}};
  expect_refused(j, {"report.tables", "1", "6", "7"});
  j = grid_study();
  j["models"] = Json::array();
  expect_refused(j, {"models", "at least one"});
}

TEST(StudyPlan, IsTheProductWithoutWhatMethodsRefuse) {
  Json j = grid_study();
  j["quantize"].push_back(
      Json::parse(R"({"methods": ["quipsharp", "rtn"], "bits": [4, 8], "groups": [32]})"));
  const StudyPlan plan = plan_study(config_of(j));
  std::vector<std::string> labels;
  for (const GridCell& c : plan.cells) labels.push_back(c.label);
  // QuIP has no groups and BiLLM neither groups nor bits; rtn at 4 bits g32 is there once.
  const std::vector<std::string> expected = {
      "unquantized", "rtn 3 bits g32", "rtn 3 bits", "rtn 4 bits g32",   "rtn 4 bits",
      "quip 3 bits", "quip 4 bits",    labels[7],    "quipsharp 4 bits", "rtn 8 bits g32"};
  EXPECT_EQ(labels, expected);
  EXPECT_EQ(labels[7].rfind("billm 1.1 bits", 0), 0U) << labels[7];
  ASSERT_EQ(plan.left_out.size(), 1U);
  EXPECT_EQ(plan.left_out[0].setting, "quipsharp --bits 8");
  EXPECT_NE(plan.left_out[0].reason.find("expected 2, 3 or 4"), std::string::npos);
  // Texts of one length share a pass; the original has no divergence from itself.
  EXPECT_EQ(plan.cells[0].jobs.size(), 2U);
  ASSERT_EQ(plan.cells[1].jobs.size(), 4U);
  const StudyJob& both = plan.jobs[plan.cells[1].jobs[1]];
  EXPECT_EQ(both.title, "tiny, rtn 3 bits g32: ppl a b");
  EXPECT_EQ(both.evaluations, (std::vector<std::size_t>{0, 1}));
}

TEST(StudyPlan, RefusesAGridWithNothingPossibleAndStrangeOptions) {
  Json j = grid_study();
  j["quantize"][0] = Json::parse(R"({"methods": ["quipsharp"], "bits": [5, 8]})");
  EXPECT_NE(message_of(ErrorCode::format, [&] { static_cast<void>(plan_study(config_of(j))); })
                .find("quantize[0]: expected a combination"),
            std::string::npos);
  j["quantize"][0] =
      Json::parse(R"({"methods": ["rtn"], "bits": [4], "options": ["--act-order"]})");
  const std::string message =
      message_of(ErrorCode::format, [&] { static_cast<void>(plan_study(config_of(j))); });
  EXPECT_NE(message.find("quantize[0].options"), std::string::npos) << message;
  EXPECT_NE(message.find("--act-order"), std::string::npos) << message;
}

TEST(StudyPlan, RefusesMissingData) {
  Json j = grid_study();
  j["evaluate"][0]["text"] = "/no/such/text";
  static_cast<void>(
      message_of(ErrorCode::io, [&] { static_cast<void>(plan_study(config_of(j))); }));
  j = grid_study();
  j["models"][0]["path"] = tiny.string();
  j["evaluate"] = Json::array();
  EXPECT_NE(message_of(ErrorCode::format, [&] { static_cast<void>(plan_study(config_of(j))); })
                .find("calibration.file"),
            std::string::npos);
}

// The key of the job with this title.
std::string key_of(const Json& j, const std::string& title, const std::string& build = "x") {
  StudyPlan plan = plan_study(config_of(j));
  resolve(plan, StudyCache("/no/such/folder"), {"engine", "bench", build, "y"}, false);
  for (const StudyJob& job : plan.jobs) {
    if (job.title == title) return job.key;
  }
  ADD_FAILURE() << "no job " << title;
  return "";
}

TEST(StudyKey, ChangesWithEveryInputAndWithNothingElse) {
  const engine::testing::TempDir folder;
  const fs::path text = folder.path() / "calib.txt";
  const auto write = [&](const std::string& bytes) { std::ofstream(text) << bytes; };
  write("one");
  Json base = Json::parse(R"({"name": "k", "device": "cpu",
    "quantize": [{"methods": ["gptq"], "bits": [3], "groups": [64]}],
    "evaluate": [{"kind": "ppl", "name": "t", "seq": 64}]})");
  base["models"] = Json::array({{{"name", "m"}, {"path", tiny.string()}}});
  base["calibration"] = {{"file", text.string()}};
  base["evaluate"][0]["text"] = text.string();
  const std::string quantize = "m, gptq 3 bits g64: quantize", ppl = "m, gptq 3 bits g64: ppl t";
  const std::string key = key_of(base, quantize), ppl_key = key_of(base, ppl);
  EXPECT_EQ(key.size(), 64U);
  EXPECT_NE(key, ppl_key);

  // What does not matter.
  Json same = base;
  same["threads"] = 3;
  same["out"] = "elsewhere";
  same["keep_models"] = true;
  same["name"] = "other";
  same["report"] = {{"plots", false}};
  EXPECT_EQ(key_of(same, quantize), key);
  EXPECT_EQ(key_of(same, ppl), ppl_key);
  const fs::path copy = folder.path() / "copy.txt";
  fs::copy_file(text, copy);
  same["calibration"]["file"] = copy.string();
  EXPECT_EQ(key_of(same, quantize), key) << "the content counts, not the name";

  // What does.
  std::set<std::string> keys = {key}, ppl_keys = {ppl_key};
  const auto expect_new = [&](const Json& j, const std::string& build = "x") {
    EXPECT_TRUE(keys.insert(key_of(j, quantize, build)).second) << j.dump();
    EXPECT_TRUE(ppl_keys.insert(key_of(j, ppl, build)).second) << j.dump();
  };
  expect_new(base, "another build");
  for (const char* pointer : {"/calibration/samples", "/calibration/seq", "/calibration/seed"}) {
    Json j = base;
    j[Json::json_pointer(pointer)] = 7;
    expect_new(j);
  }
  Json j = base;
  j["calibration"]["dataset"] = "wikitext2";
  expect_new(j);
  j = base;
  j["dtype"] = "bf16";
  expect_new(j);
  const auto with_option = [&](const char* option, const char* value) {
    Json changed = base;
    changed["quantize"][0]["options"] = {option, value};
    StudyPlan plan = plan_study(config_of(changed));
    return plan.jobs[plan.cells[1].jobs[0]].work;
  };
  EXPECT_NE(with_option("--damp", "0.02"), with_option("--damp", "0.03"));
  for (const char* pointer : {"/evaluate/0/seq", "/evaluate/0/limit"}) {
    Json changed = base;
    changed[Json::json_pointer(pointer)] = 7;
    EXPECT_EQ(key_of(changed, quantize), key) << "an evaluation does not change the model";
    EXPECT_TRUE(ppl_keys.insert(key_of(changed, ppl)).second) << pointer;
  }
  // Another model of the same shape, another tokenizer, other data.
  const fs::path other = folder.path() / "model";
  fs::copy(tiny, other);
  j = base;
  j["models"][0]["path"] = other.string();
  EXPECT_EQ(key_of(j, quantize), key);
  {
    std::ofstream(other / "tokenizer.json", std::ios::app) << "\n";
    expect_new(j);
    std::fstream weights(other / "model.safetensors",
                         std::ios::in | std::ios::out | std::ios::binary);
    weights.seekp(-100, std::ios::end);
    weights.put('\x11');
  }
  expect_new(j);
  write("two");
  expect_new(base);
}

}  // namespace
}  // namespace engine
