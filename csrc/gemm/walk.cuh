// How the linear kernels on warpgroup tensor cores go through their work: which tiles a cluster takes, and the producer's way through their steps of K.
#pragma once
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"

namespace specrt {

// Tiles are blocks of rows for each group of outputs, group by group: tile t is block t % blocks of group t / blocks. A cluster takes first, first + step, ... below end.
struct Walk {
  int first, end, step, blocks;
};

// Which of the `capacity` blocks have rows is known after the wait for the kernel before, and weights come earlier: so cluster c begins at block c % capacity of group c / capacity. Of the
// tiles of the blocks that are `in_use`, those clusters have some of the first `clusters`; clusters whose block has no rows take the others, from the last on. Then all go on as if there
// were no more blocks, and have the same number of tiles but for one.
__device__ __forceinline__ Walk walk_of_rows(int cluster, int clusters, int groups, int capacity, int in_use) {
  const int group = cluster / capacity, block = cluster % capacity;
  return {block < in_use ? group * in_use + block : clusters - 1 - cluster + (group + 1) * in_use, groups * in_use, clusters, in_use};
}

// A ring of stages, as one that fills or empties them goes round; parity: of the stage's barriers.
struct Ring {
  int stage, parity;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The producer's way, by one thread that has waited for the kernel before: the `steps` steps of each tile into one stage after the other, but for the first `ahead`, which are on their way.
// copies(tile) makes what brings a step of it: f(step, stage). kShared: another CTA of the cluster arrives at this one's barriers, so its last arrivals must come before this CTA ends.
// The next kernel may start when the last loads are on their way: earlier, it would only hold registers and shared memory.
template <bool kShared, typename Copies>
__device__ __forceinline__ void produce(const Walk& walk, int ahead, int steps, uint32_t empty, int stages, Copies&& copies) {
  Ring ring{ahead == stages ? 0 : ahead, ahead == stages ? 0 : 1};  // `empty` counts as complete the first time round
  int step = ahead;
  for (int tile = walk.first; tile < walk.end; tile += walk.step, step = 0) {
    const auto copy = copies(tile);
    const int start = tile + walk.step >= walk.end ? max(step, steps - stages) : -1;
    if (start == steps) ptx::launch_dependents();  // all are on their way
#pragma unroll 1
    for (; step < steps; ++step) {
      if (step == start) ptx::launch_dependents();
      ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity);
      copy(step, ring.stage);
      ring.advance(stages);
    }
  }
  if (kShared)
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity);
      ring.advance(stages);
    }
}

}  // namespace specrt
