// Prompt attention, bf16: 64 rows of one query head a block, 16 a warp, over tiles of 64 keys. Chunks fold into a group accumulator and groups into a total, both in
// shared memory (each thread its own elements, so no barrier), in the order and with the functions of tree.cu: the same bits for the same row.
//
// Rows of several requests may share a block: it walks the runs of rows of one request in turn, and a row sees nothing in the others' runs.
// V rows beyond the run's last position are zeros; a row's own masked positions have p = 0 times a finite V of the same request.
//
// Barriers: as in tree.cu; K(t+1) is requested after all warps scored tile t, V(t+1) after all warps added tile t.
#include "attention/tile.cuh"
#include "base/check.h"

namespace specrt {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * 16;

template <int D> constexpr int kAccumulatorBytes = D / 8 * kThreads * static_cast<int>(sizeof(float4));
template <int D> constexpr int kSharedBytes = 2 * kAccumulatorBytes<D> + 2 * kTile * kRowStride<D> * static_cast<int>(sizeof(bf16));

// (m, l, O) of the 16 rows of a warp: m and l in registers, O in shared memory, o[n * kThreads + thread] the thread's elements of columns 8n..
template <int D> struct Accumulator {
  float m[2], l[2];
  float4* o;

  __device__ void reset() {
    m[0] = m[1] = SPECRT_MINUS_INF;
    l[0] = l[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) o[n * kThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  // value(n) gives the other side's O as a float4; rows that see nothing there keep what they have.
  template <typename F> __device__ void fold(const float (&m2)[2], const float (&l2)[2], const bool (&seen)[2], F&& value) {
    FoldFactors f[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
      f[i] = fold_factors(top, m2[i]);
      m[i] = seen[i] ? top : m[i];
      l[i] = seen[i] ? fold_value(l[i], l2[i], f[i]) : l[i];
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float4 x = o[n * kThreads];
      const float4 y = value(n);
      if (seen[0]) x.x = fold_value(x.x, y.x, f[0]), x.y = fold_value(x.y, y.y, f[0]);
      if (seen[1]) x.z = fold_value(x.z, y.z, f[1]), x.w = fold_value(x.w, y.w, f[1]);
      o[n * kThreads] = x;
    }
  }
};

template <int D> __global__ void __launch_bounds__(kThreads) prefill_attention_kernel(AttentionParams p, float scale) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int requests[kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, kv_head = head / (p.q_heads / p.kv_heads);
  const int rows = min(*p.num_rows, p.rows), begin_row = (gridDim.x - 1 - blockIdx.x) * kRows;  // long rows first
  if (begin_row >= rows) return;
  const int end_row = min(begin_row + kRows, rows);
  if (static_cast<int>(threadIdx.x) < end_row - begin_row) requests[threadIdx.x] = p.row_request[begin_row + threadIdx.x];

  Accumulator<D> group, total;
  group.o = reinterpret_cast<float4*>(memory) + threadIdx.x;
  total.o = reinterpret_cast<float4*>(memory + kAccumulatorBytes<D>) + threadIdx.x;
  bf16 *keys = reinterpret_cast<bf16*>(memory + 2 * kAccumulatorBytes<D>), *values = keys + kTile * kRowStride<D>;
  const bf16 *k_pool = static_cast<const bf16*>(p.k_pool), *v_pool = static_cast<const bf16*>(p.v_pool);
  group.reset();
  total.reset();

  Row mine[2];
  const bf16* q_rows[2];
  bf16* out_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = begin_row + warp * 16 + lane / 4 + 8 * i;
    const int64_t at = (static_cast<int64_t>(r) * p.q_heads + head) * D;
    if (r < end_row) mine[i] = describe_row(p, r);
    q_rows[i] = r < end_row ? static_cast<const bf16*>(p.q) + at : nullptr;
    out_rows[i] = r < end_row ? static_cast<bf16*>(p.out) + at : nullptr;
  }
  QueryFragment<D> q;
  q.load(q_rows[0], q_rows[1], lane);
  __syncthreads();  // requests[]

  TileState<D> state;
  state.reset();
  for (int run = begin_row, run_end; run < end_row; run = run_end) {
    const int request = requests[run - begin_row];
    for (run_end = run + 1; run_end < end_row && requests[run_end - begin_row] == request; ++run_end) {}
    const int first = describe_row(p, run).first, end = describe_row(p, run_end - 1).len;
    Row row[2];  // outside the run: sees nothing
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = begin_row + warp * 16 + lane / 4 + 8 * i;
      if (r >= run && r < run_end) row[i] = mine[i];
    }
    const int tiles_begin = first / kTile * kTile;
    if (tiles_begin < end) copy_tile<D, kThreads>(p, k_pool, request, kv_head, tiles_begin, first, end, keys);
    ptx::cp_async_commit();
    for (int tile = tiles_begin; tile < end; tile += kTile) {
      copy_tile<D, kThreads>(p, v_pool, request, kv_head, tile, first, end, values);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();  // K(t) is there
      const bool sees = __any_sync(0xffffffffu, row[0].sees(tile, kTile) || row[1].sees(tile, kTile));
      Scores scores;
      if (sees) {
#pragma unroll
        for (int g = 0; g < kTile / 16; ++g) score_keys<D>(scores, g, q, keys + g * 16 * kRowStride<D>, lane);
      }
      __syncthreads();  // nobody reads K(t) any more
      if (tile + kTile < end) copy_tile<D, kThreads>(p, k_pool, request, kv_head, tile + kTile, first, end, keys);
      ptx::cp_async_commit();  // empty at the end: the count of groups stays the same
      if (sees) {
        const int low[2] = {row[0].low(tile), row[1].low(tile)}, high[2] = {row[0].high(tile, kTile), row[1].high(tile, kTile)};
        softmax_tile<D>(scores, state, low, high, scale, lane);
      }
      ptx::cp_async_wait<1>();
      __syncthreads();  // V(t) is there
      if (sees) {
#pragma unroll
        for (int g = 0; g < kTile / 16; ++g) accumulate_values<D>(scores, g, state, values + g * 16 * kRowStride<D>, lane);
      }
      __syncthreads();  // nobody reads V(t) any more

      const int next = tile + kTile;
      if (next % kChunk == 0 || next >= end) {
        const int chunk = tile / kChunk * kChunk;
        const bool seen[2] = {row[0].sees(chunk, kChunk), row[1].sees(chunk, kChunk)};
        group.fold(state.m, {state.l[0], state.l[2]}, seen, [&](int n) { return make_float4(state.o[n][0], state.o[n][1], state.o[n][2], state.o[n][3]); });
        state.reset();
      }
      if (next % kGroup == 0 || next >= end) {
        const int chunks = tile / kGroup * kGroup;
        const bool seen[2] = {row[0].sees(chunks, kGroup), row[1].sees(chunks, kGroup)};
        total.fold(group.m, group.l, seen, [&](int n) { return group.o[n * kThreads]; });
        group.reset();
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!out_rows[i]) continue;
    const bool any = mine[i].len > 0;
    const float r = 1.0f / total.l[i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float4 x = total.o[n * kThreads];
      const float a = i ? x.z : x.x, b = i ? x.w : x.y;
      const uint32_t low = to_bf16(any ? a * r : 0.0f).bits, high = to_bf16(any ? b * r : 0.0f).bits;
      *reinterpret_cast<uint32_t*>(out_rows[i] + n * 8 + lane % 4 * 2) = low | high << 16;
    }
  }
}

template <int D> void launch(const AttentionParams& p, cudaStream_t stream) {
  SPECRT_CUDA_CHECK(cudaFuncSetAttribute(prefill_attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>));
  prefill_attention_kernel<D><<<dim3((p.rows + kRows - 1) / kRows, p.q_heads), kThreads, kSharedBytes<D>, stream>>>(p, p.scale * kLog2e);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace

void launch_prefill_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  auto s = static_cast<cudaStream_t>(stream);
  switch (p.head_dim) {
    case 64: return launch<64>(p, s);
    case 96: return launch<96>(p, s);
    case 128: return launch<128>(p, s);
    default: fail("prefill_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace specrt
