// What a warpgroup of the prompt kernel keeps in registers: scores and sums of 64 vectors (rows of one head) over a chunk, and their sums over a group, in the order of
// params.h. Lane 4 g + t of warp w holds vectors 16 w + g and 16 w + g + 8 (index i = 0, 1), and of every 8 columns the columns 2 t and 2 t + 1.
//
// A tile of Q, K or V in shared memory: blocks of [64 rows][64 columns], 128-byte rows swizzled (base/tensor_map.h). Columns from D on hold what does not matter.
#pragma once
#include "attention/row.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

constexpr int kBlockColumns = 64, kBlockBytes = kTile * kBlockColumns * 2;
template <int D> constexpr int kTileBlocks = (D + kBlockColumns - 1) / kBlockColumns;
template <int D> constexpr int kTileColumns = kTileBlocks<D> * kBlockColumns;

// (m, l, O) of the two vectors.
template <int D> struct PromptSums {
  float m[2], l[2], o[D / 8][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < 2; ++i) m[i] = SPECRT_MINUS_INF, l[i] = 0.0f;
#pragma unroll
    for (auto& column : o)
#pragma unroll
      for (float& x : column) x = 0.0f;
  }

  // Folds (m2, l2, o2) into this; a vector that is not `seen` keeps what it has.
  __device__ __forceinline__ void fold(const float (&m2)[2], const float (&l2)[2], const float (&o2)[kTileColumns<D> / 8][4], const bool (&seen)[2]) {
    FoldFactors f[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      f[i] = {1.0f, 0.0f};
      if (seen[i]) f[i] = fold_factors(m[i], m2[i]);
      l[i] = seen[i] ? fold_value(l[i], l2[i], f[i]) : l[i];
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = seen[e / 2] ? fold_value(o[n][e], o2[n][e], f[e / 2]) : o[n][e];
  }
};

// Those of a chunk.
template <int D> struct PromptChunk {
  float s[8][4];     // scores of a tile, then probabilities
  uint32_t p[4][4];  // probabilities of 16 keys as the A operand
  float m[2], l[1][4], o[kTileColumns<D> / 8][4];  // l: the product with a column of ones; l[0][0] for i = 0, l[0][2] for i = 1

  // s = Q K^T, asynchronously; one group of wgmmas.
  __device__ __forceinline__ void start_scores(uint32_t queries, uint32_t keys) { start_scores(s, queries, keys); }
  __device__ __forceinline__ static void start_scores(float (&s)[8][4], uint32_t queries, uint32_t keys) {
    const uint64_t a = ptx::wgmma_descriptor(queries), b = ptx::wgmma_descriptor(keys);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ptx::wgmma_rows(s, a + (k / 4 * (kBlockBytes >> 4) + k % 4 * 2), b + (k / 4 * (kBlockBytes >> 4) + k % 4 * 2), k > 0);
    ptx::wgmma_commit();
  }

  // O = (fresh ? 0 : O) + P V and the row sums likewise, asynchronously; one group of wgmmas. ones: 256 bytes of ones.
  __device__ __forceinline__ void start_values(uint32_t values, uint32_t ones, bool fresh) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes), one = ptx::wgmma_plain_descriptor(ones);
    ptx::wgmma_fence();
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::wgmma_columns(o, p[g], b + 128 * g, g > 0 || !fresh);
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::wgmma_sums(l[0], p[g], one, g > 0 || !fresh);
    ptx::wgmma_commit();
  }

  // Scores outside what the vectors see of the tile, [low, high), become -infinity.
  __device__ __forceinline__ void mask(const int (&low)[2], const int (&high)[2], int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = low[i] - lane % 4 * 2, to = high[i] - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (n * 8 + c < from || n * 8 + c >= to) s[n][2 * i + c] = SPECRT_MINUS_INF;
    }
  }

  // Scores -> probabilities and the new maxima; a: the factors of l and O. As scale > 0 the greatest product is the greatest score's. Masked: a vector may have seen nothing
  // yet; it has p = 0, and l = O = 0 whatever a is.
  template <bool Masked> __device__ __forceinline__ void softmax(float scale, float (&a)[2]) {
    float top[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i][0] = s[0][2 * i], top[i][1] = s[0][2 * i + 1];
#pragma unroll
      for (int n = 1; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) top[i][c] = fmaxf(top[i][c], s[n][2 * i + c]);
      top[i][0] = fmaxf(top[i][0], top[i][1]);
    }
#pragma unroll
    for (int d = 1; d <= 2; d <<= 1)
#pragma unroll
      for (int i = 0; i < 2; ++i) top[i][0] = fmaxf(top[i][0], __shfl_xor_sync(~0u, top[i][0], d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float before = m[i];
      m[i] = fmaxf(before, top[i][0] * scale);
      const float base = Masked && m[i] == SPECRT_MINUS_INF ? 0.0f : m[i];
      a[i] = ptx::ex2(before - base);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][2 * i + c];
          x = ptx::ex2(fma_rn(x, scale, -base));
        }
    }
  }

  // l and O times a: no wgmma on O may be in flight.
  __device__ __forceinline__ void rescale(const float (&a)[2]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) l[0][e] = l[0][e] * a[e / 2];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = o[n][e] * a[e / 2];
  }

  // The probabilities rounded: no wgmma on p may be in flight.
  __device__ __forceinline__ void round() {
#pragma unroll
    for (int g = 0; g < 4; ++g)
#pragma unroll
      for (int h = 0; h < 4; ++h) p[g][h] = ptx::pack_bf16(s[2 * g + h / 2][h % 2 * 2], s[2 * g + h / 2][h % 2 * 2 + 1]);
  }
};

}  // namespace specrt
