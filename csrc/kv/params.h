// Paged KV: rotary embedding with the append to pages, and the move of an accepted path to where plain decoding would have put it.
//
// Per-head RMSNorm in the order of csrc/README.md, 5 (32 lanes stride the head dim, butterfly 16, 8, 4, 2, 1); out = round(round(x * r) * w).
// RoPE, half-rotation layout: (x1, x2) = (x[i], x[i + D/2]) -> (fma(x1, c, -(x2 * s)), fma(x2, c, x1 * s)), float32, rounded once.
//
// A page holds keys and values in the rows' dtype, or in e4m3 with one scale a layer for each: then what would have been stored, rounded to the rows' dtype, is divided by
// the scale in float32 (an IEEE division) and rounded to e4m3: to nearest even, saturated to +-448 (an infinity too), NaN stays NaN. What attention does with the scales
// is in attention/params.h.
#pragma once
#include <type_traits>

#include "base/fp8.h"

namespace specrt {

constexpr int kRopeHeadDim = 256;  // the largest on CUDA

// On CUDA positions, slots and num_rows are read before the kernel that makes qkv has ended: what writes them must be older than that kernel, by a kernel that waits before it
// starts the next one (ptx/dependency.cuh).
struct RopeAppendParams {
  DType dtype, kv_dtype;     // kv_dtype: of the pools, dtype or e4m3
  const void* qkv;           // [R, (Hq + 2 Hkv) * D]: q heads, k heads, v heads
  const int32_t* positions;  // [R]; outside [0, max_position): the row's q and k are NaN
  const int64_t* slots;      // [R]: page * P + offset, negative: no KV is written
  const float* cos;          // [max_position, D/2]
  const float* sin;
  const void* q_norm;        // [D] or null
  const void* k_norm;        // [D] or null
  float eps;
  const int32_t* num_rows;
  void* q;                   // [R, Hq, D]
  void* k_pool;              // [pages, Hkv, P, D]
  void* v_pool;
  float k_scale = 1.0f, v_scale = 1.0f;  // of e4m3 pools
  int rows, q_heads, kv_heads, head_dim, page, max_position;
};

// Slot seq_len + path[i] -> seq_len + i for 1 <= i < path_len, in all layers. Nodes ascend along a path, so path[i] >= i: going up, no move overwrites
// the source of a later one.
struct KvCommitParams {
  DType dtype;                 // of the pools
  void* k_pools;               // [L, pages, Hkv, P, D]
  void* v_pools;
  const int32_t* block_table;  // [B, max_pages]
  const int32_t* seq_lens;     // [B]
  const int32_t* path;         // [B, N]
  const int32_t* path_len;     // [B]
  int layers, pages, kv_heads, page, head_dim, requests, max_pages, nodes;
};

inline int element_bytes(DType type) { return type == DType::kF32 ? 4 : type == DType::kBF16 ? 2 : 1; }

// A key's or value's element as the page holds it.
template <typename KV, typename T> SPECRT_HD KV stored(T x, float scale) {
  if constexpr (std::is_same_v<KV, T>) return x;
  else return to_e4m3(to_float(x) / scale);
}

void launch_rope_append_cpu(const RopeAppendParams& p);
void launch_rope_append_cuda(const RopeAppendParams& p, void* stream);
void launch_kv_commit_cpu(const KvCommitParams& p);
void launch_kv_commit_cuda(const KvCommitParams& p, void* stream);

}  // namespace specrt
