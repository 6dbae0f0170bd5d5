// The small rules that both backends share, a scalar function each.
#pragma once
#include "base/math.h"
#include "tree/params.h"

namespace specrt {

constexpr float kNoScore = -__builtin_huge_valf();

SPECRT_HD int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Nodes of slot b's tree.
SPECRT_HD int tree_nodes(const int32_t* tree_size, int b, int nodes) { return clamp_to(tree_size[b], 0, nodes); }

SPECRT_HD int active_nodes(const TreeBuildParams& p, int b) { return p.active[b] ? tree_nodes(p.tree_size, b, p.nodes) : 0; }

// The parent of a node > 0. Topological order is the caller's promise; the clamp makes every walk to the root end all the same.
SPECRT_HD int parent_before(int parent, int node) { return clamp_to(parent, 0, node - 1); }

// The parent of a candidate, -1 for the root. Likewise.
SPECRT_HD int candidate_before(int parent, int candidate) { return parent < candidate ? parent : candidate - 1; }

// Tokens that slot b has committed in a round and its drafter takes in.
SPECRT_HD int path_size(const PathRowsParams& p, int b) { return p.max_nodes[b] > 0 ? clamp_to(p.path_len[b], 0, clamp_to(p.seq_lens[b], 0, p.nodes)) : 0; }

// Mask rows behind them.
SPECRT_HD int path_masks(const PathRowsParams& p, int b, int size) { return size > 0 && p.levels ? clamp_to(p.levels[b], 1, p.most_levels) - 1 : 0; }

// page * P + offset of a logical slot of request b; -1 outside the table, or where the table has no page (negative).
SPECRT_HD int64_t kv_slot(const Paging& paging, int b, int logical) {
  const int index = logical / paging.page_size;
  if (logical < 0 || index >= paging.max_pages) return -1;
  const int64_t page = paging.block_table[static_cast<int64_t>(b) * paging.max_pages + index];
  return page < 0 ? -1 : page * paging.page_size + logical % paging.page_size;
}

// Row `row`: the i-th of slot b's, the first `size` of which (path_size) are of tokens.
SPECRT_HD void write_path_row(const PathRowsParams& p, int b, int i, int size, int row) {
  const int position = p.seq_lens[b] - size + i;
  p.row_request[row] = b;
  p.row_token[row] = i >= size ? p.mask_token : position + 1 < p.max_len ? p.history[static_cast<int64_t>(b) * p.max_len + position + 1] : -1;
  p.row_position[row] = position;
  p.row_prefix[row] = position + 1;
  p.row_slot[row] = kv_slot(p.paging, b, position);
  p.row_source[row] = i < size ? p.row_offset[b] + p.path[static_cast<int64_t>(b) * p.nodes + i] : -1;
  p.row_place[row] = i < size - 1 ? -1 : b * p.most_levels + i - (size - 1);
}

SPECRT_HD void limit_slot(const DraftLimitsParams& p, int b) {
  const bool grows = p.max_nodes[b] > 0 && p.active[b] != 0 && p.seq_lens[b] > 0;
  p.nodes[b] = grows ? p.max_nodes[b] : 0;
  p.depth[b] = grows ? p.max_depth[b] : 0;
  if (p.base) p.base[b] = p.seq_lens[b] - p.lag;
}

// F(level): the index of an expansion's first candidate at depth `level`. Level 1 has k, every later level W k.
SPECRT_HD int first_candidate(int level, int beam_width, int topk) { return level <= 1 ? 0 : topk + (level - 2) * beam_width * topk; }

// The score of a child, less its parent's.
SPECRT_HD float child_score(const TreeExpandParams& p, int64_t child) { return p.topk_score ? p.topk_score[child] : p.topk_token[child] >= 0 ? 0.0f : kNoScore; }

// An integer that orders as the float does; -0 counts as 0. A score that is -inf or NaN is no choice at all: 0, below every other.
SPECRT_HD uint32_t score_key(float score) {
  if (!(score > kNoScore)) return 0;
  const uint32_t u = float_to_bits(score + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

}  // namespace specrt
