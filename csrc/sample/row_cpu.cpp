#include "sample/row_cpu.h"

namespace specrt {
namespace {

SPECRT_CLONES void lse_blocks(const float* z, int n, float* max, float* sum) {
  for (int i = 0, j = 0; i < n; i += kLseBlock, ++j) lse_block(z + i, std::min(kLseBlock, n - i), max + j, sum + j);
}

// Folds a row's block statistics, blocks ascending.
SPECRT_CLONES float lse_fold(const float* max, const float* sum, int blocks) {
  const float m = max_of(max, blocks);
  if (!(m > -infinity())) return m;
  float s = 0.0f;
  for (int j = 0; j < blocks; ++j) s = s + sum[j] * exp_rn(max[j] - m);
  return canonical(m + log_rn(s));
}

SPECRT_CLONES void block_maxima(const float* x, int n, float* maxima) {
  for (int i = 0, j = 0; i < n; i += kLanes, ++j) maxima[j] = max_of(x + i, std::min(kLanes, n - i));
}

}  // namespace

void rows_lse(const float* z, int64_t n, int vocab, float* lse) {
  const int blocks = (vocab + kLseBlock - 1) / kLseBlock, chunks = (vocab + kChunk - 1) / kChunk;
  std::vector<float> max(n * blocks), sum(n * blocks);
  parallel_for(n * chunks, n * vocab * 16, [&](int64_t task) {
    const int64_t row = task / chunks, begin = task % chunks * kChunk, at = row * blocks + begin / kLseBlock;
    lse_blocks(z + row * vocab + begin, static_cast<int>(std::min<int64_t>(kChunk, vocab - begin)), &max[at], &sum[at]);
  });
  for (int64_t r = 0; r < n; ++r) lse[r] = lse_fold(&max[r * blocks], &sum[r * blocks], blocks);
}

// The k-th highest block maximum is a floor under the k-th highest value: only blocks that reach it are looked into.
std::vector<uint64_t> top_candidates(const float* x, int n, int k) {
  const int blocks = (n + kLanes - 1) / kLanes;
  std::vector<float> maxima(blocks);
  block_maxima(x, n, maxima.data());
  float floor = -infinity();
  if (k < blocks) {
    std::vector<float> order(maxima);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    floor = order[k - 1];
  }
  std::vector<uint64_t> ranks;
  for (int j = 0; j < blocks; ++j) {
    if (maxima[j] < floor) continue;
    for (int i = j * kLanes; i < std::min(n, (j + 1) * kLanes); ++i)
      if (x[i] >= floor && x[i] > -infinity()) ranks.push_back(rank_of(x[i], i));
  }
  return ranks;
}

std::vector<uint64_t> top_ranks(const float* x, int n, int k) {
  std::vector<uint64_t> ranks = top_candidates(x, n, k);
  const size_t kept = std::min<size_t>(k, ranks.size());
  std::partial_sort(ranks.begin(), ranks.begin() + kept, ranks.end(), std::greater<uint64_t>());
  ranks.resize(kept);
  return ranks;
}

}  // namespace specrt
