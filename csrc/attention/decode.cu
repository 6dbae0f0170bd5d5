// Tree attention for few vectors (rows x query heads of a KV head), as plain decoding and short chains have them: bf16, Hopper.
//
// Blocks of 8 or 16 vectors stand on the MMA's 8-column side, keys and columns of V on its 16-row side (which operand is which changes no bit). A CTA takes a chunk of 256
// positions at a time, with nothing in it that waits for a tile before: a warp makes the scores of half a tile; the maxima of all four tiles are exchanged and the
// probabilities written; then each warp has 16 columns of V and walks the chunk's 16 groups. Keys and values take 96 KB of an SM at most, so that the next kernel can come up
// beside it.
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
  static constexpr int dim = dim_, blocks = blocks_, vectors = 8 * blocks, columns = dim <= 64 ? 64 : 128, warps = 8, consumers = 32 * warps, threads = consumers + 64;
  static constexpr int each = 3, stages = 2 * each, tile_bytes = columns / 64 * kBlockBytes;
  static constexpr int row_bytes = kChunk * 2 + 16, query_bytes = dim * 2 + 16;  // of a vector's probabilities and elements; 16 bytes more: ldmatrix reads 8 rows from different banks
  using Keys = Turn<each, 0>;
  using Values = Turn<each, each>;
};

template <typename S> struct Shared {
  unsigned char tiles[S::stages * S::tile_bytes];
  unsigned char probabilities[S::vectors * S::row_bytes];
  unsigned char queries[S::vectors * S::query_bytes];
  float tops[S::vectors][S::warps];  // the greatest score among a warp's keys
  uint4 zeros;
  uint64_t full[S::stages], empty[S::stages];
  uint64_t nodes[S::vectors];  // ancestors of a row
  int len[S::vectors];
  int first_rows[2][20];  // the producers'
};
static_assert(sizeof(Shared<Shape<128, 1>>) <= 113 << 10, "room for the next kernel's CTA");

// What a consumer warp holds: index b is a block of 8 vectors, c the vector lane % 4 * 2 + c in it.
template <typename S> struct Consumer {
  static constexpr int D = S::dim;
  static constexpr uint32_t kOnes = 0x3f803f80u;
  const AttentionParams& p;
  Shared<S>& shared;
  float scale;
  int warp, lane;
  SmallDivisor heads;  // query heads a KV head
  uint32_t base;       // the shared address of `shared`
  typename S::Keys keys{};  // of the next chunk
  typename S::Values values{};
  int local[S::blocks][2];  // rows of this thread's vectors
  Row rows[S::blocks][2];

  struct State {
    float m[S::blocks][2], l[S::blocks][4], o[S::blocks][4];  // o[b][2 h + c]: column 16 warp + lane / 4 + 8 h of V; l[b][c]: the product with ones
  };

  __device__ __forceinline__ void barrier() const { ptx::named_barrier(1, S::consumers); }
  __device__ __forceinline__ uint32_t probabilities() const { return base + offsetof(Shared<S>, probabilities); }
  template <typename At> __device__ __forceinline__ uint32_t stage_at(At at) const { return base + at.stage * S::tile_bytes; }
  template <typename At> __device__ __forceinline__ void wait(At at, int stages) const {
    ptx::mbarrier_wait(base + offsetof(Shared<S>, full) + 8 * at.stage, at.parity);
    if (stages == 2) wait(at.after(1), 1);
  }
  template <typename At> __device__ __forceinline__ void give(At at, int stages) const {
    __syncwarp();
    if (lane == 0) {
      ptx::mbarrier_arrive(base + offsetof(Shared<S>, empty) + 8 * at.stage);
      if (stages == 2) ptx::mbarrier_arrive(base + offsetof(Shared<S>, empty) + 8 * at.after(1).stage);
    }
  }
  // `first`: the tile's first stage.
  template <typename At> __device__ __forceinline__ RowAddress address(int place, At first, bool slots) const {
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
      for (int c = 0; c < 2; ++c) {
        local[b][c] = heads.quotient(8 * b + lane % 4 * 2 + c);
        rows[b][c] = row_at(job, local[b][c]);
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

  // s = the scores of 16 keys; this lane's row address is that of key lane % 16.
  __device__ __forceinline__ void score(float (&s)[S::blocks][4], RowAddress key) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      uint32_t x[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) ptx::ldmatrix_x4(x[half], key.piece(4 * k + 2 * half + lane / 16));
#pragma unroll
      for (int b = 0; b < S::blocks; ++b) {
        uint32_t q[4];
        ptx::ldmatrix_x4(q, base + offsetof(Shared<S>, queries) + (8 * b + lane % 8) * S::query_bytes + (4 * k + lane / 8) * 16);
        ptx::mma_m16n8k16_bf16(s[b], x[0], q[0], q[1]);
        ptx::mma_m16n8k16_bf16(s[b], x[1], q[2], q[3]);
      }
    }
  }

  // Scores of 16 keys of a tile from `key` on; the tile's stages begin at `first`.
  __device__ __forceinline__ void score_tile(const Job& job, float (&s)[S::blocks][4], int tile, int key, typename S::Keys first) const {
    if (!job.owns(tile) || tile + key < job.own_begin()) return score(s, {stage_at(first), key + lane % 16});
    const bool slots = job.loads_slots(tile);
#pragma unroll 1
    for (int r = 0; r < job.block.rows; ++r) {
      const int place = find_place(p, job, r, row_at(job, r), shared.nodes[r], tile, tile + key + lane % 16);
      if (!__any_sync(~0u, place >= 0)) continue;
      float own[S::blocks][4];
      score(own, address(place, first, slots));
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][e] = local[b][e % 2] == r ? own[b][e] : s[b][e];
    }
  }

  // V of 16 keys as the A operand; this lane's row address is that of value lane / 16 * 8 + lane % 8.
  __device__ __forceinline__ void load_values(uint32_t (&v)[4], RowAddress value) const { ptx::ldmatrix_x4_trans(v, value.piece(2 * (16 * warp < D ? warp : 0) + lane / 8 % 2)); }
  // P of two groups of 16 from position `at` of the chunk on.
  __device__ __forceinline__ void load_probabilities(uint32_t (&x)[4], int b, int at) const {
    ptx::ldmatrix_x4(x, probabilities() + (8 * b + lane % 8) * S::row_bytes + (at + lane / 8 * 8) * 2);
  }

  // l and O of a tile, whose stages of V begin at `first`.
  __device__ __forceinline__ void accumulate_tile(const Job& job, State& x, int tile, int in_chunk, typename S::Values first) const {
    constexpr uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
    const bool owns = job.owns(tile);
    const int low = job.first_seen - tile, high = (owns ? job.own_begin() : job.block.prefix) - tile, value = lane / 16 * 8 + lane % 8;  // [low, high): all rows read them in common
    if (low <= 0 && high >= kTile) {
      uint32_t v[4][4];
#pragma unroll
      for (int g = 0; g < 4; ++g) load_values(v[g], {stage_at(first), 16 * g + value});
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int g = 0; g < 4; g += 2) {
          uint32_t a[4];
          load_probabilities(a, b, in_chunk + 16 * g);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::mma_m16n8k16_bf16(x.l[b], ones, a[2 * half], a[2 * half + 1]);
            ptx::mma_m16n8k16_bf16(x.o[b], v[g + half], a[2 * half], a[2 * half + 1]);
          }
        }
      return;
    }
#pragma unroll 1
    for (int g = max(0, low / 16); g < 4 && 16 * g < (owns ? job.block.longest - tile : high); ++g) {  // the others are seen by nobody
      uint32_t a[S::blocks][4];
#pragma unroll
      for (int b = 0; b < S::blocks; ++b) {
        load_probabilities(a[b], b, in_chunk + 16 * (g & 2));
        if (g & 1) a[b][0] = a[b][2], a[b][1] = a[b][3];
        ptx::mma_m16n8k16_bf16(x.l[b], ones, a[b][0], a[b][1]);
      }
      uint32_t v[4];
      if (16 * g < high) {  // V rows nobody sees may hold NaN: zeros
        auto keep = [&](int j) { return (j >= low && j < high ? 0xffffu : 0u) | (j + 1 >= low && j + 1 < high ? 0xffff0000u : 0u); };
        const uint32_t keep0 = keep(16 * g + lane % 4 * 2), keep8 = keep(16 * g + 8 + lane % 4 * 2);
        load_values(v, {stage_at(first), 16 * g + value});
        v[0] &= keep0, v[1] &= keep0, v[2] &= keep8, v[3] &= keep8;
#pragma unroll
        for (int b = 0; b < S::blocks; ++b) ptx::mma_m16n8k16_bf16(x.o[b], v, a[b][0], a[b][1]);
        continue;
      }
#pragma unroll 1
      for (int r = 0; r < job.block.rows; ++r) {
        const int place = find_place(p, job, r, row_at(job, r), shared.nodes[r], tile, tile + 16 * g + value);
        if (!__any_sync(~0u, place >= 0)) continue;
        load_values(v, address(place, first, job.loads_slots(tile)));
#pragma unroll
        for (int b = 0; b < S::blocks; ++b) {
          float sum[4] = {x.o[b][0], x.o[b][1], x.o[b][2], x.o[b][3]};
          ptx::mma_m16n8k16_bf16(sum, v, a[b][0], a[b][1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) x.o[b][e] = local[b][e % 2] == r ? sum[e] : x.o[b][e];
        }
      }
    }
  }

  __device__ __forceinline__ State chunk(const Job& job, int chunk) {
    const int chunk_begin = chunk * kChunk, begin = job.tiles_begin(chunk), end = job.tiles_end(chunk), mine = warp / 2, first_key = warp % 2 * 32, my_tile = chunk_begin + mine * kTile;
    auto stages_of = [&](int tile) { return job.loads_slots(tile) && job.loads_more(tile) ? 2 : 1; };
    float s[2][S::blocks][4];
#pragma unroll 1
    for (int tile = begin; tile < end; tile += kTile) {
      const int stages = stages_of(tile);
      if (tile == my_tile) {
        wait(keys, stages);
#pragma unroll
        for (int k = 0; k < 2; ++k) score_tile(job, s[k], tile, first_key + 16 * k, keys);
        give(keys, stages);
      }
      keys = keys.after(stages);
    }
    float top[S::blocks][2];
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int low = rows[b][c].low(my_tile), high = rows[b][c].high(my_tile, kTile);  // of a tile that is not there: nothing
        top[b][c] = SPECRT_MINUS_INF;
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& x = s[k][b][2 * h + c];
            const int j = first_key + 16 * k + 8 * h + lane / 4;
            x = j >= low && j < high ? x * scale : SPECRT_MINUS_INF;
            top[b][c] = fmaxf(x, top[b][c]);
          }
      }
#pragma unroll
    for (int d = 4; d < 32; d <<= 1)
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int c = 0; c < 2; ++c) top[b][c] = fmaxf(__shfl_xor_sync(~0u, top[b][c], d), top[b][c]);
    if (lane < 4)
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int c = 0; c < 2; ++c) shared.tops[8 * b + 2 * lane + c][warp] = top[b][c];
    barrier();

    State x;
    reset(x);
    float a[kChunkTiles][S::blocks][2];  // by which a tile scales what was before it
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      float from[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float tops[S::warps];
        *reinterpret_cast<float4*>(tops) = *reinterpret_cast<const float4*>(&shared.tops[8 * b + lane % 4 * 2 + c][0]);
        *reinterpret_cast<float4*>(tops + 4) = *reinterpret_cast<const float4*>(&shared.tops[8 * b + lane % 4 * 2 + c][4]);
        float& m = x.m[b][c];
#pragma unroll
        for (int i = 0; i < kChunkTiles; ++i) {
          const bool sees = rows[b][c].sees(chunk_begin + i * kTile, kTile);
          const float next = fmaxf(m, fmaxf(tops[2 * i], tops[2 * i + 1]));
          a[i][b][c] = sees ? ptx::ex2(m - next) : 1.0f;
          m = next;
          if (i == mine) from[c] = sees ? m : 0.0f;  // invisible: exp2(-inf - 0) = 0
        }
      }
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = ptx::pack_bf16(ptx::ex2(s[i / 2][b][i % 2 * 2] - from[0]), ptx::ex2(s[i / 2][b][i % 2 * 2 + 1] - from[1]));
      ptx::stmatrix_x4_trans(probabilities() + (8 * b + lane % 8) * S::row_bytes + (mine * kTile + first_key + lane / 8 * 8) * 2, pairs);
    }
    barrier();

#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i) {
      const int tile = chunk_begin + i * kTile, stages = stages_of(tile);
      if (tile < begin || tile >= end) continue;
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x.l[b][e] = x.l[b][e] * a[i][b][e % 2];
          x.o[b][e] = x.o[b][e] * a[i][b][e % 2];
        }
      wait(values, stages);
      accumulate_tile(job, x, tile, i * kTile, values);
      give(values, stages);
      values = values.after(stages);
    }
    return x;
  }

  __device__ __forceinline__ void reset(State& x) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      x.m[b][0] = x.m[b][1] = SPECRT_MINUS_INF;
#pragma unroll
      for (int e = 0; e < 4; ++e) x.l[b][e] = x.o[b][e] = 0.0f;
    }
  }

  // A chunk joins the run.
  __device__ __forceinline__ void join(State& run, const State& x, int chunk) const {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (!rows[b][c].sees(chunk * kChunk, kChunk)) continue;
        const FoldFactors f = fold_factors(run.m[b][c], x.m[b][c]);
        run.l[b][c] = fold_value(run.l[b][c], x.l[b][c], f);
#pragma unroll
        for (int h = 0; h < 2; ++h) run.o[b][2 * h + c] = fold_value(run.o[b][2 * h + c], x.o[b][2 * h + c], f);
      }
  }

  // O * (1 / l) where a row sees nothing outside of the run, else a partial result.
  __device__ __forceinline__ void write(const Job& job, const State& x, int run) const {
    const int column = 16 * warp + lane / 4;
    if (column >= D) return;
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Row& row = rows[b][c];
        if (local[b][c] >= job.block.rows || !row.sees(job.run_begin, run * kChunk)) continue;
        const int64_t vector = static_cast<int64_t>(job.block.begin + local[b][c]) * p.q_heads + job.kv_head * heads.d + heads.remainder(8 * b + lane % 4 * 2 + c);
        if (sees_one_run(row, run)) {
          bf16* out = static_cast<bf16*>(p.out) + vector * D + column;
          const float r = 1.0f / x.l[b][c];
          out[0] = to_bf16(x.o[b][c] * r);
          out[8] = to_bf16(x.o[b][2 + c] * r);
          continue;
        }
        const Partials part(p, vector);
        const int slot = job.run_begin / kChunk;
        float* to = part.o + static_cast<int64_t>(slot) * D + column;
        to[0] = x.o[b][c];
        to[8] = x.o[b][2 + c];
        if (column == 0) *reinterpret_cast<float2*>(part.ml + 2 * slot) = make_float2(x.m[b][c], x.l[b][c]);
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
      ptx::mbarrier_init(empty + 8 * s, s < S::each ? 2 : S::warps);  // two warps make a tile's scores, all add its values
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

  if (warp >= S::warps) {
    const int which = warp - S::warps, first = which * S::each;
    Producer<S> producer{p, which ? &v_pages : &k_pages, which ? &v_slots : &k_slots, tiles + first * S::tile_bytes, full + 8 * first, empty + 8 * first, shared.first_rows[which], lane};
    for (int number = share.begin; number < share.end; ++number) producer.run(Job(p, share.cursor, number));
    return;
  }
  Consumer<S> consumer{p, shared, scale, warp, lane, heads, tiles};
  const int run = share.cursor.run;
  for (int number = share.begin; number < share.end; ++number) {
    const Job job(p, share.cursor, number);
    if (number == share.begin || job.piece == 0) consumer.load(job);
    typename Consumer<S>::State kept;
    consumer.reset(kept);
    for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) consumer.join(kept, consumer.chunk(job, chunk), chunk);
    consumer.write(job, kept, run);
  }
}

template <typename S> void launch_shape(const AttentionParams& p, int ctas, cudaStream_t stream) {
  const TensorMaps maps(p);
  launch({dim3(ctas), dim3(S::threads), static_cast<int>(sizeof(Shared<S>)), stream, 1, true}, decode_attention_kernel<S>, maps.k_pages, maps.v_pages, maps.k_slots, maps.v_slots, p,
         p.scale * kLog2e);
  launch_fold(p, stream);
}

template <int D> void launch_dim(const AttentionParams& p, const TreeShape& shape, int ctas, cudaStream_t stream) {
  shape.vectors == 8 ? launch_shape<Shape<D, 1>>(p, ctas, stream) : launch_shape<Shape<D, 2>>(p, ctas, stream);
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
