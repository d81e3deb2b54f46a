// What a run leaves behind: one document, as text for people and JSON for programs.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>

#include "engine/core/memory.h"
#include "formats/json.h"

namespace engine {

inline constexpr const char* engine_version = "0.1.0";

class Ops;

class Report {
 public:
  // `command` names the program and subcommand, "engine quantize".
  explicit Report(std::string command);

  // Free-form sections: report["model"] = ... Order of first use is the order of printing. A
  // reference is good until the next new section.
  Json& operator[](const std::string& section) { return document_[section]; }
  [[nodiscard]] const Json& document() const { return document_; }

  // Wall seconds of named phases, added up over calls.
  void add_time(const std::string& phase, double seconds);

  // The device's name, model, features and memory.
  void add_device(Ops& ops);
  // The planned peak of device memory: of the sum, and of each tag.
  void add_plan(std::int64_t device_bytes, const TagBytes& by_tag);
  // While the run's memory is still held: what the driver says is in use on the device, against the
  // ledger and the context (DeviceInfo::context_bytes). The rest is unaccounted.
  void add_driver_memory(Ops& ops, const Ledger& ledger);
  // Peaks per memory and tag.
  void add_ledger(const Ledger& ledger);

  [[nodiscard]] std::string to_text() const;
  // Written to a temporary name and renamed.
  void write_json(const std::filesystem::path& path) const;

 private:
  Json document_;
};

// Measures one phase: adds the wall time since construction to the report when stopped or
// destroyed.
class PhaseTimer {
 public:
  PhaseTimer(Report& report, std::string phase)
      : report_(report), phase_(std::move(phase)), start_(std::chrono::steady_clock::now()) {}
  ~PhaseTimer() {
    report_.add_time(
        phase_, std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
  }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  Report& report_;
  std::string phase_;
  std::chrono::steady_clock::time_point start_;
};

// A JSON document as indented "key: value" lines; arrays of flat objects become tables.
[[nodiscard]] std::string json_to_text(const Json& document);

}  // namespace engine
