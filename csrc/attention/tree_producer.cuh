// The producer of tree attention: fills the ring of stages with the tiles of K and V that the consumers work on.
#pragma once
#include "attention/tree_job.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace specrt {

// The producer, a warp (of a warpgroup that gives its registers away): the tiles of a job, each of its stages filled as soon as it is free. What it does for a tile is one chain of
// instructions that wait for each other, and two warpgroups of consumers are through with a tile in 1600 cycles: so all it needs is in registers, and page ids come a chunk ahead.
template <typename S> struct Producer {
  const AttentionParams& p;
  uint32_t stages, full, empty;  // full: what a tile that has come arrives at
  int lane;
  Place<S::stages> at{0, 1};

  __device__ int page_shift() const { return __ffs(p.page) - 1; }

  __device__ int stage() {
    const int s = at.stage;
    ptx::mbarrier_wait(empty + 8 * s, at.parity);
    __syncwarp();
    at = at.after(1);
    return s;
  }

  // 64 slots of K, or V: a copy a page and 64 columns, by the lanes that have one: row `row` of the pool on, to `place` in the stage. L2 may drop them first: only the blocks of
  // this request read them again, and soon.
  __device__ void slots(const CUtensorMap* map, bool copies, int column, int row, uint32_t place) {
    const int s = stage(), bytes = __popc(__ballot_sync(~0u, copies)) * p.page * 128;
    if (lane == 0) ptx::mbarrier_arrive_expect(full + 8 * s, bytes);
    __syncwarp();
    if (copies) ptx::tma_load(stages + s * S::tile_bytes + place, map, column, row, full + 8 * s, ptx::evict_first_policy());
  }

  // The slot that an entry of a tile of paths comes from: entry = node (ancestors), or row x position in this tile (paths); -1: none.
  __device__ int slot_of_entry(const Job& job, int tile, int entry) const {
    if (p.ancestors) return entry < kFewNodes && job.block.wanted >> entry & 1 ? job.block.prefix + entry : -1;
    const int most = min(kTile, p.path_depth), r = entry / most, d = max(tile, job.block.prefix) + entry % most - job.block.prefix;
    if (r >= job.block.rows || d >= p.path_depth || d + job.block.prefix >= tile + kTile) return -1;
    const int row = job.block.begin + r, node = __ldcg(p.paths + (row * p.path_depth + d));
    return job.block.prefix + d < plan_len(p.plan, p.rows, row) ? job.block.prefix + node : -1;
  }

  // A tile of paths, of which entry lane + 32 i is row rows[i] of the pool, if not negative: by half warps, as so few bytes each would take the copy engine 40 cycles a copy.
  // Copies arrive at the barrier by themselves, too: what racecheck follows.
  __device__ void own(const void* pool, const int (&rows)[2]) {
    const int s = stage(), piece = lane % 16, first = lane / 16;
    uint32_t to = piece_address(stages + s * S::tile_bytes + S::Tile::at, first, piece);
    const char* const from = static_cast<const char*>(pool) + 16 * piece;
#pragma unroll 1
    for (int begin = 0; begin < kTile; begin += 8, to += 8 * 128) {
      const int mine = begin < 32 ? rows[0] : rows[1];
      if (!(__ballot_sync(~0u, mine >= 0) >> begin % 32 & 0xff)) continue;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int row = __shfl_sync(~0u, mine, begin % 32 + first + i);
        if (row >= 0 && piece < S::slot_pieces) ptx::cp_async_16((to ^ (i * 16)) + i * 128, from + static_cast<int64_t>(row) * (16 * S::slot_pieces), true);
      }
    }
    ptx::cp_async_arrive(full + 8 * s);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::async_proxy_fence();  // for those who multiply
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(full + 8 * s);
  }

  // The row of the pool [pages x kv heads x page, D] that holds a slot.
  __device__ int pool_row(const Job& job, int slot) const {
    return slot < 0 ? -1 : (__ldcg(p.block_table + (job.block.request * p.max_pages + (slot >> page_shift()))) * p.kv_heads + job.kv_head) * p.page + (slot & (p.page - 1));
  }

  __device__ void run(const Job& job, const CUtensorMap* k_pages, const CUtensorMap* v_pages) {
    // Of a tile's copies, this lane's: a page and 64 columns.
    const int shift = page_shift(), pages = kTile >> shift, page = lane & (pages - 1), block = lane >> (6 - shift);
    const uint32_t place = S::Tile::at + block * kBlockBytes + (page << shift) * 128;
    const int kv_head = job.kv_head, slots_end = job.slots_end(), first_seen = job.first_seen, own_begin = job.own_begin(), prefix = job.block.prefix, settled = job.block.settled;
    const int32_t* const table = p.block_table + job.block.request * p.max_pages;
    auto page_ids = [&](int chunk) {
      const int mine = (chunk * kChunk >> shift) + lane;
      return chunk * kChunk < slots_end && lane < (kChunk + kTile) >> shift && mine << shift < slots_end ? __ldcg(table + mine) : 0;
    };
    int coming = page_ids(job.chunk_begin);
#pragma unroll 1
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
      const int ids = coming, end = job.tiles_end(chunk);
      coming = page_ids(chunk + 1);
#pragma unroll 1
      for (int tile = job.tiles_begin(chunk); tile < end; tile += kTile) {
        const int first = ((tile - chunk * kChunk) >> shift) + page;
        auto row = [&](int page) { return (__shfl_sync(~0u, ids, page) * p.kv_heads + kv_head) << shift; };
        auto copies = [&](int tile) {
          const int slot = tile + (page << shift);
          return block < S::Tile::boxes && slot < slots_end && slot + p.page > first_seen;
        };
        const bool owns = tile + kTile > own_begin, loads = tile < prefix || (owns && job.loads_slots(tile));
        const bool more = owns && job.loads_more(tile), many = more && job.many_nodes, few = more && !many;
        const int slots_row = row(first), more_row = row(first + pages);
        int rows[2];
        if (few)
#pragma unroll
          for (int half = 0; half < 2; ++half) rows[half] = pool_row(job, slot_of_entry(job, tile, lane + 32 * half));
        if (tile + kTile > settled) ptx::grid_dependency_wait();
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
          const CUtensorMap* map = which ? v_pages : k_pages;
          if (loads) slots(map, copies(tile), block * 64, slots_row, place);
          if (many) slots(map, copies(tile + kTile), block * 64, more_row, place);
          if (few) own(which ? p.v_pool : p.k_pool, rows);
        }
      }
    }
  }

  // Tells those who widen that no tile comes any more.
  __device__ void end(Rest<S>& rest) const {
    ptx::mbarrier_wait(empty + 8 * at.stage, at.parity);
    if (lane > 0) return;
    rest.end[at.stage] = true;
    ptx::mbarrier_arrive(full + 8 * at.stage);
  }
};

// A warp beside the producer, one of kWideners, where pools are e4m3: its part of every tile that comes.
template <typename S> __device__ void widen_tiles(Rest<S>& rest, uint32_t stages, uint32_t narrow, uint32_t full, int warp, int lane) {
  for (Place<S::stages> at;; at = at.after(1)) {
    ptx::mbarrier_wait(narrow + 8 * at.stage, at.parity);
    if (rest.end[at.stage]) return;
    widen_tile<S::columns>(stages + at.stage * S::tile_bytes, warp, lane);
    ptx::mbarrier_arrive(full + 8 * at.stage);
  }
}

}  // namespace specrt
