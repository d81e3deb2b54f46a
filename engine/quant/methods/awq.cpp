// AWQ (Lin et al., MLSys 2024): input channels with large activations are scaled up in the weight
// and down in what feeds it, then groups are clipped, then rounded (docs/methods/awq.md).
//   a_j = mean |X_j|;  s(r) = max(a^r, 1e-4) / sqrt(max s min s), r = 0, 0.05, .., 0.95
//   loss(r) = mean (f(X; W) - f(X; Q(W s) / s))^2,  f the attention, the MLP or one linear
//   clip(u) = arg min over c of mean (x_u . Q(clamp(w_u, c)) - x_u . w_u)^2
// Blocks are independent: each sees the original model's inputs.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/core/args.h"
#include "engine/core/interrupt.h"
#include "engine/quant/encode.h"
#include "engine/quant/grid_options.h"
#include "engine/quant/method.h"
#include "engine/weight/grid.h"

namespace engine {
namespace {

enum class Clip : std::uint8_t { symmetric, ends, none };
enum class Stride : std::uint8_t { official, coprime };

struct Options {
  GridSpec spec{.rule = GridRule::awq, .reciprocal = true};
  int ratios = 20;
  std::int64_t search_samples = 16;
  Clip clip = Clip::symmetric;
  int clip_steps = 20;
  double max_shrink = 0.5;
  std::int64_t clip_tokens = 512;
  Stride clip_stride = Stride::official;
};

[[noreturn]] void refuse(const char* option, const std::string& expected,
                         const std::string& found) {
  throw Error(ErrorCode::usage,
              std::string(option) + ": expected " + expected + ", found " + found);
}

void check_range(const char* option, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  refuse(option, std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
}

constexpr std::size_t at(Tap t) { return static_cast<std::size_t>(t); }

// What the search finds for the linears of one tap.
struct Choice {
  bool searched = false;
  int index = 0;             // r = index / ratios
  std::vector<double> loss;  // mean squared error of every ratio
  View scales;               // f32 [ratios, d]
  View chosen;               // f32 [1, d]: the row that won
};

class Awq final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "awq"; }
  [[nodiscard]] const char* summary() const override {
    return "activation-aware channel scales and clipping, then round to nearest";
  }

  void declare_options(CLI::App& app) override;
  void check(const ModelConfig& config) const override;
  [[nodiscard]] Json options() const override;
  [[nodiscard]] Needs needs() const override { return {.block = true, .original_stream = true}; }
  std::vector<SiteResult> quantize_block(BlockPass& pass) override;

 private:
  Options o_;
};

void Awq::declare_options(CLI::App& app) {
  declare_grid_options(app, o_.spec);
  add_choice<GridRule>(app, "--rule", o_.spec.rule,
                       {{"awq", GridRule::awq}, {"gptq", GridRule::gptq}},
                       "Grid rule: awq as the official code (V-A), gptq (V-G) for --sym and --mse");
  add_choice<DType>(app, "--arithmetic", o_.spec.arithmetic,
                    {{"f32", DType::f32}, {"f16", DType::f16}},
                    "f16: scales and grids are computed in half precision, as the official code "
                    "does on half-precision weights");
  add_choice<bool>(app, "--division", o_.spec.reciprocal, {{"reciprocal", true}, {"exact", false}},
                   "Step of a grid of rule awq: range times 1 / N, as the official code computes "
                   "on a GPU, or range over N");
  app.add_option("--ratios", o_.ratios,
                 "Exponents tried, r = i / RATIOS for i < RATIOS; 1: no scaling")
      ->capture_default_str();
  app.add_option("--search-samples", o_.search_samples,
                 "Calibration sequences that the losses of attention and MLP are measured on, "
                 "evenly chosen; 0: all")
      ->capture_default_str();
  add_choice<Clip>(
      app, "--clip", o_.clip,
      {{"sym", Clip::symmetric}, {"asym", Clip::ends}, {"none", Clip::none}},
      "Clip groups at [-c, c] (the official code), each end by the same share, or not at all");
  app.add_option("--clip-steps", o_.clip_steps, "Shrinkage is tried in steps of 1 / STEPS")
      ->capture_default_str();
  app.add_option("--max-shrink", o_.max_shrink, "Shrinkage stays below this share of the range")
      ->capture_default_str();
  app.add_option("--clip-tokens", o_.clip_tokens, "Tokens that clipping is measured on, at least")
      ->capture_default_str();
  add_choice<Stride>(app, "--clip-stride", o_.clip_stride,
                     {{"official", Stride::official}, {"coprime", Stride::coprime}},
                     "Distance of these tokens: tokens / CLIP-TOKENS, or the next below it that "
                     "shares no factor with --seq, so that all positions are met");
}

void Awq::check(const ModelConfig& config) const {
  check_grid_options(o_.spec, config);
  if (o_.spec.arithmetic == DType::f16 && o_.spec.scale_dtype == DType::bf16) {
    throw Error(ErrorCode::usage,
                "--arithmetic f16: expected --scale-dtype f32 or f16, found bf16");
  }
  check_range("--ratios", o_.ratios, 1, 1000);
  check_range("--search-samples", o_.search_samples, 0, std::numeric_limits<std::int32_t>::max());
  check_range("--clip-steps", o_.clip_steps, 1, 255);
  check_range("--clip-tokens", o_.clip_tokens, 1, std::int64_t{1} << 20);
  if (!(o_.max_shrink > 0 && o_.max_shrink <= 1)) {
    refuse("--max-shrink", "a number above 0, at most 1", std::to_string(o_.max_shrink));
  }
}

Json Awq::options() const {
  Json j = grid_options(o_.spec);
  j["division"] = o_.spec.rule == GridRule::awq && o_.spec.reciprocal ? "reciprocal" : "exact";
  j["ratios"] = o_.ratios;
  j["search_samples"] = o_.search_samples;
  j["clip"] = o_.clip == Clip::symmetric ? "sym" : o_.clip == Clip::ends ? "asym" : "none";
  j["clip_steps"] = o_.clip_steps;
  j["max_shrink"] = o_.max_shrink;
  j["clip_tokens"] = o_.clip_tokens;
  j["clip_stride"] = o_.clip_stride == Stride::official ? "official" : "coprime";
  return j;
}

// One block from its inputs to its packed linears. Everything made from the arena is made in a dry
// run, too.
class BlockSearch {
 public:
  BlockSearch(const Options& options, BlockPass& pass)
      : o_(options), pass_(pass), ops_(pass.ops), config_(pass.config) {
    const SiteShape v = site_shape(config_, Site::v), o = site_shape(config_, Site::o);
    scale_o_ = v.rows == o.rows && v.cols == o.cols;
  }

  std::vector<SiteResult> run() {
    for (const Tap tap : all_taps) {
      samples_[at(tap)] = make(MemTag::stats, DType::f32, sample_count(), width(tap));
      choice_[at(tap)].searched = tap != Tap::attn_out || scale_o_;
      if (choice_[at(tap)].searched) {
        choice_[at(tap)].chosen = make(MemTag::solver, DType::f32, 1, width(tap));
      }
    }
    {
      const Arena::Scope scope(pass_.arena);
      for (const Tap tap : all_taps) {
        if (choice_[at(tap)].searched) {
          choice_[at(tap)].scales = make(MemTag::solver, DType::f32, o_.ratios, width(tap));
        }
      }
      search_by_moments();
      search_by_outputs();
      for (Choice& c : choice_) decide(c);
    }
    fold_neighbours();
    std::vector<SiteResult> results;
    for (const Site s : all_sites) results.push_back(finish(s));
    return results;
  }

 private:
  [[nodiscard]] bool dry() const { return pass_.dry(); }
  [[nodiscard]] std::int64_t width(Tap t) const { return tap_width(config_, t); }
  [[nodiscard]] View weight(Site s) const { return pass_.stream.weights[s].dense; }
  View make(MemTag tag, DType dtype, std::int64_t rows, std::int64_t cols) {
    return pass_.arena.make(tag, dtype, rows, cols);
  }
  [[nodiscard]] DType dtype() const { return pass_.hidden.dtype; }

  // Every stride-th token, from the first on.
  [[nodiscard]] std::int64_t stride() const {
    std::int64_t n = std::max<std::int64_t>(pass_.tokens() / o_.clip_tokens, 1);
    if (o_.clip_stride == Stride::official) return n;
    while (std::gcd(n, pass_.stream.seq) != 1) --n;
    return n;
  }
  [[nodiscard]] std::int64_t sample_count() const {
    return (pass_.tokens() + stride() - 1) / stride();
  }
  [[nodiscard]] std::int64_t windows() const { return pass_.tokens() / pass_.stream.seq; }
  // Sequences that the losses of attention and MLP are measured on.
  [[nodiscard]] std::int64_t searched_windows() const {
    return o_.search_samples == 0 ? windows() : std::min(o_.search_samples, windows());
  }

  void search_by_moments();
  void search_by_outputs();
  [[nodiscard]] View gather_searched();
  void tabulate_scales(Tap tap, const View& abs_sums);
  void moment_losses(Tap tap, Site site, const View& moment);
  void keep_samples(Tap tap, const View& x, std::int64_t first_row);
  void decide(Choice& choice);
  void fold_neighbours();
  SiteResult finish(Site site);

  const Options& o_;
  BlockPass& pass_;
  Ops& ops_;
  const ModelConfig& config_;
  bool scale_o_ = false;  // the official code scales o only where v feeds it channel by channel
  std::array<View, tap_count> samples_;  // f32 [n, d]: the inputs that clipping is measured on
  std::array<Choice, tap_count> choice_;
};

// s(r) of every ratio, from the means of |x|. In f16 every operation is rounded to it.
void BlockSearch::tabulate_scales(Tap tap, const View& abs_sums) {
  Choice& c = choice_[at(tap)];
  const std::int64_t d = width(tap);
  c.loss.assign(static_cast<std::size_t>(o_.ratios), 0.0);
  const auto rounded = [&](float v) { return in_arithmetic(o_.spec, v); };
  std::vector<double> sums(static_cast<std::size_t>(d));
  ops_.download(abs_sums, host_view(sums.data(), 1, d));
  std::vector<float> table(static_cast<std::size_t>(d * o_.ratios));
  for (int i = 0; i < o_.ratios; ++i) {
    float* s = table.data() + i * d;
    const auto r = static_cast<float>(static_cast<double>(i) / static_cast<double>(o_.ratios));
    float lo = std::numeric_limits<float>::infinity(), hi = 0.0F;
    for (std::int64_t j = 0; j < d; ++j) {
      const auto mean = rounded(static_cast<float>(sums[static_cast<std::size_t>(j)] /
                                                   static_cast<double>(pass_.tokens())));
      s[j] = std::max(rounded(std::pow(mean, r)), rounded(1e-4F));
      lo = std::min(lo, s[j]);
      hi = std::max(hi, s[j]);
    }
    const float norm = rounded(std::sqrt(rounded(hi * lo)));
    for (std::int64_t j = 0; j < d; ++j) s[j] = rounded(s[j] / norm);
  }
  ops_.upload(host_view(table.data(), o_.ratios, d), c.scales);
  ops_.synchronize();
}

void BlockSearch::keep_samples(Tap tap, const View& x, std::int64_t first_row) {
  const std::int64_t step = stride(), n = (first_row + step - 1) / step;
  const std::int64_t skipped = n * step - first_row;
  if (skipped >= x.rows) return;
  View kept = x.row_range(skipped, 1);
  kept.rows = (x.rows - skipped + step - 1) / step;
  kept.stride = x.stride * step;
  ops_.convert(kept, samples_[at(tap)].row_range(n, kept.rows));
}

// One pass over the calibration data for the means of |x|, the second moments and the clip samples.
// Where the inspected module is a single linear its loss is tr(D H D^T), D = Q(W s) / s - W.
void BlockSearch::search_by_moments() {
  const Arena::Scope scope(pass_.arena);
  std::array<View, tap_count> means, moments;
  for (const Tap tap : all_taps) {
    if (!choice_[at(tap)].searched) continue;
    means[at(tap)] = make(MemTag::stats, DType::f64, 1, width(tap));
    if (!dry()) ops_.zero(means[at(tap)]);
    if (tap == Tap::attn_in || tap == Tap::mlp_in) continue;
    moments[at(tap)] = make(MemTag::stats, DType::f32, width(tap), width(tap));
    if (!dry()) ops_.zero(moments[at(tap)]);
  }
  if (!dry()) {
    std::int64_t first = 0;
    capture(
        pass_.stream, pass_.hidden, pass_.copy,
        [&](Tap tap, const View& x) {
          if (choice_[at(tap)].searched) ops_.add_abs_sums(x, means[at(tap)]);
          if (!moments[at(tap)].empty()) ops_.gram(x, moments[at(tap)]);
          if (o_.clip != Clip::none) keep_samples(tap, x, first);
          return tap != Tap::mlp_out;
        },
        [&](std::int64_t, const View& x) { first += x.rows; });
    for (const Tap tap : all_taps) {
      if (choice_[at(tap)].searched) tabulate_scales(tap, means[at(tap)]);
    }
  }
  if (scale_o_) moment_losses(Tap::attn_out, Site::o, moments[at(Tap::attn_out)]);
  moment_losses(Tap::mlp_out, Site::down, moments[at(Tap::mlp_out)]);
}

void BlockSearch::moment_losses(Tap tap, Site site, const View& moment) {
  const Arena::Scope scope(pass_.arena);
  const View w = weight(site);
  const View candidate = make(MemTag::solver, DType::f32, w.rows, w.cols);
  const View losses = make(MemTag::solver, DType::f64, 1, o_.ratios);
  const View workspace =
      make(MemTag::workspace, DType::u8, 1, ops_.moment_loss_bytes(w.rows, w.cols));
  if (dry()) return;
  Choice& c = choice_[at(tap)];
  const double count = static_cast<double>(pass_.tokens()) * static_cast<double>(w.rows);
  for (int i = 0; i < o_.ratios; ++i) {
    check_interrupt();
    ops_.round_trip_scaled(w, c.scales.row_range(i, 1), o_.spec, candidate);
    ops_.moment_loss(candidate, w, moment, losses.col_range(i, 1), workspace);
  }
  ops_.download(losses, host_view(c.loss.data(), 1, o_.ratios));
  for (double& l : c.loss) l /= count;
}

// The block's inputs of the searched sequences, evenly chosen.
View BlockSearch::gather_searched() {
  const std::int64_t n = searched_windows(), seq = pass_.stream.seq;
  if (n == windows()) return pass_.hidden;
  const View out = make(MemTag::hidden_stream, dtype(), n * seq, config_.hidden);
  if (dry()) return out;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t window = ((i + 1) * windows() + n - 1) / n - 1;
    ops_.copy(pass_.hidden.row_range(window * seq, seq), out.row_range(i * seq, seq));
  }
  return out;
}

// A second pass: the attention and the MLP with every candidate in place of their own weights. Of
// the searched sequences alone; the device is waited for once per batch and half.
void BlockSearch::search_by_outputs() {
  const Arena::Scope scope(pass_.arena);
  const StreamPass& stream = pass_.stream;
  const View expected = make(MemTag::activations, dtype(), pass_.copy.rows, config_.hidden);
  const View found = make(MemTag::activations, dtype(), pass_.copy.rows, config_.hidden);
  const View sums = make(MemTag::solver, DType::f64, o_.ratios, 2);
  const View inputs = gather_searched();
  BlockWeights candidate = stream.weights;
  for (const Site s : {Site::q, Site::k, Site::v, Site::gate, Site::up}) {
    const SiteShape shape = site_shape(config_, s);
    candidate[s].dense = make(MemTag::solver, dtype(), shape.rows, shape.cols);
  }
  if (dry()) return;
  const auto losses = [&](Tap tap, const View& x) {
    BlockRun run = stream.run;
    run.batch = x.rows / stream.seq;
    const View want = expected.row_range(0, x.rows), got = found.row_range(0, x.rows);
    const auto half = [&](const BlockWeights& w, const View& out) {
      (tap == Tap::attn_in ? llama_attention : llama_mlp)(run, w, stream.scratch, x, out, false,
                                                          {});
    };
    half(stream.weights, want);
    Choice& c = choice_[at(tap)];
    for (int i = 0; i < o_.ratios; ++i) {
      check_interrupt();
      for (const Site s : all_sites) {
        if (tap_of(s) != tap) continue;
        ops_.round_trip_scaled(weight(s), c.scales.row_range(i, 1), o_.spec, candidate[s].dense);
      }
      half(candidate, got);
      ops_.square_sums(want, got, sums.row_range(i, 1));
    }
    std::vector<double> host(2 * c.loss.size());
    ops_.download(sums, host_view(host.data(), o_.ratios, 2));
    for (std::size_t i = 0; i < c.loss.size(); ++i) c.loss[i] += host[2 * i];
  };
  capture(stream, inputs, pass_.copy,
          [&](Tap tap, const View& x) {
            if (tap == Tap::attn_in || tap == Tap::mlp_in) losses(tap, x);
            return tap != Tap::mlp_in;
          },
          {});
  const double count = static_cast<double>(inputs.rows) * static_cast<double>(config_.hidden);
  for (const Tap tap : {Tap::attn_in, Tap::mlp_in}) {
    for (double& l : choice_[at(tap)].loss) l /= count;
  }
}

// The first of the smallest losses.
void BlockSearch::decide(Choice& c) {
  if (!c.searched || dry()) return;
  for (int i = 0; i < o_.ratios; ++i) {
    const double loss = c.loss[static_cast<std::size_t>(i)];
    if (!std::isfinite(loss)) {
      throw Error(ErrorCode::numeric, "layers." + std::to_string(pass_.layer) +
                                          ": the scale search met outputs that are not finite");
    }
    if (loss < c.loss[static_cast<std::size_t>(c.index)]) c.index = i;
  }
  ops_.copy(c.scales.row_range(c.index, 1), c.chosen);
}

// Norms and clip samples are divided by the scales of what they feed. Linears take theirs, and
// their followers', when their turn comes.
void BlockSearch::fold_neighbours() {
  const std::int64_t n = config_.hidden;
  const View inverse = make(MemTag::solver, DType::f32, 1, std::max(n, width(Tap::mlp_out)));
  if (dry()) return;
  pass_.norms_changed = true;
  for (const Tap tap : {Tap::attn_in, Tap::mlp_in}) {
    const View norm = (tap == Tap::attn_in ? pass_.attn_norm : pass_.mlp_norm).reshape(n, 1);
    ops_.scale_weights(norm, View{}, choice_[at(tap)].chosen, norm);
  }
  if (o_.clip == Clip::none) return;
  for (const Tap tap : all_taps) {
    const Choice& c = choice_[at(tap)];
    if (!c.searched) continue;
    const std::int64_t d = width(tap);
    std::vector<float> s(static_cast<std::size_t>(d));
    ops_.download(c.chosen, host_view(s.data(), 1, d));
    for (float& v : s) v = 1.0F / v;
    ops_.upload(host_view(s.data(), 1, d), inverse.col_range(0, d));
    ops_.synchronize();
    ops_.scale_weights(samples_[at(tap)], inverse.col_range(0, d), View{}, samples_[at(tap)]);
  }
}

// Scales, clips and rounds one linear.
SiteResult BlockSearch::finish(Site site) {
  const Arena::Scope scope(pass_.arena);
  const GridSpec& spec = o_.spec;
  const Tap tap = tap_of(site);
  const Choice& c = choice_[at(tap)];
  const View original = weight(site);
  const std::int64_t rows = original.rows, cols = original.cols, groups = spec.groups(cols);
  const View w = make(MemTag::solver, spec.arithmetic, rows, cols);
  const View scales = make(MemTag::solver, DType::f32, rows, groups);
  const View zeros = make(MemTag::solver, DType::i32, rows, groups);
  const View codes = make(MemTag::solver, DType::u8, rows, cols);
  const bool clips = o_.clip != Clip::none && site != Site::q && site != Site::k;
  std::vector<float> loss, plain;
  std::vector<std::uint8_t> bounds;

  if (!dry()) {
    View divisors;
    if (site == Site::v && scale_o_) divisors = choice_[at(Tap::attn_out)].chosen;
    if (site == Site::up) divisors = choice_[at(Tap::mlp_out)].chosen;
    ops_.scale_weights(original, c.chosen, divisors, w);
  }
  const View folded = make(MemTag::solver, spec.arithmetic, rows, cols);
  const View sums = make(MemTag::solver, DType::f64, 1, 2);
  if (!dry()) ops_.copy(w, folded);
  if (clips) {
    const Arena::Scope clip_scope(pass_.arena);
    AwqClipProblem p;
    p.grid = spec;
    p.steps = o_.clip_steps;
    p.candidates = std::max(1, static_cast<int>(o_.max_shrink * o_.clip_steps));
    p.ends = o_.clip == Clip::ends;
    p.w = w;
    p.x = samples_[at(tap)];
    p.choice = make(MemTag::solver, DType::u8, rows, groups);
    p.loss = make(MemTag::solver, DType::f32, rows, groups);
    p.plain_loss = make(MemTag::solver, DType::f32, rows, groups);
    p.workspace = make(MemTag::workspace, DType::u8, 1,
                       ops_.awq_clip_bytes(rows, cols, spec, sample_count()));
    if (!dry()) {
      ops_.awq_clip(p);
      const auto n = static_cast<std::size_t>(rows * groups);
      loss.resize(n);
      plain.resize(n);
      bounds.resize(n);
      ops_.download(p.loss, host_view(loss.data(), rows, groups));
      ops_.download(p.plain_loss, host_view(plain.data(), rows, groups));
      ops_.download(p.choice, host_view(bounds.data(), rows, groups));
    }
  }
  double relative = 0;
  if (!dry()) {
    ops_.find_grid(w, spec, scales, zeros);
    ops_.quantize_codes(w, spec, scales, zeros, View{}, codes);
    ops_.dequantize_codes(codes, spec, scales, zeros, View{}, View{}, w);
    ops_.square_sums(folded, w, sums);
    double host[2];
    ops_.download(sums, host_view(host, 1, 2));
    relative = host[1] > 0 ? host[0] / host[1] : 0.0;
  }
  GroupPass group = pass_.group(tap);
  SiteResult r = encode_affine(
      group, {.spec = spec, .codes = codes, .scales = scales, .zeros = zeros, .permutation = {}});
  if (dry()) return r;
  r.details["relative_error"] = relative;
  if (c.searched) {
    r.details["ratio"] = static_cast<double>(c.index) / static_cast<double>(o_.ratios);
    r.details["loss"] = c.loss[static_cast<std::size_t>(c.index)];
    r.details["unscaled_loss"] = c.loss.front();
  }
  if (clips) {
    const auto clipped = std::count_if(bounds.begin(), bounds.end(), [](auto i) { return i > 0; });
    r.details["clipped_groups"] = static_cast<double>(clipped) / static_cast<double>(bounds.size());
    r.details["clip_loss"] = std::accumulate(loss.begin(), loss.end(), 0.0);
    r.details["unclipped_loss"] = std::accumulate(plain.begin(), plain.end(), 0.0);
  }
  return r;
}

std::vector<SiteResult> Awq::quantize_block(BlockPass& pass) {
  Options o = o_;
  if (o.spec.rule != GridRule::awq) o.spec.reciprocal = false;
  return BlockSearch(o, pass).run();
}

}  // namespace

std::unique_ptr<Method> make_awq() { return std::make_unique<Awq>(); }

}  // namespace engine
