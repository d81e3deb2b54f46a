// The tables behind cpu_kernels(), one per source file. The x86 ones exist on x86-64 only and must
// not be called where isa_supported() says no.
#pragma once

#include "engine/ops/cpu_kernels.h"

namespace engine {

const CpuKernels& portable_kernels();
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();

}  // namespace engine
