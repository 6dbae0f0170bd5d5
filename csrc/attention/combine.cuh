// Folds what runs of chunks left in the workspace (tree.cu, decode.cu): chunks ascending into their group, groups ascending into the total.
//
// A team of warps a (row, head): a warp reads the chunks of a group at once, then the first one folds the groups. A piece of O a lane.
#pragma once
#include "attention/plan.cuh"
#include "ptx/dependency.cuh"
#include "ptx/named_barrier.cuh"

namespace specrt {

// Where the workspace has the part (m, l, O) that a run of chunks, from chunk c on, has of a vector (row, head): [R, Hq, C]. O's columns 16 g + 2 t, + 1, + 8 and + 9 are a piece
// of 16 bytes, number 4 g + t.
__device__ __forceinline__ int64_t part_of(const AttentionParams& p, int vector, int chunk) {
  return static_cast<int64_t>(vector) * ((p.max_pages * p.page + kChunk - 1) / kChunk) + chunk;
}
__device__ __forceinline__ float4* part_pieces(const AttentionParams& p, int64_t part) { return reinterpret_cast<float4*>(p.workspace + part * p.head_dim); }
__device__ __forceinline__ float2* part_sums(const AttentionParams& p, int64_t part) {
  return reinterpret_cast<float2*>(p.workspace + static_cast<int64_t>(p.rows) * p.q_heads * ((p.max_pages * p.page + kChunk - 1) / kChunk) * p.head_dim) + part;
}
constexpr int kCombineWarps = 8;

template <int D> __global__ void __launch_bounds__(kCombineWarps * 32, 2) combine_kernel(const __grid_constant__ AttentionParams p, int team) {
  __shared__ WarpState<4> groups[kCombineWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, of_team = warp % team, teams = kCombineWarps / team;
  ptx::launch_dependents();
  const PlanHeader header = plan_header(p.plan);
  const int run = 1 << header.log_run;
  const int vectors = min(__ldcg(p.num_rows), p.rows) * p.q_heads, step = gridDim.x * teams;
  int vector = blockIdx.x * teams + warp / team;
  auto row_of = [&] {
    Row row;
    if (vector < vectors) row.len = plan_len(p.plan, p.rows, vector / p.q_heads);
    if (p.window > 0) row.first = max(0, row.len - p.window);
    return row;
  };
  Row row = row_of();
  ptx::grid_dependency_wait();
  if (header.whole) return;
  for (; vector < vectors; vector += step, row = row_of()) {
    const int begin = row.first / kChunk / run, end = (row.len + run * kChunk - 1) / (run * kChunk);
    if (run == kGroupChunks && end - begin == 1) continue;  // written where it was computed
    const int64_t part = part_of(p, vector, 0);
    const float4* o = part_pieces(p, part) + lane;
    const float2* ml = part_sums(p, part);
    WarpState<4> group, total;
    total.reset();
    for (int base = row.first / kGroup; base * kGroup < row.len; base += team) {
      float4 pieces[kGroupChunks];
      float2 sums[kGroupChunks];
      auto seen = [&](int b) {  // piece b of the warp's group
        const int piece = (base + of_team) * (kGroupChunks / run) + b;
        return b < kGroupChunks / run && piece >= begin && piece < end;
      };
#pragma unroll
      for (int b = 0; b < kGroupChunks; ++b) {
        if (!seen(b)) continue;
        const int c = (base + of_team) * kGroupChunks + b * run;
        sums[b] = ml[c];
        if (lane < D / 4) pieces[b] = o[c * (D / 4)];
      }
      group.reset();
#pragma unroll
      for (int b = 0; b < kGroupChunks; ++b)
        if (seen(b)) group.fold({sums[b].x, sums[b].y, {pieces[b].x, pieces[b].y, pieces[b].z, pieces[b].w}});
      if (team == 1) {
        total.fold(group);
        continue;
      }
      groups[warp][lane] = group;
      ptx::named_barrier(1 + warp / team, team * 32);
      if (of_team == 0)
        for (int g = 0; g < team && (base + g) * kGroup < row.len; ++g) total.fold(groups[warp + g][lane]);
      ptx::named_barrier(1 + warp / team, team * 32);
    }
    if (of_team > 0 || lane >= D / 4) continue;
    const float factor = row.len > 0 ? 1.0f / total.l * p.v_scale : 0.0f;
    auto rounded = [&](int i) { return static_cast<uint32_t>(to_bf16(row.len > 0 ? total.o[i] * factor : 0.0f).bits); };
    const int column = lane / 4 * 16 + lane % 4 * 2;
    uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + static_cast<int64_t>(vector) * D + column);
    out[0] = rounded(0) | rounded(1) << 16;
    out[4] = rounded(2) | rounded(3) << 16;
  }
}

template <int D> void launch_combine(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kMostWarps = 2 * kCombineWarps;  // of an SM, at once
  const int64_t vectors = static_cast<int64_t>(p.rows) * p.q_heads, most = static_cast<int64_t>(multiprocessors()) * kMostWarps;
  int team = 1;  // as many warps as there may be groups and there is room for
  while (team < kCombineWarps && team * kGroup < p.max_pages * p.page && vectors * team * 2 <= most) team *= 2;
  const int64_t blocks = (vectors * team + kCombineWarps - 1) / kCombineWarps;
  launch({dim3(static_cast<unsigned>(blocks * kCombineWarps < most ? blocks : most / kCombineWarps)), dim3(kCombineWarps * 32), 0, stream, 1, true}, combine_kernel<D>, p, team);
}

}  // namespace specrt
