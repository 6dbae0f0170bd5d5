// sample_transform: a cluster of 7 or 8 CTAs a row. The logits are read from memory once: penalties, bias, mask and temperature on their way to shared memory, filters and the
// choice of the token there; the row is written back once, where it changed and somebody wants it. No sort: thresholds by histograms (cluster.cuh).
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "ptx/prefetch.cuh"
#include "sample/cluster.cuh"

namespace specrt {
namespace {

// What is done to a logit before the filters: penalties, bias, mask, temperature.
struct Adjust {
  const int32_t* count;   // [V] or null: no penalty
  const uint8_t* prompt;  // [V]
  const float* bias;      // [V] or null
  const int32_t* mask;    // [ceil(V/32)] or null
  const float* f;         // the slot's row of sampling_f
  float temperature;
  bool scaled;
  Divide divide;

  __device__ Adjust(const SampleTransformParams& p, int row, int b) : f(p.sampling_f + b * kSamplingF), temperature(f[kTemperature]), divide(f[kTemperature]) {
    const int32_t* i = p.sampling_i + b * kSamplingI;
    const int64_t first = static_cast<int64_t>(b) * p.vocab;
    count = i[kHasPenalty] ? p.output_count + first : nullptr;
    prompt = p.prompt_mask + first;
    bias = i[kHasBias] ? p.bias + first : nullptr;
    mask = p.mask_bits && p.row_mask[row] >= 0 ? p.mask_bits + static_cast<int64_t>(p.row_mask[row]) * ((p.vocab + 31) / 32) : nullptr;
    scaled = temperature > 0.0f && temperature != 1.0f;
  }
  __device__ bool before_temperature() const { return count || bias || mask; }
  __device__ bool any() const { return before_temperature() || scaled; }

  // `more`: occurrences of the token that output_count does not have.
  __device__ float operator()(float x, int v, int more) const {
    if (count) x = penalize(x, count[v] + more, prompt[v] != 0, f);
    if (bias) x = x + bias[v];
    if (mask && !((static_cast<uint32_t>(mask[v >> 5]) >> (v & 31)) & 1u)) x = -infinity();
    return scaled ? x / temperature : x;
  }
};

template <bool kVector> __device__ void load_quad(const float* logits, int v, int n, float (&x)[4]) {
  if constexpr (kVector) {
    const float4 quad = *reinterpret_cast<const float4*>(logits + v);
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = v + e < n ? logits[v + e] : -infinity();
  }
}

template <bool kVector> __device__ void store_quad(float* logits, int v, int n, const float (&x)[4]) {
  if constexpr (kVector) {
    *reinterpret_cast<float4*>(logits + v) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (v + e < n) logits[v + e] = x[e];
  }
}

// The tokens of the row's path, which output_count does not have (but for the root, which it has), are done again with their own counts.
__device__ void redo_path(const SampleTransformParams& p, int row_index, int b, const Adjust& adjust, const float* logits, RowSlice& row) {
  const int j = threadIdx.x;
  int32_t token = -1;
  if (j < 64) {
    if (j >= 1 && j < p.nodes && ((static_cast<uint64_t>(p.tree_ancestors[b * p.nodes + p.row_node[row_index]]) >> j) & 1u)) token = p.tree_token[b * p.nodes + j];
    if (token >= p.vocab) token = -1;
    row.shared.path_token[j] = token;
  }
  __syncthreads();
  if (token < 0 || !row.has(token)) return;
  int more = 0;
  for (int i = 0; i < 64; ++i) more += row.shared.path_token[i] == token ? 1 : 0;
  row.at(token) = adjust(logits[token], token, more);  // the same value from every node with this token
}

// The best logit of a thread's quads, ascending.
struct Best {
  float value = -infinity();
  int quad = -1;

  __device__ void see(const float (&x)[4], int q) {
    const float top = highest_of(x);
    if (top > value) value = top, quad = q;
  }
  __device__ uint64_t rank(const RowSlice& row) const {
    if (quad < 0) return 0;
    const float4 x = row.z[quad];
    return rank_of(value, 4 * (row.first + quad) + (x.x == value ? 0 : x.y == value ? 1 : x.z == value ? 2 : 3));
  }
};

// One pass over the logits into shared memory: change(quad, its first token); returns 0, or NaN if a raw logit is not finite. Each thread loads `Batch` quads at once.
template <bool kVector, int Batch, typename Change> __device__ __forceinline__ float first_pass(const RowSlice& row, const float* logits, int n, Best& best, Change&& change) {
  float zeros = 0.0f;  // the sum of 0 * x
  const int threads = blockDim.x;
  for (int begin = threadIdx.x; begin < row.quads; begin += Batch * threads) {
    float raw[Batch][4];
#pragma unroll
    for (int i = 0; i < Batch; ++i)
      if (const int q = begin + i * threads; q < row.quads) load_quad<kVector>(logits, 4 * (row.first + q), n, raw[i]);
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      const int q = begin + i * threads, v = 4 * (row.first + q);
      if (q >= row.quads) break;
      float(&x)[4] = raw[i];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (kVector || v + e < n) zeros = fma_rn(x[e], 0.0f, zeros);
      change(x, v);
      best.see(x, q);
      row.z[q] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  return zeros;
}

// Finiteness, adjustment and argmax (kBadRank if a raw logit of this part is not finite). Returns whether anything was to be changed.
template <bool kVector> __device__ bool adjust_row(const SampleTransformParams& p, int row_index, int b, const float* logits, RowSlice& row, uint64_t& rank) {
  const int n = p.vocab;
  const Adjust adjust(p, row_index, b);
  const int32_t* i = p.sampling_i + b * kSamplingI;
  const bool path = adjust.count && p.row_node, stops = p.row_position[row_index] + 1 - i[kPromptLen] < i[kMinTokens];
  Best best;
  float zeros;
  if (adjust.before_temperature()) {
    zeros = first_pass<kVector, 1>(row, logits, n, best, [&](float(&x)[4], int v) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (kVector || v + e < n) x[e] = adjust(x[e], v + e, 0);
    });
  } else {
    zeros = first_pass<kVector, kVector ? 3 : 1>(row, logits, n, best, [&](float(&x)[4], int) {
      if (adjust.scaled) adjust.divide(x);
    });
  }
  if (path) {
    __syncthreads();
    redo_path(p, row_index, b, adjust, logits, row);
  }
  if (stops) {  // -inf commutes with all that was done
    __syncthreads();
    for (int s = threadIdx.x; s < p.stops; s += blockDim.x) {
      const int32_t v = p.stop_ids[b * p.stops + s];
      if (v >= 0 && v < n && row.has(v)) row.at(v) = -infinity();
    }
  }
  if (path || stops) {
    __syncthreads();
    best = Best();
    for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {
      const float4 quad = row.z[q];
      best.see({quad.x, quad.y, quad.z, quad.w}, q);
    }
  }
  rank = zeros == 0.0f ? best.rank(row) : kBadRank;
  return adjust.any() || stops;
}

// The last pass: filters, writes the row where `write`, and returns this thread's best of z + G where `draw`. `floor`: the score of some token that is kept.
struct Finish {
  float max, cut, min_p;
  bool write, draw;
  int64_t seed;
  int32_t position;
  float floor;
};
template <bool kVector> __device__ uint64_t finish_row(const RowSlice& row, float* logits, int n, const Finish& f) {
  float bound = f.floor;
  uint64_t best = 0;
  for (int q = threadIdx.x; q < row.quads; q += blockDim.x) {
    const float4 raw = row.z[q];
    float x[4] = {raw.x, raw.y, raw.z, raw.w};
    const int v = 4 * (row.first + q);
#pragma unroll
    for (float& z : x) z = z >= f.cut ? z : -infinity();
    if (f.min_p > 0.0f)
#pragma unroll
      for (float& z : x) z = exp_rn(z - f.max) >= f.min_p ? z : -infinity();
    const float top = highest_of(x);
    if (f.write) store_quad<kVector>(logits, v, n, x);
    if (!f.draw || !(top > -infinity() && top + kGumbelMax >= bound)) continue;
    uint32_t words[4];
    noise_words(f.seed, f.position, kNoiseShared, row.first + q, words);
    const float reach = noise_reach(bound);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(x[e] > -infinity()) || !word_reaches(words[e], x[e], reach)) continue;
      const float score = x[e] + gumbel(words[e]);
      const uint64_t rank = rank_of(score, v + e);
      if (rank > best) best = rank;
      bound = score > bound ? score : bound;
    }
  }
  return best;
}

template <bool kVector> __global__ void __launch_bounds__(kMostThreads) sample_transform_kernel(SampleTransformParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int ctas = ptx::cluster_size(), row_index = ptx::cluster_id();
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int rows = *p.num_rows, b = p.row_request[row_index];  // both at once
  if (row_index >= rows) return;                               // the whole cluster
  const int n = p.vocab, quads = (n + 3) / 4, part = (quads + ctas - 1) / ctas, first = min(static_cast<int>(ptx::cluster_rank()) * part, quads);
  RowSlice row{*reinterpret_cast<RowShared*>(memory), reinterpret_cast<float4*>(memory + kRowShared), first, min(part, quads - first), ctas};
  float* logits = p.logits + static_cast<int64_t>(row_index) * n;
  for (int v = 4 * first + 32 * threadIdx.x; v < min(4 * (first + row.quads), n); v += 32 * blockDim.x) ptx::prefetch_l2(logits + v);  // while the parameters are read
  if (threadIdx.x == 0) init_bells(row);
  __syncwarp();
  ptx::cluster_arrive_relaxed();  // waited for before the first access to another CTA
  uint64_t mine;
  const bool changed = adjust_row<kVector>(p, row_index, b, logits, row, mine);
  ptx::cluster_wait();
  const uint64_t best = cluster_best(row, 0, mine);
  const bool writer = ptx::cluster_rank() == 0 && threadIdx.x == 0;
  if (best == kBadRank) {
    if (writer) {
      p.status[row_index] = kStatusNotFinite;
      if (p.token) p.token[row_index] = 0;
    }
    return;
  }
  const float max = best ? key_value(static_cast<uint32_t>(best >> 32)) : -infinity();
  const RowStatus status = !best ? kStatusAllMasked : max == infinity() ? kStatusNotFinite : kStatusOk;
  const float* f = p.sampling_f + b * kSamplingF;
  const int32_t* i = p.sampling_i + b * kSamplingI;
  const bool random = status == kStatusOk && f[kTemperature] > 0.0f;

  float cut = key_value(order_key(-infinity()) + 1);
  bool searched = false;
  if (random && i[kTopK] > 0 && i[kTopK] < n) {
    const int64_t k = i[kTopK];
    cut = cluster_threshold(row, max, cut, [](float) -> int64_t { return 1; }, [k](int64_t possible) { return possible >= k ? k : 0; });
    searched = true;
  }
  if (random && f[kTopP] < 1.0f) {
    const float p_value = f[kTopP];
    cut = cluster_threshold(row, max, cut, [max](float x) { return mass(x, max); }, [p_value](int64_t total) { return needed_mass(p_value, total); });
    searched = true;
  }
  const bool draw = random && p.token;
  Finish end{max, cut, random ? f[kMinP] : 0.0f, false, draw, 0, 0, -infinity()};
  end.write = p.keep && (changed || searched || end.min_p > 0.0f);
  const int32_t greedy = ::max(rank_token(best), 0);
  if (draw) {
    end.seed = p.seeds[b];
    end.position = p.row_position[row_index] + 1;
    end.floor = max + gumbel_noise(end.seed, end.position, greedy, kNoiseShared);
  }
  uint64_t chosen = 0;
  if (end.write || draw) chosen = finish_row<kVector>(row, logits, n, end);
  if (draw) chosen = cluster_best(row, 1, chosen);
  else if (searched) ptx::cluster_sync();  // no CTA ends while another may still read its histogram
  if (!writer) return;
  p.status[row_index] = status;
  if (p.token) p.token[row_index] = status != kStatusOk ? 0 : draw ? ::max(rank_token(chosen), 0) : greedy;
}

}  // namespace

void launch_sample_transform_cuda(const SampleTransformParams& p, void* stream) {
  // Where the rows are few, a CTA has an SM to itself. Else two share one: an H100's GPCs have 14 to 18 SMs, where 30 clusters of 8 fit at a time, and 36 of 7.
  const bool few = p.rows * kMostCtas <= multiprocessors();
  const int quads = (p.vocab + 3) / 4;
  auto shared_bytes = [&](int ctas) { return static_cast<int>(kRowShared) + (quads + ctas - 1) / ctas * static_cast<int>(sizeof(float4)); };
  const int ctas = few || shared_bytes(7) > 110 * 1024 ? 8 : 7;
  const bool vector = p.vocab % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
  launch({dim3(static_cast<unsigned>(p.rows * ctas)), dim3(few ? 1024 : 512), shared_bytes(ctas), static_cast<cudaStream_t>(stream), ctas, true},
         vector ? sample_transform_kernel<true> : sample_transform_kernel<false>, p);
}

}  // namespace specrt
