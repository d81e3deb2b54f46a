// QuIP# (Tseng et al., ICML 2024): weights and second moment in bases turned by random signs and
// Hadamard matrices, then 8 weights at a time rounded to points of a lattice, with feedback from
// the errors so far (docs/methods/quipsharp.md).
//   W~ = L W R^T / scale,  H~ = R H R^T + damping I,  L = H_m^T diag(signs), R = H_n^T diag(signs)
//   W^ = L^T (scale (point + residual point / magnification)) R
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "engine/core/args.h"
#include "engine/ops/transform_view.h"
#include "engine/quant/damped_factor.h"
#include "engine/quant/method.h"
#include "engine/weight/codec.h"
#include "engine/weight/e8_search.h"

namespace engine {
namespace {

enum class CalibrationStream { original, quantized };

constexpr std::int64_t code_columns = lattice_columns;

// A device matrix in host memory that the ledger counts.
Buffer to_host(GroupPass& pass, const View& device) {
  Buffer host(host_memory(), pass.ledger, MemTag::staging, device.dtype, device.rows, device.cols);
  pass.ops.download(device, host.view());
  return host;
}

int add_plane(SiteResult& r, OwnedPlane owned) {
  r.small.push_back(std::move(owned.bytes));
  r.weight.planes.push_back(std::move(owned.plane));
  return static_cast<int>(r.weight.planes.size()) - 1;
}

int describe_plane(SiteResult& r, const char* role, DType dtype, int bits, std::int64_t rows,
                   std::int64_t cols) {
  r.weight.planes.push_back(
      {.role = role, .dtype = dtype, .bits = bits, .rows = rows, .cols = cols, .data = {}});
  return static_cast<int>(r.weight.planes.size()) - 1;
}

// The linears of one tap, their rows below each other.
struct Work {
  View reversal;  // i32 [1, d]: d - 1, ..., 0
  TransformView right;
  std::vector<float> right_signs;
  QuipSharpProblem sweep;
  View scales;  // f32 [sites, 1]
  double damping = 0;
  std::string outcome = "ok";
};

class QuipSharp final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "quipsharp"; }
  [[nodiscard]] const char* summary() const override {
    return "Hadamard rotations, then lattice points of 8 weights with feedback (E8P codebook)";
  }
  void declare_options(CLI::App& app) override;
  void check(const ModelConfig& config) const override;
  [[nodiscard]] Json options() const override;
  [[nodiscard]] Needs needs() const override {
    return {.hessian = true, .original_stream = stream_ == CalibrationStream::original};
  }
  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  [[nodiscard]] double scale_factor() const {
    if (scale_factor_ > 0) return scale_factor_;
    return bits_ == 2 ? 0.9 : bits_ == 3 ? 0.98 : 1.03;
  }
  // The signs of a transform, +1 and -1: one stream for each layer and tap (inputs) or site
  // (outputs).
  [[nodiscard]] std::vector<float> signs(std::int64_t layer, std::int64_t place,
                                         std::int64_t d) const;
  void rotate_moment(GroupPass& pass, Work& work) const;
  void rotate_weights(GroupPass& pass, const Work& work) const;
  SiteResult encode(GroupPass& pass, const SiteTask& task, const Work& work, std::int64_t first,
                    float scale) const;

  int bits_ = 2;
  double scale_factor_ = 0;
  int tuning_ = 10;
  std::uint64_t seed_ = 0;
  CalibrationStream stream_ = CalibrationStream::original;
  DampOptions damp_{.option = "--sigma-reg"};
};

void QuipSharp::declare_options(CLI::App& app) {
  app.add_option("--bits", bits_,
                 "Bits per weight: 2 (E8P), 3 (E8P and a byte of E8) or 4 (E8P twice)")
      ->capture_default_str();
  app.add_option("--scale-factor", scale_factor_,
                 "Root mean square of the rotated weights in units of the points; 0: 0.9 at 2 "
                 "bits, 0.98 at 3, 1.03 at 4")
      ->capture_default_str();
  app.add_option("--tune-iters", tuning_, "Passes over all columns after the first, 0 to 100")
      ->capture_default_str();
  app.add_option("--sigma-reg", damp_.share, "Added to H's diagonal, as a share of its mean")
      ->capture_default_str();
  app.add_option("--damp-tries", damp_.tries,
                 "Factorisations to try, each with ten times --sigma-reg; 1: a failure is an error")
      ->capture_default_str();
  add_choice<DType>(app, "--factor", damp_.factor, {{"f64", DType::f64}, {"f32", DType::f32}},
                    "Precision of the Cholesky factor");
  app.add_option("--transform-seed", seed_, "Seed of the random signs")->capture_default_str();
  add_choice<CalibrationStream>(
      app, "--calibration-stream", stream_,
      {{"original", CalibrationStream::original}, {"quantized", CalibrationStream::quantized}},
      "Whose outputs the next block is calibrated with: the original block's or the quantized "
      "one's");
}

void QuipSharp::check(const ModelConfig& config) const {
  if (bits_ < 2 || bits_ > 4) {
    throw Error(ErrorCode::usage, "--bits: expected 2, 3 or 4, found " + std::to_string(bits_));
  }
  if (!(scale_factor_ >= 0 && scale_factor_ <= 100)) {
    throw Error(ErrorCode::usage,
                "--scale-factor: expected 0, or a positive number up to 100, "
                "found " +
                    std::to_string(scale_factor_));
  }
  if (tuning_ < 0 || tuning_ > 100) {
    throw Error(ErrorCode::usage,
                "--tune-iters: expected 0 to 100, found " + std::to_string(tuning_));
  }
  if (!(damp_.share > 0) || !std::isfinite(damp_.share)) {
    throw Error(ErrorCode::usage,
                "--sigma-reg: expected a positive number, found " + std::to_string(damp_.share));
  }
  if (seed_ >> 63U != 0) {
    throw Error(ErrorCode::usage,
                "--transform-seed: expected less than 2^63, found " + std::to_string(seed_));
  }
  check_damp_options(damp_);
  for (const Site s : all_sites) {
    const auto shape = site_shape(config, s);
    for (const std::int64_t d : {shape.rows, shape.cols}) {
      if (hadamard_order(d) == 0) {
        throw Error(ErrorCode::usage,
                    "--method quipsharp: expected sizes that a Hadamard matrix is known for "
                    "(docs/weights.md), found " +
                        std::to_string(d) + " (" + site_name(s) + ")");
      }
    }
    if (shape.cols % code_columns != 0) {
      throw Error(ErrorCode::usage, "--method quipsharp: expected a multiple of 8 inputs, found " +
                                        std::to_string(shape.cols) + " (" + site_name(s) + ")");
    }
  }
}

Json QuipSharp::options() const {
  Json j;
  j["bits"] = bits_;
  j["scale_factor"] = scale_factor();
  j["tune_iters"] = tuning_;
  j["sigma_reg"] = damp_.share;
  j["damp_tries"] = damp_.tries;
  j["factor"] = dtype_name(damp_.factor);
  j["transform_seed"] = seed_;
  j["calibration_stream"] = stream_ == CalibrationStream::original ? "original" : "quantized";
  return j;
}

std::vector<float> QuipSharp::signs(std::int64_t layer, std::int64_t place, std::int64_t d) const {
  const auto stream = static_cast<std::uint64_t>(layer * 16 + place);
  std::vector<float> out(static_cast<std::size_t>(d));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const Philox4 random = philox(seed_, stream, i / 128);
    out[i] = (random.v[i % 128 / 32] >> (i % 32) & 1U) != 0 ? -1.0F : 1.0F;
  }
  return out;
}

std::vector<SiteResult> QuipSharp::quantize_group(GroupPass& pass) {
  Ops& ops = pass.ops;
  const std::int64_t d = pass.sites.front().weight.cols;
  const auto count = static_cast<std::int64_t>(pass.sites.size());
  std::int64_t rows = 0;
  for (const SiteTask& t : pass.sites) rows += t.weight.rows;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };
  Work work;
  QuipSharpProblem& p = work.sweep;
  p.bits = bits_;
  p.tuning = tuning_;
  work.reversal = make(DType::i32, 1, d);
  work.scales = make(DType::f32, count, 1);
  p.w = make(DType::f32, rows, d);
  p.codes = make(DType::i16, rows, d / code_columns);
  if (bits_ > 2) p.residual = make(bits_ == 3 ? DType::u8 : DType::i16, rows, d / code_columns);
  p.loss = make(DType::f64, rows, 1);

  const Transform hadamard{.kind = TransformKind::hadamard};
  if (!pass.dry()) work.right_signs = signs(pass.layer, static_cast<std::int64_t>(pass.tap), d);
  work.right =
      make_transform_view(ops, pass.arena, MemTag::solver, hadamard, work.right_signs, d, 0);
  rotate_weights(pass, work);
  {
    const Arena::Scope scope(pass.arena);
    p.r = make(damp_.factor, d, d);
    p.h = make(DType::f32, d, d);
    rotate_moment(pass, work);
    p.e = make(DType::f32, rows, d);
    p.workspace =
        pass.arena.make(MemTag::workspace, DType::u8, 1, ops.quipsharp_workspace_bytes(rows, d));
    if (!pass.dry()) ops.quipsharp_sweep(p);
  }
  std::vector<double> loss(static_cast<std::size_t>(rows));
  std::vector<float> scales(pass.sites.size());
  if (!pass.dry()) {
    ops.download(p.loss, host_view(loss.data(), rows, 1));
    ops.download(work.scales, host_view(scales.data(), count, 1));
  }

  std::vector<SiteResult> results;
  std::int64_t at = 0;
  for (std::size_t i = 0; i < pass.sites.size(); ++i) {
    const std::int64_t n = pass.sites[i].weight.rows;
    SiteResult r = encode(pass, pass.sites[i], work, at, scales[i]);
    const double scale = static_cast<double>(scales[i]);
    r.outcome = work.outcome;
    r.details["loss"] =
        scale * scale * std::accumulate(loss.begin() + at, loss.begin() + at + n, 0.0);
    r.details["damping"] = work.damping;
    results.push_back(std::move(r));
    at += n;
  }
  return results;
}

// Each linear in its own basis of outputs, in units of the points and in solving order.
void QuipSharp::rotate_weights(GroupPass& pass, const Work& work) const {
  Ops& ops = pass.ops;
  std::int64_t first = 0;
  for (std::size_t i = 0; i < pass.sites.size(); ++i) {
    const Arena::Scope scope(pass.arena);
    const SiteTask& task = pass.sites[i];
    const std::int64_t m = task.weight.rows, n = task.weight.cols;
    const View transposed = pass.arena.make(MemTag::solver, DType::f32, n, m);
    const View sums = pass.arena.make(MemTag::solver, DType::f64, 1, 2);
    const std::vector<float> s =
        pass.dry() ? std::vector<float>{}
                   : signs(pass.layer, tap_count + static_cast<std::int64_t>(task.site), m);
    const TransformView left = make_transform_view(ops, pass.arena, MemTag::solver,
                                                   {.kind = TransformKind::hadamard}, s, m, 0);
    if (!pass.dry()) {
      const View w = work.sweep.w.row_range(first, m);
      ops.transform_rows(task.weight, work.right, false, w);  // W R^T
      ops.transpose(w, transposed);
      ops.transform_rows(transposed, left, false, transposed);  // (L W R^T)^T
      ops.square_sums(transposed, transposed, sums);
      ops.quipsharp_targets(transposed, sums.col_range(1, 1), scale_factor(), w,
                            work.scales.row_range(static_cast<std::int64_t>(i), 1));
    }
    first += m;
  }
}

// sweep.h and sweep.r from R H R^T, damped, in solving order.
void QuipSharp::rotate_moment(GroupPass& pass, Work& work) const {
  Ops& ops = pass.ops;
  const Arena::Scope scope(pass.arena);
  const std::int64_t d = work.sweep.r.cols;
  const View turned = pass.arena.make(MemTag::solver, DType::f32, d, d);
  const View workspace =
      pass.arena.make(MemTag::workspace, DType::u8, 1, ops.factor_workspace_bytes(d, damp_.factor));
  const View dead = pass.arena.make(MemTag::solver, DType::u8, 1, d);
  const View added = pass.arena.make(MemTag::solver, DType::f64, 1, 1);
  if (pass.dry()) return;
  std::vector<std::int32_t> order(static_cast<std::size_t>(d));
  std::iota(order.rbegin(), order.rend(), 0);
  ops.upload(host_view(order.data(), 1, d), work.reversal);
  const View h = work.sweep.h;
  ops.scale_moment(pass.hessian, View{}, 1.0 / static_cast<double>(pass.sequences), h);
  ops.transform_rows(h, work.right, false, h);  // H R^T = (R H)^T
  ops.transpose(h, turned);
  ops.transform_rows(turned, work.right, false, turned);  // R H R^T
  double share = damp_.share;
  for (int attempt = 1; attempt <= damp_.tries; ++attempt, share *= 10) {
    ops.damp_hessian(turned, work.reversal, 1.0, share, work.sweep.r, dead, added);
    if (!ops.factor_upper(work.sweep.r, workspace)) continue;
    ops.damp_hessian(turned, work.reversal, 1.0, share, h, dead, added);
    ops.download(added, host_view(&work.damping, 1, 1));
    if (attempt > 1) work.outcome = damped_outcome(share, attempt);
    return;
  }
  throw damping_failed(pass, damp_);
}

SiteResult QuipSharp::encode(GroupPass& pass, const SiteTask& task, const Work& work,
                             std::int64_t first, float scale) const {
  SiteResult r;
  const std::int64_t m = task.weight.rows, n = task.weight.cols, codes = n / code_columns;
  r.weight.rows = m;
  r.weight.cols = n;
  const auto add_term = [&](LatticeBook book, const View& device, float term_scale,
                            const char* role, const char* scale_role) {
    const bool bytes = book == LatticeBook::e8_byte;
    Term term;
    term.kind = TermKind::lattice;
    term.bits = bytes ? 1 : 2;
    term.lattice = book;
    term.grid.kind = GridKind::tensor;
    if (pass.dry()) {
      term.codes_plane =
          describe_plane(r, role, bytes ? DType::u8 : DType::i16, bytes ? 8 : 0, m, codes);
      term.grid.scale_plane = describe_plane(r, scale_role, DType::f32, 0, 1, 1);
    } else {
      const Buffer host = to_host(pass, device.row_range(first, m));
      OwnedPlane plane = lattice_codes_plane(host.view());
      plane.plane.role = role;
      term.codes_plane = add_plane(r, std::move(plane));
      term.grid.scale_plane =
          add_plane(r, floats_plane(host_view(&term_scale, 1, 1), DType::f32, scale_role));
    }
    r.weight.terms.push_back(term);
  };
  add_term(LatticeBook::e8p, work.sweep.codes, scale, "codes", "scales");
  if (bits_ > 2) {
    add_term(bits_ == 3 ? LatticeBook::e8_byte : LatticeBook::e8p, work.sweep.residual,
             scale / e8_residual_scale(bits_), "residual_codes", "residual_scales");
  }
  const auto add_transform = [&](Transform& t, std::int64_t d, const char* role,
                                 auto&& make_signs) {
    t.kind = TransformKind::hadamard;
    if (pass.dry()) {
      t.signs_plane = describe_plane(r, role, DType::u8, 1, 1, d);
      return;
    }
    OwnedPlane plane = signs_plane(make_signs());
    plane.plane.role = role;
    t.signs_plane = add_plane(r, std::move(plane));
  };
  add_transform(r.weight.left, m, "output_signs", [&] {
    return signs(pass.layer, tap_count + static_cast<std::int64_t>(task.site), m);
  });
  add_transform(r.weight.right, n, "input_signs", [&] { return work.right_signs; });
  return r;
}

}  // namespace

std::unique_ptr<Method> make_quipsharp() { return std::make_unique<QuipSharp>(); }

}  // namespace engine
