// RoPE with the append to pages: one warp a (row, head). Commit: one block a (layer, KV head, request), 16 bytes a thread.
#include "base/launch.h"
#include "base/math.h"
#include "kv/params.h"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4;

template <typename T> __global__ void rope_append_kernel(RopeAppendParams p) {
  ptx::launch_dependents();  // attention may come up meanwhile
  ptx::grid_dependency_wait();
  const int r = blockIdx.x, lane = threadIdx.x % 32, heads = p.q_heads + 2 * p.kv_heads, head = blockIdx.y * kWarps + threadIdx.x / 32;
  if (r >= *p.num_rows || head >= heads) return;
  const T* x = static_cast<const T*>(p.qkv) + (static_cast<int64_t>(r) * heads + head) * p.head_dim;
  const bool is_q = head < p.q_heads, is_k = !is_q && head < p.q_heads + p.kv_heads;
  T* out;
  if (is_q) {
    out = static_cast<T*>(p.q) + (static_cast<int64_t>(r) * p.q_heads + head) * p.head_dim;
  } else {
    const int64_t slot = p.slots[r], kv_head = (head - p.q_heads) % p.kv_heads;
    if (slot < 0) return;
    out = static_cast<T*>(is_k ? p.k_pool : p.v_pool) + ((slot / p.page * p.kv_heads + kv_head) * p.page + slot % p.page) * p.head_dim;
  }
  if (!is_q && !is_k) {
    for (int i = lane; i < p.head_dim; i += 32) out[i] = x[i];
    return;
  }
  const T* norm = static_cast<const T*>(is_q ? p.q_norm : p.k_norm);
  float scale = 1.0f;
  if (norm) {
    float sum = 0.0f;
    for (int i = lane; i < p.head_dim; i += 32) sum = fma_rn(to_float(x[i]), to_float(x[i]), sum);
    for (int d = 16; d; d >>= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
    scale = 1.0f / sqrtf(sum / static_cast<float>(p.head_dim) + p.eps);
  }
  const int position = p.positions[r], half = p.head_dim / 2;
  const bool known = position >= 0 && position < p.max_position;
  const int64_t angle = known ? static_cast<int64_t>(position) * half : 0;
  for (int i = lane; i < half; i += 32) {
    float x1 = to_float(x[i]), x2 = to_float(x[i + half]);
    if (norm) {
      x1 = to_float(round_to<T>(to_float(round_to<T>(x1 * scale)) * to_float(norm[i])));
      x2 = to_float(round_to<T>(to_float(round_to<T>(x2 * scale)) * to_float(norm[i + half])));
    }
    const float c = known ? p.cos[angle + i] : bits_to_float(0x7fc00000u), s = known ? p.sin[angle + i] : c;
    out[i] = round_to<T>(fma_rn(x1, c, -(x2 * s)));
    out[i + half] = round_to<T>(fma_rn(x2, c, x1 * s));
  }
}

constexpr int kCommitThreads = 256, kBatch = 4;  // pieces of K and of V a thread holds between the reads and the writes of a batch

// A batch reads all its sources before it writes. Later batches' sources lie above this batch's destinations (path[i] >= i), so batches may follow
// one another; pieces of 16 bytes are ordered by node.
__global__ void __launch_bounds__(kCommitThreads) kv_commit_kernel(KvCommitParams p, int pieces) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int layer = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
  const int32_t* table = p.block_table + static_cast<int64_t>(b) * p.max_pages;
  const int32_t* path = p.path + static_cast<int64_t>(b) * p.nodes;
  const int length = min(p.path_len[b], p.nodes), total = (length - 1) * pieces, seq_len = p.seq_lens[b];
  auto piece_of = [&](int slot, int piece) {
    const int64_t page = table[slot / p.page];
    return (((static_cast<int64_t>(layer) * p.pages + page) * p.kv_heads + head) * p.page + slot % p.page) * pieces + piece;
  };
  uint4 *k = static_cast<uint4*>(p.k_pools), *v = static_cast<uint4*>(p.v_pools);
  for (int base = 0; base < total; base += kBatch * kCommitThreads) {
    uint4 held_k[kBatch], held_v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = base + j * kCommitThreads + threadIdx.x, i = 1 + index / pieces;
      if (index >= total || path[i] == i) continue;
      const int64_t from = piece_of(seq_len + path[i], index % pieces);
      held_k[j] = k[from];
      held_v[j] = v[from];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = base + j * kCommitThreads + threadIdx.x, i = 1 + index / pieces;
      if (index >= total || path[i] == i) continue;
      const int64_t to = piece_of(seq_len + i, index % pieces);
      k[to] = held_k[j];
      v[to] = held_v[j];
    }
    __syncthreads();
  }
}

template <typename T> void rope_append(const RopeAppendParams& p, cudaStream_t s) {
  const int heads = p.q_heads + 2 * p.kv_heads;
  launch({dim3(p.rows, (heads + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, s, 1, true}, rope_append_kernel<T>, p);
}

}  // namespace

void launch_rope_append_cuda(const RopeAppendParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? rope_append<bf16>(p, s) : rope_append<float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

void launch_kv_commit_cuda(const KvCommitParams& p, void* stream) {
  const int pieces = p.head_dim * (p.dtype == DType::kBF16 ? 2 : 4) / 16;
  launch({dim3(p.layers, p.kv_heads, p.requests), dim3(kCommitThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, kv_commit_kernel, p, pieces);
}

}  // namespace specrt
