// Running the jobs of a study, each as a process of its own.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "eval/study_plan.h"

namespace engine {

struct ChildResult {
  int exit_code = -1;  // -1: ended by a signal
  int signal = 0;
  double seconds = 0;
};

// Runs a program with both output streams in `log` (from its start, or at its end with `append`)
// and no input, in a process group of its own, so that Ctrl-C reaches this process alone. It dies
// with this process. On Ctrl-C the child gets SIGINT, may finish what it is writing, and
// Error(interrupted) is thrown once it has ended. Throws IoError if it cannot be started.
ChildResult run_child(const std::string& program, const std::vector<std::string>& words,
                      const std::filesystem::path& log, bool append = false);

// The line with which the program ended according to its log, or what the result says.
[[nodiscard]] std::string failure_line(const ChildResult& result, const std::filesystem::path& log);

enum class JobStatus : std::uint8_t { cached, done, failed, skipped };

struct JobOutcome {
  JobStatus status = JobStatus::cached;
  std::string error;     // failed, skipped
  bool resumed = false;  // of a quantization: its time is not that of all blocks
};

// Runs what is not cached, in order, one line on standard output for each; one outcome per job.
// Quantized models go as soon as no job needs them, unless the configuration keeps them. A failed
// job does not end the study. Throws Error(interrupted) on Ctrl-C, IoError for the study's own
// files.
[[nodiscard]] std::vector<JobOutcome> run_jobs(const StudyConfig& config, const StudyPlan& plan,
                                               StudyCache& cache, const StudyPrograms& programs);

// One line for people: "6.137 wikitext2, 9.204 c4".
[[nodiscard]] std::string result_text(const StudyConfig& config, const StudyJob& job,
                                      const Json& report);

}  // namespace engine
