// Thread-block clusters (sm_90): rank, barrier, and another CTA's shared memory. Before the first access every CTA must have started, and none may end before the
// last one: a barrier before, a barrier after.
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

// The barrier in two halves, with work between them; also .release and .acquire.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The word at the shared address `from` of the CTA `rank`.
__device__ __forceinline__ uint32_t load_word_of(uint32_t rank, uint32_t from) {
  uint32_t word;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote];\n}"
      : "=r"(word)
      : "r"(from), "r"(rank)
      : "memory");
  return word;
}

// Writes 64 bits to the shared address `to` of the CTA `rank`.
__device__ __forceinline__ void store_to(uint32_t rank, uint32_t to, uint64_t bits) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u64 [remote], %2;\n}" ::"r"(to),
      "r"(rank), "l"(bits)
      : "memory");
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
