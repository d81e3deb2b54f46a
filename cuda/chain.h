// Launching kernels of one step so that each may start while its predecessor still runs
// (programmatic dependent launch, sm_90; elsewhere an ordinary launch).
#pragma once

#include "cuda/check.h"

namespace engine {

// What a chained kernel reads before it waits, weights and norms, must be complete by then: an op
// that writes such things ends with seal(), because the launch after next does not overlap with it.
void seal(cudaStream_t stream);

// As `launch`, for kernels that call chain_wait() (cuda/chain.cuh) on every path before they touch
// anything that another kernel of the stream writes.
template <class... Params, class... Args>
void launch_chained(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                    std::size_t shared, cudaStream_t stream, Args&&... args) {
  // Kernels have static shared memory as well, so the limit of 48 KiB may be met below it.
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      name, __FILE__, __LINE__);
  // One division of the SM's memory for the whole chain: changing it drains the SM.
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             name, __FILE__, __LINE__);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  int device = 0;
  int major = 0;
  check_cuda(cudaGetDevice(&device), name, __FILE__, __LINE__);
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name,
             __FILE__, __LINE__);
  config.numAttrs = major >= 9 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...),
             name, __FILE__, __LINE__);
}

}  // namespace engine
