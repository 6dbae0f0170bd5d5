#include "base/noise.h"
#include "tree/rules.h"

namespace specrt {
namespace {

// Down slot b's tree from the root. choose(node, visited, target) gives the child to move to, or -1; what is emitted at a node is that child's token,
// at the last one the target's. A row that cannot be trusted ends the walk before it.
template <typename Choose> void walk(const AcceptWalkParams& p, int b, Choose&& choose) {
  const int64_t base = static_cast<int64_t>(b) * p.nodes;
  const int32_t* token = p.tree_token + base;
  int visited = 0, error = 0, node = tree_nodes(p.tree_size, b, p.nodes) > 0 ? 0 : -1;
  while (node >= 0) {
    const int row = p.row_offset[b] + node;
    error = p.row_status[row];
    if (error) break;
    const int target = p.row_target[row], child = choose(node, visited + 1, target);
    p.path[base + visited] = node;
    p.emitted[base + visited] = child >= 0 ? token[child] : target;
    ++visited;
    node = child;
  }
  p.path_len[b] = visited;
  p.error[b] = error;
}

// The first child of a node that `accept(token)` takes, or -1.
template <typename Accept> int first_child(const AcceptWalkParams& p, int b, int node, Accept&& accept) {
  const int64_t base = static_cast<int64_t>(b) * p.nodes;
  const int size = tree_nodes(p.tree_size, b, p.nodes);
  for (int child = node + 1; child < size; ++child)
    if (p.tree_parent[base + child] == node && accept(p.tree_token[base + child])) return child;
  return -1;
}

}  // namespace

void launch_accept_walk_cpu(const AcceptWalkParams& p) {
  for (int b = 0; b < p.batch; ++b)
    walk(p, b, [&](int node, int, int target) { return first_child(p, b, node, [&](int token) { return token == target; }); });
}

void launch_accept_synthetic_cpu(const AcceptSyntheticParams& p) {
  for (int b = 0; b < p.tree.batch; ++b) {
    const int most = p.whole + (uniform(p.seeds[b], p.seq_lens[b] + 1, 0, kNoiseAccept) < p.fraction ? 1 : 0);
    walk(p.tree, b, [&](int node, int visited, int) { return visited < most ? first_child(p.tree, b, node, [](int) { return true; }) : -1; });
  }
}

void launch_round_advance_cpu(const RoundAdvanceParams& p) {
  for (int b = 0; b < p.batch; ++b) {
    const int count = clamp_to(p.path_len[b], 0, p.nodes), from = p.seq_lens[b] + 1;
    for (int i = 0; i < count; ++i) {
      const int token = p.emitted[static_cast<int64_t>(b) * p.nodes + i];
      if (from + i < p.max_len) p.history[static_cast<int64_t>(b) * p.max_len + from + i] = token;
      if (token >= 0 && token < p.vocab) p.output_count[static_cast<int64_t>(b) * p.vocab + token] += 1;
    }
    if (count > 0) p.tree_token[static_cast<int64_t>(b) * p.nodes] = p.emitted[static_cast<int64_t>(b) * p.nodes + count - 1];
    p.seq_lens[b] += count;
    if (p.seq_lens[b] >= p.limit[b]) p.active[b] = 0;
  }
}

}  // namespace specrt
