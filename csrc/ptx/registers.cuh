// Registers moved between a block's warpgroups (sm_90a): the kernel's launch bounds give each the same number, a producer needs few.
#pragma once

namespace specrt::ptx {

// By whole warpgroups, a multiple of 8 from 24 to 256. take_registers waits until enough were given.
template <int count> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }

}  // namespace specrt::ptx
