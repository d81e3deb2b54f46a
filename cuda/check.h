// Status checks of the CUDA libraries and the one way to launch a kernel.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <string>
#include <utility>

#include "engine/core/error.h"

namespace engine {

inline void check_cuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here; it must not surface again at the next launch
  const auto code =
      status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device;
  throw Error(code, std::string("cuda: ") + what + ": " + cudaGetErrorString(status) + " (" + file +
                        ":" + std::to_string(line) + ")");
}

// cuBLAS and cuBLASLt share one status type, cuSOLVER has its own; 0 is success in both.
template <class Status>
void check_library(Status status, Status no_memory, const char* what, const char* file, int line) {
  if (static_cast<int>(status) == 0) return;
  (void)cudaGetLastError();
  const bool full = status == no_memory;
  throw Error(full ? ErrorCode::out_of_memory : ErrorCode::device,
              std::string("cuda: ") + what + ": " +
                  (full ? "out of memory" : "status " + std::to_string(static_cast<int>(status))) +
                  " (" + file + ":" + std::to_string(line) + ")");
}
inline void check_library(cublasStatus_t status, const char* what, const char* file, int line) {
  check_library(status, CUBLAS_STATUS_ALLOC_FAILED, what, file, line);
}
inline void check_library(cusolverStatus_t status, const char* what, const char* file, int line) {
  check_library(status, CUSOLVER_STATUS_ALLOC_FAILED, what, file, line);
}

// Launches and reports a refused launch with the kernel's name. Every kernel goes through here.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared,
            cudaStream_t stream, Args&&... args) {
  if (shared > 32 * 1024) {  // the limit of 48 KiB counts static shared memory, too
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name, __FILE__, __LINE__);
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Params>(std::forward<Args>(args))...);
  check_cuda(cudaGetLastError(), name, __FILE__, __LINE__);
}

}  // namespace engine

#define CUDA_TRY(call) ::engine::check_cuda((call), #call, __FILE__, __LINE__)
// cuBLAS, cuBLASLt and cuSOLVER.
#define LIBRARY_TRY(call) ::engine::check_library((call), #call, __FILE__, __LINE__)
