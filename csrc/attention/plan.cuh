// The plan of tree attention: made once a forward pass on the device, read by every layer. Nothing in it can change a bit.
//
// Rows are cut in blocks: consecutive rows of one request (of one prefix, where rows have paths), as many as the kernel has vectors for.
#pragma once
#include "attention/row.cuh"

namespace specrt {

struct PlanHeader {
  int blocks, unused[3];
};

struct alignas(16) Block {
  int begin, rows, request, unused;
  int prefix, shortest, longest, nodes;  // prefix: the greatest; shortest, longest: len; nodes: with ancestors, the slots from prefix on that hold them
};

static_assert(sizeof(PlanHeader) == 4 * kPlanHeader && sizeof(Block) == 4 * kPlanBlock, "params.h");

// A plan in memory: the header, then a block for each row at most.
__device__ __forceinline__ Block* plan_blocks(int32_t* plan) { return reinterpret_cast<Block*>(plan + kPlanHeader); }

// Block number `index` of a plan, from L2: what this SM holds may be of another pass.
__device__ __forceinline__ Block read_block(const int32_t* plan, int index) {
  const int4* at = reinterpret_cast<const int4*>(plan + kPlanHeader + index * kPlanBlock);
  const int4 a = __ldcg(at), b = __ldcg(at + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

}  // namespace specrt
