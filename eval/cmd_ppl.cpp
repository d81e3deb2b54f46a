// engine ppl: perplexity of a checkpoint or a packed model on one or several texts.
#include <chrono>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/ops/peak.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "eval/text_options.h"

namespace engine {
namespace {

class PplCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "ppl"; }
  [[nodiscard]] const char* summary() const override { return "Measure perplexity"; }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--model", model_, "Checkpoint directory, .qw file, or synthetic:NAME")
        ->required();
    texts_.declare(app);
    app.add_flag("--peak", peak_,
                 "Also measure the device's matrix rate and report the share that was reached");
    device_.declare(app);
    device_.declare_dtype(app);
  }

  void run() override;

 private:
  CLI::App* app_ = nullptr;
  std::string model_;
  TextOptions texts_;
  bool peak_ = false;
  DeviceOptions device_;
};

void PplCommand::run() {
  Report report("engine ppl");
  report["options"] = parsed_options(*app_);
  texts_.check();
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  report["model"] = source->describe();
  if (texts_.packed()) require_packed(*source);
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(*source);

  PplJob job;
  TextWindows windows;
  {
    const PhaseTimer timer(report, "tokenize");
    windows = texts_.load(*source, tokenizer.get());
  }
  job.texts = std::move(windows.texts);

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  job.source = source.get();
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  job.ops = traced ? &*traced : ops.get();
  job.ledger = &ledger;
  job.dtype = device_.compute_dtype(*ops, source->linear_dtype());
  job.batch = texts_.batch();
  job.exec = texts_.exec();
  job.kernel = texts_.kernel();
  report.add_device(*ops);
  Json& numerics = report["numerics"];
  numerics["compute_dtype"] = dtype_name(job.dtype);
  numerics["logits"] = "f32";
  numerics["loss"] = "f32 log-softmax, f64 sums";
  texts_.describe_exec(numerics);

  double peak = 0;
  if (peak_) peak = measured_matmul_flops(*ops, ledger, job.dtype);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<PplResult> results = perplexity(job, report);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  Json rows = Json::array();
  for (std::size_t i = 0; i < results.size(); ++i) {
    Json row;
    row["text"] = texts_.label(i);
    row["protocol"] = windows.protocols[i]["id"];
    row["perplexity"] = results[i].perplexity;
    row["nll_standard_error"] = results[i].standard_error;
    row["windows"] = job.texts[i].windows;
    row["tokens"] = windows.protocols[i]["tokens"];
    rows.push_back(row);
  }
  report["protocols"] = windows.protocols;
  const double flops = forward_flops(source->config(), windows.windows, texts_.seq());
  Json& speed = report["speed"];
  speed["seconds"] = seconds;
  speed["tokens_per_s"] = static_cast<double>(windows.windows * texts_.seq()) / seconds;
  speed["tflops"] = flops / seconds * 1e-12;
  if (peak_) {
    speed["measured_matmul_tflops"] = peak * 1e-12;
    speed["share_of_matmul_rate"] = flops / seconds / peak;
  }
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  report["results"] = rows;
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_ppl_command() { return std::make_unique<PplCommand>(); }

}  // namespace engine
