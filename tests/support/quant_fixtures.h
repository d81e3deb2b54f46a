// Synthetic weights, inputs and second moments for the quantization tests, and comparators that
// reject NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/core/rng.h"
#include "engine/core/view.h"

namespace engine::test {

inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Bell-shaped values of standard deviation `scale`.
inline std::vector<float> bell_matrix(std::int64_t rows, std::int64_t cols, std::uint64_t seed,
                                      float scale = 1.0F) {
  std::vector<float> m(index(rows * cols));
  for (std::size_t i = 0; i < m.size(); ++i) m[i] = scale * bell_value(seed, 0, i);
  return m;
}

// Inputs [m, d] whose columns share a few hidden directions and differ in size by a factor of
// up to 8, like the activations of a trained layer.
inline std::vector<float> correlated_inputs(std::int64_t m, std::int64_t d, std::uint64_t seed) {
  constexpr std::int64_t hidden = 6;
  const std::vector<float> own = bell_matrix(m, d, seed);
  const std::vector<float> shared = bell_matrix(m, hidden, seed + 1);
  const std::vector<float> mix = bell_matrix(hidden, d, seed + 2, 0.6F);
  std::vector<float> x(index(m * d));
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t j = 0; j < d; ++j) {
      float sum = own[index(r * d + j)];
      for (std::int64_t k = 0; k < hidden; ++k) {
        sum += shared[index(r * hidden + k)] * mix[index(k * d + j)];
      }
      const auto size =
          static_cast<float>(0.25 + 1.75 * uniform_value(seed, 3, static_cast<std::uint64_t>(j)));
      x[index(r * d + j)] = size * sum;
    }
  }
  return x;
}

// x^T x in double, both triangles, rounded to f32.
inline std::vector<float> second_moment(const std::vector<float>& x, std::int64_t d) {
  const auto m = static_cast<std::int64_t>(x.size()) / d;
  std::vector<double> h(index(d * d), 0.0);
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t i = 0; i < d; ++i) {
      const double a = x[index(r * d + i)];
      for (std::int64_t j = 0; j <= i; ++j) {
        h[index(i * d + j)] += a * static_cast<double>(x[index(r * d + j)]);
      }
    }
  }
  std::vector<float> out(index(d * d));
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      out[index(i * d + j)] = out[index(j * d + i)] = static_cast<float>(h[index(i * d + j)]);
    }
  }
  return out;
}

// A second moment of correlated inputs in which the inputs named in `dead` are always zero.
inline std::vector<float> test_hessian(std::int64_t d, std::uint64_t seed,
                                       const std::vector<std::int64_t>& dead = {}) {
  const std::int64_t m = 2 * d;
  std::vector<float> x = correlated_inputs(m, d, seed);
  for (std::int64_t r = 0; r < m; ++r) {
    for (const std::int64_t j : dead) x[index(r * d + j)] = 0.0F;
  }
  return second_moment(x, d);
}

// Whether |a - b| <= tolerance * |b|; false for NaN.
inline bool close(double a, double b, double tolerance) {
  return std::fabs(a - b) <= tolerance * std::fabs(b);
}

// Share of differing elements; 1 when the sizes differ.
template <class T>
double differing(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size() || a.empty()) return 1.0;
  std::size_t n = 0;
  for (std::size_t i = 0; i < a.size(); ++i) n += a[i] == b[i] ? 0U : 1U;
  return static_cast<double>(n) / static_cast<double>(a.size());
}

inline double total(const std::vector<double>& v) {
  return std::accumulate(v.begin(), v.end(), 0.0);
}

}  // namespace engine::test
