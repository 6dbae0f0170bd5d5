// The walk down the tree and the commit of its tokens: a warp a slot, two nodes a lane.
#include "base/launch.h"
#include "base/noise.h"
#include "ptx/dependency.cuh"
#include "tree/block.cuh"
#include "tree/rules.h"

namespace specrt {
namespace {

constexpr int kWarps = 4;  // slots a block

// A slot's nodes in the lanes of a warp: lane i has nodes i and i + 32.
struct WarpTree {
  int size, lane, token[2], parent[2];

  __device__ WarpTree(const AcceptWalkParams& p, int b) : size(tree_nodes(p.tree_size, b, p.nodes)), lane(threadIdx.x % 32) {
    const int64_t base = static_cast<int64_t>(b) * p.nodes;
    for (int half = 0; half < 2; ++half) {
      const int node = lane + 32 * half;
      token[half] = node < size ? p.tree_token[base + node] : 0;
      parent[half] = node < size ? p.tree_parent[base + node] : -1;
    }
  }

  // The first child of `node`, with token `wanted` unless `any`; -1 where there is none.
  __device__ int child(int node, bool any, int wanted) const {
    for (int half = 0; half < 2; ++half) {
      const int mine = lane + 32 * half;
      const unsigned hit = __ballot_sync(kFullWarp, mine > node && mine < size && parent[half] == node && (any || token[half] == wanted));
      if (hit) return 32 * half + __ffs(hit) - 1;
    }
    return -1;
  }

  __device__ int token_of(int node) const {
    const int low = __shfl_sync(kFullWarp, token[0], node % 32), high = __shfl_sync(kFullWarp, token[1], node % 32);
    return node < 32 ? low : high;
  }
};

// choose(tree, node, visited, target): the child to move to, or -1. See accept_cpu.cpp.
template <typename Choose> __device__ void walk(const AcceptWalkParams& p, int b, Choose&& choose) {
  const WarpTree tree(p, b);
  const int64_t base = static_cast<int64_t>(b) * p.nodes;
  int visited = 0, error = 0, node = tree.size > 0 ? 0 : -1;
  while (node >= 0) {
    const int row = p.row_offset[b] + node;
    error = p.row_status[row];
    if (error) break;
    const int target = p.row_target[row], child = choose(tree, node, visited + 1, target);
    const int token = child >= 0 ? tree.token_of(child) : target;
    if (tree.lane == 0) {
      p.path[base + visited] = node;
      p.emitted[base + visited] = token;
    }
    ++visited;
    node = child;
  }
  if (tree.lane == 0) {
    p.path_len[b] = visited;
    p.error[b] = error;
  }
}

__global__ void accept_walk_kernel(AcceptWalkParams p) {
  const int b = blockIdx.x * kWarps + threadIdx.x / 32;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (b >= p.batch) return;
  walk(p, b, [](const WarpTree& tree, int node, int, int target) { return tree.child(node, false, target); });
}

__global__ void accept_synthetic_kernel(AcceptSyntheticParams p) {
  const int b = blockIdx.x * kWarps + threadIdx.x / 32;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (b >= p.tree.batch) return;
  const int most = p.whole + (uniform(p.seeds[b], p.seq_lens[b] + 1, 0, kNoiseAccept) < p.fraction ? 1 : 0);
  walk(p.tree, b, [most](const WarpTree& tree, int node, int visited, int) { return visited < most ? tree.child(node, true, 0) : -1; });
}

__global__ void round_advance_kernel(RoundAdvanceParams p) {
  const int b = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (b >= p.batch) return;
  const int count = clamp_to(p.path_len[b], 0, p.nodes), len = p.seq_lens[b];
  __syncwarp();  // every lane has read the length
  for (int i = lane; i < count; i += 32) {
    const int token = p.emitted[static_cast<int64_t>(b) * p.nodes + i];
    if (len + 1 + i < p.max_len) p.history[static_cast<int64_t>(b) * p.max_len + len + 1 + i] = token;
    if (token >= 0 && token < p.vocab) atomicAdd(&p.output_count[static_cast<int64_t>(b) * p.vocab + token], 1);  // one token twice in a block
  }
  if (lane > 0) return;
  if (count > 0) p.tree_token[static_cast<int64_t>(b) * p.nodes] = p.emitted[static_cast<int64_t>(b) * p.nodes + count - 1];
  p.seq_lens[b] = len + count;
  if (len + count >= p.limit[b]) p.active[b] = 0;
}

Launch over_slots(int batch, void* stream) {
  return {dim3((batch + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, static_cast<cudaStream_t>(stream), 1, true};
}

}  // namespace

void launch_accept_walk_cuda(const AcceptWalkParams& p, void* stream) {
  launch(over_slots(p.batch, stream), accept_walk_kernel, p);
}

void launch_accept_synthetic_cuda(const AcceptSyntheticParams& p, void* stream) {
  launch(over_slots(p.tree.batch, stream), accept_synthetic_kernel, p);
}

void launch_round_advance_cuda(const RoundAdvanceParams& p, void* stream) {
  launch(over_slots(p.batch, stream), round_advance_kernel, p);
}

}  // namespace specrt
