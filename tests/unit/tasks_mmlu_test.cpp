// MMLU: files, prompts, subjects.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "eval/tasks.h"
#include "formats/sha256.h"
#include "tests/formats/temp_dir.h"

namespace engine {
namespace {

using testing::error_of;
using testing::expect_contains;
using testing::TempDir;

TaskRequest request(const TempDir& dir, std::int64_t shots = 1) {
  TaskRequest out;
  out.name = "mmlu";
  out.data = dir.path();
  out.shots = shots;
  return out;
}

std::string load_error(const TempDir& dir, std::int64_t shots = 1) {
  return error_of([&] { (void)load_task(request(dir, shots)); });
}

// Two subjects in the original dialect.
void write_original(const TempDir& dir, const std::string& folder) {
  dir.file(folder + "dev/world_religions_dev.csv", "Dev w,k,l,m,n,D\nDev w2,1,2,3,4,A\n");
  dir.file(folder + "test/world_religions_test.csv", "\" Two\nlines \",k,l,m,n,B\n");
  dir.file(folder + "dev/college_biology_dev.csv", "Dev c,\"p,q\",\"say \"\"r\"\"\",s,t,C\n");
  dir.file(folder + "test/college_biology_test.csv", "First?,0,1,2,3,A\nSecond?,4,5,6,7,D\n");
}

constexpr const char* kBiologyShot = "Dev c\nA. p,q\nB. say \"r\"\nC. s\nD. t\nAnswer: C\n\n";

std::string context(const Task& task, std::size_t question) {
  const Question& q = task.questions.at(question);
  return full_context(task, q, q.choices[0], 100);
}

void expect_harness_questions(const Task& task) {
  ASSERT_EQ(task.questions.size(), 3U);
  EXPECT_EQ(task.subjects, (std::vector<std::string>{"college_biology", "world_religions"}));
  EXPECT_EQ(context(task, 0),
            std::string("The following are multiple choice questions (with answers) about college "
                        "biology.\n\n") +
                kBiologyShot + "First?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:");
  EXPECT_EQ(context(task, 2),
            "The following are multiple choice questions (with answers) about world religions.\n\n"
            "Dev w\nA. k\nB. l\nC. m\nD. n\nAnswer: D\n\n"
            "Two\nlines\nA. k\nB. l\nC. m\nD. n\nAnswer:");
  const std::vector<std::int64_t> gold = {0, 3, 1};
  const std::vector<std::int64_t> subject = {0, 0, 1};
  for (std::size_t q = 0; q < 3; ++q) {
    EXPECT_EQ(task.questions[q].gold, gold[q]);
    EXPECT_EQ(task.questions[q].subject, subject[q]);
    ASSERT_EQ(task.questions[q].choices.size(), 4U);
    EXPECT_EQ(task.questions[q].choices[2].continuation, " C");
    EXPECT_FALSE(task.questions[q].choices[2].bare);
  }
}

TEST(TasksMmlu, OriginalFilesInEveryFolder) {
  for (const std::string folder : {"data/", "", "mmlu/", "mmlu/data/"}) {
    const TempDir dir;
    write_original(dir, folder);
    const Task task = load_task(request(dir));
    expect_harness_questions(task);
    EXPECT_FALSE(task.has_acc_norm);
    const Json& p = task.protocol;
    EXPECT_EQ(p["id"], "mmlu-harness-1shot");
    EXPECT_EQ(p["letter"], "spaced");
    EXPECT_EQ(p["files"][0]["name"], folder + "test/*_test.csv");
    EXPECT_EQ(p["files"][0]["count"], 2);
    EXPECT_EQ(p["questions_expected"], 14042);
    EXPECT_EQ(p["note"],
              "the files have 3 questions, the published split has 14042; 2 of 57 subjects");
  }
}

TEST(TasksMmlu, HashOfFilesIsThatOfTheirListing) {
  const TempDir dir;
  write_original(dir, "");
  const std::string biology = sha256_hex("First?,0,1,2,3,A\nSecond?,4,5,6,7,D\n");
  const std::string religions = sha256_hex("\" Two\nlines \",k,l,m,n,B\n");
  EXPECT_EQ(load_task(request(dir)).protocol["files"][0]["sha256"],
            sha256_hex(biology + "  college_biology_test.csv\n" + religions +
                       "  world_religions_test.csv\n"));
}

TEST(TasksMmlu, HeaderLineAndIntegerAnswers) {
  const TempDir dir;
  const std::string header = "question,choice0,choice1,choice2,choice3,answer\n";
  dir.file("dev/world_religions_dev.csv", header + "Dev w,k,l,m,n,3\n");
  dir.file("test/world_religions_test.csv", header + "\" Two\nlines \",k,l,m,n,1\n");
  dir.file("dev/college_biology_dev.csv",
           "Question,A,B,C,D,Answer\nDev c,\"p,q\",\"say \"\"r\"\"\",s,t,2\n");
  dir.file("test/college_biology_test.csv", "First?,0,1,2,3,0\nSecond?,4,5,6,7,3\n");
  dir.file("test/._college_biology_test.csv", "what an archiver left");
  const Task task = load_task(request(dir));
  expect_harness_questions(task);
  expect_contains(task.protocol["note"].get<std::string>(),
                  "1 of 2 test files begin with a header line, which is no question; 2 of 2 dev");
}

TEST(TasksMmlu, ExportedTables) {
  const TempDir dir;
  // Subjects are put in order, rows of a subject stay in theirs.
  dir.file("mmlu/mmlu_test.jsonl",
           "{\"question\":\" Two\\nlines \",\"subject\":\"world_religions\",\"choices\":[\"k\","
           "\"l\",\"m\",\"n\"],\"answer\":1}\n"
           "{\"question\":\"First?\",\"subject\":\"college_biology\",\"choices\":[\"0\",\"1\","
           "\"2\",\"3\"],\"answer\":\"A\"}\n"
           "{\"question\":\"Second?\",\"subject\":\"college_biology\",\"choices\":[\"4\",\"5\","
           "\"6\",\"7\"],\"answer\":3}\n");
  expect_contains(load_error(dir), "worked examples of mmlu come from its dev rows: expected ");
  dir.file("mmlu/mmlu_dev.jsonl",
           "{\"question\":\"Dev c\",\"subject\":\"college_biology\",\"choices\":[\"p,q\","
           "\"say \\\"r\\\"\",\"s\",\"t\"],\"answer\":2}\n"
           "{\"question\":\"Dev w\",\"subject\":\"world_religions\",\"choices\":[\"k\",\"l\","
           "\"m\",\"n\"],\"answer\":3}\n");
  const Task task = load_task(request(dir));
  expect_harness_questions(task);
  EXPECT_EQ(task.protocol["files"][1]["name"], "mmlu/mmlu_dev.jsonl");
  // The original files come first.
  write_original(dir, "");
  EXPECT_EQ(load_task(request(dir)).protocol["files"][0]["name"], "test/*_test.csv");
}

TEST(TasksMmlu, HendrycksPromptAndBareLetters) {
  const TempDir dir;
  write_original(dir, "");
  TaskRequest study = request(dir);
  study.prompt = MmluPrompt::hendrycks;
  study.letter = MmluLetter::bare;
  const Task task = load_task(study);
  EXPECT_EQ(context(task, 2),
            "The following are multiple choice questions (with answers) about  world "
            "religions.\n\nDev w\nA. k\nB. l\nC. m\nD. n\nAnswer: D\n\n"
            " Two\nlines \nA. k\nB. l\nC. m\nD. n\nAnswer:");
  EXPECT_EQ(task.questions[2].choices[1].continuation, "B");
  EXPECT_TRUE(task.questions[2].choices[1].bare);
  EXPECT_EQ(task.protocol["prompt"], "mmlu-hendrycks");
  EXPECT_EQ(task.protocol["letter"], "bare");
}

TEST(TasksMmlu, ShotsAndLimit) {
  const TempDir dir;
  write_original(dir, "");
  const Task none = load_task(request(dir, 0));
  EXPECT_EQ(context(none, 1),
            "The following are multiple choice questions (with answers) about college biology.\n\n"
            "Second?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:");
  EXPECT_EQ(none.protocol["files"].size(), 1U);
  expect_contains(load_error(dir, -1),  // five by default
                  "expected at most the 1 dev rows of mmlu's college_biology, found 5");
  TaskRequest limited = request(dir);
  limited.limit = 1;
  const Task task = load_task(limited);
  ASSERT_EQ(task.questions.size(), 2U);  // of each subject
  EXPECT_EQ(task.questions[1].subject, 1);
  EXPECT_EQ(task.protocol["questions"], 2);
  EXPECT_EQ(task.protocol["questions_found"], 3);
}

TEST(TasksMmlu, WindowsLineEnds) {
  const TempDir dir;
  dir.file("test/virology_test.csv", "\"a\r\nb\",1,2,3,4,C\r\n");
  const Task task = load_task(request(dir, 0));
  expect_contains(context(task, 0), "\n\na\nb\nA. 1\n");
  expect_contains(task.protocol["note"].get<std::string>(), "1 of 1 test files have \\r\\n");
}

TEST(TasksMmlu, MalformedFiles) {
  const TempDir dir;
  const auto message = [&](const std::string& content) {
    dir.file("test/virology_test.csv", content);
    return load_error(dir, 0);
  };
  expect_contains(message("q,1,2,3,4,A\nq,1,2,3,B\n"),
                  "virology_test.csv: line 2: expected 6 columns: question, four choices, answer, "
                  "found 5");
  expect_contains(message("q,1,2,3,4,A\nq,1,2,3,4,E\n"),
                  "line 2: answer: expected A to D or 0 to 3, found \"E\"");
  expect_contains(message("q,1,2,3,4,4\n"), "expected A to D or 0 to 3, found \"4\"");
  expect_contains(message("q,1,2,3,4,A\n\"q,1,2,3,4,A\n"),
                  "line 2: expected a quote that closes the cell");
  expect_contains(message(""), "virology_test.csv: line 1: expected at least one row");
  expect_contains(message("question,a,b,c,d,answer\n"), "rows: expected at least one question");
  dir.file("test/alchemy_test.csv", "q,1,2,3,4,A\n");
  expect_contains(load_error(dir, 0),
                  "alchemy_test.csv: file name: expected one of MMLU's 57 "
                  "subjects before _test, found \"alchemy\"");

  const TempDir table;
  const auto row_message = [&](const std::string& row) {
    table.file("mmlu_test.jsonl", row);
    return load_error(table, 0);
  };
  expect_contains(row_message("{\"question\":\"q\",\"subject\":\"alchemy\",\"choices\":[\"1\","
                              "\"2\",\"3\",\"4\"],\"answer\":0}"),
                  "line 1: subject: expected one of MMLU's 57 subjects, found \"alchemy\"");
  expect_contains(row_message("{\"question\":\"q\",\"subject\":\"virology\",\"choices\":[\"1\","
                              "\"2\",\"3\"],\"answer\":0}"),
                  "line 1: choices: expected an array of 4 strings");
  expect_contains(row_message("{\"question\":\"q\",\"subject\":\"virology\",\"choices\":[\"1\","
                              "\"2\",\"3\",\"4\"],\"answer\":4}"),
                  "line 1: answer: expected an integer from 0 to 3, found 4");
  expect_contains(row_message("{\"question\":\"q\",\"choices\":[\"1\",\"2\",\"3\",\"4\"],"
                              "\"answer\":0}"),
                  "line 1: subject: expected a string, found nothing");
}

TEST(TasksMmlu, CategoriesOfAllSubjects) {
  // Subjects per category as published: 13, 18, 12 and 14.
  const std::map<std::string, std::string> subjects = {
      {"humanities",
       "formal_logic high_school_european_history high_school_us_history "
       "high_school_world_history international_law jurisprudence logical_fallacies "
       "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"},
      {"stem",
       "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
       "college_mathematics college_physics computer_security conceptual_physics "
       "electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
       "high_school_computer_science high_school_mathematics high_school_physics "
       "high_school_statistics machine_learning"},
      {"social",
       "econometrics high_school_geography high_school_government_and_politics "
       "high_school_macroeconomics high_school_microeconomics high_school_psychology "
       "human_sexuality professional_psychology public_relations security_studies sociology "
       "us_foreign_policy"},
      {"other",
       "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging "
       "management marketing medical_genetics miscellaneous nutrition professional_accounting "
       "professional_medicine virology"}};
  std::size_t count = 0;
  for (const auto& [category, names] : subjects) {
    std::istringstream list(names);
    for (std::string name; list >> name; ++count) {
      const char* found = mmlu_category(name);
      ASSERT_NE(found, nullptr) << name;
      EXPECT_EQ(found, category) << name;
    }
  }
  EXPECT_EQ(count, 57U);
  EXPECT_EQ(mmlu_category("alchemy"), nullptr);
  EXPECT_EQ(mmlu_category(""), nullptr);
}

}  // namespace
}  // namespace engine
