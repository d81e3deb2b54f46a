#include "engine/core/interrupt.h"

#include <atomic>
#include <csignal>

#include "engine/core/error.h"

namespace engine {
namespace {

std::atomic<int> pending_signal{0};
static_assert(std::atomic<int>::is_always_lock_free, "written by a signal handler");

void on_signal(int signal) {
  if (pending_signal.exchange(signal) != 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

}  // namespace

void install_interrupt_handler() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  // A write beyond a file size limit must be an error code, not a death.
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

void check_interrupt() {
  const int signal = pending_signal.load();
  if (signal != 0) {
    throw Error(ErrorCode::interrupted,
                signal == SIGINT ? "interrupted (Ctrl-C)" : "interrupted (SIGTERM)");
  }
}

}  // namespace engine
