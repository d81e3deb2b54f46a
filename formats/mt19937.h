// CPython's random.Random, bit for bit: the samplers of the published protocols depend on it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace engine {

// MT19937 (Matsumoto and Nishimura, 1998) seeded as CPython's random.seed(int) does.
class PythonRandom {
 public:
  // The sign of the seed does not matter, as in CPython.
  explicit PythonRandom(std::int64_t seed);

  [[nodiscard]] std::uint32_t next_u32();

  // Uniform over [low, high], both included, as random.randint. Throws Error(usage) if the range
  // is empty or has more than 2^32 - 1 values.
  [[nodiscard]] std::int64_t randint(std::int64_t low, std::int64_t high);

 private:
  static constexpr std::size_t kWords = 624;

  void seed_with(std::uint32_t seed);
  void refill();

  std::array<std::uint32_t, kWords> state_{};
  std::size_t next_ = kWords;
};

}  // namespace engine
