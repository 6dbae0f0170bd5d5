// Decode, verify and draft-expansion attention, bf16: split over chunks of 256 positions, then a combine kernel that folds them in order.
//
// Grid (row, kv head, split). Of each run of rows of one request every 4th row leads a block of 4 warps; the other rows' blocks exit at once. A warp owns one row:
// its query heads of this KV head are the 16 rows of the MMA. Keys below a row's prefix come from tiles that the 4 warps load together; a group of 16
// positions that reaches into the row's path is gathered by the warp into a buffer of its own, at its logical place. A block walks chunks split, split +
// splits, ...; which block does a chunk changes no bit. Bytes: K and V once for every 4 rows of a request (mostly from L2), partials D + 2 floats a (row, head, chunk).
//
// Barriers: K and V have one buffer each. K(t+1) is requested after all warps scored tile t, V(t+1) after all warps added tile t.
#include "attention/tile.cuh"
#include "base/check.h"

namespace specrt {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kGroupKeys = 16;

template <int D> constexpr int kSharedElements = (2 * kTile + 2 * kWarps * kGroupKeys) * kRowStride<D>;

// How many rows before r belong to its request, without a gap. All warps compute it alike.
__device__ int rows_before(const int32_t* row_request, int r, int lane) {
  const int request = row_request[r];
  int before = 0;
  while (true) {
    const int i = r - 1 - before - lane;
    const unsigned same = __ballot_sync(0xffffffffu, i >= 0 && row_request[max(i, 0)] == request);
    if (same != 0xffffffffu) return before + __ffs(static_cast<int>(~same)) - 1;
    before += 32;
  }
}

// Copies the 16 keys or values at positions begin.. of row r, along its path, into the warp's buffer; what the row does not see becomes zeros.
template <int D>
__device__ __forceinline__ void gather_group(const AttentionParams& p, const bf16* pool, int64_t my_offset, bf16* to, int lane) {
  constexpr int kPieces = D / 8;
#pragma unroll 2
  for (int i = 0; i < kGroupKeys * kPieces / 32; ++i) {
    const int index = i * 32 + lane, j = index / kPieces, piece = index % kPieces;
    const long long at = __shfl_sync(0xffffffffu, static_cast<long long>(my_offset), j);
    ptx::cp_async_16(ptx::shared_address(to + j * kRowStride<D> + piece * 8), pool + (at < 0 ? 0 : at + piece * 8), at >= 0);
  }
}

template <int D> __global__ void __launch_bounds__(kThreads) tree_attention_kernel(AttentionParams p, float scale, int chunks) {
  extern __shared__ __align__(16) bf16 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y, leader = blockIdx.x;
  const int rows = min(*p.num_rows, p.rows);
  if (leader >= rows || rows_before(p.row_request, leader, lane) % kWarps) return;
  const int request = p.row_request[leader];
  int count = 1;
  while (count < kWarps && leader + count < rows && p.row_request[leader + count] == request) ++count;

  // What the block's rows see: from the request's own slots [first, shared_end), with their paths [first, end).
  Row row;
  int first = 0x7fffffff, shared_end = 0, end = 0;
  for (int i = 0; i < count; ++i) {
    const Row other = describe_row(p, leader + i);
    first = min(first, other.first);
    shared_end = max(shared_end, other.prefix);
    end = max(end, other.len);
    if (i == warp) row = other;
  }
  const int r = leader + warp, group = p.q_heads / p.kv_heads;  // warps without a row see nothing and only help to load

  bf16 *keys = shared, *values = keys + kTile * kRowStride<D>;
  bf16* own_keys = values + kTile * kRowStride<D> + warp * 2 * kGroupKeys * kRowStride<D>;
  bf16* own_values = own_keys + kGroupKeys * kRowStride<D>;
  const bf16 *k_pool = static_cast<const bf16*>(p.k_pool), *v_pool = static_cast<const bf16*>(p.v_pool);

  QueryFragment<D> q;
  const bf16* q_row = static_cast<const bf16*>(p.q) + (static_cast<int64_t>(r) * p.q_heads + kv_head * group) * D;
  q.load(warp < count && lane / 4 < group ? q_row + lane / 4 * D : nullptr, warp < count && lane / 4 + 8 < group ? q_row + (lane / 4 + 8) * D : nullptr, lane);

  TileState<D> state;
  for (int chunk = first / kChunk + blockIdx.z; chunk * kChunk < end; chunk += gridDim.z) {
    const int tiles_begin = max(chunk * kChunk, first / kTile * kTile), tiles_end = min(chunk * kChunk + kChunk, end);
    state.reset();
    copy_tile<D, kThreads>(p, k_pool, request, kv_head, tiles_begin, first, shared_end, keys);
    ptx::cp_async_commit();
    for (int tile = tiles_begin; tile < tiles_end; tile += kTile) {
      copy_tile<D, kThreads>(p, v_pool, request, kv_head, tile, first, shared_end, values);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();  // K(t) is there
      const bool sees = row.sees(tile, kTile);
      auto gathered = [&](int g) { return row.len > row.prefix && tile + (g + 1) * kGroupKeys > row.prefix && row.sees(tile + g * kGroupKeys, kGroupKeys); };
      auto offset = [&](int g) -> int64_t {  // of the key of lanes 0..15; -1: not visible
        const int position = tile + g * kGroupKeys + lane % kGroupKeys;
        return position >= row.first && position < row.len ? slot_offset(p, request, kv_head, slot_of(p, r, row, position)) : -1;
      };
      Scores scores;
      int held = -1;  // the group whose V is in the warp's buffer
      if (sees) {
#pragma unroll
        for (int g = 0; g < kTile / kGroupKeys; ++g) {
          const bool own = gathered(g);
          if (own) {
            const int64_t at = offset(g);
            __syncwarp();  // the buffers' last readers are done
            gather_group<D>(p, k_pool, at, own_keys, lane);
            gather_group<D>(p, v_pool, at, own_values, lane);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            __syncwarp();
            held = g;
          }
          score_keys<D>(scores, g, q, own ? own_keys : keys + g * kGroupKeys * kRowStride<D>, lane);
        }
      }
      __syncthreads();  // nobody reads K(t) any more
      if (tile + kTile < tiles_end) copy_tile<D, kThreads>(p, k_pool, request, kv_head, tile + kTile, first, shared_end, keys);
      ptx::cp_async_commit();  // empty at the chunk's end: the count of groups stays the same
      if (sees) {
        const int low[2] = {row.low(tile), row.low(tile)}, high[2] = {row.high(tile, kTile), row.high(tile, kTile)};
        softmax_tile<D>(scores, state, low, high, scale, lane);
      }
      ptx::cp_async_wait<1>();
      __syncthreads();  // V(t) is there
      if (sees) {
#pragma unroll
        for (int g = 0; g < kTile / kGroupKeys; ++g) {
          const bool own = gathered(g);
          if (own && held != g) {
            const int64_t at = offset(g);
            __syncwarp();
            gather_group<D>(p, v_pool, at, own_values, lane);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            __syncwarp();
            held = g;
          }
          accumulate_values<D>(scores, g, state, own ? own_values : values + g * kGroupKeys * kRowStride<D>, lane);
        }
      }
      __syncthreads();  // nobody reads V(t) any more
    }
    if (!row.sees(chunk * kChunk, kChunk)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = lane / 4 + 8 * i;
      if (head >= group) continue;
      const int64_t at = (static_cast<int64_t>(r) * p.q_heads + kv_head * group + head) * chunks + chunk;
      float* o = p.workspace + at * D + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) *reinterpret_cast<float2*>(o + n * 8) = make_float2(state.o[n][2 * i], state.o[n][2 * i + 1]);
      float* ml = p.workspace + static_cast<int64_t>(p.rows) * p.q_heads * chunks * D + at * 2;
      if (lane % 4 == 0) *reinterpret_cast<float2*>(ml) = make_float2(state.m[i], state.l[2 * i]);
    }
  }
}

// One warp a (row, head): chunks ascending into their group, groups ascending.
template <int D> __global__ void __launch_bounds__(kThreads) combine_kernel(AttentionParams p, int chunks) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, r = static_cast<int>(vector / p.q_heads);
  if (r >= p.rows || r >= *p.num_rows) return;
  const Row row = describe_row(p, r);
  const float* o = p.workspace + vector * chunks * D + lane;
  const float* ml = p.workspace + static_cast<int64_t>(p.rows) * p.q_heads * chunks * D + vector * chunks * 2;
  WarpState<D / 32> chunk, group, total;
  group.reset();
  total.reset();
  for (int c = row.first / kChunk; c * kChunk < row.len; ++c) {
    chunk.m = ml[2 * c];
    chunk.l = ml[2 * c + 1];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) chunk.o[i] = o[static_cast<int64_t>(c) * D + 32 * i];
    group.fold(chunk);
    if ((c + 1) % kGroupChunks && (c + 1) * kChunk < row.len) continue;
    total.fold(group);
    group.reset();
  }
  bf16* out = static_cast<bf16*>(p.out) + vector * D + lane;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) out[32 * i] = to_bf16(row.len > 0 ? total.o[i] / total.l : 0.0f);
}

template <int D> void launch(const AttentionParams& p, cudaStream_t stream) {
  const int chunks = static_cast<int>((static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk);
  // Enough blocks to fill the machine, few enough that those without work cost little.
  constexpr int64_t kBlocks = 4096;
  const int64_t splits = kBlocks / (static_cast<int64_t>(p.rows) * p.kv_heads) + 1;
  const dim3 grid(p.rows, p.kv_heads, static_cast<unsigned>(splits < chunks ? splits : (chunks > 0 ? chunks : 1)));
  constexpr int kBytes = kSharedElements<D> * static_cast<int>(sizeof(bf16));
  SPECRT_CUDA_CHECK(cudaFuncSetAttribute(tree_attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  tree_attention_kernel<D><<<grid, kThreads, kBytes, stream>>>(p, p.scale * kLog2e, chunks);
  SPECRT_CHECK_LAUNCH();
  const int64_t vectors = static_cast<int64_t>(p.rows) * p.q_heads;
  combine_kernel<D><<<static_cast<unsigned>((vectors + kWarps - 1) / kWarps), kThreads, 0, stream>>>(p, chunks);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace

void launch_tree_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  auto s = static_cast<cudaStream_t>(stream);
  switch (p.head_dim) {
    case 64: return launch<64>(p, s);
    case 96: return launch<96>(p, s);
    case 128: return launch<128>(p, s);
    default: fail("tree_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace specrt
