// Running a built program as a user does: arguments in, exit code and both streams out.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace engine::test {

using Arguments = std::vector<std::string>;

struct RunLimits {
  std::chrono::seconds timeout{60};      // then SIGKILL, and Outcome::timed_out
  std::uint64_t file_bytes = 0;          // RLIMIT_FSIZE: what a full disk is to a writer; 0: none
  std::uint64_t memory_bytes = 0;        // RLIMIT_AS; 0: none
  std::string program = LOWBIT_PROGRAM;  // or LOWBIT_BENCH
};

struct Outcome {
  int exit_code = -1;  // -1 if a signal ended the program
  int signal = 0;
  bool timed_out = false;
  std::string out;
  std::string err;
};

// A started program. Its streams go to files, so a full pipe can never hold it up.
class Program {
 public:
  explicit Program(const Arguments& arguments, const RunLimits& limits = {});
  ~Program();  // kills and reaps the program if wait() was not called
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  [[nodiscard]] bool running();
  void send(int signal);
  Outcome wait();

  // Polls until `path` exists. False if the program ended, or its time, before that.
  bool runs_until_exists(const std::filesystem::path& path);

 private:
  RunLimits limits_;
  std::chrono::steady_clock::time_point deadline_;
  std::filesystem::path streams_;  // a directory of its own
  pid_t pid_ = -1;
  bool ended_ = false;
  int status_ = 0;
};

Outcome run_program(const Arguments& arguments, const RunLimits& limits = {});

// As a user would type it, for failure messages.
std::string command_text(const Arguments& arguments);

// A new directory under the system's temporary one, removed with everything in it at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Every file and directory below `directory` with its size: what a failed run must not change.
std::map<std::string, std::uintmax_t> contents(const std::filesystem::path& directory);

std::string read_bytes(const std::filesystem::path& path);
void write_bytes(const std::filesystem::path& path, const std::string& bytes);

}  // namespace engine::test
