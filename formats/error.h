// Errors of the whole project: one exception type, one line for the user.
//
// `formats` is the leaf of the dependency graph, so the type lives here; `engine/core/error.h`
// re-exports it with the checking macros.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace engine {

// What went wrong, in the classes a caller can act on. The programs map each to an exit code.
enum class ErrorCode : std::uint8_t {
  usage,          // impossible options or a request that makes no sense
  format,         // a file's bytes are not what its format allows
  io,             // the operating system refused: missing file, full disk, permissions
  mismatch,       // two inputs contradict each other (config and tensors, model and tokenizer)
  numeric,        // NaN or infinity, a factorisation that failed
  out_of_memory,  // host or device
  device,         // a CUDA call or kernel failed
  interrupted,    // Ctrl-C or SIGTERM
  internal,       // a broken invariant of ours
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// A byte sequence that violates its format. `place` is a byte offset, a key path or a tensor name.
class FormatError : public Error {
 public:
  FormatError(const std::string& file, const std::string& place, const std::string& expected,
              const std::string& found)
      : Error(ErrorCode::format,
              file + ": " + place + ": expected " + expected + ", found " + found) {}
};

// A failed system call. `action` reads like "cannot open" or "cannot write".
class IoError : public Error {
 public:
  // `errno_value` is the saved errno, 0 if there is none.
  IoError(const std::string& file, const std::string& action, int errno_value);
};

}  // namespace engine
