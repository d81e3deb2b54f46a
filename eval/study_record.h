// What a study knows about one model after its jobs are done; tables and plots are made from these.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "formats/json.h"

namespace engine {

struct StudyRow {
  std::string model;  // its name in the study's configuration, e.g. "LLaMA3-8B"
  // The paper's model that its figures stand beside, a name of paper_models(), if the study's
  // configuration says so; "": decided by its name and shape.
  std::string compared_with;
  std::string shape;              // paper_model_of_shape() of its configuration; "": no such model
  bool synthetic = false;         // random weights: only its costs stand beside published ones
  std::string method = "fp";      // "fp": not quantized; else a name of method_names()
  std::string label;              // method and setting as a person writes it: "gptq 3 bits g128"
  Json options = Json::object();  // the method's options as the quantization recorded them
  double weight_bits = 16;        // as the study's "#W": 1.1 for BiLLM, 1.7 or 2 for PB-LLM
  std::int64_t activation_bits = 16;  // "#A"
  std::int64_t group = 0;             // "#G": columns per scale; 0: none ("-")

  // Of the quantized linears; absent for "fp".
  std::optional<double> bits_nominal, bits_stored, bits_on_disk;
  std::optional<double> model_bits_on_disk;  // of the whole model, embeddings and head included

  struct Perplexity {
    std::string text;      // the name in the configuration: "wikitext2", "c4", "ptb"
    std::string protocol;  // "wikitext2-2048"
    double value = 0;
    double standard_error = 0;  // of the mean loss
  };
  std::vector<Perplexity> perplexity;

  struct Score {
    std::string
        name;  // "piqa", "mmlu", or of MMLU: "mmlu.humanities", ".stem", ".social", ".other"
    std::int64_t n = 0;
    double acc = 0;  // fractions of 1
    std::optional<double> acc_stderr, acc_norm, acc_norm_stderr;
    std::string protocol;  // "lmeval-0.4, 0-shot"; "": not known
    std::string note;      // what is not as published; "": nothing
  };
  std::vector<Score> scores;

  struct Divergence {  // from the unquantized model (engine kl)
    std::string text;
    double mean = 0, median = 0, p99 = 0, maximum = 0;  // nats
    double same_top = 0;                                // fraction of 1
  };
  std::vector<Divergence> divergence;

  std::vector<double> block_error;  // relative squared error of each block's output
  struct LinearError {
    std::string name;  // "layers.3.self_attn.q_proj"
    double relative_error = 0;
  };
  std::vector<LinearError> linear_error;

  std::optional<double> quantize_s;
  std::optional<std::int64_t> quantize_peak_bytes;  // of the device's ledger
  std::optional<std::int64_t> file_bytes;
  std::optional<double> prefill_token_per_s, decode_token_per_s;
  std::string device;  // "NVIDIA H200"

  std::vector<std::string> notes;  // for under the tables: calibration, dtype, BOS

  std::string failed;  // the error line of the first job that failed; empty: none
};

[[nodiscard]] Json to_json(const StudyRow& row);

}  // namespace engine
