// The program `bench`.
#include "bench/commands.h"

int main(int argc, char** argv) {
  std::vector<std::unique_ptr<engine::Command>> commands;
  commands.push_back(engine::make_latency_command());
  commands.push_back(engine::make_kernels_command());
  commands.push_back(engine::make_memory_command());
  commands.push_back(engine::make_load_command());
  commands.push_back(engine::make_table6_command());
  return engine::run_program(
      "bench", "Measurements: decoding speed, kernels, memory, loading, the study's Table 6.",
      std::move(commands), argc, argv);
}
