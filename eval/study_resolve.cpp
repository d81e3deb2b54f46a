// The second half of planning: what is cached, what runs, and the commands that do it.
#include <algorithm>

#include "eval/study_plan.h"

namespace engine {
namespace {

// The cell's quantization, or null.
const StudyJob* quantization(const StudyPlan& plan, const GridCell& cell) {
  if (cell.jobs.empty()) return nullptr;
  const StudyJob& first = plan.jobs[cell.jobs.front()];
  return first.kind == JobKind::quantize ? &first : nullptr;
}

class Resolver {
 public:
  Resolver(StudyPlan& plan, const StudyCache& cache, const StudyPrograms& programs,
           bool other_builds)
      : plan_(plan), cache_(cache), programs_(programs), other_builds_(other_builds) {}

  void resolve(const GridCell& cell) {
    if (cell.jobs.empty()) return;
    StudyJob* const made = quantization(plan_, cell) ? &plan_.jobs[cell.jobs.front()] : nullptr;
    const std::string own = made == nullptr ? "" : job_key(made->work, programs_.engine_build, "");
    // Evaluations first: they say whether the quantized model itself is still needed.
    bool complete = true;
    for (const std::size_t i : cell.jobs) {
      StudyJob& job = plan_.jobs[i];
      if (&job == made) continue;
      take(job, job_key(job.work, build(job), own));
      complete = complete && job.cached;
    }
    if (made == nullptr) return;
    take(*made, own);
    if (complete || cache_.has_model(made->key)) return settle(cell, *made);
    // Another build's file does as well; else this build makes it anew.
    *made = fresh(std::move(*made), own);
    if (other_builds_) {
      for (const std::string& key : cache_.same_work(made->work)) {
        if (!cache_.has_model(key)) continue;
        accept(*made, key);
        break;
      }
    }
    settle(cell, *made);
  }

 private:
  [[nodiscard]] const std::string& build(const StudyJob& job) const {
    return job.kind == JobKind::latency ? programs_.bench_build : programs_.engine_build;
  }

  static StudyJob fresh(StudyJob job, const std::string& key) {
    job.key = key;
    job.cached = false;
    job.other_build.clear();
    return job;
  }

  void accept(StudyJob& job, const std::string& key) const {
    job.key = key;
    job.cached = true;
    const std::string& by = cache_.records().at(key).build;
    job.other_build = by == build(job) ? "" : by;
  }

  void take(StudyJob& job, const std::string& key) const {
    job = fresh(std::move(job), key);
    job.cached = cache_.has_report(key);
    if (job.cached || !other_builds_) return;
    const std::vector<std::string> keys = cache_.same_work(job.work);
    if (!keys.empty()) accept(job, keys.front());
  }

  // What is still to be computed is computed with the model that was chosen.
  void settle(const GridCell& cell, const StudyJob& made) const {
    for (const std::size_t i : cell.jobs) {
      StudyJob& job = plan_.jobs[i];
      if (!job.cached && job.kind != JobKind::quantize) {
        job.key = job_key(job.work, build(job), made.key);
      }
    }
    // Only with a file of the cache that is not `own` can the new keys be cached already.
    for (const std::size_t i : cell.jobs) {
      StudyJob& job = plan_.jobs[i];
      if (!job.cached) job.cached = cache_.has_report(job.key);
    }
  }

  StudyPlan& plan_;
  const StudyCache& cache_;
  const StudyPrograms& programs_;
  bool other_builds_;
};

void add(std::vector<std::string>& words, std::initializer_list<std::string> more) {
  words.insert(words.end(), more);
}

// An option that is left to the command's default when it is empty.
void add_given(std::vector<std::string>& words, const std::string& option,
               const std::string& value) {
  if (!value.empty()) add(words, {option, value});
}

void add_texts(std::vector<std::string>& words, const StudyConfig& config, const StudyJob& job) {
  for (const std::size_t i : job.evaluations) {
    const StudyEvaluation& e = config.evaluations[i];
    add(words, {"--text", e.text, "--dataset", e.dataset});
  }
  const StudyEvaluation& first = config.evaluations[job.evaluations.front()];
  add(words, {"--seq", std::to_string(first.seq), "--limit", std::to_string(first.limit), "--bos",
              first.bos});
}

}  // namespace

StudyPrograms study_programs(const StudyPlan& plan) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) throw IoError("/proc/self/exe", "cannot read the link", error.value());
  StudyPrograms programs;
  // The link itself still runs the same program when its file has been replaced.
  programs.engine = "/proc/self/exe";
  programs.engine_build = file_sha256(programs.engine);
  const bool bench = std::any_of(plan.jobs.begin(), plan.jobs.end(),
                                 [](const StudyJob& j) { return j.kind == JobKind::latency; });
  if (bench) {
    programs.bench = (self.parent_path() / "bench").string();
    programs.bench_build = file_sha256(programs.bench);
  }
  return programs;
}

void resolve(StudyPlan& plan, const StudyCache& cache, const StudyPrograms& programs,
             bool other_builds) {
  Resolver resolver(plan, cache, programs, other_builds);
  for (const GridCell& cell : plan.cells) resolver.resolve(cell);
}

bool must_run(const StudyPlan& plan, std::size_t index, const StudyCache& cache) {
  const StudyJob& job = plan.jobs[index];
  if (!job.cached) return true;
  if (job.kind != JobKind::quantize || cache.has_model(job.key)) return false;
  const GridCell& cell = plan.cells[job.cell];
  return std::any_of(cell.jobs.begin(), cell.jobs.end(),
                     [&](std::size_t i) { return !plan.jobs[i].cached; });
}

std::vector<std::string> job_command(const StudyConfig& config, const StudyPlan& plan,
                                     const StudyJob& job, const StudyCache& cache) {
  const GridCell& cell = plan.cells[job.cell];
  const StudyModel& original = config.models[cell.model];
  const StudyJob* made = quantization(plan, cell);
  const std::string model = made == nullptr || job.kind == JobKind::quantize
                                ? original.path
                                : cache.model_file(made->key).string();
  std::vector<std::string> words;
  switch (job.kind) {
    case JobKind::quantize:
      words = {"quantize", "--model", model, "--method", cell.method};
      words.insert(words.end(), cell.words.begin(), cell.words.end());
      add(words, {"--out", cache.model_file(job.key).string()});
      if (job.identity.contains("calibration")) {
        const StudyCalibration& c = config.calibration;
        add_given(words, "--calib", c.file);
        add(words, {"--calib-dataset", c.dataset, "--samples", std::to_string(c.samples), "--seq",
                    std::to_string(c.seq), "--seed", std::to_string(c.seed)});
      }
      break;
    case JobKind::ppl:
      words = {"ppl", "--model", model};
      add_texts(words, config, job);
      break;
    case JobKind::kl:
      words = {"kl", "--reference", original.path, "--model", model};
      add_texts(words, config, job);
      break;
    case JobKind::tasks: {
      const StudyEvaluation& e = config.evaluations[job.evaluations.front()];
      std::string names;
      for (const std::string& t : e.tasks) names += (names.empty() ? "" : ",") + t;
      words = {"eval",    "--model", model,
               "--tasks", names,     "--data",
               e.data,    "--limit", std::to_string(e.limit)};
      if (e.shots) add(words, {"--shots", std::to_string(*e.shots)});
      add_given(words, "--encoding", e.encoding);
      add_given(words, "--mmlu-prompt", e.mmlu_prompt);
      add_given(words, "--mmlu-letter", e.mmlu_letter);
      add_given(words, "--tokenizer", original.tokenizer);
      break;
    }
    case JobKind::latency: {
      const StudyEvaluation& e = config.evaluations[job.evaluations.front()];
      words = {"latency",
               "--model",
               model,
               "--batch",
               "1",
               "--prompt",
               std::to_string(e.prompt),
               "--steps",
               std::to_string(e.steps)};
      break;
    }
  }
  add(words, {"--device", config.device, "--dtype", config.dtype, "--threads",
              std::to_string(config.threads), "--report", cache.report_file(job.key).string()});
  return words;
}

}  // namespace engine
