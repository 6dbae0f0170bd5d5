// One tile of 64 keys for the 64 query vectors of a warpgroup: scores, online softmax and P V in the order of params.h, on warpgroup tensor cores for keys that all vectors
// share, on warp-level ones for keys of a row's own path. Both have the same fragments: lane 4 g + t of warp w holds vectors 16 w + g and 16 w + g + 8
// (index i = 0, 1), and of every 8 columns the columns 2 t and 2 t + 1.
//
// A tile of K or V in shared memory: blocks of [64 rows][64 columns], 128-byte rows swizzled (base/tensor_map.h).
#pragma once
#include "attention/row.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

constexpr int kBlockBytes = kTile * 128;

// Address of the 16-byte piece `piece` of row `row` of a tile.
__device__ __forceinline__ uint32_t piece_address(uint32_t tile, int row, int piece) {
  return tile + piece / 8 * kBlockBytes + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// A row of a tile, or nothing: zeros.
struct RowAddress {
  uint32_t tile;
  int row;  // -1: zeros, at `tile`
  __device__ uint32_t piece(int i) const { return row < 0 ? tile : piece_address(tile, row, i); }
};

template <int D> struct Vectors {
  static constexpr int kColumns = D <= 64 ? 64 : 128;  // of a tile; columns from D on are zeros
  float m[2], l[4], o[kColumns / 8][4];  // l: the product with a column of ones; l[0] for i = 0, l[2] for i = 1
  float s[32];                           // scores, then probabilities: s[4 n + e], columns 8 n ..
  uint32_t p[4][4];                      // probabilities of 16 keys as the A operand

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;
  }

  __device__ __forceinline__ void reset_scores() {
#pragma unroll
    for (int n = 0; n < 32; ++n) s[n] = 0.0f;
  }

  // Scores of all 64 keys of a tile; `queries`: the 64 vectors, laid out as a tile is. By the whole warpgroup.
  __device__ __forceinline__ void score(uint32_t queries, uint32_t keys) {
    const uint64_t a = ptx::wgmma_descriptor(queries), b = ptx::wgmma_descriptor(keys);
    reset_scores();
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ptx::wgmma_bf16(s, a + k / 4 * (kBlockBytes >> 4) + k % 4 * 2, b + k / 4 * (kBlockBytes >> 4) + k % 4 * 2);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < 32; ++n) asm volatile("" : "+f"(s[n])::"memory");  // not used before
  }

  // Scores of 16 keys, whose rows lie at `key` (of lane's key lane / 16 * 8 + lane % 8), into columns 16 group.. of the vectors that are `mine`; `query`: this warp's 16
  // vectors, the address of row lane % 16. By one warp.
  __device__ __forceinline__ void score_own(int group, RowAddress query, RowAddress key, const bool (&mine)[2], int lane) {
    float s0[4] = {0.0f, 0.0f, 0.0f, 0.0f}, s1[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, query.piece(2 * k + lane / 16));
      ptx::ldmatrix_x4(b, key.piece(2 * k + lane / 8 % 2));
      ptx::mma_m16n8k16_bf16(s0, a, b[0], b[1]);
      ptx::mma_m16n8k16_bf16(s1, a, b[2], b[3]);
    }
#pragma unroll
    for (int g = 0; g < 4; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // no index that is not a constant: s stays in registers
        s[8 * g + e] = g == group && mine[e / 2] ? s0[e] : s[8 * g + e];
        s[8 * g + 4 + e] = g == group && mine[e / 2] ? s1[e] : s[8 * g + 4 + e];
      }
  }

  // Scores -> probabilities, the new maxima, l and O scaled and the row sums added. low, high: what the vectors see of the tile, where Masked; else all.
  // both: this warp has more than 8 vectors.
  template <bool Masked> __device__ __forceinline__ void softmax(const int (&low)[2], const int (&high)[2], float scale, bool both, int lane) {
    float a[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !both) {
#pragma unroll
        for (int n = 0; n < 8; ++n) s[4 * n + 2] = s[4 * n + 3] = 0.0f;
        break;
      }
      float top = m[i];
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * n + 2 * i + c];
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
          float& x = s[4 * n + 2 * i + c];
          const int j = n * 8 + lane % 4 * 2 + c;
          x = !Masked || (j >= low[i] && j < high[i]) ? ptx::ex2(x - top) : 0.0f;
        }
    }
#pragma unroll
    for (int g = 0; g < 4; ++g)
#pragma unroll
      for (int h = 0; h < 4; ++h) p[g][h] = ptx::pack_bf16(s[8 * g + 2 * h], s[8 * g + 2 * h + 1]);
    if (__any_sync(~0u, a[0] != 1.0f || a[1] != 1.0f)) {  // else the products are what they were
#pragma unroll
      for (int i = 0; i < 4; ++i) l[i] = l[i] * a[i / 2];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] = o[n][i] * a[i / 2];
    }
    constexpr uint32_t kOnes = 0x3f803f80u;
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::mma_m16n8k16_bf16(l, p[g], kOnes, kOnes);
  }

  // A warp without vectors takes part in its warpgroup's products.
  __device__ __forceinline__ void no_probabilities() {
#pragma unroll
    for (int g = 0; g < 4; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[g][i] = 0u;
  }

  // Those of a group that is known at run time only.
  __device__ __forceinline__ void probabilities(int group, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = group < 2 ? (group == 0 ? p[0][i] : p[1][i]) : (group == 2 ? p[2][i] : p[3][i]);
  }

  // O += P V over the first `groups` groups of 16 keys of a tile. By the whole warpgroup.
  __device__ __forceinline__ void accumulate(uint32_t values, int groups) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes);
    if (groups < 4) {
      for (int g = 0; g < groups; ++g) {
        uint32_t a[4];
        probabilities(g, a);
        ptx::wgmma_fence();
        ptx::wgmma_columns(o, a, b + 128 * g, true);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_results(o);
      }
      return;
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::wgmma_columns(o, p[g], b + 128 * g, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(o);
  }

  // O += P V over the 16 keys of a group, whose V rows lie at `value` (of lane's key lane / 8 % 2 * 8 + lane % 8), for the vectors that are `mine`. By one warp.
  __device__ __forceinline__ void accumulate_own(int group, RowAddress value, const bool (&mine)[2], int lane) {
    uint32_t a[4];
    probabilities(group, a);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, value.piece(2 * n + lane / 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float(&x)[4] = o[2 * n + half];
        float sum[4] = {x[0], x[1], x[2], x[3]};
        ptx::mma_m16n8k16_bf16(sum, a, b[2 * half], b[2 * half + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = mine[e / 2] ? sum[e] : x[e];
      }
    }
  }
};

}  // namespace specrt
