// PB-LLM (Shang et al., ICLR 2024), its post-training form: a small share of salient weights in 8
// bits, the others binarized, GPTQ's compensation over both (docs/methods/pbllm.md).
//   salient: S_ij > t,  S_ij = w_ij^2 / U_jj^2,  t an order statistic of S over a group of columns
//   salient:  w^ = s (clamp(rne(w / s) + z, 0, 255) - z), one grid per row
//   others:   w^ = mu + a sign(w - mu), per row and group
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "engine/core/args.h"
#include "engine/quant/damped_factor.h"
#include "engine/quant/method.h"
#include "engine/weight/codec.h"

namespace engine {
namespace {

// A device matrix in host memory that the ledger counts.
Buffer to_host(GroupPass& pass, const View& device) {
  Buffer host(host_memory(), pass.ledger, MemTag::staging, device.dtype, device.rows, device.cols);
  pass.ops.download(device, host.view());
  return host;
}

int describe_plane(SiteResult& r, const char* role, DType dtype, int bits, std::int64_t rows,
                   std::int64_t cols) {
  r.weight.planes.push_back(
      {.role = role, .dtype = dtype, .bits = bits, .rows = rows, .cols = cols, .data = {}});
  return static_cast<int>(r.weight.planes.size()) - 1;
}

int add_plane(SiteResult& r, OwnedPlane owned) {
  r.small.push_back(std::move(owned.bytes));
  r.weight.planes.push_back(std::move(owned.plane));
  return static_cast<int>(r.weight.planes.size()) - 1;
}

class Pbllm final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "pbllm"; }
  [[nodiscard]] const char* summary() const override {
    return "partial binarization: a few salient weights in 8 bits, the rest in one";
  }

  void declare_options(CLI::App& app) override {
    auto* bits = app.add_option("--bits", bits_,
                                "Nominal bits: salient weights in --high-bits, the others in one; "
                                "sets the salient share");
    bits->capture_default_str();
    app.add_option("--salient", salient_, "The salient share itself, above 0 and at most 1")
        ->excludes(bits);
    app.add_option("--high-bits", high_.bits, "Bits of a salient weight, 2 to 8")
        ->capture_default_str();
    add_choice<PbllmMetric>(
        app, "--metric", metric_,
        {{"hessian", PbllmMetric::hessian}, {"magnitude", PbllmMetric::magnitude}},
        "What weights are ranked by: w^2 / U_jj^2 of the inverse Hessian's factor, or |w|");
    app.add_option("--group", group_,
                   "Columns per mean and scale of the binarized weights, and per choice of salient "
                   "ones; 0: whole rows")
        ->capture_default_str();
    app.add_flag("--no-compensation", no_compensation_,
                 "Round every weight as it is, without moving errors onto later columns");
    app.add_option("--block", block_, "Columns per block of the sweep, 1 to 128")
        ->capture_default_str();
    add_choice<DType>(app, "--scale-dtype", high_.scale_dtype,
                      {{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}},
                      "How scales and means are stored; they are rounded before use");
    declare_damp_options(app, damp_);
  }

  void check(const ModelConfig& config) const override {
    if (high_.bits < 2 || high_.bits > 8) {
      throw Error(ErrorCode::usage,
                  "--high-bits: expected 2 to 8, found " + std::to_string(high_.bits));
    }
    // A share that rounds to none would leave no weight salient.
    const bool some = 1.0 - salient_share() < 1.0;
    if (salient_) {
      if (!(some && *salient_ > 0 && *salient_ <= 1)) {
        throw Error(ErrorCode::usage, "--salient: expected a share above 0 and at most 1, found " +
                                          std::to_string(*salient_));
      }
    } else if (!(some && bits_ > 1 && bits_ <= high_.bits)) {
      throw Error(ErrorCode::usage, "--bits: expected above 1 and at most --high-bits " +
                                        std::to_string(high_.bits) + ", found " +
                                        std::to_string(bits_));
    }
    if (block_ < 1 || block_ > 128) {
      throw Error(ErrorCode::usage, "--block: expected 1 to 128, found " + std::to_string(block_));
    }
    if (group_ < 0) {
      throw Error(ErrorCode::usage,
                  "--group: expected 0 or a positive number, found " + std::to_string(group_));
    }
    for (const Site s : all_sites) {
      const std::int64_t cols = site_shape(config, s).cols;
      if (group_ != 0 && cols % group_ != 0) {
        throw Error(ErrorCode::usage, "--group: expected a divisor of " + std::to_string(cols) +
                                          " (the inputs of " + site_name(s) + "), found " +
                                          std::to_string(group_));
      }
    }
    check_damp_options(damp_);
  }

  [[nodiscard]] Json options() const override {
    Json j;
    j["bits"] = 1.0 + salient_share() * (high_.bits - 1);
    j["salient"] = salient_share();
    j["high_bits"] = high_.bits;
    j["metric"] = metric_ == PbllmMetric::hessian ? "hessian" : "magnitude";
    j["group"] = group_;
    j["compensation"] = !no_compensation_;
    j["block"] = block_;
    j["scale_dtype"] = dtype_name(high_.scale_dtype);
    damp_options(damp_, j);
    return j;
  }

  [[nodiscard]] Needs needs() const override { return {.hessian = true}; }

  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  [[nodiscard]] double salient_share() const {
    return salient_ ? *salient_ : (bits_ - 1.0) / (high_.bits - 1);
  }
  void select(GroupPass& pass, const SiteTask& task, const DampedFactor& factor,
              const PbllmProblem& rows) const;
  SiteResult encode(GroupPass& pass, const PbllmProblem& rows) const;

  double bits_ = 1.7;
  std::optional<double> salient_;  // else from bits_
  GridSpec high_{.bits = 8, .group = 0};
  PbllmMetric metric_ = PbllmMetric::hessian;
  std::int64_t group_ = 0;
  bool no_compensation_ = false;
  std::int64_t block_ = 128;
  DampOptions damp_;
};

// The rows of one linear out of the tap's.
PbllmProblem rows_of(const PbllmProblem& p, std::int64_t first, std::int64_t n) {
  PbllmProblem out = p;
  for (View* v : {&out.w, &out.salient, &out.means, &out.scales, &out.high_scales, &out.high_zeros,
                  &out.codes, &out.loss}) {
    *v = v->row_range(first, n);
  }
  return out;
}

std::vector<SiteResult> Pbllm::quantize_group(GroupPass& pass) {
  const DampedFactor factor = factor_hessian(pass, damp_);
  const std::int64_t d = pass.sites.front().weight.cols, groups = group_ == 0 ? 1 : d / group_;
  std::int64_t rows = 0;
  for (const SiteTask& t : pass.sites) rows += t.weight.rows;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };
  PbllmProblem p;
  p.high = high_;
  p.block = block_;
  p.compensate = !no_compensation_;
  p.r = factor.r;
  p.w = make(DType::f32, rows, d);
  p.salient = make(DType::u8, rows, d);
  p.means = make(DType::f32, rows, groups);
  p.scales = make(DType::f32, rows, groups);
  p.high_scales = make(DType::f32, rows, 1);
  p.high_zeros = make(DType::i32, rows, 1);
  p.codes = make(DType::u8, rows, d);
  p.loss = make(DType::f64, rows, 1);

  std::int64_t at = 0;
  for (const SiteTask& t : pass.sites) {
    select(pass, t, factor, rows_of(p, at, t.weight.rows));
    at += t.weight.rows;
  }
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                pass.ops.pbllm_workspace_bytes(rows, d, block_, factor.r.dtype));
  std::vector<double> loss(static_cast<std::size_t>(rows));
  if (!pass.dry()) {
    pass.ops.pbllm_sweep(p);
    pass.ops.download(p.loss, host_view(loss.data(), rows, 1));
  }

  std::vector<SiteResult> results;
  at = 0;
  for (const SiteTask& t : pass.sites) {
    const std::int64_t n = t.weight.rows;
    SiteResult r = encode(pass, rows_of(p, at, n));
    r.outcome = factor.outcome;
    r.details["loss"] = std::accumulate(loss.begin() + at, loss.begin() + at + n, 0.0);
    r.details["damping"] = factor.damping;
    r.details["dead_columns"] = factor.dead_columns;
    results.push_back(std::move(r));
    at += n;
  }
  return results;
}

// The 8-bit grids come from the weights as they are, all else with dead columns zeroed.
void Pbllm::select(GroupPass& pass, const SiteTask& task, const DampedFactor& factor,
                   const PbllmProblem& rows) const {
  const Arena::Scope scope(pass.arena);
  PbllmSelect s;
  s.metric = metric_;
  s.group = group_;
  s.low_share = 1.0 - salient_share();
  s.scale_dtype = high_.scale_dtype;
  s.w = rows.w;
  s.r = factor.r;
  s.salient = rows.salient;
  s.means = rows.means;
  s.scales = rows.scales;
  s.workspace =
      pass.arena.make(MemTag::workspace, DType::u8, 1,
                      pass.ops.pbllm_select_bytes(rows.w.rows, rows.w.cols, rows.means.cols));
  if (pass.dry()) return;
  pass.ops.find_grid(task.weight, high_, rows.high_scales, rows.high_zeros);
  pass.ops.gather_columns(task.weight, View{}, factor.dead, rows.w);
  pass.ops.pbllm_select(s);
}

// Packs codes on the device, one plane after the other, into the result's buffer.
class DevicePacker {
 public:
  // packed: u8 [1, any], scratch for the largest plane. `bytes`: of all planes.
  DevicePacker(GroupPass& pass, SiteResult& r, View packed, std::int64_t bytes)
      : pass_(pass), r_(r), packed_(packed) {
    if (!pass.dry()) {
      r_.codes = Buffer(host_memory(), pass.ledger, MemTag::staging, DType::u8, 1, bytes);
    }
  }

  int add(const View& codes, int bits, const char* role) {
    const int index = describe_plane(r_, role, DType::u8, bits, codes.rows, codes.cols);
    if (pass_.dry()) return index;
    Plane& p = r_.weight.planes.back();
    const View packed = packed_.col_range(0, p.raw_bytes());
    p.data = r_.codes.view().col_range(written_, p.raw_bytes());
    p.data.stride = p.raw_bytes();
    written_ += p.raw_bytes();
    pass_.ops.pack_codes(codes, bits, packed.reshape(codes.rows, p.row_bytes()));
    pass_.ops.download(packed, p.data);
    return index;
  }

 private:
  GroupPass& pass_;
  SiteResult& r_;
  View packed_;
  std::int64_t written_ = 0;
};

// Signs off a bitmap and bytes on it, both compact. Only the data tells how many of each there are;
// a dry run describes any numbers, which no use of the weight takes memory for.
SiteResult Pbllm::encode(GroupPass& pass, const PbllmProblem& p) const {
  const std::int64_t rows = p.w.rows, d = p.w.cols, count = rows * d;
  SiteResult r;
  r.weight.rows = rows;
  r.weight.cols = d;
  const Arena::Scope scope(pass.arena);
  const auto make = [&](DType dtype, std::int64_t cols) {
    return pass.arena.make(MemTag::solver, dtype, 1, cols);
  };
  const View split = make(DType::u8, count), packed = make(DType::u8, count);
  const View ones = make(DType::i32, 1);
  const View workspace = make(DType::u8, pass.ops.pbllm_split_bytes(rows, d));
  std::int64_t high = 1;
  if (!pass.dry()) {
    pass.ops.pbllm_split(p.salient, p.codes, split, ones, workspace);
    std::int32_t found = 0;
    pass.ops.download(ones, host_view(&found, 1, 1));
    high = found;
    r.details["salient_share"] = static_cast<double>(high) / static_cast<double>(count);
  }
  const auto bytes = [](std::int64_t n, int bits) {
    return static_cast<std::int64_t>(
        packed_row_bytes(static_cast<std::uint64_t>(n), static_cast<unsigned>(bits)));
  };
  const std::int64_t low_bytes = high > 0 ? bytes(count - high, 1) : rows * bytes(d, 1);
  const std::int64_t high_bytes = high > 0 ? rows * bytes(d, 1) + bytes(high, p.high.bits) : 0;
  DevicePacker packer(pass, r, packed, low_bytes + high_bytes);
  const DType dtype = p.high.scale_dtype;
  const auto add_floats = [&](const View& values, const char* role) {
    return pass.dry() ? describe_plane(r, role, dtype, 0, values.rows, values.cols)
                      : add_plane(r, floats_plane(to_host(pass, values).view(), dtype, role));
  };

  const int bitmap = high > 0 ? packer.add(p.salient, 1, "salient_bitmap") : -1;
  Term low;
  low.kind = TermKind::sign;
  low.bits = 1;
  low.grid.kind = group_ == 0 ? GridKind::row : GridKind::group;
  low.grid.group = group_;
  if (high > 0) {
    low.support = {.bitmap = Select::not_in, .bitmap_plane = bitmap, .compact = true};
    low.codes_plane = packer.add(split.col_range(0, count - high), 1, "signs");
  } else {
    low.codes_plane = packer.add(p.codes, 1, "signs");
  }
  low.grid.scale_plane = add_floats(p.scales, "scales");
  low.mu_plane = add_floats(p.means, "means");
  r.weight.terms.push_back(low);
  if (high == 0) return r;

  Term top;
  top.kind = TermKind::affine;
  top.bits = p.high.bits;
  top.support = {.bitmap = Select::in, .bitmap_plane = bitmap, .compact = true};
  top.codes_plane = packer.add(split.col_range(count - high, high), p.high.bits, "salient_codes");
  top.grid.kind = GridKind::row;
  top.grid.scale_plane = add_floats(p.high_scales, "salient_scales");
  top.grid.zero_plane =
      pass.dry() ? describe_plane(r, "zeros", DType::u8, p.high.bits, rows, 1)
                 : add_plane(r, pack_zeros(to_host(pass, p.high_zeros).view(), p.high.bits));
  r.weight.terms.push_back(top);
  return r;
}

}  // namespace

std::unique_ptr<Method> make_pbllm() { return std::make_unique<Pbllm>(); }

}  // namespace engine
