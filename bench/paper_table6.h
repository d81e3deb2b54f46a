// The published figures that `bench table6` puts beside its own.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "engine/model/config.h"

namespace engine {

// W. Huang et al., "An empirical study of LLaMA3 quantization: from LLMs to MLLMs", Visual
// Intelligence 2:36 (2024), Table 6: memory of the quantization, its time, and the speed of the
// result, at 4 bits (groups of 128 where a speed is given), on the authors' hardware.
struct PaperRow {
  std::string_view method;
  std::string_view model;  // a name of synthetic_config_names()
  double memory_gb;
  double minutes;
  std::optional<double> token_per_s;  // not published for every method
};

inline constexpr std::array<PaperRow, 8> paper_table6 = {{
    {"gptq", "llama3-8b", 40.3, 19, 61.2},
    {"gptq", "llama2-7b", 26.4, 17, 159.4},
    {"awq", "llama3-8b", 20.1, 10, 89.8},
    {"awq", "llama2-7b", 11.7, 12, 112.9},
    {"smoothquant", "llama3-8b", 16.0, 15, std::nullopt},
    {"smoothquant", "llama2-7b", 13.5, 7, std::nullopt},
    {"omniquant", "llama3-8b", 30.61, 307, 54.9},
    {"omniquant", "llama2-7b", 29.45, 325, 147.2},
}};

inline constexpr std::int64_t paper_bits = 4, paper_group = 128;

// The row of a method for a model of this shape at this width; null if nothing was published.
[[nodiscard]] inline const PaperRow* find_paper_row(std::string_view method,
                                                    const ModelConfig& config, std::int64_t bits) {
  if (bits != paper_bits) return nullptr;
  for (const PaperRow& row : paper_table6) {
    if (row.method != method) continue;
    const ModelConfig known = synthetic_config(row.model);
    if (known.hidden == config.hidden && known.intermediate == config.intermediate &&
        known.layers == config.layers && known.kv_heads == config.kv_heads &&
        known.vocab == config.vocab && known.max_positions == config.max_positions) {
      return &row;
    }
  }
  return nullptr;
}

// The row's speed, which holds for its group only.
[[nodiscard]] inline std::optional<double> published_speed(const PaperRow& row,
                                                           std::int64_t group) {
  return group == paper_group ? row.token_per_s : std::nullopt;
}

}  // namespace engine
