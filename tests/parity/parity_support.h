// What every parity case needs: two backends behind TraceOps, operands inside poisoned guards, the
// same inputs on both sides, and the comparison of what comes back.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/core/rng.h"
#include "engine/ops/trace_ops.h"
#include "tests/support/compare.h"

namespace engine::test {

// The reference (CPU, one thread) and the backend under test.
struct Sides {
  Ledger ledger;
  std::unique_ptr<Ops> reference_ops;
  std::unique_ptr<Ops> subject_ops;
  std::unique_ptr<TraceOps> reference;
  std::unique_ptr<TraceOps> subject;
  // Both are CPUs that differ in the number of threads only: results must then be equal to the bit,
  // because the contract's partition does not depend on threads.
  bool same_backend = false;
};

// Opens `device` ("cpu" or "cuda:N") against the CPU. Called once, by main.
void open_sides(const std::string& device);
// Before the process ends: a GPU cannot be given back during static destruction.
void close_sides();
Sides& sides();

// How a matrix lies in its buffer.
enum class Layout {
  tight,  // stride = cols, aligned
  wide,   // stride a multiple of 16 elements, at least 16 beyond the columns, aligned
  odd     // odd stride, first element not aligned to more than its own size
};
const char* layout_name(Layout layout);
inline const std::vector<Layout> all_layouts = {Layout::tight, Layout::wide, Layout::odd};
inline const std::vector<DType> small_floats = {DType::f32, DType::f16, DType::bf16};

enum class Role { input, output, inout };

// A matrix and everything around it: bytes before, after and between the rows are 0xFF, which is
// NaN in every float type and -1 in i32; so is an output before the op runs.
class Operand {
 public:
  Operand() = default;
  Operand(Role role, DType dtype, std::int64_t rows, std::int64_t cols,
          Layout layout = Layout::tight);

  [[nodiscard]] Role role() const { return role_; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] std::int64_t rows() const { return rows_; }
  [[nodiscard]] std::int64_t cols() const { return cols_; }
  // The matrix as it lies in `buffer`, which holds a copy of bytes().
  [[nodiscard]] View view_in(void* buffer, DeviceKind device) const;
  [[nodiscard]] View host() { return view_in(bytes_.data(), DeviceKind::cpu); }
  [[nodiscard]] std::vector<std::byte>& bytes() { return bytes_; }
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return bytes_; }

  [[nodiscard]] double get(std::int64_t r, std::int64_t c) const;
  // Rounded (floats) or converted exactly (integers) to the dtype.
  void put(std::int64_t r, std::int64_t c, double v);
  // Element by element, row-major.
  Operand& fill(const std::function<double(std::int64_t, std::int64_t)>& value);
  // Bell-shaped values times `scale`.
  Operand& bell(std::uint64_t seed, double scale = 1.0);
  // Integers from 0 to limit - 1.
  Operand& uniform(std::uint64_t seed, std::int64_t limit);
  [[nodiscard]] std::vector<double> values() const;            // row-major, without gaps
  [[nodiscard]] std::vector<std::int64_t> integers() const;    // i32 or u8
  [[nodiscard]] std::vector<std::byte> element_bytes() const;  // row-major, without gaps
  // Index of the first guard byte that is not 0xFF; -1 when all are.
  [[nodiscard]] std::int64_t broken_guard() const;

 private:
  [[nodiscard]] std::size_t place(std::int64_t r, std::int64_t c) const;

  Role role_ = Role::input;
  DType dtype_ = DType::f32;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  std::int64_t stride_ = 0;
  std::int64_t first_byte_ = 0;
  std::vector<std::byte> bytes_;
};

// What an op left behind on both sides, one operand per operand given.
struct Outcome {
  std::vector<Operand> expected;  // reference
  std::vector<Operand> actual;    // subject
};

// Runs `body` on both sides over copies of the operands. An operand with no elements becomes an
// empty view. Fails the test if a guard or an input changed on either side.
using Body = std::function<void(Ops&, const std::vector<View>&)>;
Outcome run_both(const std::vector<const Operand*>& operands, const Body& body);

// Device memory for a body, for example a workspace: u8 [1, bytes], poisoned; empty if bytes is 0.
class Scratch {
 public:
  Scratch(Ops& ops, std::int64_t bytes);
  [[nodiscard]] View view() const { return buffer_.empty() ? View{} : buffer_.view(); }

 private:
  Buffer buffer_;
};

// Operand `i`: exact to the bit.
void expect_exact(const Outcome& outcome, std::size_t i);
// Operand `i`: within tolerance; and exact when both sides are the same backend.
void expect_close(const Outcome& outcome, std::size_t i, const Tolerance& tolerance);

// The seed of a case follows from its name, so it does not change when cases are added.
std::uint64_t seed_of(const std::string& name);
// Test names take letters, digits and underscores only.
std::string test_name(const std::string& text);

// |x_r| of each row, in f64.
std::vector<double> row_norms(const Operand& x);
// A fixed random order of 0..n-1.
std::vector<std::int32_t> random_order(std::int64_t n, std::uint64_t seed);

// The parameters of GoogleTest's generated cases print as their names.
template <class Case>
std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  return test_name(info.param.name());
}

}  // namespace engine::test
