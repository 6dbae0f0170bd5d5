// Warp-level matrix instructions (sm_80 on): mma.sync m16n8k16 on bf16 with fp32 accumulation, and ldmatrix, which loads its operands (stmatrix, sm_90, is the way back).
//
// Fragments of D[16,8] += A[16,16] B[16,8] (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4 g + t:
//   a[0] A[g][2t..2t+1]   a[1] A[g+8][2t..]   a[2] A[g][2t+8..]   a[3] A[g+8][2t+8..]
//   b[0] B[2t..2t+1][g]   b[1] B[2t+8..2t+9][g]
//   d[0..1] D[g][2t..2t+1]   d[2..3] D[g+8][2t..2t+1]
#pragma once
#include <cstdint>

namespace specrt::ptx {

// d += A B.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 8x8 matrices of 16-bit elements: lanes 8i..8i+7 give the 16-byte aligned addresses of the rows of matrix i; r[i] holds elements
// [lane / 4][2 (lane % 4) ..] of matrix i (of its transpose with _trans).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}


// The way back: r_i of every lane hold elements [2 (lane % 4) .. + 1][lane / 4] of matrix i, whose rows lanes 8i..8i+7 give.
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t row, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(row), "r"(r0), "r"(r1) : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

}  // namespace specrt::ptx
