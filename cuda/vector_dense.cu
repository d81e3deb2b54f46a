// Instantiations of vector_half_kernel.
#include "cuda/vector_kernels.cuh"

namespace engine {

template <class T>
VectorKernel<T> vector_kernel_dense(bool two_tiles) {
  return two_tiles ? vector_half_kernel<T, DenseCodec, 2, false>
                   : vector_half_kernel<T, DenseCodec, 1, false>;
}
template VectorKernel<__half> vector_kernel_dense<__half>(bool);
template VectorKernel<__nv_bfloat16> vector_kernel_dense<__nv_bfloat16>(bool);

}  // namespace engine
