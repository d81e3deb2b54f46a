// From the reports of a study's jobs to the rows of its tables.
#pragma once

#include <vector>

#include "eval/study_record.h"
#include "eval/study_run.h"

namespace engine {

// One row per model and setting, in the order of the plan. A report that does not hold what its
// command should have written counts as a failed job of the row. Throws IoError.
[[nodiscard]] std::vector<StudyRow> collect_rows(const StudyConfig& config, const StudyPlan& plan,
                                                 const std::vector<JobOutcome>& outcomes,
                                                 const StudyCache& cache);

// Everything a study found: its configuration, the protocols of its figures, its rows and what
// became of its jobs. The same for a study that ran at once and one that was continued, but for
// what is measured anew: times and, on a CPU, peaks of memory.
[[nodiscard]] Json study_results(const StudyConfig& config, const StudyPlan& plan,
                                 const std::vector<JobOutcome>& outcomes, const StudyCache& cache,
                                 const std::vector<StudyRow>& rows);

}  // namespace engine
