// The frame of a sweep in its look-back form, shared by sweeps that quantize a block of columns in
// their own way (cpu_gptq.cpp has the derivation). With H = R R^T, U = R^-1 and E = w^ - w of the
// finished columns P, the weights that the sweep sees in block F are
//   current[:, F] = w[:, F] - (E[:, P] R[P, F]) U[F, F].
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "engine/core/parallel.h"
#include "engine/core/view.h"
#include "engine/ops/cpu_gemm.h"

namespace engine {

// Bytes of LookBack's workspace.
[[nodiscard]] inline std::int64_t look_back_bytes(std::int64_t rows, std::int64_t d,
                                                  std::int64_t block, DType factor) {
  const std::int64_t panel = factor == DType::f64 ? d * block : 0;
  return (rows * block + block * block + panel) * static_cast<std::int64_t>(sizeof(float));
}

// T: the factor's element type. w f32 [rows, d] holds E in the columns of finished blocks, weights
// elsewhere; r [d, d] is upper triangular.
template <class T>
class LookBack {
 public:
  LookBack(ThreadPool& pool, View w, View r, std::int64_t block, View workspace)
      : pool_(pool),
        w_(w),
        r_(r.host<T>()),
        r_stride_(r.stride),
        block_(block),
        products_(reinterpret_cast<float*>(workspace.host<std::uint8_t>())),
        inverse_(products_ + w.rows * block),
        panel_(inverse_ + block * block) {}

  // Makes [first, last), at most `block` columns, the current block; all columns before are done.
  void enter(std::int64_t first, std::int64_t last) {
    first_ = first;
    last_ = last;
    invert_diagonal_block();
    multiply_errors();
  }

  // out[0 .. last - first): the weights that this row has in the block now.
  void current(std::int64_t row, float* out) const {
    const float* w = w_.host<float>() + row * w_.stride + first_;
    const std::int64_t n = last_ - first_;
    for (std::int64_t k = 0; k < n; ++k) out[k] = w[k];
    for (std::int64_t i = 0; i < n && first_ > 0; ++i) {
      const float product = products_[row * block_ + i];
      for (std::int64_t k = i; k < n; ++k) out[k] -= product * inverse_row(i)[k];
    }
  }

  // U[first + i, first + k], k >= i.
  [[nodiscard]] const float* inverse_row(std::int64_t i) const { return inverse_ + i * block_; }

 private:
  [[nodiscard]] T factor(std::int64_t i, std::int64_t j) const { return r_[i * r_stride_ + j]; }

  // U[F, F] = R[F, F]^-1, in the factor's precision, column by column from the diagonal up.
  void invert_diagonal_block() {
    const std::int64_t n = last_ - first_;
    pool_.run(n, 8, [&](std::int64_t begin, std::int64_t end) {
      std::vector<T> column(static_cast<std::size_t>(n));
      for (std::int64_t j = begin; j < end; ++j) {
        for (std::int64_t i = n - 1; i >= 0; --i) {
          T sum = i == j ? T(1) : T(0);
          for (std::int64_t k = i + 1; k <= j; ++k) {
            sum -= factor(first_ + i, first_ + k) * column[static_cast<std::size_t>(k)];
          }
          const T value = i > j ? T(0) : sum / factor(first_ + i, first_ + i);
          column[static_cast<std::size_t>(i)] = value;
          inverse_[i * block_ + j] = static_cast<float>(value);
        }
      }
    });
  }

  // products = E[:, P] R[P, F].
  void multiply_errors() {
    const float* right = nullptr;
    std::int64_t right_stride = 0;
    if constexpr (std::is_same_v<T, float>) {
      right = r_ + first_;
      right_stride = r_stride_;
    } else {
      for (std::int64_t i = 0; i < first_; ++i) {
        for (std::int64_t j = first_; j < last_; ++j) {
          panel_[i * block_ + j - first_] = static_cast<float>(factor(i, j));
        }
      }
      right = panel_;
      right_stride = block_;
    }
    sgemm(pool_, w_.rows, last_ - first_, first_, w_.host<float>(), w_.stride, false, right,
          right_stride, false, products_, block_, 0.0F);
  }

  ThreadPool& pool_;
  View w_;
  const T* r_;
  std::int64_t r_stride_;
  std::int64_t block_;
  float* products_;  // [rows, block]
  float* inverse_;   // [block, block]
  float* panel_;     // [d, block], to convert an f64 factor
  std::int64_t first_ = 0;
  std::int64_t last_ = 0;
};

}  // namespace engine
