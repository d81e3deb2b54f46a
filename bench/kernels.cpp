// bench kernels: every kernel of decoding at the shapes of published models, through Google
// Benchmark; times come from marks on the device.
#include <benchmark/benchmark.h>

#include <exception>
#include <iostream>
#include <regex>
#include <sstream>

#include "bench/commands.h"
#include "bench/common.h"
#include "bench/crossover.h"
#include "bench/kernel_cases.h"
#include "engine/core/interrupt.h"
#include "formats/atomic_file.h"

namespace engine {
namespace {

// A line for each case as it ends, and Google Benchmark's JSON of all.
class Lines final : public benchmark::BenchmarkReporter {
 public:
  Lines() { json_.SetOutputStream(&text_); }

  bool ReportContext(const Context& context) override { return json_.ReportContext(context); }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      // A run that stopped has none of our counters (its error flag has another name in each
      // version of the library) and nothing to report.
      if (run.counters.count("us") == 0) continue;
      json_.ReportRuns({run});
      const auto counter = [&](const char* name) {
        return static_cast<double>(run.counters.at(name));
      };
      std::cout << run.run_name.function_name << "  " << fixed(counter("us"), 2) << " us  "
                << fixed(counter("GB/s"), 1) << " GB/s  " << percent(counter("read_share"))
                << " of read  " << fixed(counter("TFLOP/s"), 2) << " TFLOP/s" << std::endl;
    }
  }
  void Finalize() override { json_.Finalize(); }
  [[nodiscard]] std::string json() const { return text_.str(); }

 private:
  std::ostringstream text_;
  benchmark::JSONReporter json_;
};

class KernelsCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "kernels"; }
  [[nodiscard]] const char* summary() const override {
    return "Measure the kernels of decoding at the shapes of published models";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    app.add_option("--shapes", shapes_, "Models whose shapes are measured, with commas")
        ->capture_default_str();
    app.add_option("--filter", filter_, "Only cases whose name this regular expression matches");
    auto* list = app.add_flag("--list", list_, "Print the names of the cases and stop");
    app.add_option("--repeat", repeat_, "Timings of every case")->capture_default_str();
    auto* crossover = app.add_flag("--crossover", crossover_,
                                   "Instead: where the vector, matrix and expand kernels of packed "
                                   "products overtake each other")
                          ->excludes(list);
    app.add_option("--max-rows", max_rows_, "With --crossover: the most rows of x")
        ->capture_default_str()
        ->needs(crossover);
    app.add_option("--json", json_, "Also write Google Benchmark's JSON to this file")
        ->excludes(crossover);
    declare_bench_device(app, device_, false);
  }

  void run() override;

 private:
  void run_cases(Ops& ops, Ledger& ledger, const std::vector<KernelCase>& cases, Report& report);
  Json run_case(benchmark::State& state, const KernelCase& one, const Ceilings& ceilings);

  CLI::App* app_ = nullptr;
  std::string shapes_ = "llama3-8b,llama3-70b", filter_, json_;
  int repeat_ = 5;
  bool list_ = false, crossover_ = false;
  std::int64_t max_rows_ = 2048;
  DeviceOptions device_;
  std::unique_ptr<Workbench> bench_;
};

void KernelsCommand::run() {
  check_range("--repeat", repeat_, 1, 1000);
  check_range("--max-rows", max_rows_, 1, 2048);
  std::regex filter;
  try {
    filter = std::regex(filter_);
  } catch (const std::regex_error&) {
    throw Error(ErrorCode::usage,
                "--filter: expected a regular expression, found \"" + filter_ + "\"");
  }
  const std::vector<std::string> models = parse_names("--shapes", shapes_);
  for (const std::string& model : models) static_cast<void>(synthetic_config(model));
  if (app_->count("--json") > 0) check_writable("--json", json_);

  Report report("bench kernels");
  report["options"] = parsed_options(*app_);
  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  report.add_device(*ops);
  ClockNotes clocks(report, ops->info().name);
  if (crossover_) {
    const Json rows = measure_crossover(*ops, ledger, models, filter, repeat_, max_rows_);
    report["crossover"] = rows;
    clocks.finish();
    require_finite(report.document(), "report");
    std::cout << crossover_tables(rows) << json_to_text(report["clocks"]);
    if (!device_.report.empty()) report.write_json(device_.report);
    return;
  }
  std::vector<KernelCase> cases;
  for (KernelCase& one : kernel_cases(models, *ops)) {
    if (std::regex_search(one.name, filter)) cases.push_back(std::move(one));
  }
  if (cases.empty()) {
    throw Error(ErrorCode::usage, "--filter: no case matches \"" + filter_ + "\"");
  }
  if (list_) {
    for (const KernelCase& one : cases) std::cout << one.name << "\n";
    return;
  }
  run_cases(*ops, ledger, cases, report);
  clocks.finish();
  require_finite(report.document(), "report");
  std::cout << json_to_text(report["clocks"]);
  if (!device_.report.empty()) report.write_json(device_.report);
}

void KernelsCommand::run_cases(Ops& ops, Ledger& ledger, const std::vector<KernelCase>& cases,
                               Report& report) {
  const Ceilings ceilings = measure_ceilings(ops, usual_dtype(ops));
  report["ceilings"] = ceilings.to_json();
  std::cout << json_to_text(ceilings.to_json());
  bench_ = std::make_unique<Workbench>(ops, ledger);
  Json rows = Json::array();
  std::exception_ptr failure;
  benchmark::ClearRegisteredBenchmarks();
  for (const KernelCase& one : cases) {
    benchmark::RegisterBenchmark(one.name.c_str(),
                                 [&](benchmark::State& state) {
                                   if (!failure) {
                                     try {
                                       rows.push_back(run_case(state, one, ceilings));
                                       return;
                                     } catch (...) {
                                       failure = std::current_exception();
                                     }
                                   }
                                   state.SkipWithError("stopped");
                                 })
        ->Iterations(repeat_)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
  Lines lines;
  benchmark::RunSpecifiedBenchmarks(&lines, ".");
  ops.synchronize();
  bench_.reset();
  benchmark::ClearRegisteredBenchmarks();
  if (failure) std::rethrow_exception(failure);
  report["kernels"] = rows;
  if (!json_.empty()) write_file_atomically(json_, std::string_view(lines.json()));
}

Json KernelsCommand::run_case(benchmark::State& state, const KernelCase& one,
                              const Ceilings& ceilings) {
  check_interrupt();
  bench_->ops().synchronize();
  bench_->clear();
  const Prepared p = one.prepare(*bench_);
  const std::vector<double> ms = time_launches(bench_->ops(), p.work, repeat_);
  std::size_t next = 0;
  for (auto _ : state) {
    static_cast<void>(_);
    state.SetIterationTime(ms[next++ % ms.size()] * 1e-3);
  }
  bench_->ops().synchronize();
  const Spread spread = spread_of(ms);
  const double s = spread.median * 1e-3;
  const double bytes_per_s = static_cast<double>(p.bytes) / s;
  const double flops = static_cast<double>(p.flops) / s;
  Json row;
  row["name"] = one.name;
  row["us"] = spread.median * 1e3;
  row["low_us"] = spread.low * 1e3;
  row["high_us"] = spread.high * 1e3;
  row["bytes"] = p.bytes;
  row["gb_per_s"] = bytes_per_s * 1e-9;
  row["read_share"] = bytes_per_s / ceilings.read_bytes_per_s;
  row["flops"] = p.flops;
  row["tflop_per_s"] = flops * 1e-12;
  row["matmul_share"] = flops / ceilings.matmul_flops;
  row["copies"] = p.work.copies;
  state.counters["us"] = spread.median * 1e3;
  state.counters["bytes"] = static_cast<double>(p.bytes);
  state.counters["GB/s"] = bytes_per_s * 1e-9;
  state.counters["read_share"] = bytes_per_s / ceilings.read_bytes_per_s;
  state.counters["flops"] = static_cast<double>(p.flops);
  state.counters["TFLOP/s"] = flops * 1e-12;
  state.counters["matmul_share"] = flops / ceilings.matmul_flops;
  return row;
}

}  // namespace

std::unique_ptr<Command> make_kernels_command() { return std::make_unique<KernelsCommand>(); }

}  // namespace engine
