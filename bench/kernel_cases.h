// The kernels that `bench kernels` measures, at the shapes of published models.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/timing.h"
#include "bench/weights.h"
#include "engine/model/config.h"

namespace engine {

// A linear of a model: q and o, k and v, and gate and up share their shapes in these models.
struct LinearShape {
  std::string name;  // "llama3-8b/gate"
  std::int64_t rows = 0, cols = 0;
};
// qo, kv, gate, down of the model, and its head if asked.
[[nodiscard]] std::vector<LinearShape> linear_shapes(const std::string& model, bool head);

// What a case needs of the device, kept between cases: consecutive cases share their weights.
class Workbench {
 public:
  Workbench(Ops& ops, Ledger& ledger) : ops_(ops), ledger_(ledger) {}
  [[nodiscard]] Ops& ops() const { return ops_; }

  // The weight, made anew unless the last call asked for the same.
  const WeightCopies& weights(const WeightSpec& spec);
  // Memory that lives until clear().
  View make(DType dtype, std::int64_t rows, std::int64_t cols);
  // The same with zeros, or random values.
  View zeros(DType dtype, std::int64_t rows, std::int64_t cols);
  View random(DType dtype, std::int64_t rows, std::int64_t cols);
  // An i32 [1, 1].
  View number(std::int32_t value);
  // Weights made besides weights(); live until clear().
  const WeightCopies& more_weights(const WeightSpec& spec, std::int64_t copies);
  void clear();  // all but weights()
  void clear_weights();

 private:
  Ops& ops_;
  Ledger& ledger_;
  std::string last_;
  std::unique_ptr<WeightCopies> weights_;
  std::vector<std::unique_ptr<WeightCopies>> more_;
  std::vector<Buffer> buffers_;
};

struct Prepared {
  Launches work;
  std::int64_t bytes = 0;  // read and written at least by one launch
  std::int64_t flops = 0;
};

struct KernelCase {
  std::string name;
  std::function<Prepared(Workbench&)> prepare;
};

// x's dtype where nothing says otherwise: bf16 on a GPU, f32 on the CPU.
[[nodiscard]] DType usual_dtype(const Ops& ops);

// out = x w^T by `kernel` for m rows of x; a dense weight ignores `kernel`.
[[nodiscard]] Prepared prepare_linear(Workbench& bench, const WeightSpec& spec, std::int64_t m,
                                      DType dtype, PackedKernel kernel);

// Every case of these models.
[[nodiscard]] std::vector<KernelCase> kernel_cases(const std::vector<std::string>& models,
                                                   const Ops& ops);

}  // namespace engine
