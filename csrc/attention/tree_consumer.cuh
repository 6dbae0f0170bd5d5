// What the consumer warps of tree attention do with a job: scores, softmax and P V in the order of params.h, the keys of paths, the fold of a run, and what is left of it.
#pragma once
#include "attention/combine.cuh"
#include "attention/tree_job.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace specrt {

// What a consumer warp does; index i = 0, 1 of two vectors a thread.
template <typename S> struct Consumer {
  static constexpr int D = S::dim;
  using At = Place<S::stages>;
  const AttentionParams& p;
  Rest<S>& rest;
  float4* kept_shared;  // of this thread
  uint32_t stages, queries, ones;
  int warp, lane;
  float scale;
  At at;  // K of the next tile
  Vectors<D> x;              // the chunk
  uint32_t q[D / 16][4];     // of two warpgroups, the warp's queries: from shared memory they would take as much of its bandwidth as there is beside the tiles
  float run_m[2], run_l[2];  // the run of chunks before it; its O is kept in shared memory or in the workspace

  __device__ __forceinline__ int vector(int i) const { return warp * 16 + lane / 4 + 8 * i; }
  __device__ __forceinline__ uint32_t stage_at(At place) const { return stages + place.stage * S::tile_bytes; }
  __device__ __forceinline__ void wait(At place) const { ptx::mbarrier_wait(ptx::shared_address(rest.full + place.stage), place.parity); }
  __device__ __forceinline__ void give(At place) const { ptx::mbarrier_arrive(ptx::shared_address(rest.empty + place.stage)); }

  // The next job, but for the first; and where they are not there yet its queries, and what its rows see. What is not the kernel before's comes before the wait.
  __device__ __forceinline__ void begin(bool first) {
    Job& job = rest.consumers;
    if (!first) {
      ptx::named_barrier(1, S::consumers);  // nobody works on the job before
      if (threadIdx.x == 0) job.advance(p);
      ptx::named_barrier(1, S::consumers);
    }
    if (!first && job.piece > 0) return;
    const int rows = job.block.rows, mine = warp * 16 + lane % 16, row = rest.row_of[mine];
    const int from = (job.block.begin + row) * p.q_heads + job.kv_head * (p.q_heads / p.kv_heads) + rest.head_of[mine];
    int len = 0;
    uint64_t nodes = 0;
    if (threadIdx.x < rows) {
      len = plan_len(p.plan, p.rows, job.block.begin + threadIdx.x);
      if (p.ancestors) nodes = __ldcg(reinterpret_cast<const unsigned long long*>(p.ancestors) + job.block.begin + threadIdx.x);
    }
    if (first) ptx::grid_dependency_wait();
    // What lies in the place of a vector beyond the block's is multiplied, too: nobody reads that.
    constexpr int kPieces = S::columns / 8;
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int vector = (lane + 32 * i) / kPieces, piece = (lane + 32 * i) % kPieces, from_row = __shfl_sync(~0u, row < rows ? from : -1, vector);
      if (from_row >= 0 && piece < D / 8)
        ptx::cp_async_16(piece_address(queries, warp % 4 * 16 + vector, piece), static_cast<const bf16*>(p.q) + static_cast<int64_t>(from_row) * D + piece * 8, true);
    }
    ptx::cp_async_commit();
    if (lane < 16) rest.vector_of[mine] = from;
    if (threadIdx.x < rows) {
      rest.len[threadIdx.x] = len;
      rest.nodes[threadIdx.x] = nodes;
#pragma unroll 1
      for (int d = 0; nodes; nodes &= nodes - 1) rest.node_at[threadIdx.x][d++] = static_cast<uint8_t>(__ffsll(static_cast<long long>(nodes)) - 1);
    }
    ptx::cp_async_wait<0>();
    if constexpr (S::warpgroups == 2) {
      __syncwarp();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) ptx::ldmatrix_x4(q[k], piece_address(queries, warp % 4 * 16 + lane % 16, 2 * k + lane / 16));
    } else {
      ptx::async_proxy_fence();
    }
    ptx::named_barrier(1, S::consumers);
  }

  __device__ __forceinline__ void start_scores(float (&to)[8][4], uint32_t keys) const {
    if constexpr (S::warpgroups == 2) x.start_scores(to, q, keys);
    else x.start_scores(to, queries, keys);
  }

  // Of a warp's vectors, of this thread's: the row in the block, or beyond it.
  __device__ __forceinline__ int first_row() const { return rest.row_of[warp * 16]; }
  __device__ __forceinline__ int last_row() const { return rest.row_of[warp * 16 + 15]; }
  __device__ __forceinline__ int local(int i) const { return rest.row_of[vector(i)]; }

  __device__ __forceinline__ Row row_at(const Job& job, int r) const {
    Row row;
    if (r >= job.block.rows) return row;
    row.len = rest.len[r];
    row.prefix = job.has_paths ? job.block.prefix : row.len;
    if (p.window > 0) row.first = max(0, row.len - p.window);
    return row;
  }

  __device__ __forceinline__ void softmax(const Job& job, int tile, float (&a)[2]) {
    const int all_first = p.window > 0 ? max(0, job.block.longest - p.window) : 0;  // all rows see [all_first, shortest)
    if (tile < all_first || tile + kTile > job.block.shortest) {
      int low[2], high[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Row row = row_at(job, local(i));
        low[i] = row.low(tile);
        high[i] = row.high(tile, kTile);
      }
      x.mask(low, high, lane);
    } else if constexpr (S::warpgroups == 2) {
      // Code of its own: the compiler otherwise moves the exponentials behind the wait for the products they run beside. (One warpgroup has the other CTA's to run beside, and is better
      // off with less code.)
      x.template softmax<false>(scale, a);
      return;
    }
    x.template softmax<true>(scale, a);
  }

  // Waits for a tile's V; its rows outside [low, high) become zeros: nobody sees them, and they may hold NaN.
  __device__ __forceinline__ void wait_values(At place, int low, int high) const {
    wait(place);
    if (low <= 0 && high >= kTile) return;
    const uint32_t values = stage_at(place);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kTile * (S::columns / 8); i += 128) {
      const int j = i / (S::columns / 8);
      if (j < low || j >= high) ptx::store(piece_address(values, j, i % (S::columns / 8)), make_uint4(0, 0, 0, 0));
    }
    ptx::async_proxy_fence();
    ptx::named_barrier(2 + warp / 4, 128);
  }

  __device__ __forceinline__ void scores(float (&to)[8][4], At place) {
    wait(place);
    start_scores(to, stage_at(place));
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(to);
    give(place);
  }

  // The tiles [tile, end), whose keys all rows share. Their last chunk is not folded.
  __device__ __forceinline__ void common(const Job& job, int tile, int end) {
    float a[2];
    const int begin = tile;
    bool fresh = true;  // the tile is the first of its chunk
    scores(x.s, at);
    x.m[0] = x.m[1] = SPECRT_MINUS_INF;
    softmax(job, tile, a);
    x.round();
#pragma unroll 1
    for (; tile + kTile < end; tile += kTile) {
      const int coming = tile + kTile;
      const At values = at.after(1), ahead = at.after(2);
      wait(ahead);
      wait_values(values, job.first_seen - tile, job.block.prefix - tile);
      start_scores(x.s, stage_at(ahead));
      if (!fresh) x.rescale(a);  // while those are made
      x.start_values(stage_at(values), ones, fresh);
      ptx::wgmma_wait<1>();
      ptx::wgmma_results(x.s);
      give(ahead);
      fresh = coming % kChunk == 0;
      const float m[2] = {x.m[0], x.m[1]};
      if (fresh) x.m[0] = x.m[1] = SPECRT_MINUS_INF;
      softmax(job, coming, a);
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(x.l);
      ptx::wgmma_results(x.o);
      give(values);
      at = ahead;
      x.round();
      if (fresh) keep(job, tile / kChunk, tile / kChunk == begin / kChunk, m);
    }
    const At values = at.after(1);
    wait_values(values, job.first_seen - tile, job.block.prefix - tile);
    if (!fresh) x.rescale(a);
    x.start_values(stage_at(values), ones, fresh);
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(x.l);
    ptx::wgmma_results(x.o);
    give(values);
    at = at.after(2);
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
    uint64_t nodes = rest.nodes[r];
#pragma unroll 1
    for (int d = 0; d < from; ++d) nodes &= nodes - 1;
    if (prefix + __popcll(static_cast<long long>(rest.nodes[r])) > tile + kTile) {  // the last ones belong to the next tile
      uint64_t beyond = nodes;
#pragma unroll 1
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

  // rest.seen of a tile, for this warp's rows.
  __device__ __forceinline__ void find_visible(const Job& job, int tile) const {
    const int r = first_row() + (lane << rest.log_step);
    if (r <= last_row() && r < job.block.rows) rest.seen[warp][lane] = visible(job, r, row_at(job, r), tile);
    __syncwarp();
  }

  // A tile in which rows have keys of their own; `fresh`: the first of its chunk.
  __device__ __forceinline__ void own(const Job& job, int tile, bool fresh) {
    const int rows_begin = first_row(), rows_end = min(last_row() + 1, job.block.rows), rows[2] = {local(0), local(1)}, prefix = job.block.prefix, longest = job.block.longest;
    const bool works = rows_begin < rows_end, slots = job.loads_slots(tile), more = job.loads_more(tile), many = job.many_nodes;
    const int low = max(0, job.own_begin() - tile);  // the groups of 16 before it are common
    const At keys = at, keys_more = keys.after(slots), values = keys_more.after(more), values_more = values.after(slots);
    at = values_more.after(more);
    if (works) find_visible(job, tile);
    float s[8][4];
    if (slots) wait(keys);
    if (more) wait(keys_more);
    start_scores(x.s, stage_at(slots ? keys : keys_more));  // where there are no slots: of what nobody sees
    start_scores(s, stage_at(more ? keys_more : keys));
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(x.s);
    ptx::wgmma_results(s);
    if (slots) give(keys);
    if (more) give(keys_more);

    uint16_t(*own)[kOwnPitch] = rest.own[warp];
    if (works) {
      float a[2];
      Visible seen[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) seen[i] = rows[i] < rows_end ? rest.seen[warp][(rows[i] - rows_begin) >> rest.log_step] : Visible{{0, 0}};
      x.softmax_own(s, more, seen, scale, lane, a);
      if (!fresh) x.rescale(a);  // of zeros otherwise
      x.round();
      // The probabilities of what is not common, by place.
      auto keep = [&](int column, const uint32_t (&p)[4]) {
#pragma unroll
        for (int h = 0; h < 4; ++h) *reinterpret_cast<uint32_t*>(&own[lane / 4 + h % 2 * 8][column + h / 2 * 8 + lane % 4 * 2]) = p[h];
      };
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        if (16 * g < low) x.add_sums(x.p[g]);
        else if (slots && (many || 16 * g == low)) keep(16 * g - low, x.p[g]);
      }
      if (more) {
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          uint32_t q[4];
#pragma unroll
          for (int h = 0; h < 4; ++h) q[h] = ptx::pack_bf16(s[2 * g + h / 2][h % 2 * 2], s[2 * g + h / 2][h % 2 * 2 + 1]);
          if (!many || 16 * g <= low) keep((many ? 64 - low : 16) + 16 * g, q);
        }
      }
      __syncwarp();
    } else {
      x.no_probabilities();
    }

    if (slots) {
      if (low > 0) {
        wait_values(values, job.first_seen - tile, kTile);
        x.accumulate(stage_at(values), low / 16);
      } else {
        wait(values);
      }
    }
    if (more) wait(values_more);
    if (works) {
      const uint32_t values_at[2] = {stage_at(values), stage_at(values_more)};
      const int most = min(kTile, p.path_depth), first_entry = max(tile, prefix);
      // The row of the stages, 64 and on for the second one, that holds a row's key at a position; -1: none.
      auto place = [&](int r, const Row& row, int position) {
        if (position < row.first || position >= row.len) return -1;
        if (position < prefix) return position - tile;
        if (p.paths) return 64 + r * most + position - first_entry;
        const int node = rest.node_at[r][position - prefix];
        return many ? prefix + node - tile : 64 + node;
      };
      const Row mine[2] = {row_at(job, rows[0]), row_at(job, rows[1])};
      const int first_entries[2] = {rows[0] * most - first_entry, rows[1] * most - first_entry}, of_nodes = many ? prefix - tile - low : 16;
#pragma unroll 1
      for (int begin = tile + low; begin < tile + kTile && begin < longest; begin += 16) {
        // The group's probabilities of all the warp's rows, each of its own path.
        uint32_t group[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          uint32_t both[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            // At place(), without its branches: instructions come cold in whole graphs.
            const int i = h % 2, position = begin + h / 2 * 8 + lane % 4 * 2 + c;
            const bool sees = position >= mine[i].first && position < mine[i].len, path = position >= prefix;
            int node = first_entries[i] + position;
            if (sees && path && !p.paths) node = rest.node_at[rows[i]][position - prefix];
            const int column = path ? of_nodes + node : position - tile - low;
            both[c] = sees ? own[lane / 4 + i * 8][column] : 0u;
          }
          group[h] = both[0] | both[1] << 16;
        }
        x.add_sums(group);
#pragma unroll 1
        for (int r = rows_begin; r < rows_end; r += 1 << rest.log_step) {
          const Row row = row_at(job, r);
          if (!row.sees(begin, 16)) continue;
          const int at = place(r, row, begin + lane % 16);
          const uint32_t value = at < 0 ? ptx::shared_address(&rest.zeros) : (slots && at < 64 ? values_at[0] : values_at[1]) + at % 64 * 128;
          x.accumulate_own(group, value, at >= 0, {rows[0] == r, rows[1] == r}, lane);
        }
      }
    }
    if (slots) give(values);
    if (more) give(values_more);
  }

  __device__ __forceinline__ int64_t part(const Job& job, int i) const { return part_of(p, rest.vector_of[vector(i)], job.run_begin / kChunk); }

  // The chunk's (m, l) join those of its run: how O does. `first`: there is nothing before it.
  struct Join {
    FoldFactors f[2];
    bool sees[2], kept;

    __device__ __forceinline__ float4 operator()(const Vectors<D>& x, int i, int n, const float4* from) const {
      const float4 before = kept ? *from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      auto fold = [&](float a, float b) { return sees[i] ? fold_value(a, b, f[i]) : a; };
      return make_float4(fold(before.x, x.o[n][2 * i]), fold(before.y, x.o[n][2 * i + 1]), fold(before.z, x.o[n + 1][2 * i]), fold(before.w, x.o[n + 1][2 * i + 1]));
    }
  };
  __device__ __forceinline__ Join join(const Job& job, int chunk, bool first, const float (&m)[2]) {
    Join by;
    by.kept = !first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first) run_m[i] = SPECRT_MINUS_INF, run_l[i] = 0.0f;
      by.sees[i] = row_at(job, local(i)).sees(chunk * kChunk, kChunk);
      by.f[i] = {1.0f, 0.0f};
      if (by.sees[i]) by.f[i] = fold_factors(run_m[i], m[i]);
      run_l[i] = by.sees[i] ? fold_value(run_l[i], x.l[0][2 * i], by.f[i]) : run_l[i];
    }
    return by;
  }

  // Where the run's O is kept while there are more chunks, of vector i: columns 8 n + 2 (lane % 4) .. and 8 further on, for even n, at [kKeptPitch n].
  static constexpr int kKeptPitch = S::keeps_shared ? S::consumers : 2;
  __device__ __forceinline__ float4* kept(const Job& job, int i) const { return S::keeps_shared ? kept_shared + S::consumers * i : part_pieces(p, part(job, i)) + lane % 4; }
  __device__ __forceinline__ void keep(const Job& job, int chunk, bool first, const float (&m)[2]) {
    const Join by = join(job, chunk, first, m);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!S::keeps_shared && local(i) >= job.block.rows) continue;
      float4* const to = kept(job, i);
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) to[kKeptPitch * n] = by(x, i, n, to + kKeptPitch * n);
    }
  }

  // The last chunk: O * (v_scale / l), or a partial (m, l, O), of the run is written.
  __device__ __forceinline__ void write(const Job& job, int chunk, bool first) {
    const Join by = join(job, chunk, first, x.m);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row row = row_at(job, local(i));
      if (!row.sees(job.run_begin, kChunk << job.log_run)) continue;  // nor does what is beyond the block
      const float4* const from = kept(job, i);
      float4 o[D / 16];
      if (first) {  // what by() makes of it, in a third of the instructions
#pragma unroll
        for (int n = 0; n < D / 16; ++n)
          o[n] = make_float4(x.o[2 * n][2 * i] + 0.0f, x.o[2 * n][2 * i + 1] + 0.0f, x.o[2 * n + 1][2 * i] + 0.0f, x.o[2 * n + 1][2 * i + 1] + 0.0f);
      } else {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) o[n] = by(x, i, 2 * n, from + kKeptPitch * 2 * n);
      }
      if (job.log_run && row.first >= job.run_begin && row.len <= job.run_begin + kGroup) {
        const float r = 1.0f / run_l[i] * p.v_scale;
        uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + static_cast<int64_t>(rest.vector_of[vector(i)]) * D) + lane % 4;
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          out[8 * n] = ptx::pack_bf16(o[n].x * r, o[n].y * r);
          out[8 * n + 4] = ptx::pack_bf16(o[n].z * r, o[n].w * r);
        }
      } else {
        const int64_t at = part(job, i);
        float4* const to = part_pieces(p, at) + lane % 4;
        const uint64_t kept_in_l2 = ptx::evict_last_policy();  // for the combine kernel
#pragma unroll
        for (int n = 0; n < D / 16; ++n) ptx::store_global(to + 4 * n, o[n], kept_in_l2);
        if (lane % 4 == 0) *part_sums(p, at) = make_float2(run_m[i], run_l[i]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const Job& job = rest.consumers;
    const int begin = job.tiles_begin(job.chunk_begin), end = job.tiles_end(job.chunk_end - 1), own_tile = max(begin, min(end, job.own_begin() / kTile * kTile));
    if (begin >= end) return;  // all of it is before the window
    if (begin < own_tile) common(job, begin, own_tile);
#pragma unroll 1
    for (int tile = own_tile; tile < end; tile += kTile) {
      if (tile == begin) x.reset();
      if (tile % kChunk == 0 && tile > begin) {
        keep(job, tile / kChunk - 1, tile / kChunk - 1 == begin / kChunk, x.m);
        x.reset();
      }
      own(job, tile, tile == begin || tile % kChunk == 0);
    }
    write(job, (end - 1) / kChunk, (end - 1) / kChunk == begin / kChunk);
  }
};

}  // namespace specrt
