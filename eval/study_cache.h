// What a study has already computed: one report per job, found again by what decides its content.
//
// OUT/cache/KEY.json is the report of a job as its command wrote it, KEY.job.json what the job was,
// KEY.qw a quantized model; OUT/logs/KEY.txt is what the job printed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "formats/json.h"

namespace engine {

// SHA-256 of the bytes. Throws IoError.
[[nodiscard]] std::string file_sha256(const std::filesystem::path& file);

// SHA-256 of files and folders, each read once.
class FileHashes {
 public:
  // Throws IoError.
  const std::string& file(const std::filesystem::path& path);
  // Of the names (relative to the folder) and contents of all regular files below it. Throws
  // Error(usage) for more than 20000 files: not a folder of task files.
  const std::string& folder(const std::filesystem::path& path);

 private:
  std::map<std::string, std::string> known_;
};

// What a job is, apart from its report.
struct JobRecord {
  std::string key;       // names its files
  std::string work;      // hash of what is computed, whatever the build
  std::string build;     // hash of the program that computed it
  std::string kind;      // quantize, ppl, tasks, kl, latency
  std::string method;    // of the model's quantization; "fp": none
  std::string device;    // "cpu" or "cuda"
  double flops = 0;      // of its forward passes; 0: not known
  double seconds = 0;    // of the whole command; 0: not finished
  bool resumed = false;  // continued an interrupted run, so `seconds` are not those of all
  Json identity;         // what `work` is the hash of
  std::vector<std::string> command;
};

// The key of a job: `parent` is the key of the quantization that made its model, or empty.
[[nodiscard]] std::string job_key(const std::string& work, const std::string& build,
                                  const std::string& parent);

class StudyCache {
 public:
  // Reads the records that are there. Creates nothing.
  explicit StudyCache(std::filesystem::path out);
  // Makes the folders. Throws IoError.
  void create() const;

  [[nodiscard]] const std::filesystem::path& out() const { return out_; }
  [[nodiscard]] std::filesystem::path report_file(const std::string& key) const;
  [[nodiscard]] std::filesystem::path model_file(const std::string& key) const;
  [[nodiscard]] std::filesystem::path log_file(const std::string& key) const;

  // Whether the job's report is there. One that cannot be parsed (a damaged disk) is not.
  [[nodiscard]] bool has_report(const std::string& key) const;
  [[nodiscard]] Json report(const std::string& key) const;
  [[nodiscard]] bool has_model(const std::string& key) const;
  // Whether an interrupted quantization left finished blocks.
  [[nodiscard]] bool has_partial_model(const std::string& key) const;
  void remove_model(const std::string& key) const;

  // Every job of the folder, by key.
  [[nodiscard]] const std::map<std::string, JobRecord>& records() const { return records_; }
  // Keys of finished jobs with the same work by any build.
  [[nodiscard]] std::vector<std::string> same_work(const std::string& work) const;
  void store(const JobRecord& record);

  // Quantized models that belong to none of `keys`, and their bytes: of earlier configurations.
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> other_models(
      const std::vector<std::string>& keys) const;

 private:
  std::filesystem::path out_;
  std::map<std::string, JobRecord> records_;
};

// Holds OUT/lock while it lives. The lock goes with the last process that inherited it, so a job
// that outlives a killed study keeps the next one out until it has ended, too. Throws Error(usage)
// if another study has it.
class StudyLock {
 public:
  explicit StudyLock(const std::filesystem::path& out);
  ~StudyLock();
  StudyLock(const StudyLock&) = delete;
  StudyLock& operator=(const StudyLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace engine
