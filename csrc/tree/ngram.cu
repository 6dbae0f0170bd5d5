// Prompt lookup; the method and the order of the scores are in ngram_cpu.cpp. A block a slot: all warps scan the history, each keeping its 32 best
// occurrences sorted across its lanes; the lists are merged, and one warp grows the tree with an occurrence a lane. Bytes: 4 a known token.
#include "base/launch.h"
#include "base/noise.h"
#include "ptx/dependency.cuh"
#include "tree/block.cuh"
#include "tree/rules.h"

namespace specrt {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kUnroll = 4;
constexpr uint64_t kNone = ~uint64_t{0};

// An occurrence as a key, the best lowest: (max_n - tokens matched, position of its last token).
__device__ __forceinline__ uint64_t occurrence_key(const int32_t* history, int known, int end, int min_n, int max_n) {
  int n = 1;
  while (n < max_n && n <= end && history[end - n] == history[known - 1 - n]) ++n;
  return n < min_n ? kNone : static_cast<uint64_t>(max_n - n) << 32 | static_cast<uint32_t>(end);
}

// One stage of a bitonic network across the warp: the lower of the two lanes keeps the smaller key if `up`.
__device__ __forceinline__ uint64_t exchange(uint64_t key, int lane, int distance, bool up) {
  const uint64_t other = __shfl_xor_sync(kFullWarp, key, distance);
  return ((lane & distance) == 0) == up ? min(key, other) : max(key, other);
}

__device__ uint64_t sort_warp(uint64_t key, int lane) {
  for (int size = 2; size <= 32; size *= 2)
    for (int d = size / 2; d; d /= 2) key = exchange(key, lane, d, (lane & size) == 0);
  return key;
}

// The 32 smallest of two ascending lists, ascending.
__device__ uint64_t merge_warp(uint64_t a, uint64_t b, int lane) {
  uint64_t key = min(a, __shfl_sync(kFullWarp, b, 31 - lane));
  for (int d = 16; d; d /= 2) key = exchange(key, lane, d, true);
  return key;
}

// The best occurrences, ascending by key over the lanes of warp 0 (other warps: garbage). All threads call it.
__device__ uint64_t find_occurrences(const NgramProposeParams& p, const int32_t* history, int known) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t last = history[known - 1];
  uint64_t best = kNone;
  for (int base = warp * 32 * kUnroll; base < known - 1; base += kThreads * kUnroll) {
    bool hit[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int end = base + u * 32 + lane;
      hit[u] = end < known - 1 && history[end] == last;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint64_t key = hit[u] ? occurrence_key(history, known, base + u * 32 + lane, p.min_n, p.max_n) : kNone;
      const uint64_t worst = __shfl_sync(kFullWarp, best, 31);
      if (__any_sync(kFullWarp, key < worst)) best = merge_warp(best, sort_warp(key, lane), lane);
    }
    if (__shfl_sync(kFullWarp, best, 31) >> 32 == 0) break;  // 32 full matches, and this warp's positions only grow
  }
  __shared__ uint64_t lists[kWarps][32];
  lists[warp][lane] = best;
  __syncthreads();
  for (int half = kWarps / 2; half; half /= 2) {
    if (warp < half) lists[warp][lane] = best = merge_warp(best, lists[warp + half][lane], lane);
    __syncthreads();
  }
  return best;
}

// The lane's entry of the frontier: a node that waits to be taken, whose lowest occurrence is the lane's.
struct Frontier {
  bool waiting = false;
  unsigned occurrences = 0;
  float score = 0.0f;  // cumulative
  int depth = 0, parent = 0, token = 0;
};

struct Lookup {
  const NgramProposeParams& p;
  const int b, lane;
  const int32_t* next;  // the continuation of the lane's occurrence,
  const int length;     // and how much of it is known and allowed
  const bool sampled;

  // Puts the children of a node (arguments alike in all lanes), which is number `index` of the tree, on the frontier.
  __device__ void split(unsigned occurrences, float parent_score, int depth, int index, Frontier& mine) const {
    const bool member = (occurrences >> lane & 1) && length > depth;
    const int token = member ? next[depth] : 0;
    const unsigned members = __ballot_sync(kFullWarp, member);
    const unsigned same = __match_any_sync(kFullWarp, member ? static_cast<uint64_t>(static_cast<uint32_t>(token)) : uint64_t{1} << 32 | lane);
    const bool leader = member && lane == __ffs(same) - 1;
    const unsigned leaders = __ballot_sync(kFullWarp, leader);
    float x = kNoScore;
    if (leader) {
      x = log_rn(static_cast<float>(__popc(same)) / static_cast<float>(__popc(members)));
      if (sampled) x = x + gumbel_noise(p.seeds[b], p.seq_lens[b] + depth + 1, token, kNoiseShared);
    }
    const uint32_t key = score_key(x);
    float most = kNoScore;
    int rank = 0;
    for (unsigned all = leaders; all; all &= all - 1) {
      const int i = __ffs(all) - 1;
      const float other = __shfl_sync(kFullWarp, x, i);
      const uint32_t other_key = score_key(other);
      most = other > most ? other : most;
      rank += other_key > key || (i < lane && other_key == key);
    }
    float score = x;
    if (sampled) {
      const float mass = leader ? exp_rn(x - most) : 0.0f;
      float sum = 0.0f;
      for (unsigned all = leaders; all; all &= all - 1) sum = sum + __shfl_sync(kFullWarp, mass, __ffs(all) - 1);
      const float normal = x - (most + log_rn(sum));
      if (key) score = normal < 0.0f ? normal : 0.0f;
    }
    if (leader && rank < p.branches) mine = {true, same, parent_score + score, depth + 1, index, token};
  }
};

__global__ void __launch_bounds__(kThreads, 1) ngram_propose_kernel(NgramProposeParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int b = blockIdx.x, lane = threadIdx.x % 32;
  if (p.max_nodes[b] <= 0) return;
  const int budget = min(p.max_nodes[b], p.nodes - 1), max_depth = min(p.max_depth[b], budget), known = min(p.seq_lens[b] + 1, p.max_len);
  const int32_t* history = p.history + static_cast<int64_t>(b) * p.max_len;
  const bool sampled = p.sampling_f[b * 6] > 0.0f;
  uint64_t occurrence = max_depth > 0 && known > 0 ? find_occurrences(p, history, known) : kNone;
  if (threadIdx.x >= 32) return;
  if (p.branches == 1 && !sampled && lane > 0) occurrence = kNone;
  const bool found = occurrence != kNone;
  const int end = found ? static_cast<int>(static_cast<uint32_t>(occurrence)) : 0;
  const Lookup lookup{p, b, lane, history + end + 1, found ? min(known - 1 - end, max_depth) : 0, sampled};
  Frontier mine;
  lookup.split(__ballot_sync(kFullWarp, found), 0.0f, 0, 0, mine);
  int size = 1;
  for (; size <= budget; ++size) {
    const unsigned waiting = __ballot_sync(kFullWarp, mine.waiting);
    if (!waiting) break;
    const uint32_t key = mine.waiting ? score_key(mine.score) : 0;
    uint32_t top = key;
    for (int d = 16; d; d >>= 1) top = max(top, __shfl_xor_sync(kFullWarp, top, d));
    const int best = __ffs(__ballot_sync(kFullWarp, mine.waiting && key == top)) - 1;
    if (lane == best) {
      const int64_t at = static_cast<int64_t>(b) * p.nodes + size;
      p.tree_token[at] = mine.token;
      p.tree_parent[at] = mine.parent;
      mine.waiting = false;
    }
    lookup.split(__shfl_sync(kFullWarp, mine.occurrences, best), __shfl_sync(kFullWarp, mine.score, best), __shfl_sync(kFullWarp, mine.depth, best), size, mine);
  }
  if (lane == 0) p.tree_size[b] = size;
}

}  // namespace

void launch_ngram_propose_cuda(const NgramProposeParams& p, void* stream) {
  launch({dim3(p.batch), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, ngram_propose_kernel, p);
}

}  // namespace specrt
