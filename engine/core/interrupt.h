// Ctrl-C and SIGTERM as an exception at the next safe point.
#pragma once

namespace engine {

// Called once by main. A second signal ends the process at once.
void install_interrupt_handler();
// Throws Error(interrupted) if a signal has come.
void check_interrupt();

}  // namespace engine
