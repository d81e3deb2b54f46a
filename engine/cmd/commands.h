// The commands of `engine`, each defined in the file of its name here or in eval/.
#pragma once

#include <memory>

#include "engine/cmd/command.h"

namespace engine {

std::unique_ptr<Command> make_quantize_command();
std::unique_ptr<Command> make_ppl_command();    // eval/cmd_ppl.cpp
std::unique_ptr<Command> make_kl_command();     // eval/cmd_kl.cpp
std::unique_ptr<Command> make_eval_command();   // eval/cmd_eval.cpp
std::unique_ptr<Command> make_study_command();  // eval/cmd_study.cpp
std::unique_ptr<Command> make_inspect_command();
std::unique_ptr<Command> make_generate_command();
std::unique_ptr<Command> make_tokenize_command();
std::unique_ptr<Command> make_decode_command();
std::unique_ptr<Command> make_table_command();

}  // namespace engine
