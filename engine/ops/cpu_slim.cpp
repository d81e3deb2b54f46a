// CpuOps: SliM-LLM (docs/methods/slimllm.md). The sweep is GPTQ's in its look-back form
// (cpu_gptq.cpp) with blocks of one group; only how a group finds its grid differs.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "engine/ops/cpu_look_back.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"
#include "engine/weight/grid.h"

namespace engine {
namespace {

// One group of one row; n <= 128.
struct GroupGrid {
  UnitGrid affine;  // bits >= 2; its scale is alpha for 1 bit
  float mean = 0.0F;
};

GridSpec affine_spec(int bits, DType scale_dtype) {
  GridSpec spec;
  spec.bits = bits;
  spec.scale_dtype = scale_dtype;
  return spec;
}

GroupGrid sign_grid(std::span<const float> w, DType scale_dtype) {
  double sum = 0.0, absolute = 0.0;
  for (const float v : w) {
    sum += static_cast<double>(v);
    absolute += static_cast<double>(std::fabs(v));
  }
  const auto n = static_cast<double>(w.size());
  GroupGrid grid;
  grid.affine.scale = round_to(scale_dtype, static_cast<float>(absolute / n));
  grid.mean = round_to(scale_dtype, static_cast<float>(sum / n));
  return grid;
}

struct Coded {
  std::uint8_t code;
  float value;
};

Coded code_of(float w, const GroupGrid& grid, const GridSpec& spec) {
  if (spec.bits == 1) {
    const std::uint8_t code = w - grid.mean >= 0.0F ? 1 : 0;
    return {code, grid.mean + (code == 1 ? grid.affine.scale : -grid.affine.scale)};
  }
  const std::uint8_t code = quantize_value(w, grid.affine, spec);
  return {code, dequantize_value(code, grid.affine, spec)};
}

// The range factor that loses least: sum |w^ - w|^2.4, salient elements counted lambda times
// (salient empty: none are). The first of equals wins, so the plain range does unless beaten.
UnitGrid searched_grid(std::span<const float> w, const GridSpec& spec, bool middle_zero,
                       bool search, double lambda, const std::uint8_t* salient) {
  static const std::array<float, slim_ranges> factors = slim_range_factors();
  const auto [low, high] = std::minmax_element(w.begin(), w.end());
  float lo = std::min(*low, 0.0F), hi = std::max(*high, 0.0F);
  if (lo == 0.0F && hi == 0.0F) {
    lo = -1.0F;
    hi = 1.0F;
  }
  UnitGrid best;
  double best_loss = std::numeric_limits<double>::infinity();
  for (int c = 0; c < (search ? slim_ranges : 1); ++c) {
    const float p = factors[static_cast<std::size_t>(c)];
    const std::array<float, 2> range = {p * lo, p * hi};
    UnitGrid grid = find_unit_grid(range, spec);
    if (middle_zero) grid.zero = 1 << (spec.bits - 1);
    double loss = 0.0;
    for (std::size_t i = 0; i < w.size(); ++i) {
      const float error = dequantize_value(quantize_value(w[i], grid, spec), grid, spec) - w[i];
      const auto power = static_cast<double>(std::pow(std::fabs(error), 2.4F));
      loss += salient != nullptr && salient[i] != 0 ? lambda * power : power;
    }
    if (loss < best_loss || c == 0) {
      best_loss = loss;
      best = grid;
    }
  }
  return best;
}

template <class T>
class SlimSweep {
 public:
  SlimSweep(ThreadPool& pool, const SlimProblem& problem)
      : pool_(pool),
        p_(problem),
        look_(pool, problem.w, problem.r, problem.group, problem.workspace),
        rows_(problem.w.rows) {}

  void run() {
    auto* loss = p_.loss.host<double>();
    for (std::int64_t r = 0; r < rows_; ++r) loss[r * p_.loss.stride] = 0.0;
    const auto* bits = p_.bits.host<std::uint8_t>();
    for (std::int64_t g = 0; g < p_.bits.cols; ++g) {
      look_.enter(g * p_.group, (g + 1) * p_.group);
      const GridSpec spec = affine_spec(bits[g], p_.scale_dtype);
      // With lambda 1 it does not matter which elements are salient.
      double threshold = std::numeric_limits<double>::infinity();
      if (spec.bits > 1 && p_.search && p_.lambda != 1.0) threshold = salience_threshold();
      pool_.run(rows_, 8, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) solve(row, g, spec, threshold);
      });
    }
  }

 private:
  // (w_j / U_jj)^2 of the block's current weights.
  void salience(const float* current, float* out) const {
    for (std::int64_t j = 0; j < p_.group; ++j) {
      const float u = look_.inverse_row(j)[j];
      out[j] = current[j] * current[j] / (u * u);
    }
  }

  // The smallest salience more than two standard deviations from the mean of the whole block;
  // infinity when there is none.
  double salience_threshold() const {
    const auto count = static_cast<double>(rows_ * p_.group);
    // Rows are summed one after another, so that threads change nothing.
    double mean = 0.0;
    each_salience([&](double s) { mean += s / count; });
    double variance = 0.0;
    each_salience([&](double s) { variance += (s - mean) * (s - mean) / (count - 1.0); });
    const double deviation = std::sqrt(variance);
    double smallest = std::numeric_limits<double>::infinity();
    each_salience([&](double s) {
      if (std::fabs(s - mean) > 2.0 * deviation) smallest = std::min(smallest, s);
    });
    return smallest;
  }

  template <class F>
  void each_salience(F&& visit) const {
    std::array<float, 128> current, s;
    for (std::int64_t row = 0; row < rows_; ++row) {
      look_.current(row, current.data());
      salience(current.data(), s.data());
      for (std::int64_t j = 0; j < p_.group; ++j) {
        visit(static_cast<double>(s[static_cast<std::size_t>(j)]));
      }
    }
  }

  GroupGrid fit(std::span<const float> current, std::int64_t g, const GridSpec& spec,
                double threshold) const {
    if (spec.bits == 1) return sign_grid(current, p_.scale_dtype);
    const bool middle = !p_.middle_zero.empty() && p_.middle_zero.host<std::uint8_t>()[g] != 0;
    std::array<std::uint8_t, 128> salient{};
    const bool weigh = std::isfinite(threshold);
    if (weigh) {
      std::array<float, 128> s;
      salience(current.data(), s.data());
      for (std::size_t j = 0; j < current.size(); ++j) {
        salient[j] = static_cast<double>(s[j]) >= threshold ? 1 : 0;
      }
    }
    return {searched_grid(current, spec, middle, p_.search, p_.lambda,
                          weigh ? salient.data() : nullptr),
            0.0F};
  }

  void solve(std::int64_t row, std::int64_t g, const GridSpec& spec, double threshold) {
    const std::int64_t n = p_.group, first = g * n;
    std::array<float, 128> current;
    look_.current(row, current.data());
    const GroupGrid grid =
        fit(std::span(current).first(static_cast<std::size_t>(n)), g, spec, threshold);
    p_.scales.host<float>()[row * p_.scales.stride + g] = grid.affine.scale;
    p_.zeros.host<std::int32_t>()[row * p_.zeros.stride + g] = grid.affine.zero;
    p_.means.host<float>()[row * p_.means.stride + g] = grid.mean;

    float* w = p_.w.host<float>() + row * p_.w.stride + first;
    std::uint8_t* codes = p_.codes.host<std::uint8_t>() + row * p_.codes.stride + first;
    double loss = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      const float* u = look_.inverse_row(j);
      const float now = current[static_cast<std::size_t>(j)];
      const Coded coded = code_of(now, grid, spec);
      const float error = (now - coded.value) / u[j];
      for (std::int64_t k = j + 1; k < n; ++k) current[static_cast<std::size_t>(k)] -= error * u[k];
      loss += static_cast<double>(error) * static_cast<double>(error);
      codes[j] = coded.code;
      w[j] = coded.value - w[j];
    }
    p_.loss.host<double>()[row * p_.loss.stride] += loss;
  }

  ThreadPool& pool_;
  const SlimProblem& p_;
  LookBack<T> look_;
  std::int64_t rows_;
};

void check_group(std::int64_t d, std::int64_t group, std::int64_t largest) {
  REQUIRE(group >= 1 && group <= largest && d % group == 0,
          "groups of " + std::to_string(group) + " in " + std::to_string(d) + " columns");
}

bool is_factor(const View& r, std::int64_t d) {
  return (r.dtype == DType::f32 || r.dtype == DType::f64) && r.rows == d && r.cols == d;
}

void check_problem(const SlimProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  check_group(d, p.group, 128);
  const std::int64_t groups = d / p.group;
  const auto shaped = [](const View& v, DType dtype, std::int64_t r, std::int64_t c) {
    return v.dtype == dtype && v.rows == r && v.cols == c;
  };
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "weights " + p.w.shape());
  REQUIRE(is_factor(p.r, d), "factor " + p.r.shape());
  REQUIRE(shaped(p.bits, DType::u8, 1, groups), "bits " + p.bits.shape());
  REQUIRE(p.middle_zero.empty() || shaped(p.middle_zero, DType::u8, 1, groups),
          "middle zeros " + p.middle_zero.shape());
  REQUIRE(shaped(p.scales, DType::f32, rows, groups), "scales " + p.scales.shape());
  REQUIRE(shaped(p.zeros, DType::i32, rows, groups), "zeros " + p.zeros.shape());
  REQUIRE(shaped(p.means, DType::f32, rows, groups), "means " + p.means.shape());
  REQUIRE(shaped(p.codes, DType::u8, rows, d), "codes " + p.codes.shape());
  REQUIRE(shaped(p.loss, DType::f64, rows, 1), "loss " + p.loss.shape());
  REQUIRE(std::isfinite(p.lambda) && p.lambda >= 0.0, "lambda " + std::to_string(p.lambda));
  const auto* bits = p.bits.host<std::uint8_t>();
  for (std::int64_t g = 0; g < groups; ++g) {
    REQUIRE(bits[g] >= 1 && bits[g] <= 8, "a group of " + std::to_string(bits[g]) + " bits");
  }
}

// One group of one row on its plain grid.
void round_group(std::span<const float> w, const GridSpec& spec, float* out) {
  GroupGrid grid;
  if (spec.bits == 1) {
    grid = sign_grid(w, spec.scale_dtype);
  } else {
    grid.affine = find_unit_grid(w, spec);
  }
  for (std::size_t j = 0; j < w.size(); ++j) out[j] = code_of(w[j], grid, spec).value;
}

void store_row(const View& v, std::int64_t row, std::int64_t first, std::span<const float> values) {
  const auto write = [&](auto* data) {
    data += row * v.stride + first;
    for (std::size_t i = 0; i < values.size(); ++i) store(data[i], values[i]);
  };
  switch (v.dtype) {
    case DType::f32:
      return write(v.host<float>());
    case DType::f16:
      return write(v.host<f16>());
    case DType::bf16:
      return write(v.host<bf16>());
    default:
      REQUIRE(false, "expected f32, f16 or bf16, found " + v.shape());
  }
}

// log(sum exp(row)).
double log_sum_exp(const float* row, std::int64_t n) {
  const float top = *std::max_element(row, row + n);
  double sum = 0.0;
  for (std::int64_t o = 0; o < n; ++o) sum += static_cast<double>(std::exp(row[o] - top));
  return static_cast<double>(top) + std::log(sum);
}

}  // namespace

void CpuOps::slim_divisors(View r, bool inverse, View out, View /*workspace*/) {
  const std::int64_t d = r.cols;
  REQUIRE(is_factor(r, d), "factor " + r.shape());
  REQUIRE(out.dtype == DType::f64 && out.rows == 1 && out.cols == d, "divisors " + out.shape());
  auto* divisors = out.host<double>();
  const auto fill = [&](const auto* factor) {
    const auto at = [&](std::int64_t i, std::int64_t j) {
      return static_cast<double>(factor[i * r.stride + j]);
    };
    pool_.run(d, 8, [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> column(static_cast<std::size_t>(d));
      for (std::int64_t j = begin; j < end; ++j) {
        if (!inverse) {
          divisors[j] = 1.0 / at(j, j);
          continue;
        }
        // Column j of U from R U = I, from the diagonal up; [H^-1]_jj is its square sum.
        double sum = 0.0;
        for (std::int64_t i = j; i >= 0; --i) {
          double v = i == j ? 1.0 : 0.0;
          for (std::int64_t k = i + 1; k <= j; ++k)
            v -= at(i, k) * column[static_cast<std::size_t>(k)];
          v /= at(i, i);
          column[static_cast<std::size_t>(i)] = v;
          sum += v * v;
        }
        divisors[j] = sum;
      }
    });
  };
  if (r.dtype == DType::f64) {
    fill(r.host<double>());
  } else {
    fill(r.host<float>());
  }
}

std::int64_t CpuOps::slim_divisors_bytes(std::int64_t /*d*/, bool /*inverse*/, DType /*factor*/) {
  return 0;
}

void CpuOps::slim_salience(View w, View divisors, std::int64_t group, View out) {
  check_group(w.cols, group, w.cols);
  REQUIRE(divisors.rows == 1 && divisors.cols == w.cols, "divisors " + divisors.shape());
  REQUIRE(out.dtype == DType::f64 && out.rows == 1 && out.cols == w.cols / group,
          "saliences " + out.shape());
  const auto* divisor = divisors.host<double>();
  auto* sums = out.host<double>();
  pool_.run(out.cols, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(group));
    for (std::int64_t g = begin; g < end; ++g) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < w.rows; ++i) {
        load_row(w, i, g * group, group, row.data());
        for (std::int64_t k = 0; k < group; ++k) {
          const double v =
              static_cast<double>(row[static_cast<std::size_t>(k)]) / divisor[g * group + k];
          sum += v * v;
        }
      }
      sums[g] = sum;
    }
  });
}

void CpuOps::slim_candidates(View w, int bits, std::int64_t group, DType scale_dtype, View base,
                             View lower, View higher) {
  check_group(w.cols, group, w.cols);
  REQUIRE(bits >= 2 && bits <= 7, "candidates around " + std::to_string(bits) + " bits");
  for (const View& v : {base, lower, higher}) {
    REQUIRE(v.dtype == w.dtype && v.rows == w.rows && v.cols == w.cols, "candidate " + v.shape());
  }
  pool_.run(w.rows, 8, [&](std::int64_t begin, std::int64_t end) {
    const auto n = static_cast<std::size_t>(group);
    std::vector<float> row(n), middle(n), other(n);
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t first = 0; first < w.cols; first += group) {
        load_row(w, i, first, group, row.data());
        round_group(row, affine_spec(bits, scale_dtype), middle.data());
        store_row(base, i, first, middle);
        for (const auto& [width, out] : {std::pair(bits - 1, lower), std::pair(bits + 1, higher)}) {
          round_group(row, affine_spec(width, scale_dtype), other.data());
          for (std::size_t j = 0; j < n; ++j) other[j] -= middle[j];
          store_row(out, i, first, other);
        }
      }
    }
  });
}

void CpuOps::softmax_kl(View y, View reference, double floor, View kl) {
  REQUIRE(y.dtype == DType::f32 && reference.dtype == DType::f32 && y.rows == reference.rows &&
              y.cols == reference.cols && y.cols > 0,
          "outputs " + y.shape() + " and " + reference.shape());
  REQUIRE(kl.dtype == DType::f64 && kl.rows == y.rows && kl.cols == 1, "divergences " + kl.shape());
  REQUIRE(floor > 0.0 && floor < 1.0, "floor of a probability " + std::to_string(floor));
  const double lowest = std::log(floor);
  pool_.run(y.rows, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* a = y.host<float>() + r * y.stride;
      const float* b = reference.host<float>() + r * reference.stride;
      const double a_sum = log_sum_exp(a, y.cols), b_sum = log_sum_exp(b, y.cols);
      double sum = 0.0;
      for (std::int64_t o = 0; o < y.cols; ++o) {
        const double log_a = std::max(static_cast<double>(a[o]) - a_sum, lowest);
        const double log_b = std::max(static_cast<double>(b[o]) - b_sum, lowest);
        sum += static_cast<double>(std::exp(static_cast<float>(log_a))) * (log_a - log_b);
      }
      kl.host<double>()[r * kl.stride] += sum;
    }
  });
}

void CpuOps::slim_decode(const SlimDecode& p) {
  const std::int64_t rows = p.codes.rows, d = p.codes.cols;
  check_group(d, p.group, d);
  const std::int64_t groups = d / p.group;
  REQUIRE(p.bits.rows == 1 && p.bits.cols == groups, "bits " + p.bits.shape());
  REQUIRE(p.out.rows == rows && p.out.cols == d, "decoded weights " + p.out.shape());
  for (const View& v : {p.scales, p.means, p.zeros}) {
    REQUIRE(v.rows == rows && v.cols == groups, "coefficients " + v.shape());
  }
  pool_.run(rows, 8, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> values(static_cast<std::size_t>(p.group));
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t g = 0; g < groups; ++g) {
        const float scale = p.scales.host<float>()[r * p.scales.stride + g];
        const float mean = p.means.host<float>()[r * p.means.stride + g];
        const auto zero = static_cast<float>(p.zeros.host<std::int32_t>()[r * p.zeros.stride + g]);
        const bool sign = p.bits.host<std::uint8_t>()[g] == 1;
        const auto* code = p.codes.host<std::uint8_t>() + r * p.codes.stride + g * p.group;
        for (std::size_t j = 0; j < values.size(); ++j) {
          values[j] = sign ? mean + (code[j] != 0 ? scale : -scale)
                           : scale * (static_cast<float>(code[j]) - zero);
        }
        store_row(p.out, r, g * p.group, values);
      }
    }
  });
}

std::int64_t CpuOps::slim_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t group,
                                          DType factor) {
  return look_back_bytes(rows, d, group, factor);
}

void CpuOps::slim_sweep(const SlimProblem& problem) {
  check_problem(problem);
  REQUIRE(problem.workspace.bytes() >=
              slim_workspace_bytes(problem.w.rows, problem.w.cols, problem.group, problem.r.dtype),
          "sweep workspace, found " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    SlimSweep<double>(pool_, problem).run();
  } else {
    SlimSweep<float>(pool_, problem).run();
  }
}

}  // namespace engine
