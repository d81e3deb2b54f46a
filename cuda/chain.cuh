// The device side of launch_chained (cuda/chain.h).
#pragma once

namespace engine {

// Lets the next kernel of the chain start its preparations as soon as there is room for it.
__device__ inline void chain_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until everything before this kernel in the stream is done and visible.
__device__ inline void chain_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace engine
