// What the consumers of tree attention do beyond the prompt kernel's (prefill_tile.cuh): keys of a row's own path, on warp-level tensor cores. Both have the same fragments.
#pragma once
#include "attention/prefill_tile.cuh"
#include "ptx/mma.cuh"

namespace specrt {

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

// What of two stages of keys a vector sees: a bit a row.
struct alignas(16) Visible {
  uint64_t stage[2];
};

template <int D> struct Vectors : PromptChunk<D> {
  static constexpr int kColumns = kTileColumns<D>;
  using PromptChunk<D>::s, PromptChunk<D>::p, PromptChunk<D>::m, PromptChunk<D>::l, PromptChunk<D>::o;

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
#pragma unroll
    for (float& x : l[0]) x = 0.0f;
#pragma unroll
    for (auto& column : o)
#pragma unroll
      for (float& x : column) x = 0.0f;
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

  // Scores -> exponents: x = visible ? score * scale : -infinity, and the greatest of them and of `top`.
  template <typename F> __device__ __forceinline__ static float exponents(float (&scores)[8][4], int i, float scale, float top, F&& visible) {
    float tops[2] = {top, SPECRT_MINUS_INF};
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = scores[n][2 * i + c];
        x = visible(n, c) ? x * scale : SPECRT_MINUS_INF;
        tops[c] = fmaxf(tops[c], x);
      }
    return fmaxf(tops[0], tops[1]);
  }
  template <typename F> __device__ __forceinline__ static void probabilities(float (&scores)[8][4], int i, float top, F&& visible) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = scores[n][2 * i + c];
        x = visible(n, c) ? ptx::ex2(x - top) : 0.0f;
      }
  }
  __device__ __forceinline__ static float of_quad(float top) {
#pragma unroll
    for (int d = 1; d <= 2; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    return top;
  }

  // Scores of two stages of keys, s and `more`, of which vector i sees seen(i) -> probabilities and the new maxima; a: the factors of l and O.
  template <typename Seen> __device__ __forceinline__ void softmax_own(float (&more)[8][4], Seen&& seen, float scale, int lane, float (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Visible of = seen(i);
      const uint64_t first = of.stage[0] >> lane % 4 * 2, second = of.stage[1] >> lane % 4 * 2;
      auto in_first = [&](int n, int c) { return (first >> (n * 8 + c) & 1) != 0; };
      auto in_second = [&](int n, int c) { return (second >> (n * 8 + c) & 1) != 0; };
      const float top = of_quad(exponents(more, i, scale, exponents(s, i, scale, m[i], in_first), in_second));
      a[i] = (of.stage[0] | of.stage[1]) ? ptx::ex2(m[i] - top) : 1.0f;
      m[i] = top;
      probabilities(s, i, top, in_first);
      probabilities(more, i, top, in_second);
    }
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

  // O += P V over 16 keys for the vectors that are `mine`; `value`: the V row of lane's key lane / 8 % 2 * 8 + lane % 8. By one warp.
  __device__ __forceinline__ void accumulate_own(const uint32_t (&group)[4], RowAddress value, const bool (&mine)[2], int lane) {
    constexpr int kAtOnce = 4;
#pragma unroll
    for (int base = 0; base < D / 16; base += kAtOnce) {
      uint32_t b[kAtOnce][4];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
        if (base + n < D / 16) ptx::ldmatrix_x4_trans(b[n], value.piece(2 * (base + n) + lane / 16));
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (base + n >= D / 16) break;
          float(&x)[4] = o[2 * (base + n) + half];
          float sum[4] = {x[0], x[1], x[2], x[3]};
          ptx::mma_m16n8k16_bf16(sum, group, b[n][2 * half], b[n][2 * half + 1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = mine[e / 2] ? sum[e] : x[e];
        }
    }
  }
};

}  // namespace specrt
