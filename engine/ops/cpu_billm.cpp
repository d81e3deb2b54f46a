// CpuOps: BiLLM's sweep (docs/methods/billm.md), with the compensation in look-back form.
//
// Official code subtracts err_P U[P, F] from the columns F to come, err = (w - q) / U_jj, and
// leaves the weights within a block alone. With H = R R^T, U = R^-1 and G_P = err_P U[P, P] of the
// finished columns P,
//   err_P U[P, F] = -G_P R[P, F] U[F, F],    U[F, F] = R[F, F]^-1,
// so -G stands where w was, and a block B = F adds its own part of it: with the shift that its
// weights got, current - w = -err_P U[P, B],
//   -G_B = (current - w) - err_B U[B, B].
// (A sweep that also compensates within the block has -G = w^ - w: cpu_gptq.cpp.)
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "engine/ops/cpu_look_back.h"
#include "engine/ops/cpu_ops.h"

namespace engine {

namespace {

constexpr std::int64_t row_grain = 8;
constexpr std::int64_t break_points = billm_last_percent - billm_first_percent + 1;
// Errors kept for each row, one per candidate of a search: break points, or up to 127 column
// counts.
constexpr std::int64_t candidates = std::max<std::int64_t>(break_points, billm_max_block - 1);
using Row = std::array<float, billm_max_block>;
using Groups = std::array<std::uint8_t, billm_max_block>;  // a BillmGroup for each column

// One pass of binarization over the n values x - sum, n > 0: their mean and the mean distance from
// it, both rounded to `dtype`. Sums in f64, so that their order matters as little as it can.
struct Level {
  float mean = 0.0F;
  float scale = 0.0F;
};

Level find_level(const float* x, const float* sum, std::int64_t n, bool with_mean,
                 DType dtype = DType::f32) {
  Level level;
  double total = 0.0;
  for (std::int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i] - sum[i]);
  if (with_mean) level.mean = round_to(dtype, static_cast<float>(total / static_cast<double>(n)));
  double distance = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    distance += static_cast<double>(std::fabs(x[i] - sum[i] - level.mean));
  }
  level.scale = round_to(dtype, static_cast<float>(distance / static_cast<double>(n)));
  return level;
}

// sum (x - B(x))^2 of n values of one row that are binarized `passes` times.
double binarization_error(const float* x, std::int64_t n, int passes, bool with_mean) {
  if (n == 0) return 0.0;
  Row sum{};
  for (int pass = 0; pass < passes; ++pass) {
    const Level level = find_level(x, sum.data(), n, with_mean);
    for (std::int64_t i = 0; i < n; ++i) {
      const float distance = x[i] - sum[static_cast<std::size_t>(i)] - level.mean;
      const float signed_scale = distance > 0   ? level.scale
                                 : distance < 0 ? -level.scale
                                                : 0.0F;  // as the official code's sign
      sum[static_cast<std::size_t>(i)] += level.mean + signed_scale;
    }
  }
  double error = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double e = static_cast<double>(x[i] - sum[static_cast<std::size_t>(i)]);
    error += e * e;
  }
  return error;
}

// The sweep's own part of the workspace, in front of the look-back frame's.
struct Parts {
  std::int64_t errors;  // f64 [rows, candidates]: a search's error of each row and candidate
  std::int64_t matrix;  // three times f32 [rows, block]

  Parts(std::int64_t rows, std::int64_t block) : errors(rows * candidates), matrix(rows * block) {}
  [[nodiscard]] std::int64_t bytes() const { return errors * 8 + 3 * matrix * 4; }
};

template <class T>
class Sweep {
 public:
  Sweep(ThreadPool& pool, const BillmProblem& problem)
      : pool_(pool),
        p_(problem),
        rows_(problem.w.rows),
        d_(problem.w.cols),
        block_(problem.block),
        tries_(std::min(problem.max_salient, problem.block - 1)),
        w_(problem.w.host<float>()),
        loss_(problem.loss.host<double>()),
        look_back_(pool, problem.w, problem.r, problem.block, frame(problem)) {
    const Parts size(rows_, block_);
    errors_ = reinterpret_cast<double*>(p_.workspace.host<std::uint8_t>());
    current_ = reinterpret_cast<float*>(errors_ + size.errors);
    target_ = current_ + size.matrix;
    ranked_ = target_ + size.matrix;
  }

  void run() {
    for (std::int64_t r = 0; r < rows_; ++r) loss_[r * p_.loss.stride] = 0.0;
    for (first_ = 0; first_ < d_; first_ += block_) {
      look_back_.enter(first_, first_ + block_);
      for_rows([&](std::int64_t row) { load_block(row); });
      rank_columns();
      choose_columns();
      choose_break();
      for_rows([&](std::int64_t row) { binarize_row(row); });
    }
  }

 private:
  template <class F>
  void for_rows(F&& body) {
    pool_.run(rows_, row_grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) body(row);
    });
  }
  static View frame(const BillmProblem& p) {
    const std::int64_t own = Parts(p.w.rows, p.block).bytes();
    return p.workspace.col_range(own, p.workspace.cols - own);
  }
  [[nodiscard]] const float* target_row(std::int64_t row) const { return target_ + row * block_; }
  [[nodiscard]] bool is_salient(std::int64_t j) const {
    return salient_[static_cast<std::size_t>(j)];
  }

  // A row's current weights, what the searches reconstruct, and what columns are ranked by.
  void load_block(std::int64_t row) {
    float* current = current_ + row * block_;
    look_back_.current(row, current);
    for (std::int64_t k = 0; k < block_; ++k) {
      const float u = look_back_.inverse_row(k)[k];
      const float score = p_.metric == BillmMetric::hessian ? current[k] * current[k] / (u * u)
                                                            : std::fabs(current[k]);
      const bool squared = p_.metric == BillmMetric::hessian && p_.search == BillmSearch::saliency;
      ranked_[row * block_ + k] = score;
      target_[row * block_ + k] = squared ? score : current[k];
    }
  }

  // rank_ = the block's columns by decreasing sum of scores; equal ones from left to right.
  void rank_columns() {
    std::array<double, billm_max_block> score{};
    for (std::int64_t row = 0; row < rows_; ++row) {
      for (std::int64_t k = 0; k < block_; ++k) {
        score[static_cast<std::size_t>(k)] += static_cast<double>(ranked_[row * block_ + k]);
      }
    }
    std::iota(rank_.begin(), rank_.begin() + block_, std::size_t{0});
    std::stable_sort(rank_.begin(), rank_.begin() + block_,
                     [&](std::size_t a, std::size_t b) { return score[a] > score[b]; });
  }

  // The first of n candidates with the smallest sum of errors over all rows.
  [[nodiscard]] std::int64_t best_candidate(std::int64_t n) const {
    std::int64_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::int64_t c = 0; c < n; ++c) {
      double sum = 0.0;
      for (std::int64_t row = 0; row < rows_; ++row) sum += errors_[row * candidates + c];
      if (sum < least) {
        least = sum;
        best = c;
      }
    }
    return best;
  }

  // How many of the best ranked columns are salient.
  void choose_columns() {
    for_rows([&](std::int64_t row) {
      Row x{};
      for (std::int64_t k = 0; k < block_; ++k) {
        x[static_cast<std::size_t>(k)] = target_row(row)[rank_[static_cast<std::size_t>(k)]];
      }
      for (std::int64_t c = 1; c <= tries_; ++c) {
        errors_[row * candidates + c - 1] =
            binarization_error(x.data(), c, 2, p_.with_mean) +
            binarization_error(x.data() + c, block_ - c, p_.rest_passes, p_.with_mean);
      }
    });
    const std::int64_t count = best_candidate(tries_) + 1;
    salient_.fill(false);
    for (std::int64_t k = 0; k < count; ++k) salient_[rank_[static_cast<std::size_t>(k)]] = true;
    for (std::int64_t k = 0; k < block_; ++k) {
      p_.salient.host<std::uint8_t>()[first_ + k] = is_salient(k) ? 1 : 0;
    }
  }

  // Which magnitude divides the other columns' concentrated weights from the sparse ones. The
  // candidates are quantiles of the whole block in which salient columns count as zeros.
  void choose_break() {
    for_rows([&](std::int64_t row) {
      for (std::int64_t k = 0; k < block_; ++k) {
        ranked_[row * block_ + k] = is_salient(k) ? 0.0F : std::fabs(target_row(row)[k]);
      }
    });
    const std::int64_t count = rows_ * block_;
    std::sort(ranked_, ranked_ + count);
    std::array<float, break_points> threshold;
    for (std::int64_t c = 0; c < break_points; ++c) {
      // Position (count - 1) * percent / 100 between two order statistics.
      const std::int64_t hundredths = (count - 1) * (billm_first_percent + c);
      const std::int64_t low = hundredths / 100;
      const double share = static_cast<double>(hundredths % 100) / 100.0;
      const double a = ranked_[low], b = ranked_[std::min(low + 1, count - 1)];
      threshold[static_cast<std::size_t>(c)] = static_cast<float>(a + (b - a) * share);
    }

    for_rows([&](std::int64_t row) {
      Row salient{}, concentrated{}, sparse{};
      std::int64_t n = 0;
      for (std::int64_t k = 0; k < block_; ++k) {
        if (is_salient(k)) salient[static_cast<std::size_t>(n++)] = target_row(row)[k];
      }
      const double constant = binarization_error(salient.data(), n, 2, p_.with_mean);
      for (std::int64_t c = 0; c < break_points; ++c) {
        std::int64_t below = 0, above = 0;
        for (std::int64_t k = 0; k < block_; ++k) {
          if (is_salient(k)) continue;
          const float x = target_row(row)[k];
          if (std::fabs(x) < threshold[static_cast<std::size_t>(c)]) {
            concentrated[static_cast<std::size_t>(below++)] = x;
          } else {
            sparse[static_cast<std::size_t>(above++)] = x;
          }
        }
        errors_[row * candidates + c] =
            constant + binarization_error(concentrated.data(), below, 1, p_.with_mean) +
            binarization_error(sparse.data(), above, 1, p_.with_mean);
      }
    });
    const std::int64_t best = best_candidate(break_points);
    break_ = threshold[static_cast<std::size_t>(best)];
    p_.percent.host<std::int32_t>()[first_ / block_] =
        static_cast<std::int32_t>(billm_first_percent + best);
  }

  // One pass over the members of a group in one row: their level, added to sum[k], and
  // bits[k] = 1 where the weight is not below the mean.
  void binarize_group(std::int64_t row, BillmGroup group, const float* x, const Groups& group_of,
                      float* sum, std::uint8_t* bits) {
    const std::size_t member = group == billm_residual ? billm_salient : group;
    Row values{}, sums{};
    std::int64_t n = 0;
    for (std::int64_t k = 0; k < block_; ++k) {
      if (group_of[static_cast<std::size_t>(k)] != member) continue;
      values[static_cast<std::size_t>(n)] = x[k];
      sums[static_cast<std::size_t>(n++)] = sum[k];
    }
    Level level;  // of no members: zeros
    if (n > 0) level = find_level(values.data(), sums.data(), n, p_.with_mean, p_.scale_dtype);
    const std::int64_t unit = first_ / block_;
    const View& scales = p_.scales[group];
    const View& means = p_.means[group];
    scales.host<float>()[row * scales.stride + unit] = level.scale;
    means.host<float>()[row * means.stride + unit] = level.mean;
    for (std::int64_t k = 0; k < block_; ++k) {
      if (group_of[static_cast<std::size_t>(k)] != member) continue;
      const bool up = x[k] - sum[k] - level.mean >= 0;
      bits[k] = up ? 1 : 0;
      // As the codec adds: mean and scale of one term, then the terms.
      sum[k] += level.mean + (up ? level.scale : -level.scale);
    }
  }

  // One row of the block: codes, coefficients, and its part of -G.
  void binarize_row(std::int64_t row) {
    const float* current = current_ + row * block_;
    Groups group_of;
    for (std::int64_t k = 0; k < block_; ++k) {
      const auto at = static_cast<std::size_t>(k);
      group_of[at] = is_salient(k)                            ? billm_salient
                     : std::fabs(target_row(row)[k]) < break_ ? billm_concentrated
                                                              : billm_sparse;
    }
    std::uint8_t* first_bits = p_.first.host<std::uint8_t>() + row * p_.first.stride + first_;
    std::uint8_t* second_bits = p_.second.host<std::uint8_t>() + row * p_.second.stride + first_;
    for (std::int64_t k = 0; k < block_; ++k) {
      second_bits[k] = group_of[static_cast<std::size_t>(k)] == billm_sparse ? 1 : 0;
    }
    Row quantized{};
    for (const BillmGroup group : {billm_concentrated, billm_sparse, billm_salient}) {
      binarize_group(row, group, current, group_of, quantized.data(), first_bits);
    }
    binarize_group(row, billm_residual, current, group_of, quantized.data(), second_bits);

    float* w = w_ + row * p_.w.stride + first_;
    for (std::int64_t k = 0; k < block_; ++k) w[k] = current[k] - w[k];
    double loss = 0.0;
    for (std::int64_t j = 0; j < block_; ++j) {
      const float error =
          (current[j] - quantized[static_cast<std::size_t>(j)]) / look_back_.inverse_row(j)[j];
      for (std::int64_t k = j; k < block_; ++k) w[k] -= error * look_back_.inverse_row(j)[k];
      loss += static_cast<double>(error) * static_cast<double>(error);
    }
    loss_[row * p_.loss.stride] += loss;
  }

  ThreadPool& pool_;
  const BillmProblem& p_;
  std::int64_t rows_;
  std::int64_t d_;
  std::int64_t block_;
  std::int64_t tries_;
  float* w_;  // weights from first_ on, -G before
  double* loss_;
  LookBack<T> look_back_;
  double* errors_;
  float* current_;  // the block's weights, compensated
  float* target_;   // what the searches reconstruct
  float* ranked_;   // scores, then magnitudes to sort

  // Of the current block.
  std::int64_t first_ = 0;
  std::array<std::size_t, billm_max_block> rank_{};
  std::array<bool, billm_max_block> salient_{};
  float break_ = 0.0F;
};

void check_problem(const BillmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  const auto shaped = [](const View& v, DType dtype, std::int64_t r, std::int64_t c) {
    return v.dtype == dtype && v.rows == r && v.cols == c;
  };
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "weights " + p.w.shape());
  REQUIRE(p.block >= 2 && p.block <= billm_max_block && d % p.block == 0,
          "blocks of " + std::to_string(p.block) + " in " + p.w.shape());
  REQUIRE(p.max_salient >= 1, "at most " + std::to_string(p.max_salient) + " salient columns");
  REQUIRE(p.rest_passes == 1 || p.rest_passes == 2, "passes " + std::to_string(p.rest_passes));
  REQUIRE(
      p.scale_dtype == DType::f32 || p.scale_dtype == DType::f16 || p.scale_dtype == DType::bf16,
      std::string("scales of ") + dtype_name(p.scale_dtype));
  REQUIRE((p.r.dtype == DType::f32 || p.r.dtype == DType::f64) && p.r.rows == d && p.r.cols == d,
          "factor " + p.r.shape());
  REQUIRE(shaped(p.first, DType::u8, rows, d), "first bits " + p.first.shape());
  REQUIRE(shaped(p.second, DType::u8, rows, d), "second bits " + p.second.shape());
  REQUIRE(shaped(p.salient, DType::u8, 1, d), "salient columns " + p.salient.shape());
  REQUIRE(shaped(p.percent, DType::i32, 1, d / p.block), "break points " + p.percent.shape());
  for (std::size_t g = 0; g < billm_groups; ++g) {
    REQUIRE(shaped(p.scales[g], DType::f32, rows, d / p.block), "scales " + p.scales[g].shape());
    REQUIRE(shaped(p.means[g], DType::f32, rows, d / p.block), "means " + p.means[g].shape());
  }
  REQUIRE(shaped(p.loss, DType::f64, rows, 1), "loss " + p.loss.shape());
}

}  // namespace

std::int64_t CpuOps::billm_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                           DType factor) {
  return Parts(rows, block).bytes() + look_back_bytes(rows, d, block, factor);
}

void CpuOps::billm_sweep(const BillmProblem& problem) {
  check_problem(problem);
  REQUIRE(problem.workspace.bytes() >=
              billm_workspace_bytes(problem.w.rows, problem.w.cols, problem.block, problem.r.dtype),
          "sweep workspace, found " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    Sweep<double>(pool_, problem).run();
  } else {
    Sweep<float>(pool_, problem).run();
  }
}

}  // namespace engine
