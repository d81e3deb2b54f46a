// Products with packed weights that have transforms around them: y = L^T (T (R (D x))).
#include <algorithm>
#include <string>

#include "cuda/cuda_ops.h"
#include "cuda/rotate.h"
#include "cuda/rotated.h"
#include "cuda/types.cuh"
#include "engine/ops/rotation.h"
#include "engine/weight/packed_layout.h"

namespace engine {
namespace {

constexpr float f16_factor = 1.0F / 32.0F;  // of turned inputs
constexpr std::int64_t expand_rows = 1024;  // of x at a time, with an expanded weight

std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 256) * 256; }
bool turned(const RotationSide& side) { return side.kind != TransformKind::none; }

// Where a part's intermediate results lie, bytes from the start.
struct Places {
  std::int64_t in = 0, out = 0, bytes = 0;
};
Places places_of(const PackedShape& s, std::int64_t rows) {
  Places p;
  if (turned(s.right)) p.bytes += aligned(2 * rows * s.cols);
  p.out = p.bytes;
  if (turned(s.left)) p.bytes += aligned(4 * rows * s.rows);
  return p;
}
std::int64_t scratch_bytes(const PackedShape& s, std::int64_t rows) {
  const auto of = [&](const RotationSide& side, std::int64_t d) {
    return side.kind == TransformKind::butterfly ? 4 * rows * d : 0;
  };
  return aligned(std::max(of(s.right, s.cols), of(s.left, s.rows)));
}

// What the turned inputs are multiplied with, and the turned outputs divided by.
float input_factor(const PackedShape& s, DType x) {
  return x == DType::f16 && turned(s.left) && turned(s.right) ? f16_factor : 1.0F;
}

}  // namespace

bool rotated_compatible(const PackedShape& a, const PackedShape& b) {
  return a.rotated() && b.rotated() && scheme_compatible(a, b) && a.right.kind == b.right.kind &&
         a.left.kind == b.left.kind;
}

std::int64_t rotated_bytes(const PackedShape& s, std::int64_t rows) {
  return places_of(s, rows).bytes + scratch_bytes(s, rows);
}

bool rotated_fits(const PackedShape& s, const SchemeDevice& device) {
  const auto shared = static_cast<std::size_t>(device.shared_bytes);
  return scheme_fits(s, device) && rotate_fits(s.left, s.rows, shared) &&
         rotate_fits(s.right, s.cols, shared);
}

void rotated_product(View x, std::span<const SchemePart> parts, bool accumulate,
                     const SchemeDevice& device, View workspace, cudaStream_t stream) {
  REQUIRE(!parts.empty() && parts.size() <= scheme_max_parts, "rotated_product: parts");
  const std::size_t n = parts.size();
  const PackedShape& first = parts[0].w->shape;
  std::int64_t needed = 0;
  for (const SchemePart& part : parts) {
    check_rotation("rotated_product", *part.w, DeviceKind::cuda);
    REQUIRE(rotated_compatible(part.w->shape, first) && x.cols == part.w->shape.cols,
            "rotated_product of " + x.shape());
    needed += rotated_bytes(part.w->shape, x.rows);
  }
  REQUIRE(workspace.device == DeviceKind::cuda && workspace.bytes() >= needed,
          "rotated_product needs " + std::to_string(needed) + " bytes, got " + workspace.shape());
  auto* const base = static_cast<std::byte*>(workspace.data);
  const auto shared = static_cast<std::size_t>(device.shared_bytes);

  PackedWeight core[scheme_max_parts];
  SchemePart product[scheme_max_parts];
  RotatePart in[scheme_max_parts], out[scheme_max_parts];
  std::int64_t at = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const PackedWeight& w = *parts[i].w;
    const Places places = places_of(w.shape, x.rows);
    core[i] = without_rotation(w);
    product[i] = {&core[i], parts[i].out, x};
    if (turned(w.shape.right)) {
      product[i].x =
          make_view(base + at + places.in, x.dtype, DeviceKind::cuda, x.rows, w.shape.cols);
      in[i] = {&w.rotation.in, w.rotation.in_places, w.rotation.diagonal, x, product[i].x};
    }
    if (turned(w.shape.left)) {
      product[i].out =
          make_view(base + at + places.out, DType::f32, DeviceKind::cuda, x.rows, w.shape.rows);
      out[i] = {&w.rotation.out, w.rotation.out_places, View{}, product[i].out, parts[i].out};
    }
    at += places.bytes;
  }
  const View scratch = make_view(base + at, DType::u8, DeviceKind::cuda, 1, workspace.bytes() - at);
  const float factor = input_factor(first, x.dtype);
  if (turned(first.right)) rotate_rows({in, n}, false, false, factor, scratch, shared, stream);
  scheme_product(x, {product, n}, accumulate && !turned(first.left), device, stream);
  if (turned(first.left)) {
    rotate_rows({out, n}, parts[0].w->rotation.out_inverse(), accumulate, 1.0F / factor, scratch,
                shared, stream);
  }
}

// Few rows as above; more with the terms expanded, some rows at a time.
std::int64_t CudaOps::rotated_workspace_bytes(const PackedShape& s, std::int64_t rows, DType dtype,
                                              PackedKernel kernel) const {
  if (streams_rotated(s, rows, kernel)) {
    return scheme_max_parts * rotated_bytes(s, rows);  // linears() takes several at once
  }
  const std::int64_t chunk = std::min(rows, expand_rows);
  return aligned(s.rows * s.cols * static_cast<std::int64_t>(dtype_bytes(dtype))) +
         aligned(chunk * s.cols * static_cast<std::int64_t>(dtype_bytes(dtype))) +
         aligned(4 * chunk * std::max(s.rows, s.cols));
}

bool CudaOps::streams_rotated(const PackedShape& s, std::int64_t rows, PackedKernel kernel) const {
  return kernel == PackedKernel::vector ||
         (kernel == PackedKernel::automatic && rows <= rotated_max_rows &&
          rotated_fits(s, scheme_device()));
}

void CudaOps::rotated_matmul(View x, const PackedWeight& w, View out, bool accumulate,
                             PackedKernel kernel, View workspace) {
  const PackedShape& s = w.shape;
  if (streams_rotated(s, x.rows, kernel)) {
    const SchemePart part{&w, out, x};
    return rotated_product(x, {&part, 1}, accumulate, scheme_device(), workspace, stream_);
  }
  check_rotation("packed_matmul", w, DeviceKind::cuda);
  auto* const base = static_cast<std::byte*>(workspace.data);
  const View dense = make_view(base, x.dtype, DeviceKind::cuda, s.rows, s.cols);
  expand(w, dense);
  const float factor = input_factor(s, x.dtype);
  const std::int64_t chunk = std::min(x.rows, expand_rows);
  std::byte* const inputs = base + aligned(dense.bytes());
  auto* const floats =
      inputs + aligned(chunk * s.cols * static_cast<std::int64_t>(dtype_bytes(x.dtype)));
  for (std::int64_t r = 0; r < x.rows; r += chunk) {
    const std::int64_t n = std::min(chunk, x.rows - r);
    View in = x.row_range(r, n);
    if (turned(s.right)) {
      const View scaled = make_view(floats, DType::f32, DeviceKind::cuda, n, s.cols);
      const View turned_in = make_view(inputs, x.dtype, DeviceKind::cuda, n, s.cols);
      scale_columns(in, w.rotation.diagonal, factor, scaled, stream_);
      transform_rows(scaled, w.rotation.in, false, turned_in);
      in = turned_in;
    }
    const View to = out.row_range(r, n);
    if (!turned(s.left)) {
      matmul(in, dense, to, accumulate);
      continue;
    }
    const View y = make_view(floats, DType::f32, DeviceKind::cuda, n, s.rows);
    matmul(in, dense, y, false);
    transform_rows(y, w.rotation.out, w.rotation.out_inverse(), y);
    put_rows(y, 1.0F / factor, accumulate, to, stream_);
  }
}

}  // namespace engine
