// Asynchronous copies from global to shared memory (sm_80 on), 16 bytes a thread, past the L1 cache.
#pragma once
#include <cstdint>

namespace specrt::ptx {

// Copies 16 bytes to the shared address `to` (both 16-byte aligned); where `valid` is false nothing is read and zeros are written
// (`from` must still be a legal pointer value).
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
}

// Closes the group of the copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the thread's latest groups are in flight. Other threads' copies need a barrier after it.
template <int pending> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

}  // namespace specrt::ptx
