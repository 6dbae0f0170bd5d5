// The plan of tree attention: made once a forward pass on the device, read by every layer. Nothing in it can change a bit.
//
// Rows are cut in blocks: consecutive rows of one request (of one prefix, where rows have paths), as many as the kernel has vectors for. A job is a block, a KV head and a
// run of chunks of positions: single chunks while there are CTAs without work, else whole groups, which fold where they are.
#pragma once
#include "attention/row.cuh"
#include "base/launch.h"

namespace specrt {

struct PlanHeader {
  int blocks, log_run, whole, unused;  // run: chunks of a piece, 1 or kGroupChunks; whole: a run is all that any row sees
};

struct alignas(16) Block {
  int begin, rows, request, chunks_before;
  int prefix, shortest, longest, nodes;  // prefix: the greatest; shortest, longest: len; nodes: the slots from prefix on that may hold them
  int settled;                  // positions that no row of the request has added (params.h)
  int wanted;                   // with ancestors: of the first 32 nodes, those on any row's path
  int groups_before;
  int units_before;             // units of work: tiles, and one more where rows have keys of their own

  __device__ int pieces(int log_run) const { return (longest + (kChunk << log_run) - 1) / kChunk >> log_run; }
  __device__ int units(bool has_paths) const { return (longest + kTile - 1) / kTile + (has_paths && longest > prefix); }
};

// What a CTA does: so many neighbouring jobs, pieces of one block and KV head, then of the next KV head, then of the next block; from this one on.
struct alignas(16) PlanShare {
  int jobs, index, kv_head, piece;
  Block block;  // number `index`
};

static_assert(sizeof(PlanHeader) == 4 * kPlanHeader && sizeof(PlanShare) == 4 * kPlanShare && sizeof(Block) == 4 * kPlanBlock && kGroupChunks == 8, "params.h");

// CTAs of tree attention that run at once.
inline int most_ctas(const TreeShape& shape) {
  const int most = multiprocessors() * shape.blocks_per_sm;
  return most < kMostShares ? most : kMostShares;
}

// The most jobs that the capacities can hold, and no more CTAs than there is room for.
inline unsigned tree_ctas(const AttentionParams& p, const TreeShape& shape) {
  const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, jobs = p.rows * p.kv_heads * (chunks > 1 ? chunks : 1);
  const int slots = most_ctas(shape);
  return static_cast<unsigned>(jobs < slots ? jobs : slots);
}

// A plan in memory: the header, the shares, a place for a block a row, the rows' len. Read from L2: what an SM holds of it may be of another pass.
__device__ __forceinline__ PlanHeader plan_header(const int32_t* plan) {
  const int4 x = __ldcg(reinterpret_cast<const int4*>(plan));
  return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ Block plan_block_at(const int4* from) {
  const int4 a = __ldcg(from), b = __ldcg(from + 1), c = __ldcg(from + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}
__device__ __forceinline__ Block plan_block(const int32_t* plan, int index) {
  return plan_block_at(reinterpret_cast<const int4*>(plan + kPlanHeader + kPlanShare * kMostShares + index * kPlanBlock));
}
__device__ __forceinline__ int plan_len(const int32_t* plan, int rows, int row) { return __ldcg(plan + kPlanHeader + kPlanShare * kMostShares + kPlanBlock * rows + row); }
__device__ __forceinline__ PlanShare plan_share(const int32_t* plan, int cta) {
  const int4* from = reinterpret_cast<const int4*>(plan + kPlanHeader + cta * kPlanShare);
  const int4 x = __ldcg(from);
  return {x.x, x.y, x.z, x.w, plan_block_at(from + 1)};
}

// Of rows that are few (decode.cu).
void launch_decode_attention(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream);

}  // namespace specrt
