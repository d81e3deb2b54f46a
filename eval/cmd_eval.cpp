// engine eval: accuracies on choice tasks.
#include <chrono>
#include <optional>
#include <set>

#include "engine/cmd/commands.h"
#include "engine/core/args.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "eval/task_store.h"
#include "eval/tasks.h"

namespace engine {
namespace {

std::vector<std::string> split_names(const std::string& list) {
  std::vector<std::string> names;
  std::set<std::string> seen;
  std::size_t at = 0;
  while (at <= list.size()) {
    const std::size_t end = std::min(list.find(',', at), list.size());
    std::string name = list.substr(at, end - at);
    if (name.empty() || !seen.insert(name).second) {
      throw Error(ErrorCode::usage,
                  "--tasks: expected distinct names with commas, found " + quote_text(list));
    }
    names.push_back(std::move(name));
    at = end + 1;
  }
  return names;
}

class EvalCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "eval"; }
  [[nodiscard]] const char* summary() const override { return "Measure accuracy on choice tasks"; }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    std::string all;
    for (const std::string& t : task_names()) all += (all.empty() ? "" : ", ") + t;
    app.add_option("--model", model_, "Checkpoint directory, .qw file, or synthetic:NAME")
        ->required();
    app.add_option("--tasks", tasks_, "With commas, of: " + all)->required();
    app.add_option("--data", request_.data, "Folder with the tasks' files (docs/tasks.md)")
        ->required();
    app.add_option("--shots", request_.shots,
                   "Worked examples in front of each question; -1: 5 for mmlu, else 0")
        ->capture_default_str();
    app.add_option("--limit", request_.limit,
                   "At most so many questions per task (mmlu: per subject); 0: all")
        ->capture_default_str();
    add_choice<Encoding>(app, "--encoding", encoding_,
                         {{"lmeval-0.4", Encoding::joint},
                          {"lmeval-0.4.10", Encoding::joint_bos},
                          {"lmeval-0.3", Encoding::separate}},
                         "How prompts become tokens: together without BOS, with BOS, or context "
                         "and choice apart without BOS");
    add_choice<MmluPrompt>(app, "--mmlu-prompt", request_.prompt,
                           {{"harness", MmluPrompt::harness}, {"hendrycks", MmluPrompt::hendrycks}},
                           "How MMLU asks");
    add_choice<MmluLetter>(app, "--mmlu-letter", request_.letter,
                           {{"spaced", MmluLetter::spaced}, {"bare", MmluLetter::bare}},
                           "The token of an MMLU answer: \" A\" or \"A\"");
    app.add_option("--max-length", max_length_,
                   "Longer prompts lose tokens at the front; 0: the model's positions")
        ->capture_default_str();
    app.add_option("--max-prompt-tokens", request_.max_prompt_tokens,
                   "MMLU drops worked examples, the last first, from longer prompts; 0: never")
        ->capture_default_str();
    app.add_option("--tokenizer", tokenizer_,
                   "Tokenizer file or folder instead of the model's own; for synthetic models");
    app.add_flag("--no-share", no_share_, "Compute every prompt by itself");
    app.add_flag("--no-pack", no_pack_, "Compute one sequence at a time");
    app.add_option("--batch", batch_, "Tokens at a time; 0: chosen from the device")
        ->capture_default_str();
    app.add_option("--pass-tokens", pass_tokens_,
                   "Tokens per pass over the weights; 0: as many as memory holds")
        ->capture_default_str();
    app.add_option("--save", save_, "Write every choice's log-likelihood to this safetensors file");
    app.add_option("--compare", compare_,
                   "Report the paired difference from a model's --save file");
    add_choice<Exec>(app, "--exec", exec_, {{"decoded", Exec::decoded}, {"packed", Exec::packed}},
                     "Hold packed linears decoded to dense matrices, or packed");
    device_.declare(app);
    device_.declare_dtype(app);
  }

  void run() override;

 private:
  void check() const;
  [[nodiscard]] std::vector<Task> load(const std::vector<std::string>& names) const;

  CLI::App* app_ = nullptr;
  std::string model_, tasks_, tokenizer_, save_, compare_;
  TaskRequest request_;
  Encoding encoding_ = Encoding::joint;
  std::int64_t max_length_ = 0, batch_ = 0, pass_tokens_ = 0;
  bool no_share_ = false, no_pack_ = false;
  Exec exec_ = Exec::decoded;
  DeviceOptions device_;
};

void EvalCommand::check() const {
  const auto require = [](const char* option, std::int64_t value, std::int64_t low) {
    if (value < low) {
      throw Error(ErrorCode::usage, std::string(option) + ": expected " + std::to_string(low) +
                                        " or more, found " + std::to_string(value));
    }
  };
  require("--shots", request_.shots, -1);
  require("--limit", request_.limit, 0);
  require("--max-length", max_length_, 0);
  require("--max-prompt-tokens", request_.max_prompt_tokens, 0);
  require("--batch", batch_, 0);
  require("--pass-tokens", pass_tokens_, 0);
  if (app_->get_option("--save")->count() > 0) check_writable("--save", save_);
}

std::vector<Task> EvalCommand::load(const std::vector<std::string>& names) const {
  std::vector<Task> tasks;
  for (const std::string& name : names) {
    TaskRequest request = request_;
    request.name = name;
    tasks.push_back(load_task(request));
  }
  return tasks;
}

void EvalCommand::run() {
  Report report("engine eval");
  report["options"] = parsed_options(*app_);
  check();
  const std::vector<std::string> names = split_names(tasks_);
  for (const std::string& name : names) {
    if (std::ranges::find(task_names(), name) == task_names().end()) {
      std::string all;
      for (const std::string& t : task_names()) all += (all.empty() ? "" : ", ") + t;
      throw Error(ErrorCode::usage, "--tasks: expected of " + all + ", found " + quote_text(name));
    }
  }
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  report["model"] = source->describe();
  if (exec_ == Exec::packed) require_packed(*source);
  const std::unique_ptr<Tokenizer> tokenizer =
      tokenizer_.empty() ? model_tokenizer(*source) : load_tokenizer(tokenizer_);
  if (tokenizer == nullptr) {
    throw Error(ErrorCode::usage,
                model_ + ": a synthetic model has no tokenizer: expected --tokenizer, found none");
  }

  ScoreJob job;
  std::vector<Task> tasks;
  std::vector<std::vector<double>> references;
  {
    const PhaseTimer timer(report, "tokenize");
    tasks = load(names);
    const std::int64_t positions = source->config().max_positions;
    for (Task& task : tasks) {
      std::vector<ScoreRequest> requests = make_requests(
          task, *tokenizer, encoding_, max_length_ > 0 ? max_length_ : positions, task.protocol);
      if (!compare_.empty()) references.push_back(load_choices(compare_, task));
      job.requests.insert(job.requests.end(), std::make_move_iterator(requests.begin()),
                          std::make_move_iterator(requests.end()));
    }
  }

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  job.source = source.get();
  job.ops = traced ? &*traced : ops.get();
  job.ledger = &ledger;
  job.dtype = device_.compute_dtype(*ops, source->linear_dtype());
  job.exec = exec_;
  job.share = !no_share_;
  job.pack = !no_pack_;
  job.batch_rows = batch_;
  job.pass_rows = pass_tokens_;
  report.add_device(*ops);
  Json& numerics = report["numerics"];
  numerics["compute_dtype"] = dtype_name(job.dtype);
  numerics["logits"] = "f32";
  numerics["log_likelihood"] = "f32 log-softmax, f64 sums";
  numerics["exec"] = exec_ == Exec::packed ? "packed" : "decoded";

  const auto start = std::chrono::steady_clock::now();
  const ScoreResult scores = score(job, report);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  Json protocols = Json::array(), results = Json::array(), paired = Json::array();
  Json notes = Json::array();  // on data that is not as published
  std::vector<std::vector<double>> by_task;
  std::size_t at = 0;
  std::int64_t questions = 0;
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    std::size_t choices = 0;
    for (const Question& q : tasks[t].questions) choices += q.choices.size();
    const auto first = scores.log_likelihood.begin() + static_cast<std::ptrdiff_t>(at);
    by_task.emplace_back(first, first + static_cast<std::ptrdiff_t>(choices));
    at += choices;
    questions += static_cast<std::int64_t>(tasks[t].questions.size());
    protocols.push_back(tasks[t].protocol);
    if (tasks[t].protocol.contains("note")) {
      notes.push_back(tasks[t].name + ": " + tasks[t].protocol["note"].get<std::string>());
    }
    results.push_back(task_results(tasks[t], by_task.back()));
    if (!compare_.empty()) {
      paired.push_back(paired_results(tasks[t], by_task.back(), references[t]));
    }
  }
  if (!save_.empty()) save_choices(save_, tasks, by_task);
  report["protocols"] = protocols;
  Json& speed = report["speed"];
  speed["seconds"] = seconds;
  speed["questions_per_s"] = static_cast<double>(questions) / seconds;
  speed["tokens_per_s"] = report["packing"]["tokens_computed"].get<double>() / seconds;
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  if (!compare_.empty()) report["paired"] = paired;
  if (!notes.empty()) report["notes"] = notes;
  report["results"] = results;
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_eval_command() { return std::make_unique<EvalCommand>(); }

}  // namespace engine
