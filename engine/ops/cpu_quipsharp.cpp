// CpuOps: QuIP#'s sweeps, a panel of columns at a time (docs/methods/quipsharp.md).
#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/weight/e8_search.h"

namespace engine {

namespace {

constexpr std::int64_t panel_columns = 128;
constexpr std::int64_t width = 8;  // of a block
constexpr E8Tables tables = make_e8_tables();

using Block = std::array<double, static_cast<std::size_t>(width* width)>;

std::size_t at(std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * width + j); }

// The inverse of an upper triangular block.
Block invert_upper(const Block& r) {
  Block u{};
  for (std::int64_t j = 0; j < width; ++j) {
    for (std::int64_t i = j; i >= 0; --i) {
      double sum = i == j ? 1.0 : 0.0;
      for (std::int64_t k = i + 1; k <= j; ++k) sum -= r[at(i, k)] * u[at(k, j)];
      u[at(i, j)] = sum / r[at(i, i)];
    }
  }
  return u;
}

// The inverse of a symmetric positive definite block, by Gauss-Jordan.
Block invert_positive(Block a) {
  Block inverse{};
  for (std::int64_t i = 0; i < width; ++i) inverse[at(i, i)] = 1.0;
  for (std::int64_t k = 0; k < width; ++k) {
    const double pivot = 1.0 / a[at(k, k)];
    for (std::int64_t j = 0; j < width; ++j) {
      a[at(k, j)] *= pivot;
      inverse[at(k, j)] *= pivot;
    }
    for (std::int64_t i = 0; i < width; ++i) {
      if (i == k) continue;
      const double factor = a[at(i, k)];
      for (std::int64_t j = 0; j < width; ++j) {
        a[at(i, j)] -= factor * a[at(k, j)];
        inverse[at(i, j)] -= factor * inverse[at(k, j)];
      }
    }
  }
  return inverse;
}

template <class T>
class QuipSharp {
 public:
  QuipSharp(ThreadPool& pool, const QuipSharpProblem& p)
      : pool_(pool),
        p_(p),
        rows_(p.w.rows),
        d_(p.w.cols),
        feedback_(reinterpret_cast<float*>(p.workspace.host<std::uint8_t>())),
        products_(feedback_ + d_ * panel_columns) {}

  void run() {
    for (std::int64_t r = 0; r < rows_; ++r) {
      std::fill_n(p_.e.host<float>() + r * p_.e.stride, d_, 0.0F);
      p_.loss.host<double>()[r * p_.loss.stride] = 0.0;
    }
    for (int pass = 0; pass <= p_.tuning; ++pass) {
      for (std::int64_t first = 0; first < d_; first += panel_columns) {
        const std::int64_t n = std::min(panel_columns, d_ - first);
        make_feedback(first, n, pass > 0);
        // Of what is outside the panel; the first pass has nothing after it.
        product(0, first, n, 0.0F);
        if (pass > 0) product(first + n, d_, n, 1.0F);
        pool_.run(rows_, 8, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t row = begin; row < end; ++row) round_row(row, first, n, pass > 0);
        });
      }
    }
  }

 private:
  // The matrix that the sum's terms are taken from: R, or H while tuning.
  [[nodiscard]] double source(std::int64_t i, std::int64_t j, bool tuning) const {
    return tuning ? static_cast<double>(p_.h.host<float>()[i * p_.h.stride + j])
                  : static_cast<double>(p_.r.host<T>()[i * p_.r.stride + j]);
  }

  // S_jk S_kk^-1 for the blocks k of the panel and all rows j, 0 in block k itself and, in the
  // first pass, below it. Also the quadratic form of the loss in block k.
  void make_feedback(std::int64_t first, std::int64_t n, bool tuning) {
    pool_.run(n / width, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        const std::int64_t c0 = first + b * width;
        Block s{}, form{};
        for (std::int64_t i = 0; i < width; ++i) {
          for (std::int64_t j = 0; j < width; ++j) s[at(i, j)] = source(c0 + i, c0 + j, tuning);
        }
        const Block inverse = tuning ? invert_positive(s) : invert_upper(s);
        for (std::int64_t i = 0; i < width; ++i) {
          for (std::int64_t j = 0; j < width; ++j) {
            for (std::int64_t k = 0; k < width; ++k) form[at(i, j)] += s[at(i, k)] * s[at(j, k)];
          }
        }
        forms_[static_cast<std::size_t>(b)] = tuning ? s : form;
        for (std::int64_t j = 0; j < d_; ++j) {
          float* out = feedback_ + j * panel_columns + b * width;
          const bool taken = tuning ? j < c0 || j >= c0 + width : j < c0;
          for (std::int64_t c = 0; c < width; ++c) {
            double sum = 0;
            for (std::int64_t k = 0; taken && k < width; ++k) {
              sum += source(j, c0 + k, tuning) * inverse[at(k, c)];
            }
            out[c] = static_cast<float>(sum);
          }
        }
      }
    });
  }

  // products = D[:, from..to) feedback[from..to, :) + beta products.
  void product(std::int64_t from, std::int64_t to, std::int64_t n, float beta) {
    if (from == to && beta == 1.0F) return;
    sgemm(pool_, rows_, n, to - from, p_.e.host<float>() + from, p_.e.stride, false,
          feedback_ + from * panel_columns, panel_columns, false, products_, panel_columns, beta);
  }

  void round_row(std::int64_t row, std::int64_t first, std::int64_t n, bool tuning) const {
    const float* w = p_.w.host<float>() + row * p_.w.stride + first;
    float* e = p_.e.host<float>() + row * p_.e.stride + first;
    double loss = 0.0;
    for (std::int64_t b = 0; b < n; b += width) {
      float t[width], x[width], value[width];
      for (std::int64_t c = 0; c < width; ++c) t[c] = 0.0F;
      for (std::int64_t j = 0; j < n; ++j) {
        const float* feedback = feedback_ + (first + j) * panel_columns + b;
        for (std::int64_t c = 0; c < width; ++c) t[c] += e[j] * feedback[c];
      }
      for (std::int64_t c = 0; c < width; ++c) {
        t[c] += w[b + c] + products_[row * panel_columns + b + c];
        x[width - 1 - c] = t[c];
      }
      store_codes(row, (d_ - first - b) / width - 1, quantize(x, value));

      // The loss in this block is a quadratic form of w^ - t, up to a constant: the difference to
      // before is (new - old) form (new + old).
      double change[width], sum[width];
      for (std::int64_t c = 0; c < width; ++c) {
        const float old = tuning ? w[b + c] - e[b + c] - t[c] : 0.0F;
        const float now = value[width - 1 - c] - t[c];
        change[c] = static_cast<double>(now - old);
        sum[c] = static_cast<double>(now + old);
        e[b + c] = w[b + c] - value[width - 1 - c];
      }
      const Block& form = forms_[static_cast<std::size_t>(b / width)];
      for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t j = 0; j < width; ++j) loss += change[i] * form[at(i, j)] * sum[j];
      }
    }
    p_.loss.host<double>()[row * p_.loss.stride] += loss;
  }

  E8Codes quantize(const float (&x)[width], float (&value)[width]) const {
    if (p_.bits == 2) return e8_quantize<2>(x, tables, value);
    if (p_.bits == 3) return e8_quantize<3>(x, tables, value);
    return e8_quantize<4>(x, tables, value);
  }

  void store_codes(std::int64_t row, std::int64_t k, E8Codes codes) const {
    p_.codes.host<std::int16_t>()[row * p_.codes.stride + k] =
        static_cast<std::int16_t>(codes.first);
    if (p_.bits == 3) {
      p_.residual.host<std::uint8_t>()[row * p_.residual.stride + k] =
          static_cast<std::uint8_t>(codes.second);
    } else if (p_.bits == 4) {
      p_.residual.host<std::int16_t>()[row * p_.residual.stride + k] =
          static_cast<std::int16_t>(codes.second);
    }
  }

  ThreadPool& pool_;
  const QuipSharpProblem& p_;
  std::int64_t rows_;
  std::int64_t d_;
  float* feedback_;  // [d, 128]
  float* products_;  // [rows, 128]
  std::array<Block, static_cast<std::size_t>(panel_columns / width)> forms_{};
};

bool shaped(const View& v, DType dtype, std::int64_t rows, std::int64_t cols) {
  return v.dtype == dtype && v.rows == rows && v.cols == cols;
}

}  // namespace

void check_quipsharp(const QuipSharpProblem& p, std::int64_t workspace_bytes) {
  const std::int64_t rows = p.w.rows, d = p.w.cols;
  REQUIRE(p.bits >= 2 && p.bits <= 4 && p.tuning >= 0,
          "quipsharp_sweep: " + std::to_string(p.bits) + " bits, " + std::to_string(p.tuning) +
              " passes");
  REQUIRE(rows > 0 && d > 0 && d % 8 == 0 && p.w.dtype == DType::f32,
          "quipsharp_sweep: w " + p.w.shape());
  REQUIRE(p.r.dtype == DType::f32 || p.r.dtype == DType::f64,
          "quipsharp_sweep: factor " + p.r.shape());
  REQUIRE(shaped(p.r, p.r.dtype, d, d) && shaped(p.h, DType::f32, d, d) &&
              shaped(p.e, DType::f32, rows, d) && shaped(p.codes, DType::i16, rows, d / 8) &&
              shaped(p.loss, DType::f64, rows, 1),
          "quipsharp_sweep: r " + p.r.shape() + ", h " + p.h.shape() + ", e " + p.e.shape() +
              ", codes " + p.codes.shape() + ", loss " + p.loss.shape());
  REQUIRE(p.bits == 2 ? p.residual.empty()
                      : shaped(p.residual, p.bits == 3 ? DType::u8 : DType::i16, rows, d / 8),
          "quipsharp_sweep: residual codes " + p.residual.shape());
  REQUIRE(p.workspace.contiguous() && p.workspace.bytes() >= workspace_bytes,
          "quipsharp_sweep: workspace " + p.workspace.shape());
}

void CpuOps::quipsharp_targets(View w, View squares, double factor, View out, View scale) {
  REQUIRE(out.rows == w.cols && out.cols == w.rows && squares.count() == 1 && scale.count() == 1,
          "quipsharp_targets: " + w.shape() + " to " + out.shape());
  const double mean = *squares.host<double>() / static_cast<double>(w.count());
  const float s = mean > 0 ? static_cast<float>(std::sqrt(mean) / factor) : 1.0F;
  *scale.host<float>() = s;
  const auto* in = w.host<float>();
  auto* to = out.host<float>();
  pool_.run(out.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = 0; j < out.cols; ++j) {
      const float* column = in + (out.cols - 1 - j) * w.stride;
      for (std::int64_t r = begin; r < end; ++r) to[r * out.stride + j] = column[r] / s;
    }
  });
}

std::int64_t CpuOps::quipsharp_workspace_bytes(std::int64_t rows, std::int64_t d) {
  return (rows + d) * panel_columns * 4;
}

void CpuOps::quipsharp_sweep(const QuipSharpProblem& problem) {
  check_quipsharp(problem, quipsharp_workspace_bytes(problem.w.rows, problem.w.cols));
  if (problem.r.dtype == DType::f64) {
    QuipSharp<double>(pool_, problem).run();
  } else {
    QuipSharp<float>(pool_, problem).run();
  }
}

}  // namespace engine
