// Whole runs in few lines: logits, quantization and perplexity on the CPU.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/model/packed_model.h"
#include "engine/model/stream.h"
#include "engine/quant/driver.h"
#include "eval/ppl.h"

namespace engine::test {

// Logits [ids.size(), vocab] of one sequence, fed at once.
std::vector<float> logits_of(WeightSource& source, DType dtype, std::span<const std::int32_t> ids);

// Rows first .. first + count - 1 of a safetensors file's tensor "tokens", cut to `seq` columns.
TokenWindows token_rows(const std::filesystem::path& file, std::int64_t first, std::int64_t count,
                        std::int64_t seq);

// A method with its options parsed from a command line such as "--bits 3 --group 0".
std::unique_ptr<Method> method_with(const std::string& name, const std::string& options,
                                    const ModelConfig& config);

struct QuantRun {
  std::string method;
  std::string options;
  DType dtype = DType::f32;
  TokenWindows calibration = {};
  std::int64_t batch = 0;
  std::int64_t blocks = 0;
  bool poison = false;
};

struct QuantOutcome {
  MemoryPlan plan;
  Ledger::Entry memory;  // of the CPU
  Json report;
};

QuantOutcome run_quantize(WeightSource& source, const QuantRun& run,
                          const std::filesystem::path& out);
// The same with a method that the caller made.
QuantOutcome run_quantize(WeightSource& source, const QuantRun& run, Method& method,
                          const std::filesystem::path& out);

double perplexity_of(WeightSource& source, const TokenWindows& tokens, DType dtype = DType::f32,
                     Exec exec = Exec::decoded);

// Nine greedy tokens after a prompt of four, in f32.
std::vector<std::int32_t> tokens_of(WeightSource& source, Exec exec);

// A linear of a source as f32 [rows, cols], through the path that every run uses.
std::vector<float> load_weight(WeightSource& source, std::int64_t layer, Site site);

// A packed file read by the reference codec: nothing of the device path is involved.
class PackedFileView {
 public:
  explicit PackedFileView(const std::filesystem::path& file);
  [[nodiscard]] const PackedModel& model() const { return model_; }
  [[nodiscard]] const Json& entry(const std::string& linear) const {
    return model_.linears.at(linear).entry;
  }
  [[nodiscard]] std::vector<std::byte> plane(std::uint32_t id) const;
  // f32 [rows, cols].
  [[nodiscard]] std::vector<float> decode(const std::string& linear) const;
  // All planes of a linear, one after another.
  [[nodiscard]] std::vector<std::byte> bytes(const std::string& linear) const;

 private:
  PackedReader reader_;
  PackedModel model_;
};

// sum (a - b)^2 / sum b^2.
double relative_square_error(std::span<const float> a, std::span<const float> b);

}  // namespace engine::test
