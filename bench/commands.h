// The commands of `bench`, each defined in the file of its name.
#pragma once

#include <memory>

#include "engine/cmd/command.h"

namespace engine {

std::unique_ptr<Command> make_latency_command();
std::unique_ptr<Command> make_kernels_command();
std::unique_ptr<Command> make_memory_command();
std::unique_ptr<Command> make_load_command();
std::unique_ptr<Command> make_table6_command();

}  // namespace engine
