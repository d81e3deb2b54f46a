// Options of the measurements that run a whole model.
#pragma once

#include <memory>
#include <string>

#include "bench/common.h"
#include "engine/model/decoder.h"

namespace engine {

struct ModelOptions {
  std::string model;
  std::string exec = "auto";  // auto: packed for a packed model or with --bits, else decoded
  std::int64_t bits = 0;      // 0: as stored
  std::int64_t group = 128;
  bool symmetric = false;
  DType scale_dtype = DType::f16;
  int kv = 16;
  bool no_graph = false;
  DeviceOptions device;

  // --model --bits --group --sym --scale-dtype --kv --no-graph and the device's; --exec if asked.
  void declare(CLI::App& app, bool with_exec);
  // Throws Error(usage) for what contradicts itself.
  void check() const;
  [[nodiscard]] std::unique_ptr<WeightSource> open() const;
  [[nodiscard]] Exec chosen_exec(const WeightSource& source) const;
  // For prompts of `prompt` tokens and `steps` steps. Throws Error(usage) beyond the positions of
  // the model.
  [[nodiscard]] DecoderOptions decoder(const WeightSource& source, const Ops& ops, Exec exec,
                                       std::int64_t batch, std::int64_t prompt,
                                       std::int64_t steps) const;
};

[[nodiscard]] const char* exec_name(Exec exec);

// Tokens of `batch` prompts, random below the vocabulary: [batch, len].
[[nodiscard]] std::vector<std::int32_t> random_prompts(const ModelConfig& config,
                                                       std::int64_t batch, std::int64_t len,
                                                       std::int64_t seed);

// Limits that all commands share.
inline constexpr std::int64_t max_prompt = 131072, max_steps = 8192, max_batch = 1024;
inline constexpr int max_repeat = 1000;

}  // namespace engine
