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

  __device__ int pieces(int run) const { return (longest + run * kChunk - 1) / (run * kChunk); }
};

static_assert(sizeof(PlanHeader) == 4 * kPlanHeader && sizeof(Block) == 4 * kPlanBlock, "params.h");

// A plan in memory: the header, then a block for each row at most.
__device__ __forceinline__ const PlanHeader& plan_header(const int32_t* plan) { return *reinterpret_cast<const PlanHeader*>(plan); }
__device__ __forceinline__ const Block* plan_blocks(const int32_t* plan) { return reinterpret_cast<const Block*>(plan + kPlanHeader); }

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
    block = {get(mine.begin), get(mine.rows), get(mine.request), get(mine.pieces_before), get(mine.prefix), get(mine.shortest), get(mine.longest), get(mine.nodes)};
    for (int base = 32; base < header.blocks && index == base - 1; base += 32) {  // perhaps further on
      const int i = base + lane;
      const unsigned more = __ballot_sync(~0u, i < header.blocks && plan_blocks(plan)[i].pieces_before <= piece);
      if (more) block = plan_blocks(plan)[index = base + 31 - __clz(static_cast<int>(more))];
    }
  }

  __device__ void advance(int piece) {
    while (piece >= block.pieces_before + block.pieces(run)) block = plan_blocks(plan)[++index];
  }
};

}  // namespace specrt
