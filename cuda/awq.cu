// The search over channel scales and clip bounds of AWQ: not here yet.
#include "cuda/cuda_ops.h"

namespace engine {
namespace {

[[noreturn]] void not_here() {
  throw Error(ErrorCode::device, "AWQ is not implemented for CUDA yet: use --device cpu");
}

}  // namespace

void CudaOps::add_abs_sums(View /*x*/, View /*sums*/) { not_here(); }
void CudaOps::scale_weights(View /*w*/, View /*s*/, View /*t*/, View /*out*/) { not_here(); }
void CudaOps::round_trip_scaled(View /*w*/, View /*s*/, const GridSpec& /*spec*/, View /*out*/) {
  not_here();
}
void CudaOps::moment_loss(View /*a*/, View /*b*/, View /*h*/, View /*out*/, View /*workspace*/) {
  not_here();
}
std::int64_t CudaOps::moment_loss_bytes(std::int64_t /*rows*/, std::int64_t /*d*/) { not_here(); }
void CudaOps::awq_clip(const AwqClipProblem& /*problem*/) { not_here(); }
std::int64_t CudaOps::awq_clip_bytes(std::int64_t /*rows*/, std::int64_t /*d*/,
                                     const GridSpec& /*grid*/, std::int64_t /*n*/) {
  not_here();
}

}  // namespace engine
