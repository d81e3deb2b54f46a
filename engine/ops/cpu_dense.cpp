// DenseOps on the CPU.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "engine/core/rng.h"
#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"

namespace engine {
namespace {

constexpr std::int64_t piece_elements = 1 << 14;

char* row_at(const View& v, std::int64_t r) {
  return static_cast<char*>(v.data) +
         r * v.stride * static_cast<std::int64_t>(dtype_bytes(v.dtype));
}

// Rows per piece of parallel work.
std::int64_t row_grain(const View& v) {
  return std::max<std::int64_t>(1, piece_elements / std::max<std::int64_t>(1, v.cols));
}

bool same_shape(const View& a, const View& b) { return a.rows == b.rows && a.cols == b.cols; }

bool on_host(const View& v) { return v.device == DeviceKind::cpu; }

bool is_small_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

std::size_t row_bytes(const View& v) {
  return static_cast<std::size_t>(v.cols) * dtype_bytes(v.dtype);
}

// `n` elements of a float view's row, from column `c` on.
void row_to_f64(const CpuKernels& kernels, const View& v, std::int64_t r, std::int64_t c,
                std::int64_t n, float* buffer, double* out) {
  if (v.dtype == DType::f64) {
    std::memcpy(out, v.host<double>() + r * v.stride + c, static_cast<std::size_t>(n) * 8);
    return;
  }
  kernels.to_f32(v.dtype, row_at(v, r) + c * static_cast<std::int64_t>(dtype_bytes(v.dtype)),
                 buffer, n);
  std::copy(buffer, buffer + n, out);
}

void convert_row(const CpuKernels& kernels, const View& in, const View& out, std::int64_t r) {
  constexpr std::int64_t chunk = 256;
  if (in.dtype == out.dtype) {
    std::memcpy(row_at(out, r), row_at(in, r), row_bytes(in));
  } else if (in.dtype == DType::f64) {
    const double* from = in.host<double>() + r * in.stride;
    float* to = out.host<float>() + r * out.stride;
    for (std::int64_t c = 0; c < in.cols; ++c) to[c] = static_cast<float>(from[c]);
  } else if (out.dtype == DType::f64) {
    const float* from = in.host<float>() + r * in.stride;
    double* to = out.host<double>() + r * out.stride;
    for (std::int64_t c = 0; c < in.cols; ++c) to[c] = static_cast<double>(from[c]);
  } else {
    float buffer[chunk];
    const auto in_size = static_cast<std::int64_t>(dtype_bytes(in.dtype));
    const auto out_size = static_cast<std::int64_t>(dtype_bytes(out.dtype));
    for (std::int64_t c = 0; c < in.cols; c += chunk) {
      const std::int64_t n = std::min(chunk, in.cols - c);
      kernels.to_f32(in.dtype, row_at(in, r) + c * in_size, buffer, n);
      kernels.from_f32(out.dtype, buffer, row_at(out, r) + c * out_size, n);
    }
  }
}

}  // namespace

void CpuOps::embed(View ids, View table, View out) {
  REQUIRE(ids.cols == 1 && ids.rows == out.rows && table.cols == out.cols,
          "embed: ids " + ids.shape() + ", table " + table.shape() + ", out " + out.shape());
  REQUIRE(table.dtype == out.dtype && on_host(table) && on_host(out), "embed: one dtype, on host");
  const std::int32_t* id = ids.host<std::int32_t>();
  for (std::int64_t r = 0; r < ids.rows; ++r) {
    const std::int32_t i = id[r * ids.stride];
    if (i < 0 || i >= table.rows) {
      throw Error(ErrorCode::mismatch, "token ids: row " + std::to_string(r) + ": expected 0.." +
                                           std::to_string(table.rows - 1) + ", found " +
                                           std::to_string(i));
    }
  }
  pool_.run(ids.rows, row_grain(out), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      std::memcpy(row_at(out, r), row_at(table, id[r * ids.stride]), row_bytes(out));
    }
  });
}

void CpuOps::rmsnorm(View x, View weight, float eps, View out) {
  REQUIRE(same_shape(x, out) && weight.rows == 1 && weight.cols == x.cols,
          "rmsnorm: x " + x.shape() + ", weight " + weight.shape() + ", out " + out.shape());
  REQUIRE(x.dtype == out.dtype && x.dtype == weight.dtype, "rmsnorm: one dtype");
  REQUIRE(on_host(x) && on_host(weight) && on_host(out), "rmsnorm: host views");
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool_.run(x.rows, row_grain(x), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const double mean =
          kernels.sum_squares(x.dtype, row_at(x, r), x.cols) / static_cast<double>(x.cols);
      const auto scale = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(eps)));
      kernels.scale_and_weigh(x.dtype, row_at(x, r), scale, weight.data, row_at(out, r), x.cols);
    }
  });
}

void CpuOps::matmul(View x, View w, View out, bool accumulate) {
  REQUIRE(x.cols == w.cols && out.rows == x.rows && out.cols == w.rows,
          "matmul: x " + x.shape() + ", w " + w.shape() + ", out " + out.shape());
  REQUIRE(x.dtype == w.dtype || x.dtype == DType::f32,
          "matmul: x " + x.shape() + ", w " + w.shape());
  REQUIRE(out.dtype == x.dtype || out.dtype == w.dtype || out.dtype == DType::f32,
          "matmul: out " + out.shape());
  REQUIRE(on_host(x) && on_host(w) && on_host(out), "matmul: host views");
  GemmProblem p;
  p.m = x.rows;
  p.n = w.rows;
  p.k = x.cols;
  p.a = {x.data, x.dtype, x.stride, false};
  p.b = {w.data, w.dtype, w.stride, true};
  p.c = {out.data, out.dtype, out.stride};
  p.accumulate = accumulate;
  gemm(&pool_, p);
}

void CpuOps::silu_mul(View gate, View up, View out) {
  REQUIRE(same_shape(gate, up) && same_shape(gate, out),
          "silu_mul: gate " + gate.shape() + ", up " + up.shape() + ", out " + out.shape());
  REQUIRE(gate.dtype == up.dtype && gate.dtype == out.dtype, "silu_mul: one dtype");
  REQUIRE(on_host(gate) && on_host(up) && on_host(out), "silu_mul: host views");
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool_.run(gate.rows, row_grain(gate), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      kernels.silu_mul(gate.dtype, row_at(gate, r), row_at(up, r), row_at(out, r), gate.cols);
    }
  });
}

void CpuOps::convert(View in, View out) {
  REQUIRE(same_shape(in, out), "convert: in " + in.shape() + ", out " + out.shape());
  REQUIRE(on_host(in) && on_host(out), "convert: host views");
  const bool with_f64 = (in.dtype == DType::f64 && out.dtype == DType::f32) ||
                        (in.dtype == DType::f32 && out.dtype == DType::f64);
  REQUIRE(
      in.dtype == out.dtype || with_f64 || (is_small_float(in.dtype) && is_small_float(out.dtype)),
      "convert: no conversion from " + in.shape() + " to " + out.shape());
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool_.run(in.rows, row_grain(in), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) convert_row(kernels, in, out, r);
  });
}

void CpuOps::row_nll(View logits, View target, View nll) {
  REQUIRE(
      target.rows == logits.rows && target.cols == 1 && nll.rows == logits.rows && nll.cols == 1,
      "row_nll: logits " + logits.shape() + ", target " + target.shape() + ", nll " + nll.shape());
  const float* x = logits.host<float>();
  const std::int32_t* wanted = target.host<std::int32_t>();
  double* out = nll.host<double>();
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool_.run(logits.rows, row_grain(logits), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int32_t t = wanted[r * target.stride];
      double& value = out[r * nll.stride];
      value = 0.0;
      if (t < 0) continue;
      if (t >= logits.cols) {
        throw Error(ErrorCode::mismatch, "targets: row " + std::to_string(r) + ": expected below " +
                                             std::to_string(logits.cols) + ", found " +
                                             std::to_string(t));
      }
      const float* row = x + r * logits.stride;
      const float peak = kernels.row_max(row, logits.cols);
      value = std::log(kernels.sum_exp(row, peak, logits.cols)) +
              (static_cast<double>(peak) - static_cast<double>(row[t]));
    }
  });
}

void CpuOps::row_argmax(View logits, View out) {
  REQUIRE(out.rows == logits.rows && out.cols == 1 && logits.cols > 0,
          "row_argmax: logits " + logits.shape() + ", out " + out.shape());
  const float* x = logits.host<float>();
  std::int32_t* best = out.host<std::int32_t>();
  const CpuKernels& kernels = cpu_kernels(best_isa());
  pool_.run(logits.rows, row_grain(logits), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* row = x + r * logits.stride;
      const float peak = kernels.row_max(row, logits.cols);
      const bool any = peak > -std::numeric_limits<float>::infinity();
      best[r * out.stride] =
          any ? static_cast<std::int32_t>(std::find(row, row + logits.cols, peak) - row) : 0;
    }
  });
}

std::int64_t CpuOps::count_nonfinite(View x) {
  REQUIRE(is_float(x.dtype) && on_host(x), "count_nonfinite: " + x.shape());
  const CpuKernels& kernels = cpu_kernels(best_isa());
  std::atomic<std::int64_t> total = 0;
  pool_.run(x.rows, row_grain(x), [&](std::int64_t begin, std::int64_t end) {
    std::int64_t count = 0;
    for (std::int64_t r = begin; r < end; ++r) {
      if (x.dtype == DType::f64) {
        const double* row = x.host<double>() + r * x.stride;
        count += std::count_if(row, row + x.cols, [](double v) { return !std::isfinite(v); });
      } else {
        count += kernels.count_nonfinite(x.dtype, row_at(x, r), x.cols);
      }
    }
    total += count;
  });
  return total;
}

void CpuOps::square_sums(View a, View b, View out) {
  REQUIRE(same_shape(a, b) && is_float(a.dtype) && is_float(b.dtype),
          "square_sums: a " + a.shape() + ", b " + b.shape());
  REQUIRE(out.rows == 1 && out.cols == 2, "square_sums: out " + out.shape());
  REQUIRE(on_host(a) && on_host(b), "square_sums: host views");
  double* result = out.host<double>();
  const CpuKernels& kernels = cpu_kernels(best_isa());
  const std::int64_t grain = row_grain(a);
  const std::int64_t pieces = (a.rows + grain - 1) / grain;
  struct Sums {
    double difference = 0.0;
    double own = 0.0;
  };
  // One pair per piece, added in the order of the pieces.
  std::vector<Sums> sums(static_cast<std::size_t>(pieces));
  pool_.run(a.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t chunk = 256;
    float buffer[chunk];
    double x[chunk];
    double y[chunk];
    Sums s;
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t c = 0; c < a.cols; c += chunk) {
        const std::int64_t n = std::min(chunk, a.cols - c);
        row_to_f64(kernels, a, r, c, n, buffer, x);
        row_to_f64(kernels, b, r, c, n, buffer, y);
        for (std::int64_t i = 0; i < n; ++i) {
          const double d = x[i] - y[i];
          s.difference += d * d;
          s.own += x[i] * x[i];
        }
      }
    }
    sums[static_cast<std::size_t>(begin / grain)] = s;
  });
  Sums total;
  for (const Sums& s : sums) {
    total.difference += s.difference;
    total.own += s.own;
  }
  result[0] = total.difference;
  result[1] = total.own;
}

void CpuOps::fill_bell(View out, std::uint64_t seed, std::uint64_t stream, float scale,
                       float shift) {
  REQUIRE(is_small_float(out.dtype) && on_host(out), "fill_bell: " + out.shape());
  const CpuKernels& kernels = cpu_kernels(best_isa());
  const auto size = static_cast<std::int64_t>(dtype_bytes(out.dtype));
  pool_.run(out.rows, row_grain(out), [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t chunk = 256;
    float values[chunk];
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t c = 0; c < out.cols; c += chunk) {
        const std::int64_t n = std::min(chunk, out.cols - c);
        for (std::int64_t i = 0; i < n; ++i) {
          const auto index = static_cast<std::uint64_t>(r * out.cols + c + i);
          const float scaled = bell_value(seed, stream, index) * scale;
          values[i] = scaled + shift;
        }
        kernels.from_f32(out.dtype, values, row_at(out, r) + c * size, n);
      }
    }
  });
}

void CpuOps::zero(View out) {
  REQUIRE(on_host(out), "zero: host view");
  pool_.run(out.rows, row_grain(out), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) std::memset(row_at(out, r), 0, row_bytes(out));
  });
}

}  // namespace engine
