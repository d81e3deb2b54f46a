#include "formats/error.h"

#include <cstring>

namespace engine {

IoError::IoError(const std::string& file, const std::string& action, int errno_value)
    : Error(ErrorCode::io, file + ": " + action +
                               (errno_value != 0 ? std::string(": ") + std::strerror(errno_value)
                                                 : std::string())) {}

}  // namespace engine
