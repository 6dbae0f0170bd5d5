// RoPE with the append to pages: a warp a row and head, of more rows four heads. Commit: one block a (layer, request), 16 bytes a thread.
#include "base/launch.h"
#include "base/math.h"
#include "kv/params.h"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4;
// Of so many rows a warp takes one head. Of more, four, which share the angles: qkv's CTAs then fill their SMs (gemm), and a quarter as many of these find room beside them. Of few rows that would
// let attention in sooner, which floods the memory with keys while qkv still reads weights.
constexpr int kFewRows = 64;

template <typename T> struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// A lane has elements i, i + 1, and those D / 2 further on, for i = 2 lane, 2 lane + 64, ...: kTurns of them.
// All that does not come from qkv is read before the wait: it is older than the kernel that makes qkv (params.h).
template <typename T, typename KV, int kTurns, int kHeads> __global__ void __launch_bounds__(kWarps * 32) rope_append_kernel(const __grid_constant__ RopeAppendParams p) {
  ptx::launch_dependents();  // attention may come up meanwhile
  const int r = blockIdx.x, lane = threadIdx.x % 32, heads = p.q_heads + 2 * p.kv_heads, first = (blockIdx.y * kWarps + threadIdx.x / 32) * kHeads, half = p.head_dim / 2;
  const int num_rows = __ldcg(p.num_rows), position = __ldcg(p.positions + r);  // from L2: what this SM holds of them may be of another pass until the wait
  const int64_t slot = __ldcg(reinterpret_cast<const long long*>(p.slots) + r);
  const bool known = position >= 0 && position < p.max_position;
  float2 c[kTurns], s[kTurns];
  Two<T> weight[kHeads][kTurns][2];
#pragma unroll
  for (int k = 0; k < kTurns; ++k) {
    const int i = 2 * lane + 64 * k;
    c[k] = s[k] = make_float2(bits_to_float(0x7fc00000u), bits_to_float(0x7fc00000u));
    if (i >= half) break;
    const int64_t angle = static_cast<int64_t>(position) * half + i;
    if (known) c[k] = *reinterpret_cast<const float2*>(p.cos + angle), s[k] = *reinterpret_cast<const float2*>(p.sin + angle);
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      if (const T* norm = static_cast<const T*>(first + h < p.q_heads ? p.q_norm : p.k_norm))
        weight[h][k][0] = *reinterpret_cast<const Two<T>*>(norm + i), weight[h][k][1] = *reinterpret_cast<const Two<T>*>(norm + i + half);
  }
  ptx::grid_dependency_wait();
  if (r >= num_rows || first >= heads) return;
  const T* const x = static_cast<const T*>(p.qkv) + (static_cast<int64_t>(r) * heads + first) * p.head_dim;
  Two<T> raw[kHeads][kTurns][2];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int i = 2 * lane + 64 * k;
      if (i >= half || first + h >= heads) break;
      raw[h][k][0] = *reinterpret_cast<const Two<T>*>(x + h * p.head_dim + i);
      raw[h][k][1] = *reinterpret_cast<const Two<T>*>(x + h * p.head_dim + i + half);
    }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first + h;
    const bool is_q = head < p.q_heads, is_k = !is_q && head < p.q_heads + p.kv_heads, turned = is_q || is_k, normed = is_q ? p.q_norm != nullptr : is_k && p.k_norm;
    if (head >= heads || (!is_q && slot < 0)) continue;
    float scale = 1.0f;
    if (normed) {
      float sum = 0.0f;
      for (int i = lane; i < p.head_dim; i += 32) sum = fma_rn(to_float(x[h * p.head_dim + i]), to_float(x[h * p.head_dim + i]), sum);
      for (int d = 16; d; d >>= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
      scale = 1.0f / sqrtf(sum / static_cast<float>(p.head_dim) + p.eps);
    }
    T* const q = static_cast<T*>(p.q) + (static_cast<int64_t>(r) * p.q_heads + head) * p.head_dim;
    KV* const kv = static_cast<KV*>(is_k ? p.k_pool : p.v_pool) + ((slot / p.page * p.kv_heads + (head - p.q_heads) % p.kv_heads) * p.page + slot % p.page) * p.head_dim;
    const float kv_scale = is_k ? p.k_scale : p.v_scale;
    auto store = [&](int i, Two<T> value) {
      if (is_q) *reinterpret_cast<Two<T>*>(q + i) = value;
      else *reinterpret_cast<Two<KV>*>(kv + i) = {stored<KV>(value.x, kv_scale), stored<KV>(value.y, kv_scale)};
    };
    auto element = [&](T value, T norm) {
      const float y = to_float(value);
      return normed ? to_float(round_to<T>(to_float(round_to<T>(y * scale)) * to_float(norm))) : y;
    };
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int i = 2 * lane + 64 * k;
      if (i >= half) break;
      Two<T> low = raw[h][k][0], high = raw[h][k][1];
      if (turned) {
        const float x1[2] = {element(low.x, weight[h][k][0].x), element(low.y, weight[h][k][0].y)}, x2[2] = {element(high.x, weight[h][k][1].x), element(high.y, weight[h][k][1].y)};
        low = {round_to<T>(fma_rn(x1[0], c[k].x, -(x2[0] * s[k].x))), round_to<T>(fma_rn(x1[1], c[k].y, -(x2[1] * s[k].y)))};
        high = {round_to<T>(fma_rn(x2[0], c[k].x, x1[0] * s[k].x)), round_to<T>(fma_rn(x2[1], c[k].y, x1[1] * s[k].y))};
      }
      store(i, low);
      store(i + half, high);
    }
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
  auto run = [&](auto kernel, int of_warp) { launch({dim3(p.rows, (heads + kWarps * of_warp - 1) / (kWarps * of_warp)), dim3(kWarps * 32), 0, s, 1, true}, kernel, p); };
  if (p.head_dim > 128) run(rope_append_kernel<T, KV, kRopeHeadDim / 128, 1>, 1);
  else if (p.rows <= kFewRows) run(rope_append_kernel<T, KV, 1, 1>, 1);
  else run(rope_append_kernel<T, KV, 1, 4>, 4);
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
