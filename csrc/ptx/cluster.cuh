// Thread-block clusters (sm_90): rank, size, number, barrier, and another CTA's shared memory. Before the first access every CTA must have started, and none may end before the
// last one: a barrier before, a barrier after.
#pragma once
#include <cstdint>

namespace specrt::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t ctas;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ctas));
  return ctas;
}

// Which cluster of the grid, along x.
__device__ __forceinline__ uint32_t cluster_id() {
  uint32_t id;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}

// A barrier of all threads of all CTAs of the cluster in two halves: what each wrote before it arrived is visible to all after they waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The first half without the fence that makes writes visible: for barriers initialised (mbarrier_init_fence), and shared memory only read, before.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address, in the cluster's window, of what lies at the shared address `own` in the CTA `rank`.
__device__ __forceinline__ uint32_t shared_address_of(uint32_t rank, uint32_t own) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}

// The 64 bits at the shared address `own` of the CTA `rank`.
__device__ __forceinline__ uint64_t load_from(uint32_t rank, uint32_t own) {
  uint64_t bits;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(shared_address_of(rank, own)) : "memory");
  return bits;
}

// Writes 64 bits to the shared address `own` of the CTA `rank`.
__device__ __forceinline__ void store_to(uint32_t rank, uint32_t own, uint64_t bits) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(shared_address_of(rank, own)), "l"(bits) : "memory");
}

// Arrives at the barrier at the shared address `own` of the CTA `rank`. It orders nothing that this thread wrote: a release at cluster scope is a fence of the whole
// card (0.7 us). For giving back what was only read.
__device__ __forceinline__ void mbarrier_arrive_of(uint32_t rank, uint32_t own) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(shared_address_of(rank, own)) : "memory");
}

// Sends 64 bits to the shared address `own` of the CTA `rank`; they complete as 8 bytes on that CTA's barrier at the shared address `bell`.
__device__ __forceinline__ void send_to(uint32_t rank, uint32_t own, uint64_t bits, uint32_t bell) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(shared_address_of(rank, own)), "l"(bits), "r"(shared_address_of(rank, bell))
               : "memory");
}

// Sends four floats to `to` (16-byte aligned) in another CTA; they complete as 16 bytes on that CTA's barrier `bell`. Both addresses in the cluster's window.
__device__ __forceinline__ void store_shared_of(uint32_t to, float a, float b, float c, float d, uint32_t bell) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(bell)
               : "memory");
}

}  // namespace specrt::ptx
