#include "eval/tasks.h"

#include <algorithm>

#include "eval/tasks_parts.h"

namespace engine {
namespace {

// Prompts grow with the shots, and every question has them all.
constexpr std::int64_t kMaxShots = 100;
constexpr std::int64_t kMmluShots = 5;

template <class T>
std::string joined(const std::vector<T>& parts, const char* between) {
  std::string out;
  for (const T& part : parts) out += (out.empty() ? "" : between) + std::string(part);
  return out;
}

Json make_protocol(const TaskRequest& request, std::int64_t shots, tasks::LoadedTask& loaded) {
  const bool mmlu = request.name == "mmlu";
  Json p;
  p["id"] = (mmlu ? mmlu_prompt_name(request.prompt) : request.name) + "-" + std::to_string(shots) +
            "shot";
  p["split"] = loaded.split;
  p["files"] = loaded.files;
  p["shots"] = shots;
  if (mmlu) {
    p["prompt"] = mmlu_prompt_name(request.prompt);
    p["letter"] = mmlu_letter_name(request.letter);
  }
  if (request.max_prompt_tokens > 0) p["max_prompt_tokens"] = request.max_prompt_tokens;
  if (request.limit > 0) p["limit"] = request.limit;
  p["questions"] = loaded.task.questions.size();
  p["questions_found"] = loaded.found;
  p["questions_expected"] = loaded.expected;
  if (loaded.found != loaded.expected) {
    loaded.notes.insert(loaded.notes.begin(), "the files have " + std::to_string(loaded.found) +
                                                  " questions, the published split has " +
                                                  std::to_string(loaded.expected));
  }
  if (!loaded.notes.empty()) p["note"] = joined(loaded.notes, "; ");
  return p;
}

}  // namespace

const char* encoding_name(Encoding encoding) {
  switch (encoding) {
    case Encoding::separate:
      return "lmeval-0.3";
    case Encoding::joint:
      return "lmeval-0.4";
    case Encoding::joint_bos:
      return "lmeval-0.4.10";
  }
  throw Error(ErrorCode::internal, "unknown encoding");
}

Encoding encoding_from_name(std::string_view name) {
  std::vector<std::string> known;
  for (const Encoding e : {Encoding::separate, Encoding::joint, Encoding::joint_bos}) {
    if (name == encoding_name(e)) return e;
    known.emplace_back(encoding_name(e));
  }
  throw Error(ErrorCode::usage,
              "encoding: expected one of " + joined(known, ", ") + ", found " + quote_text(name));
}

const char* mmlu_prompt_name(MmluPrompt prompt) {
  return prompt == MmluPrompt::harness ? "mmlu-harness" : "mmlu-hendrycks";
}

const char* mmlu_letter_name(MmluLetter letter) {
  return letter == MmluLetter::spaced ? "spaced" : "bare";
}

const std::vector<std::string>& task_names() {
  static const std::vector<std::string> names = {"piqa",      "arc_easy",   "arc_challenge",
                                                 "hellaswag", "winogrande", "mmlu"};
  return names;
}

Task load_task(const TaskRequest& request) {
  const auto& names = task_names();
  if (std::find(names.begin(), names.end(), request.name) == names.end()) {
    throw Error(ErrorCode::usage, "task: expected one of " + joined(names, ", ") + ", found " +
                                      quote_text(request.name));
  }
  if (request.shots < -1 || request.shots > kMaxShots) {
    throw Error(ErrorCode::usage, "--shots: expected 0 to " + std::to_string(kMaxShots) +
                                      ", found " + std::to_string(request.shots));
  }
  if (request.limit < 0 || request.max_prompt_tokens < 0) {
    throw Error(ErrorCode::usage,
                "limits of questions and of prompt tokens: expected 0 or more, "
                "found " +
                    std::to_string(std::min(request.limit, request.max_prompt_tokens)));
  }
  std::error_code ignored;
  if (!std::filesystem::is_directory(request.data, ignored)) {
    throw Error(ErrorCode::usage,
                "--data: expected a folder, found " + quote_text(request.data.string()));
  }
  const bool mmlu = request.name == "mmlu";
  const std::int64_t shots = request.shots >= 0 ? request.shots : mmlu ? kMmluShots : 0;
  tasks::LoadedTask loaded =
      mmlu ? tasks::load_mmlu(request, shots) : tasks::load_rows_task(request, shots);
  loaded.task.name = request.name;
  loaded.task.max_prompt_tokens = request.max_prompt_tokens;
  loaded.task.protocol = make_protocol(request, shots, loaded);
  return std::move(loaded.task);
}

std::string full_context(const Task& task, const Question& question, const Choice& choice,
                         std::size_t shots) {
  const Preamble& preamble = task.preambles.at(static_cast<std::size_t>(question.preamble));
  std::string out = preamble.header;
  for (std::size_t i = 0; i < std::min(shots, preamble.shots.size()); ++i) {
    out += preamble.shots[i];
  }
  return out += choice.context;
}

}  // namespace engine
