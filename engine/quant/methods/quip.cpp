// QuIP (Chee et al., NeurIPS 2023): weight and second moment in random orthogonal bases, then every
// column rounded to one grid with linear feedback from the errors so far (docs/methods/quip.md).
//   W~ = L W diag(s) R^T,  H~ = R diag(1/s) H diag(1/s) R^T;  H~ = C C^T, C lower
//   k_i = clamp(floor(w_i + sum over j > i of (w_j - k_j) C_ji / C_ii + 1/2)), i from the last on
//   W^ = L^T (scale (k - (2^b - 1) / 2)) R diag(1/s)
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "engine/core/args.h"
#include "engine/core/dtype.h"
#include "engine/ops/transform_view.h"
#include "engine/quant/damped_factor.h"
#include "engine/quant/encode.h"
#include "engine/quant/method.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

enum class Rotation { butterfly, kronecker, plain_butterfly, none };
enum class Order { last_first, sorted };

constexpr double projection_damp = 0.01;  // added where the basis changes, besides --damp
constexpr double smallest = 1e-8;         // of the official code's clamps

struct Options {
  int bits = 2;
  bool per_row = false;
  Rotation rotation = Rotation::butterfly;
  std::uint64_t seed = 0;
  bool no_rescale = false;
  DType diagonal_dtype = DType::f16;
  double rho = 2.4;
  Order order = Order::last_first;
  int passes = 0;
  DampOptions damp;
};

struct Transforms {
  Transform left, right;
};

class Quip final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "quip"; }
  [[nodiscard]] const char* summary() const override {
    return "random rotations of inputs and outputs, then rounding with linear feedback";
  }

  void declare_options(CLI::App& app) override;
  void check(const ModelConfig& config) const override;
  [[nodiscard]] Json options() const override;
  [[nodiscard]] Needs needs() const override { return {.hessian = true}; }
  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  // The diagonal of the tap's second moment.
  struct Moments {
    std::vector<float> diagonal;
    double largest = 0;
  };
  // A linear on its way, W [m, n].
  struct Work {
    const SiteTask& task;
    const Moments& moments;
    Transforms transforms;
    std::vector<float> diagonal;  // 1 / s as stored; empty without rescale
    std::vector<std::int32_t> order;
    View w;              // f32 [m, n]
    View other;          // f32 [n, m]: w transposed, later the targets [m, n]
    View r;              // the factor of the damped moment, in solving order
    View greedy_h;       // f32 [n, n], the damped moment in solving order; for greedy passes only
    View scales, zeros;  // f32 and i32, [1, 1] or [m, 1]; zeros empty: midrise
    View permutation;    // i32 [1, n]
    double damping = 0;
    std::string outcome = "ok";
  };

  [[nodiscard]] bool rotated() const { return o_.rotation != Rotation::none; }
  [[nodiscard]] GridSpec grid() const { return {.bits = o_.bits, .group = 0}; }
  [[nodiscard]] Transforms transforms(std::int64_t layer, Site site) const;
  SiteResult quantize(GroupPass& pass, const SiteTask& task, const Moments& moments) const;
  void rescale(GroupPass& pass, Work& work) const;
  void change_basis(GroupPass& pass, Work& work) const;
  void scale_moment(GroupPass& pass, const Work& work, const View& h) const;
  void set_order(GroupPass& pass, Work& work, const View& h) const;
  void factor(GroupPass& pass, Work& work, const View& h) const;
  void find_grid(GroupPass& pass, Work& work) const;
  int descend(GroupPass& pass, const Work& work, const LdlqProblem& solved) const;
  void add_basis(GroupPass& pass, const Work& work, SiteResult& r) const;

  Options o_;
};

void Quip::declare_options(CLI::App& app) {
  app.add_option("--bits", o_.bits, "Bits per weight, 2 to 8")->capture_default_str();
  add_choice<bool>(app, "--grid", o_.per_row, {{"tensor", false}, {"row", true}},
                   "One symmetric grid for the whole matrix, or GPTQ's min-max grid for each row");
  add_choice<Rotation>(app, "--transform", o_.rotation,
                       {{"butterfly", Rotation::butterfly},
                        {"kronecker", Rotation::kronecker},
                        {"plain-butterfly", Rotation::plain_butterfly},
                        {"none", Rotation::none}},
                       "Random rotations of inputs and outputs: blocks of their own, one block for "
                       "all (a Kronecker product), without permutations, or no rotation");
  app.add_option("--transform-seed", o_.seed, "Seed of the rotations")->capture_default_str();
  app.add_flag("--no-rescale", o_.no_rescale,
               "Leave out the diagonal that balances the columns of weight and second moment");
  add_choice<DType>(app, "--diagonal-dtype", o_.diagonal_dtype,
                    {{"f16", DType::f16}, {"f32", DType::f32}},
                    "How that diagonal is stored; it is rounded before use");
  app.add_option("--rho", o_.rho, "Half the width of the tensor's grid, in root mean squares")
      ->capture_default_str();
  add_choice<Order>(app, "--order", o_.order,
                    {{"ldlq", Order::last_first}, {"ldlqRG", Order::sorted}},
                    "Columns from the last to the first, or by decreasing diagonal of the moment");
  app.add_option("--passes", o_.passes, "Greedy passes after the sweep, 0 to 100")
      ->capture_default_str();
  declare_damp_options(app, o_.damp);
}

void Quip::check(const ModelConfig& config) const {
  if (o_.bits < 2 || o_.bits > 8) {
    throw Error(ErrorCode::usage, "--bits: expected 2 to 8, found " + std::to_string(o_.bits));
  }
  if (!(o_.rho > 0) || !std::isfinite(o_.rho)) {
    throw Error(ErrorCode::usage,
                "--rho: expected a positive number, found " + std::to_string(o_.rho));
  }
  if (o_.passes < 0 || o_.passes > 100) {
    throw Error(ErrorCode::usage,
                "--passes: expected 0 to 100, found " + std::to_string(o_.passes));
  }
  if (o_.seed >> 63U != 0) {
    throw Error(ErrorCode::usage,
                "--transform-seed: expected less than 2^63, found " + std::to_string(o_.seed));
  }
  check_damp_options(o_.damp);
  if (o_.rotation == Rotation::none) return;
  for (const Site s : all_sites) {
    const SiteShape shape = site_shape(config, s);
    for (const std::int64_t d : {shape.rows, shape.cols}) {
      if (!has_butterfly(d)) {
        throw Error(ErrorCode::usage,
                    "--transform: expected none, because " + std::to_string(d) + " (a side of " +
                        site_name(s) + ") is too large or has no factors up to " +
                        std::to_string(max_butterfly_side) + ", found a butterfly");
      }
    }
  }
}

Json Quip::options() const {
  constexpr const char* rotations[] = {"butterfly", "kronecker", "plain-butterfly", "none"};
  Json j;
  j["bits"] = o_.bits;
  j["grid"] = o_.per_row ? "row" : "tensor";
  j["transform"] = rotations[static_cast<std::size_t>(o_.rotation)];
  j["transform_seed"] = o_.seed;
  j["rescale"] = !o_.no_rescale;
  j["diagonal_dtype"] = dtype_name(o_.diagonal_dtype);
  j["rho"] = o_.rho;
  j["order"] = o_.order == Order::sorted ? "ldlqRG" : "ldlq";
  j["passes"] = o_.passes;
  damp_options(o_.damp, j);
  return j;
}

Transforms Quip::transforms(std::int64_t layer, Site site) const {
  if (o_.rotation == Rotation::none) return {};
  Transform t;
  t.kind = TransformKind::butterfly;
  t.seed = o_.seed;
  t.shared = o_.rotation == Rotation::kronecker;
  t.permuted = o_.rotation != Rotation::plain_butterfly;
  const auto linear =
      static_cast<std::uint64_t>(layer) * site_count + static_cast<std::uint64_t>(site);
  Transforms out{.left = t, .right = t};
  out.right.stream = 2 * linear;
  out.left.stream = 2 * linear + 1;
  return out;
}

std::vector<SiteResult> Quip::quantize_group(GroupPass& pass) {
  const std::int64_t d = pass.sites.front().weight.cols;
  Moments moments;
  moments.diagonal.resize(static_cast<std::size_t>(d));
  {
    const Arena::Scope scope(pass.arena);
    const View diagonal = pass.arena.make(MemTag::solver, DType::f32, 1, d);
    if (!pass.dry()) {
      pass.ops.diagonal(pass.hessian, diagonal);
      pass.ops.download(diagonal, host_view(moments.diagonal.data(), 1, d));
      // No element of a second moment is larger than the largest of its diagonal.
      moments.largest = *std::max_element(moments.diagonal.begin(), moments.diagonal.end());
      if (!(moments.largest > 0) || !std::isfinite(moments.largest)) {
        throw Error(ErrorCode::numeric, "layers." + std::to_string(pass.layer) + " " +
                                            tap_name(pass.tap) +
                                            ": the inputs are all zero or not finite");
      }
    }
  }
  std::vector<SiteResult> results;
  for (const SiteTask& t : pass.sites) results.push_back(quantize(pass, t, moments));
  return results;
}

SiteResult Quip::quantize(GroupPass& pass, const SiteTask& task, const Moments& moments) const {
  Ops& ops = pass.ops;
  const Arena::Scope scope(pass.arena);
  const std::int64_t m = task.weight.rows, n = task.weight.cols;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };
  Work work{.task = task,
            .moments = moments,
            .transforms = transforms(pass.layer, task.site),
            .diagonal = {},
            .order = {},
            .w = make(DType::f32, m, n),
            .other = make(DType::f32, n, m),
            .r = make(o_.damp.factor, n, n),
            .greedy_h = o_.passes > 0 ? make(DType::f32, n, n) : View{},
            .scales = make(DType::f32, o_.per_row ? m : 1, 1),
            .zeros = o_.per_row ? make(DType::i32, m, 1) : View{},
            .permutation = make(DType::i32, 1, n)};
  rescale(pass, work);
  change_basis(pass, work);
  find_grid(pass, work);

  LdlqProblem p;
  p.bits = o_.bits;
  p.w = work.other.reshape(m, n);
  p.r = work.r;
  p.codes = make(DType::u8, m, n);
  p.loss = make(DType::f64, m, 1);
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1, ops.ldlq_workspace_bytes(m, n));
  const View codes = make(DType::u8, m, n);
  std::vector<double> loss(static_cast<std::size_t>(m));
  if (!pass.dry()) {
    ops.code_targets(work.w, work.permutation, work.scales, work.zeros, o_.bits, p.w);
    ops.ldlq_sweep(p);
    ops.download(p.loss, host_view(loss.data(), m, 1));
  }
  const int passes = o_.passes > 0 ? descend(pass, work, p) : 0;
  if (!pass.dry()) {
    std::vector<std::int32_t> inverse(work.order.size());
    for (std::size_t j = 0; j < inverse.size(); ++j) {
      inverse[static_cast<std::size_t>(work.order[j])] = static_cast<std::int32_t>(j);
    }
    ops.upload(host_view(inverse.data(), 1, n), work.permutation);
    ops.synchronize();
    ops.gather_columns(p.codes, work.permutation, View{}, codes);
  }

  SiteResult r = encode_affine(pass, {.spec = grid(),
                                      .codes = codes,
                                      .scales = work.scales,
                                      .zeros = work.zeros,
                                      .permutation = {},
                                      .midrise = !o_.per_row});
  add_basis(pass, work, r);
  r.outcome = work.outcome;
  // Greedy passes lower it further.
  r.details[o_.passes > 0 ? "sweep_loss" : "loss"] = std::accumulate(loss.begin(), loss.end(), 0.0);
  r.details["damping"] = work.damping;
  if (o_.passes > 0) r.details["passes"] = passes;
  return r;
}

// w = W diag(s), s = (a / c)^(1/4) with a = diag(H) / max and c the columns' sums of squares. What
// is stored is 1 / s, so that is rounded first and s follows from it.
void Quip::rescale(GroupPass& pass, Work& work) const {
  Ops& ops = pass.ops;
  const Arena::Scope scope(pass.arena);
  const View weight = work.task.weight;
  const std::int64_t n = weight.cols;
  const View dead = pass.arena.make(MemTag::solver, DType::u8, 1, n);
  const View sums = pass.arena.make(MemTag::solver, DType::f64, 1, n);
  const View factors = pass.arena.make(MemTag::solver, DType::f32, 1, n);
  if (pass.dry()) return;
  const std::vector<float>& moments = work.moments.diagonal;
  std::vector<std::uint8_t> dead_host(moments.size(), 0);
  if (!rotated()) {
    // Where nothing mixes the columns, one that is never fed is dropped.
    for (std::size_t j = 0; j < moments.size(); ++j) dead_host[j] = moments[j] == 0.0F ? 1 : 0;
  }
  ops.upload(host_view(dead_host.data(), 1, n), dead);
  ops.gather_columns(weight, View{}, dead, work.w);
  if (!o_.no_rescale) {
    std::vector<double> squares(moments.size());
    ops.column_squares(work.w, sums);
    ops.download(sums, host_view(squares.data(), 1, n));
    std::vector<float> s(moments.size());
    work.diagonal.resize(moments.size());
    for (std::size_t j = 0; j < moments.size(); ++j) {
      const double a = std::max(static_cast<double>(moments[j]) / work.moments.largest, smallest);
      const double ratio = std::sqrt(std::sqrt(a / std::max(squares[j], smallest)));
      work.diagonal[j] =
          round_to(o_.diagonal_dtype, static_cast<float>(1.0 / std::max(ratio, smallest)));
      s[j] = 1.0F / work.diagonal[j];
    }
    ops.upload(host_view(s.data(), 1, n), factors);
    ops.scale_weights(work.w, factors, View{}, work.w);
    ops.synchronize();
  }
  ops.synchronize();
}

// The rotations of w and of the moment, then what follows from the moment: order and factor.
void Quip::change_basis(GroupPass& pass, Work& work) const {
  Ops& ops = pass.ops;
  const Arena::Scope scope(pass.arena);
  const std::int64_t m = work.task.weight.rows, n = work.task.weight.cols;
  const auto view_of = [&](const Transform& t, std::int64_t d) {
    return make_transform_view(ops, pass.arena, MemTag::solver, t, {}, d, 0);
  };
  View h = pass.arena.make(MemTag::solver, DType::f32, n, n);
  scale_moment(pass, work, h);
  if (rotated()) {
    const View turned = pass.arena.make(MemTag::solver, DType::f32, n, n);
    const TransformView right = view_of(work.transforms.right, n);
    const TransformView left = view_of(work.transforms.left, m);
    if (!pass.dry()) {
      ops.transform_rows(work.w, right, false, work.w);  // w R^T
      ops.transpose(work.w, work.other);
      ops.transform_rows(work.other, left, false, work.other);  // (L w R^T)^T
      ops.transpose(work.other, work.w);
      ops.transform_rows(h, right, false, h);  // h R^T = (R h)^T
      ops.transpose(h, turned);
      ops.transform_rows(turned, right, false, turned);  // R h R^T
    }
    h = turned;
  }
  set_order(pass, work, h);
  factor(pass, work, h);
}

// diag(1/s) H diag(1/s), both triangles, with a mean diagonal of 1 if it will be rotated.
void Quip::scale_moment(GroupPass& pass, const Work& work, const View& h) const {
  const Arena::Scope scope(pass.arena);
  const View factors =
      o_.no_rescale ? View{} : pass.arena.make(MemTag::solver, DType::f32, 1, h.cols);
  if (pass.dry()) return;
  double scale = 1.0 / (o_.no_rescale ? static_cast<double>(pass.sequences) : work.moments.largest);
  if (rotated()) {
    double trace = 0;
    for (std::size_t j = 0; j < work.moments.diagonal.size(); ++j) {
      const double f = o_.no_rescale ? 1.0 : static_cast<double>(work.diagonal[j]);
      trace += f * f * static_cast<double>(work.moments.diagonal[j]);
    }
    scale = static_cast<double>(h.cols) / trace;
  }
  if (!o_.no_rescale) pass.ops.upload(host_view(work.diagonal.data(), 1, h.cols), factors);
  pass.ops.scale_moment(pass.hessian, factors, scale, h);
  pass.ops.synchronize();
}

// The solving order: the last column first, of the weight's own columns or of those sorted by
// increasing diagonal of the moment.
void Quip::set_order(GroupPass& pass, Work& work, const View& h) const {
  const Arena::Scope scope(pass.arena);
  const View diagonal = pass.arena.make(MemTag::solver, DType::f32, 1, h.cols);
  if (pass.dry()) return;
  work.order.resize(static_cast<std::size_t>(h.cols));
  std::iota(work.order.begin(), work.order.end(), 0);
  if (o_.order == Order::sorted) {
    std::vector<float> host(work.order.size());
    pass.ops.diagonal(h, diagonal);
    pass.ops.download(diagonal, host_view(host.data(), 1, h.cols));
    std::stable_sort(work.order.begin(), work.order.end(), [&](std::int32_t a, std::int32_t b) {
      return host[static_cast<std::size_t>(a)] < host[static_cast<std::size_t>(b)];
    });
  }
  std::reverse(work.order.begin(), work.order.end());
  pass.ops.upload(host_view(work.order.data(), 1, h.cols), work.permutation);
  pass.ops.synchronize();
}

void Quip::factor(GroupPass& pass, Work& work, const View& h) const {
  const Arena::Scope scope(pass.arena);
  const std::int64_t n = h.cols;
  const View workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                         pass.ops.factor_workspace_bytes(n, o_.damp.factor));
  const View dead = pass.arena.make(MemTag::solver, DType::u8, 1, n);
  const View added = pass.arena.make(MemTag::solver, DType::f64, 1, 1);
  if (pass.dry()) return;
  double share = o_.damp.share;
  for (int attempt = 1; attempt <= o_.damp.tries; ++attempt, share *= 10) {
    // The second damping sees the first in the diagonal.
    const double damp = rotated() ? projection_damp + share * (1.0 + projection_damp) : share;
    pass.ops.damp_hessian(h, work.permutation, 1.0, damp, work.r, dead, added);
    if (!pass.ops.factor_upper(work.r, workspace)) continue;
    if (o_.passes > 0) {
      pass.ops.damp_hessian(h, work.permutation, 1.0, damp, work.greedy_h, dead, added);
    }
    pass.ops.download(added, host_view(&work.damping, 1, 1));
    if (attempt > 1) work.outcome = damped_outcome(share, attempt);
    return;
  }
  throw damping_failed(pass, o_.damp);
}

void Quip::find_grid(GroupPass& pass, Work& work) const {
  const Arena::Scope scope(pass.arena);
  const View sums = pass.arena.make(MemTag::solver, DType::f64, 1, 2);
  if (pass.dry()) return;
  if (o_.per_row) {
    pass.ops.find_grid(work.w, grid(), work.scales, work.zeros);
    return;
  }
  double host[2];
  pass.ops.square_sums(work.w, work.w, sums);
  pass.ops.download(sums, host_view(host, 1, 2));
  const double sigma = o_.rho * std::sqrt(host[1] / static_cast<double>(work.w.count())) + 1e-16;
  const auto scale = static_cast<float>(2.0 * sigma / grid().max_code());
  pass.ops.upload(host_view(&scale, 1, 1), work.scales);
  pass.ops.synchronize();
}

// Greedy passes until one changes nothing; returns how many ran.
int Quip::descend(GroupPass& pass, const Work& work, const LdlqProblem& solved) const {
  const Arena::Scope scope(pass.arena);
  const std::int64_t m = solved.w.rows;
  GreedyProblem p;
  p.bits = o_.bits;
  p.e = solved.w;
  p.h = work.greedy_h;
  p.codes = solved.codes;
  p.changed = pass.arena.make(MemTag::solver, DType::i32, m, 1);
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                pass.ops.greedy_workspace_bytes(m, solved.w.cols));
  if (pass.dry()) return 0;
  std::vector<std::int32_t> changed(static_cast<std::size_t>(m));
  for (int i = 1; i < o_.passes; ++i) {
    pass.ops.ldlq_greedy(p);
    pass.ops.download(p.changed, host_view(changed.data(), m, 1));
    if (std::all_of(changed.begin(), changed.end(), [](std::int32_t n) { return n == 0; }))
      return i;
  }
  pass.ops.ldlq_greedy(p);
  return o_.passes;
}

// What turns the codes' matrix back into the weight: rotations and diagonal.
void Quip::add_basis(GroupPass& pass, const Work& work, SiteResult& r) const {
  r.weight.left = work.transforms.left;
  r.weight.right = work.transforms.right;
  if (o_.no_rescale) return;
  r.weight.diagonal_plane = static_cast<int>(r.weight.planes.size());
  if (pass.dry()) {
    r.weight.planes.push_back({.role = "diagonal",
                               .dtype = o_.diagonal_dtype,
                               .bits = 0,
                               .rows = 1,
                               .cols = r.weight.cols,
                               .data = {}});
    return;
  }
  OwnedPlane plane = floats_plane(host_view(work.diagonal.data(), 1, r.weight.cols),
                                  o_.diagonal_dtype, "diagonal");
  r.small.push_back(std::move(plane.bytes));
  r.weight.planes.push_back(std::move(plane.plane));
}

}  // namespace

std::unique_ptr<Method> make_quip() { return std::make_unique<Quip>(); }

}  // namespace engine
