// engine ppl: perplexity of a checkpoint or a packed model on one or several texts.
#include <chrono>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/core/args.h"
#include "engine/ops/peak.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "eval/ppl.h"

namespace engine {
namespace {

// The short names stand for the variants that GPTQ's code evaluates by default.
Dataset dataset_option(const std::string& name) {
  if (name == "ptb") return Dataset::ptb_old;
  if (name == "c4") return Dataset::c4_old;
  return dataset_from_name(name);
}

class PplCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "ppl"; }
  [[nodiscard]] const char* summary() const override { return "Measure perplexity"; }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--model", model_, "Checkpoint directory, .qw file, or synthetic:NAME")
        ->required();
    app.add_option(
           "--text", texts_,
           "Text file, FILE.safetensors:TENSOR of token ids, or synthetic:COUNT; repeatable")
        ->required();
    app.add_option("--dataset", datasets_,
                   "How a text becomes one string: plain, wikitext2, ptb-old (= ptb), ptb-new, "
                   "c4-old (= c4), c4-new; once for all texts or once for each")
        ->default_str("plain");
    app.add_option("--seq", seq_, "Tokens per window")->capture_default_str();
    app.add_option("--limit", limit_, "At most so many windows per text; 0: all")
        ->capture_default_str();
    add_choice<BosPolicy>(app, "--bos", bos_,
                          {{"model", BosPolicy::model},
                           {"stream-start", BosPolicy::stream_start},
                           {"per-window", BosPolicy::per_window},
                           {"none", BosPolicy::none}},
                          "Where BOS stands; model: as the model's tokenizer says");
    app.add_option("--batch", batch_, "Windows at a time; 0: chosen from the device")
        ->capture_default_str();
    add_choice<Exec>(app, "--exec", exec_, {{"decoded", Exec::decoded}, {"packed", Exec::packed}},
                     "Hold packed linears decoded to dense matrices, or packed");
    add_choice<PackedKernel>(app, "--packed-kernel", kernel_,
                             {{"auto", PackedKernel::automatic},
                              {"vector", PackedKernel::vector},
                              {"matrix", PackedKernel::matrix},
                              {"expand", PackedKernel::expand}},
                             "How products with packed linears are computed (--exec packed)");
    app.add_flag("--peak", peak_,
                 "Also measure the device's matrix rate and report the share that was reached");
    device_.declare(app);
    device_.declare_dtype(app);
  }

  void run() override;

 private:
  CLI::App* app_ = nullptr;
  std::string model_;
  std::vector<std::string> texts_, datasets_;
  std::int64_t seq_ = 2048, limit_ = 0, batch_ = 0;
  BosPolicy bos_ = BosPolicy::model;
  Exec exec_ = Exec::decoded;
  PackedKernel kernel_ = PackedKernel::automatic;
  bool peak_ = false;
  DeviceOptions device_;
};

void PplCommand::run() {
  Report report("engine ppl");
  report["options"] = parsed_options(*app_);
  if (seq_ < 2 || seq_ > (1 << 20)) {
    throw Error(ErrorCode::usage, "--seq: expected 2 to 1048576, found " + std::to_string(seq_));
  }
  if (limit_ < 0) {
    throw Error(ErrorCode::usage, "--limit: expected 0 or more, found " + std::to_string(limit_));
  }
  check_batch(batch_);
  const bool packed = exec_ == Exec::packed;
  if (!packed && app_->get_option("--packed-kernel")->count() > 0) {
    throw Error(ErrorCode::usage,
                "--packed-kernel: expected with --exec packed, found --exec decoded");
  }
  if (datasets_.size() > 1 && datasets_.size() != texts_.size()) {
    throw Error(ErrorCode::usage, "--dataset: expected one, or one for each of the " +
                                      std::to_string(texts_.size()) + " texts, found " +
                                      std::to_string(datasets_.size()));
  }
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  report["model"] = source->describe();
  if (packed) require_packed(*source);
  const std::unique_ptr<Tokenizer> tokenizer = model_tokenizer(*source);

  PplJob job;
  std::vector<Json> protocols;
  std::int64_t windows = 0;
  {
    const PhaseTimer timer(report, "tokenize");
    for (std::size_t i = 0; i < texts_.size(); ++i) {
      const std::string dataset = datasets_.empty()       ? "plain"
                                  : datasets_.size() == 1 ? datasets_.front()
                                                          : datasets_[i];
      EvalWindows w = load_eval_windows({texts_[i], dataset_option(dataset)}, *source,
                                        tokenizer.get(), seq_, bos_, limit_);
      windows += w.tokens.windows;
      job.texts.push_back(std::move(w.tokens));
      protocols.push_back(std::move(w.protocol));
    }
  }

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  job.source = source.get();
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  job.ops = traced ? &*traced : ops.get();
  job.ledger = &ledger;
  job.dtype = device_.compute_dtype(*ops, source->linear_dtype());
  job.batch = batch_;
  job.exec = exec_;
  job.kernel = kernel_;
  report.add_device(*ops);
  Json& numerics = report["numerics"];
  numerics["compute_dtype"] = dtype_name(job.dtype);
  numerics["logits"] = "f32";
  numerics["loss"] = "f32 log-softmax, f64 sums";
  numerics["exec"] = packed ? "packed" : "decoded";
  if (packed) numerics["packed_kernel"] = app_->get_option("--packed-kernel")->as<std::string>();

  double peak = 0;
  if (peak_) peak = measured_matmul_flops(*ops, ledger, job.dtype);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<PplResult> results = perplexity(job, report);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  Json rows = Json::array();
  for (std::size_t i = 0; i < results.size(); ++i) {
    Json row;
    row["text"] = texts_[i].starts_with("synthetic:")
                      ? texts_[i]
                      : std::filesystem::path(texts_[i]).filename().string();
    row["protocol"] = protocols[i]["id"];
    row["perplexity"] = results[i].perplexity;
    row["nll_standard_error"] = results[i].standard_error;
    row["windows"] = job.texts[i].windows;
    row["tokens"] = protocols[i]["tokens"];
    rows.push_back(row);
  }
  report["protocols"] = protocols;
  Json& speed = report["speed"];
  speed["seconds"] = seconds;
  speed["tokens_per_s"] = static_cast<double>(windows * seq_) / seconds;
  speed["tflops"] = forward_flops(source->config(), windows, seq_) / seconds * 1e-12;
  if (peak_) {
    speed["measured_matmul_tflops"] = peak * 1e-12;
    speed["share_of_matmul_rate"] = forward_flops(source->config(), windows, seq_) / seconds / peak;
  }
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  report["results"] = rows;
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_ppl_command() { return std::make_unique<PplCommand>(); }

}  // namespace engine
