// A row of logits in the shared memory of a cluster: each CTA holds an eighth, in quads of four tokens (a quad has one noise counter), and every pass over the row
// reads it there. Every function must be called by all threads of all CTAs of the cluster and returns the same value to all of them. Results have no order
// (maxima of ranks, integer sums), so they do not depend on how the row is cut.
#pragma once
#include "ptx/cluster.cuh"
#include "sample/token.h"

namespace specrt {

constexpr int kCtas = 8, kRowThreads = 512, kRowWarps = kRowThreads / 32;
constexpr int kBins = kRowThreads;  // of a histogram: a thread a bin
constexpr unsigned kWarp = 0xffffffffu;

struct RowShared {
  uint32_t low[2][kBins], high[2][kBins];  // two histograms of 64-bit sums: one is filled while other CTAs may still read the other
  uint64_t warp_rank[kRowWarps], cta_rank[2][kCtas];
  int64_t warp_sum[kRowWarps], above;
  int bin;
  int32_t path_token[64];
  float path_raw[64];
};
constexpr size_t kRowShared = (sizeof(RowShared) + 15) / 16 * 16;

// This CTA's part of the row.
struct RowSlice {
  RowShared& shared;
  float4* z;      // [quads]; tokens past the vocabulary are -inf
  int first;      // the first quad's index in the row
  int quads;
  int turn = 0;   // the histogram in use

  __device__ float& at(int token) { return reinterpret_cast<float*>(z)[token - 4 * first]; }
  __device__ bool has(int token) const { return token >= 4 * first && token < 4 * (first + quads); }

  // visit(z, token) of every token of this CTA's part.
  template <typename Visit> __device__ void each(Visit&& visit) const {
    for (int q = threadIdx.x; q < quads; q += kRowThreads) {
      const float4 x = z[q];
      const int v = 4 * (first + q);
      visit(x.x, v), visit(x.y, v + 1), visit(x.z, v + 2), visit(x.w, v + 3);
    }
  }
};

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The best rank. `exchange`: 0, then 1: a slot is written by every CTA once. All CTAs must have started.
__device__ inline uint64_t cluster_best(RowShared& s, int exchange, uint64_t rank) {
  for (int d = 16; d; d >>= 1) {
    const uint64_t other = __shfl_xor_sync(kWarp, static_cast<unsigned long long>(rank), d);
    rank = other > rank ? other : rank;
  }
  if (threadIdx.x % 32 == 0) s.warp_rank[threadIdx.x / 32] = rank;
  __syncthreads();
  if (threadIdx.x < kCtas) {
    for (int w = 0; w < kRowWarps; ++w) rank = s.warp_rank[w] > rank ? s.warp_rank[w] : rank;
    ptx::store_to(threadIdx.x, shared_address(&s.cta_rank[exchange][ptx::cluster_rank()]), rank);
  }
  __syncwarp();
  ptx::cluster_sync();
  uint64_t best = 0;
  for (int c = 0; c < kCtas; ++c) best = s.cta_rank[exchange][c] > best ? s.cta_rank[exchange][c] : best;
  return best;
}

// ------------------------------------------------------------------------------------------------ thresholds, by histograms

// Adds to a 64-bit sum by 32-bit atomics: the word that wraps says so to the one that adds to it.
__device__ inline void add_to_bin(const RowSlice& row, int bin, int64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight), before = atomicAdd(&row.shared.low[row.turn][bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomicAdd(&row.shared.high[row.turn][bin], high);
}

// The other histogram, empty. Its last readers have passed a barrier since.
__device__ inline void next_histogram(RowSlice& row) {
  row.turn ^= 1;
  row.shared.low[row.turn][threadIdx.x] = row.shared.high[row.turn][threadIdx.x] = 0;
  __syncthreads();
}

struct Crossing {
  int bin;        // the first at which the sum over the bins so far reaches `need`
  int64_t above;  // the sum before it
  int64_t need;   // needed(sum of all bins); 0: nothing is looked for, bin and above mean nothing
};

template <typename Needed> __device__ Crossing find_crossing(const RowSlice& row, Needed&& needed) {
  RowShared& s = row.shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t low = shared_address(&s.low[row.turn][threadIdx.x]), high = shared_address(&s.high[row.turn][threadIdx.x]), me = ptx::cluster_rank();
  __syncwarp();
  ptx::cluster_sync();  // all histograms are filled
  uint64_t mine = 0;
#pragma unroll
  for (uint32_t c = 0; c < kCtas; ++c) {
    const uint32_t from = (me + c) % kCtas;
    mine += ptx::load_word_of(from, low) + (static_cast<uint64_t>(ptx::load_word_of(from, high)) << 32);
  }
  int64_t prefix = static_cast<int64_t>(mine), total = 0;
  for (int d = 1; d < 32; d <<= 1) {
    const int64_t before = __shfl_up_sync(kWarp, static_cast<long long>(prefix), d);
    if (lane >= d) prefix += before;
  }
  if (lane == 31) s.warp_sum[warp] = prefix;
  __syncthreads();
  for (int w = 0; w < kRowWarps; ++w) {
    const int64_t sum = s.warp_sum[w];
    if (w < warp) prefix += sum;
    total += sum;
  }
  const int64_t need = needed(total), above = prefix - static_cast<int64_t>(mine);
  if (above < need && need <= prefix) s.bin = threadIdx.x, s.above = above;  // one thread's
  __syncthreads();
  return {s.bin, s.above, need};
}

// The first histogram's bins: 1/16 of distance from the row's maximum each, the last one open. Falls as z grows, so a bin is a range of keys.
__device__ inline int distance_bin(float z, float max) { return ::min(__float2int_rz((max - z) * 16.0f), kBins - 1); }

// Keys [lo, hi) that hold every token of a bin, with room for the rounding of max - z and of the edges.
struct KeyRange {
  uint32_t lo, hi;
};
__device__ inline KeyRange bin_keys(int bin, float max) {
  const float near = max - static_cast<float>(bin) * 0.0625f, far = max - static_cast<float>(bin + 1) * 0.0625f;
  const float room = 9.5367431640625e-7f;  // 2^-20
  KeyRange r{order_key(far - (fabsf(far) + 32.0f) * room), order_key(near + (fabsf(near) + 32.0f) * room)};
  if (bin == kBins - 1) r.lo = 0;
  return {::max(r.lo, order_key(-infinity()) + 1), ::min(r.hi, order_key(max)) + 1};
}

// The lowest value t for which the weights of the tokens >= t reach needed(their sum over all tokens), among the tokens >= floor (> -inf). Returns floor where
// needed says 0. Each histogram narrows the keys that are still possible by 512.
template <typename Weight, typename Needed>
__device__ float cluster_threshold(RowSlice& row, float max, float floor, Weight&& weight, Needed&& needed) {
  next_histogram(row);
  int64_t last = 0;  // of the open bin: its tokens may be most of the row, and would stand in line for one word
  row.each([&](float x, int) {
    if (!(x >= floor)) return;
    const int64_t w = weight(x);
    const int bin = distance_bin(x, max);
    if (bin == kBins - 1) last += w;
    else if (w) add_to_bin(row, bin, w);
  });
  for (int d = 16; d; d >>= 1) last += __shfl_xor_sync(kWarp, static_cast<long long>(last), d);
  if (threadIdx.x % 32 == 0 && last) add_to_bin(row, kBins - 1, last);
  Crossing c = find_crossing(row, needed);
  if (c.need == 0) return floor;
  const int bin = c.bin;
  KeyRange keys = bin_keys(bin, max);
  keys.lo = ::max(keys.lo, order_key(floor));
  while (keys.hi - keys.lo > 1) {
    const int shift = ::max(32 - __clz(keys.hi - keys.lo - 1) - 9, 0);  // the highest key in bin 0
    const float lowest = key_value(keys.lo), highest = key_value(keys.hi - 1);
    const int64_t need = c.need - c.above;
    next_histogram(row);
    row.each([&](float x, int) {
      if (x >= lowest && x <= highest && distance_bin(x, max) == bin) add_to_bin(row, (keys.hi - 1 - order_key(x)) >> shift, weight(x));
    });
    c = find_crossing(row, [need](int64_t) { return need; });
    keys.hi -= static_cast<uint32_t>(c.bin) << shift;
    if (keys.hi - keys.lo > (1u << shift)) keys.lo = keys.hi - (1u << shift);
  }
  return key_value(keys.lo);
}

}  // namespace specrt
