// Clocks, temperature and power of a GPU, read through NVML if the driver's library is there.
#pragma once

#include <string>

#include "formats/json.h"

namespace engine {

// Only reads; nothing is ever set. The library is opened at run time, so that the program also runs
// where there is no driver.
class Clocks {
 public:
  // `device` as DeviceInfo::name has it: "cuda:0"; anything else has no clocks.
  explicit Clocks(const std::string& device);
  ~Clocks();
  Clocks(const Clocks&) = delete;
  Clocks& operator=(const Clocks&) = delete;

  // {"sm_mhz", "memory_mhz", "temperature_c", "power_w"}, each a number or "not available"; or the
  // string "not available" alone.
  [[nodiscard]] Json read() const;

 private:
  void* library_ = nullptr;  // of dlopen
  void* device_ = nullptr;   // NVML's handle
};

}  // namespace engine
