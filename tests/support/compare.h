// Comparators that reject: a comparison holds only where `error <= tolerance` is true, so a NaN on
// either side, a NaN tolerance or an infinity on one side fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "engine/core/dtype.h"

namespace engine::test {

struct Comparison {
  bool ok = true;
  std::int64_t failures = 0;
  std::int64_t worst = -1;  // index with the largest error / tolerance; -1 when nothing failed
  double worst_ratio = 0;   // its error / tolerance; infinite for NaN and infinities
  std::string message;      // empty when ok; else index, expected, found, error, tolerance, count
  explicit operator bool() const { return ok; }
};

// Element i may differ by absolute + relative * |expected[i]| + each[i] (if `each` is not empty).
struct Tolerance {
  double absolute = 0;
  double relative = 0;
  std::span<const double> each = {};
};

// Infinities are equal to themselves only. Sizes must agree.
Comparison compare_close(std::span<const double> actual, std::span<const double> expected,
                         const Tolerance& tolerance);
Comparison compare_close(std::span<const float> actual, std::span<const float> expected,
                         const Tolerance& tolerance);

// Byte for byte. `element_bytes` only scales the reported index.
Comparison compare_bytes(std::span<const std::byte> actual, std::span<const std::byte> expected,
                         std::size_t element_bytes = 1);
// Integers, compared exactly. u8 values and i32 values widen to i64 at the caller.
Comparison compare_integers(std::span<const std::int64_t> actual,
                            std::span<const std::int64_t> expected);
// At most `allowed` elements differ (by any amount).
Comparison compare_mostly(std::span<const std::int64_t> actual,
                          std::span<const std::int64_t> expected, std::int64_t allowed);

// Half the distance from 1 to the next value: the relative error of one rounding.
double roundoff(DType dtype);
// The distance between subnormals: roundings of tiny values are off by up to half of it.
double smallest_step(DType dtype);

// |a - b| of two results that were each rounded once to `dtype` from values of size `magnitude`
// that differ by far less than that rounding.
double store_tolerance(DType dtype, double magnitude);

// |a - b| of two f32 evaluations of a sum of `length` products, in any two orders, with
// `magnitude` >= sum |x_i| |y_i|. Rounding errors behave as independent, so each evaluation is off
// by lambda * sqrt(length) * u * magnitude (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019);
// lambda is 4 here. The worst case, length instead of its root, would hide a missing term.
double sum_tolerance(std::int64_t length, double magnitude);

}  // namespace engine::test
