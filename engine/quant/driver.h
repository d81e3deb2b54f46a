// The calibration driver: one loop that runs every method, block by block, into a packed file.
#pragma once

#include <filesystem>
#include <string>

#include "engine/core/report.h"
#include "engine/model/stream.h"
#include "engine/quant/method.h"

namespace engine {

struct QuantizeJob {
  WeightSource* source = nullptr;
  Method* method = nullptr;
  Ops* ops = nullptr;
  Ledger* ledger = nullptr;
  DType dtype = DType::bf16;  // compute dtype of the passes and of the hidden stream
  TokenWindows calibration;   // empty if the method needs no data
  Json calibration_protocol;  // recorded in the file and the report
  std::int64_t batch = 0;     // sequences at a time; 0: default_batch
  std::int64_t blocks = 0;    // quantize the first so many blocks only; 0: all
  std::filesystem::path out;
  bool resume = false;
  bool restart = false;  // discard the finished blocks of an interrupted run
  int zstd_level = 1;
  int threads = 0;      // of the writer and of decoding on the host; 0: all
  bool poison = false;  // fill device memory with NaN when it is handed out; for tests
};

// Calibration sequences that go through a block at a time: job.batch or the device's default.
[[nodiscard]] std::int64_t effective_batch(const QuantizeJob& job);

// The memory plan of the job in bytes of device memory, without running it.
struct MemoryPlan {
  std::int64_t device_bytes = 0;
  TagBytes by_tag{};
};
MemoryPlan plan_quantize(const QuantizeJob& job);

// Runs the job and writes job.out. The report gets times, memory (planned and ledger), bits, and
// one row per linear. On Ctrl-C the finished blocks stay in OUT.partial for --resume; on any other
// error nothing is left. Throws the errors of all parts.
void quantize(const QuantizeJob& job, Report& report);

}  // namespace engine
