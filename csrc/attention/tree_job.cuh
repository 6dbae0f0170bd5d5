// What a cluster of tree attention works on, how an SM's shared memory is laid out for it, and the producers that fill it.
#pragma once
#include "attention/plan.cuh"
#include "attention/tree_fold.cuh"
#include "attention/tree_tile.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace specrt {

constexpr int kMostStages = 12, kFewNodes = 8;  // so many slots are copied one by one rather than in whole pages

template <int dim_, int warpgroups_> struct TreeKernel {
  static constexpr int dim = dim_, warpgroups = warpgroups_, warps = 4 * warpgroups, consumers = 32 * warps, threads = consumers + 128;
  static constexpr int columns = Vectors<dim>::kColumns, pieces = dim / 8, blocks_per_sm = warpgroups == 1 ? 2 : 1;
  static constexpr int producer_registers = 56, consumer_registers = warpgroups == 1 ? 200 : 224;
  static constexpr int tile_bytes = columns / 64 * kBlockBytes;
};

// A block of rows and a KV head. Positions before first_seen are seen by no row.
struct Job {
  Block block;
  int kv_head, first_seen;
  bool has_paths, many_nodes;

  Job() = default;
  __device__ __forceinline__ Job(const AttentionParams& p, const Block& block_, int kv_head_) : block(block_), kv_head(kv_head_) {
    first_seen = p.window > 0 ? max(0, block.shortest - p.window) : 0;
    has_paths = p.ancestors || p.paths;
    many_nodes = p.ancestors && block.nodes > kFewNodes;
  }

  __device__ __forceinline__ int chunk_begin() const { return first_seen / kChunk; }
  __device__ __forceinline__ int chunk_end() const { return max(chunk_begin() + 1, (block.longest + kChunk - 1) / kChunk); }
  // Tiles of a chunk. From own_begin() on, in groups of 16 positions, each row has keys of its own.
  __device__ __forceinline__ int tiles_begin(int chunk) const { return max(chunk * kChunk, first_seen / kTile * kTile); }
  __device__ __forceinline__ int tiles_end(int chunk) const { return min((chunk + 1) * kChunk, block.longest); }
  __device__ __forceinline__ int own_begin() const { return has_paths && block.longest > block.prefix ? block.prefix / 16 * 16 : 0x7fffffff; }
  __device__ __forceinline__ int own_tile() const { return own_begin() / kTile * kTile; }
  __device__ __forceinline__ bool owns(int tile) const { return tile + kTile > own_begin(); }
  // What is loaded of K, and then of V: the slots of the tile's positions; and for the paths, where nodes are few, a tile of their own, else the slots after these.
  __device__ __forceinline__ int slots_end() const { return many_nodes ? block.prefix + block.nodes : block.prefix; }
  __device__ __forceinline__ bool loads_slots(int tile) const { return tile < block.prefix || (many_nodes && owns(tile)); }
  __device__ __forceinline__ bool loads_more(int tile) const { return owns(tile) && (!many_nodes || tile + kTile < slots_end()); }
  // Whether the slots of a tile that are seen were written before this pass over the rows. Without paths the last ones are the rows' own.
  __device__ __forceinline__ bool old(int tile) const { return has_paths && (!many_nodes || tile + kTile <= block.prefix); }
};

constexpr int kOwnColumns = 80, kOwnPitch = kOwnColumns + 8;  // probabilities of a row's own keys: up to 15 slots before the first node's and 64 nodes

template <typename S> struct Shared {
  alignas(1024) unsigned char queries[S::warpgroups * S::tile_bytes];
  uint16_t own[S::warps][16][kOwnPitch];
  Visible seen[S::warps][16];        // of a tile with keys of the rows' own, by the warp's rows
  uint8_t places[S::warps][16][16];  // of a row's group of 16 positions: the row of the stages at each, 255: none
  uint64_t nodes[S::warpgroups * 64];  // ancestors of a row
  int len[S::warpgroups * 64];
  uint4 zeros;
  Block first;  // of the first job
  int jobs;
  Job job;  // the consumers'
  uint64_t full[kMostStages], empty[kMostStages], queries_full, queries_empty, left;
};

// What follows it. One CTA: the group so far, of vector i of a thread; a cluster: groups, before they join their total. Then the stages.
template <typename S> struct AloneSums {
  float2 values[2][S::pieces][S::consumers], sums[S::warps][16];
};
template <typename S> struct ClusterSums {
  VectorSums groups[S::warps][32];
};
template <typename S> constexpr int stages_at(int ranks) {
  const int end = static_cast<int>(sizeof(Shared<S>) + (ranks == 1 ? sizeof(AloneSums<S>) : sizeof(ClusterSums<S>)));
  return (end + 1023) / 1024 * 1024;
}

// A place in the ring of stages.
struct Place {
  int stage;
  uint32_t parity;
  __device__ __forceinline__ Place after(int count, int stages) const {  // count <= 4
    Place to{stage + count, parity};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (to.stage >= stages) to = {to.stage - stages, to.parity ^ 1};
    return to;
  }
};

// K at 0, V at 1: a page, and a slot, a copy.
struct TreeMaps {
  CUtensorMap queries, pages[2], slots[2];
};

// A warp that brings the tiles of a job, each of its stages filled as soon as it is free. What is older than this pass comes before the grid dependency is waited for.
template <typename S> struct Producer {
  const AttentionParams& p;
  const TreeMaps& maps;
  Shared<S>& shared;
  uint32_t stages;
  int num_stages, lane;
  Place at{0, 1};
  bool waited = false;

  __device__ __forceinline__ uint32_t full(int s) const { return ptx::shared_address(shared.full + s); }
  __device__ int stage(int bytes) {
    const int s = at.stage;
    ptx::mbarrier_wait(ptx::shared_address(shared.empty + s), at.parity);
    if (lane == 0) ptx::mbarrier_arrive_expect(full(s), bytes);
    __syncwarp();
    at = at.after(1, num_stages);
    return s;
  }

  static constexpr bool kWholeBlocks = S::dim % 64 == 0;  // of columns: then a map's third dimension
  __device__ __forceinline__ static void copy(uint32_t to, const CUtensorMap* map, int block, int row, uint32_t bell) {
    ptx::tma_load_3d(to, map, kWholeBlocks ? 0 : block * 64, row, kWholeBlocks ? block : 0, bell);
  }

  // Slots tile .. tile + 63 of K, or V: one copy where a page is a tile, else a copy a page and 64 columns.
  __device__ void tile(const Job& job, const CUtensorMap* map, int tile, int page_id) {
    const bool whole = kWholeBlocks && p.page == kTile;
    const int pages = kTile / p.page, page = lane & (pages - 1), block = whole && lane > 0 ? S::columns / 64 : lane / pages, at = tile + page * p.page;
    const bool copies = block < S::columns / 64 && at < job.slots_end() && at + p.page > job.first_seen;
    const int s = stage(__popc(__ballot_sync(~0u, copies)) * p.page * 128 * (whole ? S::columns / 64 : 1));
    if (copies) copy(stages + s * S::tile_bytes + block * kBlockBytes + page * p.page * 128, map, block, (page_id * p.kv_heads + job.kv_head) * p.page, full(s));
  }

  // Where an entry of a tile of paths comes from: entry = node (ancestors), or row x position in this tile (paths); -1: nowhere.
  __device__ int slot(const Job& job, int tile, int entry, uint64_t wanted) const {
    if (p.ancestors) return wanted >> entry & 1 ? job.block.prefix + entry : -1;
    const int most = min(kTile, p.path_depth), r = entry / most, d = max(tile, job.block.prefix) + entry % most - job.block.prefix;
    if (r >= job.block.rows || d >= p.path_depth || d + job.block.prefix >= tile + kTile) return -1;
    const int32_t* path = p.paths + static_cast<int64_t>(job.block.begin + r) * p.path_depth;
    for (int i = 0; i <= d; ++i)
      if (__ldcg(path + i) < 0) return -1;
    return job.block.prefix + __ldcg(path + d);
  }

  // The entries of a tile of paths, a copy a slot and 64 columns.
  __device__ void own(const Job& job, const CUtensorMap* map, int tile, uint64_t wanted) {
    int count = 0;
#pragma unroll 1
    for (int entry = lane; entry < kTile; entry += 32) count += __popc(__ballot_sync(~0u, slot(job, tile, entry, wanted) >= 0));
    const int s = stage(count * S::columns * 2);
#pragma unroll 1
    for (int entry = lane; entry < kTile; entry += 32) {
      const int row = pool_row(job, slot(job, tile, entry, wanted));
      if (row < 0) continue;
      for (int block = 0; block < S::columns / 64; ++block) copy(stages + s * S::tile_bytes + block * kBlockBytes + entry * 128, map, block, row, full(s));
    }
  }

  // The row of the pool [pages x kv heads x page, D] that holds a slot.
  __device__ int pool_row(const Job& job, int slot) const {
    const int shift = __ffs(p.page) - 1;
    return slot < 0 ? -1 : (__ldcg(p.block_table + static_cast<int64_t>(job.block.request) * p.max_pages + (slot >> shift)) * p.kv_heads + job.kv_head) * p.page + (slot & (p.page - 1));
  }

  // The chunks chunk_begin + rank, + ranks, ...
  __device__ void run(const Job& job, int rank, int ranks) {
    const int shift = __ffs(p.page) - 1;
    uint64_t wanted = 0;
    if (p.ancestors && !job.many_nodes && job.block.longest > job.block.prefix) {
      for (int r = lane; r < job.block.rows; r += 32) wanted |= static_cast<uint64_t>(__ldcg(reinterpret_cast<const long long*>(p.ancestors) + job.block.begin + r));
      const unsigned low = __reduce_or_sync(~0u, static_cast<unsigned>(wanted)), high = __reduce_or_sync(~0u, static_cast<unsigned>(wanted >> 32));
      wanted = static_cast<uint64_t>(high) << 32 | low;
    }
    for (int chunk = job.chunk_begin() + rank; chunk < job.chunk_end(); chunk += ranks) {
      const int begin = job.tiles_begin(chunk), mine = (chunk * kChunk >> shift) + lane;
      const int ids = lane < (kChunk + kTile) >> shift && mine * p.page < job.slots_end() && (mine + 1) * p.page > begin ? __ldcg(p.block_table + static_cast<int64_t>(job.block.request) * p.max_pages + mine) : 0;
      for (int at = begin; at < job.tiles_end(chunk); at += kTile) {
        const bool slots = job.loads_slots(at), more = job.loads_more(at);
        auto page_of = [&](int tile) { return __shfl_sync(~0u, ids, (tile - chunk * kChunk >> shift) + (lane & ((kTile >> shift) - 1))); };
        for (int which = 0; which < 2; ++which) {
          const CUtensorMap* pages = maps.pages + which;
          if (!waited && !(slots && job.old(at))) wait();
          if (slots) tile(job, pages, at, page_of(at));
          if (!waited && more) wait();
          if (more && job.many_nodes) tile(job, pages, at + kTile, page_of(at + kTile));
          if (more && !job.many_nodes) own(job, maps.slots + which, at, wanted);
        }
      }
    }
  }

  __device__ void wait() {
    ptx::grid_dependency_wait();
    waited = true;
  }
};

// A thread that brings the queries of a job: 64 / group_heads rows a warpgroup, their heads side by side.
template <typename S> __device__ __forceinline__ void load_queries(Shared<S>& shared, const CUtensorMap* map, const Job& job, int group_heads) {
  const uint32_t bell = ptx::shared_address(&shared.queries_full);
  const int rows = 64 / group_heads;
  ptx::mbarrier_arrive_expect(bell, S::warpgroups * (S::columns / 64) * rows * group_heads * 128);
#pragma unroll
  for (int w = 0; w < S::warpgroups; ++w)
#pragma unroll
    for (int block = 0; block < S::columns / 64; ++block)
      ptx::tma_load_3d(ptx::shared_address(shared.queries) + w * S::tile_bytes + block * kBlockBytes, map, block * 64, job.kv_head * group_heads, job.block.begin + w * rows, bell);
}

}  // namespace specrt
