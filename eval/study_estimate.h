// What a study will take: time and memory of jobs that have not run.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "eval/study_plan.h"

namespace engine {

// Floating-point operations of the forward passes that a finished job's report tells of: the common
// measure of jobs of one kind. 0 if the report does not say.
[[nodiscard]] double reported_flops(JobKind kind, const Json& report, const ModelConfig& model);

struct JobEstimate {
  double flops = 0;           // as reported_flops() of the job would be
  double seconds = 0;         // of the whole command
  bool from_reports = false;  // of earlier jobs in the cache; else from the device's matrix rate
  std::int64_t device_bytes = 0;  // the job's peak
  bool planned = false;           // by the code itself; else by a formula
  std::int64_t file_bytes = 0;    // of the quantized model
};

// One per job; all zero for those that will not run. Measures the device's matrix rate if a job
// needs it, and reads the texts to count their tokens.
[[nodiscard]] std::vector<JobEstimate> estimate_jobs(const StudyConfig& config,
                                                     const StudyPlan& plan,
                                                     const StudyCache& cache);

// The plan as text: every job, what is left out, and totals.
[[nodiscard]] std::string plan_text(const StudyConfig& config, const StudyPlan& plan,
                                    const StudyCache& cache,
                                    const std::vector<JobEstimate>& estimates);

}  // namespace engine
