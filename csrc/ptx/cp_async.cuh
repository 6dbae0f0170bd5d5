// Asynchronous copies of a few bytes to shared memory by the thread that wants them (sm_80): unlike a load into registers they can be many, and asked for in a loop.
#pragma once
#include <cstdint>

namespace specrt::ptx {

// 8 bytes to the shared address `to`: from memory where `present`, else zeros.
__device__ __forceinline__ void cp_async_8(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(present ? 8 : 0) : "memory");
}
// 16 bytes, past L1.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(present ? 16 : 0) : "memory");
}
// Closes the group of the copies asked for since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the latest groups are unfinished; this thread then sees what it copied.
template <int pending> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// The phase of a barrier (mbarrier.cuh) waits for all copies that this thread has asked for, too: an arrival more is expected, and comes with them.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) { asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(barrier) : "memory"); }

}  // namespace specrt::ptx
