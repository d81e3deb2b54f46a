// MMLU: 57 subjects, as the original CSV files or as one exported table per split.
#include <algorithm>
#include <array>
#include <map>

#include "eval/tasks_parts.h"
#include "formats/csv.h"
#include "formats/sha256.h"

namespace engine::tasks {
namespace {

constexpr std::int64_t kExpected = 14042;
constexpr std::size_t kChoices = 4;
constexpr std::array<std::string_view, kChoices> kLetters = {"A", "B", "C", "D"};

struct Category {
  const char* name;
  std::vector<std::string_view> subjects;
};
// The grouping of the original authors. The newer harness files anatomy under STEM.
const std::array<Category, 4>& categories() {
  static const std::array<Category, 4> all = {{
      {"humanities",
       {"formal_logic", "high_school_european_history", "high_school_us_history",
        "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
        "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
        "world_religions"}},
      {"stem",
       {"abstract_algebra", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics",
        "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics",
        "machine_learning"}},
      {"social",
       {"econometrics", "high_school_geography", "high_school_government_and_politics",
        "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
        "human_sexuality", "professional_psychology", "public_relations", "security_studies",
        "sociology", "us_foreign_policy"}},
      {"other",
       {"anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts",
        "human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
        "professional_accounting", "professional_medicine", "virology"}},
  }};
  return all;
}

std::int64_t known_subjects() {
  std::size_t count = 0;
  for (const Category& category : categories()) count += category.subjects.size();
  return static_cast<std::int64_t>(count);
}

struct Row {
  std::string question;
  std::array<std::string, kChoices> choices;
  std::size_t answer = 0;
};
using Subjects = std::map<std::string, std::vector<Row>, std::less<>>;

// What a split's files held.
struct Split {
  Subjects subjects;
  Json files = Json::array();
  std::int64_t csv_files = 0, headers = 0, crlf_files = 0;
};

std::size_t answer_index(std::string_view text, const std::string& place) {
  for (std::size_t i = 0; i < kChoices; ++i) {
    if (text == kLetters[i] || text == std::to_string(i)) return i;
  }
  throw FormatError(place, "answer", "A to D or 0 to 3", quote_text(text));
}

std::string lower_ascii(std::string_view text) {
  std::string out(stripped(text));
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  return out;
}

// No question of the data reads "question" and no answer "answer".
bool is_header(const CsvRow& row) {
  return lower_ascii(row.cells.front()) == "question" && lower_ascii(row.cells.back()) == "answer";
}

std::vector<Row> csv_rows(const DataFile& file, Split& split) {
  const std::string path = file.path.string();
  CsvTable table = parse_csv(file.text, path);
  ++split.csv_files;
  split.crlf_files += table.crlf ? 1 : 0;
  std::vector<Row> out;
  for (CsvRow& cells : table.rows) {
    const std::string line = "line " + std::to_string(cells.line);
    if (cells.cells.size() != kChoices + 2) {
      throw FormatError(path, line, "6 columns: question, four choices, answer",
                        std::to_string(cells.cells.size()));
    }
    if (&cells == table.rows.data() && is_header(cells)) {
      ++split.headers;
      continue;
    }
    if (table.crlf) {
      // The whole file was converted, cells with several lines included.
      for (std::string& cell : cells.cells) {
        for (std::size_t at = 0; (at = cell.find("\r\n", at)) != std::string::npos;) {
          cell.erase(at, 1);
        }
      }
    }
    Row row;
    row.question = std::move(cells.cells[0]);
    for (std::size_t i = 0; i < kChoices; ++i) row.choices[i] = std::move(cells.cells[i + 1]);
    std::string place = path;
    place += ": " + line;
    row.answer = answer_index(stripped(cells.cells.back()), place);
    out.push_back(std::move(row));
  }
  if (out.empty()) throw FormatError(path, "rows", "at least one question", "none");
  return out;
}

// Names of the files "SUBJECT_SPLIT.csv" in a folder, in the order of bytes. Hidden ones, as some
// archivers leave behind, do not count.
std::vector<std::string> csv_names(const std::filesystem::path& folder, std::string_view split) {
  std::vector<std::string> names;
  std::error_code ignored;
  const std::string ending = "_" + std::string(split) + ".csv";
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(ending) && name[0] != '.') names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

// `name` is relative to the data folder: "data/test".
Split read_csv_split(const std::filesystem::path& data, const std::string& name,
                     std::string_view split) {
  Split out;
  const std::vector<std::string> names = csv_names(data / name, split);
  Sha256 listing;  // of what sha256sum prints for the files in this order
  for (const std::string& file_name : names) {
    std::string subject = file_name.substr(0, file_name.size() - split.size() - 5);
    const std::filesystem::path path = data / name / file_name;
    if (mmlu_category(subject) == nullptr) {
      throw FormatError(path.string(), "file name",
                        "one of MMLU's 57 subjects before _" + std::string(split),
                        quote_text(subject));
    }
    DataFile file = read_data_file(data, name + "/" + file_name);
    listing.update(file.sha256 + "  " + file_name + "\n");
    out.subjects.emplace(std::move(subject), csv_rows(file, out));
  }
  if (!names.empty()) {
    out.files.push_back({{"name", name + "/*_" + std::string(split) + ".csv"},
                         {"count", names.size()},
                         {"sha256", listing.hex()}});
  }
  return out;
}

Split read_json_split(const std::filesystem::path& data, const std::string& name) {
  Split out;
  const DataFile file = read_data_file(data, name);
  each_json_row(file, [&](const JsonObject& row) {
    Row parsed;
    parsed.question = row.text("question");
    const Json* choices = row.find("choices");
    if (choices == nullptr || !choices->is_array() || choices->size() != kChoices ||
        !std::all_of(choices->begin(), choices->end(),
                     [](const Json& choice) { return choice.is_string(); })) {
      row.fail("choices", "an array of 4 strings");
    }
    for (std::size_t i = 0; i < kChoices; ++i) {
      parsed.choices[i] = (*choices)[i].get_ref<const std::string&>();
    }
    const Json* answer = row.find("answer");
    parsed.answer = answer != nullptr && answer->is_string()
                        ? answer_index(answer->get_ref<const std::string&>(), row.file())
                        : static_cast<std::size_t>(row.integer("answer", 0, kChoices - 1));
    const std::string subject = row.text("subject");
    if (mmlu_category(subject) == nullptr) row.fail("subject", "one of MMLU's 57 subjects");
    out.subjects[subject].push_back(std::move(parsed));
    return true;
  });
  out.files.push_back({{"name", file.name}, {"sha256", file.sha256}});
  return out;
}

struct Splits {
  Split test, dev;
};

Splits read_splits(const std::filesystem::path& data, bool with_dev) {
  Splits out;
  const auto need_dev = [&](bool found, const std::string& what) {
    if (!found) {
      throw Error(ErrorCode::usage, "--shots: worked examples of mmlu come from its dev rows: " +
                                        ("expected " + (data / what).string()) + ", found none");
    }
  };
  for (const std::string folder : {"data", "", "mmlu", "mmlu/data"}) {
    const std::string prefix = folder.empty() ? "" : folder + "/";
    if (csv_names(data / (prefix + "test"), "test").empty()) continue;
    out.test = read_csv_split(data, prefix + "test", "test");
    if (with_dev) {
      out.dev = read_csv_split(data, prefix + "dev", "dev");
      need_dev(!out.dev.subjects.empty(), prefix + "dev/*_dev.csv");
    }
    return out;
  }
  const FileSearch search = {{"", "mmlu"}, {"mmlu_test.jsonl"}, {}};
  const std::string name = find_file(data, search);
  if (name.empty()) {
    throw Error(ErrorCode::usage,
                "--data: expected MMLU's questions in " + data.string() +
                    ", one of data/test/*_test.csv, test/*_test.csv, mmlu/test/*_test.csv, "
                    "mmlu/data/test/*_test.csv, mmlu_test.jsonl, mmlu/mmlu_test.jsonl, found none");
  }
  out.test = read_json_split(data, name);
  if (with_dev) {
    const std::string dev = name.substr(0, name.rfind("mmlu_test")) + "mmlu_dev.jsonl";
    std::error_code ignored;
    need_dev(std::filesystem::is_regular_file(data / dev, ignored), dev);
    out.dev = read_json_split(data, dev);
  }
  return out;
}

std::string block(const Row& row, MmluPrompt prompt) {
  std::string text(prompt == MmluPrompt::harness ? stripped(row.question) : row.question);
  for (std::size_t i = 0; i < kChoices; ++i) {
    text += "\n";
    text += kLetters[i];
    text += ". " + row.choices[i];
  }
  return text + "\nAnswer:";
}

Preamble preamble(const std::string& subject, const Split& dev, std::int64_t shots,
                  MmluPrompt prompt) {
  Preamble out;
  std::string spoken = subject;
  std::replace(spoken.begin(), spoken.end(), '_', ' ');
  out.header = "The following are multiple choice questions (with answers) about " +
               std::string(prompt == MmluPrompt::hendrycks ? " " : "") + spoken + ".\n\n";
  if (shots == 0) return out;
  const auto rows = dev.subjects.find(subject);
  const std::size_t available = rows == dev.subjects.end() ? 0 : rows->second.size();
  if (static_cast<std::int64_t>(available) < shots) {
    throw Error(ErrorCode::usage, "--shots: expected at most the " + std::to_string(available) +
                                      " dev rows of mmlu's " + subject + ", found " +
                                      std::to_string(shots));
  }
  for (std::size_t i = 0; i < static_cast<std::size_t>(shots); ++i) {
    const Row& row = rows->second[i];
    std::string shot = block(row, prompt);
    shot += " ";
    shot += kLetters[row.answer];
    out.shots.push_back(shot + "\n\n");
  }
  return out;
}

Question to_question(const Row& row, const TaskRequest& request) {
  Question question;
  const std::string context = block(row, request.prompt);
  for (const std::string_view letter : kLetters) {
    Choice choice = spaced_choice(context, letter);
    choice.bare = request.letter == MmluLetter::bare;
    if (choice.bare) choice.continuation = letter;
    question.choices.push_back(std::move(choice));
  }
  question.gold = static_cast<std::int64_t>(row.answer);
  return question;
}

void add_notes(const Split& split, const char* name, std::vector<std::string>& notes) {
  if (split.headers > 0) {
    notes.push_back(std::to_string(split.headers) + " of " + std::to_string(split.csv_files) + " " +
                    name + " files begin with a header line, which is no question");
  }
  if (split.crlf_files > 0) {
    notes.push_back(std::to_string(split.crlf_files) + " of " + std::to_string(split.csv_files) +
                    " " + name + " files have \\r\\n line ends, read as \\n inside cells, too");
  }
}

}  // namespace

LoadedTask load_mmlu(const TaskRequest& request, std::int64_t shots) {
  const Splits splits = read_splits(request.data, shots > 0);
  LoadedTask out;
  out.split = "test";
  out.expected = kExpected;
  out.files = splits.test.files;
  for (const Json& file : splits.dev.files) out.files.push_back(file);
  out.task.has_acc_norm = false;
  for (const auto& [subject, rows] : splits.test.subjects) {
    const auto index = static_cast<std::int64_t>(out.task.subjects.size());
    out.task.subjects.push_back(subject);
    out.task.preambles.push_back(preamble(subject, splits.dev, shots, request.prompt));
    out.found += static_cast<std::int64_t>(rows.size());
    std::size_t asked = rows.size();
    if (request.limit > 0) asked = std::min(asked, static_cast<std::size_t>(request.limit));
    for (std::size_t i = 0; i < asked; ++i) {
      Question question = to_question(rows[i], request);
      question.subject = index;
      question.preamble = index;
      out.task.questions.push_back(std::move(question));
    }
  }
  const auto subjects = static_cast<std::int64_t>(out.task.subjects.size());
  if (subjects != known_subjects()) {
    out.notes.push_back(std::to_string(subjects) + " of " + std::to_string(known_subjects()) +
                        " subjects");
  }
  add_notes(splits.test, "test", out.notes);
  add_notes(splits.dev, "dev", out.notes);
  return out;
}

}  // namespace engine::tasks

namespace engine {

const char* mmlu_category(std::string_view subject) {
  for (const tasks::Category& category : tasks::categories()) {
    if (std::find(category.subjects.begin(), category.subjects.end(), subject) !=
        category.subjects.end()) {
      return category.name;
    }
  }
  return nullptr;
}

}  // namespace engine
