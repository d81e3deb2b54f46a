// CudaOps: SliM-LLM's bit search and sweep (docs/methods/slimllm.md), on the CPU only so far.
#include "cuda/cuda_ops.h"
#include "engine/core/error.h"

namespace engine {

namespace {

[[noreturn]] void not_yet() {
  throw Error(ErrorCode::device, "slimllm is not implemented for CUDA yet: use --device cpu");
}

}  // namespace

void CudaOps::slim_divisors(View /*r*/, bool /*inverse*/, View /*out*/) { not_yet(); }
void CudaOps::slim_salience(View /*w*/, View /*divisors*/, std::int64_t /*group*/, View /*out*/) {
  not_yet();
}
void CudaOps::slim_candidates(View /*w*/, int /*bits*/, std::int64_t /*group*/,
                              DType /*scale_dtype*/, View /*base*/, View /*lower*/,
                              View /*higher*/) {
  not_yet();
}
void CudaOps::softmax_kl(View /*y*/, View /*reference*/, double /*floor*/, View /*kl*/) {
  not_yet();
}
void CudaOps::slim_sweep(const SlimProblem& /*problem*/) { not_yet(); }
std::int64_t CudaOps::slim_workspace_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                           std::int64_t /*group*/, DType /*factor*/) {
  not_yet();
}

}  // namespace engine
