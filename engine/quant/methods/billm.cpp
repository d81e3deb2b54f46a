// BiLLM (Huang et al., ICML 2024): in every block of columns a few salient ones are binarized
// twice, the other weights once, in two groups that a magnitude divides; each block's error is
// moved onto the columns after it (docs/methods/billm.md).
//   B(x, M) = mu + a sign(x - mu),  mu = mean_M(x),  a = mean_M |x - mu|     per row and block
//   w^ = B(w) + B(w - B(w)) on salient columns, B(w) on concentrated and on sparse weights
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <span>

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

// As pack_codes_plane for bits on the device, which packs them. scratch: u8 [1, any], at least the
// packed bytes.
OwnedPlane pack_bits(GroupPass& pass, const View& bits, const View& scratch,
                     const std::string& role) {
  OwnedPlane out;
  out.plane = {role, DType::u8, 1, bits.rows, bits.cols, {}};
  const std::int64_t bytes = out.plane.raw_bytes();
  out.bytes.resize(static_cast<std::size_t>(bytes));
  out.plane.data = make_view(out.bytes.data(), DType::u8, DeviceKind::cpu, 1, bytes);
  const View packed = scratch.col_range(0, bytes);
  pass.ops.pack_codes(bits, 1, packed.reshape(bits.rows, out.plane.row_bytes()));
  pass.ops.download(packed, out.plane.data);
  return out;
}

// Clears the bits of `columns` in every row, and counts those that are left.
std::int64_t clear_columns(OwnedPlane& plane, std::span<const std::int32_t> columns) {
  const auto row_bytes = static_cast<std::size_t>(plane.plane.row_bytes());
  std::vector<std::byte> kept(row_bytes, std::byte{0xFF});
  for (const std::int32_t j : columns) {
    kept[static_cast<std::size_t>(j / 8)] &= ~(std::byte{1} << (j % 8));
  }
  std::int64_t left = 0;
  for (std::size_t row = 0; row < plane.bytes.size(); row += row_bytes) {
    for (std::size_t i = 0; i < row_bytes; ++i) {
      std::byte& bits = plane.bytes[row + i];
      bits &= kept[i];
      left += std::popcount(std::to_integer<unsigned>(bits));
    }
  }
  return left;
}

// The planes of one linear, as they come.
class Planes {
 public:
  explicit Planes(SiteResult& result) : r_(result) {}
  int add(OwnedPlane owned) {
    r_.small.push_back(std::move(owned.bytes));
    return append(std::move(owned.plane));
  }
  int describe(const char* role, DType dtype, int bits, std::int64_t rows, std::int64_t cols) {
    return append(
        {.role = role, .dtype = dtype, .bits = bits, .rows = rows, .cols = cols, .data = {}});
  }

 private:
  int append(Plane plane) {
    r_.weight.planes.push_back(std::move(plane));
    return static_cast<int>(r_.weight.planes.size()) - 1;
  }
  SiteResult& r_;
};

class Billm final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "billm"; }
  [[nodiscard]] const char* summary() const override {
    return "binarization: salient columns twice, the rest in two groups";
  }

  void declare_options(CLI::App& app) override {
    add_choice<BillmMetric>(
        app, "--metric", o_.metric,
        {{"hessian", BillmMetric::hessian}, {"magnitude", BillmMetric::magnitude}},
        "What columns are ranked by: w^2 / U_jj^2 of the inverse Hessian's factor, or |w|");
    add_choice<BillmSearch>(
        app, "--search", o_.search,
        {{"saliency", BillmSearch::saliency}, {"weight", BillmSearch::weight}},
        "Whose reconstruction decides on salient columns and break point: the ranked values' "
        "(official code) or the weights' (paper)");
    app.add_option("--rest-passes", o_.rest_passes,
                   "Passes over the other columns while salient ones are searched: 2 (official "
                   "code) or 1 (paper)")
        ->capture_default_str();
    app.add_option("--max-salient", o_.max_salient, "Salient columns of a block, at most")
        ->capture_default_str();
    app.add_flag("--no-mean", no_mean_, "Binarize without a mean, as the paper writes it");
    app.add_option("--block", o_.block,
                   "Columns per block, 2 to 128; scales and means are per row and block")
        ->capture_default_str();
    add_choice<DType>(app, "--scale-dtype", o_.scale_dtype,
                      {{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}},
                      "How scales and means are stored; they are rounded before use");
    declare_damp_options(app, damp_);
  }

  void check(const ModelConfig& config) const override {
    if (o_.block < 2 || o_.block > billm_max_block) {
      throw Error(ErrorCode::usage,
                  "--block: expected 2 to 128, found " + std::to_string(o_.block));
    }
    for (const Site s : all_sites) {
      const std::int64_t cols = site_shape(config, s).cols;
      if (cols % o_.block != 0) {
        throw Error(ErrorCode::usage, "--block: expected a divisor of " + std::to_string(cols) +
                                          " (the inputs of " + site_name(s) + "), found " +
                                          std::to_string(o_.block));
      }
    }
    if (o_.max_salient < 1) {
      throw Error(ErrorCode::usage, "--max-salient: expected a positive number, found " +
                                        std::to_string(o_.max_salient));
    }
    if (o_.rest_passes != 1 && o_.rest_passes != 2) {
      throw Error(ErrorCode::usage,
                  "--rest-passes: expected 1 or 2, found " + std::to_string(o_.rest_passes));
    }
    check_damp_options(damp_);
  }

  [[nodiscard]] Json options() const override {
    Json j;
    j["metric"] = o_.metric == BillmMetric::hessian ? "hessian" : "magnitude";
    j["search"] = o_.search == BillmSearch::saliency ? "saliency" : "weight";
    j["rest_passes"] = o_.rest_passes;
    j["max_salient"] = o_.max_salient;
    j["mean"] = !no_mean_;
    j["block"] = o_.block;
    j["scale_dtype"] = dtype_name(o_.scale_dtype);
    damp_options(damp_, j);
    return j;
  }

  [[nodiscard]] Needs needs() const override { return {.hessian = true}; }

  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  SiteResult quantize_site(GroupPass& pass, const SiteTask& task, const DampedFactor& factor) const;
  void encode(GroupPass& pass, const BillmProblem& p, SiteResult& r) const;

  BillmProblem o_;  // the options; its views stay empty
  bool no_mean_ = false;
  DampOptions damp_;
};

std::vector<SiteResult> Billm::quantize_group(GroupPass& pass) {
  const DampedFactor factor = factor_hessian(pass, damp_);
  std::vector<SiteResult> results;
  for (const SiteTask& task : pass.sites) results.push_back(quantize_site(pass, task, factor));
  return results;
}

SiteResult Billm::quantize_site(GroupPass& pass, const SiteTask& task,
                                const DampedFactor& factor) const {
  const Arena::Scope scope(pass.arena);
  const std::int64_t rows = task.weight.rows, d = task.weight.cols, units = d / o_.block;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };
  BillmProblem p = o_;
  p.with_mean = !no_mean_;
  p.r = factor.r;
  p.w = make(DType::f32, rows, d);
  p.first = make(DType::u8, rows, d);
  p.second = make(DType::u8, rows, d);
  p.salient = make(DType::u8, 1, d);
  p.percent = make(DType::i32, 1, units);
  for (View& v : p.scales) v = make(DType::f32, rows, units);
  for (View& v : p.means) v = make(DType::f32, rows, units);
  p.loss = make(DType::f64, rows, 1);
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                pass.ops.billm_workspace_bytes(rows, d, p.block, factor.r.dtype));
  if (!pass.dry()) {
    pass.ops.gather_columns(task.weight, View{}, factor.dead, p.w);
    pass.ops.billm_sweep(p);
  }

  SiteResult r;
  encode(pass, p, r);
  if (pass.dry()) return r;
  std::vector<double> loss(static_cast<std::size_t>(rows));
  pass.ops.download(p.loss, host_view(loss.data(), rows, 1));
  r.outcome = factor.outcome;
  r.details["loss"] = std::accumulate(loss.begin(), loss.end(), 0.0);
  r.details["damping"] = factor.damping;
  r.details["dead_columns"] = factor.dead_columns;
  return r;
}

void Billm::encode(GroupPass& pass, const BillmProblem& p, SiteResult& r) const {
  const std::int64_t rows = p.w.rows, d = p.w.cols, units = d / p.block;
  r.weight.rows = rows;
  r.weight.cols = d;
  Planes planes(r);

  // Three terms read `signs`; the second bits of salient columns are the residual's own plane.
  int signs = -1, sparse = -1, columns = -1, residual = -1;
  const Arena::Scope scope(pass.arena);
  const View packed = pass.arena.make(MemTag::solver, DType::u8, 1, rows * ((d + 7) / 8));
  const View order = pass.arena.make(MemTag::solver, DType::i32, 1, d);
  if (pass.dry()) {
    signs = planes.describe("signs", DType::u8, 1, rows, d);
    sparse = planes.describe("sparse", DType::u8, 1, rows, d);
    columns = planes.describe("salient_columns", DType::i32, 0, 1, units);
    residual = planes.describe("residual_signs", DType::u8, 1, rows, units);
  } else {
    const Buffer flags = to_host(pass, p.salient);
    const auto* flag = flags.view().host<std::uint8_t>();
    std::vector<std::int32_t> ids(static_cast<std::size_t>(d));
    std::iota(ids.begin(), ids.end(), 0);
    const auto rest =
        std::stable_partition(ids.begin(), ids.end(), [&](std::int32_t j) { return flag[j] != 0; });
    const std::int64_t n = rest - ids.begin();
    const std::span<const std::int32_t> salient(ids.begin(), rest);
    signs = planes.add(pack_bits(pass, p.first, packed, "signs"));
    OwnedPlane second = pack_bits(pass, p.second, packed, "sparse");
    const std::int64_t sparse_count = clear_columns(second, salient);
    sparse = planes.add(std::move(second));
    columns = planes.add(indices_plane(salient, "salient_columns"));
    // The first bits are packed: their place takes the second ones with the salient columns first.
    pass.ops.upload(host_view(ids.data(), 1, d), order);
    pass.ops.gather_columns(p.second, order, View{}, p.first);
    residual = planes.add(pack_bits(pass, p.first.col_range(0, n), packed, "residual_signs"));
    r.details["salient_share"] = static_cast<double>(n) / static_cast<double>(d);
    r.details["sparse_share"] =
        static_cast<double>(sparse_count) / (static_cast<double>(rows) * static_cast<double>(d));
  }

  const auto coefficients = [&](const View& v, const char* role) {
    return pass.dry() ? planes.describe(role, p.scale_dtype, 0, rows, units)
                      : planes.add(floats_plane(to_host(pass, v).view(), p.scale_dtype, role));
  };
  const auto add_term = [&](BillmGroup group, int codes, const Support& support) {
    static constexpr std::array<const char*, billm_groups> scale_roles = {
        "concentrated_scales", "sparse_scales", "salient_scales", "residual_scales"};
    static constexpr std::array<const char*, billm_groups> mean_roles = {
        "concentrated_means", "sparse_means", "salient_means", "residual_means"};
    Term term;
    term.kind = TermKind::sign;
    term.bits = 1;
    term.codes_plane = codes;
    term.grid.kind = GridKind::group;
    term.grid.group = p.block;
    term.grid.scale_plane = coefficients(p.scales[group], scale_roles[group]);
    if (p.with_mean) term.mu_plane = coefficients(p.means[group], mean_roles[group]);
    term.support = support;
    r.weight.terms.push_back(term);
  };
  Support on_columns;
  on_columns.columns = Select::in;
  on_columns.columns_plane = columns;
  Support on_sparse;
  on_sparse.columns = Select::not_in;
  on_sparse.columns_plane = columns;
  on_sparse.bitmap = Select::in;
  on_sparse.bitmap_plane = sparse;
  Support on_rest = on_sparse;
  on_rest.bitmap = Select::not_in;
  add_term(billm_salient, signs, on_columns);
  add_term(billm_sparse, signs, on_sparse);
  add_term(billm_concentrated, signs, on_rest);
  on_columns.compact = true;
  add_term(billm_residual, residual, on_columns);
}

}  // namespace

std::unique_ptr<Method> make_billm() { return std::make_unique<Billm>(); }

}  // namespace engine
