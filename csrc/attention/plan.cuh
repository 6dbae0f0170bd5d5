// The plan of tree attention: made once a forward pass on the device, read by every layer. Nothing in it can change a bit.
//
// Rows are cut in blocks: consecutive rows of one request (of one prefix, where rows have paths), as many as the kernel has vectors for. A job is a block, a KV head and a
// run of chunks of positions: single chunks while there are CTAs without work, else whole groups, which fold where they are.
#pragma once
#include "attention/row.cuh"

namespace specrt {

struct PlanHeader {
  int blocks, pieces, run, unused;  // pieces: runs of all blocks; run: chunks of a piece, 1 or kGroupChunks
};

struct alignas(16) Block {
  int begin, rows, request, pieces_before;
  int prefix, shortest, longest, nodes;  // prefix: the greatest; shortest, longest: len; nodes: with ancestors, the slots from prefix on that hold them
  int settled;                  // positions that no row of the request has added (params.h)
  int wanted_low, wanted_high;  // with ancestors: the nodes on any row's path, a word in two

  __device__ int pieces(int run) const { return (longest + run * kChunk - 1) / (run * kChunk); }
};

static_assert(sizeof(PlanHeader) == 4 * kPlanHeader && sizeof(Block) == 4 * kPlanBlock, "params.h");

// A plan in memory: the header, then a block for each row at most. Read from L2: what an SM holds of it may be of another pass.
__device__ __forceinline__ PlanHeader plan_header(const int32_t* plan) {
  const int4 x = __ldcg(reinterpret_cast<const int4*>(plan));
  return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ Block plan_block(const int32_t* plan, int index) {
  const int4* from = reinterpret_cast<const int4*>(plan + kPlanHeader + index * kPlanBlock);
  const int4 a = __ldcg(from), b = __ldcg(from + 1), c = __ldcg(from + 2);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z};
}

// The block that has a piece; pieces ascend from call to call.
struct BlockCursor {
  const int32_t* plan;
  int run, index = 0;
  Block block;

  // mine: block number `lane`, as read together with the header.
  __device__ BlockCursor(const int32_t* plan_, const PlanHeader& header, const Block& mine, int piece, int lane) : plan(plan_), run(header.run) {
    const unsigned before = __ballot_sync(~0u, lane < header.blocks && mine.pieces_before <= piece);
    index = max(0, 31 - __clz(static_cast<int>(before)));
    auto get = [&](int x) { return __shfl_sync(~0u, x, index); };
    block = {get(mine.begin), get(mine.rows), get(mine.request), get(mine.pieces_before), get(mine.prefix), get(mine.shortest), get(mine.longest), get(mine.nodes), get(mine.settled),
             get(mine.wanted_low), get(mine.wanted_high)};
    for (int base = 32; base < header.blocks && index == base - 1; base += 32) {  // perhaps further on
      const int i = base + lane;
      const unsigned more = __ballot_sync(~0u, i < header.blocks && __ldcg(plan + kPlanHeader + i * kPlanBlock + 3) <= piece);
      if (more) block = plan_block(plan, index = base + 31 - __clz(static_cast<int>(more)));
    }
  }

  __device__ void advance(int piece) {
    while (piece >= block.pieces_before + block.pieces(run)) block = plan_block(plan, ++index);
  }
};

}  // namespace specrt
