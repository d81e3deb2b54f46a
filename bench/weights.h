// Random weights for measuring kernels: several copies of one linear, so that launches in a row
// find nothing of theirs in a cache.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/core/memory.h"
#include "engine/ops/ops.h"

namespace engine {

// Which weight: dense in `dense` if !packed.
struct WeightSpec {
  bool packed = true;
  PackedShape shape;          // rows and cols of a dense one, too
  DType dense = DType::bf16;  // dtype of a dense one

  // "b4g128", "b4g0s" (no zeros stored), "codebook4g64", "binary2g128", "dense".
  [[nodiscard]] std::string name() const;
};

// Copies of `bytes` that together exceed what a GPU's L2 cache could keep three times over; 1 on
// the CPU, and fewer where they would take more than a quarter of the free memory.
[[nodiscard]] std::int64_t copies_beyond_cache(Ops& ops, std::int64_t bytes);

// Values are rounded to the nearest of a random bell-shaped matrix, as quantization would.
class WeightCopies {
 public:
  WeightCopies(Ops& ops, Ledger& ledger, const WeightSpec& spec, std::int64_t copies);

  [[nodiscard]] std::int64_t copies() const { return static_cast<std::int64_t>(linears_.size()); }
  [[nodiscard]] const Linear& operator[](std::int64_t copy) const {
    return linears_.at(static_cast<std::size_t>(copy));
  }
  [[nodiscard]] std::int64_t bytes() const { return linears_.front().bytes(); }

 private:
  void fill_dense(Ops& ops, Ledger& ledger, const WeightSpec& spec, std::int64_t copies);
  void fill_packed(Ops& ops, Ledger& ledger, const PackedShape& shape, std::int64_t copies);

  Buffer data_, row_units_, book_;
  std::vector<Linear> linears_;
};

}  // namespace engine
