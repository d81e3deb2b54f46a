#include "eval/task_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "formats/safetensors.h"

namespace engine {
namespace {

std::int64_t most_choices(const Task& task) {
  std::size_t most = 0;
  for (const Question& q : task.questions) most = std::max(most, q.choices.size());
  return static_cast<std::int64_t>(most);
}

[[noreturn]] void mismatch(const std::filesystem::path& file, const Task& task,
                           const std::string& what, const std::string& expected,
                           const std::string& found) {
  throw Error(ErrorCode::mismatch, file.string() + ": " + task.name + ": " + what + ": expected " +
                                       expected + ", found " + found);
}

// What must be equal for two models to have answered the same questions.
void check_protocol(const std::filesystem::path& file, const Task& task, const Json& found) {
  for (const auto& [key, value] : task.protocol.items()) {
    const Json other = found.is_object() && found.contains(key) ? found[key] : Json();
    if (other != value) mismatch(file, task, key, describe(value), describe(other));
  }
}

}  // namespace

void save_choices(const std::filesystem::path& file, std::span<const Task> tasks,
                  std::span<const std::vector<double>> log_likelihood) {
  std::vector<TensorDecl> decls;
  TensorMetadata metadata = {{"format", "lowbit.choices"}};
  for (const Task& task : tasks) {
    decls.push_back({task.name,
                     TensorDType::f64,
                     {static_cast<std::int64_t>(task.questions.size()), most_choices(task)}});
    metadata.emplace_back(task.name, task.protocol.dump());
  }
  SafetensorsWriter writer(file, std::move(decls), metadata);
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    const auto width = static_cast<std::size_t>(most_choices(tasks[t]));
    std::vector<double> rows;
    std::size_t at = 0;
    for (const Question& q : tasks[t].questions) {
      for (std::size_t c = 0; c < width; ++c) {
        rows.push_back(c < q.choices.size() ? log_likelihood[t][at + c]
                                            : std::numeric_limits<double>::quiet_NaN());
      }
      at += q.choices.size();
    }
    writer.append(tasks[t].name, std::as_bytes(std::span(rows)));
  }
  writer.commit();
}

std::vector<double> load_choices(const std::filesystem::path& file, const Task& task) {
  const SafetensorsFile stored(file);
  const auto& metadata = stored.metadata();
  const auto protocol =
      std::ranges::find_if(metadata, [&](const auto& entry) { return entry.first == task.name; });
  const TensorInfo* info = stored.find(task.name);
  if (protocol == metadata.end() || info == nullptr) {
    throw Error(ErrorCode::mismatch, file.string() + ": expected log-likelihoods of " + task.name +
                                         " as engine eval --save writes them, found none");
  }
  check_protocol(file, task, parse_json(protocol->second, file.string()));
  const auto questions = static_cast<std::int64_t>(task.questions.size());
  const std::int64_t width = most_choices(task);
  if (info->dtype != TensorDType::f64 ||
      info->shape != std::vector<std::int64_t>{questions, width}) {
    throw FormatError(file.string(), task.name,
                      "f64 [" + std::to_string(questions) + ", " + std::to_string(width) + "]",
                      "another dtype or shape");
  }
  const std::span<const std::byte> bytes = stored.bytes(*info);
  std::vector<double> rows(bytes.size() / sizeof(double));
  std::memcpy(rows.data(), bytes.data(), bytes.size());
  std::vector<double> out;
  for (std::size_t q = 0; q < task.questions.size(); ++q) {
    const std::size_t choices = task.questions[q].choices.size();
    for (std::size_t c = 0; c < static_cast<std::size_t>(width); ++c) {
      const double v = rows[q * static_cast<std::size_t>(width) + c];
      if (std::isfinite(v) != (c < choices)) {
        throw FormatError(file.string(), task.name + "[" + std::to_string(q) + "]",
                          std::to_string(choices) + " finite values", "others");
      }
      if (c < choices) out.push_back(v);
    }
  }
  return out;
}

}  // namespace engine
