#include "engine/quant/damped_factor.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "engine/core/args.h"

namespace engine {

void declare_damp_options(CLI::App& app, DampOptions& o) {
  app.add_option("--damp", o.share, "Added to H's diagonal, as a share of its mean")
      ->capture_default_str();
  app.add_option("--damp-tries", o.tries,
                 "Factorisations to try, each with ten times the damping; 1: a failure is an error")
      ->capture_default_str();
  add_choice<DType>(app, "--factor", o.factor, {{"f64", DType::f64}, {"f32", DType::f32}},
                    "Precision of the Cholesky factor");
}

void check_damp_options(const DampOptions& o) {
  if (!(o.share > 0) || !std::isfinite(o.share)) {
    throw Error(ErrorCode::usage,
                "--damp: expected a positive number, found " + std::to_string(o.share));
  }
  if (o.tries < 1 || o.tries > 10) {
    throw Error(ErrorCode::usage,
                "--damp-tries: expected 1 to 10, found " + std::to_string(o.tries));
  }
}

void damp_options(const DampOptions& o, Json& out) {
  out["damp"] = o.share;
  out["damp_tries"] = o.tries;
  out["factor"] = dtype_name(o.factor);
}

std::string damped_outcome(double share, int tries) {
  char text[64];
  std::snprintf(text, sizeof text, "damped(%g, %d tries)", share, tries);
  return text;
}

namespace {
double asked_share(const DampOptions& o) { return o.asked > 0 ? o.asked : o.share; }
}  // namespace

Error damping_failed(const GroupPass& pass, const DampOptions& o) {
  char share[32];
  std::snprintf(share, sizeof share, "%g", asked_share(o));
  const std::string option = o.option;
  return Error(ErrorCode::numeric,
               "layers." + std::to_string(pass.layer) + " " + tap_name(pass.tap) +
                   ": the damped Hessian is not positive definite after " +
                   std::to_string(o.tries) + " tries from " + option + " " + share + " (raise " +
                   option + " or --damp-tries, or give more calibration data)");
}

DampedFactor factor_hessian(GroupPass& pass, const DampOptions& o) {
  const std::int64_t d = pass.sites.front().weight.cols;
  DampedFactor out;
  out.r = pass.arena.make(MemTag::solver, o.factor, d, d);
  out.dead = pass.arena.make(MemTag::solver, DType::u8, 1, d);
  const Arena::Scope scope(pass.arena);
  const View workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                         pass.ops.factor_workspace_bytes(d, o.factor));
  const View added = pass.arena.make(MemTag::solver, DType::f64, 1, 1);
  if (pass.dry()) return out;
  double share = o.share, asked = asked_share(o);
  for (int attempt = 1; attempt <= o.tries; ++attempt, share *= 10, asked *= 10) {
    pass.ops.damp_hessian(pass.hessian, View{}, 2.0 / static_cast<double>(pass.sequences), share,
                          out.r, out.dead, added);
    if (!pass.ops.factor_upper(out.r, workspace)) continue;
    pass.ops.download(added, host_view(&out.damping, 1, 1));
    std::vector<std::uint8_t> dead(static_cast<std::size_t>(d));
    pass.ops.download(out.dead, host_view(dead.data(), 1, d));
    out.dead_columns = std::count(dead.begin(), dead.end(), std::uint8_t{1});
    if (attempt > 1) out.outcome = damped_outcome(asked, attempt);
    return out;
  }
  throw damping_failed(pass, o);
}

}  // namespace engine
