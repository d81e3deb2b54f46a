// engine eval on small invented questions: what it reports, what it refuses.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "formats/json.h"
#include "tests/cli/bad_inputs.h"
#include "tests/cli/small_model.h"

namespace engine::test {
namespace {

using std::filesystem::path;

void write_piqa(const path& folder, const std::string& labels = "0\n1\n1\n") {
  std::filesystem::create_directories(folder);
  write_bytes(
      folder / "valid.jsonl",
      R"({"goal": "How do you keep soup warm?", "sol1": "Cover the pot.", "sol2": "Open the window."})"
      "\n"
      R"({"goal": "sharpen a pencil", "sol1": "boil it", "sol2": "turn it in a sharpener "})"
      "\n"
      R"({"goal": "Find north.", "sol1": "Look at the clock", "sol2": "Look at a compass"})"
      "\n");
  write_bytes(folder / "valid-labels.lst", labels);
}

// Two subjects with two questions each and five worked examples.
void write_mmlu(const path& folder) {
  for (const char* split : {"dev", "test"}) {
    std::filesystem::create_directories(folder / split);
    for (const char* subject : {"astronomy", "marketing"}) {
      std::string rows;
      for (int i = 0; i < (std::string(split) == "dev" ? 4 : 1); ++i) {
        rows += "\"What is, of these, star " + std::to_string(i) + "?\",Moon,Sun,Mars,Comet,B\n";
      }
      rows += "Which is red?,Mars,Moon,Earth,\"Sky, clear\",A\n";
      write_bytes(folder / split / (std::string(subject) + "_" + split + ".csv"), rows);
    }
  }
}

Json report_of(const Arguments& arguments, const path& folder) {
  const path file = folder / "report.json";
  const Arguments all = arguments + Arguments{"--report", file.string()};
  const Outcome outcome = run_program(all);
  EXPECT_EQ(outcome.exit_code, 0) << command_text(all) << outcome.err;
  return read_json_file(file);
}

TEST(Eval, ReportsTasksWithTheirProtocols) {
  const TemporaryDirectory d;
  write_piqa(d.path() / "data");
  write_mmlu(d.path() / "data");
  const Json report =
      report_of({"eval", "--model", tiny_llama3().string(), "--data", (d.path() / "data").string(),
                 "--tasks", "piqa,mmlu", "--device", "cpu"},
                d.path());
  const Json& results = report.at("results");
  ASSERT_EQ(results.size(), 2U);
  EXPECT_EQ(results[0].at("task"), "piqa");
  EXPECT_EQ(results[0].at("n"), 3);
  EXPECT_TRUE(results[0].contains("acc_norm"));
  EXPECT_EQ(results[1].at("n"), 4);
  EXPECT_EQ(results[1].at("categories").size(), 2U);  // stem and other
  const Json& protocols = report.at("protocols");
  EXPECT_EQ(protocols[0].at("questions_expected"), 1838);
  EXPECT_NE(protocols[0].at("note").get<std::string>().find("3"), std::string::npos);
  EXPECT_EQ(protocols[1].at("shots"), 5);
  EXPECT_EQ(protocols[1].at("encoding"), "lmeval-0.4");
  EXPECT_EQ(report.at("numerics").at("compute_dtype"), "f32");
  EXPECT_EQ(report.at("plan").at("arena_peak_bytes"), report.at("plan").at("device_bytes"));
}

TEST(Eval, SavedChoicesComparePairedWithAnotherModel) {
  const TemporaryDirectory d;
  write_piqa(d.path() / "data");
  const std::string saved = (d.path() / "choices.safetensors").string();
  const Arguments base = {
      "eval",    "--model", tiny_llama3().string(), "--data", (d.path() / "data").string(),
      "--tasks", "piqa"};
  static_cast<void>(report_of(base + Arguments{"--save", saved}, d.path()));
  const Json same = report_of(base + Arguments{"--compare", saved}, d.path());
  ASSERT_EQ(same.at("paired").size(), 1U);
  EXPECT_EQ(same.at("paired")[0].at("difference"), 0.0);
  EXPECT_EQ(same.at("paired")[0].at("stderr"), 0.0);

  // Another protocol is another experiment.
  const Arguments bos = base + Arguments{"--compare", saved, "--encoding", "lmeval-0.4.10"};
  expect_one_error(run_program(bos), bos, 5, {"choices.safetensors", "piqa", "encoding"});
  write_piqa(d.path() / "data", "1\n1\n1\n");
  const Arguments relabelled = base + Arguments{"--compare", saved};
  expect_one_error(run_program(relabelled), relabelled, 5, {"choices.safetensors", "files"});
}

TEST(Eval, SharingAndPackingDoNotChangeResults) {
  const TemporaryDirectory d;
  write_piqa(d.path() / "data");
  write_mmlu(d.path() / "data");
  const Arguments base = {"eval",
                          "--model",
                          tiny_llama3().string(),
                          "--data",
                          (d.path() / "data").string(),
                          "--tasks",
                          "mmlu",
                          "--shots",
                          "1"};
  const Json shared = report_of(base, d.path());
  const Json alone = report_of(base + Arguments{"--no-share", "--no-pack"}, d.path());
  EXPECT_EQ(shared.at("results"), alone.at("results"));
  EXPECT_LT(shared.at("packing").at("tokens_computed"), alone.at("packing").at("tokens_computed"));
  EXPECT_EQ(alone.at("packing").at("batches"), 4);
}

class EvalRefuses : public testing::TestWithParam<BadInput> {};
TEST_P(EvalRefuses, WithOneLine) { expect_refused(GetParam()); }

Arguments eval_of(const std::string& tasks, const Arguments& more = {}) {
  return Arguments{"eval", "--model", "{t}", "--data", "{d}", "--tasks", tasks} + more;
}

std::vector<BadInput> bad_evals() {
  const auto piqa = [](const path& d) { write_piqa(d); };
  return {
      {"UnknownTask", piqa, eval_of("piqa,boolq"), 2, {"--tasks", "winogrande", "boolq"}},
      {"TaskTwice", piqa, eval_of("piqa,piqa"), 2, {"--tasks", "distinct"}},
      {"NoTask", piqa, eval_of(""), 2, {"--tasks"}},
      {"NoData", {}, eval_of("piqa"), 2, {"{d}", "valid.jsonl"}},
      {"FewerLabels",
       [](const path& d) { write_piqa(d, "0\n1\n"); },
       eval_of("piqa"),
       3,
       {"valid-labels.lst", "3", "2"}},
      {"LabelOutOfRange",
       [](const path& d) { write_piqa(d, "0\n2\n1\n"); },
       eval_of("piqa"),
       3,
       {"valid-labels.lst", "2"}},
      {"NoTrainingRowsForShots", piqa, eval_of("piqa", {"--shots", "2"}), 2, {"--shots"}},
      {"NegativeLimit", piqa, eval_of("piqa", {"--limit", "-1"}), 2, {"--limit", "-1"}},
      {"NegativeBatch", piqa, eval_of("piqa", {"--batch", "-5"}), 2, {"--batch", "-5"}},
      {"UnknownEncoding",
       piqa,
       eval_of("piqa", {"--encoding", "x"}),
       2,
       {"--encoding", "lmeval-0.3"}},
      {"PackedOfADenseModel", piqa, eval_of("piqa", {"--exec", "packed"}), 2, {"packed"}},
      {"SaveIntoAFolder", piqa, eval_of("piqa", {"--save", "{d}"}), 2, {"--save"}},
      {"CompareWithNothing",
       piqa,
       eval_of("piqa", {"--compare", "{d}/no.safetensors"}),
       4,
       {"no.safetensors"}},
      {"CompareWithAModel",
       piqa,
       eval_of("piqa", {"--compare", "{t}/model.safetensors"}),
       5,
       {"model.safetensors", "piqa"}},
      {"SyntheticWithoutTokenizer",
       piqa,
       {"eval", "--model", "synthetic:llama3-8b", "--data", "{d}", "--tasks", "piqa"},
       2,
       {"--tokenizer"}},
      {"LongerThanTheModel",
       [](const path& d) {
         write_piqa(d);
         write_bytes(d / "valid-labels.lst", "0\n");
         write_bytes(d / "valid.jsonl", "{\"goal\": \"" + std::string(40000, 'z') +
                                            "\", \"sol1\": \"a\", \"sol2\": \"b\"}\n");
       },
       eval_of("piqa", {"--max-length", "100000"}),
       2,
       {"request 0", "8192"}},
  };
}

INSTANTIATE_TEST_SUITE_P(Rows, EvalRefuses, testing::ValuesIn(bad_evals()), row_name);

}  // namespace
}  // namespace engine::test
