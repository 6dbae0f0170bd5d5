// Decode, verify and draft-expansion attention, bf16 over bf16 or e4m3 pools, on Hopper.
//
// A job is a block of rows of one request, a KV head and a run of chunks of 256 positions (plan.cuh). Rows x query heads stand side by side as the 64 vectors of a
// warpgroup, or the 128 of two, so that K and V are read once for all of them. A producer warp keeps `stages` tiles in flight by tensor copies, one a page. The keys of the
// rows' paths come as tiles of their own, a copy a slot, from which every row's groups of 16 are read at their logical places (row addresses of ldmatrix). Tiles of e4m3 pools
// are widened by the warps beside the producer before anybody else sees them (widen.cuh).
// A run folds its chunks where they are; what is not a row's whole answer goes through the workspace to the combine kernel. Which CTA does what changes no bit.
//
// Bytes: K and V once a block of rows (the blocks of a request share them through L2), D + 2 floats for each vector and run.
#include "attention/plan.cuh"
#include "attention/tree_tile.cuh"
#include "attention/widen.cuh"
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"

namespace specrt {
namespace {

template <int dim_, int warpgroups_, typename KV> struct Shape {
  static constexpr int dim = dim_, warpgroups = warpgroups_, warps = 4 * warpgroups, consumers = 32 * warps, threads = consumers + 128;
  static constexpr int columns = Vectors<dim>::kColumns, vectors = 64 * warpgroups, blocks_per_sm = warpgroups == 1 ? 2 : 1;
  static constexpr int stages = warpgroups == 1 ? 4 : 7;  // at least 4: a tile that holds paths takes as many
  static constexpr int producer_registers = warpgroups == 1 ? 40 : 56, consumer_registers = warpgroups == 1 ? 216 : 224;
  static constexpr int tile_bytes = columns / 64 * kBlockBytes;
  using Tile = Arrival<KV, columns>;
  // Shared memory: stages; the queries, a tile a warpgroup; O of the run so far, 16 bytes a thread and piece; the rest.
  static constexpr int queries = stages * tile_bytes, kept = queries + warpgroups * tile_bytes, pieces = columns / 8, rest = kept + consumers * pieces * 16;
};

template <typename S> struct Rest {
  uint4 zeros;
  uint64_t full[S::stages], empty[S::stages], narrow[S::stages];  // narrow: an e4m3 tile has come, full follows when it is wide
  uint64_t nodes[S::vectors];  // ancestors of a row
  uint8_t places[S::warps][16];  // for a warp's group of 16 positions: the node at each
  int len[S::vectors];
  bool end[S::stages];  // no e4m3 tile: the producer has done
};

template <typename S> constexpr int kSharedBytes = S::rest + static_cast<int>(sizeof(Rest<S>));

constexpr int kFewNodes = 8;  // so many slots are copied one by one rather than in whole pages

// What a CTA works on, and what its rows see.
struct Job {
  Block block;
  int kv_head, run_begin, chunk_begin, chunk_end, first_seen;  // run_begin: its first position; positions before first_seen: seen by no row
  bool has_paths, many_nodes;

  __device__ Job(const AttentionParams& p, BlockCursor& cursor, int number) {
    cursor.advance(number / p.kv_heads);
    block = cursor.block;
    const int run = cursor.run, of_block = number - block.pieces_before * p.kv_heads, pieces = block.pieces(run), piece = of_block % pieces;
    kv_head = of_block / pieces;
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

// The producer, a warp (of a warpgroup that gives its registers away): the tiles of a job, each of its stages filled as soon as it is free.
template <typename S> struct Producer {
  const AttentionParams& p;
  uint32_t stages, full, empty;  // full: what a tile that has come arrives at
  int lane, copied = 0;

  __device__ int stage_free() const {
    const int s = copied % S::stages;
    if (copied >= S::stages) ptx::mbarrier_wait(empty + 8 * s, (copied / S::stages - 1) & 1);
    return s;
  }

  __device__ int stage(int bytes) {
    const int s = stage_free();
    if (lane == 0) ptx::mbarrier_arrive_expect(full + 8 * s, bytes);
    __syncwarp();
    ++copied;
    return s;
  }

  // Slots tile .. tile + 63 of K, or V: a copy a page and 64 columns.
  __device__ void tile(const Job& job, const CUtensorMap* map, int tile, int page_ids) {
    const int pages = kTile / p.page, page = lane & (pages - 1), block = lane / pages, at = tile + page * p.page;
    const bool copies = block < S::Tile::boxes && at < job.slots_end() && at + p.page > job.first_seen;
    const int s = stage(__popc(__ballot_sync(~0u, copies)) * p.page * 128);
    if (copies) ptx::tma_load(stages + s * S::tile_bytes + S::Tile::at + block * kBlockBytes + page * p.page * 128, map, block * 64, (page_ids * p.kv_heads + job.kv_head) * p.page, full + 8 * s);
  }

  // Where an entry of a tile of paths comes from: entry = node (ancestors), or row x position in this tile (paths); -1: nowhere.
  __device__ int slot(const Job& job, int tile, int entry, uint64_t wanted) const {
    if (p.ancestors) return wanted >> entry & 1 ? job.block.prefix + entry : -1;
    const int most = min(kTile, p.path_depth), r = entry / most, d = max(tile, job.block.prefix) + entry % most - job.block.prefix;
    if (r >= job.block.rows || d >= p.path_depth || d + job.block.prefix >= tile + kTile) return -1;
    const int32_t* path = p.paths + static_cast<int64_t>(job.block.begin + r) * p.path_depth;
    for (int i = 0; i <= d; ++i)
      if (path[i] < 0) return -1;
    return job.block.prefix + path[d];
  }

  __device__ void own(const Job& job, const CUtensorMap* map, const int (&rows)[2]) {
    const int s = stage((__popc(__ballot_sync(~0u, rows[0] >= 0)) + __popc(__ballot_sync(~0u, rows[1] >= 0))) * S::Tile::boxes * 128);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (rows[half] >= 0)
        for (int block = 0; block < S::Tile::boxes; ++block)
          ptx::tma_load(stages + s * S::tile_bytes + S::Tile::at + block * kBlockBytes + (lane + 32 * half) * 128, map, block * 64, rows[half], full + 8 * s);
  }

  // The row of the pool [pages x kv heads x page, D] that holds a slot.
  __device__ int pool_row(const Job& job, int slot) const {
    return slot < 0 ? -1 : (p.block_table[static_cast<int64_t>(job.block.request) * p.max_pages + slot / p.page] * p.kv_heads + job.kv_head) * p.page + slot % p.page;
  }

  __device__ void run(const Job& job, const CUtensorMap* k_pages, const CUtensorMap* v_pages, const CUtensorMap* k_slots, const CUtensorMap* v_slots) {
    const int32_t* table = p.block_table + static_cast<int64_t>(job.block.request) * p.max_pages;
    const uint64_t wanted = static_cast<uint64_t>(static_cast<uint32_t>(job.block.wanted_high)) << 32 | static_cast<uint32_t>(job.block.wanted_low);
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
      const int begin = job.tiles_begin(chunk), end = job.tiles_end(chunk), first_page = chunk * kChunk / p.page, mine = first_page + lane;
      const int ids = lane < (kChunk + kTile) / p.page && mine * p.page < job.slots_end() && (mine + 1) * p.page > begin ? __ldcg(table + mine) : 0;
      for (int at = begin; at < end; at += kTile) {
        if (at + kTile > job.block.settled) ptx::grid_dependency_wait();
        const bool slots = job.loads_slots(at), more = job.loads_more(at);
        const int place = at / p.page - first_page + (lane & (kTile / p.page - 1));
        const int page_ids = __shfl_sync(~0u, ids, place), more_ids = __shfl_sync(~0u, ids, place + kTile / p.page);
        int rows[2];
        if (more && !job.many_nodes)
#pragma unroll
          for (int half = 0; half < 2; ++half) rows[half] = pool_row(job, slot(job, at, lane + 32 * half, wanted));
        for (int which = 0; which < 2; ++which) {
          const CUtensorMap* pages = which ? v_pages : k_pages;
          if (slots) tile(job, pages, at, page_ids);
          if (more && job.many_nodes) tile(job, pages, at + kTile, more_ids);
          if (more && !job.many_nodes) own(job, which ? v_slots : k_slots, rows);
        }
      }
    }
  }
};

// A warp beside the producer, one of kWideners, where pools are e4m3: its part of every tile that comes.
template <typename S> __device__ void widen_tiles(Rest<S>& rest, uint32_t stages, uint32_t narrow, uint32_t full, int warp, int lane) {
  for (int count = 0;; ++count) {
    const int s = count % S::stages;
    ptx::mbarrier_wait(narrow + 8 * s, count / S::stages & 1);
    if (rest.end[s]) return;
    widen_tile<S::columns>(stages + s * S::tile_bytes, warp, lane);
    if (lane == 0) ptx::mbarrier_arrive(full + 8 * s);
  }
}

// O * (v_scale / l), or a partial (m, l, O), of a vector; by the four lanes that hold it.
template <typename S> __device__ __forceinline__ void write_vector(const AttentionParams& p, int64_t vector, int slot, bool whole, float m, float l, const float (&o)[S::pieces][4], int i, int lane) {
  if (whole) {
    uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + vector * S::dim) + lane % 4;
    const float r = 1.0f / l * p.v_scale;
#pragma unroll
    for (int n = 0; n < S::dim / 8; ++n)
      out[4 * n] = to_bf16(o[n][2 * i] * r).bits | static_cast<uint32_t>(to_bf16(o[n][2 * i + 1] * r).bits) << 16;
    return;
  }
  const int chunks = (p.max_pages * p.page + kChunk - 1) / kChunk;
  const int64_t at = vector * chunks + slot;
  float* to = p.workspace + at * S::dim + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < S::dim / 8; ++n) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(o[n][2 * i], o[n][2 * i + 1]);
  if (lane % 4 == 0) *reinterpret_cast<float2*>(p.workspace + static_cast<int64_t>(p.rows) * p.q_heads * chunks * S::dim + 2 * at) = make_float2(m, l);
}

template <typename S> __global__ void __launch_bounds__(S::threads, S::blocks_per_sm)
tree_attention_kernel(const __grid_constant__ CUtensorMap k_pages, const __grid_constant__ CUtensorMap v_pages, const __grid_constant__ CUtensorMap k_slots,
                      const __grid_constant__ CUtensorMap v_slots, const __grid_constant__ AttentionParams p, float scale) {
  constexpr int D = S::dim;
  extern __shared__ __align__(1024) unsigned char shared[];
  Rest<S>& rest = *reinterpret_cast<Rest<S>*>(shared + S::rest);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t stages = ptx::shared_address(shared), full = ptx::shared_address(rest.full), empty = ptx::shared_address(rest.empty),
                 narrow = ptx::shared_address(rest.narrow);
  if (threadIdx.x == S::consumers) {
    ptx::prefetch_tensor_map(&k_pages);
    ptx::prefetch_tensor_map(&v_pages);
    ptx::prefetch_tensor_map(&k_slots);
    ptx::prefetch_tensor_map(&v_slots);
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, S::Tile::fp8 ? kWideners : 1);
      ptx::mbarrier_init(empty + 8 * s, S::warps);
      ptx::mbarrier_init(narrow + 8 * s, 1);
      rest.end[s] = false;
    }
    ptx::mbarrier_init_fence();
    rest.zeros = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  ptx::launch_dependents();
  // Before the wait: who does what, and the producer's first tiles (params.h).
  const PlanHeader header = plan_header(p.plan);
  const Block first_blocks = plan_block(p.plan, lane);
  // Neighbouring jobs to a CTA: pieces of one block and KV head.
  const int jobs = header.pieces * p.kv_heads, each = jobs / static_cast<int>(gridDim.x), over = jobs % static_cast<int>(gridDim.x), cta = blockIdx.x;
  const int jobs_begin = cta * each + min(cta, over), jobs_end = jobs_begin + each + (cta < over);
  if (jobs_begin == jobs_end) return ptx::grid_dependency_wait();  // this grid must not end before the one it depends on

  if (warp >= S::warps) {
    ptx::give_registers<S::producer_registers>();
    if (warp > S::warps) {
      if constexpr (S::Tile::fp8) widen_tiles<S>(rest, stages, narrow, full, warp - S::warps - 1, lane);
      return;
    }
    BlockCursor cursor(p.plan, header, first_blocks, jobs_begin / p.kv_heads, lane);
    Producer<S> producer{p, stages, S::Tile::fp8 ? narrow : full, empty, lane};
    for (int number = jobs_begin; number < jobs_end; ++number) producer.run(Job(p, cursor, number), &k_pages, &v_pages, &k_slots, &v_slots);
    if constexpr (S::Tile::fp8) {
      const int s = producer.stage_free();
      if (lane == 0) {
        rest.end[s] = true;
        ptx::mbarrier_arrive(narrow + 8 * s);
      }
    }
    return;
  }

  ptx::take_registers<S::consumer_registers>();
  BlockCursor cursor(p.plan, header, first_blocks, jobs_begin / p.kv_heads, lane);
  const int group_heads = p.q_heads / p.kv_heads, first_vector = warp * 16;
  const uint32_t queries = stages + S::queries + warp / 4 * S::tile_bytes, zeros = ptx::shared_address(&rest.zeros);
  const RowAddress query{queries, first_vector % 64 + lane % 16};
  float4* kept = reinterpret_cast<float4*>(shared + S::kept) + threadIdx.x;
  int copied = 0, loaded_block = -1, loaded_head = -1;  // whose queries and rows are there
  for (int number = jobs_begin; number < jobs_end; ++number) {
    const Job job(p, cursor, number);
    const Block& block = job.block;
    const int valid = block.rows * group_heads;
    const bool warp_works = first_vector < valid, both = first_vector + 8 < valid;
    int local[2];  // rows of this thread's vectors
#pragma unroll
    for (int i = 0; i < 2; ++i) local[i] = (first_vector + lane / 4 + 8 * i) / group_heads;
    const int warp_rows_begin = first_vector / group_heads, warp_rows_end = min((first_vector + 15) / group_heads + 1, block.rows);

    if (block.begin != loaded_block || job.kv_head != loaded_head) {
      loaded_block = block.begin;
      loaded_head = job.kv_head;
      ptx::grid_dependency_wait();
      ptx::named_barrier(1, S::consumers);  // nobody reads the job before's queries and rows
      constexpr int kEach = S::vectors * (S::columns / 8) / S::consumers;
      uint4 q[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = j * S::consumers + threadIdx.x, vector = i / (S::columns / 8), piece = i % (S::columns / 8);
        q[j] = make_uint4(0, 0, 0, 0);
        if (vector < valid && piece * 8 < D)
          q[j] = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.q) +
                                                 (static_cast<int64_t>(block.begin + vector / group_heads) * p.q_heads + job.kv_head * group_heads + vector % group_heads) * D + piece * 8);
      }
      for (int r = threadIdx.x; r < block.rows; r += S::consumers) {
        const Row row = describe_row(p, block.begin + r);
        rest.len[r] = row.len;
        rest.nodes[r] = p.ancestors ? static_cast<uint64_t>(p.ancestors[block.begin + r]) : 0;
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = j * S::consumers + threadIdx.x, vector = i / (S::columns / 8), piece = i % (S::columns / 8);
        *reinterpret_cast<uint4*>(shared + (piece_address(stages + S::queries + vector / 64 * S::tile_bytes, vector % 64, piece) - stages)) = q[j];
      }
      ptx::async_proxy_fence();
      ptx::named_barrier(1, S::consumers);
    }

    auto row_at = [&](int r) {
      Row row;
      if (r >= block.rows) return row;
      row.len = rest.len[r];
      row.prefix = job.has_paths ? block.prefix : row.len;
      if (p.window > 0) row.first = max(0, row.len - p.window);
      return row;
    };
    const int last_seen = min(job.own_begin(), block.shortest), first_all = p.window > 0 ? max(0, block.longest - p.window) : 0;  // all rows see [first_all, last_seen), in common
    const int most_path = min(kTile, p.path_depth);

    auto stage_at = [&](int count) { return stages + count % S::stages * S::tile_bytes; };
    auto wait = [&](int count) { ptx::mbarrier_wait(full + 8 * (count % S::stages), count / S::stages & 1); };
    auto give = [&](int count) {
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * (count % S::stages));
    };

    float kept_m[2] = {SPECRT_MINUS_INF, SPECRT_MINUS_INF}, kept_l[2] = {0.0f, 0.0f};
    Vectors<D> x;
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
      x.reset();
      const int end = job.tiles_end(chunk);
      for (int tile = job.tiles_begin(chunk); tile < end; tile += kTile) {
        const bool shared_keys = tile < block.prefix, owns = job.owns(tile), slots = job.loads_slots(tile), more = job.loads_more(tile);
        // Where the key (or value) at a position of a row lies, for lane j < 16 at position tile + 16 g + j: the row of the stage, + 64 in the second stage; -1: nowhere.
        auto own_place = [&](int r, const Row& row, int g) {
          const int begin = tile + 16 * g, position = begin + lane % 16;
          int entry = r * most_path + position - max(tile, row.prefix);
          if (p.ancestors) {
            const uint64_t word = rest.nodes[r];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int node = lane + 32 * half, at = row.prefix + __popcll(word & ((1ull << node) - 1)) - begin;
              if ((word >> node & 1) && at >= 0 && at < 16) rest.places[warp][at] = static_cast<uint8_t>(node);
            }
            __syncwarp();
            entry = rest.places[warp][lane % 16];
            __syncwarp();
          }
          if (position < row.first || position >= row.len) return -1;
          return position < row.prefix ? position - tile : (job.many_nodes ? row.prefix + entry - tile : 64 + entry);
        };
        auto address = [&](int place, int first) -> RowAddress { return place < 0 ? RowAddress{zeros, -1} : RowAddress{stage_at(first + (slots ? place / 64 : 0)), place % 64}; };
        // f(place of lane's key, group, which vectors) for the groups of 16 positions in which this warp's rows have keys of their own.
        auto each_own = [&](auto&& f) {
#pragma unroll 1
          for (int r = warp_rows_begin; r < warp_rows_end; ++r) {
            const Row row = row_at(r);
            const bool mine[2] = {local[0] == r, local[1] == r};
#pragma unroll 1
            for (int g = max(0, (job.own_begin() - tile) / 16); g < 4; ++g)
              if (row.sees(tile + 16 * g, 16)) f(own_place(r, row, g), g, mine);
          }
        };

        const int keys = copied, values = copied + slots + more;  // as the producer counts
        if (slots) wait(keys);
        if (shared_keys) x.score(queries, stage_at(keys));
        else x.reset_scores();
        if (owns) {
          if (more) wait(keys + slots);
          if (warp_works)
            each_own([&](int place, int g, const bool(&mine)[2]) {
              x.score_own(g, query, address(__shfl_sync(~0u, place, lane / 16 * 8 + lane % 8), keys), mine, lane);
            });
        }
        __syncwarp();
        if (slots) give(keys);
        if (more) give(keys + slots);

        if (!warp_works) {
          x.no_probabilities();
        } else if (tile >= first_all && tile + kTile <= last_seen) {
          x.template softmax<false>({}, {}, scale, both, lane);
        } else {
          int low[2], high[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const Row row = row_at(local[i]);
            low[i] = row.low(tile);
            high[i] = row.high(tile, kTile);
          }
          x.template softmax<true>(low, high, scale, both, lane);
        }

        if (slots) wait(values);
        if (shared_keys) {
          const int groups = owns ? max(0, (job.own_begin() - tile) / 16) : 4;  // the groups of 16 keys that all rows read from the tile
          const int low = job.first_seen - tile, high = owns ? groups * 16 : block.prefix - tile;
          if (low > 0 || high < groups * 16) {  // V rows nobody sees may hold NaN: zeros
            for (int i = threadIdx.x % 128; i < kTile * (S::columns / 8); i += 128) {
              const int j = i / (S::columns / 8);
              if (j < low || (j >= high && j < groups * 16))
                *reinterpret_cast<uint4*>(shared + (piece_address(stage_at(values), j, i % (S::columns / 8)) - stages)) = make_uint4(0, 0, 0, 0);
            }
            ptx::async_proxy_fence();
            ptx::named_barrier(2 + warp / 4, 128);
          }
          x.accumulate(stage_at(values), groups);
        }
        if (owns) {
          if (more) wait(values + slots);
          if (warp_works)
            each_own([&](int place, int g, const bool(&mine)[2]) {
              x.accumulate_own(g, address(__shfl_sync(~0u, place, lane / 8 % 2 * 8 + lane % 8), values), mine, lane);
            });
        }
        __syncwarp();
        if (slots) give(values);
        if (more) give(values + slots);
        copied = values + slots + more;
      }
      if (!warp_works) continue;

      // The chunk joins the run.
      if (chunk == job.chunk_begin) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          kept_m[i] = x.m[i];
          kept_l[i] = x.l[2 * i];
        }
      } else {
        bool sees[2];
        FoldFactors f[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sees[i] = row_at(local[i]).sees(chunk * kChunk, kChunk);
          f[i] = {1.0f, 0.0f};
          if (sees[i]) f[i] = fold_factors(kept_m[i], x.m[i]);
          kept_l[i] = sees[i] ? fold_value(kept_l[i], x.l[2 * i], f[i]) : kept_l[i];
        }
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) {
          const float4 v = kept[n * S::consumers];
          const float before[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) x.o[n][e] = sees[e / 2] ? fold_value(before[e], x.o[n][e], f[e / 2]) : before[e];
        }
      }
      if (chunk + 1 < job.chunk_end)
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) kept[n * S::consumers] = make_float4(x.o[n][0], x.o[n][1], x.o[n][2], x.o[n][3]);
    }
    if (!warp_works) continue;

    const int run_begin = job.run_begin, run = cursor.run * kChunk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int vector = first_vector + lane / 4 + 8 * i;
      const Row row = row_at(local[i]);
      if (vector >= valid || !row.sees(run_begin, run)) continue;
      const bool whole = cursor.run == kGroupChunks && row.first >= run_begin && row.len <= run_begin + run;
      write_vector<S>(p, static_cast<int64_t>(block.begin + local[i]) * p.q_heads + job.kv_head * group_heads + vector % group_heads, run_begin / kChunk, whole, kept_m[i], kept_l[i],
                      x.o, i, lane);
    }
  }
}

// One warp a (row, head): chunks ascending into their group, groups ascending.
constexpr int kCombineWarps = 4, kBatch = 4;

template <int D> __global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kFloats = D / 32;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, r = static_cast<int>(vector / p.q_heads), chunks = (p.max_pages * p.page + kChunk - 1) / kChunk;
  ptx::launch_dependents();
  const int rows = min(__ldcg(p.num_rows), p.rows), run = plan_header(p.plan).run;
  const Row row = describe_row(p, min(r, p.rows - 1));
  ptx::grid_dependency_wait();
  if (r >= rows) return;
  const int begin = row.first / kChunk / run, end = (row.len + run * kChunk - 1) / (run * kChunk);
  if (run == kGroupChunks && end - begin == 1) return;  // written where it was computed
  const float* o = p.workspace + vector * chunks * D + lane;
  const float* ml = p.workspace + static_cast<int64_t>(p.rows) * p.q_heads * chunks * D + vector * chunks * 2;
  WarpState<kFloats> group, total;
  group.reset();
  total.reset();
  for (int base = begin; base < end; base += kBatch) {
    WarpState<kFloats> part[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int c = (base + b) * run;
      if (base + b >= end) break;
      const float2 both = *reinterpret_cast<const float2*>(ml + 2 * c);
      part[b].m = both.x;
      part[b].l = both.y;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) part[b].o[i] = o[static_cast<int64_t>(c) * D + 32 * i];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int c = (base + b) * run;
      if (base + b >= end) break;
      group.fold(part[b]);
      if ((c + run) % kGroupChunks && base + b + 1 < end) continue;
      total.fold(group);
      group.reset();
    }
  }
  bf16* out = static_cast<bf16*>(p.out) + vector * D + lane;
  const float factor = row.len > 0 ? 1.0f / total.l * p.v_scale : 0.0f;
#pragma unroll
  for (int i = 0; i < kFloats; ++i) out[32 * i] = to_bf16(row.len > 0 ? total.o[i] * factor : 0.0f);
}

template <typename S> void launch_shape(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  auto map = [&](const void* pool, int box) { return pool_map<typename S::Tile>(p, pool, box); };
  // The most jobs that these capacities can hold, and no more CTAs than there is room for.
  const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, jobs = p.rows * p.kv_heads * (chunks > 1 ? chunks : 1);
  const int64_t slots = multiprocessors() * shape.blocks_per_sm;
  launch({dim3(static_cast<unsigned>(jobs < slots ? jobs : slots)), dim3(S::threads), kSharedBytes<S>, stream, 1, true}, tree_attention_kernel<S>, map(p.k_pool, p.page),
         map(p.v_pool, p.page), map(p.k_pool, 1), map(p.v_pool, 1), p, score_factor(p));
  const int64_t vectors = static_cast<int64_t>(p.rows) * p.q_heads;
  launch({dim3(static_cast<unsigned>((vectors + kCombineWarps - 1) / kCombineWarps)), dim3(kCombineWarps * 32), 0, stream, 1, true}, combine_kernel<S::dim>, p);
}

template <int D, typename KV> void launch_dim(const AttentionParams& p, cudaStream_t stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.path_depth);
  shape.warpgroups == 2 ? launch_shape<Shape<D, 2, KV>>(p, shape, stream) : launch_shape<Shape<D, 1, KV>>(p, shape, stream);
}

template <typename KV> void launch_pool(const AttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_dim<64, KV>(p, stream);
    case 96: return launch_dim<96, KV>(p, stream);
    case 128: return launch_dim<128, KV>(p, stream);
    default: fail("tree_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace

void launch_tree_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  require_hopper("tree_attention");
  auto s = static_cast<cudaStream_t>(stream);
  p.kv_dtype == DType::kE4M3 ? launch_pool<e4m3>(p, s) : launch_pool<bf16>(p, s);
}

}  // namespace specrt
