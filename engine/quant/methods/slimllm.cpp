// SliM-LLM (Huang et al., arXiv 2405.14917): GPTQ in groups whose widths are b - 1, b or b + 1
// bits, as many of the first as of the last (docs/methods/slimllm.md).
//   S_g = sum over the group of w^2 / U_jj^2;  candidate i: the i least salient groups b - 1 bits,
//   the i most salient b + 1;  i* = argmin of KL(softmax(X W^_i^T) || softmax(X W^T))
// then GPTQ's sweep, where a group's range is searched within +-10 % when the sweep reaches it.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "engine/core/args.h"
#include "engine/quant/damped_factor.h"
#include "engine/quant/encode_mixed.h"
#include "engine/quant/grid_options.h"
#include "engine/quant/method.h"

namespace engine {
namespace {

// Below this a probability counts as this much in the loss of the bit search.
constexpr double probability_floor = 1e-6;

enum class Allocation : std::uint8_t { sba, uniform };
enum class Salience : std::uint8_t { factor, inverse };
enum class Divergence : std::uint8_t { quantized, original };

struct Options {
  int bits = 4;
  std::int64_t group = 128;
  DType scale_dtype = DType::f32;
  Allocation allocation = Allocation::sba;
  std::string table_path;
  std::map<std::string, std::string> table;  // linear name -> a digit per group
  Salience salience = Salience::factor;
  Divergence divergence = Divergence::quantized;
  double lambda = 1.0;
  bool no_search = false;
  bool plain_zeros = false;
  DampOptions damp;
  double search_damp = 0.01;
};

// What the bit search of one linear found.
struct Choice {
  std::int64_t low = 0;      // groups of b - 1 bits, and as many of b + 1
  std::vector<double> loss;  // of the candidates 1, 2, ..., mean over sequences
};

// The groups by increasing salience.
std::vector<std::size_t> salience_order(const std::vector<double>& salience) {
  std::vector<std::size_t> order(salience.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return salience[a] < salience[b]; });
  return order;
}

// The widths of candidate `low`: so many groups narrower from the front of the order, and wider
// from its end.
std::vector<std::uint8_t> widths_of(const std::vector<std::size_t>& order, std::int64_t low,
                                    int bits) {
  const auto n = static_cast<std::size_t>(low);
  std::vector<std::uint8_t> widths(order.size(), static_cast<std::uint8_t>(bits));
  for (std::size_t i = 0; i < n; ++i) {
    widths[order[i]] = static_cast<std::uint8_t>(bits - 1);
    widths[order[order.size() - 1 - i]] = static_cast<std::uint8_t>(bits + 1);
  }
  return widths;
}

// 1 for the groups before the first one of the middle width or more.
std::vector<std::uint8_t> leading_low(const std::vector<std::uint8_t>& widths, int bits) {
  std::vector<std::uint8_t> out(widths.size(), 0);
  for (std::size_t g = 0; g < widths.size() && widths[g] < bits; ++g) out[g] = 1;
  return out;
}

std::string digits(const std::vector<std::uint8_t>& widths) {
  std::string text;
  for (const std::uint8_t w : widths) text += static_cast<char>('0' + w);
  return text;
}

class SlimLlm final : public Method {
 public:
  [[nodiscard]] const char* name() const override { return "slimllm"; }
  [[nodiscard]] const char* summary() const override {
    return "GPTQ with a bit width per group of columns, chosen by salience and output divergence";
  }
  void declare_options(CLI::App& app) override;
  void check(const ModelConfig& config) const override;
  [[nodiscard]] Json options() const override;
  [[nodiscard]] Needs needs() const override {
    return {.hessian = true, .study = o_.allocation == Allocation::sba && o_.table_path.empty()};
  }
  void study_group(GroupPass& pass, const InputReplay& replay) override;
  std::vector<SiteResult> quantize_group(GroupPass& pass) override;

 private:
  // Candidates of the bit search for d inputs; 0: all groups keep the middle width.
  [[nodiscard]] std::int64_t candidates(std::int64_t d) const {
    return needs().study ? std::max<std::int64_t>(0, d / o_.group / 2 - 1) : 0;
  }
  // The official code does so only where it has searched.
  [[nodiscard]] bool middle_zero() const { return needs().study && !o_.plain_zeros; }
  struct Factored {
    DampedFactor h;
    View divisors;  // f64 [1, d]
  };
  // The factor of H + absolute I + share mean(diag) I.
  Factored factor(GroupPass& pass, double absolute, double share) const;
  std::vector<double> salience(GroupPass& pass, const View& w, const Factored& f) const;
  void search_bits(GroupPass& pass, const InputReplay& replay,
                   const std::vector<std::vector<std::size_t>>& orders);
  // Of each group of one linear; `w` as the sweep gets it.
  std::vector<std::uint8_t> widths(GroupPass& pass, Site site, const View& w,
                                   const Factored& f) const;
  SiteResult quantize_site(GroupPass& pass, const SiteTask& task, const Factored& f) const;

  Options o_;
  std::map<Site, Choice> choices_;  // of the block being quantized
};

void SlimLlm::declare_options(CLI::App& app) {
  app.add_option("--bits", o_.bits, "Mean bits per weight, 2 to 7; groups get one more or less")
      ->capture_default_str();
  app.add_option("--group", o_.group, "Columns per group, 1 to 128")->capture_default_str();
  add_choice<DType>(app, "--scale-dtype", o_.scale_dtype,
                    {{"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}},
                    "How scales and means are stored; they are rounded before use");
  add_choice<Allocation>(app, "--allocation", o_.allocation,
                         {{"sba", Allocation::sba}, {"uniform", Allocation::uniform}},
                         "sba: search the widths; uniform: all groups --bits");
  app.add_option_function<std::string>(
      "--bit-table",
      [this](const std::string& path) {
        o_.table_path = path;
        o_.table.clear();
        const Json table = read_json_file(path);
        if (!table.is_object()) {
          throw FormatError(path, "top level", "an object of linears", describe(table));
        }
        for (const auto& [linear, widths] : table.items()) {
          if (!widths.is_string()) {
            throw FormatError(path, quote_text(linear), "a text of digits", describe(widths));
          }
          o_.table[linear] = widths.get<std::string>();
        }
      },
      "JSON object with the widths to use instead of a search: {\"layers.0.mlp.down_proj\": "
      "\"233334\", ...}, a digit of 1 to 8 for each group of every linear");
  add_choice<Salience>(app, "--salience", o_.salience,
                       {{"factor", Salience::factor}, {"inverse", Salience::inverse}},
                       "Divisor of a weight in its salience: factor: U_jj, as the official code; "
                       "inverse: [H^-1]_jj, as the paper");
  add_choice<Divergence>(
      app, "--divergence", o_.divergence,
      {{"quantized", Divergence::quantized}, {"original", Divergence::original}},
      "Loss of the bit search: quantized: KL(quantized || original), as the official code; "
      "original: KL(original || quantized)");
  app.add_option("--lambda", o_.lambda, "Weight of salient elements in the scale search")
      ->capture_default_str();
  app.add_flag("--no-scale-search", o_.no_search, "Plain ranges, as GPTQ's");
  app.add_flag("--no-leading-middle-zero", o_.plain_zeros,
               "Zeros of all groups from their range. Otherwise, as in the official code's search, "
               "groups of fewer than --bits before the first other group have the zero 2^(bits-1)");
  app.add_option("--search-damp", o_.search_damp,
                 "Added to H's diagonal as it is, for the bit search and then for good")
      ->capture_default_str();
  declare_damp_options(app, o_.damp);
}

void SlimLlm::check(const ModelConfig& config) const {
  const auto refuse = [](const std::string& option, const std::string& expected,
                         const std::string& found) {
    throw Error(ErrorCode::usage, option + ": expected " + expected + ", found " + found);
  };
  if (o_.bits < 2 || o_.bits > 7) refuse("--bits", "2 to 7", std::to_string(o_.bits));
  if (o_.group < 1 || o_.group > 128) refuse("--group", "1 to 128", std::to_string(o_.group));
  GridSpec spec;
  spec.group = o_.group;
  check_grid_options(spec, config);
  check_damp_options(o_.damp);
  if (!(o_.search_damp > 0) || !std::isfinite(o_.search_damp)) {
    refuse("--search-damp", "a positive number", std::to_string(o_.search_damp));
  }
  if (!(o_.lambda >= 0) || !std::isfinite(o_.lambda)) {
    refuse("--lambda", "0 or a positive number", std::to_string(o_.lambda));
  }
  if (o_.no_search && o_.lambda != 1.0) {
    refuse("--lambda", "1 with --no-scale-search", std::to_string(o_.lambda));
  }
  if (o_.table_path.empty()) return;
  if (o_.allocation == Allocation::uniform) {
    refuse("--bit-table", "--allocation sba", "uniform");
  }
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (const Site site : all_sites) {
      const std::string linear = linear_name(layer, site);
      const auto groups = static_cast<std::size_t>(site_shape(config, site).cols / o_.group);
      const auto entry = o_.table.find(linear);
      if (entry == o_.table.end() || entry->second.size() != groups ||
          entry->second.find_first_not_of("12345678") != std::string::npos) {
        refuse("--bit-table " + o_.table_path + ": " + linear,
               std::to_string(groups) + " digits of 1 to 8",
               entry == o_.table.end() ? "no entry" : quote_text(entry->second));
      }
    }
  }
}

Json SlimLlm::options() const {
  Json j;
  j["bits"] = o_.bits;
  j["group"] = o_.group;
  j["scale_dtype"] = dtype_name(o_.scale_dtype);
  j["allocation"] = o_.allocation == Allocation::sba ? "sba" : "uniform";
  if (!o_.table_path.empty()) {
    j["allocation"] = "table";
    for (const auto& [linear, widths] : o_.table) j["bit_table"][linear] = widths;
  }
  j["salience"] = o_.salience == Salience::factor ? "factor" : "inverse";
  j["divergence"] = o_.divergence == Divergence::quantized ? "quantized" : "original";
  j["lambda"] = o_.lambda;
  j["scale_search"] = !o_.no_search;
  j["leading_middle_zero"] = middle_zero();
  j["search_damp"] = o_.search_damp;
  damp_options(o_.damp, j);
  return j;
}

SlimLlm::Factored SlimLlm::factor(GroupPass& pass, double absolute, double share) const {
  const std::int64_t d = pass.sites.front().weight.cols;
  Factored f;
  f.divisors = pass.arena.make(MemTag::solver, DType::f64, 1, d);
  const View diagonal = pass.arena.make(MemTag::solver, DType::f32, 1, d);
  DampOptions damp = o_.damp;
  if (!pass.dry()) {
    // As one share of the mean diagonal; dead inputs have 1 there.
    std::vector<float> diag(static_cast<std::size_t>(d));
    pass.ops.diagonal(pass.hessian, diagonal);
    pass.ops.download(diagonal, host_view(diag.data(), 1, d));
    const double scale = 2.0 / static_cast<double>(pass.sequences);
    double mean = 0.0;
    for (const float v : diag) {
      mean += (v == 0.0F ? 1.0 : scale * static_cast<double>(v)) / static_cast<double>(d);
    }
    damp.share = (absolute + share * (mean + absolute)) / mean;
    if (share > 0) {
      damp.asked = share;
    } else {
      damp.option = "--search-damp";
      damp.asked = absolute;
    }
  }
  f.h = factor_hessian(pass, damp);
  const bool inverse = o_.salience == Salience::inverse;
  const Arena::Scope scope(pass.arena);
  View workspace;
  const std::int64_t bytes = pass.ops.slim_divisors_bytes(d, inverse, o_.damp.factor);
  if (bytes > 0) workspace = pass.arena.make(MemTag::workspace, DType::u8, 1, bytes);
  if (!pass.dry()) pass.ops.slim_divisors(f.h.r, inverse, f.divisors, workspace);
  return f;
}

std::vector<double> SlimLlm::salience(GroupPass& pass, const View& w, const Factored& f) const {
  const std::int64_t groups = w.cols / o_.group;
  const Arena::Scope scope(pass.arena);
  const View sums = pass.arena.make(MemTag::solver, DType::f64, 1, groups);
  std::vector<double> host(static_cast<std::size_t>(groups), 0.0);
  if (pass.dry()) return host;
  pass.ops.slim_salience(w, f.divisors, o_.group, sums);
  pass.ops.download(sums, host_view(host.data(), 1, groups));
  return host;
}

void SlimLlm::study_group(GroupPass& pass, const InputReplay& replay) {
  if (candidates(pass.sites.front().weight.cols) == 0) return;
  std::vector<std::vector<std::size_t>> orders;
  {
    const Arena::Scope scope(pass.arena);
    const Factored f = factor(pass, o_.search_damp, 0.0);
    for (const SiteTask& t : pass.sites) {
      orders.push_back(salience_order(salience(pass, t.weight, f)));
    }
  }
  search_bits(pass, replay, orders);
}

// Candidates are nested: from i - 1 to i one group becomes narrower and one wider, so the outputs
// change by one product with the columns of both. They lie side by side in `change`, in the order
// of the candidates.
void SlimLlm::search_bits(GroupPass& pass, const InputReplay& replay,
                          const std::vector<std::vector<std::size_t>>& orders) {
  Ops& ops = pass.ops;
  const std::int64_t d = pass.sites.front().weight.cols, n = candidates(d), pair = 2 * o_.group;
  const DType dtype = pass.sites.front().weight.dtype;
  const auto make = [&](DType type, std::int64_t rows, std::int64_t cols) {
    return pass.arena.make(MemTag::solver, type, rows, cols);
  };
  // The columns of the two groups that candidate i changes.
  const auto copy_pair = [&](std::size_t s, std::int64_t i, const View& narrow, const View& wide,
                             const View& out) {
    const auto& order = orders[s];
    const auto at = static_cast<std::size_t>(i);
    const auto columns = [&](const View& v, std::size_t g) {
      return v.col_range(static_cast<std::int64_t>(g) * o_.group, o_.group);
    };
    ops.copy(columns(narrow, order[at]), out.col_range(0, o_.group));
    ops.copy(columns(wide, order[order.size() - 1 - at]), out.col_range(o_.group, o_.group));
  };
  struct Trial {
    View base, change;
    View kl;  // f64 [candidates, input rows]
  };
  std::vector<Trial> trials;
  std::int64_t widest = 0;
  for (const SiteTask& t : pass.sites) {
    const std::int64_t rows = t.weight.rows;
    trials.push_back(
        {make(dtype, rows, d), make(dtype, rows, n * pair), make(DType::f64, n, pass.input_rows)});
    widest = std::max(widest, rows);
  }
  for (std::size_t s = 0; s < trials.size(); ++s) {
    const Arena::Scope scope(pass.arena);
    const View& w = pass.sites[s].weight;
    const View lower = make(dtype, w.rows, d), higher = make(dtype, w.rows, d);
    if (pass.dry()) continue;
    ops.slim_candidates(w, o_.bits, o_.group, o_.scale_dtype, trials[s].base, lower, higher);
    for (std::int64_t i = 0; i < n; ++i) {
      copy_pair(s, i, lower, higher, trials[s].change.col_range(i * pair, pair));
    }
    ops.zero(trials[s].kl);
  }
  const View original = make(DType::f32, 1, pass.input_rows * widest);
  const View quantized = make(DType::f32, 1, pass.input_rows * widest);
  const View inputs = make(dtype, pass.input_rows, pair);
  replay([&](const View& x) {
    for (std::size_t s = 0; s < trials.size(); ++s) {
      const View& w = pass.sites[s].weight;
      const View y = quantized.col_range(0, x.rows * w.rows).reshape(x.rows, w.rows);
      const View y0 = original.col_range(0, x.rows * w.rows).reshape(x.rows, w.rows);
      const View changed = inputs.row_range(0, x.rows);
      ops.matmul(x, w, y0, false);
      ops.matmul(x, trials[s].base, y, false);
      for (std::int64_t i = 0; i < n; ++i) {
        copy_pair(s, i, x, x, changed);
        ops.matmul(changed, trials[s].change.col_range(i * pair, pair), y, true);
        const View kl = trials[s].kl.row_range(i, 1).col_range(0, x.rows).reshape(x.rows, 1);
        if (o_.divergence == Divergence::quantized) {
          ops.softmax_kl(y, y0, probability_floor, kl);
        } else {
          ops.softmax_kl(y0, y, probability_floor, kl);
        }
      }
    }
  });
  if (pass.dry()) return;
  std::vector<double> kl(static_cast<std::size_t>(n * pass.input_rows));
  for (std::size_t s = 0; s < trials.size(); ++s) {
    ops.download(trials[s].kl, host_view(kl.data(), n, pass.input_rows));
    Choice choice;
    for (auto row = kl.begin(); row != kl.end(); row += pass.input_rows) {
      choice.loss.push_back(std::accumulate(row, row + pass.input_rows, 0.0) /
                            static_cast<double>(pass.sequences));
    }
    const auto best = std::min_element(choice.loss.begin(), choice.loss.end());
    choice.low = best - choice.loss.begin() + 1;
    choices_[pass.sites[s].site] = std::move(choice);
  }
}

std::vector<std::uint8_t> SlimLlm::widths(GroupPass& pass, Site site, const View& w,
                                          const Factored& f) const {
  const std::vector<std::size_t> order = salience_order(salience(pass, w, f));
  if (!o_.table_path.empty()) {
    std::vector<std::uint8_t> out;
    for (const char c : o_.table.at(linear_name(pass.layer, site))) {
      out.push_back(static_cast<std::uint8_t>(c - '0'));
    }
    return out;
  }
  if (candidates(w.cols) == 0) return widths_of(order, 0, o_.bits);
  return widths_of(order, pass.dry() ? 1 : choices_.at(site).low, o_.bits);
}

SiteResult SlimLlm::quantize_site(GroupPass& pass, const SiteTask& task, const Factored& f) const {
  Ops& ops = pass.ops;
  const std::int64_t rows = task.weight.rows, d = task.weight.cols, groups = d / o_.group;
  const auto make = [&](DType dtype, std::int64_t r, std::int64_t c) {
    return pass.arena.make(MemTag::solver, dtype, r, c);
  };
  SlimProblem p;
  p.group = o_.group;
  p.scale_dtype = o_.scale_dtype;
  p.search = !o_.no_search;
  p.lambda = o_.lambda;
  p.r = f.h.r;
  p.w = make(DType::f32, rows, d);
  p.bits = make(DType::u8, 1, groups);
  p.middle_zero = make(DType::u8, 1, groups);
  p.scales = make(DType::f32, rows, groups);
  p.zeros = make(DType::i32, rows, groups);
  p.means = make(DType::f32, rows, groups);
  p.codes = make(DType::u8, rows, d);
  p.loss = make(DType::f64, rows, 1);
  p.workspace = pass.arena.make(MemTag::workspace, DType::u8, 1,
                                ops.slim_workspace_bytes(rows, d, o_.group, o_.damp.factor));
  if (!pass.dry()) ops.gather_columns(task.weight, View{}, f.h.dead, p.w);
  const std::vector<std::uint8_t> bits = widths(pass, task.site, p.w, f);
  double loss = 0.0;
  if (!pass.dry()) {
    const std::vector<std::uint8_t> middle =
        middle_zero() ? leading_low(bits, o_.bits) : std::vector<std::uint8_t>(bits.size(), 0);
    ops.upload(host_view(bits.data(), 1, groups), p.bits);
    ops.upload(host_view(middle.data(), 1, groups), p.middle_zero);
    ops.slim_sweep(p);
    std::vector<double> row_loss(static_cast<std::size_t>(rows));
    ops.download(p.loss, host_view(row_loss.data(), rows, 1));
    loss = std::accumulate(row_loss.begin(), row_loss.end(), 0.0);
  }
  SiteResult r = encode_mixed(pass, {.group = o_.group,
                                     .scale_dtype = o_.scale_dtype,
                                     .bits = bits,
                                     .codes = p.codes,
                                     .scales = p.scales,
                                     .zeros = p.zeros,
                                     .means = p.means});
  r.outcome = f.h.outcome;
  r.details["loss"] = loss;
  r.details["damping"] = f.h.damping;
  r.details["dead_columns"] = f.h.dead_columns;
  r.details["group_bits"] = digits(bits);
  if (const auto choice = choices_.find(task.site); choice != choices_.end() && candidates(d) > 0) {
    r.details["search_loss"] = choice->second.loss;
  }
  return r;
}

std::vector<SiteResult> SlimLlm::quantize_group(GroupPass& pass) {
  // The official search leaves its damping in H.
  const bool searched = candidates(pass.sites.front().weight.cols) > 0;
  const Factored f = factor(pass, searched ? o_.search_damp : 0.0, o_.damp.share);
  std::vector<SiteResult> results;
  for (const SiteTask& t : pass.sites) {
    const Arena::Scope scope(pass.arena);
    results.push_back(quantize_site(pass, t, f));
  }
  return results;
}

}  // namespace

std::unique_ptr<Method> make_slimllm() { return std::make_unique<SlimLlm>(); }

}  // namespace engine
