// RoPE with the append to pages: one warp a (row, head). Commit: one block a (layer, request), 16 bytes a thread.
#include "base/launch.h"
#include "base/math.h"
#include "kv/params.h"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4;

constexpr int kPairs = kRopeHeadDim / 64;  // of a lane: elements i and i + D/2, i = lane, lane + 32, ...

// All that does not come from qkv is read before the wait: it is older than the kernel that makes qkv (params.h).
template <typename T, typename KV> __global__ void __launch_bounds__(kWarps * 32) rope_append_kernel(const __grid_constant__ RopeAppendParams p) {
  ptx::launch_dependents();  // attention may come up meanwhile
  const int r = blockIdx.x, lane = threadIdx.x % 32, heads = p.q_heads + 2 * p.kv_heads, head = blockIdx.y * kWarps + threadIdx.x / 32, half = p.head_dim / 2;
  const bool is_q = head < p.q_heads, is_k = !is_q && head < p.q_heads + p.kv_heads;
  const int num_rows = __ldcg(p.num_rows), position = __ldcg(p.positions + r);  // from L2: what this SM holds of them may be of another pass until the wait
  const int64_t slot = __ldcg(reinterpret_cast<const long long*>(p.slots) + r);
  const bool known = position >= 0 && position < p.max_position;
  const T* norm = static_cast<const T*>(is_q ? p.q_norm : p.k_norm);
  float c[kPairs], s[kPairs];
  T weight[kPairs][2];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = lane + 32 * k;
    c[k] = s[k] = bits_to_float(0x7fc00000u);
    if (i >= half) break;
    if (known) c[k] = p.cos[static_cast<int64_t>(position) * half + i], s[k] = p.sin[static_cast<int64_t>(position) * half + i];
    if (norm) weight[k][0] = norm[i], weight[k][1] = norm[i + half];
  }
  ptx::grid_dependency_wait();
  if (r >= num_rows || head >= heads || (!is_q && slot < 0)) return;
  const T* x = static_cast<const T*>(p.qkv) + (static_cast<int64_t>(r) * heads + head) * p.head_dim;
  T* q = static_cast<T*>(p.q) + (static_cast<int64_t>(r) * p.q_heads + head) * p.head_dim;
  KV* kv = static_cast<KV*>(is_k ? p.k_pool : p.v_pool) + ((slot / p.page * p.kv_heads + (head - p.q_heads) % p.kv_heads) * p.page + slot % p.page) * p.head_dim;
  const float kv_scale = is_k ? p.k_scale : p.v_scale;
  auto store = [&](int i, T value) {
    if (is_q) q[i] = value;
    else kv[i] = stored<KV>(value, kv_scale);
  };
  float x1[kPairs], x2[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = lane + 32 * k;
    if (i >= half) break;
    x1[k] = to_float(x[i]);
    x2[k] = to_float(x[i + half]);
  }
  if (norm && (is_q || is_k)) {
    float sum = 0.0f;
    for (int i = lane; i < p.head_dim; i += 32) sum = fma_rn(to_float(x[i]), to_float(x[i]), sum);
    for (int d = 16; d; d >>= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (lane + 32 * k >= half) break;
      x1[k] = to_float(round_to<T>(to_float(round_to<T>(x1[k] * scale)) * to_float(weight[k][0])));
      x2[k] = to_float(round_to<T>(to_float(round_to<T>(x2[k] * scale)) * to_float(weight[k][1])));
    }
  }
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int i = lane + 32 * k;
    if (i >= half) break;
    const bool turned = is_q || is_k;
    store(i, turned ? round_to<T>(fma_rn(x1[k], c[k], -(x2[k] * s[k]))) : x[i]);
    store(i + half, turned ? round_to<T>(fma_rn(x2[k], c[k], x1[k] * s[k])) : x[i + half]);
  }
}

constexpr int kCommitThreads = 256, kBatch = 4;  // pieces of K and of V a thread holds between the reads and the writes of a batch

// A batch reads all its sources before it writes. Later batches' sources lie above this batch's destinations (path[i] >= i), so batches may follow
// one another; pieces of 16 bytes are ordered by node, then head. Attention, which reads committed keys before its wait, is not the next kernel (attention/params.h).
__global__ void __launch_bounds__(kCommitThreads) kv_commit_kernel(KvCommitParams p, int pieces) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int layer = blockIdx.x, b = blockIdx.y, of_node = p.kv_heads * pieces;
  const int32_t* table = p.block_table + static_cast<int64_t>(b) * p.max_pages;
  const int32_t* path = p.path + static_cast<int64_t>(b) * p.nodes;
  const int length = min(p.path_len[b], p.nodes), total = (length - 1) * of_node, seq_len = p.seq_lens[b];
  auto piece_of = [&](int slot, int piece) {
    const int64_t page = static_cast<int64_t>(layer) * p.pages + table[slot / p.page];
    return ((page * p.kv_heads + piece / pieces) * p.page + slot % p.page) * pieces + piece % pieces;
  };
  uint4 *k = static_cast<uint4*>(p.k_pools), *v = static_cast<uint4*>(p.v_pools);
  for (int base = 0; base < total; base += kBatch * kCommitThreads) {
    uint4 held_k[kBatch], held_v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = base + j * kCommitThreads + threadIdx.x, i = 1 + index / of_node;
      if (index >= total || path[i] == i) continue;
      const int64_t from = piece_of(seq_len + path[i], index % of_node);
      held_k[j] = k[from];
      held_v[j] = v[from];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = base + j * kCommitThreads + threadIdx.x, i = 1 + index / of_node;
      if (index >= total || path[i] == i) continue;
      const int64_t to = piece_of(seq_len + i, index % of_node);
      k[to] = held_k[j];
      v[to] = held_v[j];
    }
    __syncthreads();
  }
}

template <typename T, typename KV> void rope_append(const RopeAppendParams& p, cudaStream_t s) {
  const int heads = p.q_heads + 2 * p.kv_heads;
  launch({dim3(p.rows, (heads + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, s, 1, true}, rope_append_kernel<T, KV>, p);
}

}  // namespace

void launch_rope_append_cuda(const RopeAppendParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const bool fp8 = p.kv_dtype == DType::kE4M3;
  if (p.dtype == DType::kBF16) fp8 ? rope_append<bf16, e4m3>(p, s) : rope_append<bf16, bf16>(p, s);
  else fp8 ? rope_append<float, e4m3>(p, s) : rope_append<float, float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

void launch_kv_commit_cuda(const KvCommitParams& p, void* stream) {
  const int pieces = p.head_dim * element_bytes(p.dtype) / 16;
  launch({dim3(p.layers, p.requests), dim3(kCommitThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, kv_commit_kernel, p, pieces);
}

}  // namespace specrt
