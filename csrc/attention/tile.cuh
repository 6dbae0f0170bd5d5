// One tile of 64 keys for 16 query vectors of a warp, in bf16: the rows of mma.m16n8k16 are the vectors. Lane 4 g + t holds rows g and g + 8 (index i = 0, 1
// below), and of every 8 columns the columns 2 t and 2 t + 1. The prompt kernel's; tree_tile.cuh has the same arithmetic on warpgroup instructions.
#pragma once
#include "attention/row.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"

namespace specrt {

// Rows of K or V in shared memory: padded by 16 bytes, so that the 8 rows ldmatrix reads at once lie in different banks.
template <int D> constexpr int kRowStride = D + 8;

template <int D> struct QueryFragment {
  uint32_t a[D / 16][4];

  // q0, q1: the vectors of rows g and g + 8 (null: zeros).
  __device__ void load(const bf16* q0, const bf16* q1, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const int d = k * 16 + 2 * t;
      a[k][0] = q0 ? *reinterpret_cast<const uint32_t*>(q0 + d) : 0u;
      a[k][1] = q1 ? *reinterpret_cast<const uint32_t*>(q1 + d) : 0u;
      a[k][2] = q0 ? *reinterpret_cast<const uint32_t*>(q0 + d + 8) : 0u;
      a[k][3] = q1 ? *reinterpret_cast<const uint32_t*>(q1 + d + 8) : 0u;
    }
  }
};

template <int D> struct TileState {
  float m[2], l[4], o[D / 8][4];  // l: the product with a column of ones; l[0] for row g, l[2] for row g + 8

  __device__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] = 0.0f;
  }
};

struct Scores {
  float s[8][4];  // [key / 8][as an MMA result]
};

// Scores of the 16 keys whose rows begin at `keys` (shared memory), into s[2 group], s[2 group + 1].
template <int D> __device__ __forceinline__ void score_keys(Scores& scores, int group, const QueryFragment<D>& q, const bf16* keys, int lane) {
  float(&s0)[4] = scores.s[2 * group];
  float(&s1)[4] = scores.s[2 * group + 1];
#pragma unroll
  for (int i = 0; i < 4; ++i) s0[i] = s1[i] = 0.0f;
  const uint32_t row = ptx::shared_address(keys + (lane / 16 * 8 + lane % 8) * kRowStride<D> + lane / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, row + k * 32);
    ptx::mma_m16n8k16_bf16(s0, q.a[k], b[0], b[1]);
    ptx::mma_m16n8k16_bf16(s1, q.a[k], b[2], b[3]);
  }
}

// Scores -> probabilities (float32, in place), the new maxima, and l, O scaled by a. low, high: what rows g and g + 8 see of the tile.
template <int D>
__device__ __forceinline__ void softmax_tile(Scores& scores, TileState<D>& state, const int (&low)[2], const int (&high)[2], float scale, int lane) {
  float a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = state.m[i];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& s = scores.s[n][2 * i + c];
        const int j = n * 8 + lane % 4 * 2 + c;
        s = j >= low[i] && j < high[i] ? s * scale : SPECRT_MINUS_INF;
        top = s > top ? s : top;
      }
#pragma unroll
    for (int d = 1; d <= 2; d <<= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, top, d);
      top = other > top ? other : top;
    }
    a[i] = low[i] < high[i] ? ptx::ex2(state.m[i] - top) : 1.0f;
    state.m[i] = top;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& s = scores.s[n][2 * i + c];
        const int j = n * 8 + lane % 4 * 2 + c;
        s = j >= low[i] && j < high[i] ? ptx::ex2(s - top) : 0.0f;
      }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) state.l[i] = state.l[i] * a[i / 2];
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) state.o[n][i] = state.o[n][i] * a[i / 2];
}

// l += P 1 and O += P V for the 16 keys of a group, whose V rows begin at `values` (shared memory). Call it for groups ascending.
template <int D> __device__ __forceinline__ void accumulate_values(const Scores& scores, int group, TileState<D>& state, const bf16* values, int lane) {
  const float(&s0)[4] = scores.s[2 * group];
  const float(&s1)[4] = scores.s[2 * group + 1];
  const uint32_t p[4] = {ptx::pack_bf16(s0[0], s0[1]), ptx::pack_bf16(s0[2], s0[3]), ptx::pack_bf16(s1[0], s1[1]), ptx::pack_bf16(s1[2], s1[3])};
  constexpr uint32_t kOnes = 0x3f803f80u;
  ptx::mma_m16n8k16_bf16(state.l, p, kOnes, kOnes);
  const uint32_t row = ptx::shared_address(values + (lane / 8 % 2 * 8 + lane % 8) * kRowStride<D> + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, row + n * 32);
    ptx::mma_m16n8k16_bf16(state.o[2 * n], p, b[0], b[1]);
    ptx::mma_m16n8k16_bf16(state.o[2 * n + 1], p, b[2], b[3]);
  }
}

// Starts the copy of positions [begin, begin + 64) of a request's own slots into `to` [64][kRowStride], by all threads of the block; positions
// outside [first, last) become zeros.
template <int D, int Threads>
__device__ __forceinline__ void copy_tile(const AttentionParams& p, const bf16* pool, int request, int kv_head, int begin, int first, int last, bf16* to) {
  constexpr int kPieces = D / 8;  // of 16 bytes, a row
#pragma unroll 2
  for (int i = 0; i < kTile * kPieces / Threads; ++i) {
    const int index = i * Threads + threadIdx.x, j = index / kPieces, piece = index % kPieces, position = begin + j;
    const bool valid = position >= first && position < last;
    const bf16* from = pool + (valid ? slot_offset(p, request, kv_head, position) + piece * 8 : 0);
    ptx::cp_async_16(ptx::shared_address(to + j * kRowStride<D> + piece * 8), from, valid);
  }
}

}  // namespace specrt
