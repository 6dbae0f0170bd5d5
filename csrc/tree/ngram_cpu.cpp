// Prompt lookup. The tree of several occurrences needs no trie: a node is the set of occurrences whose continuations agree so far, one 32-bit word.
// Children split their parent's set by the next token, so the nodes waiting to be taken (the frontier) are disjoint sets, at most 32, each
// named by its lowest occurrence. Taking the best of the frontier until the budget is spent gives the best nodes by cumulative score, since a
// child's score never exceeds its parent's. On CUDA an occurrence is a lane of a warp.
//
// The score of a child: x = log(count / siblings' counts), at temperature > 0 x = (that + G) and score = min(0, x - lse), lse = M + log S,
// M = max x, S = sum of exp(x - M) over the siblings, lowest occurrence ascending. Cumulative score = parent's + child's. Ties: lower lowest occurrence.
#include <algorithm>

#include "base/noise.h"
#include "base/parallel.h"
#include "tree/rules.h"

namespace specrt {
namespace {

// Occurrences of the last tokens, best first: longest match, then earliest.
struct Occurrences {
  int count = 0;
  int end[kMaxOccurrences];     // position of the occurrence's last token
  int length[kMaxOccurrences];  // how many of the last tokens it matches, at most max_n
};

SPECRT_CLONES bool any_equal(const int32_t* x, int n, int32_t value) {
  int32_t hits = 0;
  for (int i = 0; i < n; ++i) hits |= x[i] == value;
  return hits;
}

int match_length(const int32_t* history, int known, int end, int max_n) {
  int n = 1;
  while (n < max_n && n <= end && history[end - n] == history[known - 1 - n]) ++n;
  return n;
}

void find_occurrences(const int32_t* history, int known, int min_n, int max_n, int limit, Occurrences& found) {
  constexpr int kStep = 128;
  const int32_t last = history[known - 1];
  for (int base = 0; base < known - 1; base += kStep) {
    const int stop = std::min(base + kStep, known - 1);
    if (!any_equal(history + base, stop - base, last)) continue;
    for (int end = base; end < stop; ++end) {
      if (history[end] != last) continue;
      const int n = match_length(history, known, end, max_n);
      if (n < min_n || (found.count == limit && n <= found.length[limit - 1])) continue;
      int at = found.count < limit ? found.count++ : limit - 1;
      for (; at > 0 && found.length[at - 1] < n; --at) {
        found.end[at] = found.end[at - 1];
        found.length[at] = found.length[at - 1];
      }
      found.end[at] = end;
      found.length[at] = n;
      if (found.count == limit && found.length[limit - 1] == max_n) return;  // nothing later can be better
    }
  }
}

struct Node {
  uint32_t occurrences;
  float score;  // cumulative
  int depth, parent, token;
};

class LookupTree {
 public:
  LookupTree(const NgramProposeParams& p, int b) : p_(p), b_(b), history_(p.history + static_cast<int64_t>(b) * p.max_len), sampled_(p.sampling_f[b * 6] > 0.0f) {}

  void propose() {
    const int budget = std::min(p_.max_nodes[b_], p_.nodes - 1);
    if (p_.max_nodes[b_] <= 0) return;
    const int known = std::min(p_.seq_lens[b_] + 1, p_.max_len), max_depth = std::min(p_.max_depth[b_], budget);
    Occurrences found;
    if (max_depth > 0 && known > 0) find_occurrences(history_, known, p_.min_n, p_.max_n, p_.branches == 1 && !sampled_ ? 1 : kMaxOccurrences, found);
    for (int i = 0; i < found.count; ++i) {
      next_[i] = history_ + found.end[i] + 1;
      length_[i] = std::min(known - 1 - found.end[i], max_depth);
    }
    split({found.count ? ~0u >> (32 - found.count) : 0u, 0.0f, 0, -1, -1}, 0);
    const int64_t base = static_cast<int64_t>(b_) * p_.nodes;
    int size = 1;
    for (; size <= budget && waiting_; ++size) {
      const int best = take_best();
      const Node node = frontier_[best];
      p_.tree_token[base + size] = node.token;
      p_.tree_parent[base + size] = node.parent;
      split(node, size);
    }
    p_.tree_size[b_] = size;
  }

 private:
  int take_best() {
    int best = -1;
    uint32_t best_key = 0;
    for (uint32_t rest = waiting_; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const uint32_t key = score_key(frontier_[i].score);
      if (best < 0 || key > best_key) best = i, best_key = key;
    }
    waiting_ &= ~(1u << best);
    return best;
  }

  // Puts the children of `node`, which is number `index` of the tree, on the frontier.
  void split(const Node& node, int index) {
    uint32_t rest = 0, leaders = 0, same[kMaxOccurrences];
    for (uint32_t all = node.occurrences; all; all &= all - 1)
      if (length_[__builtin_ctz(all)] > node.depth) rest |= all & -all;
    const float total = static_cast<float>(__builtin_popcount(rest));
    float x[kMaxOccurrences];
    while (rest) {
      const int i = __builtin_ctz(rest);
      const int32_t token = next_[i][node.depth];
      same[i] = 0;
      for (uint32_t others = rest; others; others &= others - 1)
        if (next_[__builtin_ctz(others)][node.depth] == token) same[i] |= others & -others;
      rest &= ~same[i];
      leaders |= 1u << i;
      x[i] = log_rn(static_cast<float>(__builtin_popcount(same[i])) / total);
      if (sampled_) x[i] = x[i] + gumbel_noise(p_.seeds[b_], p_.seq_lens[b_] + node.depth + 1, token, kNoiseShared);
    }
    const float lse = sampled_ ? log_sum_exp(x, leaders) : 0.0f;
    for (uint32_t all = leaders; all; all &= all - 1) {
      const int i = __builtin_ctz(all);
      if (rank(x, leaders, i) >= p_.branches) continue;
      float score = x[i];
      if (sampled_ && score_key(score)) score = score - lse < 0.0f ? score - lse : 0.0f;
      frontier_[i] = {same[i], node.score + score, node.depth + 1, index, next_[i][node.depth]};
      waiting_ |= 1u << i;
    }
  }

  static float log_sum_exp(const float* x, uint32_t leaders) {
    float most = kNoScore, sum = 0.0f;
    for (uint32_t all = leaders; all; all &= all - 1) most = std::max(most, x[__builtin_ctz(all)]);
    for (uint32_t all = leaders; all; all &= all - 1) sum = sum + exp_rn(x[__builtin_ctz(all)] - most);
    return most + log_rn(sum);
  }

  // How many siblings go before i.
  static int rank(const float* x, uint32_t leaders, int i) {
    int before = 0;
    for (uint32_t all = leaders; all; all &= all - 1) {
      const int j = __builtin_ctz(all);
      before += score_key(x[j]) > score_key(x[i]) || (j < i && score_key(x[j]) == score_key(x[i]));
    }
    return before;
  }

  const NgramProposeParams& p_;
  const int b_;
  const int32_t* history_;
  const bool sampled_;
  const int32_t* next_[kMaxOccurrences];  // the continuation of each occurrence,
  int length_[kMaxOccurrences];           // and how much of it is known and allowed
  Node frontier_[kMaxOccurrences];
  uint32_t waiting_ = 0;                  // bit i: frontier_[i] is in use
};

}  // namespace

void launch_ngram_propose_cpu(const NgramProposeParams& p) {
  int64_t work = 0;  // the scan compares 16 tokens at a time
  for (int b = 0; b < p.batch; ++b) work += p.max_nodes[b] > 0 ? p.seq_lens[b] / 16 : 0;
  parallel_for(p.batch, work, [&](int64_t b) { LookupTree(p, static_cast<int>(b)).propose(); });
}

}  // namespace specrt
