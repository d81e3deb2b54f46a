#include "eval/study_plan.h"

#include <algorithm>
#include <set>

#include "engine/core/report.h"
#include "engine/ops/ops.h"
#include "engine/quant/calibration.h"
#include "formats/sha256.h"

namespace engine {
namespace {

// The study's "#W" of a method that has no option for it.
constexpr double billm_bits = 1.1;

std::string number_text(double v) {
  char text[40];
  std::snprintf(text, sizeof text, "%.6g", v);
  return text;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& w : words) text += (text.empty() ? "" : " ") + w;
  return text;
}

bool has_option(const std::string& method, const char* option) {
  CLI::App app;
  make_method(method)->declare_options(app);
  return app.get_option_no_throw(option) != nullptr;
}

// The parts of a data file's name that say what of it is read.
struct DataFile {
  std::string path;    // empty: synthetic
  std::string tensor;  // of a safetensors file
};

DataFile data_file(const std::string& text) {
  if (text.starts_with("synthetic")) return {"", text};
  const std::size_t end = text.find(".safetensors:");
  if (end == std::string::npos) return {text, ""};
  const std::size_t colon = end + std::string_view(".safetensors").size();
  return {text.substr(0, colon), text.substr(colon + 1)};
}

class Planner {
 public:
  explicit Planner(const StudyConfig& config) : config_(config), device_(device_kind(config)) {}

  StudyPlan plan() {
    for (std::size_t m = 0; m < config_.models.size(); ++m) add_model(m);
    for (std::size_t g = 0; g < config_.grids.size(); ++g) {
      if (possible_.contains(g)) continue;
      const std::string reason =
          plan_.left_out.empty() ? "none" : "none: " + plan_.left_out.back().reason;
      throw FormatError(config_.file.string(), config_.grids[g].place,
                        "a combination that its methods accept", reason);
    }
    return std::move(plan_);
  }

 private:
  void add_model(std::size_t m) {
    const StudyModel& model = config_.models[m];
    plan_.sources.push_back(open_model(model.path));
    const WeightSource& source = *plan_.sources.back();
    Json description = source.describe();
    if (description["kind"] == "packed") {
      throw FormatError(config_.file.string(), "models[" + std::to_string(m) + "].path",
                        "a dense checkpoint", "a packed model");
    }
    // The same files under another name are the same model.
    if (description["kind"] == "checkpoint") description.erase("name");
    const std::string tokenizer = source.tokenizer_bytes();
    description["tokenizer_sha256"] = tokenizer.empty() ? "" : sha256_hex(tokenizer);
    if (!model.tokenizer.empty()) {
      std::error_code error;
      description["evaluation_tokenizer_sha256"] =
          std::filesystem::is_directory(model.tokenizer, error) ? hashes_.folder(model.tokenizer)
                                                                : hashes_.file(model.tokenizer);
    }
    model_identity_ = description;
    seen_.clear();

    GridCell full;
    full.model = m;
    full.label = "unquantized";
    add_evaluations(std::move(full));
    for (std::size_t g = 0; g < config_.grids.size(); ++g) {
      const StudyGrid& grid = config_.grids[g];
      const auto& names = grid.models;
      if (!names.empty() && std::find(names.begin(), names.end(), model.name) == names.end()) {
        continue;
      }
      for (const std::string& method : grid.methods) add_method(m, g, method);
    }
  }

  void add_method(std::size_t m, std::size_t g, const std::string& method) {
    const StudyGrid& grid = config_.grids[g];
    std::vector<std::string> extra = grid.options;
    if (const auto own = grid.method_options.find(method); own != grid.method_options.end()) {
      extra.insert(extra.end(), own->second.begin(), own->second.end());
    }
    check_words(grid, method, extra);
    // One combination without a word for what the method or the grid does not have.
    std::vector<std::vector<std::string>> by_bits = {{}}, by_group = {{}};
    if (!grid.bits.empty() && has_option(method, "--bits")) {
      by_bits.clear();
      for (const double b : grid.bits) by_bits.push_back({"--bits", number_text(b)});
    }
    if (!grid.groups.empty() && has_option(method, "--group")) {
      by_group.clear();
      for (const std::int64_t n : grid.groups) by_group.push_back({"--group", std::to_string(n)});
    }
    for (const auto& bits : by_bits) {
      for (const auto& group : by_group) {
        std::vector<std::string> words = bits;
        words.insert(words.end(), group.begin(), group.end());
        words.insert(words.end(), extra.begin(), extra.end());
        add_setting(m, g, method, std::move(words), extra);
      }
    }
  }

  // Words that are no options of the method are a mistake, whatever the bits.
  void check_words(const StudyGrid& grid, const std::string& method,
                   const std::vector<std::string>& words) const {
    CLI::App app;
    const std::unique_ptr<Method> made = make_method(method);
    made->declare_options(app);
    try {
      app.parse(std::vector<std::string>(words.rbegin(), words.rend()));
    } catch (const CLI::ParseError& e) {
      throw FormatError(config_.file.string(), grid.place + ".options",
                        "options of method " + method, "\"" + joined(words) + "\": " + e.what());
    } catch (const Error& e) {
      throw FormatError(config_.file.string(), grid.place + ".options",
                        "options of method " + method, e.what());
    }
  }

  void add_setting(std::size_t m, std::size_t g, const std::string& name,
                   std::vector<std::string> words, const std::vector<std::string>& extra) {
    std::unique_ptr<Method> method;
    try {
      method = configured_method(name, words, plan_.sources[m]->config());
    } catch (const CLI::ParseError& e) {
      leave_out(m, name, words, e.what());
      return;
    } catch (const Error& e) {
      if (e.code() != ErrorCode::usage) throw;
      leave_out(m, name, words, e.what());
      return;
    }
    possible_.insert(g);
    GridCell cell;
    cell.model = m;
    cell.method = name;
    cell.options = method->options();
    cell.weight_bits = name == "billm" ? billm_bits : given_bits(words, cell.options);
    for (const char* key : {"group", name == "billm" ? "block" : "group"}) {
      if (cell.options.contains(key)) cell.group = cell.options[key].get<std::int64_t>();
    }
    cell.label = name + " " + number_text(cell.weight_bits) + " bits" +
                 (cell.group > 0 ? " g" + std::to_string(cell.group) : "") +
                 (extra.empty() ? "" : " " + joined(extra));
    cell.words = std::move(words);

    StudyJob job;
    job.kind = JobKind::quantize;
    job.identity = start_identity(job.kind, model_identity_);
    job.identity["method"] = name;
    job.identity["options"] = cell.options;
    if (method->needs().data()) job.identity["calibration"] = calibration(m, name);
    job.work = sha256_hex(job.identity.dump());
    // The same quantization from two grids is one row.
    if (!seen_.insert(job.work).second) return;
    add_evaluations(std::move(cell), std::move(job));
  }

  static double given_bits(const std::vector<std::string>& words, const Json& options) {
    for (std::size_t i = 0; i + 1 < words.size(); ++i) {
      if (words[i] == "--bits") return std::stod(words[i + 1]);
    }
    return options.contains("bits") ? options["bits"].get<double>() : 0.0;
  }

  void leave_out(std::size_t m, const std::string& method, const std::vector<std::string>& words,
                 const std::string& reason) {
    plan_.left_out.push_back({config_.models[m].name, method + " " + joined(words), reason});
  }

  [[nodiscard]] Json start_identity(JobKind kind, const Json& model) const {
    Json j;
    j["job"] = job_kind_name(kind);
    j["engine"] = engine_version;
    j["device"] = device_;
    j["dtype"] = config_.dtype;
    j["model"] = model;
    return j;
  }

  Json data(const std::string& text) {
    const DataFile file = data_file(text);
    Json j;
    if (!file.path.empty()) j["sha256"] = hashes_.file(file.path);
    if (!file.tensor.empty()) j["tensor"] = file.tensor;
    return j;
  }

  Json calibration(std::size_t m, const std::string& method) {
    const StudyCalibration& c = config_.calibration;
    if (c.file.empty() && model_identity_["kind"] != "synthetic") {
      throw FormatError(config_.file.string(), "calibration.file",
                        "a file, because method " + method + " needs calibration data with " +
                            config_.models[m].name,
                        "nothing");
    }
    Json j = data(c.file.empty() ? "synthetic" : c.file);
    j["dataset"] = c.dataset;
    j["samples"] = c.samples;
    j["seq"] = c.seq;
    j["seed"] = c.seed;
    return j;
  }

  // The cell with its quantization, if any, and one job per group of evaluations.
  void add_evaluations(GridCell cell, std::optional<StudyJob> quantization = std::nullopt) {
    const std::size_t index = plan_.cells.size();
    const std::string who = config_.models[cell.model].name + ", " + cell.label + ": ";
    Json model = model_identity_;
    if (quantization) {
      model = Json::object();
      model["quantized"] = quantization->work;
      quantization->cell = index;
      quantization->title = who + "quantize";
      cell.jobs.push_back(plan_.jobs.size());
      plan_.jobs.push_back(std::move(*quantization));
    }
    std::set<std::size_t> done;
    for (std::size_t e = 0; e < config_.evaluations.size(); ++e) {
      const StudyEvaluation& first = config_.evaluations[e];
      if (done.contains(e)) continue;
      // The unquantized model has no divergence from itself.
      if (first.kind == EvaluationKind::kl && cell.method == "fp") continue;
      StudyJob job;
      job.cell = index;
      for (std::size_t other = e; other < config_.evaluations.size(); ++other) {
        if (other != e && !same_pass(first, config_.evaluations[other])) continue;
        job.evaluations.push_back(other);
        done.insert(other);
      }
      describe_evaluation(job, first, model);
      job.work = sha256_hex(job.identity.dump());
      job.title = who + title(job);
      cell.jobs.push_back(plan_.jobs.size());
      plan_.jobs.push_back(std::move(job));
    }
    plan_.cells.push_back(std::move(cell));
  }

  // Texts that go through the model together.
  static bool same_pass(const StudyEvaluation& a, const StudyEvaluation& b) {
    const bool text = a.kind == EvaluationKind::ppl || a.kind == EvaluationKind::kl;
    return text && a.kind == b.kind && a.seq == b.seq && a.limit == b.limit && a.bos == b.bos;
  }

  void describe_evaluation(StudyJob& job, const StudyEvaluation& e, const Json& model) {
    switch (e.kind) {
      case EvaluationKind::ppl:
      case EvaluationKind::kl: {
        job.kind = e.kind == EvaluationKind::ppl ? JobKind::ppl : JobKind::kl;
        job.identity = start_identity(job.kind, model);
        if (e.kind == EvaluationKind::kl) job.identity["reference"] = model_identity_;
        Json& texts = job.identity["texts"] = Json::array();
        for (const std::size_t i : job.evaluations) {
          Json text = data(config_.evaluations[i].text);
          text["dataset"] = config_.evaluations[i].dataset;
          texts.push_back(text);
        }
        job.identity["seq"] = e.seq;
        job.identity["bos"] = e.bos;
        job.identity["limit"] = e.limit;
        return;
      }
      case EvaluationKind::tasks:
        job.kind = JobKind::tasks;
        job.identity = start_identity(job.kind, model);
        job.identity["tasks"] = e.tasks;
        job.identity["data"] = hashes_.folder(e.data);
        job.identity["shots"] = e.shots ? Json(*e.shots) : Json();
        job.identity["limit"] = e.limit;
        job.identity["encoding"] = e.encoding;
        job.identity["mmlu_prompt"] = e.mmlu_prompt;
        job.identity["mmlu_letter"] = e.mmlu_letter;
        return;
      case EvaluationKind::latency:
        job.kind = JobKind::latency;
        job.identity = start_identity(job.kind, model);
        job.identity["prompt"] = e.prompt;
        job.identity["steps"] = e.steps;
        return;
    }
  }

  [[nodiscard]] std::string title(const StudyJob& job) const {
    std::string text = job_kind_name(job.kind);
    for (const std::size_t i : job.evaluations) {
      const StudyEvaluation& e = config_.evaluations[i];
      if (!e.name.empty()) text += " " + e.name;
      for (const std::string& task : e.tasks) text += " " + task;
    }
    return text;
  }

  const StudyConfig& config_;
  std::string device_;
  FileHashes hashes_;
  StudyPlan plan_;
  Json model_identity_;             // of the model whose jobs are being added
  std::set<std::string> seen_;      // its quantizations
  std::set<std::size_t> possible_;  // grids with at least one combination
};

}  // namespace

const char* job_kind_name(JobKind kind) {
  switch (kind) {
    case JobKind::quantize:
      return "quantize";
    case JobKind::ppl:
      return "ppl";
    case JobKind::tasks:
      return "tasks";
    case JobKind::kl:
      return "kl";
    case JobKind::latency:
      return "latency";
  }
  throw Error(ErrorCode::internal, "unknown job");
}

std::string device_kind(const StudyConfig& config) {
  if (config.device == "cpu") return "cpu";
  return config.device == "auto" && cuda_device_count() == 0 ? "cpu" : "cuda";
}

std::unique_ptr<Method> configured_method(const std::string& name,
                                          const std::vector<std::string>& words,
                                          const ModelConfig& model) {
  std::unique_ptr<Method> method = make_method(name);
  CLI::App app;
  method->declare_options(app);
  app.parse(std::vector<std::string>(words.rbegin(), words.rend()));  // CLI11 reads from the end
  method->check(model);
  return method;
}

StudyPlan plan_study(const StudyConfig& config) { return Planner(config).plan(); }

}  // namespace engine
