// Prompt attention, bf16 over bf16 or e4m3 pools, on Hopper: 128 rows of one query head at a time, 64 a warpgroup, over tiles of 64 keys; the same bits as tree.cu for the same row.
//
// A job is the rows of one request in a block of 128 and a head. CTAs stay and walk the jobs, long ones first; a producer warp finds them and brings their queries and the
// pages of K and V by bulk tensor copies, so that a job's first tiles are there when the one before it ends. Each of two warpgroups takes only the tiles its own rows
// see, and keeps scores, the chunk's O and the group's O in registers; the total of the groups before, which few prompts have, lies in shared memory. While a tile's
// P V is on the tensor cores, so are the next tile's scores, and its softmax follows at once. (Making the warpgroups take turns on the tensor cores: 4 % slower.)
//
// Tiles of e4m3 pools are widened by the warps beside the producer before a warpgroup sees them (widen.cuh): again for every job that reads them.
// V rows beyond what the job sees are zeroed in shared memory; a row's own masked positions have p = 0 times a finite V of the same request.
#include "attention/prefill_tile.cuh"
#include "attention/widen.cuh"
#include "base/launch.h"
#include "base/tensor_map.h"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"

namespace specrt {
namespace {

constexpr int kWarpgroups = 2, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128, kRows = kWarpgroups * 64;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kZerosBarrier = 1;  // and one more: one a warpgroup

// Rows [begin, end) of the block that starts at `row`, of one request; `len`: positions that row `begin` sees, one more each further row. No rows: the end.
struct Job {
  int row, begin, end, len, head;

  __device__ __forceinline__ int len_of(int r) const { return r >= begin && r < end ? len + r - begin : 0; }
  __device__ __forceinline__ int last() const { return len_of(end - 1); }
};

__device__ __forceinline__ int first_seen(const AttentionParams& p, int len) { return p.window > 0 ? max(0, len - p.window) : 0; }

// Shared memory: stages of K and of V, the queries of each warpgroup, the total's O (16 bytes a thread and 8 columns), the rest.
template <int D> struct Layout {
  static constexpr int tile_bytes = kTileBlocks<D> * kBlockBytes, stages = D > 64 ? 4 : 6;
  static constexpr int values = stages * tile_bytes, queries = 2 * values, total = queries + kWarpgroups * tile_bytes, rest = total + D / 8 * kConsumers * 16;
};
template <int D> struct Rest {
  uint4 ones[16];
  float2 total[kRows];  // its (m, l)
  uint64_t full_k[Layout<D>::stages], full_v[Layout<D>::stages], empty_k[Layout<D>::stages], empty_v[Layout<D>::stages], full_q, empty_q;
  uint64_t narrow_k[Layout<D>::stages], narrow_v[Layout<D>::stages];  // an e4m3 tile has come: full follows when it is wide
  alignas(16) Job job;  // comes with the queries
  alignas(16) bool end[Layout<D>::stages];  // no e4m3 tile, neither K nor V: the producer has done. Outside any wide load of the job
};
template <int D> constexpr int kSharedBytes = Layout<D>::rest + static_cast<int>(sizeof(Rest<D>));

// A place in the ring of stages.
template <int D> struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Layout<D>::stages) stage = 0, parity ^= 1;
  }
};

template <int D, typename KV> struct Producer {
  using Tile = Arrival<KV, kTileColumns<D>>;
  const CUtensorMap &q_map, &k_map, &v_map;
  const AttentionParams& p;
  Rest<D>& rest;
  uint32_t shared;
  int lane;
  Place<D> at;
  uint32_t job_parity = 0;

  __device__ void publish(const Job& job, int query_bytes) {
    ptx::mbarrier_wait(ptx::shared_address(&rest.empty_q), job_parity ^ 1);
    job_parity ^= 1;
    if (lane == 0) {
      rest.job = job;
      ptx::mbarrier_arrive_expect(ptx::shared_address(&rest.full_q), query_bytes);
    }
    __syncwarp();
  }

  __device__ void load_queries(const Job& job) {
    publish(job, kWarpgroups * Layout<D>::tile_bytes);
    constexpr int kCopies = kWarpgroups * kTileBlocks<D>;
    const int warpgroup = lane / kTileBlocks<D>, block = lane % kTileBlocks<D>;
    if (lane < kCopies)
      ptx::tma_load(shared + Layout<D>::queries + lane * kBlockBytes, &q_map, job.head * D + block * kBlockColumns, job.row + warpgroup * 64, ptx::shared_address(&rest.full_q));
  }

  // All tiles of a job.
  __device__ void run(const Job& job, int request) {
    const int first = first_seen(p, job.len), end = job.last(), boxes = kTile / p.page, kv_head = job.head / (p.q_heads / p.kv_heads);
    const int32_t* table = p.block_table + static_cast<int64_t>(request) * p.max_pages;
    auto copies = [&](int tile) {  // whether this lane copies a page of the tile
      const int begin = tile + lane * p.page;
      return lane < boxes && begin < end && begin + p.page > first;
    };
    auto page = [&](int tile) { return copies(tile) ? table[(tile + lane * p.page) / p.page] : 0; };
    const int tiles_begin = first / kTile * kTile;
    int coming = page(tiles_begin);
    for (int tile = tiles_begin; tile < end; tile += kTile) {
      const bool mine = copies(tile);
      const int row = (coming * p.kv_heads + kv_head) * p.page, bytes = __popc(__ballot_sync(~0u, mine)) * p.page * Tile::boxes * 128;
      coming = page(tile + kTile);
      auto copy = [&](const CUtensorMap& map, int tiles, uint64_t* full, uint64_t* empty) {
        const uint32_t bell = ptx::shared_address(full + at.stage);
        ptx::mbarrier_wait(ptx::shared_address(empty + at.stage), at.parity ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect(bell, bytes);
        __syncwarp();
        if (!mine) return;
#pragma unroll
        for (int b = 0; b < Tile::boxes; ++b)
          ptx::tma_load(shared + tiles + at.stage * Layout<D>::tile_bytes + Tile::at + b * kBlockBytes + lane * p.page * kBlockColumns * 2, &map, b * kBlockColumns, row, bell);
      };
      copy(k_map, 0, Tile::fp8 ? rest.narrow_k : rest.full_k, rest.empty_k);
      if (tile == tiles_begin) load_queries(job);
      copy(v_map, Layout<D>::values, Tile::fp8 ? rest.narrow_v : rest.full_v, rest.empty_v);
      at.advance();
    }
    if (tiles_begin >= end) load_queries(job);  // nobody sees anything: zeros are due
  }

  // The runs of rows of one request in a block.
  __device__ void block(int row, int head, int rows) {
    int request[kRows / 32];
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) request[i] = i * 32 + lane < rows ? p.row_request[row + i * 32 + lane] : -1;
    for (int begin = 0, end; begin < rows; begin = end) {
      int own = 0;
#pragma unroll
      for (int i = 0; i < kRows / 32; ++i)
        if (begin / 32 == i) own = __shfl_sync(~0u, request[i], begin % 32);
      end = rows;
#pragma unroll
      for (int i = kRows / 32 - 1; i >= 0; --i) {
        const uint32_t others = __ballot_sync(~0u, i * 32 + lane >= begin && i * 32 + lane < rows && request[i] != own);
        if (others) end = i * 32 + __ffs(static_cast<int>(others)) - 1;
      }
      run({row, begin, end, p.row_prefix[row + begin], head}, own);
    }
  }

  __device__ void all() {
    const int rows = min(*p.num_rows, p.rows), blocks = (rows + kRows - 1) / kRows, items = blocks * p.q_heads, ctas = gridDim.x, cta = blockIdx.x;
    for (int round = 0; round * ctas < items; ++round) {  // long rows first, forth and back: every CTA gets as much
      const int item = round * ctas + (round % 2 ? ctas - 1 - cta : cta);
      if (item >= items) continue;
      const int row = (blocks - 1 - item / p.q_heads) * kRows;
      block(row, item % p.q_heads, min(kRows, rows - row));
    }
    publish({0, 0, 0, 0, 0}, 0);
    if constexpr (Tile::fp8) {
      static_assert(Layout<D>::stages >= 3, "whoever still widens the values of the last tiles would find the mark");
      ptx::mbarrier_wait(ptx::shared_address(rest.empty_k + at.stage), at.parity ^ 1);
      if (lane == 0) {
        rest.end[at.stage] = true;
        ptx::mbarrier_arrive(ptx::shared_address(rest.narrow_k + at.stage));
      }
    }
  }
};

// A warp beside the producer, one of kWideners, where pools are e4m3: its part of every tile that comes.
template <int D> __device__ void widen_tiles(Rest<D>& rest, uint32_t shared, int warp, int lane) {
  for (Place<D> at;; at.advance())
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {  // K, V
      ptx::mbarrier_wait(ptx::shared_address((which ? rest.narrow_v : rest.narrow_k) + at.stage), at.parity);
      if (rest.end[at.stage]) return;
      widen_tile<kTileColumns<D>>(shared + which * Layout<D>::values + at.stage * Layout<D>::tile_bytes, warp, lane);
      ptx::mbarrier_arrive(ptx::shared_address((which ? rest.full_v : rest.full_k) + at.stage));
    }
}

// A warpgroup: its rows [64 warpgroup, ..) of every block.
template <int D> struct Consumer {
  using L = Layout<D>;
  const AttentionParams& p;
  Rest<D>& rest;
  char* memory;
  float scale;
  uint32_t shared;
  int warpgroup, lane, row;  // row: vector i = 0 in the block; i = 1: row + 8
  Place<D> at;

  __device__ __forceinline__ static void wait(uint64_t* full, const Place<D>& place) { ptx::mbarrier_wait(ptx::shared_address(full + place.stage), place.parity); }
  __device__ __forceinline__ void release(uint64_t* empty, const Place<D>& place) const {
    ptx::mbarrier_arrive(ptx::shared_address(empty + place.stage));
  }
  // Tiles [from, to) that only the other warpgroup's rows see.
  __device__ __forceinline__ void pass(int from, int to) {
#pragma unroll 1
    for (int tile = from; tile < to; tile += kTile) {
      wait(rest.full_k, at);
      release(rest.empty_k, at);
      wait(rest.full_v, at);
      release(rest.empty_v, at);
      at.advance();
    }
  }

  // Waits for a tile's V; its rows outside [first, last) become zeros.
  __device__ __forceinline__ void wait_values(int tile, int first, int last) const {
    wait(rest.full_v, at);
    if (tile >= first && tile + kTile <= last) return;
    char* values = memory + L::values + at.stage * L::tile_bytes;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kTileBlocks<D> * kTile * 8; i += 128) {
      const int position = tile + i / 8 % kTile;
      if (position < first || position >= last) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
    }
    ptx::async_proxy_fence();
    ptx::named_barrier(kZerosBarrier + warpgroup, 128);
  }

  // The group, with the total before it, if any, folded in.
  __device__ __forceinline__ void fold_total(PromptSums<D>& group, bool has_total, const bool (&seen)[2]) const {
    if (!has_total) return;
    FoldFactors f[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 before = rest.total[row + 8 * i];
      float top = before.x;
      f[i] = {1.0f, 0.0f};
      if (seen[i]) f[i] = fold_factors(top, group.m[i]);
      group.m[i] = top;
      group.l[i] = seen[i] ? fold_value(before.y, group.l[i], f[i]) : before.y;
    }
    const float4* total = reinterpret_cast<const float4*>(memory + L::total) + threadIdx.x;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float4 x = total[n * kConsumers];
      const float before[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) group.o[n][e] = seen[e / 2] ? fold_value(before[e], group.o[n][e], f[e / 2]) : before[e];
    }
  }
  __device__ __forceinline__ void save_total(const PromptSums<D>& group) const {
    float4* total = reinterpret_cast<float4*>(memory + L::total) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) rest.total[row + 8 * i] = make_float2(group.m[i], group.l[i]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) total[n * kConsumers] = make_float4(group.o[n][0], group.o[n][1], group.o[n][2], group.o[n][3]);
  }

  __device__ __forceinline__ void run(const Job& job, const uint32_t queries) {
    const int low_row = max(job.begin, warpgroup * 64), high_row = min(job.end, warpgroup * 64 + 64) - 1;
    const int run_first = first_seen(p, job.len), run_last = job.last();
    const bool any = low_row <= high_row && job.len_of(high_row) > 0;
    // some of the warpgroup's rows see [first, last), all of them [all_first, all_last)
    const int first = first_seen(p, job.len_of(low_row)), last = job.len_of(high_row), all_first = first_seen(p, last), all_last = job.len_of(low_row);
    const int begin = any ? first / kTile * kTile : run_last, end = (last + kTile - 1) / kTile * kTile;
    pass(run_first / kTile * kTile, begin);
    PromptSums<D> group;
    group.reset();
    if (any) {
      PromptChunk<D> chunk;
      float a[2];
      auto sees = [&](int i, int from, int size) {
        const int len = job.len_of(row + 8 * i);
        return max(first_seen(p, len), from) < min(len, from + size);
      };
      auto softmax = [&](int tile) {
        // Two calls, each a block of code of its own: the compiler otherwise moves the exponentials behind the wait for the products they run beside.
        if (tile >= all_first && tile + kTile <= all_last) return chunk.template softmax<false>(scale, a);
        const int len[2] = {job.len_of(row), job.len_of(row + 8)};
        chunk.mask({first_seen(p, len[0]) - tile, first_seen(p, len[1]) - tile}, {len[0] - tile, len[1] - tile}, lane);
        chunk.template softmax<true>(scale, a);
      };
      auto fold_chunk = [&](int tile, const float (&m)[2]) {
        const int from = tile / kChunk * kChunk;
        group.fold(m, {chunk.l[0][0], chunk.l[0][2]}, chunk.o, {sees(0, from, kChunk), sees(1, from, kChunk)});
      };
      bool has_total = false;
      auto fold_group = [&](int tile) {
        const int from = tile / kGroup * kGroup;
        fold_total(group, has_total, {sees(0, from, kGroup), sees(1, from, kGroup)});
      };
      const uint32_t ones = ptx::shared_address(rest.ones);

      wait(rest.full_k, at);
      chunk.start_scores(queries, shared + at.stage * L::tile_bytes);
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(chunk.s);
      release(rest.empty_k, at);
      chunk.m[0] = chunk.m[1] = SPECRT_MINUS_INF;
      softmax(begin);
      chunk.round();
      bool fresh = true;  // the tile is the first of its chunk
      int tile = begin;
#pragma unroll 1
      for (; tile + kTile < end; tile += kTile) {
        const int coming = tile + kTile;
        Place<D> ahead = at;
        ahead.advance();
        wait(rest.full_k, ahead);
        wait_values(tile, run_first, run_last);
        chunk.start_scores(queries, shared + ahead.stage * L::tile_bytes);
        if (!fresh) chunk.rescale(a);  // while those are made
        chunk.start_values(shared + L::values + at.stage * L::tile_bytes, ones, fresh);
        ptx::wgmma_wait<1>();
        ptx::wgmma_results(chunk.s);
        release(rest.empty_k, ahead);
        fresh = coming % kChunk == 0;
        const float m[2] = {chunk.m[0], chunk.m[1]};
        if (fresh) chunk.m[0] = chunk.m[1] = SPECRT_MINUS_INF;
        softmax(coming);
        ptx::wgmma_wait<0>();
        ptx::wgmma_results(chunk.l);
        ptx::wgmma_results(chunk.o);
        release(rest.empty_v, at);
        at = ahead;
        chunk.round();
        if (fresh) {
          fold_chunk(tile, m);
          if (coming % kGroup == 0) {
            fold_group(tile);
            save_total(group);
            has_total = true;
            group.reset();
          }
        }
      }
      ptx::mbarrier_arrive(ptx::shared_address(&rest.empty_q));
      wait_values(tile, run_first, run_last);
      if (!fresh) chunk.rescale(a);
      chunk.start_values(shared + L::values + at.stage * L::tile_bytes, ones, fresh);
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(chunk.l);
      ptx::wgmma_results(chunk.o);
      release(rest.empty_v, at);
      at.advance();
      fold_chunk(tile, chunk.m);
      fold_group(tile);
      pass(end, run_last);
    } else {
      ptx::mbarrier_arrive(ptx::shared_address(&rest.empty_q));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 8 * i;
      if (r < job.begin || r >= job.end) continue;
      bf16* out = static_cast<bf16*>(p.out) + (static_cast<int64_t>(job.row + r) * p.q_heads + job.head) * D + lane % 4 * 2;
      const bool sees = job.len_of(r) > 0;
      const float factor = 1.0f / group.l[i] * p.v_scale;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(out + n * 8) = sees ? ptx::pack_bf16(group.o[n][2 * i] * factor, group.o[n][2 * i + 1] * factor) : 0u;
    }
  }

  __device__ __forceinline__ void all() {
    const uint32_t queries = shared + L::queries + warpgroup * L::tile_bytes;
#pragma unroll 1
    for (uint32_t parity = 0;; parity ^= 1) {
      ptx::mbarrier_wait(ptx::shared_address(&rest.full_q), parity);
      auto same = [](int x) { return __shfl_sync(~0u, x, 0); };  // for the compiler: no lane has another
      const Job job{same(rest.job.row), same(rest.job.begin), same(rest.job.end), same(rest.job.len), same(rest.job.head)};
      if (job.begin == job.end) return;
      run(job, queries);
    }
  }
};

template <int D, typename KV> __global__ void __launch_bounds__(kThreads, 1)
prefill_attention_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                         const __grid_constant__ AttentionParams p, float scale) {
  extern __shared__ __align__(1024) char memory[];
  Rest<D>& rest = *reinterpret_cast<Rest<D>*>(memory + Layout<D>::rest);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x < 16) rest.ones[threadIdx.x] = make_uint4(0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout<D>::stages; ++i) {
      constexpr int kFillers = Arrival<KV, kTileColumns<D>>::fp8 ? 32 * kWideners : 1;
      ptx::mbarrier_init(ptx::shared_address(&rest.full_k[i]), kFillers);
      ptx::mbarrier_init(ptx::shared_address(&rest.full_v[i]), kFillers);
      ptx::mbarrier_init(ptx::shared_address(&rest.narrow_k[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&rest.narrow_v[i]), 1);
      rest.end[i] = false;
      ptx::mbarrier_init(ptx::shared_address(&rest.empty_k[i]), kConsumers);
      ptx::mbarrier_init(ptx::shared_address(&rest.empty_v[i]), kConsumers);
    }
    ptx::mbarrier_init(ptx::shared_address(&rest.full_q), 1);
    ptx::mbarrier_init(ptx::shared_address(&rest.empty_q), kConsumers);
    ptx::mbarrier_init_fence();
  }
  ptx::async_proxy_fence();
  __syncthreads();
  const uint32_t shared = ptx::shared_address(memory);
  if (warp >= kConsumers / 32) {
    ptx::give_registers<kProducerRegisters>();
    const int beside = warp - kConsumers / 32 - 1;
    if (beside < 0) Producer<D, KV>{q_map, k_map, v_map, p, rest, shared, lane}.all();
    else if constexpr (Arrival<KV, kTileColumns<D>>::fp8) widen_tiles<D>(rest, shared, beside, lane);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Consumer<D>{p, rest, memory, scale, shared, warp / 4, lane, warp * 16 + lane / 4}.all();
  }
}

template <int D, typename KV> void launch_prefill(const AttentionParams& p, cudaStream_t stream) {
  auto map = [&](const void* pool) { return pool_map<Arrival<KV, kTileColumns<D>>>(p, pool, p.page); };
  const int items = (p.rows + kRows - 1) / kRows * p.q_heads, slots = multiprocessors();
  launch({dim3(static_cast<unsigned>(items < slots ? items : slots)), dim3(kThreads), kSharedBytes<D>, stream}, prefill_attention_kernel<D, KV>,
         tensor_map_bf16(p.q, p.rows, p.q_heads * D, 64), map(p.k_pool), map(p.v_pool), p, score_factor(p));
}

template <typename KV> void launch_pool(const AttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_prefill<64, KV>(p, stream);
    case 96: return launch_prefill<96, KV>(p, stream);
    case 128: return launch_prefill<128, KV>(p, stream);
    default: fail("prefill_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace

void launch_prefill_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  require_hopper("prefill_attention");
  auto s = static_cast<cudaStream_t>(stream);
  p.kv_dtype == DType::kE4M3 ? launch_pool<e4m3>(p, s) : launch_pool<bf16>(p, s);
}

}  // namespace specrt
