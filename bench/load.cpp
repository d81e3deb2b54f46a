// bench load: from a file to a model that is ready to run.
#include <chrono>
#include <fstream>
#include <iostream>

#include "bench/commands.h"
#include "bench/model_options.h"
#include "bench/timing.h"
#include "engine/core/interrupt.h"
#include "formats/packed.h"

namespace engine {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The files that hold a model's weights: none for a synthetic one.
std::vector<std::filesystem::path> weight_files(const std::string& model) {
  std::vector<std::filesystem::path> files;
  std::error_code error;
  if (std::filesystem::is_directory(model, error)) {
    for (const auto& entry : std::filesystem::directory_iterator(model, error)) {
      if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    }
  } else if (std::filesystem::is_regular_file(model, error)) {
    files.emplace_back(model);
  }
  return files;
}

// Reads every byte once, so that the system's page cache holds what it can. Returns the bytes.
std::int64_t read_once(const std::vector<std::filesystem::path>& files) {
  std::vector<char> buffer(std::size_t{8} << 20);
  std::int64_t bytes = 0;
  for (const std::filesystem::path& file : files) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw IoError(file.string(), "cannot open", errno);
    while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size())) || in.gcount() > 0) {
      bytes += in.gcount();
      check_interrupt();
    }
    if (in.bad()) throw IoError(file.string(), "cannot read", errno);
  }
  return bytes;
}

// Uncompressed bytes of all planes of a packed file.
std::int64_t plane_bytes(const std::string& model) {
  std::uint64_t sum = 0;
  for (const PlaneInfo& plane : PackedReader(model).planes()) sum += plane.raw_bytes;
  return static_cast<std::int64_t>(sum);
}

class LoadCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "load"; }
  [[nodiscard]] const char* summary() const override {
    return "Measure the time from a file to a model that is ready to run";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    model_.declare(app, true);
    app.add_option("--repeat", repeat_, "Loads of each kind")->capture_default_str();
  }

  void run() override {
    model_.check();
    check_range("--repeat", repeat_, 1, max_repeat);
    Report report("bench load");
    report["options"] = parsed_options(*app_);
    std::unique_ptr<WeightSource> source = model_.open();
    const bool packed_file = source->describe()["kind"] == "packed";
    report["model"] = source->describe();
    Ledger ledger;
    const std::unique_ptr<Ops> ops = model_.device.make(ledger);
    report.add_device(*ops);

    const std::vector<std::filesystem::path> files = weight_files(model_.model);
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t file_bytes = read_once(files);
    report["file_bytes"] = file_bytes;
    if (packed_file) report["plane_bytes"] = plane_bytes(model_.model);
    if (files.empty()) {
      report["page_cache"] = "no file: values are generated on the device";
    } else {
      report["page_cache"] = "read once before, in " + fixed(seconds_since(start), 3) +
                             " s: loads find in memory what the system keeps";
    }

    std::vector<Exec> kinds;
    if (model_.exec != "auto") {
      kinds = {model_.chosen_exec(*source)};
    } else if (packed_file || model_.bits > 0) {
      kinds = {Exec::packed, Exec::decoded};
    } else {
      kinds = {Exec::decoded};
    }
    Json rows = Json::array();
    std::vector<std::string> names;
    for (const Exec exec : kinds) names.emplace_back(exec_name(exec));
    const std::exception_ptr failure = measure_rows(report, rows, names, [&](std::size_t i) {
      return measure(kinds[i], *ops, ledger, file_bytes);
    });
    report["load"] = rows;
    report.add_ledger(ledger);
    require_finite(report.document(), "report");
    emit_report(report, model_.device.report);
    print(rows);
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // Each load opens the model anew, as a program that starts does.
  Json measure(Exec exec, Ops& ops, Ledger& ledger, std::int64_t file_bytes) const {
    std::vector<double> seconds;
    std::int64_t ready_bytes = 0;
    for (int r = 0; r < repeat_; ++r) {
      check_interrupt();
      const auto start = std::chrono::steady_clock::now();
      const std::unique_ptr<WeightSource> source = model_.open();
      Decoder decoder(*source, ops, ledger, model_.decoder(*source, ops, exec, 1, 1, 1));
      decoder.synchronize();
      seconds.push_back(seconds_since(start));
      ready_bytes = decoder.weight_bytes();
    }
    const Spread s = spread_of(seconds);
    Json row;
    row["exec"] = exec_name(exec);
    row["repeats"] = repeat_;
    add_spread(row, "s", s);
    row["weight_bytes"] = ready_bytes;
    row["weight_gb_per_s"] = static_cast<double>(ready_bytes) / s.median * 1e-9;
    if (file_bytes > 0) {
      row["file_gb_per_s"] = static_cast<double>(file_bytes) / s.median * 1e-9;
    }
    return row;
  }

  static void print(const Json& rows) {
    std::vector<std::vector<std::string>> cells = {
        {"exec", "s", "lowest", "highest", "weights", "weights GB/s", "file GB/s"}};
    for (const Json& row : rows) {
      cells.push_back(
          {row.at("exec").get<std::string>(), fixed(row.at("median_s").get<double>(), 3),
           fixed(row.at("low_s").get<double>(), 3), fixed(row.at("high_s").get<double>(), 3),
           human_bytes(row.at("weight_bytes").get<std::int64_t>()),
           fixed(row.at("weight_gb_per_s").get<double>(), 2),
           row.contains("file_gb_per_s") ? fixed(row.at("file_gb_per_s").get<double>(), 2)
                                         : std::string("-")});
    }
    std::cout << "\n" << markdown_table(cells);
  }

  CLI::App* app_ = nullptr;
  ModelOptions model_;
  int repeat_ = 3;
};

}  // namespace

std::unique_ptr<Command> make_load_command() { return std::make_unique<LoadCommand>(); }

}  // namespace engine
