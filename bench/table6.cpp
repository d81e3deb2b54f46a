// bench table6: each method quantizes a model and the result decodes: memory, time and speed beside
// the figures of the study's Table 6.
#include <chrono>
#include <iostream>
#include <optional>
#include <set>

#include "bench/commands.h"
#include "bench/decode_run.h"
#include "bench/paper_table6.h"
#include "engine/core/interrupt.h"
#include "engine/model/scheme.h"
#include "engine/quant/calibration.h"
#include "engine/quant/driver.h"

namespace engine {
namespace {

constexpr const char* absent = "not available";

// A file that goes again, with what an interrupted run leaves beside it, unless it is kept.
class WorkFile {
 public:
  WorkFile(std::filesystem::path path, bool keep) : path_(std::move(path)), keep_(keep) {
    for (const std::filesystem::path& p : all()) {
      std::error_code error;
      if (std::filesystem::exists(p, error)) {
        throw Error(ErrorCode::usage, p.string() +
                                          ": already there; remove it, or choose another "
                                          "--workdir");
      }
    }
    check_writable("--workdir", path_.string());
  }
  ~WorkFile() {
    std::error_code ignored;
    for (const std::filesystem::path& p : all()) {
      if (!(keep_ && done_ && p == path_)) std::filesystem::remove(p, ignored);
    }
  }
  WorkFile(const WorkFile&) = delete;
  WorkFile& operator=(const WorkFile&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  void complete() { done_ = true; }

 private:
  [[nodiscard]] std::vector<std::filesystem::path> all() const {
    std::filesystem::path partial = path_, journal = path_;
    partial += ".partial";
    journal += ".journal";
    return {path_, partial, journal};
  }
  std::filesystem::path path_;
  bool keep_, done_ = false;
};

// Packed, or decoded if some linear's scheme has no packed kernel; the report says which.
Exec packed_exec(const WeightSource& source) {
  try {
    require_packed(source);
    return Exec::packed;
  } catch (const Error& e) {
    if (e.code() != ErrorCode::usage) throw;
    return Exec::decoded;
  }
}

class Table6Command final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "table6"; }
  [[nodiscard]] const char* summary() const override {
    return "Measure memory, time and speed of each method, beside the study's Table 6";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app_ = &app;
    std::string all;
    for (const std::string& m : method_names()) all += (all.empty() ? "" : ",") + m;
    methods_ = all;
    app.add_option("--model", model_, "Checkpoint directory, or synthetic:NAME")->required();
    app.add_option("--methods", methods_, "Methods to run, with commas")->capture_default_str();
    app.add_option("--bits", bits_, "Bits per weight, 1 to 8")->capture_default_str();
    app.add_option("--group", group_, "Columns per scale; 0: one scale per row")
        ->capture_default_str();
    app.add_option("--calib", calibration_.file,
                   "Calibration data as in engine quantize; synthetic models default to "
                   "\"synthetic\"");
    app.add_option("--calib-dataset", dataset_, "How a text file becomes one string")
        ->capture_default_str();
    app.add_option("--samples", calibration_.samples, "Calibration sequences")
        ->capture_default_str();
    app.add_option("--seq", calibration_.seq, "Tokens per calibration sequence")
        ->capture_default_str();
    app.add_option("--seed", calibration_.seed, "Seed of the sampling and of the prompts")
        ->capture_default_str();
    app.add_option("--prompt", run_.prompt, "Tokens of the prompt")->capture_default_str();
    app.add_option("--steps", run_.steps, "Decoding steps after it")->capture_default_str();
    app.add_option("--repeat", run_.repeat, "Repetitions of the decoding")->capture_default_str();
    app.add_option("--workdir", workdir_, "Where the packed files are written")
        ->capture_default_str();
    app.add_flag("--keep", keep_, "Keep the packed files");
    declare_bench_device(app, device_, true);
  }

  void run() override;

 private:
  // The method with this command's --bits and --group as far as it has such options, everything
  // else at its defaults.
  [[nodiscard]] std::unique_ptr<Method> configured(const std::string& name) const;
  // The calibration tokens, read once for all methods that need any.
  const Calibration& calibration(const WeightSource& source);
  [[nodiscard]] std::filesystem::path file_of(const std::string& method) const;
  Json measure(const std::string& name, WeightSource& source, WorkFile& file);
  Json decode(const std::filesystem::path& file);
  void print(const Json& rows) const;

  CLI::App* app_ = nullptr;
  std::string model_, methods_, dataset_ = "plain", workdir_ = ".";
  std::int64_t bits_ = 4, group_ = 128;
  CalibrationRequest calibration_;
  std::optional<Calibration> tokens_;
  DecodeRun run_;
  Ceilings ceilings_;
  bool keep_ = false;
  DeviceOptions device_;
};

std::unique_ptr<Method> Table6Command::configured(const std::string& name) const {
  std::unique_ptr<Method> method = make_method(name);
  CLI::App app;
  method->declare_options(app);
  std::vector<std::string> words;  // CLI11 takes a vector from its end
  const auto give = [&](const char* option, std::int64_t value) {
    if (app.get_option_no_throw(option) == nullptr) return;
    words.push_back(std::to_string(value));
    words.emplace_back(option);
  };
  give("--group", group_);
  give("--bits", bits_);
  app.parse(words);
  return method;
}

const Calibration& Table6Command::calibration(const WeightSource& source) {
  if (!tokens_) tokens_ = load_calibration(calibration_, source);
  return *tokens_;
}

Json Table6Command::decode(const std::filesystem::path& file) {
  const std::unique_ptr<WeightSource> source = open_packed(file, device_.threads);
  Ledger ledger;
  const std::unique_ptr<Ops> ops = device_.make(ledger);
  const std::string memory = ops->memory().name();
  const std::int64_t before = ledger.entry(memory).live_total;
  DecoderOptions options;
  options.dtype = device_.compute_dtype(*ops, source->linear_dtype());
  options.capacity = run_.prompt + run_.steps;
  options.exec = packed_exec(*source);
  options.max_steps = run_.steps + 1;
  Decoder decoder(*source, *ops, ledger, options);
  Json row = measure_decoding(decoder, *ops, run_, ceilings_);
  row["memory_bytes"] = before + decoder.planned_bytes();
  row["exec"] = exec_name(options.exec);
  return row;
}

std::filesystem::path Table6Command::file_of(const std::string& method) const {
  return std::filesystem::path(workdir_) /
         ("table6." + method + ".b" + std::to_string(bits_) + "g" + std::to_string(group_) + ".qw");
}

Json Table6Command::measure(const std::string& name, WeightSource& source, WorkFile& file) {
  check_interrupt();
  const std::unique_ptr<Method> method = configured(name);
  Json row;
  row["method"] = name;
  {
    Ledger ledger;
    const std::unique_ptr<Ops> ops = device_.make(ledger);
    QuantizeJob job;
    job.source = &source;
    job.method = method.get();
    job.ops = ops.get();
    job.ledger = &ledger;
    job.dtype = device_.compute_dtype(*ops, source.linear_dtype());
    job.out = file.path();
    job.threads = device_.threads;
    if (method->needs().data()) {
      const Calibration& c = calibration(source);
      job.calibration = c.tokens;
      job.calibration_protocol = c.protocol;
    }
    Report inner("engine quantize");  // what quantize() must write to; its file is the result here
    const auto start = std::chrono::steady_clock::now();
    try {
      quantize(job, inner);
    } catch (const Error& e) {
      // Its message offers to continue, but `file` goes now.
      if (e.code() != ErrorCode::interrupted) throw;
      throw Error(ErrorCode::interrupted,
                  "interrupted while quantizing with " + name + "; nothing is kept");
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    row["quantize_peak_bytes"] = ledger.entry(ops->memory().name()).peak_total;
    row["quantize_s"] = seconds;
    row["file_bytes"] = static_cast<std::int64_t>(std::filesystem::file_size(file.path()));
  }
  row["decode"] = decode(file.path());
  file.complete();
  const PaperRow* paper = find_paper_row(name, source.config(), bits_);
  Json& published = row["published"];
  if (paper == nullptr) {
    published = absent;
  } else {
    published["model"] = std::string(paper->model);
    published["bits"] = paper_bits;
    if (paper->token_per_s) {
      published["group"] = paper_group;
    } else {
      published["group"] = absent;
    }
    published["memory_gb"] = paper->memory_gb;
    published["minutes"] = paper->minutes;
    if (const std::optional<double> speed = published_speed(*paper, group_)) {
      published["token_per_s"] = *speed;
    } else {
      published["token_per_s"] = absent;
    }
  }
  return row;
}

void Table6Command::run() {
  check_range("--bits", bits_, 1, 8);
  check_range("--group", group_, 0, 1 << 20);
  check_range("--prompt", run_.prompt, 1, max_prompt);
  check_range("--steps", run_.steps, 1, max_steps);
  check_range("--repeat", run_.repeat, 1, max_repeat);
  check_range("--seed", calibration_.seed, 0, INT64_MAX);
  std::error_code error;
  if (!std::filesystem::is_directory(workdir_, error)) {
    throw Error(ErrorCode::usage, "--workdir: no directory " + workdir_);
  }
  const std::vector<std::string> methods = parse_names("--methods", methods_);
  std::set<std::string> distinct;
  for (const std::string& name : methods) {
    if (!distinct.insert(name).second) {
      throw Error(ErrorCode::usage,
                  "--methods: expected each method once, found " + name + " twice");
    }
  }
  Report report("bench table6");
  report["options"] = parsed_options(*app_);
  const std::unique_ptr<WeightSource> source = open_model(model_, device_.checked_threads());
  if (source->describe()["kind"] == "packed") {
    throw Error(ErrorCode::usage, model_ + ": expected a dense model, found a packed one");
  }
  report["model"] = source->describe();
  const std::int64_t positions = source->config().max_positions;
  if (positions > 0 && run_.prompt + run_.steps > positions) {
    throw Error(ErrorCode::usage, "--prompt and --steps take " +
                                      std::to_string(run_.prompt + run_.steps) +
                                      " positions, the model has " + std::to_string(positions));
  }
  run_.seed = calibration_.seed;
  // Everything that can be refused is refused before the first hour. The results decode packed.
  check_scheme({.bits = static_cast<int>(bits_), .group = group_}, source->config());
  bool needs_data = false;
  for (const std::string& name : methods) {
    const std::unique_ptr<Method> method = configured(name);
    method->check(source->config());
    needs_data = needs_data || method->needs().data();
  }
  std::vector<std::unique_ptr<WorkFile>> files;
  for (const std::string& name : methods) {
    files.push_back(std::make_unique<WorkFile>(file_of(name), keep_));
  }
  if (needs_data) {
    if (calibration_.file.empty()) {
      if (source->describe()["kind"] != "synthetic") {
        throw Error(ErrorCode::usage, "--calib: a method needs calibration data");
      }
      calibration_.file = "synthetic";
    }
    calibration_.dataset = dataset_from_name(dataset_);
    check_request(calibration_);
    report["calibration"] = calibration(*source).protocol;
  }
  {
    Ledger ledger;
    const std::unique_ptr<Ops> ops = device_.make(ledger);
    report.add_device(*ops);
    ceilings_ = measure_ceilings(*ops);
    report["ceilings"] = ceilings_.to_json();
    report["compute_dtype"] = dtype_name(device_.compute_dtype(*ops, source->linear_dtype()));
  }
  ClockNotes clocks(report, report["device"]["name"].get<std::string>());
  Json rows = Json::array();
  const std::exception_ptr failure = measure_rows(report, rows, methods, [&](std::size_t i) {
    const std::unique_ptr<WorkFile> file = std::move(files[i]);  // goes with its row
    return measure(methods[i], *source, *file);
  });
  clocks.finish();
  report["table6"] = rows;
  require_finite(report.document(), "report");
  print(rows);
  std::cout << json_to_text(report["clocks"]);
  if (failure) std::cout << json_to_text(report["incomplete"]);
  if (!device_.report.empty()) report.write_json(device_.report);
  if (failure) std::rethrow_exception(failure);
}

void Table6Command::print(const Json& rows) const {
  std::vector<std::vector<std::string>> cells = {{"method", "quantize GB", "minutes", "decode GB",
                                                  "exec", "token/s", "published GB",
                                                  "published minutes", "published token/s"}};
  for (const Json& row : rows) {
    const Json& decoded = row.at("decode");
    std::vector<std::string> line = {row.at("method").get<std::string>(),
                                     fixed(row.at("quantize_peak_bytes").get<double>() * 1e-9, 2),
                                     fixed(row.at("quantize_s").get<double>() / 60, 2),
                                     fixed(decoded.at("memory_bytes").get<double>() * 1e-9, 2),
                                     decoded.at("exec").get<std::string>(),
                                     fixed(decoded.at("token_per_s").get<double>(), 1)};
    const Json& published = row.at("published");
    for (const char* key : {"memory_gb", "minutes", "token_per_s"}) {
      const bool known = published.is_object() && published.at(key).is_number();
      line.emplace_back(known ? fixed(published.at(key).get<double>(), 1) : absent);
    }
    cells.push_back(line);
  }
  std::cout << markdown_table(cells)
            << "\nPublished: Table 6 of Huang et al., Visual Intelligence 2:36 (2024), 4 bits, on "
               "the authors' hardware.\n";
}

}  // namespace

std::unique_ptr<Command> make_table6_command() { return std::make_unique<Table6Command>(); }

}  // namespace engine
