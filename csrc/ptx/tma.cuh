// The bulk tensor copy engine (sm_90): boxes of a row-major matrix into shared memory, completing on an mbarrier.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace specrt::ptx {

// For what many CTAs read: L2 should keep it longer than what passes once.
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// For what passes once: L2 should let go of it first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Fetches the map itself ahead of its first use.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copies the map's box at (column, row) to the shared address `to`; what lies outside the matrix becomes zeros and counts as bytes too.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map),
               "r"(column), "r"(row), "r"(barrier), "l"(policy)
               : "memory");
}

// The same without a hint.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(column), "r"(row),
               "r"(barrier)
               : "memory");
}

// The same into every CTA of the cluster whose bit is set in `ctas`, at this offset of its shared memory and completing on its own barrier there.
__device__ __forceinline__ void tma_load_to_all(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, int ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(ctas)), "l"(policy)
      : "memory");
}

// Writes 16 bytes to memory under a policy.
__device__ __forceinline__ void store_global(float4* to, float4 x, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "l"(policy) : "memory");
}

// Brings `bytes` contiguous bytes (a multiple of 16, 16-byte aligned) to L2.
__device__ __forceinline__ void bulk_prefetch_l2(const void* from, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory"); }

// `bytes` contiguous bytes (a multiple of 16, both sides 16-byte aligned).
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// The same with a hint.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

// Without a hint, into every CTA of the cluster whose bit is set in `ctas`, at this offset of its shared memory and completing on its own barrier there.
__device__ __forceinline__ void bulk_load_to_all(uint32_t to, const void* from, int bytes, uint32_t barrier, int ctas) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier),
               "h"(static_cast<uint16_t>(ctas))
               : "memory");
}

}  // namespace specrt::ptx
