// One tile of 64 keys for the 64 query vectors of a warpgroup: scores, online softmax and P V in the order of params.h, on warpgroup tensor cores for keys that all vectors
// share, on warp-level ones for keys of a row's own path. Both have the same fragments: lane 4 g + t of warp w holds vectors 16 w + g and 16 w + g + 8
// (index i = 0, 1), and of every 8 columns the columns 2 t and 2 t + 1.
#pragma once
#include "attention/tree_job.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

constexpr int kOwnRows = 2;  // rows whose own keys are worked on at once

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

  // Starts the scores of all 64 keys of a tile; `queries`: the 64 vectors, laid out as a tile is. By the whole warpgroup; then commit, and wait.
  __device__ __forceinline__ void start_scores(uint32_t queries, uint32_t keys) {
    const uint64_t a = ptx::wgmma_descriptor(queries), b = ptx::wgmma_descriptor(keys);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ptx::wgmma_bf16(s, a + k / 4 * (kBlockBytes >> 4) + k % 4 * 2, b + k / 4 * (kBlockBytes >> 4) + k % 4 * 2);
  }
  // Keeps the compiler from using the scores earlier, or from leaving what is to be done with them until later.
  __device__ __forceinline__ void pin_scores() {
#pragma unroll
    for (int n = 0; n < 32; ++n) asm volatile("" : "+f"(s[n])::"memory");
  }

  // Scores of 16 keys of each of some rows' paths into columns 16 group.. of the rows' vectors (mine[r]: which); keys: where lane's key lane / 16 * 8 + lane % 8 lies;
  // query: this warp's 16 vectors, the address of row lane % 16. By one warp.
  __device__ __forceinline__ void score_own(int group, RowAddress query, const RowAddress (&keys)[kOwnRows], const bool (&mine)[kOwnRows][2], int lane) {
    float x[kOwnRows][2][4];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[r][0][e] = x[r][1][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, query.piece(2 * k + lane / 16));
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, keys[r].piece(2 * k + lane / 8 % 2));
        ptx::mma_m16n8k16_bf16(x[r][0], a, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(x[r][1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float y = x[0][half][e];
        bool any = mine[0][e / 2];
#pragma unroll
        for (int r = 1; r < kOwnRows; ++r) {
          y = mine[r][e / 2] ? x[r][half][e] : y;
          any |= mine[r][e / 2];
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) s[8 * g + 4 * half + e] = g == group && any ? y : s[8 * g + 4 * half + e];  // no index that is not a constant: s stays in registers
      }
  }

  // Scores -> probabilities; the new maxima, and a, by which l and O are to be scaled. low, high: what the vectors see of the tile, where Masked; else all.
  template <bool Masked> __device__ __forceinline__ void softmax(const int (&low)[2], const int (&high)[2], float scale, int lane, float (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
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
  }

  // The probabilities become p; l and O scaled, the row sums added. No product may be under way that reads p or adds to O.
  __device__ __forceinline__ void join(const float (&a)[2]) {
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

  // Probabilities of a group that is known at run time only.
  __device__ __forceinline__ void probabilities(int group, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = group < 2 ? (group == 0 ? p[0][i] : p[1][i]) : (group == 2 ? p[2][i] : p[3][i]);
  }

  // Starts O += P V over a tile. By the whole warpgroup; then commit, and wait.
  __device__ __forceinline__ void start_values(uint32_t values) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes);
#pragma unroll
    for (int g = 0; g < 4; ++g) ptx::wgmma_columns(o, p[g], b + 128 * g, true);
  }

  // O += P V over the first `groups` groups of 16 keys of a tile. By the whole warpgroup.
  __device__ __forceinline__ void accumulate(uint32_t values, int groups) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes);
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      uint32_t a[4];
      probabilities(g, a);
      ptx::wgmma_fence();
      ptx::wgmma_columns(o, a, b + 128 * g, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(o);
    }
  }

  // O += P V over 16 keys of each of some rows' paths, for the rows' vectors; values: where lane's V row lane % 16 lies. By one warp.
  __device__ __forceinline__ void accumulate_own(int group, const RowAddress (&values)[kOwnRows], const bool (&mine)[kOwnRows][2], int lane) {
    uint32_t a[4];
    probabilities(group, a);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      float x[kOwnRows][2][4];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, values[r].piece(2 * n + lane / 16));
#pragma unroll
        for (int half = 0; half < 2; ++half) ptx::mma_m16n8k16_bf16(x[r][half], a, b[2 * half], b[2 * half + 1], o[2 * n + half]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) o[2 * n + half][e] = mine[r][e / 2] ? x[r][half][e] : o[2 * n + half][e];
    }
  }
};

}  // namespace specrt
