// The fold of a vector's chunks (or whole groups) in the workspace, and its output: chunks ascending into their group, groups ascending.
#pragma once
#include "attention/row.cuh"

namespace specrt {

// Where a vector's partial results lie: O [vectors, C, D], then (m, l) [vectors, C, 2].
struct Partials {
  float *o, *ml;
  __device__ Partials(const AttentionParams& p, int64_t vector) {
    const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, vectors = static_cast<int64_t>(p.rows) * p.q_heads;
    o = p.workspace + vector * chunks * p.head_dim;
    ml = p.workspace + vectors * chunks * p.head_dim + vector * chunks * 2;
  }
};

// Does a row see one run of chunks alone? Then whoever computed that has written the output.
__device__ __forceinline__ bool sees_one_run(const Row& row, int run) { return row.len <= (row.first & -(run * kChunk)) + run * kChunk; }

// Half the columns of a vector, by a warp: those from half * D / 2 on, lane + 32 i. `Groups` groups of chunks are read at once; lane j finds the factors of the chunk base + j.
template <int D, int Groups> __device__ __forceinline__ void fold_half(const AttentionParams& p, const Row& row, int64_t vector, int run, int half, int lane) {
  constexpr int kBatch = Groups * kGroupChunks, kColumns = D / 2, kFloats = (kColumns + 31) / 32;
  const Partials part(p, vector);
  const float* from = part.o + half * kColumns + lane;
  float m = SPECRT_MINUS_INF, l = 0.0f, o[kFloats];
#pragma unroll
  for (int i = 0; i < kFloats; ++i) o[i] = 0.0f;
  for (int base = row.first / kGroup * kGroupChunks; base * kChunk < row.len; base += kBatch) {
    const int mine = base + lane;
    const bool sees = lane < kBatch && (mine & (run - 1)) == 0 && row.sees(mine * kChunk, run * kChunk);
    const unsigned seen = __ballot_sync(~0u, sees);
    const float2 ml = sees ? __ldcg(reinterpret_cast<const float2*>(part.ml) + mine) : make_float2(SPECRT_MINUS_INF, 0.0f);
    float x[kBatch][kFloats];
#pragma unroll
    for (int c = 0; c < kBatch; ++c)
#pragma unroll
      for (int i = 0; i < kFloats; ++i)
        if ((seen >> c & 1) && (kColumns % 32 == 0 || lane + 32 * i < kColumns)) x[c][i] = __ldcg(from + static_cast<int64_t>(base + c) * D + 32 * i);

    float top = ml.x;  // of the group up to this chunk
#pragma unroll
    for (int d = 1; d < kGroupChunks; d <<= 1) {
      const float before = __shfl_up_sync(~0u, top, d);
      if (lane % kGroupChunks >= d) top = before > top ? before : top;
    }
    float before = __shfl_up_sync(~0u, top, 1);
    if (lane % kGroupChunks == 0) before = SPECRT_MINUS_INF;
    const FoldFactors mine_f{ptx::ex2(before - top), ptx::ex2(ml.x - top)};
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      if (!(seen >> g * kGroupChunks & ((1u << kGroupChunks) - 1))) continue;
      float group_l = 0.0f, group_o[kFloats];
#pragma unroll
      for (int i = 0; i < kFloats; ++i) group_o[i] = 0.0f;
#pragma unroll
      for (int c = g * kGroupChunks; c < (g + 1) * kGroupChunks; ++c) {
        if (!(seen >> c & 1)) continue;
        const FoldFactors f{__shfl_sync(~0u, mine_f.kept, c), __shfl_sync(~0u, mine_f.added, c)};
        group_l = fold_value(group_l, __shfl_sync(~0u, ml.y, c), f);
#pragma unroll
        for (int i = 0; i < kFloats; ++i) group_o[i] = fold_value(group_o[i], x[c][i], f);
      }
      const FoldFactors f = fold_factors(m, __shfl_sync(~0u, top, (g + 1) * kGroupChunks - 1));
      l = fold_value(l, group_l, f);
#pragma unroll
      for (int i = 0; i < kFloats; ++i) o[i] = fold_value(o[i], group_o[i], f);
    }
  }
  bf16* out = static_cast<bf16*>(p.out) + vector * D + half * kColumns + lane;
  const float reciprocal = row.len > 0 ? 1.0f / l : 0.0f;
#pragma unroll
  for (int i = 0; i < kFloats; ++i)
    if (kColumns % 32 == 0 || lane + 32 * i < kColumns) out[32 * i] = to_bf16(row.len > 0 ? o[i] * reciprocal : 0.0f);
}

}  // namespace specrt
