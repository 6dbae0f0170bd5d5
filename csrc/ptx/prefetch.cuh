// Hints that memory will be read.
#pragma once

namespace specrt::ptx {

// Fetches the 128 bytes around `from` into L2.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)) : "memory"); }

}  // namespace specrt::ptx
