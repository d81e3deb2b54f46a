// Stands in for the CUDA backend in builds without it.
#include <string>

#include "engine/ops/ops.h"

namespace engine {

std::unique_ptr<Ops> make_cuda_ops(Ledger& /*ledger*/, int device_index) {
  throw Error(ErrorCode::device, "cuda:" + std::to_string(device_index) +
                                     ": this build has no CUDA support; configure with a CUDA "
                                     "compiler or use device \"cpu\"");
}

int cuda_device_count() { return 0; }

}  // namespace engine
