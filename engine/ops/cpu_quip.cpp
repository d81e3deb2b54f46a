// CpuOps: QuIP's sweep and its greedy passes, a panel of columns at a time
// (docs/methods/quip.md).
#include <algorithm>
#include <cmath>
#include <string>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"

namespace engine {

namespace {

constexpr std::int64_t panel_columns = 128;

bool shaped(const View& v, DType dtype, std::int64_t rows, std::int64_t cols) {
  return v.dtype == dtype && v.rows == rows && v.cols == cols;
}

float top_code(int bits) {
  REQUIRE(bits >= 1 && bits <= 8, "codes of " + std::to_string(bits) + " bits");
  return static_cast<float>((1 << bits) - 1);
}

template <class T>
class Ldlq {
 public:
  Ldlq(ThreadPool& pool, const LdlqProblem& p)
      : pool_(pool),
        p_(p),
        d_(p.w.cols),
        top_(top_code(p.bits)),
        products_(reinterpret_cast<float*>(p.workspace.host<std::uint8_t>())),
        feedback_(products_ + p.w.rows * panel_columns) {}

  void run() {
    auto* loss = p_.loss.host<double>();
    for (std::int64_t r = 0; r < p_.w.rows; ++r) loss[r * p_.loss.stride] = 0.0;
    for (std::int64_t first = 0; first < d_; first += panel_columns) {
      const std::int64_t last = std::min(first + panel_columns, d_);
      make_feedback(first, last);
      sgemm(pool_, p_.w.rows, last - first, first, p_.w.host<float>(), p_.w.stride, false,
            feedback_, panel_columns, false, products_, panel_columns, 0.0F);
      pool_.run(p_.w.rows, 8, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) round_row(row, first, last);
      });
    }
  }

 private:
  [[nodiscard]] T factor(std::int64_t i, std::int64_t j) const {
    return p_.r.host<T>()[i * p_.r.stride + j];
  }

  // R_kj / R_jj for the columns of the panel and all k < j.
  void make_feedback(std::int64_t first, std::int64_t last) {
    pool_.run(last, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        for (std::int64_t j = first; j < last; ++j) {
          feedback_[k * panel_columns + j - first] =
              k < j ? static_cast<float>(factor(k, j) / factor(j, j)) : 0.0F;
        }
      }
    });
  }

  void round_row(std::int64_t row, std::int64_t first, std::int64_t last) {
    float* w = p_.w.host<float>() + row * p_.w.stride + first;
    std::uint8_t* codes = p_.codes.host<std::uint8_t>() + row * p_.codes.stride + first;
    const std::int64_t n = last - first;
    float current[panel_columns];
    for (std::int64_t j = 0; j < n; ++j) current[j] = w[j] - products_[row * panel_columns + j];
    double loss = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      const float code = std::clamp(std::floor(current[j] + 0.5F), 0.0F, top_);
      const float error = code - w[j];
      const float* feedback = feedback_ + (first + j) * panel_columns;
      for (std::int64_t k = j + 1; k < n; ++k) current[k] -= error * feedback[k];
      const double lost = static_cast<double>(code - current[j]) *
                          static_cast<double>(factor(first + j, first + j));
      loss += lost * lost;
      codes[j] = static_cast<std::uint8_t>(code);
      w[j] = error;
    }
    p_.loss.host<double>()[row * p_.loss.stride] += loss;
  }

  ThreadPool& pool_;
  const LdlqProblem& p_;
  std::int64_t d_;
  float top_;
  float* products_;  // [rows, panel_columns]
  float* feedback_;  // [d, panel_columns]
};

// One row through one panel of a greedy pass. product: E H[:, panel] with E as before the panel.
std::int32_t descend_row(const GreedyProblem& p, float top, std::int64_t row, std::int64_t first,
                         std::int64_t last, float* product) {
  float* e = p.e.host<float>() + row * p.e.stride;
  std::uint8_t* codes = p.codes.host<std::uint8_t>() + row * p.codes.stride;
  std::int32_t changed = 0;
  for (std::int64_t j = first; j < last; ++j) {
    const float* h = p.h.host<float>() + j * p.h.stride;
    const auto code = static_cast<float>(codes[j]);
    const float step = code - std::nearbyint(code - product[j - first] / h[j]);
    e[j] -= step;
    for (std::int64_t k = j + 1; k < last; ++k) product[k - first] -= step * h[k];
    // Nothing else of the pass looks at this code, so it can be clamped here.
    const auto after = static_cast<std::uint8_t>(std::clamp(code - step, 0.0F, top));
    changed += after == codes[j] ? 0 : 1;
    codes[j] = after;
  }
  return changed;
}

}  // namespace

void CpuOps::column_squares(View w, View out) {
  REQUIRE(shaped(out, DType::f64, 1, w.cols), "column squares, found " + out.shape());
  auto* sums = out.host<double>();
  // Pieces of columns, so that the order of additions does not depend on the threads.
  pool_.run(w.cols, 64, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(end - begin));
    std::fill(sums + begin, sums + end, 0.0);
    for (std::int64_t r = 0; r < w.rows; ++r) {
      load_row(w, r, begin, end - begin, row.data());
      for (std::int64_t j = begin; j < end; ++j) {
        const auto v = static_cast<double>(row[static_cast<std::size_t>(j - begin)]);
        sums[j] += v * v;
      }
    }
  });
}

void CpuOps::scale_moment(View h, View s, double scale, View out) {
  const std::int64_t d = h.rows;
  REQUIRE(h.cols == d && d > 0 && shaped(out, DType::f32, d, d), "moment " + h.shape());
  REQUIRE(s.empty() || shaped(s, DType::f32, 1, d), "scales " + s.shape());
  const auto* from = h.host<float>();
  const float* factors = s.empty() ? nullptr : s.host<float>();
  auto* to = out.host<float>();
  const auto factor = [&](std::int64_t i) {
    return factors == nullptr ? 1.0 : static_cast<double>(factors[i]);
  };
  pool_.run(d, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t j = 0; j < d; ++j) {
        const double stored = from[std::max(i, j) * h.stride + std::min(i, j)];
        to[i * out.stride + j] = static_cast<float>(scale * (factor(i) * factor(j)) * stored);
      }
    }
  });
}

void CpuOps::code_targets(View w, View perm, View scales, View zeros, int bits, View out) {
  const float top = top_code(bits);
  REQUIRE(w.dtype == DType::f32 && shaped(out, DType::f32, w.rows, w.cols),
          "targets of " + w.shape() + ", found " + out.shape());
  REQUIRE((scales.rows == w.rows || scales.rows == 1) && scales.cols == 1,
          "scales " + scales.shape());
  REQUIRE(zeros.empty() || shaped(zeros, DType::i32, scales.rows, 1), "zeros " + zeros.shape());
  const std::int32_t* order = checked_permutation(perm, w.cols);
  pool_.run(w.rows, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t unit = scales.rows == 1 ? 0 : r;
      const float scale = scales.host<float>()[unit * scales.stride];
      const float zero = zeros.empty()
                             ? top / 2
                             : static_cast<float>(zeros.host<std::int32_t>()[unit * zeros.stride]);
      const float* from = w.host<float>() + r * w.stride;
      float* to = out.host<float>() + r * out.stride;
      for (std::int64_t j = 0; j < w.cols; ++j) {
        to[j] = std::clamp(from[order[j]] / scale + zero, 0.0F, top);
      }
    }
  });
}

std::int64_t CpuOps::ldlq_workspace_bytes(std::int64_t rows, std::int64_t d) {
  return (rows + d) * panel_columns * static_cast<std::int64_t>(sizeof(float));
}

void CpuOps::ldlq_sweep(const LdlqProblem& p) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  REQUIRE(p.w.dtype == DType::f32 && rows > 0 && d > 0, "targets " + p.w.shape());
  REQUIRE((p.r.dtype == DType::f32 || p.r.dtype == DType::f64) && p.r.rows == d && p.r.cols == d,
          "factor " + p.r.shape());
  REQUIRE(shaped(p.codes, DType::u8, rows, d), "codes " + p.codes.shape());
  REQUIRE(shaped(p.loss, DType::f64, rows, 1), "loss " + p.loss.shape());
  REQUIRE(p.workspace.bytes() >= ldlq_workspace_bytes(rows, d),
          "sweep workspace, found " + p.workspace.shape());
  if (p.r.dtype == DType::f64) {
    Ldlq<double>(pool_, p).run();
  } else {
    Ldlq<float>(pool_, p).run();
  }
}

std::int64_t CpuOps::greedy_workspace_bytes(std::int64_t rows, std::int64_t /*d*/) {
  return rows * panel_columns * static_cast<std::int64_t>(sizeof(float));
}

void CpuOps::ldlq_greedy(const GreedyProblem& p) {
  const std::int64_t rows = p.e.rows, d = p.e.cols;
  const float top = top_code(p.bits);
  REQUIRE(p.e.dtype == DType::f32 && rows > 0 && d > 0, "errors " + p.e.shape());
  REQUIRE(shaped(p.h, DType::f32, d, d), "moment " + p.h.shape());
  REQUIRE(shaped(p.codes, DType::u8, rows, d), "codes " + p.codes.shape());
  REQUIRE(shaped(p.changed, DType::i32, rows, 1), "changes " + p.changed.shape());
  REQUIRE(p.workspace.bytes() >= greedy_workspace_bytes(rows, d),
          "greedy workspace, found " + p.workspace.shape());
  auto* products = reinterpret_cast<float*>(p.workspace.host<std::uint8_t>());
  auto* changed = p.changed.host<std::int32_t>();
  for (std::int64_t r = 0; r < rows; ++r) changed[r * p.changed.stride] = 0;
  for (std::int64_t first = 0; first < d; first += panel_columns) {
    const std::int64_t last = std::min(first + panel_columns, d);
    sgemm(pool_, rows, last - first, d, p.e.host<float>(), p.e.stride, false,
          p.h.host<float>() + first, p.h.stride, false, products, panel_columns, 0.0F);
    pool_.run(rows, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        changed[r * p.changed.stride] +=
            descend_row(p, top, r, first, last, products + r * panel_columns);
      }
    });
  }
}

}  // namespace engine
