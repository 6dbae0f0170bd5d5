// What a warpgroup of the prompt kernel keeps in registers: 64 query vectors (rows of one head) and their sums over a chunk and over a group, in the order of params.h.
// Lane 4 g + t of warp w holds vectors 16 w + g and 16 w + g + 8 (index i = 0, 1), and of every 8 columns the columns 2 t and 2 t + 1.
//
// A tile of K or V in shared memory: blocks of [64 rows][64 columns], 128-byte rows swizzled (base/tensor_map.h); columns from D on are zeros.
#pragma once
#include "attention/row.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

constexpr int kBlockColumns = 64, kBlockBytes = kTile * kBlockColumns * 2;
template <int D> constexpr int kTileBlocks = (D + kBlockColumns - 1) / kBlockColumns;

// Sums of the two vectors: maximum, row sum, and O, all as the fragments of one m64nNk16 product.
template <int D> struct Sums {
  float m[2], l[2], o[kTileBlocks<D> * kBlockColumns / 8][4];

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
    l[0] = l[1] = 0.0f;
#pragma unroll
    for (auto& column : o)
#pragma unroll
      for (float& x : column) x = 0.0f;
  }

  // Folds (m2, l2, o2) into this; a vector that is not `seen` keeps what it has.
  __device__ __forceinline__ void fold(const float (&m2)[2], const float (&l2)[2], const float (&o2)[kTileBlocks<D> * kBlockColumns / 8][4], const bool (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!seen[i]) continue;
      const FoldFactors f = fold_factors(m[i], m2[i]);
      l[i] = fold_value(l[i], l2[i], f);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) o[n][2 * i + c] = fold_value(o[n][2 * i + c], o2[n][2 * i + c], f);
    }
  }
};

template <int D> struct PromptChunk {
  uint32_t q[D / 16][4];
  float s[8][4];     // scores of a tile, then probabilities
  uint32_t p[4][4];  // probabilities of 16 keys as the A operand
  float m[2], l[4], o[kTileBlocks<D> * kBlockColumns / 8][4];  // l: the product with a column of ones; l[0] for i = 0, l[2] for i = 1

  // q0, q1: vectors i = 0, 1 (null: zeros).
  __device__ __forceinline__ void load(const bf16* q0, const bf16* q1, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const int d = k * 16 + 2 * (lane % 4);
      q[k][0] = q0 ? *reinterpret_cast<const uint32_t*>(q0 + d) : 0u;
      q[k][1] = q1 ? *reinterpret_cast<const uint32_t*>(q1 + d) : 0u;
      q[k][2] = q0 ? *reinterpret_cast<const uint32_t*>(q0 + d + 8) : 0u;
      q[k][3] = q1 ? *reinterpret_cast<const uint32_t*>(q1 + d + 8) : 0u;
    }
  }

  // s = Q K^T, asynchronously; one group of wgmmas.
  __device__ __forceinline__ void start_scores(uint32_t keys) {
    const uint64_t b = ptx::wgmma_descriptor(keys);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ptx::wgmma_rows(s, q[k], b + k / 4 * (kBlockBytes >> 4) + k % 4 * 2, k > 0);
    ptx::wgmma_commit();
  }

  // O = (fresh ? 0 : O) + P V, asynchronously; one group of wgmmas.
  __device__ __forceinline__ void start_values(uint32_t values, bool fresh) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::wgmma_columns(o, p[g], b + 128 * g, g > 0 || !fresh);
    ptx::wgmma_commit();
  }

  // Scores -> probabilities and the new maxima; a: the factors of l and O. low, high: what the vectors see of the tile, where Masked; else all.
  template <bool Masked> __device__ __forceinline__ void softmax(const int (&low)[2], const int (&high)[2], float scale, int lane, float (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][2 * i + c];
          const int j = n * 8 + lane % 4 * 2 + c;
          x = !Masked || (j >= low[i] && j < high[i]) ? x * scale : SPECRT_MINUS_INF;
          top = fmaxf(x, top);
        }
#pragma unroll
      for (int d = 1; d <= 2; d <<= 1) top = fmaxf(__shfl_xor_sync(~0u, top, d), top);
      a[i] = !Masked || low[i] < high[i] ? ptx::ex2(m[i] - top) : 1.0f;
      m[i] = top;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][2 * i + c];
          const int j = n * 8 + lane % 4 * 2 + c;
          x = !Masked || (j >= low[i] && j < high[i]) ? ptx::ex2(x - top) : 0.0f;
        }
    }
  }

  // l and O times a: no wgmma on O may be in flight.
  __device__ __forceinline__ void rescale(const float (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = l[i] * a[i / 2];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = o[n][i] * a[i / 2];
  }

  __device__ __forceinline__ void reset_row_sums() { l[0] = l[1] = l[2] = l[3] = 0.0f; }

  // Rounds the probabilities and adds them to the row sums: the product of P with a column of ones.
  __device__ __forceinline__ void round_and_add() {
    constexpr uint32_t kOnes = 0x3f803f80u;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      p[g][0] = ptx::pack_bf16(s[2 * g][0], s[2 * g][1]);
      p[g][1] = ptx::pack_bf16(s[2 * g][2], s[2 * g][3]);
      p[g][2] = ptx::pack_bf16(s[2 * g + 1][0], s[2 * g + 1][1]);
      p[g][3] = ptx::pack_bf16(s[2 * g + 1][2], s[2 * g + 1][3]);
      ptx::mma_m16n8k16_bf16(l, p[g], kOnes, kOnes);
    }
  }
};

}  // namespace specrt
