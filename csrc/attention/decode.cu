// Tree attention for few vectors (rows x query heads of a KV head), as plain decoding and short chains have them: bf16, Hopper.
//
// Blocks of 16 or 32 vectors. A CTA takes a chunk of 256 positions at a time, in three steps with nothing in them that waits for a tile before: eight warps share every tile's
// keys for the scores; the maxima of all four tiles are exchanged and the probabilities written; then each warp has 16 columns of V and walks the chunk's 16 groups. Its keys
// and values take 96 KB of an SM at most, so that the next kernel can come up beside it. The last CTA to finish a block and KV head folds their chunks.
//
// Bytes: K and V once, D + 2 floats for each vector and run.
#include <cstddef>

#include "attention/fold.cuh"
#include "attention/tree_job.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mma.cuh"
#include "ptx/named_barrier.cuh"

namespace specrt {
namespace {

template <int dim_, int blocks_> struct Shape {
  static constexpr int dim = dim_, blocks = blocks_, vectors = 16 * blocks, columns = dim <= 64 ? 64 : 128, warps = 8, consumers = 32 * warps, threads = consumers + 32;
  static constexpr int stages = 6, tiles_at_once = kChunkTiles, tile_bytes = columns / 64 * kBlockBytes;
  static constexpr int row_bytes = kChunk * 2 + 16, query_bytes = dim * 2 + 16;  // of a vector's probabilities and elements; 16 bytes more: ldmatrix reads 8 rows from different banks
};

template <typename S> struct Shared {
  unsigned char tiles[S::stages * S::tile_bytes];
  unsigned char probabilities[S::vectors * S::row_bytes];
  unsigned char queries[S::vectors * S::query_bytes];
  float tops[kChunkTiles][S::vectors][S::warps];           // the greatest score of a tile among a warp's keys
  float factors[kChunkTiles][S::vectors];                  // of O where a tile joins
  uint4 zeros;
  uint64_t full[S::stages], empty[S::stages];
  uint64_t nodes[S::vectors];  // ancestors of a row
  int len[S::vectors];
  int ids[32];  // the producer's
  int last;                    // all other jobs of the block and KV head are done
};

// What a consumer warp holds: index b is a block of 16 vectors, h the vector lane / 4 + 8 h in it.
template <typename S> struct Consumer {
  static constexpr int D = S::dim;
  static constexpr uint32_t kOnes = 0x3f803f80u;
  const AttentionParams& p;
  Shared<S>& shared;
  float scale;
  int warp, lane;
  SmallDivisor heads;  // query heads a KV head
  uint32_t base;  // the shared address of `shared`
  Turn<S::stages> turn{};  // of the next tile
  int local[S::blocks][2];  // rows of this thread's vectors
  Row rows[S::blocks][2];

  struct State {
    float m[S::blocks][2], l[S::blocks][4], o[S::blocks][2][4];  // columns 16 warp + 8 n ..; l[0], l[2]: the product with a column of ones
  };

  __device__ __forceinline__ void barrier() const { ptx::named_barrier(1, S::consumers); }
  __device__ __forceinline__ uint32_t probabilities() const { return base + offsetof(Shared<S>, probabilities); }
  using At = Turn<S::stages>;
  __device__ __forceinline__ uint32_t stage_at(At at) const { return base + at.stage * S::tile_bytes; }
  __device__ __forceinline__ void wait(At at) const { ptx::mbarrier_wait(base + offsetof(Shared<S>, full) + 8 * at.stage, at.parity); }
  __device__ __forceinline__ void give(At at) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(base + offsetof(Shared<S>, empty) + 8 * at.stage);
  }
  // Waits for the one or two stages of a tile, calls f with the first, and gives them back.
  template <typename F> __device__ __forceinline__ void with_tile(const Job& job, int tile, F&& f) {
    const bool two = job.loads_slots(tile) && job.loads_more(tile);
    const At first = turn;
    wait(first);
    if (two) wait(first.after(1));
    f(first);
    give(first);
    if (two) give(first.after(1));
    turn = first.after(two ? 2 : 1);
  }
  // `first`: the tile's first stage.
  __device__ __forceinline__ RowAddress address(int place, At first, bool slots) const {
    return place < 0 ? RowAddress{base + static_cast<uint32_t>(offsetof(Shared<S>, zeros)), -1} : RowAddress{stage_at(first.after(slots ? place / 64 : 0)), place % 64};
  }

  // Queries, and what the rows see.
  __device__ __forceinline__ void load(const Job& job) {
    const Block& block = job.block;
    const int valid = block.rows * heads.d;
    barrier();  // nobody reads the job before's
    for (int i = threadIdx.x; i < S::vectors * (D / 8); i += S::consumers) {
      const int vector = i / (D / 8), piece = i % (D / 8);
      uint4 x = make_uint4(0, 0, 0, 0);
      if (vector < valid)
        x = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.q) +
                                            (static_cast<int64_t>(block.begin + heads.quotient(vector)) * p.q_heads + job.kv_head * heads.d + heads.remainder(vector)) * D + piece * 8);
      *reinterpret_cast<uint4*>(shared.queries + vector * S::query_bytes + piece * 16) = x;
    }
    if (threadIdx.x < block.rows) {
      shared.len[threadIdx.x] = describe_row(p, block.begin + threadIdx.x).len;
      shared.nodes[threadIdx.x] = p.ancestors ? static_cast<uint64_t>(p.ancestors[block.begin + threadIdx.x]) : 0;
    }
    barrier();
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        local[b][h] = heads.quotient(16 * b + lane / 4 + 8 * h);
        rows[b][h] = row_at(job, local[b][h]);
      }
  }

  __device__ __forceinline__ Row row_at(const Job& job, int r) const {
    Row row;
    if (r >= job.block.rows) return row;
    row.len = shared.len[r];
    row.prefix = job.has_paths ? job.block.prefix : row.len;
    if (p.window > 0) row.first = max(0, row.len - p.window);
    return row;
  }

  // s = the scores of eight keys; this lane's row address is that of key lane % 8.
  __device__ __forceinline__ void score(float (&s)[S::blocks][4], RowAddress key) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      uint32_t x[4];
      ptx::ldmatrix_x4(x, key.piece(4 * k + lane / 8));
#pragma unroll
      for (int b = 0; b < S::blocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[4];
          ptx::ldmatrix_x4(a, base + offsetof(Shared<S>, queries) + (16 * b + lane % 16) * S::query_bytes + (4 * k + 2 * half + lane / 16) * 16);
          ptx::mma_m16n8k16_bf16(s[b], a, x[2 * half], x[2 * half + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void load_probabilities(uint32_t (&a)[4], int b, int at) const {
    ptx::ldmatrix_x4(a, probabilities() + (16 * b + lane % 16) * S::row_bytes + at * 2 + lane / 16 * 16);
  }

  // x = O + P V over the group of 16 positions that begins at `at` in the chunk; this lane's row address is that of value lane % 16. keep: what counts of V's words.
  __device__ __forceinline__ void accumulate(float (&x)[S::blocks][2][4], int at, RowAddress value, uint32_t keep0 = ~0u, uint32_t keep8 = ~0u) const {
    uint32_t v[4];
    ptx::ldmatrix_x4_trans(v, value.piece(2 * warp + lane / 16));
    v[0] &= keep0, v[1] &= keep8, v[2] &= keep0, v[3] &= keep8;
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      uint32_t a[4];
      load_probabilities(a, b, at);
      ptx::mma_m16n8k16_bf16(x[b][0], a, v[0], v[1]);
      ptx::mma_m16n8k16_bf16(x[b][1], a, v[2], v[3]);
    }
  }

  // l += P 1 over that group.
  __device__ __forceinline__ void accumulate_sums(State& x, int at) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      uint32_t a[4];
      load_probabilities(a, b, at);
      ptx::mma_m16n8k16_bf16(x.l[b], a, kOnes, kOnes);
    }
  }

  // Scores of this warp's eight keys of a tile, whose stages begin at `first`.
  __device__ __forceinline__ void score_tile(const Job& job, float (&s)[S::blocks][4], int tile, At first) const {
    const bool slots = job.loads_slots(tile);
    if (!job.owns(tile) || tile + 16 * (warp / 2) < job.own_begin()) return score(s, {stage_at(first), 8 * warp + lane % 8});
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][e] = 0.0f;
#pragma unroll 1
    for (int r = 0; r < job.block.rows; ++r) {
      const int place = find_place(p, job, r, row_at(job, r), shared.nodes[r], tile, tile + 8 * warp + lane % 8);
      if (!__any_sync(~0u, place >= 0)) continue;
      float own[S::blocks][4];
      score(own, address(place, first, slots));
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][e] = local[b][e / 2] == r ? own[b][e] : s[b][e];
    }
  }

  // l and O of a tile, whose stages of V begin at `first`.
  __device__ __forceinline__ void accumulate_tile(const Job& job, State& x, int tile, int in_chunk, At first) const {
    const bool slots = job.loads_slots(tile), owns = job.owns(tile), has_columns = 16 * warp < D;
    const int low = job.first_seen - tile, high = (owns ? job.own_begin() : job.block.prefix) - tile;  // of the positions whose keys all rows read in common; others may hold NaN
    if (low <= 0 && high >= kTile) {
      uint32_t v[kTile / 16][4];
#pragma unroll
      for (int g = 0; g < kTile / 16; ++g)
        ptx::ldmatrix_x4_trans(v[g], RowAddress{stage_at(first), 16 * g + lane % 16}.piece((has_columns ? 2 * warp : 0) + lane / 16));
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int g = 0; g < kTile / 16; ++g) {
          uint32_t a[4];
          load_probabilities(a, b, in_chunk + 16 * g);
          ptx::mma_m16n8k16_bf16(x.l[b], a, kOnes, kOnes);
          ptx::mma_m16n8k16_bf16(x.o[b][0], a, v[g][0], v[g][1]);
          ptx::mma_m16n8k16_bf16(x.o[b][1], a, v[g][2], v[g][3]);
        }
      return;
    }
#pragma unroll 1
    for (int g = max(0, low / 16); g < kTile / 16 && (owns || 16 * g < high); ++g) {  // the others are seen by nobody
      const int at = in_chunk + 16 * g;
      accumulate_sums(x, at);
      if (!has_columns) continue;
      if (16 * g < high) {
        auto keep = [&](int j) { return (j >= low && j < high ? 0xffffu : 0u) | (j + 1 >= low && j + 1 < high ? 0xffff0000u : 0u); };
        const int j = 16 * g + lane % 4 * 2;
        accumulate(x.o, at, {stage_at(first), 16 * g + lane % 16}, keep(j), keep(j + 8));
        continue;
      }
#pragma unroll 1
      for (int r = 0; r < job.block.rows; ++r) {
        const int place = find_place(p, job, r, row_at(job, r), shared.nodes[r], tile, tile + 16 * g + lane % 16);
        if (!__any_sync(~0u, place >= 0)) continue;
        float sum[S::blocks][2][4];
#pragma unroll
        for (int b = 0; b < S::blocks; ++b)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[b][n][e] = x.o[b][n][e];
        accumulate(sum, at, address(place, first, slots));
#pragma unroll
        for (int b = 0; b < S::blocks; ++b)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x.o[b][n][e] = local[b][e / 2] == r ? sum[b][n][e] : x.o[b][n][e];
      }
    }
  }

  __device__ __forceinline__ State chunk(const Job& job, int chunk) {
    const int chunk_begin = chunk * kChunk, begin = job.tiles_begin(chunk), end = job.tiles_end(chunk), own_key = 8 * warp + lane % 4 * 2;
    float s[kChunkTiles][S::blocks][4];
#pragma unroll 1
    for (int at = 0; at < kChunkTiles; ++at) {
      const int tile = chunk_begin + at * kTile;
      float x[S::blocks][4];
      if (tile >= begin && tile < end) with_tile(job, tile, [&](At first) { score_tile(job, x, tile, first); });  // else no row sees it
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int low = rows[b][h].low(tile), high = rows[b][h].high(tile, kTile);
          float top = SPECRT_MINUS_INF;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float y = own_key + c >= low && own_key + c < high ? x[b][2 * h + c] * scale : SPECRT_MINUS_INF;
            top = fmaxf(y, top);
#pragma unroll
            for (int i = 0; i < kChunkTiles; ++i) s[i][b][2 * h + c] = i == at ? y : s[i][b][2 * h + c];  // no index that is not a constant: s stays in registers
          }
#pragma unroll
          for (int d = 1; d <= 2; d <<= 1) top = fmaxf(__shfl_xor_sync(~0u, top, d), top);
          if (lane % 4 == 0) shared.tops[at][16 * b + lane / 4 + 8 * h][warp] = top;
        }
    }
    barrier();

    State x;
    reset(x);
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int vector = 16 * b + lane / 4 + 8 * h;
        float tops[kChunkTiles];
#pragma unroll
        for (int i = 0; i < kChunkTiles; ++i) {
          const float4 t0 = *reinterpret_cast<const float4*>(&shared.tops[i][vector][0]), t1 = *reinterpret_cast<const float4*>(&shared.tops[i][vector][4]);
          tops[i] = fmaxf(fmaxf(fmaxf(t0.x, t0.y), fmaxf(t0.z, t0.w)), fmaxf(fmaxf(t1.x, t1.y), fmaxf(t1.z, t1.w)));
        }
#pragma unroll
        for (int i = 0; i < kChunkTiles; ++i) {
          const bool sees = rows[b][h].sees(chunk_begin + i * kTile, kTile);
          const float top = fmaxf(x.m[b][h], tops[i]), from = sees ? top : 0.0f;  // invisible: exp2(-inf - from) = 0
          if (warp == 0 && lane % 4 == 0) shared.factors[i][vector] = sees ? ptx::ex2(x.m[b][h] - top) : 1.0f;
          x.m[b][h] = top;
          *reinterpret_cast<uint32_t*>(shared.probabilities + vector * S::row_bytes + (i * kTile + own_key) * 2) =
              ptx::pack_bf16(ptx::ex2(s[i][b][2 * h] - from), ptx::ex2(s[i][b][2 * h + 1] - from));
        }
      }
    barrier();

#pragma unroll 1
    for (int tile = begin; tile < end; tile += kTile) {
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float a = shared.factors[(tile - chunk_begin) / kTile][16 * b + lane / 4 + 8 * h];
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            x.l[b][e] = x.l[b][e] * a;
            x.o[b][0][e] = x.o[b][0][e] * a;
            x.o[b][1][e] = x.o[b][1][e] * a;
          }
        }
      with_tile(job, tile, [&](At first) { accumulate_tile(job, x, tile, tile - chunk_begin, first); });
    }
    return x;
  }

  __device__ __forceinline__ void reset(State& x) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      x.m[b][0] = x.m[b][1] = SPECRT_MINUS_INF;
#pragma unroll
      for (int e = 0; e < 4; ++e) x.l[b][e] = x.o[b][0][e] = x.o[b][1][e] = 0.0f;
    }
  }

  // A chunk joins the run.
  __device__ __forceinline__ void join(State& run, const State& x, int chunk) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!rows[b][h].sees(chunk * kChunk, kChunk)) continue;
        const FoldFactors f = fold_factors(run.m[b][h], x.m[b][h]);
        run.l[b][2 * h] = fold_value(run.l[b][2 * h], x.l[b][2 * h], f);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) run.o[b][n][2 * h + c] = fold_value(run.o[b][n][2 * h + c], x.o[b][n][2 * h + c], f);
      }
  }

  // O * (1 / l) where a row sees nothing outside of the run, else a partial result.
  __device__ __forceinline__ void write(const Job& job, const State& x, int run) const {
    const int column = 16 * warp + lane % 4 * 2;
    if (column >= D) return;
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int v = 16 * b + lane / 4 + 8 * h;
        const Row& row = rows[b][h];
        if (local[b][h] >= job.block.rows) continue;
        const int64_t vector = static_cast<int64_t>(job.block.begin + local[b][h]) * p.q_heads + job.kv_head * heads.d + heads.remainder(v);
        const bool nothing = row.len == 0 && job.run_begin == 0;
        if (!nothing && !row.sees(job.run_begin, run * kChunk)) continue;
        if (nothing || sees_one_run(row, run)) {
          uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + vector * D + column);
          const float r = 1.0f / x.l[b][2 * h];
#pragma unroll
          for (int n = 0; n < 2; ++n)
            out[4 * n] = nothing ? 0u : to_bf16(x.o[b][n][2 * h] * r).bits | static_cast<uint32_t>(to_bf16(x.o[b][n][2 * h + 1] * r).bits) << 16;
          continue;
        }
        const Partials part(p, vector);
        const int slot = job.run_begin / kChunk;
#pragma unroll
        for (int n = 0; n < 2; ++n) *reinterpret_cast<float2*>(part.o + static_cast<int64_t>(slot) * D + column + 8 * n) = make_float2(x.o[b][n][2 * h], x.o[b][n][2 * h + 1]);
        if (warp == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(part.ml + 2 * slot) = make_float2(x.m[b][h], x.l[b][2 * h]);
      }
  }

  // The last CTA to have jobs of a block and KV head folds what all have written. An order of integers: whoever it is, the chunks fold ascending.
  __device__ __forceinline__ void fold(const Job& job, int block_number, int jobs, int run) const {
    if (job.pieces == 1) return;
    barrier();
    if (threadIdx.x == 0) {
      int* done = plan_counters(p.plan, p.rows) + block_number * p.kv_heads + job.kv_head;
      __threadfence();
      const bool last = atomicAdd(done, jobs) + jobs == job.pieces;
      if (last) *done = 0;  // for the next layer
      shared.last = last;
      __threadfence();
    }
    barrier();
    if (!shared.last) return;
    for (int task = warp; task < 2 * job.block.rows * heads.d; task += S::warps) {
      const int r = heads.quotient(task / 2);
      const Row row = row_at(job, r);
      if (row.len > 0 && !sees_one_run(row, run))
        fold_half<D, 1>(p, row, static_cast<int64_t>(job.block.begin + r) * p.q_heads + job.kv_head * heads.d + heads.remainder(task / 2), run, task % 2, lane);
    }
  }
};

template <typename S> __global__ void __launch_bounds__(S::threads, S::blocks == 1 ? 2 : 1)
decode_attention_kernel(const __grid_constant__ CUtensorMap k_pages, const __grid_constant__ CUtensorMap v_pages, const __grid_constant__ CUtensorMap k_slots,
                        const __grid_constant__ CUtensorMap v_slots, const __grid_constant__ AttentionParams p, float scale) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(bytes);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t tiles = ptx::shared_address(shared.tiles), full = ptx::shared_address(shared.full), empty = ptx::shared_address(shared.empty);
  if (threadIdx.x == S::consumers)
    for (const CUtensorMap* map : {&k_pages, &v_pages, &k_slots, &v_slots}) ptx::prefetch_tensor_map(map);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, S::warps);
    }
    ptx::mbarrier_init_fence();
    shared.zeros = make_uint4(0, 0, 0, 0);
  }
  const SmallDivisor heads(p.q_heads / p.kv_heads);
  __syncthreads();
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  Share share(p, lane);
  if (share.begin == share.end) return;

  if (warp == S::warps) {
    Producer<S> producer{p, tiles, full, empty, shared.ids, lane};
    for (int number = share.begin; number < share.end; ++number) producer.run(Job(p, share.cursor, number), &k_pages, &v_pages, &k_slots, &v_slots);
    return;
  }
  Consumer<S> consumer{p, shared, scale, warp, lane, heads, tiles};
  const int run = share.cursor.run;
  for (int number = share.begin; number < share.end;) {
    Job job(p, share.cursor, number);
    consumer.load(job);
    const int begin = number, end = min(share.end, number + job.pieces - job.piece);  // jobs of this block and KV head
    while (true) {
      typename Consumer<S>::State kept;
      consumer.reset(kept);
      for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) consumer.join(kept, consumer.chunk(job, chunk), chunk);
      consumer.write(job, kept, run);
      if (++number == end) break;
      job = Job(p, share.cursor, number);
    }
    consumer.fold(job, share.cursor.index, end - begin, run);
  }
}

template <typename S> void launch_shape(const AttentionParams& p, int ctas, cudaStream_t stream) {
  const TensorMaps maps(p);
  launch({dim3(ctas), dim3(S::threads), static_cast<int>(sizeof(Shared<S>)), stream, 1, true}, decode_attention_kernel<S>, maps.k_pages, maps.v_pages, maps.k_slots, maps.v_slots, p,
         p.scale * kLog2e);
}

template <int D> void launch_dim(const AttentionParams& p, const TreeShape& shape, int ctas, cudaStream_t stream) {
  shape.vectors == 16 ? launch_shape<Shape<D, 1>>(p, ctas, stream) : launch_shape<Shape<D, 2>>(p, ctas, stream);
}

}  // namespace

void launch_decode_attention(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  const int ctas = tree_ctas(p, shape);
  switch (p.head_dim) {
    case 64: return launch_dim<64>(p, shape, ctas, stream);
    case 96: return launch_dim<96>(p, shape, ctas, stream);
    default: return launch_dim<128>(p, shape, ctas, stream);
  }
}

}  // namespace specrt
