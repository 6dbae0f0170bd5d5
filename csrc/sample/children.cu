// draft_children: a cluster of 7 or 8 CTAs a row, each with its part of the drafter's columns in shared memory, whole blocks of 128. The logits are read once; filters as in
// sample_transform, then noise, block statistics and the best k of each CTA in one go. The first CTA merges and writes k children. What stands between two layers waits for
// this kernel, so the k best are not sought one after the other: few columns reach a floor that is found first, and a column's place among those is how many are above it.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "ptx/prefetch.cuh"
#include "sample/cluster.cuh"

namespace specrt {
namespace {

constexpr int kBlockQuads = kLseBlock / 4;
static_assert(kBlockQuads == 32, "a lane a quad: a warp has a block of the statistics in its registers");

// Shared memory behind RowShared and the part of the row, at the same place in every CTA.
struct ChildrenShared {
  uint2* stats;     // [blocks of the row] maximum and sum; written by their CTAs into the first one's
  uint64_t* list;   // [warps * k] the ranks (of columns) that may be among the CTA's best
  uint64_t* found;  // [CTAs][k] the best of each, into the first one's
  uint64_t* broken; // [CTAs] whether it saw a logit that is not finite, likewise
  uint64_t* best;   // [k]
};

// What a row needs of the tables, read at once; from L2, where it is read before the wait (ptx/dependency.cuh).
struct Row {
  float temperature, top_p, min_p;
  int32_t top_k, position;  // of the child
  int64_t seed;
  const float* bias;  // [V] or null
  bool stops;         // the stop ids are not chosen yet

  __device__ Row(const DraftChildrenParams& p, int row_index, int b) {
    const float* f = p.sampling_f + b * kSamplingF;
    const int32_t* i = p.sampling_i + b * kSamplingI;
    temperature = __ldcg(f + kTemperature), top_p = __ldcg(f + kTopP), min_p = __ldcg(f + kMinP), top_k = __ldcg(i + kTopK);
    seed = __ldcg(reinterpret_cast<const long long*>(p.seeds) + b);
    position = __ldcg(p.row_position + row_index) + p.ahead;
    bias = __ldcg(i + kHasBias) ? p.bias + static_cast<int64_t>(b) * p.vocab : nullptr;
    stops = position - __ldcg(i + kPromptLen) < __ldcg(i + kMinTokens);
  }
};

// The first i with ids[i] >= token, n if there is none.
__device__ int first_at_least(const int64_t* ids, int n, int64_t token) {
  int begin = 0;
  while (begin < n) {
    const int middle = (begin + n) / 2;
    if (ids[middle] < token) begin = middle + 1;
    else n = middle;
  }
  return begin;
}

__device__ __forceinline__ int64_t token_of(const DraftChildrenParams& p, int column) { return p.ids ? p.ids[column] : column; }

// This CTA's logits into its part of the row, adjusted; columns from `used` on are -inf. Returns whether all of them, in every thread, are finite.
__device__ bool load_part(const DraftChildrenParams& p, const float* own, int b, int used, const Row& of, RowSlice& row) {
  const bool scaled = of.temperature > 0.0f && of.temperature != 1.0f, vector = p.columns % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
  float zeros = 0.0f;  // the sum of 0 * x
  for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {
    const int c = 4 * (row.first + q);
    float x[4] = {};
    if (vector && c < p.columns) {
      const float4 quad = *reinterpret_cast<const float4*>(own + c);
      x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < p.columns) x[e] = own[c + e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool there = c + e < used;
      zeros = fma_rn(there ? x[e] : 0.0f, 0.0f, zeros);
      if (of.bias && there) x[e] = x[e] + of.bias[token_of(p, c + e)];
      x[e] = !there ? -infinity() : scaled ? x[e] / of.temperature : x[e];
    }
    row.z[q] = make_float4(x[0], x[1], x[2], x[3]);
  }
  const bool finite = !__syncthreads_or(zeros != 0.0f);
  if (of.stops) {
    for (int s = threadIdx.x; s < p.stops; s += blockDim.x) {
      const int32_t v = p.stop_ids[b * p.stops + s];
      if (v < 0 || v >= p.vocab) continue;
      const int column = p.ids ? first_at_least(p.ids, used, v) : v;
      if (column < used && token_of(p, column) == v && row.has(column)) row.at(column) = -infinity();
    }
    __syncthreads();
  }
  return finite;
}

// What is kept of the row at temperature > 0: columns with z >= cut and exp(z - max) >= min_p.
struct Filters {
  float max, cut, min_p;
};

__device__ Filters filters_of(const DraftChildrenParams& p, const Row& of, bool finite, RowSlice& row) {
  const bool by_rank = of.top_k > 0 && of.top_k < p.vocab, by_mass = of.top_p < 1.0f;
  Filters kept{0.0f, -infinity(), 0.0f};
  if (!(of.temperature > 0.0f) || !(by_rank || by_mass || of.min_p > 0.0f)) return kept;
  float highest = -infinity();
  row.each([&](const float (&x)[4], int) { highest = fmaxf(highest, highest_of(x)); });
  const uint64_t bad = ~uint64_t{0};  // above every rank
  const uint64_t best = cluster_best(row, 0, finite ? rank_of(highest, 0) : bad);
  if (best == 0 || best == bad) return kept;
  const float max = key_value(static_cast<uint32_t>(best >> 32));
  if (max == infinity()) return kept;
  kept = {max, key_value(order_key(-infinity()) + 1), of.min_p};
  if (by_rank) {
    const int64_t k = of.top_k;
    kept.cut = cluster_threshold(row, max, kept.cut, [](float) -> int64_t { return 1; }, [k](int64_t possible) { return possible >= k ? k : 0; });
  }
  if (by_mass) {
    const float top_p = of.top_p;
    kept.cut = cluster_threshold(row, max, kept.cut, [max](float x) { return mass(x, max); }, [top_p](int64_t total) { return needed_mass(top_p, total); });
  }
  return kept;
}

// The best rank of a quad's columns below `than`.
__device__ __forceinline__ uint64_t best_below(uint64_t than, const float4& z, int column) {
  uint64_t best = 0;
  for (const uint64_t rank : {rank_of(z.x, column), rank_of(z.y, column + 1), rank_of(z.z, column + 2), rank_of(z.w, column + 3)})
    if (rank < than) best = max(best, rank);
  return best;
}

// Filters this thread's quads and makes h (params.h) of them, sends the statistics of its warp's blocks to the first CTA where there are scores, and returns the thread's best.
__device__ uint64_t perturb(const DraftChildrenParams& p, const Row& of, const Filters& kept, const ChildrenShared& out, RowSlice& row) {
  const bool noisy = p.noise >= 0 && of.temperature > 0.0f, foretells = p.foretells(of.temperature);
  const float slope = foretells ? kHeadSlope : 1.0f, scale = foretells ? of.temperature : 1.0f;
  uint64_t best = 0;
  for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {  // whole warps
    const int column = 4 * (row.first + q);
    float4 raw = row.z[q];
    float z[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (float& x : z) x = x >= kept.cut ? x : -infinity();
    if (kept.min_p > 0.0f)
#pragma unroll
      for (float& x : z) x = exp_rn(x - kept.max) >= kept.min_p ? x : -infinity();
    if (noisy && highest_of(z) > -infinity()) {
      uint32_t words[4];
      if (!p.ids) noise_words(of.seed, of.position, p.noise, column / 4, words);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (z[e] > -infinity()) z[e] = (z[e] * slope + gumbel(p.ids ? noise_word(of.seed, of.position, static_cast<int32_t>(p.ids[column + e]), p.noise) : words[e])) * scale;
    }
    row.z[q] = raw = make_float4(z[0], z[1], z[2], z[3]);
    best = max(best, best_below(~uint64_t{0}, raw, column));
    if (!p.score) continue;
    float m = highest_of(z), s = 0.0f;
    for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(kWarp, m, d));
    if (m > -infinity()) {  // the same for the whole warp
      s = ((exp_rn(z[0] - m) + exp_rn(z[1] - m)) + exp_rn(z[2] - m)) + exp_rn(z[3] - m);
      for (int d = 16; d; d >>= 1) s = s + __shfl_xor_sync(kWarp, s, d);
    }
    if (threadIdx.x % 32 == 0)
      ptx::store_to(0, shared_address(&out.stats[(row.first + q) / kBlockQuads]), static_cast<uint64_t>(float_to_bits(s)) << 32 | float_to_bits(m));
  }
  return best;
}

// store(rank, how many of the n distinct ranks of the list are above it), for all that are not 0, by all threads.
template <typename Store> __device__ __forceinline__ void place_ranks(const uint64_t* list, int n, Store&& store) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const uint64_t rank = list[i];
    int above = 0;
#pragma unroll 4
    for (int j = 0; j < n; ++j) above += list[j] > rank;
    if (rank) store(rank, above);
  }
}

// The k best of this CTA to the first one. mine: the thread's best.
__device__ void send_best(const RowSlice& row, uint64_t mine, int k, const ChildrenShared& out) {
  RowShared& s = row.shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t to = shared_address(out.found + ptx::cluster_rank() * k);
  uint64_t top = warp_best(mine);
  if (lane == 0) s.warp_rank[warp] = top;
  if (threadIdx.x == 0) s.listed = 0;
  if (threadIdx.x < k) ptx::store_to(0, to + 8 * threadIdx.x, 0);
  __syncthreads();
  // As many columns as warps have a best that reaches it reach the floor: k at least.
  if (warp == 0) {
    const uint32_t key = lane < warps ? static_cast<uint32_t>(s.warp_rank[lane] >> 32) : 0;
    int reach = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) reach += __shfl_sync(kWarp, key, j) >= key;
    const uint32_t floor = __reduce_max_sync(kWarp, reach >= k ? key : 0u);
    if (lane == 0) s.threshold = floor;
  }
  __syncthreads();
  const uint32_t floor = s.threshold;
  for (int i = 0; i < k && top && static_cast<uint32_t>(top >> 32) >= floor; ++i) {
    if (lane == 0) out.list[atomicAdd(&s.listed, 1)] = top;
    if (mine == top) {
      mine = 0;
      for (int q = threadIdx.x; q < row.quads; q += blockDim.x) mine = max(mine, best_below(top, row.z[q], 4 * (row.first + q)));
    }
    top = warp_best(mine);
  }
  __syncthreads();
  place_ranks(out.list, s.listed, [&](uint64_t rank, int above) {
    if (above < k) ptx::store_to(0, to + 8 * above, rank);
  });
}

// The log-sum-exp of the row, by the first CTA; the result is the last thread's.
__device__ float row_lse(int blocks, const ChildrenShared& from, RowShared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t key = order_key(-infinity());
  for (int j = threadIdx.x; j < blocks; j += blockDim.x) key = max(key, order_key(bits_to_float(from.stats[j].x)));
  key = __reduce_max_sync(kWarp, key);
  if (lane == 0) s.warp_rank[warp] = key;
  __syncthreads();
  const float m = key_value(__reduce_max_sync(kWarp, lane < static_cast<int>(blockDim.x) / 32 ? static_cast<uint32_t>(s.warp_rank[lane]) : 0u));
  for (int j = threadIdx.x; j < blocks; j += blockDim.x)
    from.stats[j].y = float_to_bits(bits_to_float(from.stats[j].y) * exp_rn(bits_to_float(from.stats[j].x) - m));
  __syncthreads();
  if (threadIdx.x < blockDim.x - 1) return 0.0f;  // the others have the ranks
  float sum = 0.0f;
#pragma unroll 8
  for (int j = 0; j < blocks; ++j) sum = sum + bits_to_float(from.stats[j].y);
  return m > -infinity() ? canonical(m + log_rn(sum)) : m;
}

// By the first CTA, when all statistics and ranks are there.
__device__ void write_children(const DraftChildrenParams& p, int row_index, int blocks, const ChildrenShared& from, RowSlice& row) {
  __shared__ float lse;
  if (threadIdx.x < p.k) from.best[threadIdx.x] = 0;
  if (p.score) {
    const float all = row_lse(blocks, from, row.shared);
    if (threadIdx.x == blockDim.x - 1) lse = all;
  } else {
    __syncthreads();
  }
  place_ranks(from.found, row.ctas * p.k, [&](uint64_t rank, int above) {
    if (above < p.k) from.best[above] = rank;
  });
  __syncthreads();
  if (threadIdx.x >= p.k) return;
  bool usable = true;
  for (int c = 0; c < row.ctas; ++c) usable = usable && from.broken[c] == 0;
  if (from.best[0]) usable = usable && key_value(static_cast<uint32_t>(from.best[0] >> 32)) < infinity();
  const uint64_t rank = usable ? from.best[threadIdx.x] : 0;
  const int64_t at = static_cast<int64_t>(row_index) * p.k + threadIdx.x;
  p.token[at] = rank ? static_cast<int32_t>(token_of(p, rank_token(rank))) : -1;
  if (p.score) p.score[at] = rank ? canonical(key_value(static_cast<uint32_t>(rank >> 32)) - lse) : -infinity();
}

// Quads of the row in each CTA: whole blocks.
__host__ __device__ int part_quads(int columns, int ctas) { return ((columns + kLseBlock - 1) / kLseBlock + ctas - 1) / ctas * kBlockQuads; }

__global__ void __launch_bounds__(kMostThreads) draft_children_kernel(const __grid_constant__ DraftChildrenParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int used;  // columns that are tokens of the target's
  const int ctas = ptx::cluster_size(), rank = ptx::cluster_rank(), row_index = ptx::cluster_id(), warps = blockDim.x / 32;
  const int blocks = (p.columns + kLseBlock - 1) / kLseBlock, part = part_quads(p.columns, ctas), first = min(rank * part, blocks * kBlockQuads);
  RowSlice row{*reinterpret_cast<RowShared*>(memory), reinterpret_cast<float4*>(memory + kRowShared), first, min(part, blocks * kBlockQuads - first), ctas};
  ChildrenShared out;
  out.stats = reinterpret_cast<uint2*>(row.z + part);
  out.list = reinterpret_cast<uint64_t*>(out.stats + blocks);
  out.found = out.list + warps * p.k;
  out.broken = out.found + ctas * p.k;
  out.best = out.broken + ctas;
  ptx::launch_dependents();
  if (p.ids)  // a few are looked up at the end
    for (int c = 4 * first + 16 * threadIdx.x; c < min(4 * (first + row.quads), p.columns); c += 16 * blockDim.x) ptx::prefetch_l2(p.ids + c);
  if (threadIdx.x == 0) {  // nothing of this was written by a kernel
    init_bells(row);
    used = !p.ids ? min(p.columns, p.vocab) : p.ids[p.columns - 1] < p.vocab ? p.columns : first_at_least(p.ids, p.columns, p.vocab);
  }
  __syncthreads();
  if (p.slot_rows) ptx::grid_dependency_wait();
  const int rows = __ldcg(p.num_rows), request = __ldcg(p.row_request + row_index);  // from L2: see Row
  const bool in_use = row_index < rows;
  const int b = in_use ? request : 0;
  const Row of(p, row_index, b);
  if (!p.slot_rows) ptx::grid_dependency_wait();
  if (!in_use) return;            // the whole cluster
  ptx::cluster_arrive_relaxed();  // waited for before the first access to another CTA
  const bool finite = load_part(p, p.own(row_index), b, used, of, row);
  __syncwarp();
  ptx::cluster_wait();
  const Filters kept = filters_of(p, of, finite, row);
  const uint64_t mine = perturb(p, of, kept, out, row);
  send_best(row, mine, p.k, out);
  if (threadIdx.x == 0) ptx::store_to(0, shared_address(out.broken + rank), finite ? 0 : 1);
  __syncwarp();
  ptx::cluster_sync();
  if (rank == 0) write_children(p, row_index, blocks, out, row);
}

}  // namespace

void launch_draft_children_cuda(const DraftChildrenParams& p, void* stream) {
  // As sample_transform's.
  const bool few = p.rows * kMostCtas <= multiprocessors();
  const int threads = few ? 1024 : 512;
  auto shared_bytes = [&](int ctas) {
    const size_t blocks = (p.columns + kLseBlock - 1) / kLseBlock, ranks = threads / 32 * p.k + ctas * (p.k + 1) + p.k;
    return static_cast<int>(kRowShared + part_quads(p.columns, ctas) * sizeof(float4) + blocks * sizeof(uint2) + ranks * sizeof(uint64_t));
  };
  const int ctas = few || shared_bytes(7) > 110 * 1024 ? 8 : 7;
  launch({dim3(static_cast<unsigned>(p.rows * ctas)), dim3(threads), shared_bytes(ctas), static_cast<cudaStream_t>(stream), ctas, true}, draft_children_kernel, p);
}

}  // namespace specrt
