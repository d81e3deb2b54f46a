// Instantiations of vector_half_kernel.
#include "cuda/vector_kernels.cuh"

namespace engine {

template <class T>
VectorKernel<T> vector_kernel_affine(int bits, bool two_tiles, bool fine) {
  switch (bits) {
    case 1:
      return pick_half<T, HalfCodec<1, 0, 1, false>>(two_tiles, fine);
    case 5:
      return pick_half<T, HalfCodec<4, 1, 1, false>>(two_tiles, fine);
    case 6:
      return pick_half<T, HalfCodec<4, 2, 1, false>>(two_tiles, fine);
    default:
      return pick_half<T, HalfCodec<4, 3, 1, false>>(two_tiles, fine);
  }
}
template VectorKernel<__half> vector_kernel_affine<__half>(int, bool, bool);
template VectorKernel<__nv_bfloat16> vector_kernel_affine<__nv_bfloat16>(int, bool, bool);

}  // namespace engine
