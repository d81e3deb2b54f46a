// engine quantize: a checkpoint in, a packed low-bit model and a report out.
#include <algorithm>
#include <optional>

#include "engine/cmd/commands.h"
#include "engine/ops/trace_ops.h"
#include "engine/quant/calibration.h"
#include "engine/quant/driver.h"

namespace engine {
namespace {

class QuantizeCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "quantize"; }
  [[nodiscard]] const char* summary() const override {
    return "Quantize a checkpoint into a packed .qw file";
  }

  void declare(CLI::App& app, const std::vector<std::string>& args) override {
    app_ = &app;
    std::string methods;
    for (const std::string& m : method_names()) methods += (methods.empty() ? "" : ", ") + m;
    app.add_option("--model", model_, "Checkpoint directory, or synthetic:NAME")->required();
    app.add_option("--method", method_name_,
                   "One of: " + methods + ". --method NAME --help shows its options")
        ->required();
    app.add_option("--out", out_, "The packed file to write")->required();
    app.add_option(
        "--calib", calibration_.file,
        "Calibration data, for methods that use any: a text file, FILE.safetensors[:TENSOR] of "
        "token ids, or "
        "\"synthetic\" (the default for synthetic models)");
    app.add_option(
           "--calib-dataset", dataset_,
           "How a text file becomes one string: plain, wikitext2, ptb-old, ptb-new, c4-old, "
           "c4-new")
        ->capture_default_str();
    app.add_option("--samples", calibration_.samples, "Calibration sequences")
        ->capture_default_str();
    app.add_option("--seq", calibration_.seq, "Tokens per sequence")->capture_default_str();
    app.add_option("--seed", calibration_.seed, "Seed of the sampling")->capture_default_str();
    app.add_option("--batch", batch_, "Sequences at a time; 0: chosen from the device")
        ->capture_default_str();
    app.add_option("--blocks", blocks_,
                   "0:N quantizes the first N blocks only; the file is a model of N blocks");
    app.add_option("--zstd-level", zstd_level_, "Compression of the file, 1 to 19")
        ->capture_default_str();
    auto* resume =
        app.add_flag("--resume", resume_, "Continue an interrupted run of the same command");
    app.add_flag("--restart", restart_, "Discard what an interrupted run left and start over")
        ->excludes(resume);
    app.add_flag("--plan", plan_only_, "Print the memory plan and stop");
    device_.declare(app);
    device_.declare_dtype(app);
    // The method's own options exist once the method is known.
    for (std::size_t i = 0; i < args.size(); ++i) {
      if (args[i] == "--method" && i + 1 < args.size()) method_ = make_method(args[i + 1]);
      if (args[i].starts_with("--method=")) method_ = make_method(args[i].substr(9));
    }
    if (method_) {
      app.description(app.get_description() + "\nMethod " + method_->name() + ": " +
                      method_->summary());
      method_->declare_options(*app.add_option_group(std::string("Options of ") + method_->name()));
    }
  }

  void run() override;

 private:
  [[nodiscard]] std::int64_t block_limit(const ModelConfig& config) const;

  CLI::App* app_ = nullptr;
  std::string model_, method_name_, out_, blocks_, dataset_ = "plain";
  CalibrationRequest calibration_;
  std::int64_t batch_ = 0;
  int zstd_level_ = 1;
  bool resume_ = false;
  bool restart_ = false;
  bool plan_only_ = false;
  DeviceOptions device_;
  std::unique_ptr<Method> method_;
};

std::int64_t QuantizeCommand::block_limit(const ModelConfig& config) const {
  if (blocks_.empty()) return 0;
  std::int64_t n = 0;
  const bool digits =
      blocks_.size() > 2 && blocks_.size() < 8 && blocks_.starts_with("0:") &&
      std::all_of(blocks_.begin() + 2, blocks_.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (digits) n = std::stoll(blocks_.substr(2));
  if (n < 1 || n > config.layers) {
    throw Error(ErrorCode::usage, "--blocks: expected 0:N with N from 1 to " +
                                      std::to_string(config.layers) + ", found \"" + blocks_ +
                                      "\"");
  }
  return n;
}

void QuantizeCommand::run() {
  Report report("engine quantize");
  report["options"] = parsed_options(*app_);
  check_batch(batch_);
  if (zstd_level_ < 1 || zstd_level_ > 19) {
    throw Error(ErrorCode::usage,
                "--zstd-level: expected 1 to 19, found " + std::to_string(zstd_level_));
  }
  const std::filesystem::path out(out_);
  if (!plan_only_) check_writable("--out", out_);
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  if (source->describe()["kind"] == "packed") {
    throw Error(ErrorCode::usage,
                model_ + ": expected a dense checkpoint, found a packed model (decode it first)");
  }
  method_->check(source->config());
  // It is copied into the file at the end; a missing or damaged one is told now.
  static_cast<void>(model_tokenizer(*source));

  QuantizeJob job;
  job.source = source.get();
  job.method = method_.get();
  job.blocks = block_limit(source->config());
  job.batch = batch_;
  job.out = out;
  job.resume = resume_;
  job.restart = restart_;
  job.zstd_level = zstd_level_;
  job.threads = device_.threads;
  report["model"] = source->describe();
  report["method"] = method_->name();
  report["method_options"] = method_->options();

  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  std::optional<TraceOps> traced;
  if (device_.trace) traced.emplace(*ops, true);
  job.ops = traced ? &*traced : ops.get();
  job.ledger = &ledger;
  job.dtype = device_.compute_dtype(*ops, source->linear_dtype());
  report.add_device(*ops);
  report["compute_dtype"] = dtype_name(job.dtype);

  if (method_->needs().data()) {
    if (calibration_.file.empty()) {
      if (source->describe()["kind"] != "synthetic") {
        throw Error(ErrorCode::usage,
                    std::string("--calib: method ") + method_->name() + " needs calibration data");
      }
      calibration_.file = "synthetic";
    }
    calibration_.dataset = dataset_from_name(dataset_);
    check_request(calibration_);
    // The hidden stream dwarfs its tokens: a request that cannot fit ends here, before them.
    job.calibration.windows = calibration_.samples;
    job.calibration.seq = calibration_.seq;
    if (!plan_only_) {
      const Arena fits(ops->memory(), ledger, plan_quantize(job).device_bytes);
    }
    const PhaseTimer timer(report, "tokenize");
    Calibration calibration = load_calibration(calibration_, *source);
    job.calibration = std::move(calibration.tokens);
    job.calibration_protocol = std::move(calibration.protocol);
    report["calibration"] = job.calibration_protocol;
  }
  if (plan_only_) {
    const MemoryPlan plan = plan_quantize(job);
    report.add_plan(plan.device_bytes, plan.by_tag);
    emit_report(report, device_.report);
    return;
  }
  {
    const PhaseTimer timer(report, "total");
    quantize(job, report);
  }
  if (traced) report["ops"] = traced->to_json();
  report.add_ledger(ledger);
  report["file"] = out.filename().string();
  report["file_bytes"] = std::filesystem::file_size(out);
  emit_report(report, device_.report);
}

}  // namespace

std::unique_ptr<Command> make_quantize_command() { return std::make_unique<QuantizeCommand>(); }

}  // namespace engine
