// HostTransform: plain loops in f64.
#include <cmath>

#include "engine/core/error.h"
#include "engine/weight/transform.h"

namespace engine {
namespace {

// out[i] = sum_k a[i, k] x[k], or with `transposed` sum_k a[k, i] x[k]; a [n, n]; x[i * stride].
void multiply(const float* a, std::int64_t n, bool transposed, double* x, std::int64_t stride,
              std::vector<double>& out) {
  out.assign(static_cast<std::size_t>(n), 0.0);
  for (std::int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (std::int64_t k = 0; k < n; ++k) {
      sum += static_cast<double>(transposed ? a[k * n + i] : a[i * n + k]) * x[k * stride];
    }
    out[static_cast<std::size_t>(i)] = sum;
  }
  for (std::int64_t i = 0; i < n; ++i) x[i * stride] = out[static_cast<std::size_t>(i)];
}

}  // namespace

HostTransform::HostTransform(const Transform& transform, std::vector<float> signs, std::int64_t d,
                             int threads)
    : kind_(transform.kind), shared_(transform.shared), d_(d), signs_(std::move(signs)) {
  if (kind_ == TransformKind::hadamard) {
    REQUIRE(static_cast<std::int64_t>(signs_.size()) == d, "one sign per element");
    order_ = hadamard_order(d);
    small_ = hadamard_matrix(order_);
  } else if (kind_ == TransformKind::butterfly) {
    butterfly_ = make_butterfly(transform, d, threads);
  }
}

void HostTransform::apply(std::span<double> x, bool inverse) const {
  REQUIRE(static_cast<std::int64_t>(x.size()) == d_, "a vector of the transform's size");
  std::vector<double> scratch;
  if (kind_ == TransformKind::hadamard) {
    const std::int64_t power = d_ / order_;
    if (!inverse) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] *= static_cast<double>(signs_[i]);
    }
    for (std::int64_t half = 1; half < power; half *= 2) {  // Sylvester's is its own transpose
      for (std::int64_t first = 0; first < d_; first += 2 * half) {
        for (std::int64_t i = first; i < first + half; ++i) {
          const double a = x[static_cast<std::size_t>(i)];
          const double b = x[static_cast<std::size_t>(i + half)];
          x[static_cast<std::size_t>(i)] = a + b;
          x[static_cast<std::size_t>(i + half)] = a - b;
        }
      }
    }
    for (std::int64_t r = 0; r < power && order_ > 1; ++r) {
      multiply(small_.data(), order_, !inverse, x.data() + r, power, scratch);
    }
    const double scale = 1.0 / std::sqrt(static_cast<double>(d_));
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] *= inverse ? scale * static_cast<double>(signs_[i]) : scale;
    }
  } else if (kind_ == TransformKind::butterfly) {
    const Butterfly& b = butterfly_;
    const std::vector<std::int32_t>& before = inverse ? b.perm_out : b.perm_in;
    const std::vector<std::int32_t>& after = inverse ? b.perm_in : b.perm_out;
    const std::vector<double> in(x.begin(), x.end());
    std::vector<double> grid(in);
    for (std::size_t q = 0; q < before.size(); ++q) {
      const auto p = static_cast<std::size_t>(before[q]);
      if (inverse) {
        grid[p] = in[q];
      } else {
        grid[q] = in[p];
      }
    }
    const auto columns = [&] {
      for (std::int64_t j = 0; j < b.p2; ++j) {
        multiply(b.first.data() + (shared_ ? 0 : j * b.p1 * b.p1), b.p1, inverse, grid.data() + j,
                 b.p2, scratch);
      }
    };
    if (!inverse) columns();
    for (std::int64_t i = 0; i < b.p1; ++i) {
      multiply(b.second.data() + (shared_ ? 0 : i * b.p2 * b.p2), b.p2, inverse,
               grid.data() + i * b.p2, 1, scratch);
    }
    if (inverse) columns();
    for (std::size_t k = 0; k < grid.size(); ++k) {
      if (after.empty()) {
        x[k] = grid[k];
      } else if (inverse) {
        x[static_cast<std::size_t>(after[k])] = grid[k];
      } else {
        x[k] = grid[static_cast<std::size_t>(after[k])];
      }
    }
  }
}

}  // namespace engine
