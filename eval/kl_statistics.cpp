#include <algorithm>
#include <cmath>
#include <string>

#include "eval/kl.h"

namespace engine {
namespace {

double mean_of(std::span<const double> v) {
  double sum = 0;
  for (const double x : v) sum += x;
  return sum / static_cast<double>(v.size());
}

double standard_error_of(std::span<const double> v) {
  if (v.size() < 2) return 0;
  const double mean = mean_of(v);
  double sum = 0;
  for (const double x : v) sum += (x - mean) * (x - mean);
  const auto n = static_cast<double>(v.size());
  return std::sqrt(sum / (n - 1) / n);
}

// Of sorted values, at share (n - 1) q of the way.
double percentile(std::span<const double> sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

KlStatistics kl_statistics(std::span<const double> rows, std::int64_t windows, std::int64_t seq) {
  REQUIRE(windows > 0 && seq > 1 && static_cast<std::int64_t>(rows.size()) == 4 * windows * seq,
          "rows of another number of windows");
  const auto scored = static_cast<double>(seq - 1);
  std::vector<double> kl, change;
  std::vector<double> window_kl, window_p, window_q, window_ratio;  // means of each window
  double same = 0, squares = 0;
  for (std::int64_t w = 0; w < windows; ++w) {
    double sum_kl = 0, sum_p = 0, sum_q = 0;
    for (std::int64_t t = 0; t < seq - 1; ++t) {
      const auto row = rows.subspan(static_cast<std::size_t>(4 * (w * seq + t)), 4);
      if (!std::all_of(row.begin(), row.end(), [](double v) { return std::isfinite(v); })) {
        throw Error(ErrorCode::numeric, "window " + std::to_string(w) + ", position " +
                                            std::to_string(t) +
                                            ": expected finite logits of reference and model, "
                                            "found NaN or infinity");
      }
      kl.push_back(row[0]);
      change.push_back(std::exp(row[3]) - std::exp(row[2]));
      squares += change.back() * change.back();
      sum_kl += row[0];
      same += row[1];
      sum_p -= row[2];
      sum_q -= row[3];
    }
    window_kl.push_back(sum_kl / scored);
    window_p.push_back(sum_p / scored);
    window_q.push_back(sum_q / scored);
    window_ratio.push_back(window_q.back() - window_p.back());
  }
  KlStatistics s;
  s.windows = windows;
  s.positions = windows * (seq - 1);
  const auto n = static_cast<double>(s.positions);
  s.kl.mean = mean_of(window_kl);  // windows are of one length
  s.kl.standard_error = standard_error_of(window_kl);
  s.same_top = same / n;
  s.change.mean = mean_of(change);
  s.change.rms = std::sqrt(squares / n);
  s.reference_perplexity = std::exp(mean_of(window_p));
  s.perplexity = std::exp(mean_of(window_q));
  s.log_ratio = mean_of(window_ratio);
  s.log_ratio_standard_error = standard_error_of(window_ratio);

  std::sort(kl.begin(), kl.end());
  s.kl.median = percentile(kl, 0.5);
  s.kl.p90 = percentile(kl, 0.9);
  s.kl.p95 = percentile(kl, 0.95);
  s.kl.p99 = percentile(kl, 0.99);
  s.kl.p99_9 = percentile(kl, 0.999);
  s.kl.maximum = kl.back();
  std::sort(change.begin(), change.end());
  s.change.p1 = percentile(change, 0.01);
  s.change.p5 = percentile(change, 0.05);
  s.change.median = percentile(change, 0.5);
  s.change.p95 = percentile(change, 0.95);
  s.change.p99 = percentile(change, 0.99);
  return s;
}

Json to_json(const KlStatistics& s) {
  Json j;
  j["windows"] = s.windows;
  j["positions"] = s.positions;
  j["kl"] = {{"mean", s.kl.mean},     {"standard_error", s.kl.standard_error},
             {"median", s.kl.median}, {"p90", s.kl.p90},
             {"p95", s.kl.p95},       {"p99", s.kl.p99},
             {"p99_9", s.kl.p99_9},   {"max", s.kl.maximum}};
  j["same_top"] = s.same_top;
  j["probability_change"] = {
      {"mean", s.change.mean},     {"rms", s.change.rms}, {"p1", s.change.p1},  {"p5", s.change.p5},
      {"median", s.change.median}, {"p95", s.change.p95}, {"p99", s.change.p99}};
  j["reference_perplexity"] = s.reference_perplexity;
  j["perplexity"] = s.perplexity;
  j["log_ratio"] = s.log_ratio;
  j["log_ratio_standard_error"] = s.log_ratio_standard_error;
  return j;
}

Json to_json(const NoiseFloor& n) {
  Json j;
  j["mean"] = n.statistics.kl.mean;
  j["max"] = n.statistics.kl.maximum;
  j["same_top"] = n.statistics.same_top;
  j["batch"] = n.batch;
  j["other_batch"] = n.other_batch;
  if (n.statistics.kl.maximum == 0) {
    j["note"] = "exactly 0: here results do not depend on the order and number of windows";
  }
  return j;
}

}  // namespace engine
