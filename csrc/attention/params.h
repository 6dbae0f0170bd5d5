// Attention over paged KV, for rows of token trees, plain decode rows and prompts.
//
// What a row sees: the logical positions 0 .. prefix-1 of its request, each in its own slot, then its path: position prefix + d in slot prefix + n_d.
// len = prefix + path length; with a window w > 0 the positions before len - w are invisible. A row with len 0 gives zeros.
//
// The pools hold the dtype of q, or e4m3 with one k_scale and one v_scale (kv/params.h): an element is then widened as it is read (every e4m3 value is a bf16 value) and
// taken for a k or v of q's dtype; k_scale is part of c, v_scale of the last factor. So both scales stand outside all loops, and 1 changes no bit.
//
// Reduction order (csrc/README.md, 4): tiles of 64 logical positions, chunks of 4 tiles, groups of 8 chunks. t = (q.k) * c with c = scale * log2 e * k_scale
// rounded once. A chunk starts from (m, l, O) = (-inf, 0, 0); each of its tiles, ascending:
//   m' = max(m, max t)   a = exp2(m - m')   p = exp2(t - m') rounded to q's dtype   l = l * a + sum p   O = O * a + P V
// bf16 CUDA: p = exp2(fma(q.k, c, -m')), t being rounded for m' alone.
// CPU and float32 CUDA: one fma chain over the visible positions, ascending, from the products l * a and O * a. bf16 CUDA: the products, then 4
// mma.m16n8k16 ascending, V rows nobody sees zeroed. Fold of (m2, l2, O2) into (m, l, O): m' = max(m, m2), x = fma(x2, exp2(m2 - m'), x * exp2(m - m')): chunks
// ascending into their group, groups ascending into the total, each from (-inf, 0, 0). A tile, chunk or group in which a row sees nothing is
// skipped for that row. The output is O * f rounded to q's dtype, f = (1 / l) * v_scale: the quotient rounded, then the product. Both ops follow this order, so they give a
// row the same bits.
#pragma once
#include "base/math.h"

namespace specrt {

constexpr int kTile = 64, kChunkTiles = 4, kGroupChunks = 8;
constexpr int kChunk = kTile * kChunkTiles, kGroup = kChunk * kGroupChunks;

// On CUDA tree attention in bfloat16 reads the plan, the block table, the rows' tables, num_rows, and keys and values of positions that were there before this pass (of a request's rows
// without ancestors or paths: below its first row's; of others: below prefix) while the kernel before it may still run. So what writes those must be older than a kernel that waits
// before it lets the next start: linear, which stands between the plan and the attention of every layer. The plan is made after all of them; of rows without ancestors or paths it takes the
// first of a request as the one with the lowest prefix.
struct AttentionParams {
  DType dtype, kv_dtype;      // kv_dtype: of the pools, dtype or e4m3
  const void* q;              // [R, Hq, D]
  const void* k_pool;         // [pages, Hkv, P, D]
  const void* v_pool;         // [pages, Hkv, P, D]
  const int32_t* block_table; // [B, max_pages]
  const int32_t* row_request; // [R], those of a request together
  const int32_t* row_prefix;  // [R]
  const int64_t* ancestors;   // [R] or null: bit j = node j is on the path
  const int32_t* paths;       // [R, path_depth] or null: nodes of the path, ascending, -1 ends it
  float scale, k_scale = 1.0f, v_scale = 1.0f;  // of the pools: 1 but for e4m3
  int window;                 // 0: none
  const int32_t* num_rows;
  const int32_t* plan;        // bf16 CUDA tree attention: made by attention_plan from the same rows
  float* workspace;           // bf16 CUDA tree attention: R Hq C parts: O, D each, then (m, l) (part_of, combine.cuh), C = ceil(max_pages * P / 256)
  void* out;                  // [R, Hq, D]
  int rows, requests, q_heads, kv_heads, head_dim, page, max_pages, pages, path_depth;
};

// c of the formulas.
inline float score_factor(const AttentionParams& p) { return static_cast<float>(static_cast<double>(p.scale) * static_cast<double>(kLog2e) * static_cast<double>(p.k_scale)); }

// Which CTA of tree attention does what (plan.cuh), once for all layers of a forward pass.
struct AttentionPlanParams {
  const int32_t* row_request;  // [R]
  const int32_t* row_prefix;   // [R]
  const int64_t* ancestors;    // [R] or null
  const int32_t* paths;        // [R, path_depth] or null
  const int32_t* num_rows;
  int32_t* plan;               // [plan_ints(R)]
  int rows, requests, q_heads, kv_heads, max_len, path_depth;  // max_len: positions that a row of the block table holds
  bool fp8;                                                    // pools in e4m3
};

constexpr int kPlanHeader = 4, kPlanShare = 16, kPlanBlock = 12, kMostShares = 512;  // ints; shares: CTAs of tree attention
constexpr int plan_ints(int rows) { return kPlanHeader + kPlanShare * kMostShares + (kPlanBlock + 1) * rows; }

// CTAs of tree attention: a row each (decode.cu; `warpgroups` 0) where there is one a request, few of them, none long and pools are wide (16384 positions: 37 us, the
// others 28), else 64 query vectors of a KV head, or 128 where a request has as many and there are blocks of them enough, since a CTA reads K and V once for all of its own.
// A function of the capacities.
struct TreeShape {
  int warpgroups, blocks_per_sm, most_rows;
};
inline TreeShape tree_shape(int rows, int requests, int group_heads, int kv_heads, int max_len, int path_depth, bool fp8) {
  constexpr int kFew = 32, kShort = 9216, kEnough = 32;
  if (!fp8 && rows <= requests && rows * kv_heads <= kFew && max_len <= kShort) return {0, 1, 1};
  const int vectors = (rows + requests - 1) / (requests > 0 ? requests : 1) * group_heads;  // of a request
  const int warpgroups = !path_depth && vectors > 64 && requests * kv_heads * ((vectors + 127) / 128) >= kEnough ? 2 : 1;
  int most = warpgroups * 64 / group_heads;
  if (path_depth) {  // a tile holds the keys of all paths
    const int in_a_tile = kTile / (path_depth < kTile ? path_depth : kTile);
    most = most < in_a_tile ? most : in_a_tile;
  }
  return {warpgroups, warpgroups == 1 ? 2 : 1, most};
}

inline void launch_attention_plan_cpu(const AttentionPlanParams&) {}  // the CPU needs none
void launch_attention_plan_cuda(const AttentionPlanParams& p, void* stream);
void launch_tree_attention_cpu(const AttentionParams& p);
void launch_tree_attention_cuda(const AttentionParams& p, void* stream);
// No ancestors, no paths; rows of a request stand together, prefixes ascending by one. The CPU has one implementation for both.
void launch_prefill_attention_cpu(const AttentionParams& p);
void launch_prefill_attention_cuda(const AttentionParams& p, void* stream);

}  // namespace specrt
