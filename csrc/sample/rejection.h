// The rejection verifiers (verification.md 2, 3b, 4), stated once for both backends. A Team is whoever walks one slot's tree: a thread with vector
// loops on the CPU, a block on CUDA; its members take every branch together. Passes over the vocabulary are the Team's:
//
//   lse(x)              log-sum-exp of a row, in the order of params.h
//   sum(f), each(f)     the sum of the integers f(v); f(v) for every token. Writes of `each` are seen by all when it returns
//   set(address, x)     one write, after everybody's reads so far and before everybody's reads to come
//   greedy(x)           argmax x
//   sample(x, ...)      argmax x + G, G of (seed, position, NOISE_RESIDUAL)
//   writer()            true for one member
//
// Probabilities are float32, exp(z - lse) and exp(q - lse_q). Their sums are integers in units of 2^-60, so exact up to the addends' rounding.
#pragma once
#include "sample/token.h"

#ifdef __CUDACC__
#define SPECRT_TEAM __device__ inline
#else
#define SPECRT_TEAM inline __attribute__((always_inline))
#endif

namespace specrt {

SPECRT_HD int64_t units(float probability) { return static_cast<int64_t>(probability * 1152921504606846976.0f); }
SPECRT_HD float share(int64_t part, int64_t whole) { return static_cast<float>(static_cast<double>(part) / static_cast<double>(whole)); }
SPECRT_HD float residual(float p, float q) {
  const float r = p - q;
  return select(r > 0.0f, r, 0.0f);
}

struct Step {
  int child;      // the accepted child, or -1
  int32_t token;  // what is emitted
};

struct Node {
  const int32_t *token, *parent;  // the slot's tree
  int index, size;
  const float* z;      // [V] transformed target logits at the node
  const float* q;      // [V] draft logits its children were drawn from, or null
  float *cur, *rest;   // [V] scratch
  int64_t seed;
  int32_t position;    // of the token to be chosen
  int vocab;
};

// Calls visit(child, token, coin) for the node's children in order until it returns true; returns that child, or -1. Coins are keyed by the child's rank.
template <typename Visit> SPECRT_TEAM int first_accepted(const Node& n, Visit&& visit) {
  int rank = 0;
  for (int child = n.index + 1; child < n.size; ++child) {
    if (n.parent[child] != n.index) continue;
    const int32_t x = n.token[child];
    const float coin = uniform(n.seed, n.position, rank++, kNoiseAccept);
    if (x >= 0 && x < n.vocab && visit(x, coin)) return child;
  }
  return -1;
}

// Children that are a point mass: accept x with cur(x), else remove it from cur and renormalise. `cur` keeps the logits, removed tokens at -inf.
template <typename Team> SPECRT_TEAM Step step_point(Team& team, const Node& n) {
  const float lse = team.lse(n.z);
  const float* z = n.z;
  float* cur = n.cur;
  int64_t whole = 0, left = 0;
  float remaining = 1.0f;
  bool rejected = false;
  const int child = first_accepted(n, [&](int32_t x, float coin) {
    const float px = exp_rn((rejected ? cur[x] : z[x]) - lse);
    if (coin * remaining < px) return true;
    if (!(px > 0.0f)) return false;
    if (!rejected) {
      whole = left = team.sum([=](int v) { return units(exp_rn(z[v] - lse)); });
      team.each([=](int v) { cur[v] = z[v]; });
      rejected = true;
    }
    left -= units(px);
    if (left <= 0) return true;  // nothing else is possible
    team.set(cur + x, -infinity());
    remaining = share(left, whole);
    return false;
  });
  if (child >= 0) return {child, n.token[child]};
  return {-1, team.sample(rejected ? cur : z, n.seed, n.position)};
}

// Children drawn from q without replacement, in order: accept x with min(1, cur(x) / qc(x)); else cur = norm((cur - qc)+), and x leaves qc, which is
// renormalised: qc = rest / remaining.
template <typename Team> SPECRT_TEAM Step step_ratio(Team& team, const Node& n, float lse_q) {
  const float lse = team.lse(n.z);
  const float *z = n.z, *q = n.q;
  float *cur = n.cur, *rest = n.rest;
  int64_t whole = 0, left = 0;
  float remaining = 1.0f;
  bool rejected = false;
  const int child = first_accepted(n, [&](int32_t x, float coin) {
    const float px = rejected ? cur[x] : exp_rn(z[x] - lse);
    const float qx = rejected ? rest[x] : exp_rn(q[x] - lse_q);
    if (coin * (qx / remaining) < px) return true;
    if (!rejected) {
      whole = left = team.sum([=](int v) { return units(exp_rn(q[v] - lse_q)); });
      team.each([=](int v) {
        cur[v] = exp_rn(z[v] - lse);
        rest[v] = exp_rn(q[v] - lse_q);
      });
      rejected = true;
    }
    const float r = remaining;
    const int64_t mass = team.sum([=](int v) { return units(residual(cur[v], rest[v] / r)); });
    if (mass > 0) {
      const float norm = share(mass, units(1.0f));
      team.each([=](int v) { cur[v] = residual(cur[v], rest[v] / r) / norm; });
    } else if (px > 0.0f) {
      return true;  // p <= q everywhere up to rounding: a rejection has probability 0
    }
    left -= units(qx);
    team.set(rest + x, 0.0f);
    remaining = left > 0 ? share(left, whole) : 1.0f;
    return false;
  });
  if (child >= 0) return {child, n.token[child]};
  if (!rejected) return {-1, team.sample(z, n.seed, n.position)};
  team.each([=](int v) { cur[v] = log_rn(cur[v]); });
  return {-1, team.sample(cur, n.seed, n.position)};
}

template <typename Team> SPECRT_TEAM Step step_greedy(Team& team, const Node& n) {
  const int32_t target = team.greedy(n.z);
  const int child = first_accepted(n, [=](int32_t x, float) { return x == target; });
  return {child, target};
}

template <typename Team> SPECRT_TEAM Step step(Team& team, const Node& n, bool random) {
  if (!random) return step_greedy(team, n);
  if (n.q) {
    const float lse_q = team.lse(n.q);
    if (finite_bits(float_to_bits(lse_q))) return step_ratio(team, n, lse_q);
  }
  return step_point(team, n);
}

// Slot b's walk from the root. A row whose status is not OK ends it before that row's token. q[b, d] belongs to the node at depth d of the
// main path; a child that is not the first has no children where there is a q.
template <typename Team> SPECRT_TEAM void walk_rejection(Team& team, const AcceptRejectionParams& p, int b) {
  const int64_t base = static_cast<int64_t>(b) * p.nodes, vocab = p.vocab;
  const int size = p.tree_size[b] < p.nodes ? p.tree_size[b] : p.nodes;
  const int levels = p.q_levels[b] < p.depth ? p.q_levels[b] : p.depth;
  int visited = 0, error = 0, node = size > 0 ? 0 : -1;
  while (node >= 0) {
    const int64_t row = p.row_offset[b] + node;
    error = p.row_status[row];
    if (error) break;
    const Node n{p.tree_token + base, p.tree_parent + base, node, size, p.z + row * vocab,
                 visited < levels ? p.q + (static_cast<int64_t>(b) * p.depth + visited) * vocab : nullptr,
                 p.scratch + 2 * b * vocab, p.scratch + (2 * b + 1) * vocab, p.seeds[b], p.seq_lens[b] + visited + 1, p.vocab};
    const Step s = step(team, n, p.sampling_f[b * kSamplingF + kTemperature] > 0.0f);
    if (team.writer()) {
      p.path[base + visited] = node;
      p.emitted[base + visited] = s.token;
    }
    ++visited;
    node = s.child;
  }
  if (team.writer()) {
    p.path_len[b] = visited;
    p.error[b] = error;
  }
}

}  // namespace specrt
