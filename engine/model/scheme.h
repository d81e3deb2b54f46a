// Weights quantized while a model is loaded: round to nearest, for measurements without a file.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/model/source.h"
#include "engine/weight/grid_spec.h"

namespace engine {

// A min-max grid under the rule V-G (docs/methods/rtn.md).
struct SchemeOptions {
  int bits = 4;              // 1..8
  std::int64_t group = 128;  // columns per scale; 0: one unit per row
  bool symmetric = false;    // zero = 2^(bits-1), none stored
  DType scale_dtype = DType::f16;

  [[nodiscard]] GridSpec grid() const {
    GridSpec spec;
    spec.bits = bits;
    spec.group = group;
    spec.symmetric = symmetric;
    spec.scale_dtype = scale_dtype;
    return spec;
  }
};

// Throws Error(usage) unless bits are 1 to 8 and the group is one that packed kernels know and that
// divides the inputs of every linear.
void check_scheme(const SchemeOptions& options, const ModelConfig& config);

// `source` with every linear quantized as it is loaded, packed or decoded to the same values.
// Everything else passes through. `source` must outlive the result. Throws as
// check_scheme() does.
[[nodiscard]] std::unique_ptr<WeightSource> quantize_on_load(WeightSource& source,
                                                             const SchemeOptions& options);

}  // namespace engine
