// CpuOps: PB-LLM (docs/methods/pbllm.md). First the masks and the levels of a whole linear, all
// from the original weights; then the sweep, GPTQ's with another rounding.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string>

#include "engine/ops/cpu_look_back.h"
#include "engine/ops/cpu_ops.h"
#include "engine/weight/grid.h"

namespace engine {

namespace {

bool shaped(const View& v, DType dtype, std::int64_t rows, std::int64_t cols) {
  return v.dtype == dtype && v.rows == rows && v.cols == cols;
}

bool is_factor(const View& r, std::int64_t d) {
  return (r.dtype == DType::f32 || r.dtype == DType::f64) && r.rows == d && r.cols == d;
}

// U_jj = 1 / R_jj.
float inverse_diagonal(const View& r, std::int64_t j) {
  return r.dtype == DType::f64 ? static_cast<float>(1.0 / r.host<double>()[j * r.stride + j])
                               : 1.0F / r.host<float>()[j * r.stride + j];
}

class Selection {
 public:
  explicit Selection(const PbllmSelect& p)
      : p_(p), d_(p.w.cols), width_(p.group == 0 ? p.w.cols : p.group) {}

  // One group of columns: threshold, mask and levels. histogram: 256 counts.
  void run(std::int64_t group, std::int64_t* histogram) const {
    const std::int64_t first = group * width_;
    const auto place =
        static_cast<std::int64_t>(static_cast<double>(p_.w.rows * width_) * p_.low_share);
    const std::uint32_t threshold = order_statistic(first, place, histogram);
    for (std::int64_t row = 0; row < p_.w.rows; ++row) find_levels(row, group, threshold);
  }

 private:
  // The bits of a value >= 0, which order as the values do.
  [[nodiscard]] std::uint32_t rank(std::int64_t row, std::int64_t j) const {
    const float w = p_.w.host<float>()[row * p_.w.stride + j];
    if (p_.metric == PbllmMetric::magnitude) return std::bit_cast<std::uint32_t>(std::fabs(w));
    const float u = inverse_diagonal(p_.r, j);
    return std::bit_cast<std::uint32_t>(w * w / (u * u));
  }

  // The rank at `place` in increasing order, one byte after the other from the top.
  [[nodiscard]] std::uint32_t order_statistic(std::int64_t first, std::int64_t place,
                                              std::int64_t* histogram) const {
    std::uint32_t found = 0;
    for (unsigned shift = 32; shift > 0;) {
      const std::uint64_t known = ~std::uint64_t{0} << shift;  // bits decided so far
      shift -= 8;
      std::fill_n(histogram, 256, 0);
      for (std::int64_t row = 0; row < p_.w.rows; ++row) {
        for (std::int64_t j = first; j < first + width_; ++j) {
          const std::uint32_t bits = rank(row, j);
          if (((bits ^ found) & known) == 0) ++histogram[(bits >> shift) & 255U];
        }
      }
      std::uint32_t byte = 0;
      while (place >= histogram[byte]) place -= histogram[byte++];
      found |= byte << shift;
    }
    return found;
  }

  void find_levels(std::int64_t row, std::int64_t group, std::uint32_t threshold) const {
    const std::int64_t first = group * width_;
    const float* w = p_.w.host<float>() + row * p_.w.stride;
    std::uint8_t* salient = p_.salient.host<std::uint8_t>() + row * p_.salient.stride;
    // Both averages run over the whole row of the group: salient weights count as zeros.
    const auto n = static_cast<double>(width_);
    double sum = 0.0;
    for (std::int64_t j = first; j < first + width_; ++j) {
      salient[j] = rank(row, j) > threshold ? 1 : 0;
      if (salient[j] == 0) sum += static_cast<double>(w[j]);
    }
    const float mean = round_to(p_.scale_dtype, static_cast<float>(sum / n));
    double distance = 0.0;
    for (std::int64_t j = first; j < first + width_; ++j) {
      distance += static_cast<double>(std::fabs((salient[j] == 0 ? w[j] : 0.0F) - mean));
    }
    p_.means.host<float>()[row * p_.means.stride + group] = mean;
    p_.scales.host<float>()[row * p_.scales.stride + group] =
        round_to(p_.scale_dtype, static_cast<float>(distance / n));
  }

  const PbllmSelect& p_;
  std::int64_t d_;
  std::int64_t width_;
};

template <class T>
void sweep(ThreadPool& pool, const PbllmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols, group = d / p.means.cols;
  LookBack<T> back(pool, p.w, p.r, p.block, p.workspace);
  double* loss = p.loss.host<double>();
  for (std::int64_t r = 0; r < rows; ++r) loss[r * p.loss.stride] = 0.0;

  const auto round_row = [&](std::int64_t row, std::int64_t first, std::int64_t n) {
    float* w = p.w.host<float>() + row * p.w.stride + first;
    const std::uint8_t* salient = p.salient.host<std::uint8_t>() + row * p.salient.stride + first;
    std::uint8_t* codes = p.codes.host<std::uint8_t>() + row * p.codes.stride + first;
    const float* means = p.means.host<float>() + row * p.means.stride;
    const float* scales = p.scales.host<float>() + row * p.scales.stride;
    const UnitGrid high{p.high_scales.host<float>()[row * p.high_scales.stride],
                        p.high_zeros.host<std::int32_t>()[row * p.high_zeros.stride]};
    std::array<float, 128> current;
    if (p.compensate) {
      back.current(row, current.data());
    } else {
      std::copy_n(w, n, current.begin());
    }
    double sum = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      const float x = current[static_cast<std::size_t>(j)];
      float q = 0.0F;
      if (salient[j] != 0) {
        codes[j] = quantize_value(x, high, p.high);
        q = dequantize_value(codes[j], high, p.high);
      } else {
        const std::int64_t unit = (first + j) / group;
        codes[j] = x >= means[unit] ? 1 : 0;
        q = means[unit] + (codes[j] != 0 ? scales[unit] : -scales[unit]);
      }
      const float error = (x - q) / inverse_diagonal(p.r, first + j);
      if (p.compensate) {
        const float* u = back.inverse_row(j);
        for (std::int64_t k = j + 1; k < n; ++k)
          current[static_cast<std::size_t>(k)] -= error * u[k];
      }
      sum += static_cast<double>(error) * static_cast<double>(error);
      w[j] = q - w[j];
    }
    loss[row * p.loss.stride] += sum;
  };

  for (std::int64_t first = 0; first < d; first += p.block) {
    const std::int64_t last = std::min(first + p.block, d);
    if (p.compensate) back.enter(first, last);
    pool.run(rows, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) round_row(row, first, last - first);
    });
  }
}

}  // namespace

std::int64_t CpuOps::pbllm_select_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                        std::int64_t groups) {
  return groups * 256 * static_cast<std::int64_t>(sizeof(std::int64_t));
}

void CpuOps::pbllm_select(const PbllmSelect& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "weights " + p.w.shape());
  REQUIRE(p.group >= 0 && (p.group == 0 || d % p.group == 0),
          "groups of " + std::to_string(p.group) + " of " + std::to_string(d) + " columns");
  REQUIRE(p.low_share >= 0.0 && p.low_share < 1.0, "low_share " + std::to_string(p.low_share));
  REQUIRE(p.metric == PbllmMetric::magnitude || is_factor(p.r, d), "factor " + p.r.shape());
  const std::int64_t groups = p.group == 0 ? 1 : d / p.group;
  REQUIRE(shaped(p.salient, DType::u8, rows, d), "salient " + p.salient.shape());
  REQUIRE(shaped(p.means, DType::f32, rows, groups), "means " + p.means.shape());
  REQUIRE(shaped(p.scales, DType::f32, rows, groups), "scales " + p.scales.shape());
  REQUIRE(p.workspace.bytes() >= pbllm_select_bytes(rows, d, groups),
          "selection workspace, found " + p.workspace.shape());
  const Selection selection(p);
  auto* histograms = reinterpret_cast<std::int64_t*>(p.workspace.host<std::uint8_t>());
  pool_.run(groups, 1,
            [&](std::int64_t g, std::int64_t) { selection.run(g, histograms + g * 256); });
}

std::int64_t CpuOps::pbllm_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                           DType factor) {
  return look_back_bytes(rows, d, block, factor);
}

void CpuOps::pbllm_sweep(const PbllmProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols, groups = p.means.cols;
  check_grid_spec(p.high);
  REQUIRE(p.high.group == 0, "salient weights have one unit per row");
  REQUIRE(p.block >= 1 && p.block <= 128, "block of " + std::to_string(p.block));
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "weights " + p.w.shape());
  REQUIRE(is_factor(p.r, d), "factor " + p.r.shape());
  REQUIRE(groups > 0 && d % groups == 0 && shaped(p.means, DType::f32, rows, groups),
          "means " + p.means.shape());
  REQUIRE(shaped(p.scales, DType::f32, rows, groups), "scales " + p.scales.shape());
  REQUIRE(shaped(p.salient, DType::u8, rows, d), "salient " + p.salient.shape());
  REQUIRE(shaped(p.high_scales, DType::f32, rows, 1), "scales " + p.high_scales.shape());
  REQUIRE(shaped(p.high_zeros, DType::i32, rows, 1), "zeros " + p.high_zeros.shape());
  REQUIRE(shaped(p.codes, DType::u8, rows, d), "codes " + p.codes.shape());
  REQUIRE(shaped(p.loss, DType::f64, rows, 1), "loss " + p.loss.shape());
  REQUIRE(p.workspace.bytes() >= pbllm_workspace_bytes(rows, d, p.block, p.r.dtype),
          "sweep workspace, found " + p.workspace.shape());
  if (p.r.dtype == DType::f64) {
    sweep<double>(pool_, p);
  } else {
    sweep<float>(pool_, p);
  }
}

}  // namespace engine
