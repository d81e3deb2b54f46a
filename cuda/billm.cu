// CudaOps: BiLLM's sweep (docs/methods/billm.md), on the CPU only so far.
#include "cuda/cuda_ops.h"
#include "engine/core/error.h"

namespace engine {

namespace {

[[noreturn]] void not_yet() {
  throw Error(ErrorCode::device, "billm is not implemented for CUDA yet: use --device cpu");
}

}  // namespace

void CudaOps::billm_sweep(const BillmProblem& /*problem*/) { not_yet(); }

std::int64_t CudaOps::billm_workspace_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                            std::int64_t /*block*/, DType /*factor*/) {
  not_yet();
}

}  // namespace engine
