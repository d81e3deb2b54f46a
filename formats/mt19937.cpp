#include "formats/mt19937.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

#include "formats/error.h"

namespace engine {

PythonRandom::PythonRandom(std::int64_t seed) {
  const std::uint64_t magnitude =
      seed < 0 ? ~static_cast<std::uint64_t>(seed) + 1 : static_cast<std::uint64_t>(seed);
  const std::array<std::uint32_t, 2> key = {static_cast<std::uint32_t>(magnitude),
                                            static_cast<std::uint32_t>(magnitude >> 32)};
  const std::size_t key_size = key[1] != 0 ? 2 : 1;

  // init_by_array of the reference implementation.
  seed_with(19650218U);
  std::size_t i = 1;
  std::size_t j = 0;
  const auto mixed = [&](std::uint32_t multiplier) {
    return state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * multiplier);
  };
  const auto advance = [&] {
    if (++i == kWords) {
      state_[0] = state_[kWords - 1];
      i = 1;
    }
  };
  for (std::size_t k = std::max(kWords, key_size); k > 0; --k) {
    state_[i] = mixed(1664525U) + key[j] + static_cast<std::uint32_t>(j);
    advance();
    j = (j + 1) % key_size;
  }
  for (std::size_t k = kWords - 1; k > 0; --k) {
    state_[i] = mixed(1566083941U) - static_cast<std::uint32_t>(i);
    advance();
  }
  state_[0] = 0x80000000U;
}

void PythonRandom::seed_with(std::uint32_t seed) {
  state_[0] = seed;
  for (std::size_t i = 1; i < kWords; ++i) {
    state_[i] =
        1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<std::uint32_t>(i);
  }
  next_ = kWords;
}

void PythonRandom::refill() {
  constexpr std::size_t kShift = 397;
  for (std::size_t i = 0; i < kWords; ++i) {
    const std::uint32_t y = (state_[i] & 0x80000000U) | (state_[(i + 1) % kWords] & 0x7fffffffU);
    state_[i] = state_[(i + kShift) % kWords] ^ (y >> 1) ^ ((y & 1U) != 0 ? 0x9908b0dfU : 0U);
  }
  next_ = 0;
}

std::uint32_t PythonRandom::next_u32() {
  if (next_ == kWords) refill();
  std::uint32_t y = state_[next_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680U;
  y ^= (y << 15) & 0xefc60000U;
  y ^= y >> 18;
  return y;
}

std::int64_t PythonRandom::randint(std::int64_t low, std::int64_t high) {
  const std::uint64_t last = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low);
  if (high < low || last >= std::numeric_limits<std::uint32_t>::max()) {
    throw Error(ErrorCode::usage, "randint: expected 1 to 4294967295 values, found the range " +
                                      std::to_string(low) + " to " + std::to_string(high));
  }
  const auto count = static_cast<std::uint32_t>(last + 1);
  const int shift = std::countl_zero(count);  // 32 - bit_length
  std::uint32_t drawn = next_u32() >> shift;
  while (drawn >= count) drawn = next_u32() >> shift;
  return low + static_cast<std::int64_t>(drawn);
}

}  // namespace engine
