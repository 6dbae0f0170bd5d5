#include <algorithm>

#include "base/parallel.h"
#include "tree/rules.h"

namespace specrt {
namespace {

// The W best keys seen, descending, ties by lower index (the order in which they come).
struct Best {
  explicit Best(int width_) : width(width_) {}
  const int width;
  int count = 0;
  uint32_t key[kMaxNodes];
  int32_t index[kMaxNodes];

  void add(uint32_t k, int i) {
    if (count == width && k <= key[width - 1]) return;
    int at = count < width ? count++ : width - 1;
    for (; at > 0 && key[at - 1] < k; --at) {
      key[at] = key[at - 1];
      index[at] = index[at - 1];
    }
    key[at] = k;
    index[at] = i;
  }
};

// The row of beam entry w for the next level; row0: its slot's first row in this one. The path needs no state: a candidate's index says which beam entry of the level above it hangs from.
void write_row(const TreeExpandParams& p, int b, int w, int row0, int row) {
  const int64_t base = static_cast<int64_t>(b) * p.candidates;
  const int first = p.seq_lens[b] + 1;
  int candidate = p.beam[static_cast<int64_t>(b) * p.beam_width + w];
  p.row_request[row] = b;
  p.row_token[row] = p.cand_token[base + candidate];
  p.row_position[row] = p.seq_lens[b] + p.level;
  p.row_prefix[row] = first;
  p.row_slot[row] = kv_slot(p.paging, b, first + (p.level - 1) * p.beam_width + w);
  p.row_parent[row] = std::min(row0 + (candidate - first_candidate(p.level, p.beam_width, p.topk)) / p.topk, p.rows - 1);
  int32_t* path = p.row_path + static_cast<int64_t>(row) * p.path_depth;
  std::fill(path + p.level, path + p.path_depth, -1);
  path[p.level - 1] = (p.level - 1) * p.beam_width + w;
  for (int level = p.level; level > 1; --level) {
    const int entry = (candidate - first_candidate(level, p.beam_width, p.topk)) / p.topk;
    path[level - 2] = (level - 2) * p.beam_width + entry;
    candidate = p.cand_parent[base + candidate];
  }
}

SPECRT_CLONES int count_at_least(const uint32_t* keys, int n, uint32_t bound) {
  int count = 0;
  for (int i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

void select(const TreeSelectParams& p, int b) {
  const int budget = std::min(p.max_nodes[b], p.nodes - 1);
  if (p.max_nodes[b] <= 0) return;
  const int n = first_candidate(clamp_to(p.max_depth[b], 0, p.levels) + 1, p.beam_width, p.topk);
  const int64_t base = static_cast<int64_t>(b) * p.candidates, out = static_cast<int64_t>(b) * p.nodes;
  uint32_t keys[kMaxCandidates];
  for (int i = 0; i < n; ++i) {  // a parent's key is final before its children's
    const int parent = candidate_before(p.cand_parent[base + i], i);
    keys[i] = score_key(p.cand_score[base + i]);
    if (parent >= 0) keys[i] = std::min(keys[i], keys[parent]);
  }
  // The budget-th highest key, or any bound that leaves just as many, bit by bit; then the keys above it, and as many equal to it as there is room for, lowest index first.
  uint32_t bound = 0;
  int at_least = n;
  for (int bit = 31; bit >= 0 && at_least > budget; --bit) {
    const int count = count_at_least(keys, n, bound | 1u << bit);
    if (count >= budget) bound |= 1u << bit, at_least = count;
  }
  int ties = budget - (bound == ~0u ? 0 : count_at_least(keys, n, bound + 1)), size = 1;
  int16_t node_of[kMaxCandidates];
  for (int i = 0; i < n; ++i) {
    const bool taken = keys[i] > bound || (keys[i] == bound && bound > 0 && ties-- > 0);
    if (!taken) continue;
    const int parent = candidate_before(p.cand_parent[base + i], i);
    node_of[i] = static_cast<int16_t>(size);
    p.tree_token[out + size] = p.cand_token[base + i];
    p.tree_parent[out + size] = parent >= 0 ? node_of[parent] : 0;
    ++size;
  }
  p.tree_size[b] = size;
}

}  // namespace

void launch_draft_limits_cpu(const DraftLimitsParams& p) {
  for (int b = 0; b < p.batch; ++b) limit_slot(p, b);
}

void launch_tree_expand_cpu(const TreeExpandParams& p) {
  const int first = first_candidate(p.level, p.beam_width, p.topk), sources = p.level == 1 ? 1 : p.beam_width;
  int active = 0, row = 0;
  for (int b = 0; b < p.batch; ++b) {
    if (p.max_depth[b] < p.level) continue;
    const int64_t base = static_cast<int64_t>(b) * p.candidates;
    const int row0 = p.level == 1 ? b : p.beam_width * active++;
    int32_t* beam = p.beam + static_cast<int64_t>(b) * p.beam_width;
    Best best(p.beam_width);
    int candidate = first;
    for (int w = 0; w < sources; ++w) {
      const int parent = p.level == 1 ? -1 : beam[w];
      const bool known = row0 + w < p.rows;
      for (int j = 0; j < p.topk; ++j, ++candidate) {
        const int64_t child = static_cast<int64_t>(row0 + w) * p.topk + j;
        float score = known ? child_score(p, child) : kNoScore;
        if (parent >= 0) score = p.cand_score[base + parent] + score;
        const uint32_t key = score_key(score);
        p.cand_token[base + candidate] = known ? p.topk_token[child] : -1;
        p.cand_parent[base + candidate] = parent;
        p.cand_score[base + candidate] = key ? score : kNoScore;
        best.add(key, candidate);
      }
    }
    std::copy(best.index, best.index + p.beam_width, beam);
    if (p.max_depth[b] <= p.level) continue;
    for (int w = 0; w < p.beam_width; ++w) write_row(p, b, w, row0, row++);
  }
  *p.num_rows = row;
}

void launch_tree_select_cpu(const TreeSelectParams& p) {
  for (int b = 0; b < p.batch; ++b) select(p, b);
}

}  // namespace specrt
