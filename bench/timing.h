// Statistics of repeated times, launches timed on the device, and the ceilings of a device.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/ops/ops.h"
#include "formats/json.h"

namespace engine {

struct Spread {
  double median = 0, low = 0, high = 0;
};
// Of at least one value.
[[nodiscard]] Spread spread_of(std::vector<double> values);
// The smallest value that at least share `p` (0..1] of the values do not exceed (nearest rank).
[[nodiscard]] double percentile(std::vector<double> values, double p);

// {"median_NAME", "low_NAME", "high_NAME"} are added to `row`.
void add_spread(Json& row, const std::string& name, const Spread& spread);

// Work that is launched many times over.
struct Launches {
  std::int64_t copies = 1;                   // distinct sets of data
  std::function<void(std::int64_t)> launch;  // with the number of a copy
};

// Milliseconds of one launch, `repeat` times. Launches rotate over the copies. Where the backend
// can record, a recording of some milliseconds of launches is replayed between two marks; elsewhere
// they run one after another between the marks. Warms up first.
[[nodiscard]] std::vector<double> time_launches(Ops& ops, const Launches& work, int repeat);

// What the device reaches (engine/ops/peak.h), measured in this run.
struct Ceilings {
  double read_bytes_per_s = 0;
  double copy_bytes_per_s = 0;
  double matmul_flops = 0;   // 0: not measured
  DType dtype = DType::f32;  // of the product

  [[nodiscard]] Json to_json() const;
};
// The buffers are counted in a ledger of their own: they are no part of what the run holds.
[[nodiscard]] Ceilings measure_ceilings(Ops& ops);
// With the matrix product in `dtype` as well.
[[nodiscard]] Ceilings measure_ceilings(Ops& ops, DType dtype);

}  // namespace engine
