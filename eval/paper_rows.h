// The figures that the study published, for a look beside our own: W. Huang et al., "An empirical
// study of LLaMA3 quantization: from LLMs to MLLMs", Visual Intelligence 2:36 (2024). All are of
// arXiv 2404.14047v3, checked by what the tables themselves allow (averages).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model/config.h"

namespace engine {

// What a column of a table holds.
enum class Figure : std::uint8_t {
  wikitext2,  // perplexities
  c4,
  ptb,
  piqa,  // accuracies in percent, zero-shot
  arc_easy,
  arc_challenge,
  hellaswag,
  winogrande,
  average,     // the mean of the five before
  humanities,  // accuracies in percent, MMLU, 5-shot
  stem,
  social,
  other,
  mmlu,  // over all questions
  ai2d,  // accuracies in percent, images
  chartqa,
  docvqa,
  mmbench,
  mme_cognition,  // points
  mme_perception,
  memory_gb,  // of the quantization, 1e9 bytes
  minutes,    // of the quantization
  token_per_s,
};

// What a row of a table is about; methods by the names of method_names(), "fp" for none.
struct Setting {
  std::string_view method = "fp";
  double weight_bits = 16;            // "#W"
  std::int64_t activation_bits = 16;  // "#A"
  std::int64_t group = 0;             // "#G"; 0: "-"
};

inline constexpr std::size_t max_figures = 6;
// Printed as "-" or left blank, and "N": a score of 0 or answers that are no text.
inline constexpr double not_published = -1, no_answers = -2;

struct PaperFigures {
  int table;
  Setting setting;
  // One per column of the table; the two values above stand for no number.
  std::array<double, max_figures> values;
};

struct PaperColumn {
  Figure figure;
  std::string_view model;  // a name of paper_models()
};

// A table of perplexities or accuracies: 1 to 5, 7 to 9, 11 and 12.
struct PaperTable {
  int number;
  std::string_view title;
  std::string_view full_precision;  // how the first row is called
  bool activation_bits, groups;     // has columns "#A", "#G"
  std::vector<PaperColumn> columns;
  std::vector<std::string> remarks;  // what to know before comparing
};

// Table 6: what a method costs on the authors' hardware (A800 with 80 GB).
struct PaperCost {
  std::string_view method;
  std::string_view model;
  double memory_gb;
  double minutes;
  std::optional<double> token_per_s;  // not published for every method; groups of 128
};

inline constexpr int paper_bits = 4, paper_group = 128;  // of Table 6

inline constexpr std::array<PaperCost, 8> paper_table6 = {{
    {"gptq", "llama3-8b", 40.3, 19, 61.2},
    {"gptq", "llama2-7b", 26.4, 17, 159.4},
    {"smoothquant", "llama3-8b", 16.0, 15, std::nullopt},
    {"smoothquant", "llama2-7b", 13.5, 7, std::nullopt},
    {"awq", "llama3-8b", 20.1, 10, 89.8},
    {"awq", "llama2-7b", 11.7, 12, 112.9},
    {"omniquant", "llama3-8b", 30.61, 307, 54.9},
    {"omniquant", "llama2-7b", 29.45, 325, 147.2},
}};

// Tables in the paper's order, and all their rows in theirs.
[[nodiscard]] const std::vector<PaperTable>& paper_tables();
[[nodiscard]] std::span<const PaperFigures> paper_figures();
// Null: no such table of perplexities or accuracies.
[[nodiscard]] const PaperTable* find_paper_table(int number);

// "arXiv 2404.14047v3, Table 3"
[[nodiscard]] std::string paper_source(int table);

// Whether figures of `ours` may stand beside figures of `published`: the same method, bits and
// group. BiLLM's block counts as its group, and its width, about 1.1, is not compared.
[[nodiscard]] bool same_setting(const Setting& ours, const Setting& published);

// The published number, no_answers included; nullopt: none, or not of this model or figure.
// `published` must be the setting of a row of the table.
[[nodiscard]] std::optional<double> published_figure(int table, const Setting& published,
                                                     std::string_view model, Figure figure);

// Models that the paper measured, by their names in synthetic_config_names().
[[nodiscard]] const std::vector<std::string>& paper_models();
// "LLaMA3-8B" for "llama3-8b"; other names as they are.
[[nodiscard]] std::string paper_model_title(std::string_view model);
// The one that a person's name for a model says, "Meta-Llama-3-8B" or "models/llama3_8b"; "" for
// anything else, instruction-tuned models included.
[[nodiscard]] std::string paper_model_of_name(std::string_view name);
// The one with this shape (fine-tuned and random weights have it, too); "": none.
[[nodiscard]] std::string paper_model_of_shape(const ModelConfig& config);

// How the paper writes a method: "SliM-LLM" for "slimllm"; other names as they are.
[[nodiscard]] std::string method_title(std::string_view method);

}  // namespace engine
