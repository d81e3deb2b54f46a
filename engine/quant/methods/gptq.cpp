// GPTQ (Frantar et al., ICLR 2023): columns one after another, each column's rounding error moved
// onto the columns not yet quantized (docs/methods/gptq.md).
//   H = (2/n) sum X^T X;  H += damp mean(diag H) I;  H = R R^T, R upper;  U = R^-1
//   q = Q(w_j);  err = (w_j - q) / U_jj;  w_k -= err U_jk for k >= j
// The linears of one tap share H, so their rows go through one solve.
#include <algorithm>
#include <numeric>

#include "engine/quant/damped_factor.h"
#include "engine/quant/encode.h"
#include "engine/quant/grid_options.h"
#include "engine/quant/method.h"

namespace engine {
namespace {

struct Options {
  GridSpec spec;
  bool act_order = false;
  bool static_groups = false;
  bool true_sequential = false;
  DampOptions damp;
  std::int64_t block = 128;
};

// Which columns are dead and the solving order, from H's diagonal.
struct ColumnOrder {
  std::vector<std::int32_t> permutation;  // empty: natural order
  std::vector<std::uint8_t> dead;         // in natural order
};

ColumnOrder column_order(Ops& ops, const View& hessian, std::int64_t sequences,
                         const View& diagonal, bool act_order) {
  const auto d = static_cast<std::size_t>(hessian.cols);
  std::vector<float> diag(d);
  ops.diagonal(hessian, diagonal);
  ops.download(diagonal, host_view(diag.data(), 1, hessian.cols));
  ColumnOrder order;
  order.dead.resize(d);
  for (std::size_t j = 0; j < d; ++j) order.dead[j] = diag[j] == 0.0F ? 1 : 0;
  if (act_order) {
    // The official code sorts after dead diagonals became 1, when H has its factor 2 / sequences
    // (damping adds the same to all).
    for (std::size_t j = 0; j < d; ++j) {
      if (order.dead[j] != 0) diag[j] = static_cast<float>(sequences) / 2.0F;
    }
    order.permutation.resize(d);
    std::iota(order.permutation.begin(), order.permutation.end(), 0);
    std::stable_sort(order.permutation.begin(), order.permutation.end(),
                     [&](std::int32_t a, std::int32_t b) {
                       return diag[static_cast<std::size_t>(a)] > diag[static_cast<std::size_t>(b)];
                     });
  }
  return order;
}

class Gptq final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "gptq"; }
  [[nodiscard]] const char* summary() const override {
    return "second-order error compensation, column by column";
  }

  void declare_options(CLI::App& app) override {
    declare_grid_options(app, o_.spec);
    app.add_flag("--act-order", o_.act_order,
                 "Solve columns by decreasing diagonal of the Hessian");
    app.add_flag("--static-groups", o_.static_groups,
                 "Fix all grids from the original weights before solving");
    app.add_flag("--true-sequential", o_.true_sequential,
                 "One pass per stage (qkv, o, gate/up, down), each seeing the stages before it "
                 "quantized");
    declare_damp_options(app, o_.damp);
    app.add_option("--block", o_.block, "Columns per block, at most 128; min(block, group) is used")
        ->capture_default_str();
  }

  void check(const ModelConfig& config) const override {
    check_grid_options(o_.spec, config);
    check_damp_options(o_.damp);
    if (o_.block < 1 || o_.block > 128) {
      throw Error(ErrorCode::usage,
                  "--block: expected 1 to 128, found " + std::to_string(o_.block));
    }
    if (o_.static_groups && o_.spec.group == 0) {
      throw Error(ErrorCode::usage, "--static-groups: expected a --group above 0, found 0");
    }
    if (o_.spec.group != 0 && o_.spec.group % block() != 0) {
      throw Error(ErrorCode::usage, "--block: expected a divisor of the group " +
                                        std::to_string(o_.spec.group) + ", found " +
                                        std::to_string(o_.block) +
                                        " (groups would start from stale weights)");
    }
  }

  [[nodiscard]] Json options() const override {
    Json j = grid_options(o_.spec);
    j["act_order"] = o_.act_order;
    j["static_groups"] = o_.static_groups;
    j["true_sequential"] = o_.true_sequential;
    damp_options(o_.damp, j);
    j["block"] = block();
    return j;
  }

  [[nodiscard]] Needs needs() const override {
    return {.hessian = true, .tap_order = o_.true_sequential};
  }

  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  [[nodiscard]] std::int64_t block() const {
    return o_.spec.group == 0 ? o_.block : std::min(o_.block, o_.spec.group);
  }
  // Factors the damped Hessian into problem.r; returns the outcome text.
  std::string factor(GroupPass& pass, const View& permutation, const View& dead, const View& r,
                     double& damping) const;

  Options o_;
};

std::string Gptq::factor(GroupPass& pass, const View& permutation, const View& dead, const View& r,
                         double& damping) const {
  const Arena::Scope scope(pass.arena);
  const std::int64_t d = r.cols;
  const View workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                         pass.ops.factor_workspace_bytes(d, o_.damp.factor));
  const View added = pass.arena.make(MemTag::solver, DType::f64, 1, 1);
  if (pass.dry()) return "ok";
  double share = o_.damp.share;
  for (int attempt = 1; attempt <= o_.damp.tries; ++attempt, share *= 10) {
    pass.ops.damp_hessian(pass.hessian, permutation, 2.0 / static_cast<double>(pass.sequences),
                          share, r, dead, added);
    if (!pass.ops.factor_upper(r, workspace)) continue;
    pass.ops.download(added, host_view(&damping, 1, 1));
    return attempt == 1 ? "ok" : damped_outcome(share, attempt);
  }
  throw damping_failed(pass, o_.damp);
}

std::vector<SiteResult> Gptq::quantize_group(GroupPass& pass) {
  Ops& ops = pass.ops;
  const GridSpec& spec = o_.spec;
  const std::int64_t d = pass.sites.front().weight.cols;
  const std::int64_t groups = spec.groups(d);
  std::int64_t rows = 0;
  for (const SiteTask& t : pass.sites) rows += t.weight.rows;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };

  GptqProblem p;
  p.grid = spec;
  p.block = block();
  p.grids_given = spec.group == 0 || o_.static_groups;
  p.r = make(o_.damp.factor, d, d);
  const View diagonal = make(DType::f32, 1, d);
  const View dead = make(DType::u8, 1, d);          // in solving order
  const View dead_natural = make(DType::u8, 1, d);  // in the weight's own order
  const View permutation = o_.act_order ? make(DType::i32, 1, d) : View{};
  const bool plain_layout = o_.act_order && o_.static_groups;
  if (plain_layout) p.column_group = make(DType::i32, 1, d);

  ColumnOrder order;
  if (!pass.dry()) {
    order = column_order(ops, pass.hessian, pass.sequences, diagonal, o_.act_order);
    ops.upload(host_view(order.dead.data(), 1, d), dead_natural);
    if (o_.act_order) ops.upload(host_view(order.permutation.data(), 1, d), permutation);
  }
  double damping = 0;
  const std::string outcome = factor(pass, permutation, dead, p.r, damping);

  p.w = make(DType::f32, rows, d);
  p.scales = make(DType::f32, rows, groups);
  p.zeros = make(DType::i32, rows, groups);
  p.codes = make(DType::u8, rows, d);
  p.loss = make(DType::f64, rows, 1);
  const View plain_codes = plain_layout ? make(DType::u8, rows, d) : View{};
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                ops.gptq_workspace_bytes(rows, d, p.block, o_.damp.factor));
  std::vector<double> loss(static_cast<std::size_t>(rows));
  if (!pass.dry()) {
    std::int64_t at = 0;
    for (const SiteTask& t : pass.sites) {
      const View w = p.w.row_range(at, t.weight.rows);
      const View scales = p.scales.row_range(at, t.weight.rows);
      const View zeros = p.zeros.row_range(at, t.weight.rows);
      if (spec.group == 0) {
        // Per channel: from the original row, dead columns included.
        ops.find_grid(t.weight, spec, scales, zeros);
      } else if (o_.static_groups) {
        // All grids up front, in the original order, with dead columns zeroed.
        ops.gather_columns(t.weight, View{}, dead_natural, w);
        ops.find_grid(w, spec, scales, zeros);
      }
      ops.gather_columns(t.weight, permutation, dead, w);
      at += t.weight.rows;
    }
    if (plain_layout) {
      std::vector<std::int32_t> unit(order.permutation);
      for (std::int32_t& u : unit) u /= static_cast<std::int32_t>(spec.group);
      ops.upload(host_view(unit.data(), 1, d), p.column_group);
      ops.synchronize();
    }
    ops.gptq_sweep(p);
    ops.download(p.loss, host_view(loss.data(), rows, 1));
    if (plain_layout) {
      // Static groups are fixed in the weight's own order, so the codes can go back to it.
      std::vector<std::int32_t> inverse(static_cast<std::size_t>(d));
      for (std::int64_t j = 0; j < d; ++j) {
        inverse[static_cast<std::size_t>(order.permutation[static_cast<std::size_t>(j)])] =
            static_cast<std::int32_t>(j);
      }
      ops.upload(host_view(inverse.data(), 1, d), permutation);
      ops.synchronize();
      ops.gather_columns(p.codes, permutation, View{}, plain_codes);
    }
  }

  const std::int64_t dead_columns =
      std::count(order.dead.begin(), order.dead.end(), std::uint8_t{1});
  std::vector<SiteResult> results;
  std::int64_t at = 0;
  for (const SiteTask& t : pass.sites) {
    const std::int64_t n = t.weight.rows;
    AffineCodes c{.spec = spec,
                  .codes = (plain_layout ? plain_codes : p.codes).row_range(at, n),
                  .scales = p.scales.row_range(at, n),
                  .zeros = p.zeros.row_range(at, n),
                  .permutation = {}};
    if (o_.act_order && !plain_layout) {
      c.permutation = make_view(order.permutation.data(), DType::i32, DeviceKind::cpu, 1, d);
    }
    SiteResult r = encode_affine(pass, c);
    r.outcome = outcome;
    r.details["loss"] = std::accumulate(loss.begin() + at, loss.begin() + at + n, 0.0);
    r.details["damping"] = damping;
    r.details["dead_columns"] = dead_columns;
    results.push_back(std::move(r));
    at += n;
  }
  return results;
}

}  // namespace

std::unique_ptr<Method> make_gptq() { return std::make_unique<Gptq>(); }

}  // namespace engine
