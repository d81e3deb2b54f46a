// TransformOps on the CPU. Eight rows at a time, transposed to [d][8], so that every step works on
// eight neighbouring values.
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_rows.h"
#include "engine/ops/transform_view.h"

namespace engine {
namespace {

constexpr std::int64_t lanes = 8;
constexpr std::int64_t tile = 32;  // of a transposition
constexpr std::int64_t piece_elements = 1 << 14;

std::int64_t row_grain(std::int64_t cols) {
  return std::max<std::int64_t>(1, piece_elements / std::max<std::int64_t>(1, cols));
}

void store_row(const View& v, std::int64_t row, const float* in) {
  const auto write = [&](auto* data) {
    data += row * v.stride;
    for (std::int64_t i = 0; i < v.cols; ++i) store(data[i], in[i]);
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

// Columns of a [n, n] matrix times vectors: out[i] = sum_k a(i, k) x[k * stride], k ascending, for
// each of the eight lanes; then back to x. `transposed`: a(k, i).
void multiply(const float* a, std::int64_t n, bool transposed, float* x, std::int64_t stride,
              float* scratch) {
  for (std::int64_t i = 0; i < n; ++i) {
    float sum[lanes] = {};
    for (std::int64_t k = 0; k < n; ++k) {
      const float weight = transposed ? a[k * n + i] : a[i * n + k];
      const float* from = x + k * stride * lanes;
      for (std::int64_t e = 0; e < lanes; ++e) sum[e] += weight * from[e];
    }
    std::copy(sum, sum + lanes, scratch + i * lanes);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    std::copy(scratch + i * lanes, scratch + (i + 1) * lanes, x + i * stride * lanes);
  }
}

// All eight vectors x [d][8] by one transform; out-of-place steps go through `other` [d][8].
class Applier {
 public:
  Applier(const TransformView& q, bool inverse) : q_(q), inverse_(inverse) {
    if (q.kind == TransformKind::hadamard) small_ = floats(q.small);
    if (q.kind == TransformKind::butterfly) {
      first_ = floats(q.first);
      second_ = floats(q.second);
      if (!q.perm_in.empty()) {
        perm_in_ = checked_permutation(q.perm_in, q.d);
        perm_out_ = checked_permutation(q.perm_out, q.d);
      }
    }
  }

  void apply(std::vector<float>& x, std::vector<float>& other) const {
    if (q_.kind == TransformKind::hadamard) hadamard(x.data(), other.data());
    if (q_.kind == TransformKind::butterfly) butterfly(x, other);
  }

 private:
  static std::vector<float> floats(const View& v) {
    std::vector<float> out(static_cast<std::size_t>(v.count()));
    for (std::int64_t r = 0; r < v.rows; ++r) load_row(v, r, 0, v.cols, out.data() + r * v.cols);
    return out;
  }

  void scale(float* x, const float* signs, float factor) const {
    for (std::int64_t i = 0; i < q_.d; ++i) {
      const float f = signs == nullptr ? factor : factor * signs[i];
      for (std::int64_t e = 0; e < lanes; ++e) x[i * lanes + e] *= f;
    }
  }

  void hadamard(float* x, float* scratch) const {
    const float* signs = q_.signs.host<float>();
    const std::int64_t power = q_.d / q_.order;
    if (!inverse_) scale(x, signs, 1.0F);
    for (std::int64_t half = lanes; half < power * lanes; half *= 2) {
      for (std::int64_t first = 0; first < q_.d * lanes; first += 2 * half) {
        for (std::int64_t i = first; i < first + half; ++i) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
      }
    }
    for (std::int64_t r = 0; r < power && q_.order > 1; ++r) {
      multiply(small_.data(), q_.order, !inverse_, x + r * lanes, power, scratch);
    }
    const auto root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q_.d)));
    scale(x, inverse_ ? signs : nullptr, root);
  }

  void columns(float* x, float* scratch) const {
    for (std::int64_t j = 0; j < q_.p2; ++j) {
      multiply(first_.data() + (q_.shared ? 0 : j * q_.p1 * q_.p1), q_.p1, inverse_, x + j * lanes,
               q_.p2, scratch);
    }
  }

  void rows(float* x, float* scratch) const {
    for (std::int64_t i = 0; i < q_.p1; ++i) {
      multiply(second_.data() + (q_.shared ? 0 : i * q_.p2 * q_.p2), q_.p2, inverse_,
               x + i * q_.p2 * lanes, 1, scratch);
    }
  }

  // other[i] = x[perm[i]], or with `scatter` other[perm[i]] = x[i]; then the two are swapped.
  void permute(const std::int32_t* perm, bool scatter, std::vector<float>& x,
               std::vector<float>& other) const {
    if (perm == nullptr) return;
    for (std::int64_t i = 0; i < q_.d; ++i) {
      const std::int64_t from = scatter ? i : perm[i];
      const std::int64_t to = scatter ? perm[i] : i;
      std::copy_n(x.data() + from * lanes, lanes, other.data() + to * lanes);
    }
    x.swap(other);
  }

  void butterfly(std::vector<float>& x, std::vector<float>& other) const {
    permute(inverse_ ? perm_out_ : perm_in_, inverse_, x, other);
    if (inverse_) {
      rows(x.data(), other.data());
      columns(x.data(), other.data());
    } else {
      columns(x.data(), other.data());
      rows(x.data(), other.data());
    }
    permute(inverse_ ? perm_in_ : perm_out_, inverse_, x, other);
  }

  const TransformView& q_;
  bool inverse_;
  std::vector<float> small_, first_, second_;
  const std::int32_t* perm_in_ = nullptr;
  const std::int32_t* perm_out_ = nullptr;
};

void require_scales(const char* op, const View& scales, std::int64_t rows) {
  REQUIRE(
      scales.dtype == DType::f32 && scales.cols == 1 && (scales.rows == rows || scales.rows == 1),
      std::string(op) + ": scales are " + scales.shape());
}

float scale_of(const View& scales, std::int64_t r) {
  return scales.host<float>()[scales.rows == 1 ? 0 : r * scales.stride];
}

}  // namespace

void CpuOps::transform_rows(View x, const TransformView& q, bool inverse, View out) {
  require_transform(x, q, out);
  const Applier applier(q, inverse);
  const auto size = static_cast<std::size_t>(q.d * lanes);
  pool_.run((x.rows + lanes - 1) / lanes, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> block(size), other(size), row(static_cast<std::size_t>(q.d));
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t first = b * lanes;
      const std::int64_t n = std::min(lanes, x.rows - first);
      std::fill(block.begin(), block.end(), 0.0F);
      for (std::int64_t e = 0; e < n; ++e) {
        load_row(x, first + e, 0, q.d, row.data());
        for (std::int64_t i = 0; i < q.d; ++i) {
          block[static_cast<std::size_t>(i * lanes + e)] = row[static_cast<std::size_t>(i)];
        }
      }
      applier.apply(block, other);
      for (std::int64_t e = 0; e < n; ++e) {
        for (std::int64_t i = 0; i < q.d; ++i) {
          row[static_cast<std::size_t>(i)] = block[static_cast<std::size_t>(i * lanes + e)];
        }
        store_row(out, first + e, row.data());
      }
    }
  });
}

void CpuOps::transpose(View in, View out) {
  REQUIRE(
      in.rows == out.cols && in.cols == out.rows && in.dtype == out.dtype && in.data != out.data,
      "transpose: from " + in.shape() + " to " + out.shape());
  const auto move = [&](const auto* from, auto* to) {
    pool_.run((out.rows + tile - 1) / tile, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = 0; c < out.cols; c += tile) {
        const std::int64_t last = std::min(c + tile, out.cols);
        for (std::int64_t r = begin * tile; r < std::min(end * tile, out.rows); ++r) {
          for (std::int64_t i = c; i < last; ++i) to[r * out.stride + i] = from[i * in.stride + r];
        }
      }
    });
  };
  switch (in.dtype) {
    case DType::f32:
      return move(in.host<float>(), out.host<float>());
    case DType::f16:
      return move(in.host<f16>(), out.host<f16>());
    case DType::bf16:
      return move(in.host<bf16>(), out.host<bf16>());
    default:
      REQUIRE(false, "transpose of " + in.shape());
  }
}

void CpuOps::decode_midrise(View codes, int bits, View scales, View out) {
  REQUIRE(bits >= 1 && bits <= 8 && codes.rows == out.rows && codes.cols == out.cols,
          "decode_midrise: from " + codes.shape() + " to " + out.shape());
  require_scales("decode_midrise", scales, out.rows);
  const float zero = static_cast<float>((1 << bits) - 1) * 0.5F;
  pool_.run(out.rows, row_grain(out.cols), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::uint8_t* from = codes.host<std::uint8_t>() + r * codes.stride;
      float* to = out.host<float>() + r * out.stride;
      const float scale = scale_of(scales, r);
      for (std::int64_t c = 0; c < out.cols; ++c) {
        to[c] = scale * (static_cast<float>(from[c]) - zero);
      }
    }
  });
}

void CpuOps::decode_lattice(View codes, LatticeBook book, View scales, bool accumulate, View out) {
  const bool e8p = book == LatticeBook::e8p;
  REQUIRE(codes.dtype == (e8p ? DType::i16 : DType::u8) && codes.rows == out.rows &&
              codes.cols * lattice_columns == out.cols,
          "decode_lattice: from " + codes.shape() + " to " + out.shape());
  require_scales("decode_lattice", scales, out.rows);
  pool_.run(out.rows, row_grain(out.cols), [&](std::int64_t begin, std::int64_t end) {
    std::array<float, lattice_columns> point{};
    for (std::int64_t r = begin; r < end; ++r) {
      float* to = out.host<float>() + r * out.stride;
      const float scale = scale_of(scales, r);
      for (std::int64_t k = 0; k < codes.cols; ++k, to += lattice_columns) {
        const std::int64_t at = r * codes.stride + k;
        if (e8p) {
          e8p_point(static_cast<std::uint16_t>(codes.host<std::int16_t>()[at]), point);
        } else {
          point = e8_byte_points()[codes.host<std::uint8_t>()[at]];
        }
        for (std::size_t i = 0; i < point.size(); ++i) {
          const float value = scale * point[i];
          to[i] = accumulate ? to[i] + value : value;
        }
      }
    }
  });
}

void CpuOps::place_columns(View x, View perm, View diagonal, View out) {
  REQUIRE(x.dtype == DType::f32 && x.rows == out.rows && x.cols == out.cols && x.data != out.data,
          "place_columns: from " + x.shape() + " to " + out.shape());
  const std::int32_t* to = perm.empty() ? nullptr : checked_permutation(perm, x.cols);
  REQUIRE(diagonal.empty() || (diagonal.rows == 1 && diagonal.cols == x.cols),
          "place_columns: the diagonal is " + diagonal.shape());
  const float* factor = diagonal.empty() ? nullptr : diagonal.host<float>();
  pool_.run(x.rows, row_grain(x.cols), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(x.cols));
    for (std::int64_t r = begin; r < end; ++r) {
      const float* from = x.host<float>() + r * x.stride;
      for (std::int64_t j = 0; j < x.cols; ++j) {
        const std::int64_t k = to == nullptr ? j : to[j];
        row[static_cast<std::size_t>(k)] = factor == nullptr ? from[j] : from[j] * factor[k];
      }
      store_row(out, r, row.data());
    }
  });
}

}  // namespace engine
