#include <algorithm>

#include "tree/rules.h"

namespace specrt {

void launch_tree_build_cpu(const TreeBuildParams& p) {
  int row = 0;
  for (int b = 0; b < p.batch; ++b) {
    p.row_offset[b] = row;
    const int size = active_nodes(p, b), prefix = p.seq_lens[b];
    if (!p.active[b]) p.tree_size[b] = 0;
    const int64_t base = static_cast<int64_t>(b) * p.nodes;
    int64_t* ancestors = p.tree_ancestors + base;
    int32_t* depth = p.tree_depth + base;
    for (int node = 0; node < size; ++node) {
      const int parent = node ? parent_before(p.tree_parent[base + node], node) : 0;
      ancestors[node] = node ? ancestors[parent] | static_cast<int64_t>(uint64_t{1} << node) : 1;
      depth[node] = node ? depth[parent] + 1 : 0;
      if (row == p.rows) continue;
      p.row_request[row] = b;
      p.row_node[row] = node;
      p.row_token[row] = p.tree_token[base + node];
      p.row_position[row] = prefix + depth[node];
      p.row_prefix[row] = prefix;
      p.row_slot[row] = kv_slot(p.paging, b, prefix + node);
      p.row_ancestors[row] = ancestors[node];
      ++row;
    }
  }
  p.row_offset[p.batch] = *p.num_rows = row;
}

void launch_span_rows_cpu(const SpanRowsParams& p) {
  int row = 0;
  for (int b = 0; b < p.batch; ++b) {
    p.row_offset[b] = row;
    const int32_t* history = p.history + static_cast<int64_t>(b) * p.max_len;
    const int end = std::min(p.end[b], p.max_len);
    for (int position = std::max(p.start[b], 0); position < end && row < p.rows; ++position, ++row) {
      p.row_request[row] = b;
      p.row_token[row] = history[position];
      p.row_position[row] = position;
      p.row_prefix[row] = position + 1;
      p.row_slot[row] = kv_slot(p.paging, b, position);
    }
  }
  p.row_offset[p.batch] = *p.num_rows = row;
}

void launch_path_rows_cpu(const PathRowsParams& p) {
  int row = 0;
  for (int b = 0; b < p.batch; ++b) {
    const int size = path_size(p, b), all = size + path_masks(p, b, size);
    for (int i = 0; i < all && row < p.rows; ++i) write_path_row(p, b, i, size, row++);
  }
  *p.num_rows = row;
}

}  // namespace specrt
