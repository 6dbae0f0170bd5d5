// Decode, verify and draft-expansion attention, bf16, on Hopper.
//
// A job is a block of rows of one request (plan.cuh) and a KV head, for a cluster of 1 to 16 CTAs: a CTA takes every so manieth chunk of 256 positions, and the chunks of a round
// are folded across the cluster (tree_fold.cuh). Rows x query heads stand side by side as the 64 vectors of a warpgroup, or the 128 of two, so that K and V are read once
// for all of them. A producer warp keeps the ring of stages full by tensor copies; keys and values of earlier passes it asks for before the kernel before has ended.
// While a tile's P V is on the tensor cores, so are the next tile's scores. Which CTA does what changes no bit.
//
// From a block's common prefix on each row has keys of its own, its path's. Their scores are made for all rows at once, in the order of the nodes; the probabilities then are
// picked in groups of 16 logical positions, and each row's group meets the V rows of its own path (row addresses of ldmatrix).
//
// Bytes: K and V once a block of rows (the blocks of a request share them through L2).
#include <array>

#include "attention/tree_job.cuh"
#include "base/launch.h"
#include "base/tensor_map.h"
#include "ptx/cluster.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"

namespace specrt {
namespace {

// What a consumer warp does; index i = 0, 1 of two vectors a thread.
template <typename S> struct Consumer {
  static constexpr int D = S::dim;
  const AttentionParams& p;
  Shared<S>& shared;
  uint32_t stages;
  int num_stages, warp, lane, group_heads;
  float scale;
  Place at{0, 0};  // K of the next tile
  int local[2];  // rows of this thread's vectors in the block; far beyond it where there is none
  bool works;
  Vectors<D> x;

  __device__ __forceinline__ uint32_t stage_at(Place place) const { return stages + place.stage * S::tile_bytes; }
  __device__ __forceinline__ void wait(Place place) const { ptx::mbarrier_wait(ptx::shared_address(shared.full + place.stage), place.parity); }
  __device__ __forceinline__ void give(Place place) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(shared.empty + place.stage));
  }
  __device__ __forceinline__ void barrier() const { ptx::named_barrier(1, S::consumers); }

  // The row of a warp's vector u < 16.
  __device__ __forceinline__ int row_of(int of_warp, int u) const {
    const int rows = 64 / group_heads, r = (of_warp % 4 * 16 + u) / group_heads;  // of a warpgroup
    return r < rows ? of_warp / 4 * rows + r : 1 << 20;
  }

  // What the rows of a block see.
  __device__ __forceinline__ void begin(const Job& job) {
    const Block& block = job.block;
    barrier();  // nobody reads the job before's
    if (threadIdx.x == 0) shared.job = job;
    for (int r = threadIdx.x; r < block.rows; r += S::consumers) {
      const int64_t row = block.begin + r;
      int len = __ldcg(p.row_prefix + row);
      uint64_t word = 0;
      if (p.ancestors) {
        word = static_cast<uint64_t>(__ldcg(reinterpret_cast<const long long*>(p.ancestors) + row));
        len += __popcll(static_cast<long long>(word));
      } else if (p.paths) {
        for (int d = 0; d < p.path_depth && __ldcg(p.paths + row * p.path_depth + d) >= 0; ++d) ++len;
      }
      shared.len[r] = len;
      shared.nodes[r] = word;
    }
    local[0] = row_of(warp, lane / 4);
    local[1] = row_of(warp, lane / 4 + 8);
    works = row_of(warp, 0) < block.rows;
    barrier();
  }

  __device__ __forceinline__ Row row_at(const Job& job, int r) const {
    Row row;
    if (r >= job.block.rows) return row;
    row.len = shared.len[r];
    row.prefix = job.has_paths ? job.block.prefix : row.len;
    if (p.window > 0) row.first = max(0, row.len - p.window);
    return row;
  }

  __device__ __forceinline__ void softmax(const Job& job, int tile, float (&a)[2]) {
    const int all_first = p.window > 0 ? max(0, job.block.longest - p.window) : 0;  // all rows see [all_first, shortest)
    if (!works) {
      a[0] = a[1] = 1.0f;
    } else if (tile >= all_first && tile + kTile <= job.block.shortest) {
      x.template softmax<false>({0, 0}, {kTile, kTile}, scale, lane, a);
    } else {
      int low[2], high[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Row row = row_at(job, local[i]);
        low[i] = row.low(tile);
        high[i] = row.high(tile, kTile);
      }
      x.template softmax<true>(low, high, scale, lane, a);
    }
  }

  // l, O and the probabilities of the tile whose factors are `a`.
  __device__ __forceinline__ void finish(const float (&a)[2]) {
    if (!works) return x.no_probabilities();
    x.rescale(a);
    x.round();
#pragma unroll
    for (int g = 0; g < 4; ++g) x.add_sums(x.p[g]);
  }

  // Waits for a tile's V; its rows outside [low, high) become zeros: nobody sees them, and they may hold NaN.
  __device__ __forceinline__ void wait_values(Place place, int low, int high) const {
    wait(place);
    if (low <= 0 && high >= kTile) return;
    const uint32_t values = stage_at(place);
    for (int i = threadIdx.x % 128; i < kTile * (S::columns / 8); i += 128) {
      const int j = i / (S::columns / 8);
      if (j < low || j >= high) ptx::store_zeros(piece_address(values, j, i % (S::columns / 8)));
    }
    ptx::async_proxy_fence();
    ptx::named_barrier(2 + warp / 4, 128);
  }

  // The tiles [tile, end) of a chunk, whose keys all rows share.
  __device__ __forceinline__ void common(const Job& job, int tile, int end, uint32_t queries) {
    float a[2];
    wait(at);
    x.score(x.s, queries, stage_at(at));
    give(at);
    softmax(job, tile, a);
    finish(a);
#pragma unroll 1
    for (; tile + kTile < end; tile += kTile) {
      const Place values = at.after(1, num_stages), ahead = at.after(2, num_stages);
      wait(ahead);
      wait_values(values, job.first_seen - tile, job.block.prefix - tile);
      x.start_scores(x.s, queries, stage_at(ahead));
      x.start_values(stage_at(values));
      ptx::wgmma_wait<1>();
      ptx::wgmma_results(x.s);
      give(ahead);
      softmax(job, tile + kTile, a);
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(x.o);
      give(values);
      at = ahead;
      finish(a);
    }
    const Place values = at.after(1, num_stages);
    wait_values(values, job.first_seen - tile, job.block.prefix - tile);
    x.start_values(stage_at(values));
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(x.o);
    give(values);
    at = at.after(2, num_stages);
  }

  // Which rows of a tile's stages a row sees. The first stage holds slots from `tile` on, the second what loads_more() says.
  __device__ __forceinline__ Visible visible(const Job& job, int r, const Row& row, int tile) const {
    Visible seen{{0, 0}};
    const int prefix = job.block.prefix, low = row.low(tile), high = row.high(tile, kTile);
    if (low >= high) return seen;
    auto below = [](int n) { return n >= 64 ? ~0ull : (1ull << max(0, n)) - 1; };
    if (tile < prefix) seen.stage[0] = below(min(high, prefix - tile)) & ~below(low);
    const int from = max(0, tile + low - prefix), to = tile + high - prefix;  // of the path
    if (to <= from) return seen;
    if (p.paths) {
      const int most = min(kTile, p.path_depth), entry = r * most - max(0, tile - prefix);
      seen.stage[1] = below(entry + to) & ~below(entry + from);
      return seen;
    }
    uint64_t nodes = shared.nodes[r];
    for (int d = 0; d < from; ++d) nodes &= nodes - 1;
    if (prefix + __popcll(static_cast<long long>(shared.nodes[r])) > tile + kTile) {  // the last ones belong to the next tile
      uint64_t beyond = nodes;
      for (int d = from; d < to; ++d) beyond &= beyond - 1;
      nodes ^= beyond;
    }
    const int shift = prefix - tile;
    if (!job.many_nodes) {
      seen.stage[1] = nodes;
    } else if (shift > 0) {
      seen.stage[0] |= nodes << shift;
      seen.stage[1] = nodes >> (64 - shift);
    } else {
      seen.stage[0] = nodes >> -shift;
    }
    return seen;
  }

  // shared.seen of a tile, for this warp's rows.
  __device__ __forceinline__ void find_visible(const Job& job, int tile, int rows_begin, int rows_end) const {
    const int r = rows_begin + lane;
    if (lane < 16) shared.seen[warp][lane] = r < rows_end ? visible(job, r, row_at(job, r), tile) : Visible{{0, 0}};
    __syncwarp();
  }

  // shared.places for the 16 positions from `begin` on, of this warp's rows.
  __device__ __forceinline__ void find_places(const Job& job, int tile, int begin, int rows_begin, int rows_end) const {
    const int prefix = job.block.prefix, most = min(kTile, p.path_depth);
    __syncwarp();
    for (int r = rows_begin; r < rows_end; ++r) {
      const Row row = row_at(job, r);
      uint8_t* places = shared.places[warp][r - rows_begin];
      const int position = begin + lane;
      if (lane < 16) {
        int place = 255;
        if (position >= row.first && position < row.len) {
          if (position < prefix) place = position - tile;
          else if (p.paths) place = 64 + r * most + position - max(tile, prefix);
        }
        places[lane] = static_cast<uint8_t>(place);
      }
    }
    __syncwarp();
    if (p.ancestors) {
      for (int r = rows_begin; r < rows_end; ++r) {
        const uint64_t word = shared.nodes[r];
        const int first = row_at(job, r).first;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int node = lane + 32 * half, position = prefix + __popcll(static_cast<long long>(word & ((1ull << node) - 1)));
          if ((word >> node & 1) && position >= first && position >= begin && position < begin + 16)
            shared.places[warp][r - rows_begin][position - begin] = static_cast<uint8_t>(job.many_nodes ? prefix + node - tile : 64 + node);
        }
      }
    }
    __syncwarp();
  }

  // A tile in which rows have keys of their own.
  __device__ __forceinline__ void own(const Job& job, int tile, uint32_t queries) {
    const bool slots = job.loads_slots(tile), more = job.loads_more(tile);
    const int low = max(0, job.own_begin() - tile);  // the groups of 16 before it are common
    auto keys = [&] { return at; };
    auto keys_more = [&] { return at.after(slots, num_stages); };
    auto values = [&] { return at.after(slots + more, num_stages); };
    auto values_more = [&] { return at.after(2 * slots + more, num_stages); };
    const int rows_begin = row_of(warp, 0), rows_end = min(job.block.rows, warp / 4 * (64 / group_heads) + min(64 / group_heads, (warp % 4 * 16 + 15) / group_heads + 1));
    if (works) find_visible(job, tile, rows_begin, rows_end);
    float s[8][4] = {};
    if (slots) {
      wait(keys());
      x.score(x.s, queries, stage_at(keys()));
      give(keys());
    }
    if (more) {
      wait(keys_more());
      x.score(s, queries, stage_at(keys_more()));
      give(keys_more());
    }

    uint16_t(*own)[kOwnPitch] = shared.own[warp];
    if (works) {
      float a[2];
      auto seen = [&](int i) { return local[i] < rows_end ? shared.seen[warp][local[i] - rows_begin] : Visible{{0, 0}}; };
      x.softmax(s, seen, scale, lane, a);
      x.rescale(a);
      x.round();
      // The probabilities of what is not common, by place: see column().
      auto keep = [&](int column, const uint32_t (&p)[4]) {
#pragma unroll
        for (int h = 0; h < 4; ++h) *reinterpret_cast<uint32_t*>(&own[lane / 4 + h % 2 * 8][column + h / 2 * 8 + lane % 4 * 2]) = p[h];
      };
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        if (16 * g >= low && slots && (job.many_nodes || 16 * g == low)) keep(16 * g - low, x.p[g]);
        if (more && (!job.many_nodes || 16 * g <= low)) {
          uint32_t q[4];
#pragma unroll
          for (int h = 0; h < 4; ++h) q[h] = ptx::pack_bf16(s[2 * g + h / 2][h % 2 * 2], s[2 * g + h / 2][h % 2 * 2 + 1]);
          keep((job.many_nodes ? 64 - low : 16) + 16 * g, q);
        }
      }
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (16 * g < low) x.add_sums(x.p[g]);
    } else {
      x.no_probabilities();
    }

    if (slots) {
      if (low > 0) {
        wait_values(values(), job.first_seen - tile, kTile);
        x.accumulate(stage_at(values()), low / 16);
      } else {
        wait(values());
      }
    }
    if (more) wait(values_more());
    if (works) {
      auto column = [&](int place) { return place < 64 || job.many_nodes ? place - low : place - 48; };
#pragma unroll 1
      for (int g = low / 16; g < 4 && tile + 16 * g < job.block.longest; ++g) {
        find_places(job, tile, tile + 16 * g, rows_begin, rows_end);
        // The group's probabilities of all the warp's rows, each of its own path.
        uint32_t group[4];
        auto probability = [&](int i, int j) -> uint32_t {
          const int place = local[i] < job.block.rows ? shared.places[warp][local[i] - rows_begin][j] : 255;
          return place == 255 ? 0u : own[lane / 4 + 8 * i][column(place)];
        };
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const int j = h / 2 * 8 + lane % 4 * 2;
          group[h] = probability(h % 2, j) | probability(h % 2, j + 1) << 16;
        }
        x.add_sums(group);
#pragma unroll 1
        for (int r = rows_begin; r < rows_end; ++r) {
          if (!row_at(job, r).sees(tile + 16 * g, 16)) continue;
          const int place = shared.places[warp][r - rows_begin][lane / 8 % 2 * 8 + lane % 8];
          const RowAddress value = place == 255 ? RowAddress{ptx::shared_address(&shared.zeros), -1} : RowAddress{stage_at(slots && place >= 64 ? values_more() : values()), place % 64};
          x.accumulate_own(group, value, {local[0] == r, local[1] == r}, lane);
        }
      }
    }
    if (slots) give(values());
    if (more) give(values_more());
    at = at.after(2 * (slots + more), num_stages);
  }

  __device__ __forceinline__ void chunk(const Job& job, int chunk, uint32_t queries) {
    x.reset();
    const int begin = job.tiles_begin(chunk), end = job.tiles_end(chunk), own_tile = max(begin, min(end, job.own_tile()));
    if (begin < own_tile) common(job, begin, own_tile, queries);
#pragma unroll 1
    for (int tile = own_tile; tile < end; tile += kTile) own(job, tile, queries);
  }

  __device__ __forceinline__ int64_t vector_of(const Job& job, int r, int of_warp, int u) const {
    return static_cast<int64_t>(job.block.begin + r) * p.q_heads + job.kv_head * group_heads + (of_warp % 4 * 16 + u) % group_heads;
  }

  // Two elements of a vector's answer, columns 8 n + 2 (lane % 4) ..
  __device__ __forceinline__ void write(int64_t vector, int n, float a, float b, float l, bool sees) const {
    const float r = 1.0f / l;
    reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + vector * D)[4 * n + lane % 4] = sees ? ptx::pack_bf16(a * r, b * r) : 0u;
  }

  // Vector i of x.o, with (m, l): what was before folded with it, where it is seen. before: of (m, l), then of the elements 8 n + 2 (lane % 4) ..
  template <typename Before> __device__ __forceinline__ void join(int i, bool seen, float2 sums, float& m, float& l, Before&& before) {
    float top = sums.x;
    FoldFactors f{1.0f, 0.0f};
    if (seen) f = fold_factors(top, m);
    l = seen ? fold_value(sums.y, l, f) : sums.y;
    m = top;
#pragma unroll
    for (int n = 0; n < S::pieces; ++n) {
      const float2 b = before(n);
      x.o[n][2 * i] = seen ? fold_value(b.x, x.o[n][2 * i], f) : b.x;
      x.o[n][2 * i + 1] = seen ? fold_value(b.y, x.o[n][2 * i + 1], f) : b.y;
    }
  }

  // One CTA has all chunks: chunk c joins its group, whose sums stay in shared memory, and the group the total of those before, which few rows have: in the workspace.
  __device__ __forceinline__ void fold_alone(const Job& job, int c) {
    AloneSums<S>& sums = *reinterpret_cast<AloneSums<S>*>(&shared + 1);
    const float2 nothing{SPECRT_MINUS_INF, 0.0f};
    const bool last = c + 1 == job.chunk_end(), first_of_group = c == job.chunk_begin() || c % kGroupChunks == 0;
    const bool group_ends = last || (c + 1) % kGroupChunks == 0, first_group = c / kGroupChunks == job.chunk_begin() / kGroupChunks;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = row_at(job, local[i]);
      float m = x.m[i], l = x.l[2 * i];
      float2* const kept = sums.values[i][0] + threadIdx.x;
      float2* const kept_sums = sums.sums[warp] + lane / 4 + 8 * i;
      const bool seen = row.sees(c * kChunk, kChunk);
      if (first_of_group) join(i, seen, nothing, m, l, [](int) { return float2{0.0f, 0.0f}; });
      else join(i, seen, *kept_sums, m, l, [&](int n) { return kept[n * S::consumers]; });
      __syncwarp();
      if (!group_ends) {
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) kept[n * S::consumers] = make_float2(x.o[n][2 * i], x.o[n][2 * i + 1]);
        if (lane % 4 == 0) *kept_sums = make_float2(m, l);
        continue;
      }
      if (local[i] >= job.block.rows) continue;
      const int64_t vector = vector_of(job, local[i], warp, lane / 4 + 8 * i);
      const Workspace workspace(p);
      float2* const total = reinterpret_cast<float2*>(workspace.of(vector, 0)) + lane % 4;
      float2* const total_sums = workspace.sums_of(vector, lane % 4);  // a lane's own: there are at least eight chunks
      const bool sees_group = row.sees(c / kGroupChunks * kGroup, kGroup);
      if (first_group) join(i, sees_group, nothing, m, l, [](int) { return float2{0.0f, 0.0f}; });
      else join(i, sees_group, *total_sums, m, l, [&](int n) { return total[4 * n]; });
#pragma unroll
      for (int n = 0; n < S::pieces; ++n) {
        if (last) write(vector, n, x.o[n][2 * i], x.o[n][2 * i + 1], l, row.len > 0);
        else total[4 * n] = make_float2(x.o[n][2 * i], x.o[n][2 * i + 1]);
      }
      if (!last) *total_sums = make_float2(m, l);
    }
  }

  // Leaves (m, l, O) of a chunk in the workspace.
  __device__ __forceinline__ void leave(const Job& job, const Workspace& workspace, int c) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (local[i] >= job.block.rows) continue;
      const int64_t vector = vector_of(job, local[i], warp, lane / 4 + 8 * i);
      float4* to = workspace.of(vector, c) + lane % 4;
#pragma unroll
      for (int n = 0; n < S::pieces; n += 2) __stcg(to + 2 * n, make_float4(x.o[n][2 * i], x.o[n][2 * i + 1], x.o[n + 1][2 * i], x.o[n + 1][2 * i + 1]));
      if (lane % 4 == 0) __stcg(workspace.sums_of(vector, c), make_float2(x.m[i], x.l[2 * i]));
    }
  }

  // Folds this CTA's share of what the cluster left: 8 vectors and 16 columns a warp and turn, or where there are several groups of chunks a team of warps, one a group.
  __device__ __forceinline__ void fold_left(const Job& job, const Workspace& workspace, int rank, int ranks) const {
    ClusterSums<S>& sums = *reinterpret_cast<ClusterSums<S>*>(&shared + 1);
    constexpr int parts = D / 16;
    const int first_group = job.chunk_begin() / kGroupChunks, groups = (job.chunk_end() - 1) / kGroupChunks + 1 - first_group;
    const int rows = 64 / group_heads, eights = S::warpgroups == 2 && job.block.rows > rows ? 8 + ((job.block.rows - rows) * group_heads + 7) / 8 : (job.block.rows * group_heads + 7) / 8;
    const int units = eights * parts;
    int team_bits = 0;
    while (1 << team_bits < groups && 2 << team_bits <= S::warps && units << (team_bits + 1) <= ranks * S::warps) ++team_bits;
    const int team = warp >> team_bits, of_team = warp & ((1 << team_bits) - 1), teams = S::warps >> team_bits;
    for (int base = rank * teams; base < units; base += ranks * teams) {
      const int unit = base + team, part = unit % parts, of_warp = unit / parts / 2, u = unit / parts % 2 * 8 + lane / 4;
      const int r = unit < units ? row_of(of_warp, u) : 1 << 20;
      const bool valid = r < job.block.rows;
      const Row row = row_at(job, r);
      const int64_t vector = vector_of(job, valid ? r : 0, of_warp, u);
      VectorSums total;
      total.reset();
      for (int g = 0; g < groups; g += 1 << team_bits) {
        auto sees = [&](int group) { return row.sees((first_group + group) * kGroup, kGroup); };
        const VectorSums mine = workspace.group(vector, g + of_team < groups ? row : Row(), first_group + g + of_team, part, lane % 4);
        if (team_bits == 0) {
          if (sees(g)) total.fold(mine);
          continue;
        }
        sums.groups[warp][lane] = mine;
        barrier();
        if (of_team == 0)
          for (int w = 0; w < 1 << team_bits && g + w < groups; ++w)
            if (sees(g + w)) total.fold(sums.groups[warp + w][lane]);
        barrier();
      }
      if (!valid || of_team > 0) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) write(vector, 2 * part + n, total.o[2 * n], total.o[2 * n + 1], total.l, row.len > 0);
    }
  }

  // The chunks of a job that are this CTA's.
  __device__ __forceinline__ void run(const Job& job, uint32_t queries, int rank, int ranks, uint32_t parity) {
    const Workspace workspace(p);
#pragma unroll 1
    for (int c = job.chunk_begin() + rank; c < job.chunk_end(); c += ranks) {
      chunk(job, c, queries);
      if (!works) continue;
      if (ranks == 1) fold_alone(job, c);
      else leave(job, workspace, c);
    }
    if (ranks == 1) return;
    __syncwarp();
    if (lane < ranks) ptx::mbarrier_release_of(lane, ptx::shared_address(&shared.left));
    ptx::mbarrier_wait_cluster(ptx::shared_address(&shared.left), parity);
    fold_left(job, workspace, rank, ranks);
  }
};

template <typename S> __global__ void __launch_bounds__(S::threads, S::blocks_per_sm)
tree_attention_kernel(const __grid_constant__ TreeMaps maps, const __grid_constant__ AttentionParams p, float scale, int num_stages) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, ranks = ptx::cluster_size(), rank = ptx::cluster_rank(), group_heads = p.q_heads / p.kv_heads;
  const uint32_t stages = ptx::shared_address(memory) + stages_at<S>(ranks);
  const int clusters = gridDim.x / ranks, first_job = blockIdx.x / ranks;
  if (threadIdx.x < kPlanBlock)  // perhaps there is no such job: the number of jobs comes with it
    reinterpret_cast<int*>(&shared.first)[threadIdx.x] = __ldcg(p.plan + kPlanHeader + min(first_job / p.kv_heads, p.rows - 1) * kPlanBlock + threadIdx.x);
  if (threadIdx.x == kPlanBlock) shared.jobs = __ldcg(p.plan) * p.kv_heads;
  if (threadIdx.x == 32) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(shared.full + s), 1);
      ptx::mbarrier_init(ptx::shared_address(shared.empty + s), S::warps);
    }
    ptx::mbarrier_init(ptx::shared_address(&shared.queries_full), 1);
    ptx::mbarrier_init(ptx::shared_address(&shared.queries_empty), S::warps);
    ptx::mbarrier_init(ptx::shared_address(&shared.left), S::warps * ranks);
    ptx::mbarrier_init_fence();
    shared.zeros = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  if (ranks > 1) ptx::cluster_arrive_relaxed();
  ptx::launch_dependents();

  const int jobs = shared.jobs;
  auto job_of = [&](int number) { return Job(p, number == first_job ? shared.first : read_block(p.plan, number / p.kv_heads), number % p.kv_heads); };

  if (warp >= S::warps) {
    ptx::give_registers<S::producer_registers>();
    if (ranks > 1) ptx::cluster_wait();
    if (warp == S::warps) {
      Producer<S> producer{p, maps, shared, stages, num_stages, lane};
      for (int number = first_job; number < jobs; number += clusters) producer.run(job_of(number), rank, ranks);
    } else if (warp == S::warps + 1) {
      ptx::grid_dependency_wait();
      for (int turn = 0; first_job + turn * clusters < jobs; ++turn) {
        ptx::mbarrier_wait(ptx::shared_address(&shared.queries_empty), (turn & 1) ^ 1);
        if (lane == 0) load_queries(shared, &maps.queries, job_of(first_job + turn * clusters), group_heads);
      }
    }
    return;
  }

  ptx::take_registers<S::consumer_registers>();
  Consumer<S> consumer{p, shared, stages, num_stages, warp, lane, group_heads, scale};
  const uint32_t queries = ptx::shared_address(shared.queries) + warp / 4 * S::tile_bytes;
  if (ranks > 1) ptx::cluster_wait();
  for (int turn = 0; first_job + turn * clusters < jobs; ++turn) {
    consumer.begin(job_of(first_job + turn * clusters));
    ptx::mbarrier_wait(ptx::shared_address(&shared.queries_full), turn & 1);
    consumer.run(shared.job, queries, rank, ranks, turn & 1);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared.queries_empty));
  }
}

// How many CTAs make a cluster, of how many stages.
struct Division {
  int ranks, stages, grid;
};

template <typename S> int stages_of(int ranks, int blocks_per_sm) {
  constexpr int sm_bytes = 228 * 1024, reserved = 1024;  // of an SM; for the system, a CTA
  const int stages = (sm_bytes / blocks_per_sm - reserved - stages_at<S>(ranks)) / S::tile_bytes;
  return stages < kMostStages ? stages : kMostStages;
}
template <typename S> int shared_bytes(int ranks, int stages) { return stages_at<S>(ranks) + stages * S::tile_bytes; }

// The clusters of so many CTAs, one an SM, that run at once.
template <typename S> int clusters_at_once(int ranks) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ranks);
  config.blockDim = dim3(S::threads);
  config.dynamicSmemBytes = shared_bytes<S>(ranks, stages_of<S>(ranks, 1));
  config.attrs = &attribute;
  config.numAttrs = 1;
  SPECRT_CUDA_CHECK(cudaFuncSetAttribute(tree_attention_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes)));
  SPECRT_CUDA_CHECK(cudaFuncSetAttribute(tree_attention_kernel<S>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  int count = 0;
  SPECRT_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, tree_attention_kernel<S>, &config));
  return count;
}

template <typename S> Division divide(const AttentionParams& p, int most_rows) {
  static const std::array<int, 5> at_once = {multiprocessors(), clusters_at_once<S>(2), clusters_at_once<S>(4), clusters_at_once<S>(8), clusters_at_once<S>(16)};
  const int full = (p.rows + most_rows - 1) / most_rows, blocks = p.rows < p.requests ? p.rows : (full > p.requests ? full : p.requests), jobs = blocks * p.kv_heads;
  const int chunks = static_cast<int>((static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk);
  int power = 0;
  while (power < 4 && jobs <= at_once[power + 1] && 1 << power < chunks) ++power;
  const int ranks = 1 << power, blocks_per_sm = ranks == 1 ? S::blocks_per_sm : 1;
  const int most_blocks = full + p.requests < p.rows ? full + p.requests : p.rows, most = most_blocks * p.kv_heads, slots = at_once[power] * blocks_per_sm;
  return {ranks, stages_of<S>(ranks, blocks_per_sm), (most < slots ? most : slots) * ranks};
}

template <typename S> void launch_shape(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  static_assert(stages_at<S>(1) + 3 * S::tile_bytes <= (228 / S::blocks_per_sm - 1) * 1024 && stages_at<S>(2) + 3 * S::tile_bytes <= 227 * 1024, "no room for three stages");
  constexpr bool whole_blocks = Producer<S>::kWholeBlocks;
  const cuuint64_t row = p.head_dim * 2, slots = static_cast<cuuint64_t>(p.pages) * p.kv_heads * p.page, dim = p.head_dim;
  auto map = [&](const void* pool, int box_rows) {
    if (!whole_blocks) return tensor_map_bf16(pool, {dim, slots, 1}, {row, row}, box_rows, 1);
    return tensor_map_bf16(pool, {64, slots, dim / 64}, {row, 128}, box_rows, box_rows == kTile ? static_cast<int>(dim / 64) : 1);
  };
  const int group_heads = p.q_heads / p.kv_heads;
  const TreeMaps maps{tensor_map_bf16(p.q, {dim, static_cast<cuuint64_t>(p.q_heads), static_cast<cuuint64_t>(p.rows)}, {row, row * p.q_heads}, group_heads, 64 / group_heads),
                      {map(p.k_pool, p.page), map(p.v_pool, p.page)}, {map(p.k_pool, 1), map(p.v_pool, 1)}};
  const Division by = divide<S>(p, shape.most_rows);
  launch({dim3(static_cast<unsigned>(by.grid)), dim3(S::threads), shared_bytes<S>(by.ranks, by.stages), stream, by.ranks, true}, tree_attention_kernel<S>, maps, p, p.scale * kLog2e, by.stages);
}

template <int D> void launch_dim(const AttentionParams& p, cudaStream_t stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.path_depth);
  shape.warpgroups == 2 ? launch_shape<TreeKernel<D, 2>>(p, shape, stream) : launch_shape<TreeKernel<D, 1>>(p, shape, stream);
}

}  // namespace

void launch_tree_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  require_hopper("tree_attention");
  auto s = static_cast<cudaStream_t>(stream);
  switch (p.head_dim) {
    case 64: return launch_dim<64>(p, s);
    case 96: return launch_dim<96>(p, s);
    case 128: return launch_dim<128>(p, s);
    default: fail("tree_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace specrt
