// Instantiations of vector_half_kernel.
#include "cuda/vector_kernels.cuh"

namespace engine {

template <class T>
VectorKernel<T> vector_kernel_other(PackedKind kind, bool two_tiles, bool fine) {
  return kind == PackedKind::codebook ? pick_half<T, HalfCodec<4, 0, 1, true>>(two_tiles, fine)
                                      : pick_half<T, HalfCodec<1, 1, 2, false>>(two_tiles, fine);
}
template VectorKernel<__half> vector_kernel_other<__half>(PackedKind, bool, bool);
template VectorKernel<__nv_bfloat16> vector_kernel_other<__nv_bfloat16>(PackedKind, bool, bool);

}  // namespace engine
