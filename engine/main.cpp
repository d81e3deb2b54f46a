// The program `engine`.
#include "engine/cmd/commands.h"

int main(int argc, char** argv) {
  std::vector<std::unique_ptr<engine::Command>> commands;
  commands.push_back(engine::make_quantize_command());
  commands.push_back(engine::make_ppl_command());
  commands.push_back(engine::make_kl_command());
  commands.push_back(engine::make_eval_command());
  commands.push_back(engine::make_study_command());
  commands.push_back(engine::make_inspect_command());
  commands.push_back(engine::make_generate_command());
  commands.push_back(engine::make_tokenize_command());
  commands.push_back(engine::make_decode_command());
  commands.push_back(engine::make_table_command());
  return engine::run_program(
      "engine", "Low-bit quantization of LLaMA models: quantize, evaluate, inspect, generate.",
      std::move(commands), argc, argv);
}
