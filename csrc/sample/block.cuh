// Passes over a row by one block. Every function must be called by all threads of the block, and returns the same value to all of them.
// Results have no order (maxima of ranks, integer sums) or the order of params.h (log-sum-exp), so they do not depend on the number of threads.
#pragma once
#include "sample/token.h"

namespace specrt {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFull = 0xffffffffu;

// One slot a warp; a leading barrier makes it reusable at once.
__device__ inline uint64_t block_max(uint64_t x) {
  __shared__ uint64_t slot[kWarps];
  for (int d = 16; d; d >>= 1) {
    const uint64_t other = __shfl_xor_sync(kFull, static_cast<unsigned long long>(x), d);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = x;
  __syncthreads();
  x = slot[threadIdx.x % kWarps];
  for (int d = 16; d; d >>= 1) {
    const uint64_t other = __shfl_xor_sync(kFull, static_cast<unsigned long long>(x), d);
    x = other > x ? other : x;
  }
  return x;
}

__device__ inline int64_t block_sum(int64_t x) {
  __shared__ int64_t slot[kWarps];
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(kFull, static_cast<long long>(x), d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = x;
  __syncthreads();
  x = slot[threadIdx.x % kWarps];
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(kFull, static_cast<long long>(x), d);
  return x;
}

// The maximum of x[0..n), NaN ignored, -inf if there is none.
__device__ inline float block_row_max(const float* x, int n) {
  uint32_t key = order_key(-infinity());
  for (int v = threadIdx.x; v < n; v += kThreads) key = max(key, order_key(x[v]));
  return key_value(static_cast<uint32_t>(block_max(key)));
}

__device__ inline uint64_t block_argmax(const float* x, int n) {
  uint64_t best = 0;
  for (int v = threadIdx.x; v < n; v += kThreads) best = max(best, rank_of(x[v], v));
  return block_max(best);
}

// The best of x + G, as a rank; a thread takes four tokens a counter. Four that cannot win even with the largest noise are skipped: an equal score
// would lose to the lower id.
__device__ inline uint64_t block_exact(const float* x, int n, int64_t seed, int32_t position, int32_t purpose) {
  float best = -infinity();
  int32_t token = -1;
  for (int c = threadIdx.x; 4 * c < n; c += kThreads) {
    float z[4], top = -infinity();
    for (int w = 0; w < 4; ++w) {
      z[w] = 4 * c + w < n ? x[4 * c + w] : -infinity();
      top = z[w] > top ? z[w] : top;
    }
    if (!(top + kGumbelMax > best)) continue;
    uint32_t words[4];
    noise_words(seed, position, purpose, c, words);
    for (int w = 0; w < 4; ++w) {
      const float score = z[w] + gumbel(words[w]);
      if (score > best) best = score, token = 4 * c + w;
    }
  }
  return block_max(token < 0 ? 0 : rank_of(best, token));
}

// Log-sum-exp of x[0..n). `stats` is 2 ceil(n / 128) floats of shared memory. A warp a block of 128 tokens, then the fold: its terms in parallel, their
// sum by one thread, blocks ascending.
__device__ inline float block_lse(const float* x, int n, float* stats) {
  __shared__ float result;
  const int blocks = (n + kLseBlock - 1) / kLseBlock, lane = threadIdx.x % 32;
  float *maxima = stats, *sums = stats + blocks;
  __syncthreads();  // stats and result may still be read
  for (int j = threadIdx.x / 32; j < blocks; j += kWarps) {
    const int v = j * kLseBlock + 4 * lane;
    float z[4], m = -infinity();
    for (int w = 0; w < 4; ++w) {
      z[w] = v + w < n ? x[v + w] : -infinity();
      m = z[w] > m ? z[w] : m;
    }
    for (int d = 16; d; d >>= 1) {
      const float other = __shfl_xor_sync(kFull, m, d);
      m = other > m ? other : m;
    }
    float s = 0.0f;
    if (m > -infinity()) {  // the same for the whole warp
      s = ((exp_rn(z[0] - m) + exp_rn(z[1] - m)) + exp_rn(z[2] - m)) + exp_rn(z[3] - m);
      for (int d = 16; d; d >>= 1) s = s + __shfl_xor_sync(kFull, s, d);
    }
    if (lane == 0) maxima[j] = m, sums[j] = s;
  }
  __syncthreads();
  const float m = block_row_max(maxima, blocks);
  if (!(m > -infinity())) return m;
  for (int j = threadIdx.x; j < blocks; j += kThreads) sums[j] = sums[j] * exp_rn(maxima[j] - m);
  __syncthreads();
  if (threadIdx.x == 0) {
    float s = 0.0f;
    for (int j = 0; j < blocks; ++j) s = s + sums[j];
    result = canonical(m + log_rn(s));
  }
  __syncthreads();
  return result;
}
inline size_t lse_shared(int vocab) { return 2 * sizeof(float) * ((vocab + kLseBlock - 1) / kLseBlock); }

// The k best of x[0..n), best first: store(i, rank) is called by thread 0; rank 0 = no token. A thread keeps its own best and looks again
// only when that was taken; ranks are distinct, so one thread does.
template <typename Store> __device__ inline void block_top(const float* x, int n, int k, Store store) {
  uint64_t mine = 0;
  for (int v = threadIdx.x; v < n; v += kThreads) mine = max(mine, rank_of(x[v], v));
  for (int i = 0; i < k; ++i) {
    const uint64_t top = block_max(mine);
    if (threadIdx.x == 0) store(i, top);
    if (top && mine == top) {
      mine = 0;
      for (int v = threadIdx.x; v < n; v += kThreads) {
        const uint64_t rank = rank_of(x[v], v);
        if (rank < top) mine = max(mine, rank);
      }
    }
  }
}

}  // namespace specrt
