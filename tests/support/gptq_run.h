// One whole GPTQ solve through the ops, from weights and second moment to codes, with everything
// between kept for the tests to look at.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/ops/ops.h"
#include "tests/support/quant_fixtures.h"

namespace engine::test {

struct GptqCase {
  std::int64_t rows = 0;
  std::int64_t d = 0;
  std::vector<float> w;  // [rows, d]
  std::vector<float> h;  // [d, d]
  GridSpec grid;
  std::int64_t block = 128;
  bool act_order = false;
  bool static_groups = false;
  double damp = 0.01;
  DType factor = DType::f64;
};

// Columns in solving order unless a line says otherwise.
struct GptqRun {
  bool factored = false;
  std::vector<std::int32_t> perm;
  std::vector<std::uint8_t> dead;
  std::vector<double> damped;  // [d, d], before the factorisation
  std::vector<double> r;       // [d, d]
  double damping = 0.0;
  std::vector<float> w;  // as given to the sweep: gathered, dead columns zeroed
  std::vector<std::int32_t> column_group;
  bool grids_given = false;
  std::vector<float> scales;
  std::vector<std::int32_t> zeros;
  std::vector<std::uint8_t> codes;
  std::vector<float> error;
  std::vector<double> loss;  // [rows]
};

template <class T>
std::vector<double> run_factor(Ops& ops, const GptqCase& c, View h, GptqRun& run,
                               std::vector<T>& a) {
  a.resize(index(c.d * c.d));
  const View av = host_view(a.data(), c.d, c.d);
  ops.damp_hessian(h, host_view(run.perm.data(), 1, c.d), 1.0, c.damp, av,
                   host_view(run.dead.data(), 1, c.d), host_view(&run.damping, 1, 1));
  run.damped.assign(a.begin(), a.end());
  std::vector<std::uint8_t> workspace(index(ops.factor_workspace_bytes(c.d, dtype_of<T>())));
  run.factored = ops.factor_upper(
      av, host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size())));
  return {a.begin(), a.end()};
}

inline GptqRun run_gptq(Ops& ops, const GptqCase& c) {
  GptqRun run;
  const std::int64_t groups = c.grid.groups(c.d);
  const View w = host_view(c.w.data(), c.rows, c.d);
  const View h = host_view(c.h.data(), c.d, c.d);

  run.perm.resize(index(c.d));
  std::iota(run.perm.begin(), run.perm.end(), 0);
  if (c.act_order) {
    std::vector<float> diagonal(index(c.d));
    ops.diagonal(h, host_view(diagonal.data(), 1, c.d));
    std::stable_sort(run.perm.begin(), run.perm.end(), [&](std::int32_t a, std::int32_t b) {
      return diagonal[index(a)] > diagonal[index(b)];
    });
  }
  run.dead.resize(index(c.d));
  std::vector<double> a64;
  std::vector<float> a32;
  run.r =
      c.factor == DType::f64 ? run_factor(ops, c, h, run, a64) : run_factor(ops, c, h, run, a32);
  if (!run.factored) return run;

  run.w.resize(c.w.size());
  const View perm = host_view(run.perm.data(), 1, c.d);
  ops.gather_columns(w, perm, host_view(run.dead.data(), 1, c.d),
                     host_view(run.w.data(), c.rows, c.d));

  run.scales.resize(index(c.rows * groups));
  run.zeros.resize(index(c.rows * groups));
  const View scales = host_view(run.scales.data(), c.rows, groups);
  const View zeros = host_view(run.zeros.data(), c.rows, groups);
  run.grids_given = c.grid.group == 0 || c.static_groups;
  if (c.grid.group == 0) {
    ops.find_grid(w, c.grid, scales, zeros);
  } else if (c.static_groups) {
    // In original order, dead columns zeroed.
    std::vector<float> zeroed(c.w);
    for (std::int64_t j = 0; j < c.d; ++j) {
      if (run.dead[index(j)] == 0) continue;
      for (std::int64_t r = 0; r < c.rows; ++r) {
        zeroed[index(r * c.d + run.perm[index(j)])] = 0.0F;
      }
    }
    ops.find_grid(host_view(zeroed.data(), c.rows, c.d), c.grid, scales, zeros);
    for (const std::int32_t j : run.perm) {
      run.column_group.push_back(static_cast<std::int32_t>(j / c.grid.group));
    }
  }

  run.codes.resize(run.w.size());
  run.loss.resize(index(c.rows));
  run.error = run.w;
  std::vector<std::uint8_t> workspace(
      index(ops.gptq_workspace_bytes(c.rows, c.d, c.block, c.factor)));
  GptqProblem p;
  p.grid = c.grid;
  p.block = c.block;
  p.grids_given = run.grids_given;
  p.w = host_view(run.error.data(), c.rows, c.d);
  p.r = c.factor == DType::f64 ? host_view(a64.data(), c.d, c.d) : host_view(a32.data(), c.d, c.d);
  if (!run.column_group.empty()) p.column_group = host_view(run.column_group.data(), 1, c.d);
  p.scales = scales;
  p.zeros = zeros;
  p.codes = host_view(run.codes.data(), c.rows, c.d);
  p.loss = host_view(run.loss.data(), c.rows, 1);
  p.workspace = host_view(workspace.data(), 1, static_cast<std::int64_t>(workspace.size()));
  ops.gptq_sweep(p);
  return run;
}

// tr(E A E^T) for one row of E [rows, d].
inline double quadratic_loss(const float* e, const std::vector<double>& a, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < d; ++i) {
    double inner = 0.0;
    for (std::int64_t j = 0; j < d; ++j) {
      inner += a[index(i * d + j)] * static_cast<double>(e[j]);
    }
    sum += inner * static_cast<double>(e[i]);
  }
  return sum;
}

}  // namespace engine::test
