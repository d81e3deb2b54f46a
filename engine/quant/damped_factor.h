// The damped Hessian's factor, for the methods that compensate errors as GPTQ does.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "engine/quant/method.h"

namespace engine {

struct DampOptions {
  double share = 0.01;  // added to the diagonal, of its mean
  int tries = 1;        // factorisations, each with ten times the damping
  DType factor = DType::f64;
  // What outcomes and errors name: the option, and its value where `share` was made from it.
  const char* option = "--damp";
  double asked = 0;  // 0: share
};

// --damp --damp-tries --factor
void declare_damp_options(CLI::App& app, DampOptions& options);
// Throws Error(usage) for values out of range.
void check_damp_options(const DampOptions& options);
// The three in a method's options().
void damp_options(const DampOptions& options, Json& out);

struct DampedFactor {
  View r;     // options.factor [d, d], upper triangular: (2 / sequences) H + damping I = R R^T
  View dead;  // u8 [1, d]: 1 where an input was always 0; its diagonal counts as 1
  std::int64_t dead_columns = 0;
  double damping = 0;          // added to the diagonal
  std::string outcome = "ok";  // or "damped(SHARE, TRIES tries)"
};

// What a method says after more than one try, "damped(SHARE, TRIES tries)", and after the last.
[[nodiscard]] std::string damped_outcome(double share, int tries);
[[nodiscard]] Error damping_failed(const GroupPass& pass, const DampOptions& options);

// Of pass.hessian, in the weight's own order of columns; memory from pass.arena. Throws
// Error(numeric) when no try gave a positive definite matrix.
[[nodiscard]] DampedFactor factor_hessian(GroupPass& pass, const DampOptions& options);

}  // namespace engine
