// The fold of a vector's chunks (or whole groups, where runs are groups), and its output: chunks ascending into their group, groups ascending.
//
// A warp for half the columns of a vector; four groups of partial results are read at once, lane j finds the factors of the j-th.
#include "attention/fold.cuh"
#include "attention/plan.cuh"
#include "base/launch.h"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4;

template <int D> __device__ __forceinline__ void fold_half(const AttentionParams& p, const Row& row, int64_t vector, int run, int half, int lane) {
  constexpr int kColumns = D / 2, kFloats = (kColumns + 31) / 32, kBatch = 32;
  const bool groups = run == kGroupChunks;  // each is a group
  const int span = run * kChunk;
  const Partials part(p, vector);
  const float* from = part.o + half * kColumns + lane;
  float m = SPECRT_MINUS_INF, l = 0.0f, o[kFloats] = {}, group_m = SPECRT_MINUS_INF, group_l = 0.0f, group_o[kFloats] = {};
  for (int base = (row.first & -kGroup) / span; base * span < row.len; base += kBatch) {
    const bool sees = row.sees((base + lane) * span, span);
    const unsigned seen = __ballot_sync(~0u, sees);
    const float2 ml = sees ? *(reinterpret_cast<const float2*>(part.ml) + (base + lane) * run) : make_float2(SPECRT_MINUS_INF, 0.0f);
    float x[kBatch][kFloats];
#pragma unroll
    for (int c = 0; c < kBatch; ++c)
#pragma unroll
      for (int i = 0; i < kFloats; ++i)
        if ((seen >> c & 1) && (kColumns % 32 == 0 || lane + 32 * i < kColumns)) x[c][i] = from[static_cast<int64_t>((base + c) * run) * D + 32 * i];

    float top = ml.x;  // of the group up to this chunk; of all groups up to this one
    const int place = groups ? lane : lane % kGroupChunks;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const float before = __shfl_up_sync(~0u, top, d);
      if (place >= d) top = before > top ? before : top;
    }
    if (groups) top = m > top ? m : top;
    float before = __shfl_up_sync(~0u, top, 1);
    if (place == 0) before = groups ? m : SPECRT_MINUS_INF;
    const FoldFactors mine{ptx::ex2(before - top), ptx::ex2(ml.x - top)};
#pragma unroll
    for (int g = 0; g < kBatch / kGroupChunks; ++g) {
      if (!(seen >> g * kGroupChunks & ((1u << kGroupChunks) - 1))) continue;
#pragma unroll
      for (int c = g * kGroupChunks; c < (g + 1) * kGroupChunks; ++c) {
        if (!(seen >> c & 1)) continue;
        const FoldFactors f{__shfl_sync(~0u, mine.kept, c), __shfl_sync(~0u, mine.added, c)};
        group_l = fold_value(group_l, __shfl_sync(~0u, ml.y, c), f);
#pragma unroll
        for (int i = 0; i < kFloats; ++i) group_o[i] = fold_value(group_o[i], x[c][i], f);
      }
      group_m = __shfl_sync(~0u, top, (g + 1) * kGroupChunks - 1);
      if (groups) continue;
      const FoldFactors f = fold_factors(m, group_m);
      l = fold_value(l, group_l, f);
      group_l = 0.0f;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) {
        o[i] = fold_value(o[i], group_o[i], f);
        group_o[i] = 0.0f;
      }
    }
    if (groups) m = group_m;
  }
  bf16* out = static_cast<bf16*>(p.out) + vector * D + half * kColumns + lane;
  const float reciprocal = row.len > 0 ? 1.0f / (groups ? group_l : l) : 0.0f;
#pragma unroll
  for (int i = 0; i < kFloats; ++i)
    if (kColumns % 32 == 0 || lane + 32 * i < kColumns) out[32 * i] = to_bf16(row.len > 0 ? (groups ? group_o[i] : o[i]) * reciprocal : 0.0f);
}

template <int D> __global__ void __launch_bounds__(kWarps * 32) fold_kernel(const __grid_constant__ AttentionParams p) {
  const unsigned task = blockIdx.x * kWarps + threadIdx.x / 32, vector = task / 2;
  const int r = static_cast<int>(vector / static_cast<unsigned>(p.q_heads));
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (r >= p.rows) return;
  const int rows = *p.num_rows, run = plan_header(p.plan).run;  // all loads at once
  const Row row = describe_row(p, r);
  if (r >= rows || (row.len > 0 && sees_one_run(row, run))) return;  // written where it was computed
  fold_half<D>(p, row, vector, run, task % 2, threadIdx.x % 32);
}

}  // namespace

void launch_fold(const AttentionParams& p, cudaStream_t stream) {
  const unsigned tasks = static_cast<unsigned>(p.rows) * p.q_heads * 2;
  const Launch at{dim3((tasks + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, stream, 1, true};
  switch (p.head_dim) {
    case 64: return launch(at, fold_kernel<64>, p);
    case 96: return launch(at, fold_kernel<96>, p);
    default: return launch(at, fold_kernel<128>, p);
  }
}

}  // namespace specrt
