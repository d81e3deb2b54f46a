// Instantiations of vector_int_kernel.
#include "cuda/vector_kernels.cuh"

namespace engine {

template <class T>
VectorKernel<T> vector_kernel_int4(bool two_tiles, int mode) {
  return pick_int<T, 4>(two_tiles, mode);
}
template VectorKernel<__half> vector_kernel_int4<__half>(bool, int);
template VectorKernel<__nv_bfloat16> vector_kernel_int4<__nv_bfloat16>(bool, int);

}  // namespace engine
