#include "engine/ops/peak.h"

#include <algorithm>
#include <vector>

namespace engine {

double measured_matmul_flops(Ops& ops, Ledger& ledger, DType dtype) {
  // Large enough that one product takes a millisecond or more on either kind of device.
  const std::int64_t n = ops.kind() == DeviceKind::cuda ? 8192 : 1024;
  const Buffer a(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  const Buffer b(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  const Buffer c(ops.memory(), ledger, MemTag::workspace, dtype, n, n);
  ops.fill_bell(a.view(), 1, 1, 1.0F, 0.0F);
  ops.fill_bell(b.view(), 1, 2, 1.0F, 0.0F);
  constexpr int warm_up = 3, runs = 10;
  std::vector<double> ms;
  for (int i = 0; i < warm_up + runs; ++i) {
    const std::int64_t start = ops.mark();
    ops.matmul(a.view(), b.view(), c.view(), false);
    const std::int64_t end = ops.mark();
    if (i >= warm_up) ms.push_back(ops.elapsed_ms(start, end));
  }
  std::sort(ms.begin(), ms.end());
  const auto size = static_cast<double>(n);
  return 2.0 * size * size * size / (ms[ms.size() / 2] * 1e-3);
}

}  // namespace engine
