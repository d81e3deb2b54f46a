#include "engine/ops/cpu_kernels.h"

#include <string>

#include "engine/core/error.h"
#include "engine/ops/cpu_kernels_tables.h"

namespace engine {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  throw Error(ErrorCode::internal, "unknown instruction set");
}

#if defined(__x86_64__)

bool isa_supported(Isa isa) {
  if (isa == Isa::portable) return true;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                    __builtin_cpu_supports("f16c") != 0;
  if (isa == Isa::avx2 || !avx2) return avx2;
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
}

const CpuKernels& cpu_kernels(Isa isa) {
  REQUIRE(isa_supported(isa), std::string("this processor has no ") + isa_name(isa));
  switch (isa) {
    case Isa::avx2:
      return avx2_kernels();
    case Isa::avx512:
      return avx512_kernels();
    default:
      return portable_kernels();
  }
}

#else

bool isa_supported(Isa isa) { return isa == Isa::portable; }

const CpuKernels& cpu_kernels(Isa isa) {
  REQUIRE(isa_supported(isa), std::string("this processor has no ") + isa_name(isa));
  return portable_kernels();
}

#endif

Isa best_isa() {
  for (const Isa isa : {Isa::avx512, Isa::avx2}) {
    if (isa_supported(isa)) return isa;
  }
  return Isa::portable;
}

}  // namespace engine
