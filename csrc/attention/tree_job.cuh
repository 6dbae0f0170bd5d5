// What a CTA of tree attention works on, and how its shared memory is laid out.
#pragma once
#include "attention/plan.cuh"
#include "attention/tree_tile.cuh"
#include "attention/widen.cuh"

namespace specrt {

template <int dim_, int warpgroups_, typename KV> struct Shape {
  static constexpr int dim = dim_, warpgroups = warpgroups_, warps = 4 * warpgroups, consumers = 32 * warps, threads = consumers + 128;
  static constexpr int columns = Vectors<dim>::kColumns, vectors = 64 * warpgroups, blocks_per_sm = warpgroups == 1 ? 2 : 1;
  static constexpr int stages = warpgroups == 1 ? 4 : 6;  // at least 3: a tile's values and the next one's keys
  static constexpr int producer_registers = 56, consumer_registers = warpgroups == 1 ? 200 : 224;
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

}  // namespace specrt
