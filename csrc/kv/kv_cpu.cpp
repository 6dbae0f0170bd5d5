#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/math.h"
#include "base/parallel.h"
#include "kv/params.h"

namespace specrt {
namespace {

// One q or k head: optional RMSNorm, then the rotation. cos/sin [D/2]; scale: of what is stored as e4m3.
template <typename T, typename KV>
SPECRT_CLONES void rotate_head(const T* x, const T* norm, float eps, const float* cos, const float* sin, float scale, KV* out, int dim) {
  float r = 1.0f;
  if (norm) {
    float lane[32] = {};
    for (int i = 0; i < dim; ++i) lane[i % 32] = fma_rn(to_float(x[i]), to_float(x[i]), lane[i % 32]);
    for (int d = 16; d; d >>= 1)
      for (int l = 0; l < d; ++l) lane[l] = lane[l] + lane[l + d];
    r = 1.0f / std::sqrt(lane[0] / static_cast<float>(dim) + eps);
  }
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    float x1 = to_float(x[i]), x2 = to_float(x[i + half]);
    if (norm) {
      x1 = to_float(round_to<T>(to_float(round_to<T>(x1 * r)) * to_float(norm[i])));
      x2 = to_float(round_to<T>(to_float(round_to<T>(x2 * r)) * to_float(norm[i + half])));
    }
    out[i] = stored<KV>(round_to<T>(fma_rn(x1, cos[i], -(x2 * sin[i]))), scale);
    out[i + half] = stored<KV>(round_to<T>(fma_rn(x2, cos[i], x1 * sin[i])), scale);
  }
}

template <typename T, typename KV> void nan_head(KV* out, int dim) { std::fill(out, out + dim, stored<KV>(round_to<T>(bits_to_float(0x7fc00000u)), 1.0f)); }

template <typename T, typename KV> SPECRT_CLONES void store_head(const T* x, float scale, KV* out, int dim) {
  for (int i = 0; i < dim; ++i) out[i] = stored<KV>(x[i], scale);
}

template <typename T, typename KV> void rope_append(const RopeAppendParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), dim = p.head_dim, heads = p.q_heads + 2 * p.kv_heads;
  parallel_for(n, n * heads * dim * 4, [&](int64_t r) {
    const T* qkv = static_cast<const T*>(p.qkv) + r * heads * dim;
    const int64_t position = p.positions[r], slot = p.slots[r];
    const bool known = position >= 0 && position < p.max_position;
    const int64_t angle = known ? position * (dim / 2) : 0;
    auto rotate = [&](int64_t head, const void* norm, float scale, auto* out) {
      if (known) rotate_head(qkv + head * dim, static_cast<const T*>(norm), p.eps, p.cos + angle, p.sin + angle, scale, out, p.head_dim);
      else nan_head<T>(out, p.head_dim);
    };
    for (int64_t h = 0; h < p.q_heads; ++h) rotate(h, p.q_norm, 1.0f, static_cast<T*>(p.q) + (r * p.q_heads + h) * dim);
    if (slot < 0) return;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t at = ((slot / p.page * p.kv_heads + h) * p.page + slot % p.page) * dim;
      rotate(p.q_heads + h, p.k_norm, p.k_scale, static_cast<KV*>(p.k_pool) + at);
      store_head(qkv + (p.q_heads + p.kv_heads + h) * dim, p.v_scale, static_cast<KV*>(p.v_pool) + at, p.head_dim);
    }
  });
}

}  // namespace

void launch_rope_append_cpu(const RopeAppendParams& p) {
  const bool fp8 = p.kv_dtype == DType::kE4M3;
  if (p.dtype == DType::kBF16) fp8 ? rope_append<bf16, e4m3>(p) : rope_append<bf16, bf16>(p);
  else fp8 ? rope_append<float, e4m3>(p) : rope_append<float, float>(p);
}

void launch_kv_commit_cpu(const KvCommitParams& p) {
  const int64_t bytes = static_cast<int64_t>(p.head_dim) * element_bytes(p.dtype);
  for (int b = 0; b < p.requests; ++b) {
    const int32_t* table = p.block_table + static_cast<int64_t>(b) * p.max_pages;
    const int32_t* path = p.path + static_cast<int64_t>(b) * p.nodes;
    auto offset = [&](int64_t layer, int64_t head, int slot) {
      return (((layer * p.pages + table[slot / p.page]) * p.kv_heads + head) * p.page + slot % p.page) * bytes;
    };
    for (int i = 1; i < p.path_len[b]; ++i) {
      if (path[i] == i) continue;
      for (int layer = 0; layer < p.layers; ++layer)
        for (int head = 0; head < p.kv_heads; ++head) {
          const int64_t from = offset(layer, head, p.seq_lens[b] + path[i]), to = offset(layer, head, p.seq_lens[b] + i);
          for (char* pool : {static_cast<char*>(p.k_pools), static_cast<char*>(p.v_pools)}) std::memcpy(pool + to, pool + from, bytes);
        }
    }
  }
}

}  // namespace specrt
