// bench memory: what a model takes when loaded, in a prompt and while decoding: planned, by the
// ledger and by the driver.
#include <iostream>

#include "bench/commands.h"
#include "bench/model_options.h"

namespace engine {
namespace {

class MemoryCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "memory"; }
  [[nodiscard]] const char* summary() const override {
    return "Compare planned memory with the ledger's and the driver's";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    model_.declare(app, true);
    app.add_option("--prompt", prompt_, "Tokens of each prompt")->capture_default_str();
    app.add_option("--steps", steps_, "Decoding steps after it")->capture_default_str();
    app.add_option("--batch", batch_, "Sequences at a time")->capture_default_str();
  }

  void run() override {
    model_.check();
    check_range("--prompt", prompt_, 1, max_prompt);
    check_range("--steps", steps_, 1, max_steps);
    check_range("--batch", batch_, 1, max_batch);
    Report report("bench memory");
    report["options"] = parsed_options(*app_);
    const std::unique_ptr<WeightSource> source = model_.open();
    report["model"] = source->describe();
    Ledger ledger;
    const std::unique_ptr<Ops> ops = model_.device.make(ledger);
    report.add_device(*ops);
    const Exec exec = model_.chosen_exec(*source);
    report["exec"] = exec_name(exec);

    const std::string memory = ops->memory().name();
    const Ledger::Entry before = ledger.entry(memory);
    stages_ = Json::array();
    note_stage("start", *ops, ledger);
    Decoder decoder(*source, *ops, ledger,
                    model_.decoder(*source, *ops, exec, batch_, prompt_, steps_));
    note_stage("loaded", *ops, ledger);
    const std::vector<std::int32_t> prompts = random_prompts(decoder.config(), batch_, prompt_, 0);
    const auto feed = [&] {
      decoder.prefill(prompts);
      decoder.sample();
      decoder.synchronize();
    };
    feed();
    note_stage("after the prompt", *ops, ledger);
    decoder.run_steps(steps_);
    if (steps_ == 1) {  // a device that records does so at the second step
      decoder.reset();
      feed();
      decoder.run_steps(1);
    }
    static_cast<void>(decoder.tokens(0, decoder.sampled()));
    note_stage("after the steps", *ops, ledger);
    report["stages"] = stages_;

    // The decoder's arena against its plan. What the backend held before, and host staging where it
    // is the same memory, are in the ledger but not in that plan.
    const Ledger::Entry after = ledger.entry(memory);
    Json tags = Json::array();
    const auto add = [&](const std::string& tag, std::int64_t planned, std::int64_t held) {
      Json row;
      row["tag"] = tag;
      row["planned_bytes"] = planned;
      row["ledger_bytes"] = held;
      row["difference"] = held - planned;
      tags.push_back(row);
    };
    for (std::size_t t = 0; t < mem_tag_count; ++t) {
      const std::int64_t planned = decoder.planned_tags()[t];
      const std::int64_t held = after.peak[t] - before.live[t];
      if (planned != 0 || held != 0) add(mem_tag_name(static_cast<MemTag>(t)), planned, held);
    }
    report["tags"] = tags;
    report["planned_bytes"] = decoder.planned_bytes();
    report["weight_bytes"] = decoder.weight_bytes();
    report["kv_bytes"] = decoder.kv_bytes();
    report["backend_bytes"] = before.live_total;
    report.add_driver_memory(*ops, ledger);
    report.add_ledger(ledger);
    require_finite(report.document(), "report");
    emit_report(report, model_.device.report);
    print(tags);
  }

 private:
  // A GPU's driver counts what is in use on the whole device, by other processes too: the figures
  // are this program's only on a GPU that nothing else uses.
  void note_stage(const char* name, Ops& ops, const Ledger& ledger) {
    const DeviceInfo info = ops.info();
    const Ledger::Entry entry = ledger.entry(ops.memory().name());
    Json row;
    row["stage"] = name;
    row["ledger_live_bytes"] = entry.live_total;
    row["ledger_reserved_bytes"] = entry.reserved;
    if (ops.kind() == DeviceKind::cuda) {
      const std::int64_t used = info.total_bytes - info.free_bytes;
      row["driver_used_bytes"] = used;
      row["context_bytes"] = info.context_bytes;
      row["unaccounted_bytes"] = used - info.context_bytes - entry.reserved;
    }
    stages_.push_back(row);
  }

  void print(const Json& tags) const {
    std::vector<std::vector<std::string>> cells = {{"tag", "planned", "ledger", "difference"}};
    for (const Json& row : tags) {
      cells.push_back({row.at("tag").get<std::string>(),
                       human_bytes(row.at("planned_bytes").get<std::int64_t>()),
                       human_bytes(row.at("ledger_bytes").get<std::int64_t>()),
                       std::to_string(row.at("difference").get<std::int64_t>())});
    }
    std::cout << "\n" << markdown_table(cells);
  }

  CLI::App* app_ = nullptr;
  ModelOptions model_;
  std::int64_t prompt_ = 128, steps_ = 128, batch_ = 1;
  Json stages_;
};

}  // namespace

std::unique_ptr<Command> make_memory_command() { return std::make_unique<MemoryCommand>(); }

}  // namespace engine
