// Matrices with gaps between their rows for the tests of the CPU ops.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "engine/core/rng.h"
#include "engine/core/view.h"
#include "engine/ops/cpu_kernels.h"

namespace engine::testing {

inline const std::vector<DType> float_dtypes = {DType::f32, DType::f16, DType::bf16};

inline std::vector<Isa> supported_isas() {
  std::vector<Isa> all;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa_supported(isa)) all.push_back(isa);
  }
  return all;
}

// Unit roundoff of a dtype.
inline double roundoff(DType d) {
  return d == DType::f32 ? 0x1p-24 : d == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// f32, f16 or bf16 values; everything, the gaps included, starts as NaN.
class Matrix {
 public:
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t gap = 0)
      : dtype_(dtype), rows_(rows), cols_(cols), stride_(cols + gap) {
    bytes_.assign(static_cast<std::size_t>(rows * stride_ + 1) * dtype_bytes(dtype), char(0xff));
  }
  static Matrix random(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t gap,
                       std::uint64_t seed, float scale = 1.0F) {
    Matrix m(dtype, rows, cols, gap);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      m.put(i / cols, i % cols, bell_value(seed, 0, static_cast<std::uint64_t>(i)) * scale);
    }
    return m;
  }

  [[nodiscard]] View view() {
    View v = make_view(bytes_.data(), dtype_, DeviceKind::cpu, rows_, cols_);
    v.stride = stride_;
    return v;
  }
  [[nodiscard]] double get(std::int64_t r, std::int64_t c) const {
    const char* p = at(r, c);
    if (dtype_ == DType::f32) return static_cast<double>(read<float>(p));
    if (dtype_ == DType::f16) return static_cast<double>(to_float(read<f16>(p)));
    return static_cast<double>(to_float(read<bf16>(p)));
  }
  void put(std::int64_t r, std::int64_t c, float v) {
    char* p = const_cast<char*>(at(r, c));
    if (dtype_ == DType::f32) std::memcpy(p, &v, 4);
    const std::uint16_t half = dtype_ == DType::f16 ? to_f16(v).bits : to_bf16(v).bits;
    if (dtype_ != DType::f32) std::memcpy(p, &half, 2);
  }
  // Nothing was written between the rows or after the last.
  void expect_gaps_untouched() const {
    const std::size_t size = dtype_bytes(dtype_);
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      const auto element = static_cast<std::int64_t>(i / size);
      if (element % stride_ >= cols_ || element >= rows_ * stride_) {
        ASSERT_EQ(bytes_[i], char(0xff)) << "element " << element;
      }
    }
  }
  [[nodiscard]] bool operator==(const Matrix& other) const { return bytes_ == other.bytes_; }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] std::int64_t cols() const { return cols_; }
  [[nodiscard]] DType dtype() const { return dtype_; }

 private:
  template <class T>
  static T read(const char* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  [[nodiscard]] const char* at(std::int64_t r, std::int64_t c) const {
    return bytes_.data() + static_cast<std::size_t>(r * stride_ + c) * dtype_bytes(dtype_);
  }

  DType dtype_;
  std::int64_t rows_;
  std::int64_t cols_;
  std::int64_t stride_;
  std::vector<char> bytes_;
};

// False for NaN on either side.
inline bool close(double got, double want, double tolerance) {
  return std::abs(got - want) <= tolerance;
}

}  // namespace engine::testing
