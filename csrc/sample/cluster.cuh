// A row of logits in the shared memory of a cluster: each CTA holds a part, in quads of four tokens (a quad has one noise counter), and every pass over the row
// reads it there. Every function must be called by all threads of all CTAs of the cluster and returns the same value to all of them. Results have no order
// (maxima of ranks, integer sums), so they do not depend on how the row is cut.
#pragma once
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "sample/token.h"

namespace specrt {

constexpr int kMostCtas = 8, kMostThreads = 1024;  // 512 or 1024 threads
constexpr int kBins = 512;                         // of a histogram: a thread a bin
constexpr unsigned kWarp = 0xffffffffu;

constexpr int kListed = 64;  // tokens of one bin that a CTA may send to the others
static_assert(kMostCtas * kListed == kBins, "a thread a token of the list");

struct Listed {
  uint64_t key;
  int64_t weight;
};

struct RowShared {
  uint2 sums[2][kBins];  // two histograms of 64-bit sums, (low, high): one is filled while other CTAs may still read the other
  Listed list[kMostCtas][kListed];
  uint64_t list_count[kMostCtas], warp_rank[kMostThreads / 32], cta_rank[2][kMostCtas];
  uint64_t rank_bell[2];  // rings when all ranks are there
  int64_t warp_sum[kBins / 32], above;
  int bin, listed;
  uint32_t threshold;
  int32_t path_token[64];
};
constexpr size_t kRowShared = (sizeof(RowShared) + 15) / 16 * 16;

// This CTA's part of the row.
struct RowSlice {
  RowShared& shared;
  float4* z;      // [quads]; tokens past the vocabulary are -inf
  int first;      // the first quad's index in the row
  int quads;
  int ctas;       // of the cluster
  int turn = 0;   // the histogram in use

  __device__ float& at(int token) { return reinterpret_cast<float*>(z)[token - 4 * first]; }
  __device__ bool has(int token) const { return token >= 4 * first && token < 4 * (first + quads); }

  // visit(four z's, the first's token) of every quad of this CTA's part.
  template <typename Visit> __device__ void each(Visit&& visit) const {
    for (int q = threadIdx.x; q < quads; q += blockDim.x) {
      const float4 z4 = z[q];
      float x[4] = {z4.x, z4.y, z4.z, z4.w};
      visit(x, 4 * (first + q));
    }
  }
};

__device__ inline float highest_of(const float (&x)[4]) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// By one thread, before the other CTAs may be written to.
__device__ inline void init_bells(const RowSlice& row) {
  for (uint64_t& bell : row.shared.rank_bell) ptx::mbarrier_init(shared_address(&bell), 1);
  ptx::mbarrier_init_fence();
  for (uint64_t& bell : row.shared.rank_bell) ptx::mbarrier_arrive_expect(shared_address(&bell), row.ctas * static_cast<int>(sizeof(uint64_t)));
}

__device__ inline uint64_t warp_best(uint64_t rank) {
  const uint32_t high = static_cast<uint32_t>(rank >> 32), best = __reduce_max_sync(kWarp, high);
  return static_cast<uint64_t>(best) << 32 | __reduce_max_sync(kWarp, high == best ? static_cast<uint32_t>(rank) : 0u);
}

// The best rank. `exchange`: 0, then 1: a slot is written by every CTA once. All CTAs must have started; who returns may end, since all have sent.
__device__ inline uint64_t cluster_best(const RowSlice& row, int exchange, uint64_t rank) {
  RowShared& s = row.shared;
  const int lane = threadIdx.x % 32;
  const uint32_t bell = shared_address(&s.rank_bell[exchange]);
  rank = warp_best(rank);
  if (lane == 0) s.warp_rank[threadIdx.x / 32] = rank;
  __syncthreads();
  if (threadIdx.x < 32) {
    rank = warp_best(lane < static_cast<int>(blockDim.x) / 32 ? s.warp_rank[lane] : 0);
    if (lane < row.ctas) ptx::send_to(lane, shared_address(&s.cta_rank[exchange][ptx::cluster_rank()]), rank, bell);
  }
  __syncwarp();
  ptx::mbarrier_wait(bell, 0);
  return warp_best(lane < row.ctas ? s.cta_rank[exchange][lane] : 0);
}

// ------------------------------------------------------------------------------------------------ thresholds, by histograms

// Adds to a 64-bit sum by 32-bit atomics: the word that wraps says so to the one that adds to it.
__device__ inline void add_to_bin(const RowSlice& row, int bin, int64_t weight) {
  uint2& sum = row.shared.sums[row.turn][bin];
  const uint32_t low = static_cast<uint32_t>(weight), before = atomicAdd(&sum.x, low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomicAdd(&sum.y, high);
}

// The other histogram, empty. Its last readers have passed a barrier since.
__device__ inline void next_histogram(RowSlice& row) {
  row.turn ^= 1;
  if (threadIdx.x < kBins) row.shared.sums[row.turn][threadIdx.x] = make_uint2(0, 0);
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
  __syncwarp();
  ptx::cluster_sync();  // all histograms are filled
  uint64_t mine = 0;
  if (threadIdx.x < kBins)
#pragma unroll
    for (int c = 0; c < kMostCtas; ++c)
      if (c < row.ctas) mine += ptx::load_from(c, shared_address(&s.sums[row.turn][threadIdx.x]));
  int64_t prefix = static_cast<int64_t>(mine);
  for (int d = 1; d < 32; d <<= 1) {
    const int64_t before = __shfl_up_sync(kWarp, static_cast<long long>(prefix), d);
    if (lane >= d) prefix += before;
  }
  if (lane == 31 && warp < kBins / 32) s.warp_sum[warp] = prefix;
  __syncthreads();
  int64_t sums = lane < kBins / 32 ? s.warp_sum[lane] : 0;
  for (int d = 1; d < kBins / 32; d <<= 1) {
    const int64_t before = __shfl_up_sync(kWarp, static_cast<long long>(sums), d);
    if (lane >= d) sums += before;
  }
  const int64_t total = __shfl_sync(kWarp, static_cast<long long>(sums), kBins / 32 - 1), before = __shfl_sync(kWarp, static_cast<long long>(sums), ::max(warp - 1, 0));
  if (warp > 0) prefix += before;
  const int64_t need = needed(total), above = prefix - static_cast<int64_t>(mine);
  if (above < need && need <= prefix) s.bin = threadIdx.x, s.above = above;  // one thread's
  __syncthreads();
  return {s.bin, s.above, need};
}

// The first histograms' bins: so much of the distance from the row's maximum each, the last one open. Falls as z grows, so a bin is a range of keys. Most tokens lie
// further away than near bins reach.
constexpr float kNearBins = 64.0f, kFarBins = 16.0f;  // to a unit
__device__ inline int distance_bin(float z, float max, float per_unit) { return ::min(__float2int_rz((max - z) * per_unit), kBins - 1); }

// Keys [lo, hi) that hold every token of a bin, with room for the rounding of max - z and of the edges.
struct KeyRange {
  uint32_t lo, hi;
};
__device__ inline KeyRange bin_keys(int bin, float max, float per_unit) {
  const float near = max - static_cast<float>(bin) / per_unit, far = max - static_cast<float>(bin + 1) / per_unit;
  const float room = 9.5367431640625e-7f;  // 2^-20
  KeyRange r{order_key(far - (fabsf(far) + 32.0f) * room), order_key(near + (fabsf(near) + 32.0f) * room)};
  if (bin == kBins - 1) r.lo = 0;
  return {::max(r.lo, order_key(-infinity()) + 1), ::min(r.hi, order_key(max)) + 1};
}

// By distance from the maximum. The open bin's tokens may be most of the row, and would stand in line for one word: they are summed by thread first.
template <typename Weight, typename Needed>
__device__ Crossing distance_crossing(RowSlice& row, float max, float per_unit, float floor, Weight&& weight, Needed&& needed) {
  next_histogram(row);
  int64_t last = 0;
  row.each([&](const float (&x)[4], int) {
    int64_t w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] = weight(x[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] = x[e] >= floor ? w[e] : 0;
    if ((max - highest_of(x)) * per_unit >= static_cast<float>(kBins - 1)) {
      last += (w[0] + w[1]) + (w[2] + w[3]);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (const int bin = distance_bin(x[e], max, per_unit); bin == kBins - 1) last += w[e];
      else if (w[e]) add_to_bin(row, bin, w[e]);
    }
  });
  for (int d = 16; d; d >>= 1) last += __shfl_xor_sync(kWarp, static_cast<long long>(last), d);
  if (threadIdx.x % 32 == 0 && last) add_to_bin(row, kBins - 1, last);
  return find_crossing(row, needed);
}

// The highest key of a bin with which the weights reach `need`, by a list of all its tokens in every CTA; 0 where they are too many. inside(z): whether z is in the bin,
// all of which is >= lowest.
template <typename Inside, typename Weight> __device__ uint32_t listed_threshold(const RowSlice& row, float lowest, Inside&& inside, Weight&& weight, int64_t need) {
  RowShared& s = row.shared;
  const uint32_t me = ptx::cluster_rank();
  if (threadIdx.x == 0) s.listed = 0, s.threshold = 0;
  __syncthreads();
  row.each([&](const float (&x)[4], int) {
    if (!(highest_of(x) >= lowest)) return;
#pragma unroll
    for (const float z : x) {
      if (!inside(z)) continue;
      const int i = atomicAdd(&s.listed, 1);
      if (i >= kListed) continue;
      const uint32_t at = shared_address(&s.list[me][i]);
      for (int c = 0; c < row.ctas; ++c) {
        ptx::store_to(c, at, order_key(z));
        ptx::store_to(c, at + 8, static_cast<uint64_t>(weight(z)));
      }
    }
  });
  __syncthreads();
  if (threadIdx.x < row.ctas) ptx::store_to(threadIdx.x, shared_address(&s.list_count[me]), s.listed);
  __syncwarp();
  ptx::cluster_sync();
  bool all = true;
  for (int c = 0; c < row.ctas; ++c) all = all && s.list_count[c] <= kListed;
  if (!all) return 0;
  const int source = threadIdx.x / kListed, i = threadIdx.x % kListed;
  if (source < row.ctas && i < s.list_count[source]) {
    const uint64_t key = s.list[source][i].key;
    int64_t sum = 0;
    for (int c = 0; c < row.ctas; ++c)
      for (int j = 0; j < s.list_count[c]; ++j) sum += s.list[c][j].key >= key ? s.list[c][j].weight : 0;
    if (sum >= need) atomicMax(&s.threshold, static_cast<uint32_t>(key));
  }
  __syncthreads();
  return s.threshold;
}

// The lowest value t for which the weights of the tokens >= t reach needed(their sum over all tokens), among the tokens >= floor (> -inf). Returns floor where
// needed says 0. A bin of the distances usually holds few tokens; where it holds many, each further histogram narrows the keys that are still possible by 512.
template <typename Weight, typename Needed>
__device__ float cluster_threshold(RowSlice& row, float max, float floor, Weight&& weight, Needed&& needed) {
  Crossing c;
  float per_unit = kNearBins;
#pragma unroll 1
  while (true) {
    c = distance_crossing(row, max, per_unit, floor, weight, needed);
    if (c.need == 0) return floor;
    if (c.bin < kBins - 1 || per_unit == kFarBins) break;
    per_unit = kFarBins;
  }
  const int bin = c.bin;
  KeyRange keys = bin_keys(bin, max, per_unit);
  keys.lo = ::max(keys.lo, order_key(floor));
  float lowest = key_value(keys.lo), highest = key_value(keys.hi - 1);
  auto inside = [&](float x) { return x >= lowest && x <= highest && distance_bin(x, max, per_unit) == bin; };
  const uint32_t listed = listed_threshold(row, lowest, inside, weight, c.need - c.above);
  if (listed) return key_value(listed);
  while (keys.hi - keys.lo > 1) {
    const int shift = ::max(32 - __clz(keys.hi - keys.lo - 1) - 9, 0);  // the highest key in bin 0
    lowest = key_value(keys.lo), highest = key_value(keys.hi - 1);
    const int64_t need = c.need - c.above;
    next_histogram(row);
    row.each([&](const float (&x)[4], int) {
#pragma unroll
      for (const float z : x)
        if (inside(z)) add_to_bin(row, (keys.hi - 1 - order_key(z)) >> shift, weight(z));
    });
    c = find_crossing(row, [need](int64_t) { return need; });
    keys.hi -= static_cast<uint32_t>(c.bin) << shift;
    if (keys.hi - keys.lo > (1u << shift)) keys.lo = keys.hi - (1u << shift);
  }
  return key_value(keys.lo);
}

}  // namespace specrt
