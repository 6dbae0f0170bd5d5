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
  int prefix, shortest, longest, unused;  // prefix: the greatest; shortest, longest: len

  __device__ int pieces(int run) const { return (longest + run * kChunk - 1) / (run * kChunk); }
};

static_assert(sizeof(PlanHeader) == 4 * kPlanHeader && sizeof(Block) == 4 * kPlanBlock, "params.h");

// A plan in memory: the header, then a block for each row at most.
__device__ __forceinline__ const PlanHeader& plan_header(const int32_t* plan) { return *reinterpret_cast<const PlanHeader*>(plan); }
__device__ __forceinline__ const Block* plan_blocks(const int32_t* plan) { return reinterpret_cast<const Block*>(plan + kPlanHeader); }

// The block of a piece. By a whole warp.
__device__ __forceinline__ Block block_of(const int32_t* plan, const PlanHeader& header, int piece, int lane) {
  int4 low{}, high{};
  for (int base = 0;; base += 32) {
    const int i = base + lane;
    const bool there = i < header.blocks;
    if (there) {
      const int4* at = reinterpret_cast<const int4*>(plan_blocks(plan) + i);
      low = at[0];
      high = at[1];
    }
    const unsigned before = __ballot_sync(~0u, there && low.w <= piece);
    if (before == ~0u && base + 32 < header.blocks && plan_blocks(plan)[base + 32].pieces_before <= piece) continue;
    const int from = 31 - __clz(static_cast<int>(before));
    auto get = [&](int x) { return __shfl_sync(~0u, x, from); };
    return {get(low.x), get(low.y), get(low.z), get(low.w), get(high.x), get(high.y), get(high.z), 0};
  }
}

}  // namespace specrt
