// CudaOps: PB-LLM (docs/methods/pbllm.md), on the CPU only so far.
#include "cuda/cuda_ops.h"
#include "engine/core/error.h"

namespace engine {

namespace {

[[noreturn]] void not_yet() {
  throw Error(ErrorCode::device, "pbllm is not implemented for CUDA yet: use --device cpu");
}

}  // namespace

void CudaOps::pbllm_select(const PbllmSelect& /*problem*/) { not_yet(); }

std::int64_t CudaOps::pbllm_select_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                         std::int64_t /*groups*/) {
  not_yet();
}

void CudaOps::pbllm_sweep(const PbllmProblem& /*problem*/) { not_yet(); }

std::int64_t CudaOps::pbllm_workspace_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                            std::int64_t /*block*/, DType /*factor*/) {
  not_yet();
}

}  // namespace engine
