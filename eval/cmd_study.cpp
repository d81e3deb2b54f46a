// engine study: a grid of models, quantizations and evaluations, cached and continued.
#include <algorithm>
#include <iostream>
#include <set>

#include "engine/cmd/commands.h"
#include "eval/study_estimate.h"
#include "eval/study_plots.h"
#include "eval/study_rows.h"
#include "eval/study_tables.h"
#include "formats/atomic_file.h"

namespace engine {
namespace {

// Reports of other builds, by build.
void list_other_builds(const StudyPlan& plan) {
  std::set<std::string> builds;
  std::size_t jobs = 0;
  for (const StudyJob& job : plan.jobs) {
    if (job.other_build.empty()) continue;
    builds.insert(job.other_build.substr(0, 12));
    ++jobs;
  }
  if (jobs == 0) return;
  std::cout << jobs << " reports are of other builds:";
  for (const std::string& b : builds) std::cout << " " << b;
  std::cout << " (results.json says which)\n";
}

void write_outputs(const StudyConfig& config, const std::vector<StudyRow>& rows) {
  std::vector<StudyTable> tables = study_tables(rows, {.paper = config.paper});
  // Tables beyond the paper's first six are there only if there is something for them.
  std::erase_if(tables, [&](const StudyTable& t) {
    return t.number >= 1 && t.number <= 6 &&
           std::find(config.tables.begin(), config.tables.end(), t.number) == config.tables.end();
  });
  const std::filesystem::path folder = config.out / "tables";
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw IoError(folder.string(), "cannot create the folder", error.value());
  write_study_tables(tables, folder);
  std::cout << "tables: " << folder.string() << "\n";
  if (config.plots) {
    static_cast<void>(write_study_plots(rows, config.out / "plots"));
    std::cout << "plots: " << (config.out / "plots").string() << "\n";
  }
}

class StudyCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "study"; }
  [[nodiscard]] const char* summary() const override {
    return "Run a grid of quantizations and evaluations and write its tables";
  }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app.add_option("--config", config_, "What to run: a .toml or .json file (docs/study.md)")
        ->required();
    app.add_flag("--dry-run", dry_run_,
                 "Print every job with its expected time and memory, and stop");
    app.add_flag("--accept-other-builds", other_builds_,
                 "Also take cached results that another build of this version computed");
  }

  void run() override;

 private:
  std::string config_;
  bool dry_run_ = false, other_builds_ = false;
};

void StudyCommand::run() {
  const StudyConfig config = read_study_config(config_);
  StudyPlan plan = plan_study(config);
  const StudyPrograms programs = study_programs(plan);
  std::optional<StudyLock> lock;
  if (!dry_run_) {
    StudyCache(config.out).create();
    lock.emplace(config.out);
  }
  StudyCache cache(config.out);
  resolve(plan, cache, programs, other_builds_);
  if (dry_run_) {
    std::cout << plan_text(config, plan, cache, estimate_jobs(config, plan, cache));
    list_other_builds(plan);
    return;
  }
  for (const LeftOut& l : plan.left_out) {
    std::cout << "left out: " << l.model << ", " << l.setting << ": " << l.reason << "\n";
  }
  list_other_builds(plan);
  const std::vector<JobOutcome> outcomes = run_jobs(config, plan, cache, programs);
  const std::vector<StudyRow> rows = collect_rows(config, plan, outcomes, cache);
  const std::filesystem::path results = config.out / "results.json";
  write_file_atomically(
      results, std::string_view(study_results(config, plan, outcomes, cache, rows).dump(1) + "\n"));
  std::cout << "results: " << results.string() << "\n";
  write_outputs(config, rows);

  std::vector<std::string> keys;
  for (const StudyJob& job : plan.jobs) keys.push_back(job.key);
  if (const auto [count, bytes] = cache.other_models(keys); count > 0) {
    std::cout << (config.out / "cache").string() << " also holds " << count
              << " quantized models of other configurations (" << human_bytes(bytes) << ")\n";
  }
  std::size_t failed = 0;
  for (std::size_t i = 0; i < outcomes.size(); ++i) {
    if (outcomes[i].error.empty()) continue;
    if (failed++ == 0) std::cout << "failed:\n";
    std::cout << "  " << plan.jobs[i].title << ": " << outcomes[i].error << " ("
              << cache.log_file(plan.jobs[i].key).string() << ")\n";
  }
  const auto incomplete = static_cast<std::size_t>(
      std::count_if(rows.begin(), rows.end(), [](const StudyRow& r) { return !r.failed.empty(); }));
  if (incomplete > 0) {
    throw Error(ErrorCode::internal,
                "study " + config.name + ": expected every job to succeed, found " +
                    std::to_string(failed) + " of " + std::to_string(outcomes.size()) +
                    " failed or skipped, in " + std::to_string(incomplete) + " of " +
                    std::to_string(rows.size()) + " rows");
  }
}

}  // namespace

std::unique_ptr<Command> make_study_command() { return std::make_unique<StudyCommand>(); }

}  // namespace engine
