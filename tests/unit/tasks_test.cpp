// Choice tasks: from files to questions.
#include "eval/tasks.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "eval/tasks_parts.h"
#include "formats/sha256.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::TempDir;

TaskRequest request(const TempDir& dir, const std::string& name) {
  TaskRequest out;
  out.name = name;
  out.data = dir.path();
  return out;
}

std::string load_error(const TempDir& dir, const std::string& name) {
  return error_of([&] { (void)load_task(request(dir, name)); });
}

// What a model is asked, as text: "CONTEXT|CONTINUATION" per choice, the right one marked.
std::vector<std::string> spelled(const Task& task) {
  std::vector<std::string> out;
  for (const Question& q : task.questions) {
    for (std::size_t i = 0; i < q.choices.size(); ++i) {
      const Choice& c = q.choices[i];
      out.push_back((static_cast<std::size_t>(q.gold) == i ? "*" : "") +
                    full_context(task, q, c, 100) + "|" + c.continuation);
    }
  }
  return out;
}
using Spelled = std::vector<std::string>;

constexpr const char* kPiqaRows =
    "{\"goal\": \"How to dry a mug?\", \"sol1\": \"Use a towel. \", \"sol2\": \"Use "
    "\\u00e9t\\u00e9\"}\r\n"
    "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\"}\r\n";
const Spelled kPiqaSpelled = {"Question: How to dry a mug?\nAnswer:| Use a towel. ",
                              "*Question: How to dry a mug?\nAnswer:| Use \xC3\xA9t\xC3\xA9",
                              "*Question: g\nAnswer:| s", "Question: g\nAnswer:| t"};

TEST(TasksPiqa, OriginalFilesAndExport) {
  const TempDir original;
  original.file("valid.jsonl", kPiqaRows);
  original.file("valid-labels.lst", "1\r\n0\r\n");
  const Task task = load_task(request(original, "piqa"));
  EXPECT_EQ(spelled(task), kPiqaSpelled);
  EXPECT_EQ(task.questions[0].choices[0].code_points, 13);  // the space at the end counts
  EXPECT_EQ(task.questions[0].choices[1].code_points, 7);   // characters, not bytes
  EXPECT_TRUE(task.has_acc_norm);
  EXPECT_TRUE(task.subjects.empty());
  EXPECT_EQ(task.protocol["id"], "piqa-0shot");
  EXPECT_EQ(task.protocol["split"], "validation");
  EXPECT_EQ(task.protocol["files"][0]["name"], "valid.jsonl");
  EXPECT_EQ(task.protocol["files"][0]["sha256"], sha256_hex(kPiqaRows));
  EXPECT_EQ(task.protocol["files"][1]["name"], "valid-labels.lst");
  EXPECT_EQ(task.protocol["questions"], 2);
  EXPECT_EQ(task.protocol["questions_expected"], 1838);
  EXPECT_EQ(task.protocol["note"], "the files have 2 questions, the published split has 1838");

  const TempDir exported;
  exported.file("piqa/piqa.jsonl",
                "\xEF\xBB\xBF{\"goal\":\"How to dry a mug?\",\"sol1\":\"Use a towel. \",\"sol2\":"
                "\"Use \xC3\xA9t\xC3\xA9\",\"label\":1}\n"
                "{\"goal\":\"g\",\"sol1\":\"s\",\"sol2\":\"t\",\"label\":\"0\"}\n\n");
  EXPECT_EQ(spelled(load_task(request(exported, "piqa"))), kPiqaSpelled);
}

TEST(TasksPiqa, MalformedFilesNameFileAndLine) {
  const TempDir dir;
  dir.file("valid.jsonl", kPiqaRows);
  expect_contains(load_error(dir, "piqa"),
                  "valid.jsonl: line 1: expected a column label or the file valid-labels.lst "
                  "beside it, found neither");
  dir.file("valid-labels.lst", "1\n");
  expect_contains(load_error(dir, "piqa"),
                  "valid-labels.lst: labels: expected 2, one for each row "
                  "of valid.jsonl, found 1");
  dir.file("valid-labels.lst", "1\n2\n");
  expect_contains(load_error(dir, "piqa"),
                  "valid-labels.lst: line 2: expected 0 or 1, found \"2\"");
  dir.file("valid.jsonl",
           "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\"}\n{\"goal\": \"g\"}\n");
  expect_contains(load_error(dir, "piqa"),
                  "valid.jsonl: line 2: sol1: expected a string, found nothing");
  dir.file("valid.jsonl", "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\"}\n\n{}\n");
  expect_contains(load_error(dir, "piqa"), "line 2: expected a JSON object, found a blank line");
  dir.file("valid.jsonl",
           "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\", \"label\": 1}\n"
           "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\"}\n");
  expect_contains(load_error(dir, "piqa"),
                  "line 2: label: expected a label in every row or in "
                  "none, found nothing");
  dir.file("valid.jsonl",
           "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\", \"label\": -1}\n");  // a test split
  expect_contains(load_error(dir, "piqa"), "line 1: label: expected an integer from 0 to 1");
  dir.file("valid.jsonl", "");
  expect_contains(load_error(dir, "piqa"),
                  "valid.jsonl: line 1: expected at least one row, found "
                  "an empty file");
  dir.file("valid.jsonl", "\n \n");
  expect_contains(load_error(dir, "piqa"), "line 1: expected a JSON object, found a blank line");
  dir.file("valid.jsonl", "\n\n");
  expect_contains(load_error(dir, "piqa"),
                  "line 1: expected a JSON object, found blank lines only");
  dir.file("valid.jsonl", "{\"goal\": ");
  expect_contains(load_error(dir, "piqa"), "valid.jsonl: line 1: byte ");
}

TEST(TasksArc, OriginalFilesAndExport) {
  const Spelled expected = {"Question: Why?\nAnswer:| a", "Question: Why?\nAnswer:| b",
                            "*Question: Why?\nAnswer:| c", "*Question: So?\nAnswer:| x",
                            "Question: So?\nAnswer:| y"};
  const TempDir dir;
  dir.file("ARC-Challenge-Test.jsonl",
           "{\"id\":\"1\",\"question\":{\"stem\":\"Why?\",\"choices\":[{\"text\":\"a\",\"label\":"
           "\"1\"},{\"text\":\"b\",\"label\":\"2\"},{\"text\":\"c\",\"label\":\"3\"}]},"
           "\"answerKey\":\"3\"}\n"
           "{\"id\":\"2\",\"question\":{\"stem\":\"So?\",\"choices\":[{\"label\":\"A\",\"text\":"
           "\"x\"},{\"text\":\"y\",\"label\":\"B\"}]},\"answerKey\":\"A\"}\n");
  dir.file("arc_easy/arc_easy.jsonl",
           "{\"id\":\"1\",\"question\":\"Why?\",\"choices\":{\"text\":[\"a\",\"b\",\"c\"],"
           "\"label\":[\"1\",\"2\",\"3\"]},\"answerKey\":\"3\"}\n"
           "{\"id\":\"2\",\"question\":\"So?\",\"choices\":{\"text\":[\"x\",\"y\"],\"label\":"
           "[\"A\",\"B\"]},\"answerKey\":\"A\"}\n");
  const Task challenge = load_task(request(dir, "arc_challenge"));
  EXPECT_EQ(spelled(challenge), expected);
  EXPECT_EQ(challenge.protocol["questions_expected"], 1172);
  EXPECT_EQ(challenge.protocol["split"], "test");
  const Task easy = load_task(request(dir, "arc_easy"));
  EXPECT_EQ(spelled(easy), expected);
  EXPECT_EQ(easy.protocol["questions_expected"], 2376);
}

TEST(TasksArc, MalformedRows) {
  const TempDir dir;
  const auto message = [&](const std::string& row) {
    dir.file("arc_easy.jsonl", row);
    return load_error(dir, "arc_easy");
  };
  expect_contains(message("{\"question\":\"q\",\"choices\":{\"text\":[\"x\",\"y\"],\"label\":"
                          "[\"A\",\"B\"]},\"answerKey\":\"C\"}"),
                  "line 1: answerKey: expected the label of one of the row's choices, found \"C\"");
  expect_contains(message("{\"question\":\"q\",\"choices\":{\"text\":[\"x\",\"y\"],\"label\":"
                          "[\"A\",\"B\",\"C\"]},\"answerKey\":\"A\"}"),
                  "choices: expected as many labels as texts");
  expect_contains(message("{\"question\":\"q\",\"choices\":{\"text\":[\"x\"],\"label\":[\"A\"]},"
                          "\"answerKey\":\"A\"}"),
                  "choices.text: expected an array of 2 to 64 strings");
  expect_contains(message("{\"question\":{\"stem\":\"q\",\"choices\":[{\"text\":\"x\"},3]},"
                          "\"answerKey\":\"A\"}"),
                  "question.choices.label: expected a string, found nothing");
  expect_contains(message("{\"question\":\"q\",\"answerKey\":\"A\"}"), "choices: expected 2 to 64");
  expect_contains(message("{\"question\":{\"choices\":[]},\"answerKey\":\"A\"}"),
                  "question.stem: expected a string");
}

TEST(TasksHellaswag, PromptsWithoutMarkup) {
  const Spelled expected = {"Baking: A cook stirs. Then nato ships a cake| fast",
                            "*Baking: A cook stirs. Then nato ships a cake| Now. slow",
                            "*Running: He runs| on", "Running: He runs| off"};
  const auto rows = [](const std::string& first, const std::string& second) {
    return "{\"ind\":1,\"activity_label\":\"Baking\",\"ctx_a\":\"A [header] cook "
           "stirs.\",\"ctx_b\":"
           "\"then NATO ships a cake\",\"endings\":[\"fast\",\"Now [title]slow\"],\"label\":" +
           first +
           "}\n{\"ind\":2,\"activity_label\":\"Running\",\"ctx_a\":\"He runs\",\"ctx_b\":\"\","
           "\"endings\":[\"on\",\"off\"],\"label\":" +
           second + "}\n";
  };
  const TempDir dir;
  dir.file("hellaswag_val.jsonl", rows("1", "0"));
  const Task task = load_task(request(dir, "hellaswag"));
  EXPECT_EQ(spelled(task), expected);
  EXPECT_EQ(task.questions[0].choices[1].code_points, 9);
  EXPECT_EQ(task.protocol["questions_expected"], 10042);
  const TempDir exported;
  exported.file("hellaswag/hellaswag.jsonl", rows("\"1\"", "\"0\""));
  EXPECT_EQ(spelled(load_task(request(exported, "hellaswag"))), expected);

  exported.file("hellaswag.jsonl", rows("\"1\"", "\"2\""));
  expect_contains(load_error(exported, "hellaswag"),
                  "hellaswag.jsonl: line 2: label: expected an integer from 0 to 1, found \"2\"");
  exported.file("hellaswag.jsonl", rows("\"\"", "0"));
  expect_contains(load_error(exported, "hellaswag"), "line 1: label: expected an integer");
}

TEST(TasksText, MarkupAsTheHarnessRemovesIt) {
  EXPECT_EQ(tasks::without_markup("  a [title] b\n"), "a. b");
  EXPECT_EQ(tasks::without_markup("a [x [y] z] b"), "a z] b");
  EXPECT_EQ(tasks::without_markup("a [one\ntwo] b [c"), "a [one\ntwo] b [c");
  EXPECT_EQ(tasks::without_markup("a   b    c"), "a  b  c");     // one pass: three become two
  EXPECT_EQ(tasks::without_markup("[header] a [step]"), " a ");  // ends were stripped before
  EXPECT_EQ(tasks::without_markup("\xC2\xA0 a\xE2\x80\x83"), "a");
  EXPECT_EQ(tasks::without_markup(""), "");
}

TEST(TasksText, CapitalizedAsPython) {
  EXPECT_EQ(tasks::capitalized("the USA, NASA"), "The usa, nasa");
  EXPECT_EQ(tasks::capitalized(""), "");
  EXPECT_EQ(tasks::capitalized("[header] How"), "[header] how");
  EXPECT_EQ(tasks::capitalized("\xC3\xA9T\xC3\x89 \xD0\x94\xCE\xA9"),
            "\xC3\x89t\xC3\xA9 \xD0\xB4\xCF\x89");
  EXPECT_EQ(tasks::capitalized("\xC3\x97\xC3\x97"), "\xC3\x97\xC3\x97");  // no letter
  EXPECT_EQ(tasks::capitalized("\xC5\xB8\xC5\xB8"), "\xC5\xB8\xC3\xBF");  // two ranges
}

TEST(TasksWinogrande, SplitsAtTheBlank) {
  const TempDir dir;
  // A dev.jsonl of something else is passed over.
  dir.file("dev.jsonl", "{\"goal\": \"g\", \"sol1\": \"s\", \"sol2\": \"t\", \"label\": 1}\n");
  expect_contains(load_error(dir, "winogrande"), "expected a file of winogrande in ");
  dir.file("winogrande/dev.jsonl",
           "{\"qID\":\"x\",\"sentence\":\"Ann met Bo while _  was at work _.\",\"option1\":\"Ann\","
           "\"option2\":\"Bo\",\"answer\":\"2\"}\n");
  const Task task = load_task(request(dir, "winogrande"));
  EXPECT_EQ(spelled(task), (Spelled{"Ann met Bo while Ann| was at work _.",
                                    "*Ann met Bo while Bo| was at work _."}));
  EXPECT_FALSE(task.has_acc_norm);
  EXPECT_EQ(task.protocol["files"][0]["name"], "winogrande/dev.jsonl");
  EXPECT_EQ(task.protocol["questions_expected"], 1267);
  // And that of WinoGrande is none of PIQA's.
  const Task piqa = load_task(request(dir, "piqa"));
  EXPECT_EQ(piqa.protocol["files"][0]["name"], "dev.jsonl");

  dir.file("winogrande.jsonl",
           "{\"sentence\":\"no blank\",\"option1\":\"a\",\"option2\":\"b\",\"answer\":1}\n");
  expect_contains(load_error(dir, "winogrande"),
                  "winogrande.jsonl: line 1: sentence: expected a sentence with the blank _");
  dir.file("winogrande.jsonl",
           "{\"sentence\":\"a _\",\"option1\":\"a\",\"option2\":\"b\",\"answer\":\"\"}\n");
  expect_contains(load_error(dir, "winogrande"), "answer: expected an integer from 1 to 2");
}

TEST(Tasks, RequestsThatMakeNoSense) {
  const TempDir dir;
  expect_contains(load_error(dir, "boolq"),
                  "expected one of piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu, "
                  "found \"boolq\"");
  for (const std::string& name : task_names()) {
    const std::string message = load_error(dir, name);
    expect_contains(message, "--data: expected ");
    expect_contains(message, name + (name == "mmlu" ? "_test.jsonl" : ".jsonl"));
    expect_contains(message, "found none");
  }
  TaskRequest bad = request(dir, "piqa");
  bad.data /= "absent";
  expect_contains(error_of([&] { (void)load_task(bad); }), "--data: expected a folder, found ");
  bad = request(dir, "piqa");
  bad.shots = 101;
  expect_contains(error_of([&] { (void)load_task(bad); }), "expected 0 to 100, found 101");
  bad.shots = -2;
  expect_contains(error_of([&] { (void)load_task(bad); }), "expected 0 to 100, found -2");
  bad.shots = 0;
  bad.limit = -1;
  expect_contains(error_of([&] { (void)load_task(bad); }), "expected 0 or more, found -1");
}

TEST(Tasks, LimitKeepsTheFirstQuestions) {
  const TempDir dir;
  dir.file("piqa.valid.jsonl", kPiqaRows);
  dir.file("piqa.valid-labels.lst", "1\n0\n");
  TaskRequest limited = request(dir, "piqa");
  limited.limit = 1;
  const Task task = load_task(limited);
  EXPECT_EQ(spelled(task), (Spelled{kPiqaSpelled[0], kPiqaSpelled[1]}));
  EXPECT_EQ(task.protocol["questions"], 1);
  EXPECT_EQ(task.protocol["questions_found"], 2);
  EXPECT_EQ(task.protocol["limit"], 1);
  limited.limit = 1000000000000;
  EXPECT_EQ(load_task(limited).questions.size(), 2U);
}

TEST(Tasks, ShotsAreTheFirstTrainingRows) {
  const TempDir dir;
  dir.file("valid.jsonl", "{\"goal\": \"last\", \"sol1\": \"s\", \"sol2\": \"t\", \"label\": 0}\n");
  TaskRequest few = request(dir, "piqa");
  few.shots = 2;
  expect_contains(error_of([&] { (void)load_task(few); }), "train.jsonl, piqa.train.jsonl");
  dir.file("train.jsonl", kPiqaRows);
  dir.file("train-labels.lst", "1\n0\n");
  const Task task = load_task(few);
  const std::string shots =
      "Question: How to dry a mug?\nAnswer: Use \xC3\xA9t\xC3\xA9\n\nQuestion: g\nAnswer: s\n\n";
  EXPECT_EQ(spelled(task), (Spelled{"*" + shots + "Question: last\nAnswer:| s",
                                    shots + "Question: last\nAnswer:| t"}));
  EXPECT_EQ(task.protocol["id"], "piqa-2shot");
  EXPECT_EQ(task.protocol["files"].size(), 3U);
  EXPECT_EQ(full_context(task, task.questions[0], task.questions[0].choices[0], 0),
            "Question: last\nAnswer:");
  few.shots = 3;
  expect_contains(error_of([&] { (void)load_task(few); }),
                  "--shots: expected at most the 2 rows of train.jsonl, found 3");

  dir.file("winogrande.jsonl",
           "{\"sentence\":\"_ ran.\",\"option1\":\"A\",\"option2\":\"B\",\"answer\":\"1\"}\n");
  dir.file("train_xl.jsonl",
           "{\"sentence\":\"C saw _ go.\",\"option1\":\"D\",\"option2\":\"E\",\"answer\":\"2\"}\n");
  few = request(dir, "winogrande");
  few.shots = 1;
  EXPECT_EQ(spelled(load_task(few)),
            (Spelled{"*C saw E go.\n\nA| ran.", "C saw E go.\n\nB| ran."}));
}

}  // namespace
}  // namespace engine
