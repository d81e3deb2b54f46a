#include "eval/study_run.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <iostream>
#include <thread>

#include "engine/core/interrupt.h"
#include "eval/study_estimate.h"

namespace engine {
namespace {

using Clock = std::chrono::steady_clock;

// Between fork and exec: only calls that are safe there.
[[noreturn]] void become(char* const* words, int log, pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(126);  // it died before that call
  const int input = ::open("/dev/null", O_RDONLY);
  if (input < 0 || ::dup2(input, STDIN_FILENO) < 0 || ::dup2(log, STDOUT_FILENO) < 0 ||
      ::dup2(log, STDERR_FILENO) < 0) {
    ::_exit(126);
  }
  ::close(input);
  ::close(log);
  ::execv(words[0], words);
  ::_exit(127);
}

// Waits for the child; a signal to this process is passed on once.
int wait_for(pid_t child) {
  bool interrupted = false;
  std::string how;
  for (auto pause = std::chrono::milliseconds(1);;) {
    int status = 0;
    const pid_t got = ::waitpid(child, &status, WNOHANG);
    if (got == child) {
      if (interrupted) throw Error(ErrorCode::interrupted, how);
      return status;
    }
    if (got < 0 && errno != EINTR) throw IoError("a job", "cannot wait for it", errno);
    if (!interrupted) {
      try {
        check_interrupt();
      } catch (const Error& e) {
        interrupted = true;
        how = e.what();
        ::kill(-child, SIGINT);
      }
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::milliseconds(50));
  }
}

std::string seconds_text(double s) {
  char text[40];
  std::snprintf(text, sizeof text, s < 100 ? "%.1f s" : "%.0f s", s);
  return text;
}

std::string figure(double v) {
  char text[40];
  std::snprintf(text, sizeof text, v != 0 && std::abs(v) < 0.01 ? "%.3g" : "%.4g", v);
  return text;
}

class Runner {
 public:
  Runner(const StudyConfig& config, const StudyPlan& plan, StudyCache& cache,
         const StudyPrograms& programs)
      : config_(config), plan_(plan), cache_(cache), programs_(programs) {}

  std::vector<JobOutcome> run() {
    outcomes_.resize(plan_.jobs.size());
    for (std::size_t i = 0; i < plan_.jobs.size(); ++i) total_ += must_run(plan_, i, cache_);
    std::cout << "study " << config_.name << ": " << plan_.jobs.size() << " jobs, "
              << plan_.jobs.size() - total_ << " cached, " << total_ << " to run" << std::endl;
    for (const GridCell& cell : plan_.cells) {
      std::string broken;  // why the cell has no model to evaluate
      for (const std::size_t i : cell.jobs) {
        if (!must_run(plan_, i, cache_)) {
          const auto record = cache_.records().find(plan_.jobs[i].key);
          outcomes_[i].resumed = record != cache_.records().end() && record->second.resumed;
          continue;
        }
        ++number_;
        run_job(i, broken);
        if (plan_.jobs[i].kind == JobKind::quantize) broken = outcomes_[i].error;
      }
      clear(cell);
    }
    return outcomes_;
  }

 private:
  void run_job(std::size_t i, const std::string& broken) {
    const StudyJob& job = plan_.jobs[i];
    JobOutcome& outcome = outcomes_[i];
    std::cout << "[" << number_ << " of " << total_ << "] " << job.title << std::flush;
    if (!broken.empty()) {
      outcome.status = JobStatus::skipped;
      outcome.error = "skipped: there is no quantized model";
      std::cout << ": " << outcome.error << std::endl;
      return;
    }
    try {
      check_interrupt();
      const double seconds = execute(job, outcome);
      std::cout << ": " << seconds_text(seconds) << ", "
                << (outcome.status == JobStatus::failed
                        ? "FAILED: " + outcome.error
                        : result_text(config_, job, cache_.report(job.key)))
                << std::endl;
    } catch (const Error& e) {
      std::cout << std::endl;
      if (e.code() != ErrorCode::interrupted) throw;
      throw Error(ErrorCode::interrupted, std::string(e.what()) + " during " + job.title +
                                              "; the same command continues the study");
    }
  }

  double execute(const StudyJob& job, JobOutcome& outcome) {
    JobRecord record;
    record.key = job.key;
    record.work = job.work;
    record.build = job.kind == JobKind::latency ? programs_.bench_build : programs_.engine_build;
    record.kind = job_kind_name(job.kind);
    record.method = plan_.cells[job.cell].method;
    record.device = device_kind(config_);
    record.identity = job.identity;
    record.command = job_command(config_, plan_, job, cache_);
    const std::filesystem::path report = cache_.report_file(job.key);
    std::error_code ignored;
    std::filesystem::remove(report, ignored);  // a failure must not leave an older one
    // A killed or interrupted quantization left its finished blocks, and maybe the time of others.
    const bool resume = job.kind == JobKind::quantize && cache_.has_partial_model(job.key);
    record.resumed = resume;
    cache_.store(record);

    ChildResult result = start(job, record.command, resume ? "--resume" : "", false);
    double seconds = result.seconds;
    const auto again = [&](const char* with) {
      result = start(job, record.command, with, true);
      seconds += result.seconds;
    };
    if (resume && result.exit_code >= 2 && result.exit_code <= 5) {
      // Remains that do not fit, for example of another processor.
      record.resumed = false;
      again("--restart");
    } else if (job.kind == JobKind::latency && result.exit_code == 2) {
      again("--exec=decoded");  // some scheme has no packed kernel
    }
    if (result.exit_code != 0) {
      outcome.status = JobStatus::failed;
      outcome.error = failure_line(result, cache_.log_file(job.key));
    } else if (!cache_.has_report(job.key)) {
      outcome.status = JobStatus::failed;
      outcome.error = "the job ended without a report";
    } else {
      outcome.status = JobStatus::done;
      outcome.resumed = record.resumed;
      record.seconds = seconds;
      const ModelConfig& model = plan_.sources[plan_.cells[job.cell].model]->config();
      record.flops = reported_flops(job.kind, cache_.report(job.key), model);
      cache_.store(record);
    }
    return seconds;
  }

  ChildResult start(const StudyJob& job, std::vector<std::string> words, const std::string& more,
                    bool append) const {
    if (!more.empty()) words.push_back(more);
    return run_child(job.kind == JobKind::latency ? programs_.bench : programs_.engine, words,
                     cache_.log_file(job.key), append);
  }

  void clear(const GridCell& cell) const {
    if (config_.keep_models) return;
    for (const std::size_t i : cell.jobs) {
      const StudyJob& job = plan_.jobs[i];
      // Finished blocks of a job that was killed stay.
      if (job.kind == JobKind::quantize && cache_.has_model(job.key)) cache_.remove_model(job.key);
    }
  }

  const StudyConfig& config_;
  const StudyPlan& plan_;
  StudyCache& cache_;
  const StudyPrograms& programs_;
  std::vector<JobOutcome> outcomes_;
  std::size_t total_ = 0, number_ = 0;
};

}  // namespace

ChildResult run_child(const std::string& program, const std::vector<std::string>& words,
                      const std::filesystem::path& log, bool append) {
  std::vector<std::string> all = {program};
  all.insert(all.end(), words.begin(), words.end());
  std::vector<char*> pointers;
  for (std::string& w : all) pointers.push_back(w.data());
  pointers.push_back(nullptr);
  const int fd =
      ::open(log.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (append ? O_APPEND : O_TRUNC), 0644);
  if (fd < 0) throw IoError(log.string(), "cannot open", errno);
  const auto begin = Clock::now();
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  if (child == 0) become(pointers.data(), fd, parent);
  const int code = errno;
  ::close(fd);
  if (child < 0) throw IoError(program, "cannot start", code);
  ::setpgid(child, child);  // whichever of the two comes first
  const int status = wait_for(child);
  ChildResult result;
  result.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
  return result;
}

std::string failure_line(const ChildResult& result, const std::filesystem::path& log) {
  std::ifstream in(log);
  std::string found;
  for (std::string line; std::getline(in, line);) {
    for (const char* prefix : {"engine: error: ", "bench: error: "}) {
      if (line.starts_with(prefix)) found = line.substr(std::string_view(prefix).size());
    }
  }
  if (!found.empty()) return found;
  if (result.signal == SIGKILL) return "killed (signal 9), perhaps because memory ran out";
  if (result.signal != 0) return "ended by signal " + std::to_string(result.signal);
  return "ended with exit code " + std::to_string(result.exit_code);
}

std::string result_text(const StudyConfig& config, const StudyJob& job, const Json& report) {
  std::string text;
  const auto put = [&](double value, const std::string& what) {
    text += (text.empty() ? "" : ", ") + figure(value) + " " + what;
  };
  try {
    if (job.kind == JobKind::quantize) {
      put(report.at("bits").at(0).at("bits_stored").get<double>(), "bits per weight");
    } else if (job.kind == JobKind::latency) {
      put(report.at("latency").at(0).at("token_per_s").get<double>(), "token/s");
    } else {
      const Json& rows = report.at("results");
      for (std::size_t i = 0; i < rows.size(); ++i) {
        if (job.kind == JobKind::tasks) {
          put(100 * rows[i].at("acc").get<double>(), "% " + rows[i].at("task").get<std::string>());
          continue;
        }
        const std::string& name = config.evaluations[job.evaluations.at(i)].name;
        put(job.kind == JobKind::ppl ? rows[i].at("perplexity").get<double>()
                                     : rows[i].at("kl").at("mean").get<double>(),
            name);
      }
    }
  } catch (const std::exception&) {
    return "done";  // the tables say what is wrong with the report
  }
  return text;
}

std::vector<JobOutcome> run_jobs(const StudyConfig& config, const StudyPlan& plan,
                                 StudyCache& cache, const StudyPrograms& programs) {
  return Runner(config, plan, cache, programs).run();
}

}  // namespace engine
