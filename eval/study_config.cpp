#include "eval/study_config.h"

#include <algorithm>
#include <set>

#include "engine/quant/method.h"
#include "eval/paper_rows.h"
#include "eval/tasks.h"
#include "formats/dataset.h"

namespace engine {
namespace {

constexpr std::int64_t any = std::int64_t{1} << 40;  // a bound on numbers that commands check

// Every key of a table is one of these, so that a misspelt one cannot be overlooked.
void allow(const JsonObject& table, std::initializer_list<const char*> keys) {
  std::string names;
  for (const char* key : keys) names += (names.empty() ? "" : ", ") + std::string(key);
  for (const auto& [key, value] : table.value().items()) {
    const auto same = [&k = key](const char* known) { return k == known; };
    if (std::none_of(keys.begin(), keys.end(), same)) {
      throw FormatError(table.file(), table.path_of(key), "one of " + names, "an unknown key");
    }
  }
}

[[noreturn]] void refuse(const JsonObject& table, const char* key, const std::string& expected,
                         const std::string& found) {
  throw FormatError(table.file(), table.path_of(key), expected, found);
}

std::string one_of(const JsonObject& table, const char* key, const std::string& fallback,
                   const std::vector<std::string>& names) {
  std::string value = table.text(key, fallback);
  std::string list;
  for (const std::string& name : names) {
    if (value == name) return value;
    list += (list.empty() ? "" : ", ") + name;
  }
  refuse(table, key, "one of " + list, quote_text(value));
}

// As one_of; empty if the key is not there, which leaves the choice to the command.
std::string one_of_or_none(const JsonObject& table, const char* key,
                           const std::vector<std::string>& names) {
  return table.has(key) ? one_of(table, key, "", names) : std::string();
}

const Json* list(const JsonObject& table, const char* key) {
  const Json* found = table.find(key);
  if (found != nullptr && !found->is_array()) table.fail(key, "a list");
  return found;
}

std::vector<std::string> texts(const JsonObject& table, const char* key) {
  std::vector<std::string> values;
  if (const Json* found = list(table, key)) {
    for (const Json& value : *found) {
      if (!value.is_string()) table.fail(key, "a list of texts");
      values.push_back(value.get<std::string>());
    }
  }
  return values;
}

std::vector<double> numbers(const JsonObject& table, const char* key, double low, double high) {
  std::vector<double> values;
  if (const Json* found = list(table, key)) {
    for (const Json& value : *found) {
      if (!value.is_number()) table.fail(key, "a list of numbers");
      values.push_back(value.get<double>());
      if (!(values.back() >= low && values.back() <= high)) {
        refuse(table, key, "numbers from " + Json(low).dump() + " to " + Json(high).dump(),
               value.dump());
      }
    }
  }
  return values;
}

std::vector<std::int64_t> integers(const JsonObject& table, const char* key, std::int64_t low,
                                   std::int64_t high) {
  std::vector<std::int64_t> values;
  if (const Json* found = list(table, key)) {
    for (const Json& value : *found) {
      if (!value.is_number_integer()) table.fail(key, "a list of whole numbers");
    }
    for (const double v :
         numbers(table, key, static_cast<double>(low), static_cast<double>(high))) {
      values.push_back(static_cast<std::int64_t>(v));
    }
  }
  return values;
}

// The tables of a list of tables, with their places: "models[0]".
template <class F>
void each_table(const JsonObject& root, const char* key, F&& read) {
  const Json* found = list(root, key);
  if (found == nullptr) return;
  for (std::size_t i = 0; i < found->size(); ++i) {
    const std::string place = std::string(key) + "[" + std::to_string(i) + "]";
    read(JsonObject((*found)[i], root.file(), place), place);
  }
}

class Reader {
 public:
  explicit Reader(const std::filesystem::path& file) : folder_(file.parent_path()) {}

  [[nodiscard]] std::string path(const std::string& text) const {
    if (text.empty() || text.starts_with("synthetic")) return text;
    return (folder_ / text).lexically_normal().string();
  }

  [[nodiscard]] StudyModel model(const JsonObject& t) const {
    allow(t, {"name", "path", "shape", "tokenizer"});
    StudyModel m{t.text("name"), path(t.text("path")), t.text("shape", ""),
                 path(t.text("tokenizer", ""))};
    if (m.name.empty() || m.name.size() > 100)
      refuse(t, "name", "1 to 100 bytes", quote_text(m.name));
    if (m.path.empty()) refuse(t, "path", "a directory or synthetic:NAME", "nothing");
    if (t.has("shape")) static_cast<void>(one_of(t, "shape", "", paper_models()));
    return m;
  }

  [[nodiscard]] StudyCalibration calibration(const JsonObject& t) const {
    allow(t, {"file", "dataset", "samples", "seq", "seed"});
    StudyCalibration c;
    c.file = path(t.text("file", ""));
    c.dataset = one_of(t, "dataset", c.dataset, datasets(false));
    c.samples = t.integer("samples", 1, 1 << 20, c.samples);
    c.seq = t.integer("seq", 2, 1 << 20, c.seq);
    c.seed = t.integer("seed", 0, any, c.seed);
    return c;
  }

  [[nodiscard]] StudyGrid grid(const JsonObject& t, const std::string& place) const {
    allow(t, {"methods", "bits", "groups", "models", "options"});
    StudyGrid g;
    g.place = place;
    g.methods = texts(t, "methods");
    if (g.methods.empty()) refuse(t, "methods", "at least one method", "none");
    for (const std::string& name : g.methods) check_method(t, "methods", name);
    g.bits = numbers(t, "bits", 1, 16);
    g.groups = integers(t, "groups", 0, 1 << 20);
    g.models = texts(t, "models");
    const Json* options = t.find("options");
    if (options != nullptr && options->is_object()) {
      const JsonObject by_method = t.object("options");
      for (const auto& [name, words] : options->items()) {
        if (name == "all") {
          g.options = texts(by_method, "all");
          continue;
        }
        check_method(by_method, name.c_str(), name);
        g.method_options[name] = texts(by_method, name.c_str());
      }
    } else {
      g.options = texts(t, "options");
    }
    return g;
  }

  [[nodiscard]] StudyEvaluation evaluation(const JsonObject& t, const std::string& place) const {
    StudyEvaluation e;
    e.place = place;
    const std::string kind = one_of(t, "kind", "", {"ppl", "tasks", "kl", "latency"});
    if (kind == "ppl" || kind == "kl") {
      e.kind = kind == "ppl" ? EvaluationKind::ppl : EvaluationKind::kl;
      allow(t, {"kind", "name", "text", "dataset", "seq", "limit", "bos"});
      e.text = path(t.text("text"));
      if (e.text.empty()) refuse(t, "text", "a file", "nothing");
      e.name = t.text("name");
      e.dataset = one_of(t, "dataset", e.dataset, datasets(true));
      e.seq = t.integer("seq", 2, 1 << 20, e.seq);
      e.bos = one_of(t, "bos", e.bos, {"model", "stream-start", "per-window", "none"});
      e.limit = t.integer("limit", 0, any, 0);
    } else if (kind == "tasks") {
      e.kind = EvaluationKind::tasks;
      allow(t,
            {"kind", "tasks", "data", "shots", "limit", "encoding", "mmlu_prompt", "mmlu_letter"});
      e.tasks = texts(t, "tasks");
      if (e.tasks.empty()) refuse(t, "tasks", "at least one task", "none");
      for (const std::string& task : e.tasks) check_task(t, task);
      e.data = path(t.text("data"));
      if (t.has("shots")) e.shots = t.integer("shots", 0, 1000);
      e.limit = t.integer("limit", 0, any, 0);
      e.encoding =
          one_of_or_none(t, "encoding",
                         {encoding_name(Encoding::separate), encoding_name(Encoding::joint),
                          encoding_name(Encoding::joint_bos)});
      e.mmlu_prompt = one_of_or_none(t, "mmlu_prompt", {"harness", "hendrycks"});
      e.mmlu_letter = one_of_or_none(t, "mmlu_letter", {"spaced", "bare"});
    } else {
      e.kind = EvaluationKind::latency;
      allow(t, {"kind", "prompt", "steps"});
      e.prompt = t.integer("prompt", 1, any, e.prompt);
      e.steps = t.integer("steps", 1, any, e.steps);
    }
    return e;
  }

 private:
  // engine ppl and engine kl know two short names besides.
  static std::vector<std::string> datasets(bool short_names) {
    std::vector<std::string> names;
    for (const Dataset d : {Dataset::plain, Dataset::wikitext2, Dataset::ptb_old, Dataset::ptb_new,
                            Dataset::c4_old, Dataset::c4_new}) {
      names.emplace_back(dataset_name(d));
    }
    if (short_names) names.insert(names.end(), {"ptb", "c4"});
    return names;
  }

  static void check_task(const JsonObject& t, const std::string& name) {
    std::string known;
    for (const std::string& task : task_names()) {
      if (task == name) return;
      known += (known.empty() ? "" : ", ") + task;
    }
    refuse(t, "tasks", "one of " + known, quote_text(name));
  }

  static void check_method(const JsonObject& t, const char* key, const std::string& name) {
    std::string known;
    for (const std::string& m : method_names()) {
      if (m == name) return;
      known += (known.empty() ? "" : ", ") + m;
    }
    refuse(t, key, "one of " + known, quote_text(name));
  }

  std::filesystem::path folder_;
};

// Names that name one thing each.
void check_names(const StudyConfig& c, const std::string& file) {
  std::set<std::string> models, texts;
  for (const StudyModel& m : c.models) {
    if (!models.insert(m.name).second) {
      throw FormatError(file, "models", "different names", quote_text(m.name) + " twice");
    }
  }
  for (const StudyGrid& g : c.grids) {
    for (const std::string& name : g.models) {
      if (!models.contains(name)) {
        throw FormatError(file, g.place + ".models", "names of [[models]]", quote_text(name));
      }
    }
  }
  for (const StudyEvaluation& e : c.evaluations) {
    if (e.name.empty()) continue;
    if (!texts.insert(evaluation_name(e.kind) + (" " + e.name)).second) {
      throw FormatError(file, e.place + ".name", "one text of each name",
                        quote_text(e.name) + " twice");
    }
  }
}

bool plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 100 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '.' || c == '_' || c == '-';
         });
}

}  // namespace

const char* evaluation_name(EvaluationKind kind) {
  switch (kind) {
    case EvaluationKind::ppl:
      return "ppl";
    case EvaluationKind::tasks:
      return "tasks";
    case EvaluationKind::kl:
      return "kl";
    case EvaluationKind::latency:
      return "latency";
  }
  throw Error(ErrorCode::internal, "unknown evaluation");
}

StudyConfig study_config_from_json(const Json& document, const std::filesystem::path& file) {
  const JsonObject root(document, file.string());
  allow(root, {"name", "out", "device", "dtype", "threads", "keep_models", "models", "calibration",
               "quantize", "evaluate", "report"});
  const Reader reader(file);
  StudyConfig c;
  c.file = file;
  c.document = document;
  c.name = root.text("name");
  if (!plain_name(c.name)) {
    refuse(root, "name", "letters, digits, '.', '_' or '-'", quote_text(c.name));
  }
  c.out = reader.path(root.text("out", "study-" + c.name));
  if (c.out.empty()) refuse(root, "out", "a folder", "nothing");
  c.device = root.text("device", c.device);
  if (c.device != "auto" && c.device != "cpu" && !c.device.starts_with("cuda:")) {
    refuse(root, "device", "cpu, cuda:N or auto", quote_text(c.device));
  }
  c.dtype = one_of(root, "dtype", c.dtype, {"auto", "f32", "bf16", "f16"});
  c.threads = root.integer("threads", 0, 4096, 0);
  c.keep_models = root.boolean("keep_models", false);
  each_table(root, "models",
             [&](const JsonObject& t, const std::string&) { c.models.push_back(reader.model(t)); });
  if (c.models.empty()) refuse(root, "models", "at least one [[models]]", "none");
  if (root.has("calibration")) c.calibration = reader.calibration(root.object("calibration"));
  each_table(root, "quantize", [&](const JsonObject& t, const std::string& place) {
    c.grids.push_back(reader.grid(t, place));
  });
  each_table(root, "evaluate", [&](const JsonObject& t, const std::string& place) {
    c.evaluations.push_back(reader.evaluation(t, place));
  });
  if (c.grids.empty() && c.evaluations.empty()) {
    refuse(root, "evaluate", "at least one [[quantize]] or [[evaluate]]", "none");
  }
  if (root.has("report")) {
    const JsonObject t = root.object("report");
    allow(t, {"tables", "plots", "paper"});
    if (t.has("tables")) c.tables = integers(t, "tables", 1, 6);
    c.plots = t.boolean("plots", c.plots);
    c.paper = t.boolean("paper", c.paper);
  }
  check_names(c, file.string());
  return c;
}

StudyConfig read_study_config(const std::filesystem::path& file) {
  if (file.extension() != ".toml") return study_config_from_json(read_json_file(file), file);
  return study_config_from_json(
      toml_to_json(read_text_file(file, std::size_t{4} << 20), file.string()), file);
}

}  // namespace engine
