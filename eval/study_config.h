// What a study runs, as its configuration file says it: docs/study.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "formats/json.h"

namespace engine {

struct StudyModel {
  std::string name;       // as the tables print it
  std::string path;       // directory or "synthetic:NAME"
  std::string shape;      // a name of paper_models() it is compared with; empty: by its sizes
  std::string tokenizer;  // file or folder that the tasks use instead of its own
};

struct StudyCalibration {
  std::string file;  // empty: "synthetic" for synthetic models, an error for others that need data
  std::string dataset = "plain";
  std::int64_t samples = 128;
  std::int64_t seq = 2048;
  std::int64_t seed = 0;
};

// One [[quantize]]: the product of its lists.
struct StudyGrid {
  std::vector<std::string> methods;
  std::vector<double> bits;          // empty: each method's default
  std::vector<std::int64_t> groups;  // empty: each method's default
  std::vector<std::string> models;   // names; empty: all
  std::vector<std::string> options;  // words for every method of this grid
  std::map<std::string, std::vector<std::string>> method_options;  // more words, by method
  std::string place;                                               // "quantize[0]", for messages
};

enum class EvaluationKind : std::uint8_t { ppl, tasks, kl, latency };
[[nodiscard]] const char* evaluation_name(EvaluationKind kind);

// One [[evaluate]].
struct StudyEvaluation {
  EvaluationKind kind = EvaluationKind::ppl;
  // ppl, kl
  std::string name;  // of the text, as the tables know it
  std::string text;  // file, FILE.safetensors[:TENSOR] or synthetic:COUNT
  std::string dataset = "plain";
  std::int64_t seq = 2048;
  std::string bos = "model";
  // ppl, kl: windows; tasks: questions. 0: all.
  std::int64_t limit = 0;
  // tasks
  std::vector<std::string> tasks;
  std::string data;  // folder
  std::optional<std::int64_t> shots;
  std::string encoding, mmlu_prompt, mmlu_letter;  // empty: the command's defaults
  // latency
  std::int64_t prompt = 128, steps = 128;
  std::string place;  // "evaluate[0]", for messages
};

struct StudyConfig {
  std::string name;
  std::filesystem::path out;
  std::string device = "auto", dtype = "auto";
  std::int64_t threads = 0;
  bool keep_models = false;
  std::vector<StudyModel> models;
  StudyCalibration calibration;
  std::vector<StudyGrid> grids;
  std::vector<StudyEvaluation> evaluations;
  std::vector<std::int64_t> tables = {1, 2, 3, 4, 5, 6};
  bool plots = true;
  bool paper = true;
  std::filesystem::path file;  // where it was read from
  Json document;               // what was read, for the results
};

// A file that ends in ".toml" is TOML, any other JSON. Relative paths in it are taken from its own
// folder. Throws FormatError naming file and key path for unknown or missing keys and values out of
// range, IoError for files that cannot be read. Files that it names are not looked at.
[[nodiscard]] StudyConfig read_study_config(const std::filesystem::path& file);

// The same from a document; `file` is what messages name and paths are relative to.
[[nodiscard]] StudyConfig study_config_from_json(const Json& document,
                                                 const std::filesystem::path& file);

// TOML as the JSON with the same keys and values. Throws FormatError naming line and column.
[[nodiscard]] Json toml_to_json(std::string_view text, const std::string& file);

}  // namespace engine
