// engine kl: distance of a model's predictions from a reference's on one or several texts.
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "eval/kl.h"
#include "eval/text_options.h"

namespace engine {
namespace {

class KlCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "kl"; }
  [[nodiscard]] const char* summary() const override {
    return "Measure how far a model's predictions are from a reference's";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--reference", reference_,
                   "Checkpoint directory, .qw file, synthetic:NAME, or what --save-reference wrote "
                   "(FILE.safetensors)")
        ->required();
    app.add_option("--model", model_,
                   "The model to compare: checkpoint directory, .qw file, or synthetic:NAME");
    app.add_option("--save-reference", save_,
                   "Store the reference's final hidden states and head in this safetensors file");
    app.add_flag("--noise-floor", noise_floor_,
                 "Also compare the reference with itself, computed in another order of batches");
    texts_.declare(app);
    device_.declare(app);
    device_.declare_dtype(app);
  }

  void run() override;

 private:
  [[nodiscard]] bool is_stored() const { return reference_.ends_with(".safetensors"); }
  void check() const;

  CLI::App* app_ = nullptr;
  std::string reference_, model_, save_;
  bool noise_floor_ = false;
  TextOptions texts_;
  DeviceOptions device_;
};

void KlCommand::check() const {
  texts_.check();
  if (model_.empty() && app_->get_option("--save-reference")->count() == 0) {
    throw Error(ErrorCode::usage,
                "--model: expected a model to compare (or --save-reference FILE), found nothing");
  }
  if (model_.empty() && texts_.packed()) {
    throw Error(ErrorCode::usage,
                "--exec packed: expected with --model (the reference runs decoded), found no "
                "--model");
  }
  if (is_stored()) {
    for (const char* option : {"--save-reference", "--noise-floor"}) {
      if (app_->get_option(option)->count() == 0) continue;
      throw Error(ErrorCode::usage, std::string(option) +
                                        ": expected a model as --reference, found the stored "
                                        "reference " +
                                        reference_);
    }
  }
  if (app_->get_option("--save-reference")->count() > 0) {
    if (!save_.ends_with(".safetensors")) {
      throw Error(ErrorCode::usage,
                  "--save-reference: expected FILE.safetensors, found \"" + save_ + "\"");
    }
    check_writable("--save-reference", save_);
  }
}

void KlCommand::run() {
  Report report("engine kl");
  report["options"] = parsed_options(*app_);
  check();
  const int threads = device_.checked_threads();
  std::optional<StoredReference> stored;
  std::unique_ptr<WeightSource> reference, model;
  if (is_stored()) {
    stored.emplace(reference_);
    report["reference"] = stored->describe();
  } else {
    reference = open_model(reference_, threads);
    report["reference"] = reference->describe();
  }
  if (!model_.empty()) {
    model = open_model(model_, threads);
    report["model"] = model->describe();
    if (texts_.packed()) require_packed(*model);
  }
  WeightSource& first = reference ? *reference : *model;
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(first);

  KlJob job;
  TextWindows windows;
  {
    const PhaseTimer timer(report, "tokenize");
    windows = texts_.load(first, tokenizer.get());
  }
  job.texts = std::move(windows.texts);
  job.protocols = windows.protocols;
  report["protocols"] = windows.protocols;

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  job.reference.source = reference.get();
  job.reference.ops = traced ? &*traced : ops.get();
  job.reference.ledger = &ledger;
  job.reference.dtype = device_.compute_dtype(*ops, first.linear_dtype());
  job.stored = stored ? &*stored : nullptr;
  job.model = job.reference;
  job.model.source = model.get();
  job.model.exec = texts_.exec();
  job.model.kernel = texts_.kernel();
  job.batch = texts_.batch();
  job.noise_floor = noise_floor_;
  job.save = save_;
  report.add_device(*ops);
  Json& numerics = report["numerics"];
  numerics["compute_dtype"] = dtype_name(job.reference.dtype);
  numerics["logits"] = "f32";
  numerics["loss"] = "f32 log-softmax, f64 sums";
  numerics["divergence"] =
      ops->kind() == DeviceKind::cpu ? "f64" : "f32 terms p (e^d - 1 - d), f64 sums";
  texts_.describe_exec(numerics);

  const KlResult result = kl_divergence(job, report);
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  if (!save_.empty()) {
    Json& saved = report["saved_reference"];
    saved["name"] = std::filesystem::path(save_).filename().string();
    saved["file_bytes"] = std::filesystem::file_size(save_);
  }
  if (result.noise) report["noise_floor"] = to_json(*result.noise);
  if (!result.texts.empty()) {
    Json rows = Json::array();
    for (std::size_t i = 0; i < result.texts.size(); ++i) {
      Json row;
      row["text"] = texts_.label(i);
      row["protocol"] = windows.protocols[i]["id"];
      row.update(to_json(result.texts[i]));
      rows.push_back(row);
    }
    if (rows.size() > 1) report["all_texts"] = to_json(result.all);
    report["results"] = rows;
  }
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_kl_command() { return std::make_unique<KlCommand>(); }

}  // namespace engine
