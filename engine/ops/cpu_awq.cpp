// CpuOps: the search over channel scales and clip bounds of AWQ (docs/methods/awq.md).
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"
#include "engine/weight/grid.h"

namespace engine {

namespace {

constexpr std::int64_t row_grain = 8;
constexpr std::int64_t clip_rows = 256;    // rows that are searched at a time
constexpr std::int64_t moment_cols = 128;  // columns of the moment that are multiplied at a time

void require(const View& v, DType dtype, std::int64_t rows, std::int64_t cols, const char* what) {
  REQUIRE(v.dtype == dtype && v.rows == rows && v.cols == cols,
          std::string(what) + " expected " + dtype_name(dtype) + " [" + std::to_string(rows) +
              ", " + std::to_string(cols) + "], found " + v.shape());
}

// Calls write(pointer) with out's first element as its own type.
template <class F>
void with_elements(const View& out, F&& write) {
  switch (out.dtype) {
    case DType::f32:
      return write(out.host<float>());
    case DType::f16:
      return write(out.host<f16>());
    case DType::bf16:
      return write(out.host<bf16>());
    default:
      REQUIRE(false, "expected f32, f16 or bf16, found " + out.shape());
  }
}

// w = Q(w) over n values, unit by unit.
void round_trip(float* w, std::int64_t n, const GridSpec& spec) {
  for (std::int64_t first = 0; first < n; first += spec.unit(n)) {
    const std::int64_t last = std::min(first + spec.unit(n), n);
    const UnitGrid grid = find_unit_grid({w + first, static_cast<std::size_t>(last - first)}, spec);
    for (std::int64_t j = first; j < last; ++j) {
      w[j] = dequantize_value(quantize_value(w[j], grid, spec), grid, spec);
    }
  }
}

// What a clip search keeps, in floats. The product is with the moment x^T x / n when that is the
// smaller matrix, else with the samples.
struct ClipFloats {
  bool by_moment;
  std::int64_t right;  // [unit, unit] or nothing: the samples are used where they are
  std::int64_t error;  // [chunk, unit]
  std::int64_t product;

  ClipFloats(std::int64_t rows, std::int64_t unit, std::int64_t n)
      : by_moment(unit <= n),
        right(by_moment ? unit * unit : 0),
        error(std::min(rows, clip_rows) * unit),
        product(std::min(rows, clip_rows) * (by_moment ? unit : n)) {}
  [[nodiscard]] std::int64_t total() const { return right + error + product; }
};

struct Bounds {
  float lo = 0.0F;
  float hi = 0.0F;
};

Bounds clip_bounds(const float* w, std::int64_t n, const AwqClipProblem& p, int i) {
  const auto shrink =
      static_cast<float>(1.0 - static_cast<double>(i) / static_cast<double>(p.steps));
  const auto [lo, hi] = std::minmax_element(w, w + n);
  const auto rounded = [&](float v) { return in_arithmetic(p.grid, v); };
  if (p.ends) return {rounded(*lo * shrink), rounded(*hi * shrink)};
  const float m = rounded(std::max(std::fabs(*lo), std::fabs(*hi)) * shrink);
  return {-m, m};
}

float clamped(float v, Bounds b) { return std::min(std::max(v, b.lo), b.hi); }

}  // namespace

void CpuOps::add_abs_sums(View x, View sums) {
  require(sums, DType::f64, 1, x.cols, "sums");
  auto* out = sums.host<double>();
  constexpr std::int64_t grain = 64;
  pool_.run(x.cols, grain, [&](std::int64_t begin, std::int64_t end) {
    float row[grain];
    for (std::int64_t r = 0; r < x.rows; ++r) {
      load_row(x, r, begin, end - begin, row);
      for (std::int64_t j = begin; j < end; ++j) {
        out[j] += static_cast<double>(std::fabs(row[j - begin]));
      }
    }
  });
}

void CpuOps::scale_weights(View w, View s, View t, View out) {
  require(out, out.dtype, w.rows, w.cols, "scaled weights");
  if (!s.empty()) require(s, DType::f32, 1, w.cols, "column scales");
  if (!t.empty()) require(t, DType::f32, 1, w.rows, "row divisors");
  const float* by_column = s.empty() ? nullptr : s.host<float>();
  const float* by_row = t.empty() ? nullptr : t.host<float>();
  with_elements(out, [&](auto* data) {
    pool_.run(w.rows, row_grain, [&, data](std::int64_t begin, std::int64_t end) {
      std::vector<float> row(static_cast<std::size_t>(w.cols));
      for (std::int64_t r = begin; r < end; ++r) {
        load_row(w, r, 0, w.cols, row.data());
        for (std::int64_t j = 0; j < w.cols; ++j) {
          float v = row[static_cast<std::size_t>(j)];
          if (by_column != nullptr) v = round_to(out.dtype, v * by_column[j]);
          if (by_row != nullptr) v = v / by_row[r];
          store(data[r * out.stride + j], v);
        }
      }
    });
  });
}

void CpuOps::round_trip_scaled(View w, View s, const GridSpec& spec, View out) {
  check_grid_spec(spec);
  require(s, DType::f32, 1, w.cols, "column scales");
  require(out, out.dtype, w.rows, w.cols, "round trip");
  const float* scale = s.host<float>();
  with_elements(out, [&](auto* data) {
    pool_.run(w.rows, row_grain, [&, data](std::int64_t begin, std::int64_t end) {
      std::vector<float> row(static_cast<std::size_t>(w.cols));
      for (std::int64_t r = begin; r < end; ++r) {
        load_row(w, r, 0, w.cols, row.data());
        for (std::int64_t j = 0; j < w.cols; ++j) {
          float& v = row[static_cast<std::size_t>(j)];
          v = in_arithmetic(spec, v * scale[j]);
        }
        round_trip(row.data(), w.cols, spec);
        for (std::int64_t j = 0; j < w.cols; ++j) {
          const float v = row[static_cast<std::size_t>(j)] / scale[j];
          store(data[r * out.stride + j], in_arithmetic(spec, v));
        }
      }
    });
  });
}

std::int64_t CpuOps::moment_loss_bytes(std::int64_t rows, std::int64_t d) {
  const std::int64_t n = std::min(d, moment_cols);
  return (rows * d + d * n + rows * n) * static_cast<std::int64_t>(sizeof(float));
}

// With L the lower triangle of h, its diagonal halved: e h e^T = 2 e L e^T, so for each panel of
// columns only the rows from its first column on are multiplied.
void CpuOps::moment_loss(View a, View b, View h, View out, View workspace) {
  const std::int64_t rows = a.rows, d = a.cols;
  require(b, b.dtype, rows, d, "moment_loss: b");
  require(h, DType::f32, d, d, "moment_loss: h");
  require(out, DType::f64, 1, 1, "moment_loss: out");
  REQUIRE(workspace.bytes() >= moment_loss_bytes(rows, d), "moment_loss: workspace");
  const std::int64_t n_max = std::min(d, moment_cols);
  auto* error = reinterpret_cast<float*>(workspace.host<std::uint8_t>());
  float* panel = error + rows * d;
  float* product = panel + d * n_max;
  const float* moment = h.host<float>();
  pool_.run(rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(d));
    for (std::int64_t r = begin; r < end; ++r) {
      load_row(a, r, 0, d, error + r * d);
      load_row(b, r, 0, d, row.data());
      for (std::int64_t j = 0; j < d; ++j) error[r * d + j] -= row[static_cast<std::size_t>(j)];
    }
  });
  std::vector<double> sums(static_cast<std::size_t>(rows), 0.0);
  for (std::int64_t first = 0; first < d; first += n_max) {
    const std::int64_t n = std::min(n_max, d - first), k = d - first;
    pool_.run(k, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const float v = moment[(first + i) * h.stride + first + j];
          panel[i * n + j] = i > j ? v : i == j ? 0.5F * v : 0.0F;
        }
      }
    });
    sgemm(pool_, rows, n, k, error + first, d, false, panel, n, false, product, n, 0.0F);
    pool_.run(rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        double sum = 0.0;
        for (std::int64_t j = 0; j < n; ++j) {
          sum += static_cast<double>(product[r * n + j]) *
                 static_cast<double>(error[r * d + first + j]);
        }
        sums[static_cast<std::size_t>(r)] += sum;
      }
    });
  }
  double total = 0.0;
  for (const double s : sums) total += s;
  *out.host<double>() = 2.0 * total;
}

std::int64_t CpuOps::awq_clip_bytes(std::int64_t rows, std::int64_t d, const GridSpec& grid,
                                    std::int64_t n) {
  return ClipFloats(rows, grid.unit(d), n).total() * static_cast<std::int64_t>(sizeof(float));
}

void CpuOps::awq_clip(const AwqClipProblem& p) {
  check_grid_spec(p.grid);
  const std::int64_t rows = p.w.rows, d = p.w.cols, n = p.x.rows;
  const std::int64_t unit = p.grid.unit(d), groups = p.grid.groups(d);
  REQUIRE(d % unit == 0, "awq_clip: groups divide the columns");
  REQUIRE(p.steps > 0 && p.candidates > 0 && p.candidates <= std::min(p.steps, 255) && n > 0,
          "awq_clip: 1 to min(steps, 255) candidates and at least one sample");
  require(p.x, DType::f32, n, d, "awq_clip: x");
  require(p.choice, DType::u8, rows, groups, "awq_clip: choice");
  require(p.loss, DType::f32, rows, groups, "awq_clip: loss");
  require(p.plain_loss, DType::f32, rows, groups, "awq_clip: plain loss");
  REQUIRE(p.workspace.bytes() >= awq_clip_bytes(rows, d, p.grid, n), "awq_clip: workspace");
  const ClipFloats size(rows, unit, n);
  auto* moment = reinterpret_cast<float*>(p.workspace.host<std::uint8_t>());
  float* error = moment + size.right;
  float* product = error + size.error;
  const float* x = p.x.host<float>();
  auto* choice = p.choice.host<std::uint8_t>();
  auto* loss = p.loss.host<float>();
  auto* plain = p.plain_loss.host<float>();

  for (std::int64_t u = 0; u < groups; ++u) {
    const std::int64_t at = u * unit;
    if (size.by_moment) {
      sgemm(pool_, unit, unit, n, x + at, p.x.stride, true, x + at, p.x.stride, false, moment, unit,
            0.0F);
    }
    for (std::int64_t first = 0; first < rows; first += clip_rows) {
      const std::int64_t m = std::min(clip_rows, rows - first);
      for (int i = 0; i < p.candidates; ++i) {
        pool_.run(m, row_grain, [&](std::int64_t begin, std::int64_t end) {
          std::vector<float> w(static_cast<std::size_t>(unit));
          for (std::int64_t r = begin; r < end; ++r) {
            load_row(p.w, first + r, at, unit, w.data());
            const Bounds bounds = clip_bounds(w.data(), unit, p, i);
            float* e = error + r * unit;
            for (std::int64_t j = 0; j < unit; ++j) {
              e[j] = clamped(w[static_cast<std::size_t>(j)], bounds);
            }
            round_trip(e, unit, p.grid);
            for (std::int64_t j = 0; j < unit; ++j) e[j] -= w[static_cast<std::size_t>(j)];
          }
        });
        const std::int64_t width = size.by_moment ? unit : n;
        if (size.by_moment) {
          sgemm(pool_, m, unit, unit, error, unit, false, moment, unit, false, product, unit, 0.0F);
        } else {
          sgemm(pool_, m, n, unit, error, unit, false, x + at, p.x.stride, true, product, n, 0.0F);
        }
        pool_.run(m, row_grain, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t r = begin; r < end; ++r) {
            const float* left = size.by_moment ? error + r * unit : product + r * n;
            double sum = 0.0;
            for (std::int64_t j = 0; j < width; ++j) {
              sum += static_cast<double>(left[j]) * static_cast<double>(product[r * width + j]);
            }
            const auto mean = static_cast<float>(sum / static_cast<double>(n));
            float& best = loss[(first + r) * p.loss.stride + u];
            if (i == 0) plain[(first + r) * p.plain_loss.stride + u] = mean;
            if (i == 0 || mean < best) {
              best = mean;
              choice[(first + r) * p.choice.stride + u] = static_cast<std::uint8_t>(i);
            }
          }
        });
      }
    }
  }

  with_elements(p.w, [&](auto* data) {
    pool_.run(rows, row_grain, [&, data](std::int64_t begin, std::int64_t end) {
      std::vector<float> w(static_cast<std::size_t>(unit));
      for (std::int64_t r = begin; r < end; ++r) {
        for (std::int64_t u = 0; u < groups; ++u) {
          load_row(p.w, r, u * unit, unit, w.data());
          const Bounds bounds = clip_bounds(w.data(), unit, p, choice[r * p.choice.stride + u]);
          for (std::int64_t j = 0; j < unit; ++j) {
            store(data[r * p.w.stride + u * unit + j],
                  clamped(w[static_cast<std::size_t>(j)], bounds));
          }
        }
      }
    });
  });
}

}  // namespace engine
