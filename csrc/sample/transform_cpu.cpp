// sample_transform: one row a thread, a few passes over a row that fits the cache. Top-k and top-p look at candidates only: a floor under the threshold
// is found from block maxima, and the threshold itself by radix selection (no sorting).
#include "sample/row_cpu.h"

namespace specrt {
namespace {

// A pass of the radix selection takes 11, 11, then 10 bits from the top.
constexpr int kRadixBins = 2048, kRadixShift[] = {21, 10, 0};
constexpr uint32_t kRadixMask[] = {2047, 2047, 1023};

struct Candidate {
  uint32_t key;
  int64_t weight;
};

// The largest key t for which the weights of keys >= t sum to at least `need`. Narrows the list to one bin a pass; 1 <= need <= the sum of weights.
uint32_t radix_threshold(std::vector<Candidate>& list, int64_t need) {
  int64_t bins[kRadixBins];
  uint32_t prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kRadixShift[pass];
    const uint32_t mask = kRadixMask[pass];
    std::fill(bins, bins + kRadixBins, 0);
    for (const Candidate& c : list) bins[(c.key >> shift) & mask] += c.weight;
    uint32_t bin = mask;
    for (; bin > 0 && bins[bin] < need; --bin) need -= bins[bin];
    prefix |= bin << shift;
    list.erase(std::remove_if(list.begin(), list.end(), [&](const Candidate& c) { return ((c.key >> shift) & mask) != bin; }), list.end());
  }
  return prefix;
}

SPECRT_CLONES void penalize_row(float* z, int n, const int32_t* count, const uint8_t* prompt, const float* table) {
  float f[kSamplingF];  // a copy that z cannot alias
  for (int i = 0; i < kSamplingF; ++i) f[i] = table[i];
  for (int v = 0; v < n; ++v) z[v] = penalize(z[v], count[v], prompt[v] != 0, f);
}

SPECRT_CLONES void mask_row(float* z, int n, const int32_t* bits) {
  for (int v = 0; v < n; ++v) z[v] = (static_cast<uint32_t>(bits[v >> 5]) >> (v & 31)) & 1u ? z[v] : -infinity();
}

SPECRT_CLONES void add_row(float* z, int n, const float* bias) {
  for (int v = 0; v < n; ++v) z[v] = z[v] + bias[v];
}

SPECRT_CLONES void divide_row(float* z, int n, float t) {
  for (int v = 0; v < n; ++v) z[v] = z[v] / t;
}

SPECRT_CLONES void keep_from(float* z, int n, float threshold) {
  for (int v = 0; v < n; ++v) z[v] = z[v] >= threshold ? z[v] : -infinity();
}

SPECRT_CLONES void min_p_row(float* z, int n, float max, float min_p) {
  for (int v = 0; v < n; ++v) z[v] = exp_rn(z[v] - max) >= min_p ? z[v] : -infinity();
}

SPECRT_CLONES float row_max(const float* z, int n) { return max_of(z, n); }
SPECRT_CLONES bool row_finite(const float* z, int n) { return all_finite(z, n); }

struct Masses {
  int64_t total, near;  // of the row; of the tokens at or above the floor
};
SPECRT_CLONES Masses row_masses(const float* z, int n, float max, float floor) {
  Masses m{0, 0};
  for (int v = 0; v < n; ++v) {
    const int64_t w = mass(z[v], max);
    m.total += w;
    m.near += z[v] >= floor ? w : 0;
  }
  return m;
}

// The tokens at or above the floor, with their masses.
SPECRT_CLONES void gather(const float* z, int n, float max, float floor, std::vector<Candidate>& list) {
  list.clear();
  int64_t weight[kLanes];
  for (int i = 0; i < n; i += kLanes) {
    const int m = std::min(kLanes, n - i);
    if (max_of(z + i, m) < floor) continue;
    for (int l = 0; l < m; ++l) weight[l] = mass(z[i + l], max);
    for (int l = 0; l < m; ++l)
      if (z[i + l] >= floor) list.push_back({order_key(z[i + l]), weight[l]});
  }
}

void top_k_row(float* z, int n, int k) {
  std::vector<Candidate> list;
  for (uint64_t rank : top_candidates(z, n, k)) list.push_back({static_cast<uint32_t>(rank >> 32), 1});
  if (static_cast<int>(list.size()) >= k) keep_from(z, n, key_value(radix_threshold(list, k)));
}

// The set rarely reaches further than e^-8 below the maximum; where it does, every token with mass is a candidate.
void top_p_row(float* z, int n, float max, float top_p) {
  float floor = max - 8.0f;
  const Masses m = row_masses(z, n, max, floor);
  const int64_t need = needed_mass(top_p, m.total);
  if (m.near < need) floor = max - 28.0f;  // exp(-28) 2^40 < 1
  thread_local std::vector<Candidate> list;  // as large as the vocabulary for a flat row: kept, not allocated anew for each
  gather(z, n, max, floor, list);
  keep_from(z, n, key_value(radix_threshold(list, need)));
}

// Tokens of the row's path that are not counted in output_count yet: the node and its ancestors, but for the root. Penalties are a function of the raw
// logit and the count, so the row is done with output_count and the path's tokens are done again with their own counts.
struct Path {
  int size = 0;
  int32_t token[64];
  float raw[64];
};

Path row_path(const SampleTransformParams& p, int64_t row, int64_t b, const float* z) {
  Path path;
  if (!p.row_node) return path;
  const int32_t* token = p.tree_token + b * p.nodes;
  const uint64_t word = static_cast<uint64_t>(p.tree_ancestors[b * p.nodes + p.row_node[row]]);
  for (int j = 1; j < p.nodes; ++j)
    if ((word >> j) & 1u && token[j] >= 0 && token[j] < p.vocab) {
      path.token[path.size] = token[j];
      path.raw[path.size++] = z[token[j]];
    }
  return path;
}

RowStatus transform_row(const SampleTransformParams& p, int64_t row) {
  const int64_t b = p.row_request[row], base = b * p.vocab;
  const int n = p.vocab;
  const float* f = p.sampling_f + b * kSamplingF;
  const int32_t* i = p.sampling_i + b * kSamplingI;
  float* z = p.logits + row * n;
  if (!row_finite(z, n)) return kStatusNotFinite;
  if (i[kHasPenalty]) {
    const Path path = row_path(p, row, b, z);
    penalize_row(z, n, p.output_count + base, p.prompt_mask + base, f);
    for (int j = 0; j < path.size; ++j) {
      const int32_t v = path.token[j];
      const int32_t count = p.output_count[base + v] + static_cast<int32_t>(std::count(path.token, path.token + path.size, v));
      z[v] = penalize(path.raw[j], count, p.prompt_mask[base + v] != 0, f);
    }
  }
  const int32_t* mask = p.mask_bits && p.row_mask[row] >= 0 ? p.mask_bits + static_cast<int64_t>(p.row_mask[row]) * ((n + 31) / 32) : nullptr;
  return adjust_row(z, n, {f, i, p.bias + base, p.stop_ids + b * p.stops, mask, p.stops, p.row_position[row] + 1});
}

}  // namespace

RowStatus adjust_row(float* z, int n, const Adjustments& a) {
  const float* f = a.f;
  const int32_t* i = a.i;
  if (i[kHasBias]) add_row(z, n, a.bias);
  if (a.position - i[kPromptLen] < i[kMinTokens])
    for (int s = 0; s < a.stops; ++s) {
      const int32_t v = a.stop_ids[s];
      if (v >= 0 && v < n) z[v] = -infinity();
    }
  if (a.mask) mask_row(z, n, a.mask);
  const float t = f[kTemperature];
  const bool scaled = t > 0.0f && t != 1.0f;
  if (scaled) divide_row(z, n, t);
  const float max = row_max(z, n);
  if (!(max > -infinity())) return kStatusAllMasked;
  if (max == infinity()) return kStatusNotFinite;
  if (!(t > 0.0f)) return kStatusOk;
  if (i[kTopK] > 0 && i[kTopK] < n) top_k_row(z, n, i[kTopK]);
  if (f[kTopP] < 1.0f) top_p_row(z, n, max, f[kTopP]);
  if (f[kMinP] > 0.0f) min_p_row(z, n, max, f[kMinP]);
  return kStatusOk;
}

void launch_sample_transform_cpu(const SampleTransformParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  parallel_for(n, n * p.vocab * 8, [&](int64_t row) { p.status[row] = transform_row(p, row); });
  if (!p.token) return;
  launch_sample_exact_cpu({p.logits, p.row_request, p.row_position, p.seeds, p.sampling_f, p.num_rows, p.token, p.rows, p.vocab});
  for (int64_t row = 0; row < n; ++row)
    if (p.status[row] != kStatusOk) p.token[row] = 0;
}

}  // namespace specrt
