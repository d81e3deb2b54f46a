#include <algorithm>
#include <array>

#include "eval/tasks_parts.h"
#include "formats/sha256.h"

namespace engine::tasks {
namespace {

// The largest file of these tasks, HellaSwag's training rows, has 50 MB.
constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;
constexpr JsonLimits kRowLimits = {.max_bytes = std::size_t{1} << 20, .max_depth = 16};
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr std::array<std::string_view, 3> kSharedNames = {"dev.jsonl", "train.jsonl",
                                                          "valid.jsonl"};

bool has_keys(const std::filesystem::path& data, const std::string& name,
              const std::vector<std::string>& keys) {
  bool all = false;
  each_json_row(read_data_file(data, name), [&](const JsonObject& row) {
    all = std::all_of(keys.begin(), keys.end(), [&](const auto& key) { return row.has(key); });
    return false;
  });
  return all;
}

}  // namespace

DataFile read_data_file(const std::filesystem::path& folder, const std::string& name) {
  DataFile file;
  file.path = folder / name;
  file.name = name;
  file.text = read_text_file(file.path, kMaxFileBytes);
  if (file.text.empty()) {
    throw FormatError(file.path.string(), "line 1", "at least one row", "an empty file");
  }
  file.sha256 = sha256_hex(file.text);
  return file;
}

std::vector<std::string_view> lines_of(const DataFile& file) {
  std::vector<std::string_view> lines;
  std::string_view text = file.text;
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.remove_suffix(1);
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    if (line.ends_with('\r')) line.remove_suffix(1);
    lines.push_back(line);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

void each_json_row(const DataFile& file, const std::function<bool(const JsonObject& row)>& take) {
  std::size_t number = 0;
  for (const std::string_view line : lines_of(file)) {
    const std::string place = file.path.string() + ": line " + std::to_string(++number);
    if (stripped(line).empty()) {
      throw FormatError(file.path.string(), "line " + std::to_string(number), "a JSON object",
                        "a blank line");
    }
    const Json json = parse_json(line, place, kRowLimits);
    if (!take(JsonObject(json, place))) return;
  }
  if (number == 0) {
    throw FormatError(file.path.string(), "line 1", "a JSON object", "blank lines only");
  }
}

std::int64_t integer_or_digits(const JsonObject& row, std::string_view key, std::int64_t low,
                               std::int64_t high) {
  const Json* value = row.find(key);
  if (value == nullptr || !value->is_string()) return row.integer(key, low, high);
  const std::string& text = value->get_ref<const std::string&>();
  for (std::int64_t i = low; i <= high; ++i) {
    if (text == std::to_string(i)) return i;
  }
  row.fail(key, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
}

std::string find_file(const std::filesystem::path& data, const FileSearch& search) {
  for (const std::string& folder : search.folders) {
    for (const std::string& name : search.names) {
      const std::string relative = folder.empty() ? name : folder + "/" + name;
      std::error_code ignored;
      if (!std::filesystem::is_regular_file(data / relative, ignored)) continue;
      const bool common =
          std::find(kSharedNames.begin(), kSharedNames.end(), name) != kSharedNames.end();
      if (!common || has_keys(data, relative, search.keys)) return relative;
    }
  }
  return "";
}

std::string describe_search(const FileSearch& search) {
  const auto joined = [](const std::vector<std::string>& parts) {
    std::string out;
    for (const std::string& part : parts) {
      if (!part.empty()) out += (out.empty() ? "" : ", ") + part;
    }
    return out;
  };
  return joined(search.names) + " (there or in a folder " + joined(search.folders) + ")";
}

}  // namespace engine::tasks
