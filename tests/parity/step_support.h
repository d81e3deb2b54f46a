// What the parity cases of a decoding step share: scalars on the device and operands of a cache.
#pragma once

#include "tests/parity/parity_support.h"

namespace engine::test {

// Failures print the case and its seed.
template <class Case>
requires requires(const Case& c) { c.name(); }
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name() << ", seed " << seed_of(c.name());
}

inline Operand scalar(Role role, std::int64_t value) {
  return Operand(role, DType::i32, 1, 1).fill([value](std::int64_t, std::int64_t) {
    return static_cast<double>(value);
  });
}

// Operands of a cache; rows that are not filled keep their poison.
struct CacheOperands {
  Operand k, v, k_scale, v_scale;
};

inline CacheOperands make_cache(Role role, DType dtype, bool codes, std::int64_t rows,
                                std::int64_t kv_heads, std::int64_t head_dim, Layout layout) {
  CacheOperands c;
  c.k = Operand(role, codes ? DType::u8 : dtype, rows, kv_heads * head_dim, layout);
  c.v = c.k;
  if (codes) {
    c.k_scale = Operand(role, DType::f32, rows, kv_heads, layout);
    c.v_scale = c.k_scale;
  }
  return c;
}

// views: k, v, k_scale, v_scale from `at` on.
inline KvCache cache_of(const std::vector<View>& views, std::size_t at, std::int64_t batch,
                        std::int64_t capacity) {
  return {views[at], views[at + 1], views[at + 2], views[at + 3], batch, capacity};
}

}  // namespace engine::test
