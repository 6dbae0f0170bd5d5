// sample_transform: a cluster of 8 CTAs a row. The logits are read from memory once, into shared memory; penalties to filters and the choice of the token run
// there; the row is written back once, where it changed and somebody wants it. No sort: thresholds by histograms (cluster.cuh).
#include "base/launch.h"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "sample/cluster.cuh"

namespace specrt {
namespace {

// What is done to one logit before the filters: penalties, bias, mask, temperature.
struct Adjust {
  const int32_t* count;   // [V] or null: no penalty
  const uint8_t* prompt;  // [V]
  const float* bias;      // [V] or null
  const int32_t* mask;    // [ceil(V/32)] or null
  const float* f;         // the slot's row of sampling_f
  float temperature;
  bool scaled;

  __device__ Adjust(const SampleTransformParams& p, int row, int64_t b) : f(p.sampling_f + b * kSamplingF), temperature(f[kTemperature]) {
    const int32_t* i = p.sampling_i + b * kSamplingI;
    count = i[kHasPenalty] ? p.output_count + b * p.vocab : nullptr;
    prompt = p.prompt_mask + b * p.vocab;
    bias = i[kHasBias] ? p.bias + b * p.vocab : nullptr;
    mask = p.mask_bits && p.row_mask[row] >= 0 ? p.mask_bits + static_cast<int64_t>(p.row_mask[row]) * ((p.vocab + 31) / 32) : nullptr;
    scaled = temperature > 0.0f && temperature != 1.0f;
  }
  __device__ bool any() const { return count || bias || mask || scaled; }

  // `more`: occurrences of the token that output_count does not have.
  __device__ float operator()(float x, int v, int more) const {
    if (count) x = penalize(x, count[v] + more, prompt[v] != 0, f);
    if (bias) x = x + bias[v];
    if (mask && !((static_cast<uint32_t>(mask[v >> 5]) >> (v & 31)) & 1u)) x = -infinity();
    return scaled ? x / temperature : x;
  }
};

// Copies this CTA's part of the row to shared memory; each thread its own quads, which it may read at once.
template <bool kVector> __device__ void load_slice(const RowSlice& row, const float* logits, int n) {
  for (int q = threadIdx.x; q < row.quads; q += kRowThreads) {
    const int v = 4 * (row.first + q);
    if constexpr (kVector) {
      ptx::cp_async_16(shared_address(row.z + q), logits + v, true);
    } else {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = v + e < n ? logits[v + e] : -infinity();
      row.z[q] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
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

// The tokens of the row's path, which output_count does not have (but for the root, which it has): their raw logits are kept until the pass over the row is
// done, then done again with their own counts.
__device__ void hold_path(const SampleTransformParams& p, int row_index, int64_t b, RowSlice& row) {
  const int j = threadIdx.x;
  __syncthreads();  // the raw logits are there
  if (j < 64) {
    int32_t token = -1;
    if (j >= 1 && j < p.nodes && ((static_cast<uint64_t>(p.tree_ancestors[b * p.nodes + p.row_node[row_index]]) >> j) & 1u)) token = p.tree_token[b * p.nodes + j];
    if (token >= p.vocab) token = -1;
    row.shared.path_token[j] = token;
    if (token >= 0 && row.has(token)) row.shared.path_raw[j] = row.at(token);
  }
  __syncthreads();
}

__device__ void redo_path(const Adjust& adjust, RowSlice& row) {
  const int j = threadIdx.x;
  __syncthreads();
  if (j >= 64) return;
  const int32_t v = row.shared.path_token[j];
  if (v < 0 || !row.has(v)) return;
  int more = 0;
  for (int i = 0; i < 64; ++i) more += row.shared.path_token[i] == v ? 1 : 0;
  row.at(v) = adjust(row.shared.path_raw[j], v, more);  // the same value from every node with this token
}

struct Best {
  float value = -infinity();
  int32_t token = -1;

  __device__ void see(float x, int v) {  // tokens ascending
    if (x > value) value = x, token = v;
  }
  __device__ uint64_t rank() const { return token < 0 ? 0 : rank_of(value, token); }
};

constexpr uint64_t kBadRank = ~uint64_t{0};  // above every rank: some logit is not finite

// Finiteness, adjustment and argmax in one pass; kBadRank if a raw logit of the row is not finite.
template <bool kVector> __device__ uint64_t adjust_row(const SampleTransformParams& p, int row_index, int64_t b, const Adjust& adjust, RowSlice& row) {
  const int n = p.vocab;
  const int32_t* i = p.sampling_i + b * kSamplingI;
  const bool path = adjust.count && p.row_node, stops = p.row_position[row_index] + 1 - i[kPromptLen] < i[kMinTokens];
  if (path) hold_path(p, row_index, b, row);
  bool bad = false;
  Best best;
  for (int q = threadIdx.x; q < row.quads; q += kRowThreads) {
    const float4 raw = row.z[q];
    float x[4] = {raw.x, raw.y, raw.z, raw.w};
    const int v = 4 * (row.first + q);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!kVector && v + e >= n) continue;
      bad |= !finite_bits(float_to_bits(x[e]));
      x[e] = adjust(x[e], v + e, 0);
      best.see(x[e], v + e);
    }
    if (adjust.any()) row.z[q] = make_float4(x[0], x[1], x[2], x[3]);
  }
  if (path) redo_path(adjust, row);
  __syncthreads();
  if (stops)  // -inf commutes with all that was done
    for (int s = threadIdx.x; s < p.stops; s += kRowThreads) {
      const int32_t v = p.stop_ids[b * p.stops + s];
      if (v >= 0 && v < n && row.has(v)) row.at(v) = -infinity();
    }
  if (path || stops) {
    __syncthreads();
    best = Best();
    row.each([&](float x, int v) { best.see(x, v); });
  }
  return bad ? kBadRank : best.rank();
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
  for (int q = threadIdx.x; q < row.quads; q += kRowThreads) {
    const float4 raw = row.z[q];
    float x[4] = {raw.x, raw.y, raw.z, raw.w}, top = -infinity();
    const int v = 4 * (row.first + q);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(x[e] >= f.cut) || (f.min_p > 0.0f && !(exp_rn(x[e] - f.max) >= f.min_p))) x[e] = -infinity();
      top = x[e] > top ? x[e] : top;
    }
    if (f.write) store_quad<kVector>(logits, v, n, x);
    // Scores below `bound` cannot win, so most noise is never made: G < kGumbelMax; and since E = -log1p(-W) >= W, a score reaches the bound only where
    // W <= exp(z - bound), up to roundings that the slack covers many times.
    if (!f.draw || !(top > -infinity() && top + kGumbelMax >= bound)) continue;
    uint32_t words[4];
    noise_words(f.seed, f.position, kNoiseShared, row.first + q, words);
    const float reach = bound - (0.01f + fabsf(bound) * 1e-6f);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(x[e] > -infinity()) || static_cast<float>(words[e]) * 2.3283064365386963e-10f > __expf(x[e] - reach)) continue;
      const float score = x[e] + gumbel(words[e]);
      const uint64_t rank = rank_of(score, v + e);
      if (rank > best) best = rank;
      bound = score > bound ? score : bound;
    }
  }
  return best;
}

template <bool kVector> __global__ void __launch_bounds__(kRowThreads, 2) sample_transform_kernel(SampleTransformParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int row_index = blockIdx.x / kCtas;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (row_index >= *p.num_rows) return;  // the whole cluster
  ptx::cluster_arrive();                 // waited for before the first access to another CTA
  const int n = p.vocab, quads = (n + 3) / 4, part = (quads + kCtas - 1) / kCtas, first = min(static_cast<int>(ptx::cluster_rank()) * part, quads);
  RowSlice row{*reinterpret_cast<RowShared*>(memory), reinterpret_cast<float4*>(memory + kRowShared), first, min(part, quads - first)};
  float* logits = p.logits + static_cast<int64_t>(row_index) * n;
  load_slice<kVector>(row, logits, n);

  const int64_t b = p.row_request[row_index];
  const Adjust adjust(p, row_index, b);
  const uint64_t mine = adjust_row<kVector>(p, row_index, b, adjust, row);
  ptx::cluster_wait();
  const uint64_t best = cluster_best(row.shared, 0, mine);
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
  const float* f = adjust.f;
  const int32_t* i = p.sampling_i + b * kSamplingI;
  const bool random = status == kStatusOk && adjust.temperature > 0.0f;
  const bool top_k = random && i[kTopK] > 0 && i[kTopK] < n, top_p = random && f[kTopP] < 1.0f, draw = random && p.token;

  Finish end{max, -infinity(), random ? f[kMinP] : 0.0f, false, draw, 0, 0, -infinity()};
  const float lowest = key_value(order_key(-infinity()) + 1);
  if (top_k) {
    const int64_t k = i[kTopK];
    end.cut = cluster_threshold(row, max, lowest, [](float) -> int64_t { return 1; }, [k](int64_t possible) { return possible >= k ? k : 0; });
  }
  if (top_p) {
    const float p_value = f[kTopP];
    end.cut = cluster_threshold(row, max, top_k ? end.cut : lowest, [max](float x) { return mass(x, max); },
                                [p_value](int64_t total) { return needed_mass(p_value, total); });
  }
  const bool stops = p.row_position[row_index] + 1 - i[kPromptLen] < i[kMinTokens];
  end.write = p.keep && (adjust.any() || stops || top_k || top_p || end.min_p > 0.0f);
  const int32_t greedy = ::max(rank_token(best), 0);
  if (draw) {
    end.seed = p.seeds[b];
    end.position = p.row_position[row_index] + 1;
    end.floor = max + gumbel_noise(end.seed, end.position, greedy, kNoiseShared);
  }
  uint64_t chosen = 0;
  if (end.write || draw) chosen = finish_row<kVector>(row, logits, n, end);
  if (draw) chosen = cluster_best(row.shared, 1, chosen);
  else if (top_k || top_p) ptx::cluster_sync();  // no CTA ends while another may still read its histogram
  if (!writer) return;
  p.status[row_index] = status;
  if (p.token) p.token[row_index] = status != kStatusOk ? 0 : draw ? ::max(rank_token(chosen), 0) : greedy;
}

}  // namespace

void launch_sample_transform_cuda(const SampleTransformParams& p, void* stream) {
  const int part = ((p.vocab + 3) / 4 + kCtas - 1) / kCtas, bytes = static_cast<int>(kRowShared) + part * static_cast<int>(sizeof(float4));
  const bool vector = p.vocab % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
  launch({dim3(static_cast<unsigned>(p.rows) * kCtas), dim3(kRowThreads), bytes, static_cast<cudaStream_t>(stream), kCtas, true},
         vector ? sample_transform_kernel<true> : sample_transform_kernel<false>, p);
}

}  // namespace specrt
