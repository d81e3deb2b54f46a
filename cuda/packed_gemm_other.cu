// Instances of packed_gemm_kernel.
#include "cuda/packed_gemm_kernel.cuh"

namespace engine {

template void launch_gemm_format<__half, Codebook<__half>>(const PackedGemmArgs&, int,
                                                           cudaStream_t);
template void launch_gemm_format<__nv_bfloat16, Codebook<__nv_bfloat16>>(const PackedGemmArgs&, int,
                                                                         cudaStream_t);
template void launch_gemm_format<__half, Binary2<__half>>(const PackedGemmArgs&, int, cudaStream_t);
template void launch_gemm_format<__nv_bfloat16, Binary2<__nv_bfloat16>>(const PackedGemmArgs&, int,
                                                                        cudaStream_t);

}  // namespace engine
