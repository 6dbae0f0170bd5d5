// What the consumers of tree attention do beyond the prompt kernel's (prefill_tile.cuh): keys of a row's own path, on warp-level tensor cores. Both have the same fragments.
#pragma once
#include "attention/prefill_tile.cuh"
#include "ptx/mma.cuh"

namespace specrt {

// Address of the 16-byte piece `piece` of row `row` of a tile.
__device__ __forceinline__ uint32_t piece_address(uint32_t tile, int row, int piece) {
  return tile + piece / 8 * kBlockBytes + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// What of two stages of keys a vector sees: a bit a row.
struct alignas(16) Visible {
  uint64_t stage[2];
};

template <int D> struct Vectors : PromptChunk<D> {
  static constexpr int kColumns = kTileColumns<D>;
  using PromptChunk<D>::start_scores, PromptChunk<D>::s, PromptChunk<D>::p, PromptChunk<D>::m, PromptChunk<D>::l, PromptChunk<D>::o;

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
#pragma unroll
    for (float& x : l[0]) x = 0.0f;
#pragma unroll
    for (auto& column : o)
#pragma unroll
      for (float& x : column) x = 0.0f;
  }

  // to = Q K^T with Q in registers, asynchronously; one group of wgmmas.
  __device__ __forceinline__ static void start_scores(float (&to)[8][4], const uint32_t (&q)[D / 16][4], uint32_t keys) {
    const uint64_t b = ptx::wgmma_descriptor(keys);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ptx::wgmma_rows(to, q[k], b + (k / 4 * (kBlockBytes >> 4) + k % 4 * 2), k > 0);
    ptx::wgmma_commit();
  }

  // O += P V over the first `groups` < 4 groups of 16 keys of a tile. By the whole warpgroup.
  __device__ __forceinline__ void accumulate(uint32_t values, int groups) {
    const uint64_t b = ptx::wgmma_column_descriptor(values, kBlockBytes);
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = g == 0 ? p[0][i] : (g == 1 ? p[1][i] : p[2][i]);
      ptx::wgmma_fence();
      ptx::wgmma_columns(o, a, b + 128 * g, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(o);
    }
  }

  // Scores of two stages of keys, s and (where there is one) `more`, of which vector i sees `seen[i]` -> probabilities and the new maxima; a: the factors of l and O.
  __device__ __forceinline__ void softmax_own(float (&more)[8][4], bool has_more, const Visible (&seen)[2], float scale, int lane, float (&a)[2]) {
    auto mask = [&](float(&scores)[8][4], int stage, float(&top)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint64_t word = seen[i].stage[stage] >> lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = scores[n][2 * i + c];
            if (!(word >> (n * 8 + c) & 1)) x = SPECRT_MINUS_INF;
            top[i] = fmaxf(top[i], x);
          }
      }
    };
    auto exponents = [&](float(&scores)[8][4], const float(&base)[2]) {
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] = ptx::ex2(fma_rn(scores[n][e], scale, -base[e / 2]));
    };
    float top[2] = {SPECRT_MINUS_INF, SPECRT_MINUS_INF}, base[2];
    mask(s, 0, top);
    if (has_more) mask(more, 1, top);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int d = 1; d <= 2; d <<= 1) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], d));
      const float before = m[i];
      m[i] = fmaxf(before, top[i] * scale);
      base[i] = m[i] == SPECRT_MINUS_INF ? 0.0f : m[i];
      a[i] = ptx::ex2(before - base[i]);
    }
    exponents(s, base);
    if (has_more) exponents(more, base);
  }

  // A warp without vectors takes part in its warpgroup's products.
  __device__ __forceinline__ void no_probabilities() {
#pragma unroll
    for (auto& group : p)
#pragma unroll
      for (uint32_t& x : group) x = 0u;
  }

  // l += the sums of 16 probabilities.
  __device__ __forceinline__ void add_sums(const uint32_t (&group)[4]) {
    constexpr uint32_t kOnes = 0x3f803f80u;
    ptx::mma_m16n8k16_bf16(l[0], group, kOnes, kOnes);
  }

  // O += P V over 16 keys for the vectors that are `mine`; value: the V row of lane's key lane / 8 % 2 * 8 + lane % 8, or where it is not `there` 16 zeros. By one warp.
  __device__ __forceinline__ void accumulate_own(const uint32_t (&group)[4], uint32_t value, bool there, const bool (&mine)[2], int lane) {
    const uint32_t first = there ? value + ((value >> 7 & 7) ^ (lane / 16)) * 16 : value, mask = there ? ~0u : 0u, block = there ? kBlockBytes : 0;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, (first ^ (mask & n % 4 * 32)) + n / 4 * block);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float(&x)[4] = o[2 * n + half];
        float sum[4] = {x[0], x[1], x[2], x[3]};
        ptx::mma_m16n8k16_bf16(sum, group, b[2 * half], b[2 * half + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = mine[e / 2] ? sum[e] : x[e];
      }
    }
  }
};

}  // namespace specrt
