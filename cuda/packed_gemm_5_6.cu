// Instances of packed_gemm_kernel.
#include "cuda/packed_gemm_kernel.cuh"

namespace engine {

template void launch_gemm_format<__half, Affine<__half, 5>>(const PackedGemmArgs&, int,
                                                            cudaStream_t);
template void launch_gemm_format<__nv_bfloat16, Affine<__nv_bfloat16, 5>>(const PackedGemmArgs&,
                                                                          int, cudaStream_t);
template void launch_gemm_format<__half, Affine<__half, 6>>(const PackedGemmArgs&, int,
                                                            cudaStream_t);
template void launch_gemm_format<__nv_bfloat16, Affine<__nv_bfloat16, 6>>(const PackedGemmArgs&,
                                                                          int, cudaStream_t);

}  // namespace engine
