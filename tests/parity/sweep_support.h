// What the parity tests of sweeps share: a factor as calibration gives it, and the objective that a
// sweep lowers.
#pragma once

#include <vector>

#include "tests/parity/parity_support.h"

namespace engine::test {

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// An upper triangular R with R R^T like a damped second moment of correlated inputs.
inline std::vector<double> factor_of_moment(std::int64_t d, std::uint64_t seed) {
  const std::int64_t m = 2 * d;
  constexpr std::int64_t shared = 6;
  const Operand own = Operand(Role::input, DType::f32, m, d).bell(seed);
  const Operand hidden = Operand(Role::input, DType::f32, m, shared).bell(seed / 3);
  const Operand mix = Operand(Role::input, DType::f32, shared, d).bell(seed / 7, 0.6);
  std::vector<float> x(at(m * d));
  for (std::int64_t j = 0; j < d; ++j) {
    const double size = 0.25 + 1.75 * uniform_value(seed, 6, at(j));
    for (std::int64_t r = 0; r < m; ++r) {
      double v = own.get(r, j);
      for (std::int64_t k = 0; k < shared; ++k) v += hidden.get(r, k) * mix.get(k, j);
      x[at(r * d + j)] = static_cast<float>(size * v);
    }
  }
  // On the reference, in f64; both sides then get the same factor.
  Ops& ops = *sides().reference;
  std::vector<float> h(at(d * d), 0.0F);
  std::vector<double> a(at(d * d));
  std::vector<std::uint8_t> dead(at(d));
  double damping = 0.0;
  ops.gram(host_view(x.data(), m, d), host_view(h.data(), d, d));
  const View matrix = host_view(a.data(), d, d);
  ops.damp_hessian(host_view(h.data(), d, d), {}, 2.0 / static_cast<double>(m), 0.01, matrix,
                   host_view(dead.data(), 1, d), host_view(&damping, 1, 1));
  const Scratch workspace(ops, ops.factor_workspace_bytes(d, DType::f64));
  REQUIRE(ops.factor_upper(matrix, workspace.view()), "the moment is positive definite");
  return a;
}

// tr(E H E^T) of one row of E, that is |E_r R|^2.
inline double row_objective(const Operand& e, std::int64_t row, const std::vector<double>& r) {
  const std::int64_t d = e.cols();
  std::vector<double> product(at(d), 0.0);
  for (std::int64_t i = 0; i < d; ++i) {
    const double v = e.get(row, i);
    for (std::int64_t j = i; j < d; ++j) product[at(j)] += v * r[at(i * d + j)];
  }
  double sum = 0.0;
  for (const double v : product) sum += v * v;
  return sum;
}

}  // namespace engine::test
