// draft_children: a cluster of 7 or 8 CTAs a row, each with its part of the target's tokens in shared memory, whole blocks of 128: -inf, but where the drafter has a token. The
// drafter's logits are read once; filters as in sample_transform, then noise, block statistics and the best k of each warp in one go. The first CTA merges and writes k children.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "sample/cluster.cuh"

namespace specrt {
namespace {

constexpr int kBlockQuads = kLseBlock / 4;
static_assert(kBlockQuads == 32, "a lane a quad: a warp has a block of the statistics in its registers");

// Shared memory behind RowShared and the part of the row, at the same place in every CTA.
struct ChildrenShared {
  uint2* stats;     // [blocks of the row] maximum and sum; written by their CTAs into the first one's
  uint64_t* best;   // [warps][k], descending
  uint64_t* found;  // [CTAs][k + 1] the same of a CTA, and whether it saw a logit that is not finite; into the first one's
};

// By a warp: the first i with ids[i] >= token, n if there is none.
__device__ int first_at_least(const int64_t* ids, int n, int64_t token) {
  int begin = 0, end = n;  // the answer's bounds
  while (begin < end) {
    const int step = (end - begin + 31) / 32, i = begin + static_cast<int>(threadIdx.x % 32) * step;
    const int below = __popc(__ballot_sync(kWarp, i < end && ids[i] < token));
    if (below == 0) return begin;
    end = min(end, begin + below * step);
    begin += (below - 1) * step + 1;
  }
  return begin;
}

constexpr int kBatch = 4;  // logits that a thread loads at once

// This CTA's drafter logits into its part of the row, adjusted. Returns whether all of them, in every thread, are finite.
__device__ bool spread(const DraftChildrenParams& p, int row_index, int b, int begin, int end, RowSlice& row) {
  const float* own = p.logits + static_cast<int64_t>(row_index) * p.columns;
  const float* bias = p.sampling_i[b * kSamplingI + kHasBias] ? p.bias + static_cast<int64_t>(b) * p.vocab : nullptr;
  const float temperature = p.sampling_f[b * kSamplingF + kTemperature];
  const bool scaled = temperature > 0.0f && temperature != 1.0f;
  float zeros = 0.0f;  // the sum of 0 * x
  for (int i0 = begin + threadIdx.x; i0 < end; i0 += kBatch * blockDim.x) {
    int64_t v[kBatch];
    float x[kBatch];
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int i = i0 + e * blockDim.x;
      v[e] = i >= end ? -1 : p.ids ? p.ids[i] : i;
      x[e] = i >= end ? 0.0f : own[i];
    }
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      zeros = fma_rn(x[e], 0.0f, zeros);
      if (v[e] < 4 * row.first || v[e] >= 4 * (row.first + row.quads) || v[e] >= p.vocab) continue;  // past the end; or, if the ids do not ascend, anywhere
      if (bias) x[e] = x[e] + bias[v[e]];
      row.at(static_cast<int>(v[e])) = scaled ? x[e] / temperature : x[e];
    }
  }
  const bool finite = !__syncthreads_or(zeros != 0.0f);
  const int32_t* i = p.sampling_i + b * kSamplingI;
  if (p.row_position[row_index] + p.ahead - i[kPromptLen] < i[kMinTokens]) {
    for (int s = threadIdx.x; s < p.stops; s += blockDim.x) {
      const int32_t v = p.stop_ids[b * p.stops + s];
      if (v >= 0 && v < p.vocab && row.has(v)) row.at(v) = -infinity();
    }
    __syncthreads();
  }
  return finite;
}

// What is kept of the row at temperature > 0: tokens with z >= cut and exp(z - max) >= min_p.
struct Filters {
  float max, cut, min_p;
};

__device__ Filters filters_of(const DraftChildrenParams& p, int b, bool finite, RowSlice& row) {
  const float* f = p.sampling_f + b * kSamplingF;
  const int top_k = p.sampling_i[b * kSamplingI + kTopK];
  const bool by_rank = top_k > 0 && top_k < p.vocab, by_mass = f[kTopP] < 1.0f;
  Filters kept{0.0f, -infinity(), 0.0f};
  if (!(f[kTemperature] > 0.0f) || !(by_rank || by_mass || f[kMinP] > 0.0f)) return kept;
  float highest = -infinity();
  row.each([&](const float (&x)[4], int) { highest = fmaxf(highest, highest_of(x)); });
  const uint64_t bad = ~uint64_t{0};  // above every rank
  const uint64_t best = cluster_best(row, 0, finite ? rank_of(highest, 0) : bad);
  if (best == 0 || best == bad) return kept;
  const float max = key_value(static_cast<uint32_t>(best >> 32));
  if (max == infinity()) return kept;
  kept = {max, key_value(order_key(-infinity()) + 1), f[kMinP]};
  if (by_rank) {
    const int64_t k = top_k;
    kept.cut = cluster_threshold(row, max, kept.cut, [](float) -> int64_t { return 1; }, [k](int64_t possible) { return possible >= k ? k : 0; });
  }
  if (by_mass) {
    const float top_p = f[kTopP];
    kept.cut = cluster_threshold(row, max, kept.cut, [max](float x) { return mass(x, max); }, [top_p](int64_t total) { return needed_mass(top_p, total); });
  }
  return kept;
}

// Filters and perturbs this thread's quads, sends the statistics of its warp's blocks to the first CTA, and returns the thread's best.
__device__ uint64_t perturb(const DraftChildrenParams& p, int row_index, int b, const Filters& kept, const ChildrenShared& out, RowSlice& row) {
  const bool noisy = p.noise >= 0 && p.sampling_f[b * kSamplingF + kTemperature] > 0.0f;
  const int64_t seed = p.seeds[b];
  const int32_t position = p.row_position[row_index] + p.ahead;
  uint64_t best = 0;
  for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {  // whole warps
    const float4 raw = row.z[q];
    float z[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (float& x : z) x = x >= kept.cut ? x : -infinity();
    if (kept.min_p > 0.0f)
#pragma unroll
      for (float& x : z) x = exp_rn(x - kept.max) >= kept.min_p ? x : -infinity();
    if (noisy && highest_of(z) > -infinity()) {
      uint32_t words[4];
      noise_words(seed, position, p.noise, row.first + q, words);
#pragma unroll
      for (int e = 0; e < 4; ++e) z[e] = z[e] + gumbel(words[e]);
    }
    row.z[q] = make_float4(z[0], z[1], z[2], z[3]);
    float m = -infinity(), s = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      m = z[e] > m ? z[e] : m;
      best = max(best, rank_of(z[e], 4 * (row.first + q) + e));
    }
    for (int d = 16; d; d >>= 1) {
      const float other = __shfl_xor_sync(kWarp, m, d);
      m = other > m ? other : m;
    }
    if (m > -infinity()) {  // the same for the whole warp
      s = ((exp_rn(z[0] - m) + exp_rn(z[1] - m)) + exp_rn(z[2] - m)) + exp_rn(z[3] - m);
      for (int d = 16; d; d >>= 1) s = s + __shfl_xor_sync(kWarp, s, d);
    }
    if (threadIdx.x % 32 == 0)
      ptx::store_to(0, shared_address(&out.stats[(row.first + q) / kBlockQuads]), static_cast<uint64_t>(float_to_bits(s)) << 32 | float_to_bits(m));
  }
  return best;
}

// The k best ranks of a warp, best first: store(i, rank), by all lanes. A thread keeps its own best, and looks again when that was taken.
template <typename Store> __device__ void warp_top(const RowSlice& row, uint64_t mine, int k, Store&& store) {
  for (int i = 0; i < k; ++i) {
    const uint64_t top = warp_best(mine);
    store(i, top);
    if (top == 0 || mine != top) continue;
    mine = 0;
    for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {
      const float4 z = row.z[q];
      const int v = 4 * (row.first + q);
      for (const uint64_t rank : {rank_of(z.x, v), rank_of(z.y, v + 1), rank_of(z.z, v + 2), rank_of(z.w, v + 3)})
        if (rank < top) mine = max(mine, rank);
    }
  }
}

// The k best of up to 32 lists of at least k ranks, each descending, by a warp; likewise. Ranks are distinct, but for 0.
template <typename Store> __device__ void merge_lists(const uint64_t* lists, int count, int pitch, int k, Store&& store) {
  const int lane = threadIdx.x % 32;
  for (int i = 0, at = 0; i < k; ++i) {
    const uint64_t head = lane < count ? lists[lane * pitch + at] : 0, top = warp_best(head);
    if (head == top && at < k - 1) ++at;
    store(i, top);
  }
}

// By the first CTA, when all statistics and lists are there.
__device__ void write_children(const DraftChildrenParams& p, int row_index, const ChildrenShared& from, RowSlice& row) {
  __shared__ float lse;
  RowShared& s = row.shared;
  const int blocks = (p.vocab + kLseBlock - 1) / kLseBlock, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t key = order_key(-infinity());
  for (int j = threadIdx.x; j < blocks; j += blockDim.x) key = max(key, order_key(bits_to_float(from.stats[j].x)));
  key = __reduce_max_sync(kWarp, key);
  if (lane == 0) s.warp_rank[warp] = key;
  __syncthreads();
  const float m = key_value(__reduce_max_sync(kWarp, lane < static_cast<int>(blockDim.x) / 32 ? static_cast<uint32_t>(s.warp_rank[lane]) : 0u));
  for (int j = threadIdx.x; j < blocks; j += blockDim.x)
    from.stats[j].y = float_to_bits(bits_to_float(from.stats[j].y) * exp_rn(bits_to_float(from.stats[j].x) - m));
  __syncthreads();
  if (warp == 0) {
    merge_lists(from.found, row.ctas, p.k + 1, p.k, [&](int i, uint64_t rank) {
      if (lane == 0) from.best[i] = rank;
    });
  } else if (threadIdx.x == 32) {
    float sum = 0.0f;
#pragma unroll 8
    for (int j = 0; j < blocks; ++j) sum = sum + bits_to_float(from.stats[j].y);
    lse = m > -infinity() ? canonical(m + log_rn(sum)) : m;
  }
  __syncthreads();
  bool usable = m < infinity();
  for (int c = 0; c < row.ctas; ++c) usable = usable && from.found[c * (p.k + 1) + p.k] == 0;
  if (threadIdx.x >= p.k) return;
  const uint64_t rank = usable ? from.best[threadIdx.x] : 0;
  const int64_t at = static_cast<int64_t>(row_index) * p.k + threadIdx.x;
  p.token[at] = rank_token(rank);
  p.score[at] = rank ? canonical(key_value(static_cast<uint32_t>(rank >> 32)) - lse) : -infinity();
}

// Quads of the row in each CTA: whole blocks.
__host__ __device__ int part_quads(int vocab, int ctas) { return ((vocab + kLseBlock - 1) / kLseBlock + ctas - 1) / ctas * kBlockQuads; }

__global__ void __launch_bounds__(kMostThreads) draft_children_kernel(DraftChildrenParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int bounds[2];
  const int ctas = ptx::cluster_size(), rank = ptx::cluster_rank(), row_index = ptx::cluster_id(), warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = (p.vocab + kLseBlock - 1) / kLseBlock, part = part_quads(p.vocab, ctas), first = min(rank * part, blocks * kBlockQuads);
  RowSlice row{*reinterpret_cast<RowShared*>(memory), reinterpret_cast<float4*>(memory + kRowShared), first, min(part, blocks * kBlockQuads - first), ctas};
  ChildrenShared out;
  out.stats = reinterpret_cast<uint2*>(row.z + part);
  out.best = reinterpret_cast<uint64_t*>(out.stats + blocks);
  out.found = out.best + warps * p.k;
  ptx::launch_dependents();
  // Nothing of this was written by a kernel.
  if (threadIdx.x == 0) init_bells(row);
  for (int q = threadIdx.x; q < row.quads; q += blockDim.x) row.z[q] = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
  if (warp < 2) {
    const int64_t token = 4 * (first + warp * row.quads);
    const int i = p.ids ? first_at_least(p.ids, p.columns, token) : static_cast<int>(min(token, static_cast<int64_t>(min(p.columns, p.vocab))));
    if (lane == 0) bounds[warp] = i;
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  const int rows = *p.num_rows, b = p.row_request[row_index];
  if (row_index >= rows) return;  // the whole cluster
  ptx::cluster_arrive_relaxed();  // waited for before the first access to another CTA
  const bool finite = spread(p, row_index, b, bounds[0], bounds[1], row);
  __syncwarp();
  ptx::cluster_wait();
  const Filters kept = filters_of(p, b, finite, row);
  const uint64_t mine = perturb(p, row_index, b, kept, out, row);
  __syncwarp();
  warp_top(row, mine, p.k, [&](int i, uint64_t best) {
    if (lane == 0) out.best[warp * p.k + i] = best;
  });
  __syncthreads();
  if (warp == 0) {
    const uint32_t to = shared_address(out.found + rank * (p.k + 1));
    merge_lists(out.best, warps, p.k, p.k, [&](int i, uint64_t best) {
      if (lane == 0) ptx::store_to(0, to + 8 * i, best);
    });
    if (lane == 0) ptx::store_to(0, to + 8 * p.k, finite ? 0 : 1);
    __syncwarp();
  }
  ptx::cluster_sync();
  if (rank == 0) write_children(p, row_index, out, row);
}

}  // namespace

void launch_draft_children_cuda(const DraftChildrenParams& p, void* stream) {
  // As sample_transform's.
  const bool few = p.rows * kMostCtas <= multiprocessors();
  const int threads = few ? 1024 : 512;
  auto shared_bytes = [&](int ctas) {
    const size_t blocks = (p.vocab + kLseBlock - 1) / kLseBlock, ranks = threads / 32 * p.k + ctas * (p.k + 1);
    return static_cast<int>(kRowShared + part_quads(p.vocab, ctas) * sizeof(float4) + blocks * sizeof(uint2) + ranks * sizeof(uint64_t));
  };
  const int ctas = few || shared_bytes(7) > 110 * 1024 ? 8 : 7;
  launch({dim3(static_cast<unsigned>(p.rows * ctas)), dim3(threads), shared_bytes(ctas), static_cast<cudaStream_t>(stream), ctas, true}, draft_children_kernel, p);
}

}  // namespace specrt
