// A subcommand of a program, and what all of them share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/core/report.h"
#include "engine/ops/ops.h"

namespace engine {

class Command {
 public:
  virtual ~Command() = default;
  [[nodiscard]] virtual const char* name() const = 0;
  [[nodiscard]] virtual const char* summary() const = 0;
  // `args` are the words after the subcommand, for options that depend on others (--method).
  virtual void declare(CLI::App& app, const std::vector<std::string>& args) = 0;
  virtual void run() = 0;
};

// Runs `program` with its commands: parses, runs one, prints one line per error. Returns the exit
// code: 0, 2 usage, 3 format, 4 io, 5 mismatch, 6 numeric, 7 out of memory, 8 device, 130
// interrupted, 1 anything else.
int run_program(const std::string& program, const std::string& about,
                std::vector<std::unique_ptr<Command>> commands, int argc, char** argv);

// Where and how to compute.
struct DeviceOptions {
  std::string device = "auto";  // auto: cuda:0 if there is one, else cpu; the report says which
  std::string dtype = "auto";   // auto: f32 on cpu, bf16 on cuda
  int threads = 0;
  bool trace = false;
  std::string report;

  void declare(CLI::App& app);        // --device --threads --trace --report
  void declare_dtype(CLI::App& app);  // --dtype, for commands that run the model
  // --threads; Error(usage) unless it is 0 to 4096.
  [[nodiscard]] int checked_threads() const;
  [[nodiscard]] std::unique_ptr<Ops> make(Ledger& ledger) const;
  // `stored` is the dtype of the model's weights: auto on a GPU is f16 for an f16 checkpoint, bf16
  // otherwise, so that no weight is rounded before it is used.
  [[nodiscard]] DType compute_dtype(const Ops& ops, DType stored) const;
};

// Throws now what writing `path` would throw at the end of a long run: Error(usage) naming `option`
// for a directory or an empty path, IoError if the file cannot be created. Leaves nothing behind.
void check_writable(const std::string& option, const std::string& path);

// --batch: 0 (chosen from the device) or more, else Error(usage).
void check_batch(std::int64_t batch);

// Every option of the app as parsed, for the report.
Json parsed_options(const CLI::App& app);

// Prints the report to stdout and writes it to `path` unless that is empty.
void emit_report(const Report& report, const std::string& path);

}  // namespace engine
