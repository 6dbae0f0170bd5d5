// A level of a drafter's tree expansion, and the re-ranking at its end; the meaning is in expansion_cpu.cpp. A block a slot, the slot's keys in shared
// memory. Bytes: some words a candidate.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "tree/block.cuh"
#include "tree/rules.h"

namespace specrt {
namespace {

constexpr int kExpandThreads = 256, kSelectThreads = 1024, kWords = kMaxCandidates / 32;

__global__ void draft_limits_kernel(DraftLimitsParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  for (int b = threadIdx.x; b < p.batch; b += blockDim.x) limit_slot(p, b);
}

__global__ void __launch_bounds__(kExpandThreads) tree_expand_kernel(TreeExpandParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int b = blockIdx.x, width = p.beam_width, k = p.topk;
  const int first = first_candidate(p.level, width, k), n = p.level == 1 ? k : width * k;
  const int before = block_sum(b, [&](int i) { return (p.max_depth[i] >= p.level) + (p.max_depth[i] > p.level) * 0x10000; });  // slots in the level, and in the next one
  const int active_before = before % 0x10000, rows_before = width * (before / 0x10000);
  const int depth = p.max_depth[b], prefix = p.seq_lens[b] + 1;
  if (b == p.batch - 1 && threadIdx.x == 0) *p.num_rows = rows_before + (depth > p.level ? width : 0);
  if (depth < p.level) return;

  __shared__ uint32_t keys[kMaxCandidates];
  __shared__ int32_t parents[kMaxCandidates];  // of all candidates so far: a path is a walk up, and memory is far
  const int64_t base = static_cast<int64_t>(b) * p.candidates;
  for (int i = threadIdx.x; i < first; i += kExpandThreads) parents[i] = p.cand_parent[base + i];
  const int row0 = p.level == 1 ? b : width * active_before;
  int32_t* beam = p.beam + static_cast<int64_t>(b) * width;
  for (int i = threadIdx.x; i < n; i += kExpandThreads) {
    const int parent = p.level == 1 ? -1 : beam[i / k];
    const int64_t child = static_cast<int64_t>(row0) * k + i;
    const bool known = row0 + i / k < p.rows;
    float score = known ? child_score(p, child) : kNoScore;
    if (parent >= 0) score = p.cand_score[base + parent] + score;
    keys[i] = score_key(score);
    p.cand_token[base + first + i] = known ? p.topk_token[child] : -1;
    p.cand_parent[base + first + i] = parents[first + i] = parent;
    p.cand_score[base + first + i] = keys[i] ? score : kNoScore;
  }
  __syncthreads();  // all keys and parents are there, and nobody reads the old beam any more
  for (int i = threadIdx.x; i < n; i += kExpandThreads) {
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += keys[j] > keys[i] || (j < i && keys[j] == keys[i]);
    if (rank >= width) continue;
    beam[rank] = first + i;
    if (depth <= p.level) continue;
    const int row = rows_before + rank;
    p.row_request[row] = b;
    p.row_token[row] = p.cand_token[base + first + i];  // this thread's
    p.row_position[row] = prefix - 1 + p.level;
    p.row_prefix[row] = prefix;
    p.row_slot[row] = kv_slot(p.paging, b, prefix + (p.level - 1) * width + rank);
    p.row_parent[row] = min(row0 + i / k, p.rows - 1);
    int32_t* path = p.row_path + static_cast<int64_t>(row) * p.path_depth;
    for (int d = p.level; d < p.path_depth; ++d) path[d] = -1;
    path[p.level - 1] = (p.level - 1) * width + rank;
    for (int level = p.level, candidate = first + i; level > 1; --level) {
      path[level - 2] = (level - 2) * width + (candidate - first_candidate(level, width, k)) / k;
      candidate = parents[candidate];
    }
  }
}

// How many set bits of `words` stand before bit i.
__device__ __forceinline__ int bits_before(const unsigned* words, int i) {
  int count = __popc(words[i / 32] & ((1u << i % 32) - 1));
  for (int w = 0; w < i / 32; ++w) count += __popc(words[w]);
  return count;
}

__global__ void __launch_bounds__(kSelectThreads) tree_select_kernel(TreeSelectParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int b = blockIdx.x;
  if (p.max_nodes[b] <= 0) return;
  const int budget = min(p.max_nodes[b], p.nodes - 1);
  const int n = first_candidate(clamp_to(p.max_depth[b], 0, p.levels) + 1, p.beam_width, p.topk);
  const int64_t base = static_cast<int64_t>(b) * p.candidates, out = static_cast<int64_t>(b) * p.nodes;
  __shared__ uint32_t own[kMaxCandidates], keys[kMaxCandidates];  // of a candidate by itself; the least on its path
  __shared__ int16_t parents[kMaxCandidates];
  __shared__ unsigned above[kWords], equal[kWords];
  for (int i = threadIdx.x; i < n; i += kSelectThreads) {
    own[i] = score_key(p.cand_score[base + i]);
    parents[i] = static_cast<int16_t>(candidate_before(p.cand_parent[base + i], i));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kSelectThreads) {
    uint32_t key = own[i];
    for (int up = parents[i]; up >= 0; up = parents[up]) key = min(key, own[up]);
    keys[i] = key;  // read back by this thread only, until the words below are there
  }
  // The budget-th highest key, or any bound that leaves just as many, bit by bit.
  uint32_t bound = 0;
  for (int bit = 31, at_least = n; bit >= 0 && at_least > budget; --bit) {
    const uint32_t trial = bound | 1u << bit;
    int count = 0;
    for (int i0 = 0; i0 < n; i0 += kSelectThreads) {
      const int i = i0 + threadIdx.x;
      count += __syncthreads_count(i < n && keys[i] >= trial);
    }
    if (count >= budget) {
      bound = trial;
      at_least = count;
    }
  }
  int taken_above = 0, tied = 0;
  for (int i0 = 0; i0 < n; i0 += kSelectThreads) {
    const int i = i0 + threadIdx.x;
    const bool more = i < n && keys[i] > bound, tie = i < n && keys[i] == bound && bound > 0;
    const unsigned more_bits = __ballot_sync(kFullWarp, more), tie_bits = __ballot_sync(kFullWarp, tie);
    if (i % 32 == 0 && i < n) {
      above[i / 32] = more_bits;
      equal[i / 32] = tie_bits;
    }
    taken_above += __syncthreads_count(more);
    tied += __syncthreads_count(tie);
  }
  const int room = budget - taken_above;  // for ties, lowest index first
  auto node_of = [&](int i) { return 1 + bits_before(above, i) + min(bits_before(equal, i), room); };
  for (int i = threadIdx.x; i < n; i += kSelectThreads) {
    const bool taken = keys[i] > bound || (keys[i] == bound && bound > 0 && bits_before(equal, i) < room);
    if (!taken) continue;
    const int node = node_of(i), parent = parents[i];
    p.tree_token[out + node] = p.cand_token[base + i];
    p.tree_parent[out + node] = parent >= 0 ? node_of(parent) : 0;
  }
  if (threadIdx.x == 0) p.tree_size[b] = 1 + taken_above + min(tied, room);
}

}  // namespace

void launch_draft_limits_cuda(const DraftLimitsParams& p, void* stream) {
  launch({dim3(1), dim3(128), 0, static_cast<cudaStream_t>(stream), 1, true}, draft_limits_kernel, p);
}

void launch_tree_expand_cuda(const TreeExpandParams& p, void* stream) {
  launch({dim3(p.batch), dim3(kExpandThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, tree_expand_kernel, p);
}

void launch_tree_select_cuda(const TreeSelectParams& p, void* stream) {
  launch({dim3(p.batch), dim3(kSelectThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, tree_select_kernel, p);
}

}  // namespace specrt
