// Instantiations of vector_wide_kernel for 4 bits.
#include "cuda/vector_wide.cuh"

namespace engine {

template <class T>
WideKernel<T> wide_kernel_4(int mode) {
  return pick_wide<T, HalfCodec<4, 0, 1, false>>(mode);
}
template WideKernel<__half> wide_kernel_4<__half>(int);
template WideKernel<__nv_bfloat16> wide_kernel_4<__nv_bfloat16>(int);

}  // namespace engine
