// CudaOps: products with packed weights, and which kernel computes them.
#include "cuda/cuda_ops.h"
#include "cuda/packed_gemm.h"
#include "cuda/types.cuh"
#include "cuda/vector.h"
#include "cuda/vector_wide.h"

namespace engine {
namespace {

// The crossovers measured on an H200 at the LLaMA3-8B shapes (bench kernels --crossover,
// docs/kernels.md): few rows are bound by the weights' bytes, which the streaming kernel reads
// fastest; from the other end, decoding the whole weight first pays when the dense product is long.
// From 9 to 16 rows the kernel of clusters is faster than the matrix kernel where it applies.
constexpr std::int64_t stream_max_rows = 8;
constexpr std::int64_t matrix_max_rows = 160;

PackedKernel choose(PackedKernel asked, const PackedShape& shape, bool permuted, std::int64_t rows,
                    const VectorResources& resources) {
  if (!is_record_kind(shape.kind)) {  // there is no matrix kernel
    const bool few = rows <= scheme_max_rows &&
                     scheme_fits(shape, {resources.multiprocessors, resources.shared_bytes});
    return asked == PackedKernel::vector || (asked == PackedKernel::automatic && few)
               ? PackedKernel::vector
               : PackedKernel::expand;
  }
  if (asked != PackedKernel::automatic) return asked;
  if (rows <= stream_max_rows && vector_fits(shape, rows, resources)) return PackedKernel::vector;
  if (!permuted && rows <= vector_max_rows && vector_wide_fits(shape, rows, resources)) {
    return PackedKernel::vector;
  }
  return rows <= matrix_max_rows ? PackedKernel::matrix : PackedKernel::expand;
}

}  // namespace

std::int64_t CudaOps::packed_workspace_bytes(const PackedShape& shape, std::int64_t rows,
                                             DType dtype, PackedKernel kernel) const {
  if (shape.rotated()) return rotated_workspace_bytes(shape, rows, dtype, kernel);
  // What a weight with a permutation needs, which may be more.
  switch (choose(kernel, shape, true, rows, vector_resources())) {
    case PackedKernel::matrix:
      return packed_gemm_workspace_bytes(shape, rows, properties_.multiProcessorCount);
    case PackedKernel::expand:
      return shape.rows * shape.cols * static_cast<std::int64_t>(dtype_bytes(dtype));
    default:
      return 0;
  }
}

void CudaOps::packed_matmul(View x, const PackedWeight& w, View out, bool accumulate,
                            PackedKernel kernel, View workspace) {
  REQUIRE(x.cols == w.shape.cols && out.rows == x.rows && out.cols == w.shape.rows &&
              (x.dtype == DType::f16 || x.dtype == DType::bf16) &&
              (out.dtype == x.dtype || out.dtype == DType::f32),
          "packed_matmul of " + x.shape() + " into " + out.shape());
  if (x.empty() || out.empty()) return;
  require_cuda("packed_matmul", {x, w.records, out});
  const std::int64_t needed = packed_workspace_bytes(w.shape, x.rows, x.dtype, kernel);
  REQUIRE(needed == 0 || (workspace.device == DeviceKind::cuda && workspace.contiguous() &&
                          workspace.bytes() >= needed && aligned_rows(workspace, 256, 1)),
          "packed_matmul needs " + std::to_string(needed) + " bytes of workspace, got " +
              workspace.shape());
  if (w.shape.rotated()) return rotated_matmul(x, w, out, accumulate, kernel, workspace);
  switch (choose(kernel, w.shape, w.permutation.data != nullptr, x.rows, vector_resources())) {
    case PackedKernel::matrix:
      packed_gemm(x, w, out, accumulate, properties_.multiProcessorCount, workspace, stream_);
      break;
    case PackedKernel::expand: {
      const View dense =
          make_view(workspace.data, x.dtype, DeviceKind::cuda, w.shape.rows, w.shape.cols);
      expand(w, dense);
      matmul(x, dense, out, accumulate);
      break;
    }
    default: {
      if (!is_record_kind(w.shape.kind)) {
        const SchemePart part{&w, out, x};
        return scheme_product(x, {&part, 1}, accumulate, scheme_device(), stream_);
      }
      const Linear linear{View{}, w};
      const auto problem = [&](std::int64_t r, std::int64_t n) {
        VectorProblem p;
        p.x = x.row_range(r, n);
        const View to = out.row_range(r, n);
        p.segment[0] = {&linear, to.data, to.stride, 0};
        p.out_dtype = out.dtype;
        p.epilogue = accumulate ? VectorEpilogue::add : VectorEpilogue::store;
        return p;
      };
      if (x.rows <= vector_max_rows && stream_product(problem(0, x.rows))) return;
      // Formats with many coefficients leave shared memory for fewer rows at a time.
      std::int64_t stream = vector_max_rows;
      while (stream > 1 && !vector_fits(w.shape, stream, vector_resources())) stream /= 2;
      for (std::int64_t r = 0; r < x.rows; r += stream) {
        const std::int64_t n = std::min(stream, x.rows - r);
        vector_product(problem(r, n), vector_resources(), stream_);
      }
    }
  }
}

}  // namespace engine
