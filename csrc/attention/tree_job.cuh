// What a CTA of tree attention works on, how its shared memory is laid out, and the producer that fills it.
#pragma once
#include "attention/plan.cuh"
#include "attention/tree_tile.cuh"
#include "attention/widen.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace specrt {

template <int dim_, int warpgroups_, typename KV> struct Shape {
  static constexpr int dim = dim_, warpgroups = warpgroups_, warps = 4 * warpgroups, consumers = 32 * warps, threads = consumers + 128;
  static constexpr int columns = Vectors<dim>::kColumns, vectors = 64 * warpgroups, blocks_per_sm = warpgroups == 1 ? 2 : 1;
  static constexpr int stages = warpgroups == 1 ? 4 : 6;  // at least 3: a tile's values and the next one's keys
  static constexpr int producer_registers = warpgroups == 1 ? 48 : 56, consumer_registers = warpgroups == 1 ? 208 : 224;
  using Tile = Arrival<KV, columns>;
  static constexpr int slot_pieces = dim * static_cast<int>(sizeof(KV)) / 16;  // of a slot in a pool, 16 bytes each
  static constexpr bool keeps_shared = warpgroups == 2;  // O of a run so far; else in the workspace: there are few vectors, or few chunks
  static constexpr int tile_bytes = columns / 64 * kBlockBytes, queries = stages * tile_bytes, kept = queries + warpgroups * tile_bytes;  // shared memory
  static constexpr int rest = kept + (keeps_shared ? consumers * (dim / 8) * 16 : 0);
};

constexpr int kOwnColumns = 80, kOwnPitch = kOwnColumns + 8;  // probabilities of a row's own keys: up to 15 slots before the first node's and 64 nodes

// A place in the ring of stages.
template <int stages> struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ Place after(int count) const {  // count <= stages
    const int to = stage + count;
    return to < stages ? Place{to, parity} : Place{to - stages, parity ^ 1};
  }
};

constexpr int kFewNodes = 8;  // so many slots are copied one by one rather than in whole pages

// What a CTA works on, and what its rows see.
struct Job {
  int jobs, index, kv_head, piece;  // with this one there are so many; of block number `index`
  Block block;
  int log_run, run_begin, chunk_begin, chunk_end, first_seen;  // run_begin: its first position; positions before first_seen: seen by no row
  bool has_paths, many_nodes;

  // The first one of this CTA: there may be none.
  __device__ __forceinline__ Job(const AttentionParams& p) {
    const PlanShare share = plan_share(p.plan, blockIdx.x);
    jobs = share.jobs;
    index = share.index;
    kv_head = share.kv_head;
    piece = share.piece;
    block = share.block;
    log_run = plan_header(p.plan).log_run;
    find(p);
  }
  // The next one. Of the same block and KV head, but for a piece 0.
  __device__ __forceinline__ void advance(const AttentionParams& p) {
    --jobs;
    if (++piece == block.pieces(log_run)) {
      piece = 0;
      if (++kv_head == p.kv_heads) {
        kv_head = 0;
        do block = plan_block(p.plan, ++index);
        while (block.longest == 0);
      }
    }
    find(p);
  }
  __device__ __forceinline__ void find(const AttentionParams& p) {
    first_seen = p.window > 0 ? max(0, block.shortest - p.window) : 0;
    run_begin = piece * kChunk << log_run;
    chunk_begin = max(piece << log_run, first_seen / kChunk);
    chunk_end = min((piece + 1) << log_run, (block.longest + kChunk - 1) / kChunk);
    has_paths = p.ancestors || p.paths;
    many_nodes = p.ancestors && block.nodes > kFewNodes;
  }

  // Tiles of a chunk. From own_begin() on, in groups of 16 positions, each row has keys of its own.
  __device__ int tiles_begin(int chunk) const { return max(chunk * kChunk, first_seen / kTile * kTile); }
  __device__ int tiles_end(int chunk) const { return min((chunk + 1) * kChunk, block.longest); }
  __device__ int own_begin() const { return has_paths && block.longest > block.prefix ? block.prefix / 16 * 16 : 0x7fffffff; }
  __device__ bool owns(int tile) const { return tile + kTile > own_begin(); }
  // What is loaded of K, and then of V: the slots of the tile's positions; and for the paths, where nodes are few, a tile of their own, else the slots after these.
  __device__ int slots_end() const { return many_nodes ? block.prefix + block.nodes : block.prefix; }
  __device__ bool loads_slots(int tile) const { return tile < block.prefix || (many_nodes && owns(tile)); }
  __device__ bool loads_more(int tile) const { return owns(tile) && (!many_nodes || tile + kTile < slots_end()); }
};

template <typename S> struct Rest {
  uint4 zeros;
  alignas(128) uint16_t ones[128];  // bf16
  Visible seen[S::warps][16];        // of a tile with keys of the rows' own, by the warp's rows
  uint16_t own[S::warps][16][kOwnPitch];
  uint8_t node_at[S::vectors][64];  // of a row's path, with ancestors
  uint64_t full[S::stages], empty[S::stages], narrow[S::stages];  // narrow: an e4m3 tile has come, full follows when it is wide
  uint64_t nodes[S::vectors];  // ancestors of a row
  int log_step;                // of the rows that a warp has: from one to the next
  int len[S::vectors];
  int vector_of[S::vectors];   // of the CTA: of all
  uint8_t row_of[S::vectors], head_of[S::vectors];  // its row in the block, its head in the group
  Job producer, consumers;     // what they work on: registers are wanted elsewhere
  bool end[S::stages];         // no e4m3 tile: the producer has done
};

template <typename S> constexpr int kSharedBytes = S::rest + static_cast<int>(sizeof(Rest<S>));

// The producer, a warp (of a warpgroup that gives its registers away): the tiles of a job, each of its stages filled as soon as it is free.
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

  // Slots tile .. tile + 63 of K, or V: a copy a page and 64 columns. L2 may drop them first: only the blocks of this request read them again, and soon.
  __device__ void tile(const Job& job, const CUtensorMap* map, int tile, int page_ids) {
    const int shift = page_shift(), page = lane & ((kTile >> shift) - 1), block = lane << shift >> 6, at = tile + (page << shift);
    const bool copies = block < S::Tile::boxes && at < job.slots_end() && at + p.page > job.first_seen;
    const int s = stage(), bytes = __popc(__ballot_sync(~0u, copies)) * p.page * 128;
    if (lane == 0) ptx::mbarrier_arrive_expect(full + 8 * s, bytes);
    __syncwarp();
    const uint32_t to = stages + s * S::tile_bytes + S::Tile::at + block * kBlockBytes + page * p.page * 128;
    if (copies) ptx::tma_load(to, map, block * 64, (page_ids * p.kv_heads + job.kv_head) * p.page, full + 8 * s, ptx::evict_first_policy());
  }

  // The slot that an entry of a tile of paths comes from: entry = node (ancestors), or row x position in this tile (paths); -1: none.
  __device__ int slot(const Job& job, int tile, int entry) const {
    if (p.ancestors) return entry < kFewNodes && job.block.wanted >> entry & 1 ? job.block.prefix + entry : -1;
    const int most = min(kTile, p.path_depth), r = entry / most, d = max(tile, job.block.prefix) + entry % most - job.block.prefix;
    if (r >= job.block.rows || d >= p.path_depth || d + job.block.prefix >= tile + kTile) return -1;
    const int row = job.block.begin + r, node = __ldcg(p.paths + (row * p.path_depth + d));
    return job.block.prefix + d < plan_len(p.plan, p.rows, row) ? job.block.prefix + node : -1;
  }

  // A tile of paths, of which entry lane + 32 i is row rows[i] of the pool, if not negative: by half warps, as so few bytes each would take the copy engine 40 cycles a copy.
  // Lanes beyond a slot's last piece copy that one, too.
  __device__ void own(const void* pool, const int (&rows)[2]) {
    const int s = stage(), piece = min(lane % 16, S::slot_pieces - 1), first = lane / 16;
    uint32_t to = piece_address(stages + s * S::tile_bytes + S::Tile::at, first, piece);
    const char* const from = static_cast<const char*>(pool) + 16 * piece;
#pragma unroll 1
    for (int begin = 0; begin < kTile; begin += 8, to += 8 * 128) {
      const int mine = begin < 32 ? rows[0] : rows[1];
      if (!(__ballot_sync(~0u, mine >= 0) >> begin % 32 & 0xff)) continue;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int row = __shfl_sync(~0u, mine, begin % 32 + first + i);
        if (row >= 0) ptx::cp_async_16((to ^ (i * 16)) + i * 128, from + static_cast<int64_t>(row) * (16 * S::slot_pieces), true);
      }
    }
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
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
      const int begin = job.tiles_begin(chunk), end = job.tiles_end(chunk), shift = page_shift(), first_page = chunk * kChunk >> shift, mine = first_page + lane;
      const int ids = lane < (kChunk + kTile) >> shift && mine * p.page < job.slots_end() && (mine + 1) * p.page > begin ? __ldcg(p.block_table + (job.block.request * p.max_pages + mine)) : 0;
      for (int at = begin; at < end; at += kTile) {
        const bool slots = job.loads_slots(at), more = job.loads_more(at);
        const int place = (at >> shift) - first_page + (lane & ((kTile >> shift) - 1));
        const int page_ids = __shfl_sync(~0u, ids, place), more_ids = __shfl_sync(~0u, ids, place + (kTile >> shift));
        int rows[2];
        if (more && !job.many_nodes)
#pragma unroll
          for (int half = 0; half < 2; ++half) rows[half] = pool_row(job, slot(job, at, lane + 32 * half));
        if (at + kTile > job.block.settled) ptx::grid_dependency_wait();
        for (int which = 0; which < 2; ++which) {
          const CUtensorMap* pages = which ? v_pages : k_pages;
          if (slots) tile(job, pages, at, page_ids);
          if (more && job.many_nodes) tile(job, pages, at + kTile, more_ids);
          if (more && !job.many_nodes) own(which ? p.v_pool : p.k_pool, rows);
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
