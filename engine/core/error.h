// Error types (defined in the leaf `formats`) and the checking macros of the engine.
#pragma once

#include <sstream>
#include <string>

#include "formats/error.h"

namespace engine::detail {

[[noreturn]] inline void fail_require(const char* file, int line, const char* condition,
                                      const std::string& message) {
  std::ostringstream out;
  out << "internal check failed: " << condition;
  if (!message.empty()) out << ": " << message;
  out << " (" << file << ":" << line << ")";
  throw Error(ErrorCode::internal, out.str());
}

}  // namespace engine::detail

// Always on: a precondition between our own functions. The message is any string expression.
#define REQUIRE(condition, message)                                                            \
  do {                                                                                         \
    if (!(condition)) ::engine::detail::fail_require(__FILE__, __LINE__, #condition, message); \
  } while (false)
