#include "engine/cmd/command.h"

#include <cstdio>
#include <iostream>
#include <new>

#include "engine/core/interrupt.h"
#include "formats/atomic_file.h"

namespace engine {
namespace {

int exit_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::usage:
      return 2;
    case ErrorCode::format:
      return 3;
    case ErrorCode::io:
      return 4;
    case ErrorCode::mismatch:
      return 5;
    case ErrorCode::numeric:
      return 6;
    case ErrorCode::out_of_memory:
      return 7;
    case ErrorCode::device:
      return 8;
    case ErrorCode::interrupted:
      return 130;
    case ErrorCode::internal:
      return 1;
  }
  return 1;
}

// One line, whatever the message holds.
void print_error(const std::string& program, std::string message) {
  for (char& c : message) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  std::fflush(stdout);
  std::fprintf(stderr, "%s: error: %s\n", program.c_str(), message.c_str());
}

// A misspelt command, which CLI11 would report as an absent one.
void check_command(const std::vector<std::string>& args,
                   const std::vector<std::unique_ptr<Command>>& commands) {
  if (args.empty() || args.front().starts_with('-')) return;
  std::string names;
  for (const auto& command : commands) {
    if (args.front() == command->name()) return;
    names += (names.empty() ? "" : ", ") + std::string(command->name());
  }
  throw Error(ErrorCode::usage,
              "unknown subcommand " + quote_text(args.front()) + ": expected one of " + names);
}

}  // namespace

int run_program(const std::string& program, const std::string& about,
                std::vector<std::unique_ptr<Command>> commands, int argc, char** argv) {
  install_interrupt_handler();
  CLI::App app(about, program);
  app.set_version_flag("--version", program + " " + engine_version);
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  try {
    const std::vector<std::string> args(argv + 1, argv + argc);
    std::vector<std::pair<CLI::App*, Command*>> subcommands;
    for (const auto& command : commands) {
      CLI::App* sub = app.add_subcommand(command->name(), command->summary());
      // Options that depend on others are declared only for the command that runs.
      const bool chosen = !args.empty() && args.front() == command->name();
      command->declare(*sub, chosen ? std::vector<std::string>(args.begin() + 1, args.end())
                                    : std::vector<std::string>{});
      subcommands.emplace_back(sub, command.get());
    }
    check_command(args, commands);
    app.parse(argc, argv);
    for (const auto& [sub, command] : subcommands) {
      if (sub->parsed()) command->run();
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      throw IoError("standard output", "cannot write", errno);
    }
    return 0;
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    print_error(program, std::string(e.what()) + " (see " + program + " --help)");
    return exit_code(ErrorCode::usage);
  } catch (const Error& e) {
    print_error(program, e.what());
    return exit_code(e.code());
  } catch (const std::bad_alloc&) {
    print_error(program, "cpu: out of memory");
    return exit_code(ErrorCode::out_of_memory);
  } catch (const std::exception& e) {
    print_error(program, e.what());
    return 1;
  }
}

void DeviceOptions::declare(CLI::App& app) {
  app.add_option("--device", device, "cpu, cuda:N, or auto (cuda:0 if there is a GPU)")
      ->capture_default_str();
  app.add_option("--threads", threads, "CPU threads; 0: all")->capture_default_str();
  app.add_flag("--trace", trace, "Time every op on the device and add the table to the report");
  app.add_option("--report", report, "Also write the report as JSON to this file");
}

void DeviceOptions::declare_dtype(CLI::App& app) {
  app.add_option("--dtype", dtype,
                 "Compute dtype: f32, bf16, f16, or auto (f32 on the CPU; on a GPU f16 for f16 "
                 "checkpoints, bf16 for others)")
      ->capture_default_str();
}

int DeviceOptions::checked_threads() const {
  if (threads < 0 || threads > 4096) {
    throw Error(ErrorCode::usage,
                "--threads: expected 0 to 4096, found " + std::to_string(threads));
  }
  return threads;
}

std::unique_ptr<Ops> DeviceOptions::make(Ledger& ledger) const {
  static_cast<void>(checked_threads());
  if (!report.empty()) check_writable("--report", report);
  if (device == "auto")
    return make_ops(cuda_device_count() > 0 ? "cuda:0" : "cpu", ledger, threads);
  return make_ops(device, ledger, threads);
}

DType DeviceOptions::compute_dtype(const Ops& ops, DType stored) const {
  if (dtype == "auto") {
    if (ops.kind() == DeviceKind::cpu) return DType::f32;
    return stored == DType::f16 ? DType::f16 : DType::bf16;
  }
  for (const DType d : {DType::f32, DType::bf16, DType::f16}) {
    if (dtype == dtype_name(d)) return d;
  }
  throw Error(ErrorCode::usage,
              "--dtype: expected f32, bf16, f16 or auto, found \"" + dtype + "\"");
}

void check_writable(const std::string& option, const std::string& path) {
  std::error_code error;
  if (path.empty() || std::filesystem::is_directory(path, error)) {
    throw Error(ErrorCode::usage, path + (path.empty() ? "" : ": ") + option +
                                      ": expected the name of a file, found " +
                                      (path.empty() ? "nothing" : "a directory"));
  }
  const AtomicFile probe{std::filesystem::path(path)};
}

void check_batch(std::int64_t batch) {
  if (batch < 0) {
    throw Error(ErrorCode::usage, "--batch: expected 0 or more, found " + std::to_string(batch));
  }
}

Json parsed_options(const CLI::App& app) {
  Json j = Json::object();
  for (const CLI::Option* o : app.get_options()) {
    if (o->get_lnames().empty() || o->get_lnames().front() == "help") continue;
    const std::string& key = o->get_lnames().front();
    if (o->count() == 0) {
      j[key] = o->get_default_str().empty() && o->get_expected_max() == 0 ? "false"
                                                                          : o->get_default_str();
    } else if (o->get_expected_max() == 0) {
      j[key] = "true";
    } else {
      std::string text;
      for (const std::string& r : o->results()) text += (text.empty() ? "" : " ") + r;
      j[key] = text;
    }
  }
  return j;
}

void emit_report(const Report& report, const std::string& path) {
  std::cout << report.to_text();
  if (!path.empty()) report.write_json(path);
}

}  // namespace engine
