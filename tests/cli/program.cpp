#include "tests/cli/program.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace engine::test {
namespace {

using namespace std::chrono_literals;

// Between fork and exec only calls that are safe there.
void redirect(const char* path, int to, int flags) {
  const int fd = ::open(path, flags, 0600);
  if (fd < 0 || ::dup2(fd, to) < 0) ::_exit(126);
  ::close(fd);
}

void limit(int resource, std::uint64_t bytes) {
  if (bytes == 0) return;
  rlimit value{};
  value.rlim_cur = value.rlim_max = static_cast<rlim_t>(bytes);
  // __rlimit_resource_t is an enum in C++, and an int elsewhere.
  if (::setrlimit(static_cast<__rlimit_resource>(resource), &value) != 0) ::_exit(126);
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "lowbit-cli-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot create " + name);
  path_ = name;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::map<std::string, std::uintmax_t> contents(const std::filesystem::path& directory) {
  std::map<std::string, std::uintmax_t> found;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
    found[entry.path().lexically_relative(directory).string()] =
        entry.is_regular_file() ? entry.file_size() : 0;
  }
  return found;
}

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  if (!out) throw std::runtime_error("cannot write " + path.string());
}

std::string command_text(const Arguments& arguments) {
  std::string text = "engine";
  for (const std::string& a : arguments) {
    text += a.find_first_of(" \n") == std::string::npos && !a.empty() ? " " + a : " '" + a + "'";
  }
  return text;
}

Program::Program(const Arguments& arguments, const RunLimits& limits)
    : limits_(limits), deadline_(std::chrono::steady_clock::now() + limits.timeout) {
  std::string name = (std::filesystem::temp_directory_path() / "lowbit-out-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot create " + name);
  streams_ = name;
  std::vector<std::string> words = {limits.program};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  const std::string out = streams_ / "out", err = streams_ / "err";
  pid_ = ::fork();
  if (pid_ < 0) throw std::runtime_error("cannot fork");
  if (pid_ == 0) {
    redirect("/dev/null", STDIN_FILENO, O_RDONLY);
    redirect(out.c_str(), STDOUT_FILENO, O_WRONLY | O_CREAT | O_TRUNC);
    redirect(err.c_str(), STDERR_FILENO, O_WRONLY | O_CREAT | O_TRUNC);
    limit(RLIMIT_CORE, 1);
    limit(RLIMIT_FSIZE, limits.file_bytes);
    limit(RLIMIT_AS, limits.memory_bytes);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
}

Program::~Program() {
  if (!ended_) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, &status_, 0);
  }
  std::error_code ignored;
  std::filesystem::remove_all(streams_, ignored);
}

bool Program::running() {
  if (ended_) return false;
  if (::waitpid(pid_, &status_, WNOHANG) == pid_) ended_ = true;
  return !ended_;
}

void Program::send(int signal) {
  if (running()) ::kill(pid_, signal);
}

bool Program::runs_until_exists(const std::filesystem::path& path) {
  while (running() && std::chrono::steady_clock::now() < deadline_) {
    if (std::filesystem::exists(path)) return running();
    std::this_thread::sleep_for(1ms);
  }
  return false;
}

Outcome Program::wait() {
  Outcome outcome;
  while (running()) {
    if (std::chrono::steady_clock::now() > deadline_) {
      outcome.timed_out = true;
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, &status_, 0);
      ended_ = true;
      break;
    }
    std::this_thread::sleep_for(2ms);
  }
  if (WIFEXITED(status_)) outcome.exit_code = WEXITSTATUS(status_);
  if (WIFSIGNALED(status_)) outcome.signal = WTERMSIG(status_);
  outcome.out = read_bytes(streams_ / "out");
  outcome.err = read_bytes(streams_ / "err");
  return outcome;
}

Outcome run_program(const Arguments& arguments, const RunLimits& limits) {
  Program program(arguments, limits);
  return program.wait();
}

}  // namespace engine::test
