// float32 attention, trees and prompts alike: one warp a (row, query head). A lane scores keys lane and lane + 32 of a tile; the probabilities go through
// shared memory; then lanes own elements of O and every chain runs over the visible positions, ascending. Plain, for parity checks rather than speed.
#include "attention/row.cuh"
#include "base/check.h"
#include "base/fp8.h"

namespace specrt {
namespace {

constexpr int kWarps = 4;

__device__ Row describe_row(const AttentionParams& p, int r) {
  Row row;
  row.prefix = row.len = p.row_prefix[r];
  if (p.ancestors) row.len += __popcll(p.ancestors[r]);
  int last;
  if (p.paths) row.len += path_length(p.paths + static_cast<int64_t>(r) * p.path_depth, p.path_depth, last);
  if (p.window > 0) row.first = max(0, row.len - p.window);
  return row;
}

// Slot of a logical position of row r.
__device__ int slot_of(const AttentionParams& p, int r, const Row& row, int position) {
  const int d = position - row.prefix;
  if (d < 0) return position;
  if (p.paths) return row.prefix + p.paths[static_cast<int64_t>(r) * p.path_depth + d];
  uint64_t word = static_cast<uint64_t>(p.ancestors[r]);
  for (int i = 0; i < d; ++i) word &= word - 1;
  return row.prefix + __ffsll(static_cast<long long>(word)) - 1;
}

// Offset of a slot's first element in the pools, for one KV head. A page has 16, 32 or 64 slots.
__device__ int64_t slot_offset(const AttentionParams& p, int request, int kv_head, int slot) {
  const int64_t page = p.block_table[static_cast<int64_t>(request) * p.max_pages + (slot >> (__ffs(p.page) - 1))];
  return ((page * p.kv_heads + kv_head) * p.page + (slot & (p.page - 1))) * p.head_dim;
}

template <int D, typename KV> __global__ void __launch_bounds__(kWarps * 32) rows_f32_kernel(AttentionParams p, float scale) {
  __shared__ float shared_q[kWarps][D], shared_p[kWarps][kTile];
  __shared__ int64_t shared_at[kWarps][kTile];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int r = static_cast<int>(vector / p.q_heads), head = static_cast<int>(vector % p.q_heads);
  if (r >= p.rows || r >= *p.num_rows) return;  // a whole warp: no block barrier follows
  const int kv_head = head / (p.q_heads / p.kv_heads), request = p.row_request[r];
  const Row row = describe_row(p, r);
  const KV *k = static_cast<const KV*>(p.k_pool), *v = static_cast<const KV*>(p.v_pool);
  float *q = shared_q[warp], *probability = shared_p[warp];
  int64_t* at = shared_at[warp];
  for (int d = lane; d < D; d += 32) q[d] = static_cast<const float*>(p.q)[vector * D + d];
  __syncwarp();

  WarpState<D / 32> chunk, group, total;
  chunk.reset();
  group.reset();
  total.reset();
  for (int begin = row.first / kTile * kTile; begin < row.len; begin += kTile) {
    const int low = row.low(begin), high = row.high(begin, kTile);
    float t[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane + 32 * half;
      t[half] = SPECRT_MINUS_INF;
      if (j < low || j >= high) continue;
      at[j] = slot_offset(p, request, kv_head, slot_of(p, r, row, begin + j));
      float s = 0.0f;
      for (int d = 0; d < D; ++d) s = fma_rn(q[d], to_float(k[at[j] + d]), s);
      t[half] = s * scale;
    }
    float top = t[1] > t[0] ? t[1] : t[0];
    top = top > chunk.m ? top : chunk.m;
    for (int d = 16; d; d >>= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, top, d);
      top = other > top ? other : top;
    }
    const float a = ptx::ex2(chunk.m - top);
    chunk.m = top;
    probability[lane] = ptx::ex2(t[0] - top);
    probability[lane + 32] = ptx::ex2(t[1] - top);
    __syncwarp();
    chunk.l = chunk.l * a;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) chunk.o[i] = chunk.o[i] * a;
    for (int j = low; j < high; ++j) {
      const float x = probability[j];
      chunk.l = chunk.l + x;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) chunk.o[i] = fma_rn(x, to_float(v[at[j] + lane + 32 * i]), chunk.o[i]);
    }
    __syncwarp();
    const int end = begin + kTile;
    if (end % kChunk == 0 || end >= row.len) {
      group.fold(chunk);
      chunk.reset();
    }
    if (end % kGroup == 0 || end >= row.len) {
      total.fold(group);
      group.reset();
    }
  }
  const float factor = 1.0f / total.l * p.v_scale;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) static_cast<float*>(p.out)[vector * D + lane + 32 * i] = row.len > 0 ? total.o[i] * factor : 0.0f;
}

template <typename KV> void launch_pool(const AttentionParams& p, cudaStream_t s) {
  const int64_t vectors = static_cast<int64_t>(p.rows) * p.q_heads;
  const int blocks = static_cast<int>((vectors + kWarps - 1) / kWarps);
  const float scale = score_factor(p);
  switch (p.head_dim) {
    case 64: rows_f32_kernel<64, KV><<<blocks, kWarps * 32, 0, s>>>(p, scale); break;
    case 96: rows_f32_kernel<96, KV><<<blocks, kWarps * 32, 0, s>>>(p, scale); break;
    case 128: rows_f32_kernel<128, KV><<<blocks, kWarps * 32, 0, s>>>(p, scale); break;
    default: fail("attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
  SPECRT_CHECK_LAUNCH();
}

}  // namespace

void launch_attention_f32(const AttentionParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.kv_dtype == DType::kE4M3 ? launch_pool<e4m3>(p, s) : launch_pool<float>(p, s);
}

}  // namespace specrt
