// bench latency: prompts and decoding steps of a whole model, by batch.
#include <iostream>

#include "bench/commands.h"
#include "bench/decode_run.h"

namespace engine {
namespace {

class LatencyCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "latency"; }
  [[nodiscard]] const char* summary() const override {
    return "Measure prompts and decoding steps of a model against the memory's bandwidth";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    model_.declare(app, true);
    app.add_option("--prompt", run_.prompt, "Tokens of each prompt")->capture_default_str();
    app.add_option("--steps", run_.steps, "Decoding steps after it")->capture_default_str();
    app.add_option("--batch", batches_, "Sequences at a time, with commas: each is measured")
        ->capture_default_str();
    app.add_option("--repeat", run_.repeat, "Repetitions of every measurement")
        ->capture_default_str();
    app.add_option("--seed", run_.seed, "Seed of the random prompts")->capture_default_str();
  }

  void run() override {
    model_.check();
    check_range("--prompt", run_.prompt, 1, max_prompt);
    check_range("--steps", run_.steps, 1, max_steps);
    check_range("--repeat", run_.repeat, 1, max_repeat);
    check_range("--seed", run_.seed, 0, INT64_MAX);
    const std::vector<std::int64_t> batches = parse_numbers("--batch", batches_, 1, max_batch);

    Report report("bench latency");
    report["options"] = parsed_options(*app_);
    const std::unique_ptr<WeightSource> source = model_.open();
    report["model"] = source->describe();
    Ledger ledger;
    const std::unique_ptr<Ops> ops = model_.device.make(ledger);
    report.add_device(*ops);
    ClockNotes clocks(report, ops->info().name);
    const Ceilings ceilings = measure_ceilings(*ops);
    report["ceilings"] = ceilings.to_json();
    const Exec exec = model_.chosen_exec(*source);
    report["exec"] = exec_name(exec);

    Json rows = Json::array();
    std::vector<std::string> names;
    for (const std::int64_t batch : batches) names.push_back("batch " + std::to_string(batch));
    const std::exception_ptr failure = measure_rows(report, rows, names, [&](std::size_t i) {
      const std::int64_t batch = batches[i];
      const DecoderOptions options =
          model_.decoder(*source, *ops, exec, batch, run_.prompt, run_.steps);
      report["compute_dtype"] = dtype_name(options.dtype);
      std::unique_ptr<Decoder> decoder;
      {
        const PhaseTimer timer(report, "load");
        decoder = std::make_unique<Decoder>(*source, *ops, ledger, options);
      }
      report["steps_replayed"] = decoder->records();
      const PhaseTimer timer(report, "measure");
      Json row = measure_decoding(*decoder, *ops, run_, ceilings);
      row["planned_bytes"] = decoder->planned_bytes();
      return row;
    });
    clocks.finish();
    report["latency"] = rows;
    report["reading"] =
        "token_ms: single steps between marks; step_ms and token_per_s: whole runs without marks "
        "in between, of which gb_per_s and the shares follow";
    report.add_ledger(ledger);
    require_finite(report.document(), "report");
    emit_report(report, model_.device.report);
    std::cout << "\n" << decoding_table(rows);
    if (failure) std::rethrow_exception(failure);
  }

 private:
  CLI::App* app_ = nullptr;
  ModelOptions model_;
  DecodeRun run_;
  std::string batches_ = "1,4,16";
};

}  // namespace

std::unique_ptr<Command> make_latency_command() { return std::make_unique<LatencyCommand>(); }

}  // namespace engine
