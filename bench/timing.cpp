#include "bench/timing.h"

#include <algorithm>
#include <cmath>

#include "engine/core/interrupt.h"
#include "engine/ops/peak.h"

namespace engine {

Spread spread_of(std::vector<double> values) {
  REQUIRE(!values.empty(), "no values");
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  const double median = n % 2 == 1 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
  return {median, values.front(), values.back()};
}

double percentile(std::vector<double> values, double p) {
  REQUIRE(!values.empty() && p > 0 && p <= 1, "no values, or a share outside (0, 1]");
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(values.size())));
  return values[std::clamp<std::size_t>(rank, 1, values.size()) - 1];
}

void add_spread(Json& row, const std::string& name, const Spread& spread) {
  row["median_" + name] = spread.median;
  row["low_" + name] = spread.low;
  row["high_" + name] = spread.high;
}

std::vector<double> time_launches(Ops& ops, const Launches& work, int repeat) {
  constexpr std::int64_t most = 1024;  // launches in one recording
  const bool records = ops.can_record();
  const double wanted_ms = records ? 2.0 : 0.5;
  work.launch(0);
  // An estimate that the first launch's one-time costs have no part in.
  const std::int64_t first = ops.mark();
  const std::int64_t probes = records ? std::min<std::int64_t>(work.copies, 8) : 1;
  for (std::int64_t i = 0; i < probes; ++i) work.launch(i);
  const double estimate =
      std::max(1e-4, ops.elapsed_ms(first, ops.mark()) / static_cast<double>(probes));
  std::int64_t n =
      std::clamp<std::int64_t>(static_cast<std::int64_t>(wanted_ms / estimate), 1, most);
  // Whole rounds over the copies, so that each is as often in the sum.
  if (records) n = std::min(most, (n + work.copies - 1) / work.copies * work.copies);
  const auto queue = [&] {
    for (std::int64_t i = 0; i < n; ++i) work.launch(i % work.copies);
  };
  std::unique_ptr<Recording> recording;
  if (records) {
    recording = ops.record(queue);
    ops.replay(*recording);
  }
  std::vector<double> ms;
  for (int r = 0; r < repeat; ++r) {
    check_interrupt();
    const std::int64_t from = ops.mark();
    if (recording) {
      ops.replay(*recording);
    } else {
      queue();
    }
    const std::int64_t to = ops.mark();
    ms.push_back(ops.elapsed_ms(from, to) / static_cast<double>(n));
  }
  return ms;
}

Json Ceilings::to_json() const {
  Json j;
  j["read_gb_per_s"] = read_bytes_per_s * 1e-9;
  j["copy_gb_per_s"] = copy_bytes_per_s * 1e-9;
  if (matmul_flops > 0) {
    j["matmul_tflop_per_s"] = matmul_flops * 1e-12;
    j["matmul_dtype"] = dtype_name(dtype);
  }
  return j;
}

Ceilings measure_ceilings(Ops& ops) {
  Ledger ledger;
  Ceilings c;
  c.copy_bytes_per_s = measured_copy_bandwidth(ops, ledger);
  // Half of what a copy moves is read: a disturbed measurement of reading is not below that.
  c.read_bytes_per_s = std::max(measured_read_bandwidth(ops, ledger), c.copy_bytes_per_s / 2);
  return c;
}

Ceilings measure_ceilings(Ops& ops, DType dtype) {
  Ledger ledger;
  Ceilings c = measure_ceilings(ops);
  c.matmul_flops = measured_matmul_flops(ops, ledger, dtype);
  c.dtype = dtype;
  return c;
}

}  // namespace engine
