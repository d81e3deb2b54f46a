// A non-owning, typed-on-demand window over a row-major matrix on some device.
#pragma once

#include <cstdint>
#include <string>

#include "engine/core/dtype.h"
#include "engine/core/error.h"

namespace engine {

enum class DeviceKind : std::uint8_t { cpu, cuda };

// Element (r, c) lives at data + r * stride + c, counted in elements of `dtype`.
// A default View is empty (null, 0 x 0); optional arguments of ops use it for "absent".
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  DeviceKind device = DeviceKind::cpu;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  [[nodiscard]] bool empty() const { return rows == 0 || cols == 0; }
  [[nodiscard]] std::int64_t count() const { return rows * cols; }
  [[nodiscard]] bool contiguous() const { return stride == cols || rows <= 1; }
  // Bytes of the elements themselves, gaps between rows not counted.
  [[nodiscard]] std::int64_t bytes() const {
    return count() * static_cast<std::int64_t>(dtype_bytes(dtype));
  }
  [[nodiscard]] std::string shape() const {
    return std::string(dtype_name(dtype)) + " [" + std::to_string(rows) + ", " +
           std::to_string(cols) + "]";
  }

  // The first element as T. Fails on another dtype, whatever the device (kernels take pointers
  // too).
  template <class T>
  [[nodiscard]] T* as() const {
    REQUIRE(dtype == dtype_of<T>(), "view is " + shape());
    return static_cast<T*>(data);
  }
  // As `as`, for code that dereferences on the host.
  template <class T>
  [[nodiscard]] T* host() const {
    REQUIRE(device == DeviceKind::cpu, "host access to a device view");
    return as<T>();
  }

  [[nodiscard]] View row_range(std::int64_t first, std::int64_t n) const {
    REQUIRE(first >= 0 && n >= 0 && first + n <= rows, "rows out of range of " + shape());
    return offset(first * stride, n, cols);
  }
  [[nodiscard]] View col_range(std::int64_t first, std::int64_t n) const {
    REQUIRE(first >= 0 && n >= 0 && first + n <= cols, "columns out of range of " + shape());
    return offset(first, rows, n);
  }
  // The same contiguous elements under another shape.
  [[nodiscard]] View reshape(std::int64_t r, std::int64_t c) const {
    REQUIRE(contiguous() && r * c == count(), "cannot reshape " + shape());
    View v = *this;
    v.rows = r;
    v.cols = v.stride = c;
    return v;
  }

 private:
  [[nodiscard]] View offset(std::int64_t elements, std::int64_t r, std::int64_t c) const {
    View v = *this;
    if (data != nullptr) {
      v.data = static_cast<char*>(data) + elements * static_cast<std::int64_t>(dtype_bytes(dtype));
    }
    v.rows = r;
    v.cols = c;
    return v;
  }
};

// A view of contiguous memory. `data` may be null in a measuring run.
inline View make_view(void* data, DType dtype, DeviceKind device, std::int64_t rows,
                      std::int64_t cols) {
  return View{data, dtype, device, rows, cols, cols};
}

// A host view over a container or array that outlives it.
template <class T>
View host_view(T* data, std::int64_t rows, std::int64_t cols) {
  using Plain = std::remove_const_t<T>;
  return make_view(const_cast<Plain*>(data), dtype_of<Plain>(), DeviceKind::cpu, rows, cols);
}

}  // namespace engine
