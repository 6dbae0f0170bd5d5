// The fold of a job's chunks in tree attention where a cluster of CTAs shares them (params.h): each CTA leaves (m, l, O) of its chunks in the workspace, which stays in L2; when
// all have, each folds its share of the vectors.
//
// In the workspace a vector's O lies as the lanes hold it: of 16 columns, the lane t of four has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and they are four floats side by side.
#pragma once
#include "attention/row.cuh"

namespace specrt {

// (m, l) of a vector, and four elements of its O: a lane's of 16 columns.
struct VectorSums {
  float m, l, o[4];

  __device__ __forceinline__ void reset() {
    m = SPECRT_MINUS_INF;
    l = 0.0f;
#pragma unroll
    for (float& x : o) x = 0.0f;
  }
  __device__ __forceinline__ void fold(const VectorSums& s) {
    const FoldFactors f = fold_factors(m, s.m);
    l = fold_value(l, s.l, f);
#pragma unroll
    for (int e = 0; e < 4; ++e) o[e] = fold_value(o[e], s.o[e], f);
  }
};

// The workspace: O, then (m, l), of each vector (row x query head) and chunk.
struct Workspace {
  float4* values;
  float2* sums;
  int chunks, quads;

  __device__ __forceinline__ explicit Workspace(const AttentionParams& p)
      : values(reinterpret_cast<float4*>(p.workspace)), chunks((p.max_pages * p.page + kChunk - 1) / kChunk), quads(p.head_dim / 4) {
    sums = reinterpret_cast<float2*>(values + static_cast<int64_t>(p.rows) * p.q_heads * chunks * quads);
  }
  __device__ __forceinline__ float4* of(int64_t vector, int chunk) const { return values + (vector * chunks + chunk) * quads; }
  __device__ __forceinline__ float2* sums_of(int64_t vector, int chunk) const { return sums + vector * chunks + chunk; }

  // The chunks of a group, folded: of the columns 16 part .., those of lane t of four.
  __device__ __forceinline__ VectorSums group(int64_t vector, const Row& row, int group, int part, int t) const {
    constexpr int kBatch = 4;  // loads in flight
    VectorSums sum;
    sum.reset();
#pragma unroll 1
    for (int base = group * kGroupChunks; base < (group + 1) * kGroupChunks; base += kBatch) {
      VectorSums chunk[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        chunk[i].reset();
        if (!row.sees((base + i) * kChunk, kChunk)) continue;
        const float4 o = __ldcg(of(vector, base + i) + 4 * part + t);
        const float2 ml = __ldcg(sums_of(vector, base + i));
        chunk[i] = {ml.x, ml.y, {o.x, o.y, o.z, o.w}};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (row.sees((base + i) * kChunk, kChunk)) sum.fold(chunk[i]);
    }
    return sum;
  }
};

}  // namespace specrt
