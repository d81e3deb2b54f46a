#include <charconv>
#include <string>

#include "engine/core/error.h"
#include "engine/ops/ops.h"

namespace engine {

std::unique_ptr<Ops> make_ops(const std::string& device, Ledger& ledger, int threads) {
  if (device == "cpu") return make_cpu_ops(ledger, threads);
  const std::string prefix = "cuda:";
  if (device.starts_with(prefix)) {
    const char* end = device.data() + device.size();
    int index = -1;
    const auto [stop, failure] = std::from_chars(device.data() + prefix.size(), end, index);
    if (failure == std::errc() && stop == end && index >= 0) return make_cuda_ops(ledger, index);
  }
  throw Error(ErrorCode::usage, "device: expected cpu or cuda:N, found \"" + device + "\"");
}

}  // namespace engine
