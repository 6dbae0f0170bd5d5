// Thread-block clusters (sm_90): rank, barrier, and reads of another CTA's shared memory.
#pragma once
#include <cstdint>

namespace specrt::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster; what each wrote to shared memory before is visible to all after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four floats at the shared address `from` (16-byte aligned) of the CTA `rank`.
__device__ __forceinline__ void load_shared_of(uint32_t rank, uint32_t from, float (&to)[4]) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "r"(from), "r"(rank)
      : "memory");
}

}  // namespace specrt::ptx
