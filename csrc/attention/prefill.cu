// Prompt attention, bf16, on Hopper: 128 rows of one query head a block, 64 a warpgroup, over tiles of 64 keys; the same bits as tree.cu for the same row.
//
// A producer warp brings the pages of K and V by bulk tensor copies, kStages tiles ahead. Each of two warpgroups takes only the tiles its own rows see, and keeps queries,
// scores, the chunk's O and the group's O in registers; the total of the groups before, which few prompts have, lies in shared memory. While a tile's P V is on the
// tensor cores, so are the next tile's scores, and its softmax follows at once; the warpgroups take turns, so that one multiplies while the other exponentiates.
//
// Rows of several requests may share a block: it walks the runs of rows of one request in turn. V rows beyond what the run sees are zeroed in shared memory;
// a row's own masked positions have p = 0 times a finite V of the same request.
#include "attention/prefill_tile.cuh"
#include "base/launch.h"
#include "base/tensor_map.h"
#include "ptx/mbarrier.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"

namespace specrt {
namespace {

#ifndef SPECRT_PINGPONG
#define SPECRT_PINGPONG 1
#endif
constexpr int kWarpgroups = 2, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128, kRows = kWarpgroups * 64;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
enum NamedBarrier { kZeros = 1, kTurn = 1 + kWarpgroups };  // one a warpgroup

template <int D> struct Shared {
  static constexpr int tile_bytes = kTileBlocks<D> * kBlockBytes, stages = D > 64 ? 4 : 8;
  static constexpr int total_values = D / 8 + 1;  // of 4 floats, a thread: (m, l), O
  static constexpr int values = stages * tile_bytes, total = 2 * values, full_k = total + total_values * kConsumers * 16, full_v = full_k + stages * 8,
                       empty_k = full_v + stages * 8, empty_v = empty_k + stages * 8, bytes = empty_v + stages * 8;
};

// The block's rows: where each row's run ends, and how many positions it sees.
struct BlockRows {
  uint32_t starts[kRows / 32];  // bit r: row r is the first of its run
  int request[kRows], len[kRows];
};

// The first row of the run after the one of row r, or `rows`.
__device__ __forceinline__ int run_end(const BlockRows& block, int r, int rows) {
  for (int word = (r + 1) / 32; word * 32 < rows; ++word) {
    uint32_t bits = block.starts[word];
    if (word == (r + 1) / 32) bits &= ~0u << (r + 1) % 32;
    if (bits) return min(rows, word * 32 + __ffs(static_cast<int>(bits)) - 1);
  }
  return rows;
}

__device__ __forceinline__ Row row_of(const AttentionParams& p, int len) {
  Row row;
  row.prefix = row.len = len;
  if (p.window > 0) row.first = max(0, len - p.window);
  return row;
}

// Positions of the ring of tiles.
template <int D> struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Shared<D>::stages) stage = 0, parity ^= 1;
  }
};

// By one warp: all tiles of all runs.
template <int D> __device__ __forceinline__ void produce(const CUtensorMap& k_map, const CUtensorMap& v_map, const AttentionParams& p, const BlockRows& block,
                                                          int rows, int kv_head, uint32_t shared, int lane) {
  using S = Shared<D>;
  const int boxes = kTile / p.page;
  Place<D> at;
  for (int run = 0, next; run < rows; run = next) {
    next = run_end(block, run, rows);
    const int first = row_of(p, block.len[run]).first, end = block.len[next - 1];
    const int32_t* table = p.block_table + static_cast<int64_t>(block.request[run]) * p.max_pages;
    for (int tile = first / kTile * kTile; tile < end; tile += kTile) {
      const int begin = tile + lane * p.page;  // of the lane's page
      const bool mine = lane < boxes && begin < end && begin + p.page > first;
      const int row = mine ? (table[begin / p.page] * p.kv_heads + kv_head) * p.page : 0;
      const int bytes = __popc(__ballot_sync(~0u, mine)) * p.page * kTileBlocks<D> * kBlockColumns * 2;
      auto copy = [&](const CUtensorMap& map, int tiles, int full, int empty) {
        ptx::mbarrier_wait(shared + empty + at.stage * 8, at.parity ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect(shared + full + at.stage * 8, bytes);
        __syncwarp();
        if (!mine) return;
#pragma unroll
        for (int b = 0; b < kTileBlocks<D>; ++b)
          ptx::tma_load(shared + tiles + at.stage * S::tile_bytes + b * kBlockBytes + lane * p.page * kBlockColumns * 2, &map, b * kBlockColumns, row,
                        shared + full + at.stage * 8);
      };
      copy(k_map, 0, S::full_k, S::empty_k);
      copy(v_map, S::values, S::full_v, S::empty_v);
      at.advance();
    }
  }
}

// By one warpgroup: its rows [64 warpgroup, ..) of the block.
template <int D> __device__ __forceinline__ void consume(const AttentionParams& p, const BlockRows& block, float scale, int begin_row, int rows, int head, char* memory) {
  using S = Shared<D>;
  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, own = warpgroup * 64;
  const uint32_t shared = ptx::shared_address(memory);
  float4* saved = reinterpret_cast<float4*>(memory + S::total) + threadIdx.x;  // [n][threads]: (m, l) of both vectors, then O

  int vector[2];  // rows of the block
  PromptChunk<D> chunk;
  Sums<D> group;
  const int64_t row_stride = static_cast<int64_t>(p.q_heads) * D, head_offset = static_cast<int64_t>(head) * D;
  {
    const bf16* q[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      vector[i] = own + thread / 32 * 16 + lane / 4 + 8 * i;
      q[i] = vector[i] < rows ? static_cast<const bf16*>(p.q) + (begin_row + vector[i]) * row_stride + head_offset : nullptr;
    }
    chunk.load(q[0], q[1], lane);
  }

  Place<D> at;
  auto wait = [&](int full, const Place<D>& place) { ptx::mbarrier_wait(shared + full + place.stage * 8, place.parity); };
  auto release = [&](int empty, const Place<D>& place) {
    if (lane == 0) ptx::mbarrier_arrive(shared + empty + place.stage * 8);
  };
  auto take_turn = [&] {
    if (SPECRT_PINGPONG) ptx::named_barrier(kTurn + warpgroup, kConsumers);
  };
  auto give_turn = [&] {
    if (SPECRT_PINGPONG) ptx::named_barrier_arrive(kTurn + (warpgroup ^ 1), kConsumers);
  };
  if (warpgroup == 1) give_turn();  // the first turn is the first warpgroup's

  for (int run = 0, next; run < rows; run = next) {
    next = run_end(block, run, rows);
    const int run_first = row_of(p, block.len[run]).first, run_last = block.len[next - 1], tiles_begin = run_first / kTile * kTile;
    // What the warpgroup's rows of the run see: some of them [first, last), all of them [all_first, all_last).
    const int low_row = max(run, own), high_row = min(next, own + 64) - 1;
    int first = 0, last = 0, all_first = 0, all_last = 0;
    if (low_row <= high_row) {
      const Row low = row_of(p, block.len[low_row]), high = row_of(p, block.len[high_row]);
      first = low.first, last = high.len, all_first = high.first, all_last = low.len;
    }
    int len[2];  // of the thread's vectors; 0 in other runs
#pragma unroll
    for (int i = 0; i < 2; ++i) len[i] = vector[i] >= run && vector[i] < next ? block.len[vector[i]] : 0;

    auto pass = [&](int from, int to) {  // tiles that only the other warpgroup's rows see
      for (int tile = from; tile < to; tile += kTile) {
        take_turn();
        give_turn();
        wait(S::full_k, at);
        release(S::empty_k, at);
        wait(S::full_v, at);
        release(S::empty_v, at);
        at.advance();
      }
    };
    const int begin = last > first ? first / kTile * kTile : run_last, end = (last + kTile - 1) / kTile * kTile;
    pass(tiles_begin, min(begin, run_last));
    if (last > first) {
      auto wait_values = [&](int tile) {
        wait(S::full_v, at);
        if (tile >= run_first && tile + kTile <= run_last) return;
        char* values = memory + S::values + at.stage * S::tile_bytes;
        for (int i = thread; i < kTileBlocks<D> * kTile * 8; i += 128) {
          const int position = tile + i / 8 % kTile;
          if (position < run_first || position >= run_last) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
        }
        ptx::async_proxy_fence();
        ptx::named_barrier(kZeros + warpgroup, 128);
      };
      float a[2];
      auto softmax = [&](int tile) {
        if (tile >= all_first && tile + kTile <= all_last) return chunk.template softmax<false>({0, 0}, {kTile, kTile}, scale, lane, a);
        const Row row[2] = {row_of(p, len[0]), row_of(p, len[1])};
        chunk.template softmax<true>({row[0].low(tile), row[1].low(tile)}, {row[0].high(tile, kTile), row[1].high(tile, kTile)}, scale, lane, a);
      };
      auto sees = [&](int i, int begin, int size) { return row_of(p, len[i]).sees(begin, size); };
      auto fold_chunk = [&](int tile, const float (&m)[2]) {
        const bool seen[2] = {sees(0, tile / kChunk * kChunk, kChunk), sees(1, tile / kChunk * kChunk, kChunk)};
        group.fold(m, {chunk.l[0], chunk.l[2]}, chunk.o, seen);
      };
      bool has_total = false;
      // The total (empty, or saved) with the group of `tile` folded in, left in `group`.
      auto fold_group = [&](int tile) {
        const bool seen[2] = {sees(0, tile / kGroup * kGroup, kGroup), sees(1, tile / kGroup * kGroup, kGroup)};
        FoldFactors f[2];
        const float4 before = has_total ? saved[0] : make_float4(SPECRT_MINUS_INF, SPECRT_MINUS_INF, 0.0f, 0.0f);
        const float m[2] = {before.x, before.y}, l[2] = {before.z, before.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float top = m[i];
          f[i] = fold_factors(top, group.m[i]);
          group.m[i] = seen[i] ? top : m[i];
          group.l[i] = seen[i] ? fold_value(l[i], group.l[i], f[i]) : l[i];
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const float4 x = has_total ? saved[(n + 1) * kConsumers] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          float(&o)[4] = group.o[n];
          o[0] = seen[0] ? fold_value(x.x, o[0], f[0]) : x.x;
          o[1] = seen[0] ? fold_value(x.y, o[1], f[0]) : x.y;
          o[2] = seen[1] ? fold_value(x.z, o[2], f[1]) : x.z;
          o[3] = seen[1] ? fold_value(x.w, o[3], f[1]) : x.w;
        }
      };
      auto save_total = [&] {
        saved[0] = make_float4(group.m[0], group.m[1], group.l[0], group.l[1]);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) saved[(n + 1) * kConsumers] = make_float4(group.o[n][0], group.o[n][1], group.o[n][2], group.o[n][3]);
        has_total = true;
      };

      group.reset();
      wait(S::full_k, at);
      chunk.start_scores(shared + at.stage * S::tile_bytes);
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(chunk.s);
      release(S::empty_k, at);
      chunk.m[0] = chunk.m[1] = SPECRT_MINUS_INF;
      softmax(begin);
      chunk.reset_row_sums();
      chunk.round_and_add();
      bool fresh = true;  // the tile is the first of its chunk
      int tile = begin;
      for (; tile + kTile < end; tile += kTile) {
        const int coming = tile + kTile;
        Place<D> ahead = at;
        ahead.advance();
        wait(S::full_k, ahead);
        wait_values(tile);
        take_turn();
        chunk.start_scores(shared + ahead.stage * S::tile_bytes);
        chunk.start_values(shared + S::values + at.stage * S::tile_bytes, fresh);
        give_turn();
        ptx::wgmma_wait<1>();
        ptx::wgmma_results(chunk.s);
        release(S::empty_k, ahead);
        fresh = coming % kChunk == 0;
        const float m[2] = {chunk.m[0], chunk.m[1]};
        if (fresh) chunk.m[0] = chunk.m[1] = SPECRT_MINUS_INF;
        softmax(coming);
        ptx::wgmma_wait<0>();
        ptx::wgmma_results(chunk.o);
        release(S::empty_v, at);
        at = ahead;
        if (fresh) {
          fold_chunk(tile, m);
          chunk.reset_row_sums();
          if (coming % kGroup == 0) {
            fold_group(tile);
            save_total();
            group.reset();
          }
        } else {
          chunk.rescale(a);
        }
        chunk.round_and_add();
      }
      wait_values(tile);
      take_turn();
      chunk.start_values(shared + S::values + at.stage * S::tile_bytes, fresh);
      give_turn();
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(chunk.o);
      release(S::empty_v, at);
      at.advance();
      fold_chunk(tile, chunk.m);
      fold_group(tile);
    }
    if (last > first) pass(end, run_last);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (vector[i] < run || vector[i] >= next) continue;
      bf16* out = static_cast<bf16*>(p.out) + (begin_row + vector[i]) * row_stride + head_offset + lane % 4 * 2;
      const bool any = len[i] > 0;
      const float r = 1.0f / group.l[i];
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(out + n * 8) = any ? ptx::pack_bf16(group.o[n][2 * i] * r, group.o[n][2 * i + 1] * r) : 0u;
    }
  }
}

template <int D> __global__ void __launch_bounds__(kThreads, 1)
prefill_attention_kernel(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ AttentionParams p, float scale) {
  using S = Shared<D>;
  extern __shared__ __align__(1024) char memory[];
  __shared__ BlockRows block;
  const int lane = threadIdx.x % 32, head = blockIdx.x, begin_row = (gridDim.y - 1 - blockIdx.y) * kRows;  // long rows first
  const int rows = min(min(*p.num_rows, p.rows) - begin_row, kRows);
  if (rows <= 0) return;
  if (threadIdx.x < kRows) {
    const int r = threadIdx.x;
    const bool valid = r < rows;
    const int request = valid ? p.row_request[begin_row + r] : -1, before = valid && r ? p.row_request[begin_row + r - 1] : -1;
    block.request[r] = request;
    block.len[r] = valid ? p.row_prefix[begin_row + r] : 0;
    const uint32_t bits = __ballot_sync(~0u, request != before);
    if (lane == 0) block.starts[r / 32] = bits;
  }
  const uint32_t shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(shared + S::full_k + i * 8, 1);
      ptx::mbarrier_init(shared + S::full_v + i * 8, 1);
      ptx::mbarrier_init(shared + S::empty_k + i * 8, kConsumers / 32);
      ptx::mbarrier_init(shared + S::empty_v + i * 8, kConsumers / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x < kConsumers + 32) produce<D>(k_map, v_map, p, block, rows, head / (p.q_heads / p.kv_heads), shared, lane);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<D>(p, block, scale, begin_row, rows, head, memory);
  }
}

template <int D> void launch_prefill(const AttentionParams& p, cudaStream_t stream) {
  // The pool as rows of D elements; how many it has is not known here, and the block table stays inside.
  constexpr int kAnyRows = 0x7fffffff;
  const CUtensorMap k_map = tensor_map_bf16(p.k_pool, kAnyRows, D, p.page), v_map = tensor_map_bf16(p.v_pool, kAnyRows, D, p.page);
  Launch at;
  at.grid = dim3(p.q_heads, (p.rows + kRows - 1) / kRows);
  at.block = dim3(kThreads);
  at.shared_bytes = Shared<D>::bytes;
  at.stream = stream;
  launch(at, prefill_attention_kernel<D>, k_map, v_map, p, p.scale * kLog2e);
}

}  // namespace

void launch_prefill_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  auto s = static_cast<cudaStream_t>(stream);
  switch (p.head_dim) {
    case 64: return launch_prefill<64>(p, s);
    case 96: return launch_prefill<96>(p, s);
    case 128: return launch_prefill<128>(p, s);
    default: fail("prefill_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace specrt
