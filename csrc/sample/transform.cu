// sample_transform: one block a row, in place. Top-k and top-p thresholds by bisection over the order-preserving keys: each step is one
// pass that sums integers; as soon as the keys that are still possible fit shared memory they are gathered there and the row is left alone.
#include "sample/block.cuh"

namespace specrt {
namespace {

constexpr int kListed = 2048;
struct KeyList {
  uint32_t key[kListed];
  int64_t weight[kListed];
  int count;
};

// The largest key t for which the weights of keys >= t sum to at least `need`, of the tokens above -inf; 1 <= need <= the sum of their weights.
template <typename Weight> __device__ uint32_t block_threshold(const float* z, int n, int64_t need, KeyList& list, Weight weight) {
  uint32_t lo = order_key(-infinity()) + 1, hi = order_key(infinity());  // lo reaches `need`, hi does not
  int64_t above = 0, inside = n;  // weight of the keys >= hi; at least the number of keys in [lo, hi)
  while (hi - lo > 1 && inside > kListed) {
    const uint32_t mid = lo + (hi - lo) / 2;
    int64_t w = 0, c = 0;
    for (int v = threadIdx.x; v < n; v += kThreads) {
      const uint32_t k = order_key(z[v]);
      if (k >= mid && k < hi) w += weight(z[v]), ++c;
    }
    w = block_sum(w);
    c = block_sum(c);
    if (above + w >= need) lo = mid, inside = c;
    else hi = mid, above += w, inside -= c;
  }
  if (hi - lo == 1) return lo;
  if (threadIdx.x == 0) list.count = 0;
  __syncthreads();
  for (int v = threadIdx.x; v < n; v += kThreads) {
    const uint32_t k = order_key(z[v]);
    if (k >= lo && k < hi) {
      const int i = atomicAdd(&list.count, 1);
      list.key[i] = k;
      list.weight[i] = weight(z[v]);
    }
  }
  __syncthreads();
  while (hi - lo > 1) {
    const uint32_t mid = lo + (hi - lo) / 2;
    int64_t w = 0;
    for (int i = threadIdx.x; i < list.count; i += kThreads)
      if (list.key[i] >= mid && list.key[i] < hi) w += list.weight[i];
    w = block_sum(w);
    if (above + w >= need) lo = mid;
    else hi = mid, above += w;
  }
  __syncthreads();  // the list may be filled again
  return lo;
}

__device__ void keep_from(float* z, int n, float threshold) {
  for (int v = threadIdx.x; v < n; v += kThreads)
    if (!(z[v] >= threshold)) z[v] = -infinity();
  __syncthreads();
}

__device__ void penalize_row(const SampleTransformParams& p, int row, int64_t b, float* z, const float* f) {
  // The path's tokens (without the root, which output_count has), and their raw logits.
  __shared__ int32_t path_token[64];
  __shared__ float path_raw[64];
  const int n = p.vocab, j = threadIdx.x;
  const int32_t* count = p.output_count + b * n;
  const uint8_t* prompt = p.prompt_mask + b * n;
  if (j < 64) {
    int32_t token = -1;
    if (p.row_node && j >= 1 && j < p.nodes && ((static_cast<uint64_t>(p.tree_ancestors[b * p.nodes + p.row_node[row]]) >> j) & 1u))
      token = p.tree_token[b * p.nodes + j];
    if (token >= n) token = -1;
    path_token[j] = token;
    if (token >= 0) path_raw[j] = z[token];
  }
  __syncthreads();
  for (int v = threadIdx.x; v < n; v += kThreads) z[v] = penalize(z[v], count[v], prompt[v] != 0, f);
  __syncthreads();
  if (j < 64 && path_token[j] >= 0) {
    const int32_t v = path_token[j];
    int32_t c = count[v];
    for (int i = 0; i < 64; ++i) c += path_token[i] == v ? 1 : 0;
    z[v] = penalize(path_raw[j], c, prompt[v] != 0, f);  // the same value from every node with this token
  }
  __syncthreads();
}

__device__ int transform_row(const SampleTransformParams& p, int row) {
  __shared__ KeyList list;
  const int n = p.vocab;
  const int64_t b = p.row_request[row];
  const float* f = p.sampling_f + b * kSamplingF;
  const int32_t* i = p.sampling_i + b * kSamplingI;
  float* z = p.logits + static_cast<int64_t>(row) * n;
  bool bad = false;
  for (int v = threadIdx.x; v < n; v += kThreads) bad |= !finite_bits(float_to_bits(z[v]));
  if (__syncthreads_or(bad)) return kStatusNotFinite;
  if (i[kHasPenalty]) penalize_row(p, row, b, z, f);
  const float t = f[kTemperature];
  const bool scaled = t > 0.0f && t != 1.0f;
  const float* bias = i[kHasBias] ? p.bias + b * n : nullptr;
  const int32_t* mask = p.mask_bits && p.row_mask[row] >= 0 ? p.mask_bits + static_cast<int64_t>(p.row_mask[row]) * ((n + 31) / 32) : nullptr;
  if (bias || mask || scaled)
    for (int v = threadIdx.x; v < n; v += kThreads) {
      float x = z[v];
      if (bias) x = x + bias[v];
      if (mask && !((static_cast<uint32_t>(mask[v >> 5]) >> (v & 31)) & 1u)) x = -infinity();
      if (scaled) x = x / t;
      z[v] = x;
    }
  __syncthreads();
  if (p.row_position[row] + 1 - i[kPromptLen] < i[kMinTokens])  // -inf commutes with all of the above
    for (int s = threadIdx.x; s < p.stops; s += kThreads) {
      const int32_t v = p.stop_ids[b * p.stops + s];
      if (v >= 0 && v < n) z[v] = -infinity();
    }
  __syncthreads();
  const float max = block_row_max(z, n);
  if (!(max > -infinity())) return kStatusAllMasked;
  if (max == infinity()) return kStatusNotFinite;
  if (!(t > 0.0f)) return kStatusOk;
  if (i[kTopK] > 0 && i[kTopK] < n) {
    int64_t possible = 0;
    for (int v = threadIdx.x; v < n; v += kThreads) possible += z[v] > -infinity() ? 1 : 0;
    if (block_sum(possible) >= i[kTopK]) keep_from(z, n, key_value(block_threshold(z, n, i[kTopK], list, [](float) -> int64_t { return 1; })));
  }
  if (f[kTopP] < 1.0f) {
    const auto weight = [max](float x) { return mass(x, max); };
    int64_t total = 0;
    for (int v = threadIdx.x; v < n; v += kThreads) total += weight(z[v]);
    total = block_sum(total);
    keep_from(z, n, key_value(block_threshold(z, n, needed_mass(f[kTopP], total), list, weight)));
  }
  if (f[kMinP] > 0.0f)
    for (int v = threadIdx.x; v < n; v += kThreads)
      if (!(exp_rn(z[v] - max) >= f[kMinP])) z[v] = -infinity();
  return kStatusOk;
}

__global__ void __launch_bounds__(kThreads, 1) sample_transform_kernel(SampleTransformParams p) {
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const int status = transform_row(p, row);
  if (threadIdx.x == 0) p.status[row] = status;
}

}  // namespace

void launch_sample_transform_cuda(const SampleTransformParams& p, void* stream) {
  sample_transform_kernel<<<p.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt
