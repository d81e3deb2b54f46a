// PackedOps on the CPU.
#include <algorithm>
#include <string>
#include <vector>

#include "engine/ops/cpu_gemm.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cpu_pack.h"
#include "engine/ops/cpu_rows.h"
#include "engine/ops/rotation.h"
#include "engine/weight/packed_decode.h"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

// Rows of the weight that are decoded, then multiplied, at a time.
constexpr std::int64_t decoded_rows = 4 * record_rows;

bool small_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

void check_weight(const char* op, const PackedWeight& w) {
  check_packed_weight(op, w, DeviceKind::cpu);
  if (!w.permutation.empty()) (void)checked_permutation(w.permutation, w.shape.cols);
}

}  // namespace

void CpuOps::repack(View codes, View scales, View zeros, const PackedWeight& out) {
  check_packed_weight("repack", out, DeviceKind::cpu);
  check_packed_planes("repack", out.shape, codes, scales, zeros, !out.shape.zeros, DeviceKind::cpu);
  pool_.run(out.shape.row_tiles(), 1, [&](std::int64_t begin, std::int64_t end) {
    pack_records(codes, scales, zeros, out, begin, end);
  });
}

void CpuOps::unpack(const PackedWeight& w, View codes, View scales, View zeros) {
  check_packed_weight("unpack", w, DeviceKind::cpu);
  const bool no_zeros = w.shape.kind == PackedKind::codebook && zeros.empty();
  check_packed_planes("unpack", w.shape, codes, scales, zeros, no_zeros, DeviceKind::cpu);
  pool_.run(w.shape.row_tiles(), 1, [&](std::int64_t begin, std::int64_t end) {
    unpack_records(w, codes, scales, zeros, begin, end);
  });
}

void CpuOps::expand(const PackedWeight& w, View out) {
  check_weight("expand", w);
  REQUIRE(out.rows == w.shape.rows && out.cols == w.shape.cols && small_float(out.dtype) &&
              out.device == DeviceKind::cpu,
          "expand: out " + out.shape());
  const CpuKernels& kernels = cpu_kernels(best_isa());
  const auto row_bytes = out.stride * static_cast<std::int64_t>(dtype_bytes(out.dtype));
  pool_.run(out.rows, record_rows, [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch scratch;
    float* decoded = scratch.floats(record_rows * out.cols);
    decode_packed_tile(w, begin / record_rows, decoded, out.cols);
    for (std::int64_t r = begin; r < end; ++r) {
      kernels.from_f32(out.dtype, decoded + (r - begin) * out.cols,
                       static_cast<char*>(out.data) + r * row_bytes, out.cols);
    }
  });
}

// L^T (T (R (D x))), step by step in f32.
void CpuOps::rotated_matmul(View x, const PackedWeight& w, View out, bool accumulate) {
  check_rotation("packed_matmul", w, DeviceKind::cpu);
  const std::int64_t m = x.rows, cols = w.shape.cols, rows = w.shape.rows;
  std::vector<float> in(static_cast<std::size_t>(m * cols)), y(static_cast<std::size_t>(m * rows));
  const View turned = host_view(in.data(), m, cols), product = host_view(y.data(), m, rows);
  convert(x, turned);
  if (!w.rotation.diagonal.empty()) scale_weights(turned, w.rotation.diagonal, View{}, turned);
  transform_rows(turned, w.rotation.in, false, turned);
  packed_matmul(turned, without_rotation(w), product, false, PackedKernel::automatic, View{});
  transform_rows(product, w.rotation.out, w.rotation.out_inverse(), product);
  if (accumulate) {
    std::vector<float> before(static_cast<std::size_t>(rows));
    for (std::int64_t r = 0; r < m; ++r) {
      load_row(out, r, 0, rows, before.data());
      float* row = y.data() + r * rows;
      for (std::int64_t c = 0; c < rows; ++c) row[c] += before[static_cast<std::size_t>(c)];
    }
  }
  convert(product, out);
}

// Every kernel is this one: weights decoded to f32, products and sums in f32.
void CpuOps::packed_matmul(View x, const PackedWeight& w, View out, bool accumulate, PackedKernel,
                           View) {
  check_weight("packed_matmul", w);
  const std::int64_t cols = w.shape.cols;
  REQUIRE(x.cols == cols && out.rows == x.rows && out.cols == w.shape.rows,
          "packed_matmul: x " + x.shape() + ", weight [" + std::to_string(w.shape.rows) + ", " +
              std::to_string(cols) + "], out " + out.shape());
  REQUIRE(small_float(x.dtype) && (out.dtype == x.dtype || out.dtype == DType::f32),
          "packed_matmul: x " + x.shape() + ", out " + out.shape());
  REQUIRE(x.device == DeviceKind::cpu && out.device == DeviceKind::cpu,
          "packed_matmul: host views");
  if (w.shape.rotated()) return rotated_matmul(x, w, out, accumulate);
  pool_.run(w.shape.rows, decoded_rows, [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch scratch;
    float* decoded = scratch.floats((end - begin) * cols);
    for (std::int64_t r = begin; r < end; r += record_rows) {
      decode_packed_tile(w, r / record_rows, decoded + (r - begin) * cols, cols);
    }
    const View part = out.col_range(begin, end - begin);
    GemmProblem p;
    p.m = x.rows;
    p.n = end - begin;
    p.k = cols;
    p.a = {x.data, x.dtype, x.stride, false};
    p.b = {decoded, DType::f32, cols, true};
    p.c = {part.data, part.dtype, part.stride};
    p.accumulate = accumulate;
    gemm(nullptr, p);
  });
}

std::int64_t CpuOps::packed_workspace_bytes(const PackedShape& shape, std::int64_t, DType,
                                            PackedKernel) const {
  check_packed_shape(shape);
  return 0;
}

}  // namespace engine
