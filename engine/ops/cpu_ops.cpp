#include "engine/ops/cpu_ops.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>

#include "engine/core/error.h"
#include "engine/ops/cpu_kernels.h"

namespace engine {
namespace {

std::string cpu_model() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

void copy_rows(const View& from, const View& to, const char* what) {
  REQUIRE(from.rows == to.rows && from.cols == to.cols && from.dtype == to.dtype,
          std::string(what) + ": from " + from.shape() + " to " + to.shape());
  REQUIRE(from.device == DeviceKind::cpu && to.device == DeviceKind::cpu,
          std::string(what) + ": host views");
  if (from.empty()) return;
  const std::size_t size = dtype_bytes(from.dtype);
  const auto* source = static_cast<const char*>(from.data);
  auto* target = static_cast<char*>(to.data);
  if (from.contiguous() && to.contiguous()) {
    std::memcpy(target, source, static_cast<std::size_t>(from.bytes()));
    return;
  }
  for (std::int64_t r = 0; r < from.rows; ++r) {
    std::memcpy(target + static_cast<std::size_t>(r * to.stride) * size,
                source + static_cast<std::size_t>(r * from.stride) * size,
                static_cast<std::size_t>(from.cols) * size);
  }
}

}  // namespace

CpuOps::CpuOps(int threads) : pool_(threads) {}

DeviceInfo CpuOps::info() {
  const std::int64_t page = sysconf(_SC_PAGE_SIZE);
  DeviceInfo d;
  d.name = "cpu";
  d.model = cpu_model();
  d.features = std::string(isa_name(best_isa())) + ", " + std::to_string(pool_.size()) +
               (pool_.size() == 1 ? " thread" : " threads");
  d.total_bytes = sysconf(_SC_PHYS_PAGES) * page;
  d.free_bytes = sysconf(_SC_AVPHYS_PAGES) * page;
  return d;
}

RawMemory& CpuOps::memory() { return host_memory(); }
RawMemory& CpuOps::staging_memory() { return host_memory(); }

void CpuOps::upload(View host, View device) { copy_rows(host, device, "upload"); }
void CpuOps::download(View device, View host) { copy_rows(device, host, "download"); }
void CpuOps::copy(View from, View to) { copy_rows(from, to, "copy"); }

void CpuOps::synchronize() {}  // every op is done when it returns

std::unique_ptr<Recording> CpuOps::record(const std::function<void()>&) {
  throw Error(ErrorCode::device, "cpu: cannot record work");
}
void CpuOps::replay(Recording&) { throw Error(ErrorCode::device, "cpu: cannot replay work"); }

std::int64_t CpuOps::mark() {
  marks_.push_back(std::chrono::steady_clock::now());
  return static_cast<std::int64_t>(marks_.size()) - 1;
}

double CpuOps::elapsed_ms(std::int64_t from, std::int64_t to) {
  const auto n = static_cast<std::int64_t>(marks_.size());
  REQUIRE(from >= 0 && from < n && to >= 0 && to < n, "no such mark");
  const auto span = marks_[static_cast<std::size_t>(to)] - marks_[static_cast<std::size_t>(from)];
  return std::chrono::duration<double, std::milli>(span).count();
}

// This backend's only workspaces are the threads' packing panels, bounded by constants.
std::unique_ptr<Ops> make_cpu_ops(Ledger&, int threads) {
  if (threads < 0) {
    throw Error(ErrorCode::usage,
                "threads: expected 0 (all) or more, found " + std::to_string(threads));
  }
  return std::make_unique<CpuOps>(threads);
}

}  // namespace engine
