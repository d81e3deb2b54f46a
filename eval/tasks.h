// Choice tasks: from the files that users have to questions, prompts and requests, and from
// log-likelihoods to accuracies. Protocols: docs/tasks.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/score.h"
#include "formats/json.h"
#include "formats/tokenizer.h"

namespace engine {

// How a context and a continuation become tokens. The names are the versions of the evaluation
// harness whose published figures they reproduce.
enum class Encoding : std::uint8_t {
  separate,  // "lmeval-0.3": each by itself, no BOS
  joint,     // "lmeval-0.4": trailing spaces of the context moved over; the whole minus the context
  joint_bos,  // "lmeval-0.4.10": as joint, with BOS in front
};
[[nodiscard]] const char* encoding_name(Encoding encoding);
// Throws Error(usage) listing the names.
[[nodiscard]] Encoding encoding_from_name(std::string_view name);

// How MMLU questions are asked (docs/tasks.md).
enum class MmluPrompt : std::uint8_t {
  harness,    // "mmlu-harness": one space after "about", stripped question
  hendrycks,  // "mmlu-hendrycks": two spaces, as the original script and the study
};
[[nodiscard]] const char* mmlu_prompt_name(MmluPrompt prompt);

// Which token an MMLU letter is.
enum class MmluLetter : std::uint8_t {
  spaced,  // " A": what follows "Answer:" in the prompt's own text
  bare,    // "A": the last id of the letter alone, as the study's script takes it
};
[[nodiscard]] const char* mmlu_letter_name(MmluLetter letter);

// What stands in front of questions; those of an MMLU subject share it.
struct Preamble {
  std::string header;
  std::vector<std::string> shots;  // worked examples, each with the blank line after it
};

struct Choice {
  std::string context;       // without the preamble
  std::string continuation;  // what is scored
  // Unicode code points of the choice without the space in front: what acc_norm divides by.
  std::int64_t code_points = 0;
  // Scored is the last token of the continuation's own text, whatever the encoding.
  bool bare = false;
};

struct Question {
  std::vector<Choice> choices;  // at least 2
  std::int64_t gold = 0;        // below choices.size()
  std::int64_t subject = -1;    // index into Task::subjects; -1: the task has none
  std::int64_t preamble = 0;    // index into Task::preambles
};

struct TaskRequest {
  std::string name;            // one of task_names()
  std::filesystem::path data;  // folder with the task's files
  std::int64_t shots = -1;     // worked examples in front; -1: the task's default (0, MMLU 5)
  std::int64_t limit = 0;      // at most so many questions (MMLU: of each subject); 0: all
  MmluPrompt prompt = MmluPrompt::harness;
  MmluLetter letter = MmluLetter::spaced;
  // While a context has more tokens, BOS included, its last shot is dropped; 0: never.
  std::int64_t max_prompt_tokens = 0;
};

struct Task {
  std::string name;
  std::vector<Question> questions;  // file order; MMLU: subjects by name, then file order
  std::vector<Preamble> preambles;  // at least one
  std::vector<std::string> subjects;
  bool has_acc_norm = true;
  std::int64_t max_prompt_tokens = 0;  // of the request, for make_requests()
  // "id", "split", "files" with SHA-256, "shots", "prompt" and "letter" (MMLU), "questions" (those
  // asked), "questions_found", "questions_expected", "limit" and, if anything is not as published
  // (another number of questions, header lines), "note": one line to be shown with the results.
  Json protocol;
};

// piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu.
[[nodiscard]] const std::vector<std::string>& task_names();

// Throws Error(usage) for an unknown task, shots that the data cannot give or no file of the task
// in the folder (naming those looked for); IoError; FormatError naming file and line.
[[nodiscard]] Task load_task(const TaskRequest& request);

// What a choice is given: the preamble's header, its first `shots` shots and the choice's context.
[[nodiscard]] std::string full_context(const Task& task, const Question& question,
                                       const Choice& choice, std::size_t shots);

// One request per choice, questions in order. Names of special tokens inside the text become their
// ids, as in the harness. `max_inputs`: the most tokens a model is given, which are all of a
// request but its last; longer requests lose tokens at the front. 0: no limit. `protocol` gets
// "encoding", "bos", "tokenizer_sha256", "longest_request" (tokens, before any were lost),
// "truncated_requests" and, with max_prompt_tokens, "prompts_that_lost_shots". Throws Error(usage)
// if the encoding needs BOS and the tokenizer has none, and for a question of which nothing would
// be scored, naming it.
[[nodiscard]] std::vector<ScoreRequest> make_requests(const Task& task, const Tokenizer& tokenizer,
                                                      Encoding encoding, std::int64_t max_inputs,
                                                      Json& protocol);

// Accuracies from log-likelihoods, one per choice, questions in order: {"task", "n", "acc",
// "acc_stderr"[, "acc_norm", "acc_norm_stderr"]}, all as fractions of 1; for MMLU also "macro"
// (mean over subjects), "categories": {"humanities" | "stem" | "social" | "other": {"n", "acc",
// "acc_stderr"}} (of the categories with questions) and "subjects": [{"subject", "n", "acc"}]. Ties
// go to the lowest index. Standard errors: sqrt(p (1 - p) / (n - 1)); absent for one question.
// Throws Error(numeric) naming the question if a log-likelihood is not finite.
[[nodiscard]] Json task_results(const Task& task, std::span<const double> log_likelihood);

// Paired comparison of two models on the same questions: {"task", "difference", "stderr"} of acc,
// and of acc_norm if the task has it ("difference_norm", "stderr_norm"): mean and standard error of
// the questions' differences, the model's minus the reference's.
[[nodiscard]] Json paired_results(const Task& task, std::span<const double> log_likelihood,
                                  std::span<const double> reference);

// Which of MMLU's categories a subject belongs to, in the original grouping: "humanities", "stem",
// "social" or "other"; nullptr for a subject that MMLU does not have.
[[nodiscard]] const char* mmlu_category(std::string_view subject);

}  // namespace engine
