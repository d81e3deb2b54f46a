// The kernels behind vector_product, by what they decode. Each family is instantiated in a file of
// its own, which keeps compilation short. `fine`: groups of 32 or 64 columns.
#pragma once

#include "cuda/vector_half.cuh"
#include "cuda/vector_int.cuh"

namespace engine {

// Affine, 2, 3, 4 and 8 bits, up to eight rows of x; two_tiles: for more than four; mode:
// vector_plain, vector_coarse or vector_fine.
template <class T>
VectorKernel<T> vector_kernel_int2(bool two_tiles, int mode);
template <class T>
VectorKernel<T> vector_kernel_int3(bool two_tiles, int mode);
template <class T>
VectorKernel<T> vector_kernel_int4(bool two_tiles, int mode);
template <class T>
VectorKernel<T> vector_kernel_int8(bool two_tiles, int mode);
// The others; two_tiles: for more than eight rows of x.
template <class T>
VectorKernel<T> vector_kernel_affine(int bits, bool two_tiles, bool fine);  // 1, 5, 6, 7 bits
template <class T>
VectorKernel<T> vector_kernel_other(PackedKind kind, bool two_tiles,
                                    bool fine);  // codebook, binary2
template <class T>
VectorKernel<T> vector_kernel_dense(bool two_tiles);

}  // namespace engine
