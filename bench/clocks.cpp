#include "bench/clocks.h"

#include <dlfcn.h>

#include <array>
#include <charconv>

namespace engine {
namespace {

constexpr const char* absent = "not available";

// The few functions needed, by the signatures that NVML and the CUDA driver document; 0 is success.
using NoArguments = int (*)();
using HandleByBusId = int (*)(const char* bus_id, void** device);
using ClockInfo = int (*)(void* device, int type, unsigned* mhz);
using Temperature = int (*)(void* device, int sensor, unsigned* celsius);
using Power = int (*)(void* device, unsigned* milliwatts);
using DeviceByOrdinal = int (*)(int* device, int ordinal);
using BusIdOf = int (*)(char* bus_id, int length, int device);
constexpr int clock_sm = 1, clock_memory = 2, sensor_gpu = 0;

template <class Function>
Function symbol(void* library, const char* name) {
  return library == nullptr ? nullptr : reinterpret_cast<Function>(::dlsym(library, name));
}

// The bus id of "cuda:N". NVML numbers devices in another order than CUDA may. The caller's ops
// have initialised the driver; that the library is already loaded keeps this from loading it.
std::string bus_id(const std::string& device) {
  constexpr std::string_view prefix = "cuda:";
  int ordinal = 0;
  if (!device.starts_with(prefix)) return {};
  const char* end = device.data() + device.size();
  if (std::from_chars(device.data() + prefix.size(), end, ordinal).ptr != end) return {};
  void* driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return {};
  const auto get = symbol<DeviceByOrdinal>(driver, "cuDeviceGet");
  const auto id_of = symbol<BusIdOf>(driver, "cuDeviceGetPCIBusId");
  std::array<char, 64> text{};
  int handle = 0;
  const bool known = get != nullptr && id_of != nullptr && get(&handle, ordinal) == 0 &&
                     id_of(text.data(), static_cast<int>(text.size()) - 1, handle) == 0;
  ::dlclose(driver);
  return known ? std::string(text.data()) : std::string();
}

}  // namespace

Clocks::Clocks(const std::string& device) {
  const std::string id = bus_id(device);
  if (id.empty()) return;
  void* library = ::dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return;
  const auto init = symbol<NoArguments>(library, "nvmlInit_v2");
  const auto by_bus_id = symbol<HandleByBusId>(library, "nvmlDeviceGetHandleByPciBusId_v2");
  const auto shutdown = symbol<NoArguments>(library, "nvmlShutdown");
  if (init == nullptr || by_bus_id == nullptr || shutdown == nullptr || init() != 0) {
    ::dlclose(library);
    return;
  }
  library_ = library;
  if (by_bus_id(id.c_str(), &device_) != 0) device_ = nullptr;
}

Clocks::~Clocks() {
  if (library_ == nullptr) return;
  if (const auto shutdown = symbol<NoArguments>(library_, "nvmlShutdown"))
    static_cast<void>(shutdown());
  ::dlclose(library_);
}

Json Clocks::read() const {
  if (device_ == nullptr) return absent;
  Json j = Json::object();
  const auto note = [&](const char* key, bool known, double value) {
    if (known) {
      j[key] = value;
    } else {
      j[key] = absent;
    }
  };
  unsigned value = 0;
  const auto clock = symbol<ClockInfo>(library_, "nvmlDeviceGetClockInfo");
  bool known = clock != nullptr && clock(device_, clock_sm, &value) == 0;
  note("sm_mhz", known, value);
  known = clock != nullptr && clock(device_, clock_memory, &value) == 0;
  note("memory_mhz", known, value);
  const auto temperature = symbol<Temperature>(library_, "nvmlDeviceGetTemperature");
  known = temperature != nullptr && temperature(device_, sensor_gpu, &value) == 0;
  note("temperature_c", known, value);
  const auto power = symbol<Power>(library_, "nvmlDeviceGetPowerUsage");
  known = power != nullptr && power(device_, &value) == 0;
  note("power_w", known, value * 1e-3);
  return j;
}

}  // namespace engine
