// The tasks of one file with a question per row.
#include <algorithm>
#include <optional>

#include "eval/tasks_parts.h"

namespace engine::tasks {
namespace {

constexpr std::size_t kMaxChoices = 64;
constexpr std::int64_t kNoLabel = -1;

const std::string& text_of(const Json& value, const JsonObject& row, std::string_view key) {
  if (!value.is_string()) row.fail(key, "strings");
  return value.get_ref<const std::string&>();
}

// The strings of an array.
std::vector<std::string> texts(const JsonObject& row, std::string_view key) {
  const Json* list = row.find(key);
  if (list == nullptr || !list->is_array() || list->size() < 2 || list->size() > kMaxChoices) {
    row.fail(key, "an array of 2 to " + std::to_string(kMaxChoices) + " strings");
  }
  std::vector<std::string> out;
  for (const Json& value : *list) out.push_back(text_of(value, row, key));
  return out;
}

Question piqa_row(const JsonObject& row) {
  const std::string context = "Question: " + row.text("goal") + "\nAnswer:";
  Question question;
  question.choices = {spaced_choice(context, row.text("sol1")),
                      spaced_choice(context, row.text("sol2"))};
  question.gold = row.has("label") ? integer_or_digits(row, "label", 0, 1) : kNoLabel;
  return question;
}

struct ArcChoices {
  std::vector<std::string> texts, labels;
};

// [{"text", "label"}] of the original files, or {"text": [], "label": []} of exported tables.
ArcChoices arc_choices(const JsonObject& parent) {
  const Json* choices = parent.find("choices");
  ArcChoices out;
  if (choices != nullptr && choices->is_object()) {
    const JsonObject columns = parent.object("choices");
    out = {texts(columns, "text"), texts(columns, "label")};
    if (out.texts.size() != out.labels.size()) parent.fail("choices", "as many labels as texts");
    return out;
  }
  if (choices == nullptr || !choices->is_array() || choices->size() < 2 ||
      choices->size() > kMaxChoices) {
    parent.fail("choices", "2 to " + std::to_string(kMaxChoices) + " choices");
  }
  for (const Json& value : *choices) {
    const JsonObject choice(value, parent.file(), parent.path_of("choices"));
    out.texts.push_back(choice.text("text"));
    out.labels.push_back(choice.text("label"));
  }
  return out;
}

Question arc_row(const JsonObject& row) {
  const Json* asked = row.find("question");
  const bool nested = asked != nullptr && asked->is_object();
  const JsonObject parent = nested ? row.object("question") : row;
  const std::string context =
      "Question: " + (nested ? parent.text("stem") : row.text("question")) + "\nAnswer:";
  const ArcChoices choices = arc_choices(parent);
  const auto gold = std::find(choices.labels.begin(), choices.labels.end(), row.text("answerKey"));
  if (gold == choices.labels.end()) row.fail("answerKey", "the label of one of the row's choices");
  Question question;
  for (const std::string& text : choices.texts) {
    question.choices.push_back(spaced_choice(context, text));
  }
  question.gold = gold - choices.labels.begin();
  return question;
}

Question hellaswag_row(const JsonObject& row) {
  const std::string context = without_markup(row.text("activity_label") + ": " + row.text("ctx_a") +
                                             " " + capitalized(row.text("ctx_b")));
  Question question;
  for (const std::string& ending : texts(row, "endings")) {
    question.choices.push_back(spaced_choice(context, without_markup(ending)));
  }
  question.gold =
      integer_or_digits(row, "label", 0, static_cast<std::int64_t>(question.choices.size()) - 1);
  return question;
}

Question winogrande_row(const JsonObject& row) {
  const std::string sentence = row.text("sentence");
  const std::size_t blank = sentence.find('_');
  if (blank == std::string::npos) row.fail("sentence", "a sentence with the blank _");
  const std::string_view rest = stripped(std::string_view(sentence).substr(blank + 1));
  Question question;
  for (const char* option : {"option1", "option2"}) {
    question.choices.push_back(spaced_choice(sentence.substr(0, blank) + row.text(option), rest));
  }
  question.gold = integer_or_digits(row, "answer", 1, 2) - 1;
  return question;
}

struct RowTask {
  const char* name;
  const char* split;
  std::int64_t expected;  // questions of the published split
  bool has_acc_norm;
  Question (*parse)(const JsonObject& row);  // gold is kNoLabel if the labels have their own file
  FileSearch files;
  std::vector<std::string> train_names;  // of worked examples; folders and keys as above
};

const std::vector<RowTask>& row_tasks() {
  static const std::vector<RowTask> tasks = {
      {"piqa",
       "validation",
       1838,
       true,
       piqa_row,
       {{"", "piqa", "physicaliqa-train-dev"},
        {"valid.jsonl", "piqa.valid.jsonl", "piqa.jsonl", "dev.jsonl"},
        {"goal", "sol1", "sol2"}},
       {"train.jsonl", "piqa.train.jsonl", "piqa_train.jsonl"}},
      {"arc_easy",
       "test",
       2376,
       true,
       arc_row,
       {{"", "arc_easy", "ARC-Easy", "ARC-V1-Feb2018-2/ARC-Easy"},
        {"ARC-Easy-Test.jsonl", "arc_easy.jsonl"},
        {"question", "answerKey"}},
       {"ARC-Easy-Train.jsonl", "arc_easy_train.jsonl"}},
      {"arc_challenge",
       "test",
       1172,
       true,
       arc_row,
       {{"", "arc_challenge", "ARC-Challenge", "ARC-V1-Feb2018-2/ARC-Challenge"},
        {"ARC-Challenge-Test.jsonl", "arc_challenge.jsonl"},
        {"question", "answerKey"}},
       {"ARC-Challenge-Train.jsonl", "arc_challenge_train.jsonl"}},
      {"hellaswag",
       "validation",
       10042,
       true,
       hellaswag_row,
       {{"", "hellaswag"}, {"hellaswag_val.jsonl", "hellaswag.jsonl"}, {"ctx_a", "endings"}},
       {"hellaswag_train.jsonl"}},
      {"winogrande",
       "validation",
       1267,
       false,
       winogrande_row,
       {{"", "winogrande", "winogrande_1.1"},
        {"dev.jsonl", "winogrande.jsonl"},
        {"sentence", "option1", "option2"}},
       {"train_xl.jsonl", "winogrande_train.jsonl"}},
  };
  return tasks;
}

// Gives the questions, which have no labels, those of the file NAME-labels.lst beside NAME.jsonl.
// `part`: the questions are only the first ones.
DataFile add_labels(const DataFile& file, const std::filesystem::path& data, bool part,
                    std::vector<Question>& questions) {
  const std::string name =
      (std::filesystem::path(file.name).replace_extension("").string() + "-labels.lst");
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(data / name, ignored)) {
    throw FormatError(file.path.string(), "line 1",
                      "a column label or the file " + name + " beside it", "neither");
  }
  DataFile labels = read_data_file(data, name);
  const std::vector<std::string_view> lines = lines_of(labels);
  if (part ? lines.size() < questions.size() : lines.size() != questions.size()) {
    throw FormatError(labels.path.string(), "labels",
                      (part ? "at least " : "") + std::to_string(questions.size()) +
                          ", one for each row of " + file.name,
                      std::to_string(lines.size()));
  }
  for (std::size_t i = 0; i < questions.size(); ++i) {
    const std::string_view label = stripped(lines[i]);
    if (label != "0" && label != "1") {
      throw FormatError(labels.path.string(), "line " + std::to_string(i + 1), "0 or 1",
                        quote_text(label));
    }
    questions[i].gold = label == "1" ? 1 : 0;
  }
  return labels;
}

// The first `most` questions of a file (0: all); adds what was read to `files`.
std::vector<Question> load_questions(const RowTask& task, const std::filesystem::path& data,
                                     const std::string& name, std::size_t most, Json& files) {
  const DataFile file = read_data_file(data, name);
  files.push_back({{"name", file.name}, {"sha256", file.sha256}});
  std::vector<Question> questions;
  each_json_row(file, [&](const JsonObject& row) {
    Question question = task.parse(row);
    const bool labelled = question.gold != kNoLabel;
    if (!questions.empty() && labelled != (questions[0].gold != kNoLabel)) {
      row.fail("label", "a label in every row or in none");
    }
    questions.push_back(std::move(question));
    return questions.size() != most;
  });
  if (questions[0].gold == kNoLabel) {
    const DataFile labels = add_labels(file, data, most != 0, questions);
    files.push_back({{"name", labels.name}, {"sha256", labels.sha256}});
  }
  return questions;
}

std::vector<std::string> load_shots(const RowTask& task, const std::filesystem::path& data,
                                    std::int64_t shots, Json& files) {
  FileSearch search = task.files;
  search.names = task.train_names;
  const std::string name = find_file(data, search);
  if (name.empty()) {
    throw Error(ErrorCode::usage, "--shots: worked examples of " + std::string(task.name) +
                                      " come from its training rows: expected in " + data.string() +
                                      " one of " + describe_search(search) + ", found none");
  }
  std::vector<std::string> out;
  for (const Question& q :
       load_questions(task, data, name, static_cast<std::size_t>(shots), files)) {
    const Choice& right = q.choices[static_cast<std::size_t>(q.gold)];
    out.push_back(right.context + right.continuation + "\n\n");
  }
  if (static_cast<std::int64_t>(out.size()) < shots) {
    throw Error(ErrorCode::usage, "--shots: expected at most the " + std::to_string(out.size()) +
                                      " rows of " + name + ", found " + std::to_string(shots));
  }
  return out;
}

}  // namespace

Choice spaced_choice(std::string context, std::string_view text) {
  Choice choice;
  choice.context = std::move(context);
  choice.continuation = " " + std::string(text);
  choice.code_points = count_code_points(text);
  return choice;
}

LoadedTask load_rows_task(const TaskRequest& request, std::int64_t shots) {
  const auto& all = row_tasks();
  const auto task = std::find_if(all.begin(), all.end(),
                                 [&](const RowTask& t) { return t.name == request.name; });
  if (task == all.end()) throw Error(ErrorCode::internal, "no task " + request.name);
  const std::string name = find_file(request.data, task->files);
  if (name.empty()) {
    throw Error(ErrorCode::usage, "--data: expected a file of " + request.name + " in " +
                                      request.data.string() + ", one of " +
                                      describe_search(task->files) + ", found none");
  }
  LoadedTask out;
  out.split = task->split;
  out.expected = task->expected;
  out.files = Json::array();
  out.task.has_acc_norm = task->has_acc_norm;
  out.task.questions = load_questions(*task, request.data, name, 0, out.files);
  out.found = static_cast<std::int64_t>(out.task.questions.size());
  if (request.limit > 0 && request.limit < out.found) {
    out.task.questions.resize(static_cast<std::size_t>(request.limit));
  }
  out.task.preambles.resize(1);
  if (shots > 0) {
    out.task.preambles[0].shots = load_shots(*task, request.data, shots, out.files);
  }
  return out;
}

}  // namespace engine::tasks
