// GPTQ the long way round, in double and plain loops: the inverse of the damped second moment, its
// upper Cholesky factor, blocks with lazy updates (docs/methods/gptq.md). What the sweep of every
// backend is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/weight/grid.h"
#include "tests/support/gptq_run.h"

namespace engine::test {

using Matrix = std::vector<double>;  // [d, d]

// L with a = L L^T; NaN in it where a is not positive definite.
inline Matrix cholesky_lower(const Matrix& a, std::int64_t d) {
  Matrix l(index(d * d), 0.0);
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = a[index(i * d + j)];
      for (std::int64_t k = 0; k < j; ++k) sum -= l[index(i * d + k)] * l[index(j * d + k)];
      l[index(i * d + j)] = i == j ? std::sqrt(sum) : sum / l[index(j * d + j)];
    }
  }
  return l;
}

// The inverse of a = L L^T, column by column through two triangular solves.
inline Matrix inverse_from_cholesky(const Matrix& l, std::int64_t d) {
  Matrix inverse(index(d * d), 0.0);
  std::vector<double> x(index(d));
  for (std::int64_t c = 0; c < d; ++c) {
    for (std::int64_t i = 0; i < d; ++i) {
      double sum = i == c ? 1.0 : 0.0;
      for (std::int64_t k = 0; k < i; ++k) sum -= l[index(i * d + k)] * x[index(k)];
      x[index(i)] = sum / l[index(i * d + i)];
    }
    for (std::int64_t i = d - 1; i >= 0; --i) {
      double sum = x[index(i)];
      for (std::int64_t k = i + 1; k < d; ++k) sum -= l[index(k * d + i)] * x[index(k)];
      x[index(i)] = sum / l[index(i * d + i)];
    }
    for (std::int64_t i = 0; i < d; ++i) inverse[index(i * d + c)] = x[index(i)];
  }
  return inverse;
}

inline std::vector<float> to_floats(const std::vector<double>& v, std::int64_t begin,
                                    std::int64_t end) {
  std::vector<float> out;
  for (std::int64_t i = begin; i < end; ++i) out.push_back(static_cast<float>(v[index(i)]));
  return out;
}

struct GptqReference {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  std::vector<std::int32_t> zeros;
  std::vector<double> loss;  // [rows], sum of err^2
};

// Solves the problem that `run` handed to the sweep, with its grids where they were given.
inline GptqReference gptq_reference(const GptqCase& c, const GptqRun& run) {
  const std::int64_t d = c.d;
  const std::int64_t groups = c.grid.groups(d);
  const std::int64_t unit = c.grid.unit(d);
  // H^-1 = L L^T = U^T U with U = L^T.
  const Matrix lower = cholesky_lower(inverse_from_cholesky(cholesky_lower(run.damped, d), d), d);
  const auto u = [&](std::int64_t i, std::int64_t k) { return lower[index(k * d + i)]; };

  GptqReference out;
  out.codes.resize(index(c.rows * d));
  out.scales = run.scales;
  out.zeros = run.zeros;
  out.loss.assign(index(c.rows), 0.0);
  for (std::int64_t row = 0; row < c.rows; ++row) {
    std::vector<double> w(run.w.begin() + row * d, run.w.begin() + (row + 1) * d);
    for (std::int64_t i1 = 0; i1 < d; i1 += c.block) {
      const std::int64_t i2 = std::min(i1 + c.block, d);
      std::vector<double> block(w.begin() + i1, w.begin() + i2);
      std::vector<double> errors;
      for (std::int64_t j = i1; j < i2; ++j) {
        if (!run.grids_given && j % unit == 0) {
          const std::vector<float> members = to_floats(w, j, std::min(j + unit, d));
          const UnitGrid found = find_unit_grid(members, c.grid);
          out.scales[index(row * groups + j / unit)] = found.scale;
          out.zeros[index(row * groups + j / unit)] = found.zero;
        }
        const std::int64_t g = run.column_group.empty() ? j / unit : run.column_group[index(j)];
        const UnitGrid grid{out.scales[index(row * groups + g)],
                            out.zeros[index(row * groups + g)]};
        const double value = block[index(j - i1)];
        const std::uint8_t code = quantize_value(static_cast<float>(value), grid, c.grid);
        const double err =
            (value - static_cast<double>(dequantize_value(code, grid, c.grid))) / u(j, j);
        for (std::int64_t k = j; k < i2; ++k) block[index(k - i1)] -= err * u(j, k);
        out.codes[index(row * d + j)] = code;
        out.loss[index(row)] += err * err;
        errors.push_back(err);
      }
      for (std::int64_t j = i1; j < i2; ++j) {
        for (std::int64_t k = i2; k < d; ++k) w[index(k)] -= errors[index(j - i1)] * u(j, k);
      }
    }
  }
  return out;
}

}  // namespace engine::test
