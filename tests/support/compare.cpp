#include "tests/support/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace engine::test {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

Comparison size_mismatch(std::size_t actual, std::size_t expected) {
  Comparison c;
  c.ok = false;
  c.failures = 1;
  c.worst_ratio = infinity;
  c.message = "expected " + std::to_string(expected) + " elements, found " + std::to_string(actual);
  return c;
}

// error / tolerance, or 0 if the element passes. Never a NaN.
double failure_ratio(double actual, double expected, double tolerance) {
  if (!(tolerance >= 0.0) || !std::isfinite(tolerance)) return infinity;
  if (!std::isfinite(actual) || !std::isfinite(expected)) {
    return actual == expected ? 0.0 : infinity;
  }
  const double error = std::abs(actual - expected);
  if (error <= tolerance) return 0.0;
  return tolerance > 0.0 ? error / tolerance : infinity;
}

template <class T>
Comparison compare_values(std::span<const T> actual, std::span<const T> expected,
                          const Tolerance& tolerance) {
  if (actual.size() != expected.size()) return size_mismatch(actual.size(), expected.size());
  if (!tolerance.each.empty() && tolerance.each.size() != expected.size()) {
    return size_mismatch(tolerance.each.size(), expected.size());
  }
  const auto allowed = [&](std::size_t i) {
    const double e = std::abs(static_cast<double>(expected[i]));
    // An infinite expectation must not make its own tolerance infinite.
    const double relative = std::isfinite(e) ? tolerance.relative * e : 0.0;
    return tolerance.absolute + relative + (tolerance.each.empty() ? 0.0 : tolerance.each[i]);
  };
  Comparison c;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double ratio =
        failure_ratio(static_cast<double>(actual[i]), static_cast<double>(expected[i]), allowed(i));
    if (ratio == 0.0) continue;
    ++c.failures;
    if (c.worst < 0 || ratio > c.worst_ratio) {
      c.worst = static_cast<std::int64_t>(i);
      c.worst_ratio = ratio;
    }
  }
  if (c.failures > 0) {
    const auto i = static_cast<std::size_t>(c.worst);
    std::ostringstream out;
    out.precision(std::numeric_limits<T>::max_digits10);
    out << "element " << i << ": expected " << expected[i] << ", found " << actual[i]
        << " (tolerance " << allowed(i) << ", error/tolerance " << c.worst_ratio << "); "
        << c.failures << " of " << expected.size() << " elements fail";
    c.ok = false;
    c.message = out.str();
  }
  return c;
}

}  // namespace

Comparison compare_close(std::span<const double> actual, std::span<const double> expected,
                         const Tolerance& tolerance) {
  return compare_values(actual, expected, tolerance);
}

Comparison compare_close(std::span<const float> actual, std::span<const float> expected,
                         const Tolerance& tolerance) {
  return compare_values(actual, expected, tolerance);
}

Comparison compare_bytes(std::span<const std::byte> actual, std::span<const std::byte> expected,
                         std::size_t element_bytes) {
  if (actual.size() != expected.size()) return size_mismatch(actual.size(), expected.size());
  Comparison c;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (actual[i] == expected[i]) continue;
    if (c.worst < 0) c.worst = static_cast<std::int64_t>(i / element_bytes);
    ++c.failures;
  }
  if (c.failures > 0) {
    const std::size_t first = static_cast<std::size_t>(c.worst) * element_bytes;
    std::ostringstream out;
    const auto print = [&](std::span<const std::byte> bytes) {
      out << std::hex << "0x";
      for (std::size_t k = std::min(first + element_bytes, bytes.size()); k-- > first;) {
        const auto b = std::to_integer<unsigned>(bytes[k]);
        out << (b >> 4) << (b & 15U);
      }
      out << std::dec;
    };
    out << "element " << c.worst << ": expected ";
    print(expected);
    out << ", found ";
    print(actual);
    out << "; " << c.failures << " of " << expected.size() << " bytes differ";
    c.ok = false;
    c.worst_ratio = infinity;
    c.message = out.str();
  }
  return c;
}

Comparison compare_integers(std::span<const std::int64_t> actual,
                            std::span<const std::int64_t> expected) {
  return compare_mostly(actual, expected, 0);
}

Comparison compare_mostly(std::span<const std::int64_t> actual,
                          std::span<const std::int64_t> expected, std::int64_t allowed) {
  if (actual.size() != expected.size()) return size_mismatch(actual.size(), expected.size());
  Comparison c;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (actual[i] == expected[i]) continue;
    if (c.worst < 0) c.worst = static_cast<std::int64_t>(i);
    ++c.failures;
  }
  if (c.failures > allowed) {
    const auto i = static_cast<std::size_t>(c.worst);
    c.ok = false;
    c.worst_ratio = infinity;
    c.message = "element " + std::to_string(i) + ": expected " + std::to_string(expected[i]) +
                ", found " + std::to_string(actual[i]) + "; " + std::to_string(c.failures) +
                " of " + std::to_string(expected.size()) + " elements differ, allowed " +
                std::to_string(allowed);
  } else {
    c.worst = -1;
  }
  return c;
}

double roundoff(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0x1p-24;
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
    case DType::f64:
      return 0x1p-53;
    default:
      return 0.0;
  }
}

double smallest_step(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0x1p-149;
    case DType::f16:
      return 0x1p-24;
    case DType::bf16:
      return 0x1p-133;
    case DType::f64:
      return 0x1p-1074;
    default:
      return 0.0;
  }
}

double store_tolerance(DType dtype, double magnitude) {
  return 2.0 * roundoff(dtype) * magnitude + smallest_step(dtype);
}

double sum_tolerance(std::int64_t length, double magnitude) {
  constexpr double lambda = 4.0;
  return 2.0 * lambda * std::sqrt(static_cast<double>(length)) * roundoff(DType::f32) * magnitude;
}

}  // namespace engine::test
