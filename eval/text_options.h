// The options that engine ppl and engine kl share: which texts, and how they are run.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "eval/ppl.h"

namespace engine {

// Texts as windows, in the order of the options.
struct TextWindows {
  std::vector<TokenWindows> texts;
  std::vector<Json> protocols;
  std::int64_t windows = 0;  // of all texts
};

class TextOptions {
 public:
  // --text --dataset --seq --limit --bos --batch --exec --packed-kernel
  void declare(CLI::App& app);
  // Throws Error(usage) for values that no model could make sense of.
  void check() const;
  // `source` and `tokenizer` (null: none) as in load_eval_windows.
  [[nodiscard]] TextWindows load(const WeightSource& source, const Tokenizer* tokenizer) const;
  // What a report calls text `i`: its file's name, or synthetic:COUNT.
  [[nodiscard]] std::string label(std::size_t i) const;
  // Adds "exec" and, for packed linears, "packed_kernel" to a report's numerics.
  void describe_exec(Json& numerics) const;

  [[nodiscard]] bool packed() const { return exec_ == Exec::packed; }
  [[nodiscard]] Exec exec() const { return exec_; }
  [[nodiscard]] PackedKernel kernel() const { return kernel_; }
  [[nodiscard]] std::int64_t batch() const { return batch_; }
  [[nodiscard]] std::int64_t seq() const { return seq_; }

 private:
  CLI::App* app_ = nullptr;
  std::vector<std::string> texts_, datasets_;
  std::int64_t seq_ = 2048, limit_ = 0, batch_ = 0;
  BosPolicy bos_ = BosPolicy::model;
  Exec exec_ = Exec::decoded;
  PackedKernel kernel_ = PackedKernel::automatic;
};

}  // namespace engine
