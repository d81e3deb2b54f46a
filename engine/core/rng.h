// Counter-based random numbers, the same bits on host and device: Philox4x32-10
// (Salmon et al., SC 2011). A value depends only on (seed, stream, index), never on order.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ENGINE_HOST_DEVICE __host__ __device__
#else
#define ENGINE_HOST_DEVICE
#endif

namespace engine {

struct Philox4 {
  std::uint32_t v[4];
};

ENGINE_HOST_DEVICE inline Philox4 philox(std::uint64_t seed, std::uint64_t stream,
                                         std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index),
                c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(stream),
                c3 = static_cast<std::uint32_t>(stream >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53U) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57U) * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {{c0, c1, c2, c3}};
}

// A bell-shaped value of mean 0 and variance 1 made from integers only (the sum of eight 16-bit
// uniforms), so that host and device agree to the last bit. One call serves one index.
ENGINE_HOST_DEVICE inline float bell_value(std::uint64_t seed, std::uint64_t stream,
                                           std::uint64_t index) {
  const Philox4 r = philox(seed, stream, index);
  std::int32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<std::int32_t>(r.v[i] & 0xFFFFU) + static_cast<std::int32_t>(r.v[i] >> 16);
  }
  // Sum of eight uniforms on 0..65535: mean 8*32767.5, standard deviation 65536*sqrt(8/12).
  return static_cast<float>(sum - 262140) * 1.8688124e-5F;
}

// Uniform on [0, 1) with 32 bits.
ENGINE_HOST_DEVICE inline double uniform_value(std::uint64_t seed, std::uint64_t stream,
                                               std::uint64_t index) {
  return static_cast<double>(philox(seed, stream, index).v[0]) * 0x1p-32;
}

}  // namespace engine
