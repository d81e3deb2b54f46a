// What the loaders of the choice tasks share. Not for others: the interface is eval/tasks.h.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/tasks.h"
#include "formats/json.h"

namespace engine::tasks {

// --- Files (tasks_files.cpp) ---

struct DataFile {
  std::filesystem::path path;
  std::string name;  // relative to the data folder
  std::string text;
  std::string sha256;  // of the file's bytes
};

// Throws IoError, or FormatError for an empty file and one that is too large.
[[nodiscard]] DataFile read_data_file(const std::filesystem::path& folder, const std::string& name);

// Calls take(row) for each line of a JSON lines file until it returns false; row.file() names the
// line, too. Lines may end in \r\n, and blank lines may follow the last. Throws FormatError.
void each_json_row(const DataFile& file, const std::function<bool(const JsonObject& row)>& take);

// The lines of a file, without blank ones at the end; line 1 first. Lines may end in \r\n.
[[nodiscard]] std::vector<std::string_view> lines_of(const DataFile& file);

// An integer from low to high at `key`, as a number or as the digits of a string: exports differ.
[[nodiscard]] std::int64_t integer_or_digits(const JsonObject& row, std::string_view key,
                                             std::int64_t low, std::int64_t high);

// Where a task's rows may be: the first of `folders` x `names`, folders outermost.
struct FileSearch {
  std::vector<std::string> folders;  // relative to the data folder; "" is that itself
  std::vector<std::string> names;
  // Keys of a row. Other tasks have a dev.jsonl, valid.jsonl or train.jsonl, too: such a file is
  // passed over if its first row lacks one of them.
  std::vector<std::string> keys;
};
// The file's name relative to `data`, or "" if there is none.
[[nodiscard]] std::string find_file(const std::filesystem::path& data, const FileSearch& search);
// For errors: "a, b (there or in FOLDER, FOLDER)".
[[nodiscard]] std::string describe_search(const FileSearch& search);

// --- Text (tasks_text.cpp) ---

// Without Unicode white space at both ends, as Python's strip.
[[nodiscard]] std::string_view stripped(std::string_view text);
// Without Unicode white space at the end.
[[nodiscard]] std::string_view stripped_right(std::string_view text);
[[nodiscard]] std::int64_t count_code_points(std::string_view text);
// The first character in title case, all others in lower case, as Python's capitalize: simple
// mappings of the Latin, Greek, Cyrillic and Armenian alphabets.
[[nodiscard]] std::string capitalized(std::string_view text);
// HellaSwag's texts without their WikiHow markup.
[[nodiscard]] std::string without_markup(std::string_view text);

// --- Tasks ---

// The continuation " text".
[[nodiscard]] Choice spaced_choice(std::string context, std::string_view text);

// What the folder gives, before what all tasks have in common.
struct LoadedTask {
  Task task;               // without name and protocol
  std::string split;       // "validation", "test"
  Json files;              // [{"name", "sha256"}]
  std::int64_t found = 0;  // questions in the files
  std::int64_t expected = 0;
  std::vector<std::string> notes;
};

// The five tasks of one file: piqa, arc_easy, arc_challenge, hellaswag, winogrande. `shots` is not
// negative. Throws as load_task().
[[nodiscard]] LoadedTask load_rows_task(const TaskRequest& request, std::int64_t shots);
[[nodiscard]] LoadedTask load_mmlu(const TaskRequest& request, std::int64_t shots);

}  // namespace engine::tasks
