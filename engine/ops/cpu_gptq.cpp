// CpuOps: the GPTQ sweep in its look-back form (docs/methods/gptq.md).
//
// With the damped second moment H = R R^T, R upper triangular, the factor that GPTQ compensates
// with is U = R^-1. Let E = w^ - w of the finished columns P. The weights that the original
// algorithm would hold in the columns F at this point are
//   current[:, F] = w[:, F] - (E[:, P] R[P, F]) U[F, F],    U[F, F] = R[F, F]^-1,
// so nothing but E and R is needed to start a block, and E can live where w was.
#include <algorithm>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"
#include "engine/weight/grid.h"

namespace engine {

namespace {

// Floats that the sweep of one problem keeps; the panel is only needed to convert an f64 factor.
struct SweepFloats {
  std::int64_t products;  // [rows, block]
  std::int64_t inverse;   // [block, block]
  std::int64_t panel;     // [d, block]

  SweepFloats(std::int64_t rows, std::int64_t d, std::int64_t block, DType factor)
      : products(rows * block),
        inverse(block * block),
        panel(factor == DType::f64 ? d * block : 0) {}
  [[nodiscard]] std::int64_t total() const { return products + inverse + panel; }
};

template <class T>
class Sweep {
 public:
  Sweep(ThreadPool& pool, const GptqProblem& problem)
      : pool_(pool),
        p_(problem),
        rows_(problem.w.rows),
        d_(problem.w.cols),
        w_(problem.w.host<float>()),
        r_(problem.r.host<T>()),
        scales_(problem.scales.host<float>()),
        zeros_(problem.zeros.host<std::int32_t>()),
        codes_(problem.codes.host<std::uint8_t>()),
        loss_(problem.loss.host<double>()),
        column_group_(problem.column_group.empty()
                          ? nullptr
                          : checked_indices(problem.column_group, d_, problem.grid.groups(d_),
                                            "column group")) {
    const SweepFloats size(rows_, d_, p_.block, p_.r.dtype);
    products_ = reinterpret_cast<float*>(p_.workspace.host<std::uint8_t>());
    inverse_ = products_ + size.products;
    panel_ = inverse_ + size.inverse;
  }

  void run() {
    for (std::int64_t r = 0; r < rows_; ++r) loss_[r * p_.loss.stride] = 0.0;
    for (std::int64_t i1 = 0; i1 < d_; i1 += p_.block) {
      const std::int64_t i2 = std::min(i1 + p_.block, d_);
      invert_diagonal_block(i1, i2);
      multiply_errors(i1, i2);
      pool_.run(rows_, 8, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) quantize_block(row, i1, i2);
      });
    }
  }

 private:
  [[nodiscard]] T factor(std::int64_t i, std::int64_t j) const { return r_[i * p_.r.stride + j]; }
  // U[i1 + i, i1 + k] of the current block.
  [[nodiscard]] const float* inverse_row(std::int64_t i) const { return inverse_ + i * p_.block; }

  // U[blk, blk] = R[blk, blk]^-1, in the factor's precision, column by column from the diagonal up.
  void invert_diagonal_block(std::int64_t i1, std::int64_t i2) {
    pool_.run(i2 - i1, 8, [&](std::int64_t begin, std::int64_t end) {
      std::vector<T> column(static_cast<std::size_t>(i2 - i1));
      for (std::int64_t j = begin; j < end; ++j) {
        for (std::int64_t i = i2 - i1 - 1; i >= 0; --i) {
          T sum = i == j ? T(1) : T(0);
          for (std::int64_t k = i + 1; k <= j; ++k) {
            sum -= factor(i1 + i, i1 + k) * column[static_cast<std::size_t>(k)];
          }
          const T value = i > j ? T(0) : sum / factor(i1 + i, i1 + i);
          column[static_cast<std::size_t>(i)] = value;
          inverse_[i * p_.block + j] = static_cast<float>(value);
        }
      }
    });
  }

  // products = E[:, :i1] R[:i1, i1..i2).
  void multiply_errors(std::int64_t i1, std::int64_t i2) {
    const float* right = nullptr;
    std::int64_t right_stride = 0;
    if constexpr (std::is_same_v<T, float>) {
      right = r_ + i1;
      right_stride = p_.r.stride;
    } else {
      for (std::int64_t i = 0; i < i1; ++i) {
        for (std::int64_t j = i1; j < i2; ++j) {
          panel_[i * p_.block + j - i1] = static_cast<float>(factor(i, j));
        }
      }
      right = panel_;
      right_stride = p_.block;
    }
    sgemm(pool_, rows_, i2 - i1, i1, w_, p_.w.stride, false, right, right_stride, false, products_,
          p_.block, 0.0F);
  }

  // One row through one block: its current weights, then column after column.
  void quantize_block(std::int64_t row, std::int64_t i1, std::int64_t i2) {
    float* w = w_ + row * p_.w.stride;  // weights from i1 on, E before
    const std::int64_t n = i2 - i1;

    float current[128];
    for (std::int64_t k = 0; k < n; ++k) current[k] = w[i1 + k];
    for (std::int64_t i = 0; i < n && i1 > 0; ++i) {
      const float product = products_[row * p_.block + i];
      for (std::int64_t k = i; k < n; ++k) current[k] -= product * inverse_row(i)[k];
    }

    const std::int64_t unit = p_.grid.unit(d_);
    if (!p_.grids_given && i1 % unit == 0)
      find_current_grid(row, i1, std::min(i1 + unit, d_), n, current);

    double loss = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t u = column_group_ != nullptr ? column_group_[i1 + j] : (i1 + j) / unit;
      const UnitGrid grid{scales_[row * p_.scales.stride + u], zeros_[row * p_.zeros.stride + u]};
      const std::uint8_t code = quantize_value(current[j], grid, p_.grid);
      const float quantized = dequantize_value(code, grid, p_.grid);
      const float error = (current[j] - quantized) / inverse_row(j)[j];
      for (std::int64_t k = j + 1; k < n; ++k) current[k] -= error * inverse_row(j)[k];
      loss += static_cast<double>(error) * static_cast<double>(error);
      codes_[row * p_.codes.stride + i1 + j] = code;
      w[i1 + j] = quantized - w[i1 + j];
    }
    loss_[row * p_.loss.stride] += loss;
  }

  // A group's grid at its first block [i1, i1 + n), from the current weights of all its columns.
  void find_current_grid(std::int64_t row, std::int64_t i1, std::int64_t last, std::int64_t n,
                         const float* current) {
    std::vector<float> rest;
    std::span<const float> weights(current, static_cast<std::size_t>(n));
    if (last > i1 + n) {
      rest = current_weights(w_ + row * p_.w.stride, i1, last);
      weights = rest;
    }
    const UnitGrid grid = find_unit_grid(weights, p_.grid);
    const std::int64_t u = i1 / p_.grid.unit(d_);
    scales_[row * p_.scales.stride + u] = grid.scale;
    zeros_[row * p_.zeros.stride + u] = grid.zero;
  }

  // w[F] - y with y R[F, F] = E[P] R[P, F], for F = [first, last) longer than a block.
  std::vector<float> current_weights(const float* w, std::int64_t first, std::int64_t last) const {
    std::vector<float> current(w + first, w + last);
    if (first == 0) return current;
    std::vector<double> y(current.size(), 0.0);
    const auto add_row = [&](double factor_of_row, std::int64_t i, std::int64_t from) {
      for (std::int64_t k = from; k < last; ++k) {
        y[static_cast<std::size_t>(k - first)] += factor_of_row * static_cast<double>(factor(i, k));
      }
    };
    for (std::int64_t i = 0; i < first; ++i) add_row(static_cast<double>(w[i]), i, first);
    for (std::int64_t i = first; i < last; ++i) {
      const auto at = static_cast<std::size_t>(i - first);
      y[at] /= static_cast<double>(factor(i, i));
      add_row(-y[at], i, i + 1);
      current[at] -= static_cast<float>(y[at]);
    }
    return current;
  }

  ThreadPool& pool_;
  const GptqProblem& p_;
  std::int64_t rows_;
  std::int64_t d_;
  float* w_;
  const T* r_;
  float* scales_;
  std::int32_t* zeros_;
  std::uint8_t* codes_;
  double* loss_;
  const std::int32_t* column_group_;
  float* products_;
  float* inverse_;
  float* panel_;
};

void check_problem(const GptqProblem& p) {
  check_grid_spec(p.grid);
  const std::int64_t rows = p.w.rows, d = p.w.cols, groups = p.grid.groups(d);
  const auto shaped = [](const View& v, DType dtype, std::int64_t r, std::int64_t c) {
    return v.dtype == dtype && v.rows == r && v.cols == c;
  };
  REQUIRE(p.block >= 1 && p.block <= 128, "block of " + std::to_string(p.block));
  REQUIRE(p.grids_given || p.grid.group % p.block == 0, "blocks of " + std::to_string(p.block) +
                                                            " do not divide groups of " +
                                                            std::to_string(p.grid.group));
  REQUIRE(p.grids_given || p.column_group.empty(), "groups found on the way are consecutive");
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "weights " + p.w.shape());
  REQUIRE((p.r.dtype == DType::f32 || p.r.dtype == DType::f64) && p.r.rows == d && p.r.cols == d,
          "factor " + p.r.shape());
  REQUIRE(shaped(p.scales, DType::f32, rows, groups), "scales " + p.scales.shape());
  REQUIRE(shaped(p.zeros, DType::i32, rows, groups), "zeros " + p.zeros.shape());
  REQUIRE(shaped(p.codes, DType::u8, rows, d), "codes " + p.codes.shape());
  REQUIRE(shaped(p.loss, DType::f64, rows, 1), "loss " + p.loss.shape());
}

}  // namespace

std::int64_t CpuOps::gptq_workspace_bytes(std::int64_t rows, std::int64_t d, std::int64_t block,
                                          DType factor) {
  return SweepFloats(rows, d, block, factor).total() * static_cast<std::int64_t>(sizeof(float));
}

void CpuOps::gptq_sweep(const GptqProblem& problem) {
  check_problem(problem);
  REQUIRE(problem.workspace.bytes() >=
              gptq_workspace_bytes(problem.w.rows, problem.w.cols, problem.block, problem.r.dtype),
          "sweep workspace, found " + problem.workspace.shape());
  if (problem.r.dtype == DType::f64) {
    Sweep<double>(pool_, problem).run();
  } else {
    Sweep<float>(pool_, problem).run();
  }
}

}  // namespace engine
