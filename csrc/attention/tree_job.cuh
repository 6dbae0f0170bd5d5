// What a CTA of tree attention works on (a job of the plan), the producer that brings its keys and values, and where the keys of a row's path lie among them.
#pragma once
#include "attention/plan.cuh"
#include "base/launch.h"
#include "base/tensor_map.h"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace specrt {

// A tile of K or V in shared memory: blocks of [64 rows][64 columns], 128-byte rows swizzled (base/tensor_map.h).
constexpr int kBlockBytes = kTile * 128;

// Address of the 16-byte piece `piece` of row `row` of a tile.
__device__ __forceinline__ uint32_t piece_address(uint32_t tile, int row, int piece) {
  return tile + piece / 8 * kBlockBytes + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// A row of a tile, or nothing: zeros.
struct RowAddress {
  uint32_t tile;
  int row;  // -1: zeros, at `tile`
  __device__ uint32_t piece(int i) const { return row < 0 ? tile : piece_address(tile, row, i); }
};

// x, of which the compiler knows nothing: what follows from it is computed where it is used, not kept in registers from job to job.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ int exponent(int power_of_two) { return __ffs(power_of_two) - 1; }

// v / d for v < 128, d <= 16 without a division.
struct SmallDivisor {
  int d, reciprocal;
  __device__ explicit SmallDivisor(int d_) : d(d_), reciprocal(65536 / d_ + 1) {}
  __device__ int quotient(int v) const { return v * reciprocal >> 16; }
  __device__ int remainder(int v) const { return v - quotient(v) * d; }
};

// A CTA's jobs: neighbouring ones, pieces of one block and KV head. All loads at once.
struct Share {
  int begin, end;
  BlockCursor cursor;

  __device__ Share(const AttentionParams& p, int lane) : Share(p, plan_header(p.plan), plan_blocks(p.plan)[lane], lane) {}

  __device__ static int before(unsigned cta, unsigned jobs) {
    const unsigned each = jobs / gridDim.x;
    return static_cast<int>(cta * each + min(cta, jobs - each * gridDim.x));
  }

 private:
  __device__ Share(const AttentionParams& p, const PlanHeader& header, const Block& mine, int lane)
      : begin(before(blockIdx.x, header.pieces * p.kv_heads)), end(before(blockIdx.x + 1, header.pieces * p.kv_heads)), cursor(p.plan, header, mine, p.kv_heads, begin, lane) {}
};

constexpr int kFewNodes = 8;  // so many slots are copied one by one rather than in whole pages

// What a CTA works on, and what its rows see.
struct Job {
  Block block;
  int kv_head, piece, pieces, run_begin, chunk_begin, chunk_end, first_seen;  // piece of the block's pieces; run_begin: its first position; positions before first_seen: seen by no row
  bool has_paths, many_nodes;

  __device__ Job(const AttentionParams& p, BlockCursor& cursor, int number) {
    cursor.advance(number);
    block = cursor.block;
    const int run = cursor.run, of_block = number - block.pieces_before * p.kv_heads;
    pieces = block.pieces(run);
    kv_head = static_cast<int>(static_cast<unsigned>(of_block) / static_cast<unsigned>(pieces));
    piece = of_block - kv_head * pieces;
    first_seen = p.window > 0 ? max(0, block.shortest - p.window) : 0;
    run_begin = piece * run * kChunk;
    chunk_begin = max(piece * run, first_seen / kChunk);
    chunk_end = min((piece + 1) * run, (block.longest + kChunk - 1) / kChunk);
    has_paths = p.ancestors || p.paths;
    many_nodes = p.ancestors && block.nodes > kFewNodes;
  }

  // Tiles of a chunk. From own_begin() on, in groups of 16 positions, each row has keys of its own.
  __device__ int tiles_begin(int chunk) const { return max(chunk * kChunk, first_seen / kTile * kTile); }
  __device__ int tiles_end(int chunk) const { return min((chunk + 1) * kChunk, block.longest); }
  __device__ int own_begin() const { return has_paths ? block.prefix / 16 * 16 : 0x7fffffff; }
  __device__ bool owns(int tile) const { return tile + kTile > own_begin() && block.longest > block.prefix; }
  // What is loaded of K, and then of V: the slots of the tile's positions; and for the paths, where nodes are few, a tile of their own, else the slots after these.
  __device__ int slots_end() const { return many_nodes ? block.prefix + block.nodes : block.prefix; }
  __device__ bool loads_slots(int tile) const { return tile < block.prefix || (many_nodes && owns(tile)); }
  __device__ bool loads_more(int tile) const { return owns(tile) && (!many_nodes || tile + kTile < slots_end()); }
};

// One of the N stages from `First` on, taken in turn, and the parity of the phase in which it is filled.
template <int N, int First> struct Turn {
  int stage = First;
  uint32_t parity = 0;
  __device__ __forceinline__ Turn after(int stages) const {
    const bool around = stage + stages >= First + N;
    return {stage + stages - (around ? N : 0), parity ^ (around ? 1u : 0u)};
  }
};

// A producer, a warp for K and one for V: the tiles of a job, each of its stages filled as soon as it is free.
template <typename S> struct Producer {
  const AttentionParams& p;
  const CUtensorMap *pages, *slots;
  uint32_t stages, full, empty;
  int* first_rows;  // in shared memory, 20: where the pages of a chunk and of the tile after it begin in the pool
  int lane, page_shift = exponent(p.page);
  Turn<S::each, 0> turn{};

  // Waits until the next stage is free, and expects its bytes. By one lane.
  __device__ __forceinline__ void expect(int bytes) const {
    ptx::mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
    ptx::mbarrier_arrive_expect(full + 8 * turn.stage, bytes);
  }

  // Slots tile .. tile + 63: a copy a page and 64 columns, all by one lane.
  __device__ __forceinline__ void tile(const Job& job, int tile, int first_page) {
    if (lane == 0) {
      const int begin = max(0, job.first_seen - tile) >> page_shift, end = min(kTile, job.slots_end() - tile + p.page - 1) >> page_shift;
      expect((end - begin) * p.page * (S::columns * 2));
#pragma unroll 1
      for (int page = begin; page < end; ++page) {
        const int row = first_rows[(tile >> page_shift) - first_page + page];
        const uint32_t to = stages + turn.stage * S::tile_bytes + page * p.page * 128;
#pragma unroll
        for (int block = 0; block < S::columns / 64; ++block) ptx::tma_load(to + block * kBlockBytes, pages, block * 64, row, full + 8 * turn.stage);
      }
    }
    turn = turn.after(1);
  }

  // Where an entry of a tile of paths comes from: entry = node (ancestors), or row x position in this tile (paths); -1: nowhere.
  __device__ int slot(const Job& job, int tile, int entry, uint64_t wanted) const {
    if (p.ancestors) return wanted >> entry & 1 ? job.block.prefix + entry : -1;
    const int most = min(kTile, p.path_depth), r = entry / most, d = max(tile, job.block.prefix) + entry % most - job.block.prefix;
    if (r >= job.block.rows || d >= p.path_depth || d + job.block.prefix >= tile + kTile) return -1;
    const int32_t* path = p.paths + static_cast<int64_t>(job.block.begin + r) * p.path_depth;
#pragma unroll 1
    for (int i = 0; i <= d; ++i)
      if (path[i] < 0) return -1;
    return job.block.prefix + path[d];
  }

  __device__ void own(const Job& job, const int (&rows)[2]) {
    const int count = __popc(__ballot_sync(~0u, rows[0] >= 0)) + __popc(__ballot_sync(~0u, rows[1] >= 0));
    if (lane == 0) expect(count * S::columns * 2);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (rows[half] >= 0)
        for (int block = 0; block < S::columns / 64; ++block)
          ptx::tma_load(stages + turn.stage * S::tile_bytes + block * kBlockBytes + (lane + 32 * half) * 128, slots, block * 64, rows[half], full + 8 * turn.stage);
    turn = turn.after(1);
  }

  // The row of the pool [pages x kv heads x page, D] that holds a slot.
  __device__ int pool_row(const Job& job, int slot) const {
    return slot < 0 ? -1 : (p.block_table[static_cast<int64_t>(job.block.request) * p.max_pages + (slot >> page_shift)] * p.kv_heads + job.kv_head) * p.page + (slot & (p.page - 1));
  }

  __device__ void run(const Job& job) {
    const int32_t* table = p.block_table + static_cast<int64_t>(job.block.request) * p.max_pages;
    uint64_t wanted = 0;
    if (p.ancestors && !job.many_nodes && job.chunk_end * kChunk > job.own_begin()) {
      for (int r = lane; r < job.block.rows; r += 32) wanted |= static_cast<uint64_t>(p.ancestors[job.block.begin + r]);
      const unsigned low = __reduce_or_sync(~0u, static_cast<unsigned>(wanted)), high = __reduce_or_sync(~0u, static_cast<unsigned>(wanted >> 32));
      wanted = static_cast<uint64_t>(high) << 32 | low;
    }
    auto page_of = [&](int chunk) {
      const int mine = (chunk * kChunk >> page_shift) + lane;
      return chunk < job.chunk_end && lane < (kChunk + kTile) >> page_shift && mine * p.page < job.slots_end() && (mine + 1) * p.page > job.first_seen ? table[mine] : 0;
    };
    int next = page_of(job.chunk_begin);
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
      const int end = job.tiles_end(chunk), first_page = chunk * kChunk >> page_shift;
      __syncwarp();
      if (lane < 20) first_rows[lane] = (next * p.kv_heads + job.kv_head) * p.page;
      __syncwarp();
      next = page_of(chunk + 1);
#pragma unroll 1
      for (int at = job.tiles_begin(chunk); at < end; at += kTile) {
        if (job.loads_slots(at)) tile(job, at, first_page);
        if (!job.loads_more(at)) continue;
        if (job.many_nodes) {
          tile(job, at + kTile, first_page);
          continue;
        }
        int rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) rows[half] = pool_row(job, slot(job, at, lane + 32 * half, wanted));
        own(job, rows);
      }
    }
  }
};

// The d-th of a word's bits that are set (of more than d).
__device__ __forceinline__ int find_bit(uint64_t word, int d) {
  uint32_t rest = static_cast<uint32_t>(word);
  int at = 0;
  if (const int below = __popc(rest); d >= below) {
    d -= below;
    at = 32;
    rest = static_cast<uint32_t>(word >> 32);
  }
#pragma unroll
  for (int size = 16; size > 0; size /= 2) {
    const int below = __popc(rest & ((1u << size) - 1));
    if (d < below) continue;
    d -= below;
    at += size;
    rest >>= size;
  }
  return at;
}

// Where the key (or value) at a position of a tile lies for row r: the row of the tile's first stage, + 64 in its second; -1: the row does not see it.
__device__ __forceinline__ int find_place(const AttentionParams& p, const Job& job, int r, const Row& row, uint64_t nodes, int tile, int position) {
  if (position < row.first || position >= row.len) return -1;
  if (position < row.prefix) return position - tile;
  if (p.paths) return 64 + r * min(kTile, p.path_depth) + position - max(tile, row.prefix);
  const int node = find_bit(nodes, position - row.prefix);
  return job.many_nodes ? row.prefix + node - tile : 64 + node;
}

// The pools as the copy engine sees them: [pages x kv heads x page, D] in pages, and in slots.
struct TensorMaps {
  CUtensorMap k_pages, v_pages, k_slots, v_slots;
  explicit TensorMaps(const AttentionParams& p) : k_pages(map(p, p.k_pool, p.page)), v_pages(map(p, p.v_pool, p.page)), k_slots(map(p, p.k_pool, 1)), v_slots(map(p, p.v_pool, 1)) {}

 private:
  static CUtensorMap map(const AttentionParams& p, const void* pool, int box) { return tensor_map_bf16(pool, p.pages * p.kv_heads * p.page, p.head_dim, box); }
};

// The most jobs that these capacities can hold, and no more CTAs than there is room for.
inline int tree_ctas(const AttentionParams& p, const TreeShape& shape) {
  const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, jobs = p.rows * p.kv_heads * (chunks > 1 ? chunks : 1);
  const int64_t slots = multiprocessors() * shape.blocks_per_sm;
  return static_cast<int>(jobs < slots ? jobs : slots);
}

// Blocks of 8 or 16 vectors (decode.cu).
void launch_decode_attention(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream);

}  // namespace specrt
