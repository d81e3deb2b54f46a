#include "engine/ops/peak.h"

#include <algorithm>
#include <vector>

namespace engine {
namespace {

constexpr int warm_up = 2;

int runs_on(const Ops& ops) { return ops.kind() == DeviceKind::cuda ? 9 : 5; }

double median_of(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// The median time of `work` on the device.
template <class Work>
double median_ms(Ops& ops, const Work& work) {
  std::vector<double> ms;
  for (int i = 0; i < warm_up + runs_on(ops); ++i) {
    const std::int64_t start = ops.mark();
    work();
    const std::int64_t end = ops.mark();
    if (i >= warm_up) ms.push_back(ops.elapsed_ms(start, end));
  }
  return median_of(ms);
}

// `wanted` bytes, or less where memory is scarce.
std::int64_t affordable(Ops& ops, std::int64_t wanted) {
  const std::int64_t spare = ops.info().free_bytes / 2;
  while (wanted > (std::int64_t{1} << 20) && wanted > spare) wanted /= 2;
  return wanted;
}

}  // namespace

double measured_matmul_flops(Ops& ops, Ledger& ledger, DType dtype) {
  // Large enough that one product takes a millisecond or more on either kind of device.
  const std::int64_t n = ops.kind() == DeviceKind::cuda ? 8192 : 1024;
  const Buffer a(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  const Buffer b(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  const Buffer c(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  ops.fill_bell(a.view(), 1, 1, 1.0F, 0.0F);
  ops.fill_bell(b.view(), 1, 2, 1.0F, 0.0F);
  const double ms = median_ms(ops, [&] { ops.matmul(a.view(), b.view(), c.view(), false); });
  const auto size = static_cast<double>(n);
  return 2.0 * size * size * size / (ms * 1e-3);
}

double measured_copy_bandwidth(Ops& ops, Ledger& ledger) {
  const bool cuda = ops.kind() == DeviceKind::cuda;
  const std::int64_t bytes =
      affordable(ops, std::int64_t{2} << (cuda ? 30 : 26)) / 2;  // 1 GiB; 64 MiB on the CPU
  const Buffer from(ops.memory(), ledger, MemTag::workspace, DType::u8, 1, bytes);
  const Buffer to(ops.memory(), ledger, MemTag::workspace, DType::u8, 1, bytes);
  ops.zero(from.view());
  ops.zero(to.view());
  const double ms = median_ms(ops, [&] { ops.copy(from.view(), to.view()); });
  return 2.0 * static_cast<double>(bytes) / (ms * 1e-3);
}

double measured_read_bandwidth(Ops& ops, Ledger& ledger) {
  const bool cuda = ops.kind() == DeviceKind::cuda;
  const std::int64_t bytes =
      affordable(ops, std::int64_t{1} << (cuda ? 32 : 27));  // 4 GiB; 128 MiB on the CPU
  // Rows of 1 MiB: the CPU's threads share rows.
  const std::int64_t cols = std::int64_t{1} << 19;
  const std::int64_t rows = std::max<std::int64_t>(2, bytes / (2 * cols));
  const Buffer buffer(ops.memory(), ledger, MemTag::workspace, DType::bf16, rows, cols);
  ops.zero(buffer.view());
  const std::int64_t part = std::max<std::int64_t>(1, rows / 4);
  const auto time = [&](std::int64_t n) {
    const View v = buffer.view().row_range(0, n);
    const std::int64_t start = ops.mark();
    static_cast<void>(ops.count_nonfinite(v));
    const std::int64_t end = ops.mark();
    return ops.elapsed_ms(start, end);
  };
  // Both lengths in turns, so that what changes slowly (clocks, other load) meets both.
  std::vector<double> wholes, differences;
  for (int i = 0; i < warm_up + runs_on(ops); ++i) {
    const double long_ms = time(rows), short_ms = time(part);
    if (i < warm_up) continue;
    wholes.push_back(long_ms);
    differences.push_back(long_ms - short_ms);
  }
  const double whole = median_of(wholes), difference = median_of(differences);
  const auto counted = static_cast<double>((rows - part) * cols * 2);
  if (difference > 0) return counted / (difference * 1e-3);
  // A disturbed measurement: the plain quotient is an honest lower bound.
  return static_cast<double>(rows * cols * 2) / (whole * 1e-3);
}

}  // namespace engine
