// From a configuration to jobs: which models, quantized how, evaluated with what, and which of it
// has already been computed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/model/source.h"
#include "engine/quant/method.h"
#include "eval/study_cache.h"
#include "eval/study_config.h"

namespace engine {

enum class JobKind : std::uint8_t { quantize, ppl, tasks, kl, latency };
[[nodiscard]] const char* job_kind_name(JobKind kind);

// One model, quantized in one way or not at all: a row of the tables.
struct GridCell {
  std::size_t model = 0;           // index into StudyConfig::models
  std::string method = "fp";       // "fp": not quantized
  std::vector<std::string> words;  // --bits 3 --group 128 and what the configuration adds
  Json options = Json::object();   // of the method, as parsed
  double weight_bits = 16;         // as the study's "#W"
  std::int64_t group = 0;          // as "#G"; 0: none
  std::string label;               // "gptq 3 bits g128"
  std::vector<std::size_t> jobs;   // in the order they run, the quantization first
};

struct StudyJob {
  JobKind kind = JobKind::ppl;
  std::size_t cell = 0;
  std::vector<std::size_t> evaluations;  // of StudyConfig that it answers, in order
  std::string title;                     // "LLaMA3-8B, gptq 3 bits g128: quantize"
  Json identity;                         // what decides its result, without the build
  std::string work;                      // SHA-256 of it

  // Set by resolve().
  std::string key;
  bool cached = false;
  std::string other_build;  // of the report that is taken over; empty: made by this one
};

struct LeftOut {
  std::string model, setting, reason;
};

struct StudyPlan {
  std::vector<std::unique_ptr<WeightSource>> sources;  // one per model
  std::vector<GridCell> cells;                         // by model, the unquantized one first
  std::vector<StudyJob> jobs;                          // in the order they run
  std::vector<LeftOut> left_out;                       // combinations that a method refuses
};

// "cpu" or "cuda", as the configuration's device comes out on this machine.
[[nodiscard]] std::string device_kind(const StudyConfig& config);

// A method with these words as its options, checked with the model. Throws Error(usage), or
// CLI::ParseError for words that are not options of it.
[[nodiscard]] std::unique_ptr<Method> configured_method(const std::string& name,
                                                        const std::vector<std::string>& words,
                                                        const ModelConfig& model);

// Opens the models and hashes all files that jobs read. Throws Error(usage) or FormatError naming
// the place in the configuration for options a method does not have, a grid of which nothing is
// possible and data that a method needs and nobody gave; IoError for files that are not there.
[[nodiscard]] StudyPlan plan_study(const StudyConfig& config);

// The programs that jobs run, and the hashes of their files.
struct StudyPrograms {
  std::string engine, bench;              // paths
  std::string engine_build, bench_build;  // SHA-256; of bench "" if nothing needs it
};
// This program, and `bench` beside it if a job needs it. Throws IoError if it is not there.
[[nodiscard]] StudyPrograms study_programs(const StudyPlan& plan);

// Finds the jobs' keys and what is in the cache. With `other_builds`, reports of other builds of
// this engine version count, too.
void resolve(StudyPlan& plan, const StudyCache& cache, const StudyPrograms& programs,
             bool other_builds);

// Whether the job has to run: nothing cached, or a quantized model that a job still needs is gone.
[[nodiscard]] bool must_run(const StudyPlan& plan, std::size_t job, const StudyCache& cache);

// The words after the program's name; reads and writes files of the cache.
[[nodiscard]] std::vector<std::string> job_command(const StudyConfig& config, const StudyPlan& plan,
                                                   const StudyJob& job, const StudyCache& cache);

}  // namespace engine
