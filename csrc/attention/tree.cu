// Decode, verify and draft-expansion attention, bf16, on Hopper.
//
// A job is a block of rows of one request, a KV head and a run of chunks of 256 positions (plan.cuh). Rows x query heads stand side by side as the 64 vectors of a
// warpgroup, or the 128 of two, so that K and V are read once for all of them; few vectors have a kernel of their own (decode.cu). A producer warp each for K and V keeps
// `each` tiles in flight by tensor copies, one a page. The keys of the rows' paths come as tiles of their own, a copy a slot, from which every row's groups of 16 are read
// at their logical places (row addresses of ldmatrix). A run folds its chunks where they are; what is not a row's whole answer goes through the workspace to the fold kernel
// (fold.cu). Which CTA does what changes no bit.
//
// Bytes: K and V once a block of rows (the blocks of a request share them through L2), D + 2 floats for each vector and run.
#include "attention/fold.cuh"
#include "attention/tree_tile.cuh"
#include "ptx/dependency.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"

namespace specrt {
namespace {

template <int dim_, int warpgroups_> struct Shape {
  static constexpr int dim = dim_, warpgroups = warpgroups_, warps = 4 * warpgroups, consumers = 32 * warps, threads = consumers + 128;
  static constexpr int columns = Vectors<dim>::kColumns, vectors = 64 * warpgroups, blocks_per_sm = warpgroups == 1 ? 2 : 1;
  static constexpr int each = warpgroups == 1 ? 2 : 4, stages = 2 * each;  // of K and of V; at least two: a tile that holds paths takes as many
  using Keys = Turn<each, 0>;
  using Values = Turn<each, each>;
  static constexpr int producer_registers = 56, consumer_registers = warpgroups == 1 ? 200 : 224;
  static constexpr int tile_bytes = columns / 64 * kBlockBytes;
  // Shared memory: stages; the queries, a tile a warpgroup; O of the run so far, 16 bytes a thread and piece; the rest.
  static constexpr int queries = stages * tile_bytes, kept = queries + warpgroups * tile_bytes, pieces = columns / 8, rest = kept + consumers * pieces * 16;
};

template <typename S> struct Rest {
  uint4 zeros;
  uint64_t full[S::stages], empty[S::stages];  // of K, then of V
  uint64_t nodes[S::vectors];  // ancestors of a row
  int first_rows[2][20];       // the producers'
  int len[S::vectors];
};

template <typename S> constexpr int kSharedBytes = S::rest + static_cast<int>(sizeof(Rest<S>));
static_assert(kSharedBytes<Shape<128, 1>> <= 113 << 10 && kSharedBytes<Shape<128, 2>> <= 227 << 10, "two CTAs an SM, one CTA an SM");

// What a consumer warp holds. Index i: of its vectors lane / 4 + 8 i.
template <typename S> struct Consumer {
  static constexpr int D = S::dim;
  const AttentionParams& p;
  unsigned char* shared;
  float scale;
  int warp, lane;
  SmallDivisor heads;  // query heads a KV head
  uint32_t stages;
  Rest<S>& rest;
  typename S::Keys keys{};  // of the next tile
  typename S::Values values{};
  Row rows[2];
  int local[2];
  Vectors<D> x;

  template <typename At> __device__ __forceinline__ uint32_t stage_at(At at) const { return stages + at.stage * S::tile_bytes; }
  template <typename At> __device__ __forceinline__ void wait(At at) const { ptx::mbarrier_wait(ptx::shared_address(rest.full + at.stage), at.parity); }
  template <typename At> __device__ __forceinline__ void give(At at) const {
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(rest.empty + at.stage));
  }
  __device__ __forceinline__ uint32_t queries(int warp) const { return stages + S::queries + warp / 4 * S::tile_bytes; }
  __device__ __forceinline__ int first_vector() const { return warp * 16; }
  __device__ __forceinline__ int valid(const Job& job) const { return job.block.rows * heads.d; }
  __device__ __forceinline__ bool works(const Job& job) const { return first_vector() < valid(job); }  // a warp without vectors takes part in its warpgroup's products

  __device__ __forceinline__ Row row_at(const Job& job, int r) const {
    Row row;
    if (r >= job.block.rows) return row;
    row.len = rest.len[r];
    row.prefix = job.has_paths ? job.block.prefix : row.len;
    if (p.window > 0) row.first = max(0, row.len - p.window);
    return row;
  }

  // Queries, and what the rows see.
  __device__ __forceinline__ void load(const Job& job) {
    const Block& block = job.block;
    ptx::named_barrier(1, S::consumers);  // nobody reads the job before's
    const int thread = opaque(threadIdx.x);
    constexpr int kEach = S::vectors * (S::columns / 8) / S::consumers;
    uint4 q[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = j * S::consumers + thread, vector = i / (S::columns / 8), piece = i % (S::columns / 8);
      q[j] = make_uint4(0, 0, 0, 0);
      if (vector < valid(job) && piece * 8 < D)
        q[j] = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.q) +
                                               (static_cast<int64_t>(block.begin + heads.quotient(vector)) * p.q_heads + job.kv_head * heads.d + heads.remainder(vector)) * D + piece * 8);
    }
    for (int r = thread; r < block.rows; r += S::consumers) {
      rest.len[r] = describe_row(p, block.begin + r).len;
      rest.nodes[r] = p.ancestors ? static_cast<uint64_t>(p.ancestors[block.begin + r]) : 0;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = j * S::consumers + thread, vector = i / (S::columns / 8), piece = i % (S::columns / 8);
      *reinterpret_cast<uint4*>(shared + (piece_address(stages + S::queries + vector / 64 * S::tile_bytes, vector % 64, piece) - stages)) = q[j];
    }
    ptx::async_proxy_fence();
    ptx::named_barrier(1, S::consumers);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      local[i] = heads.quotient(first_vector() + lane / 4 + 8 * i);
      rows[i] = row_at(job, local[i]);
    }
  }

  // Tiles that all rows see in full: while the values of one are added, the next one's scores and probabilities are made.
  __device__ __forceinline__ void plain_tiles(int tiles) {
    float a[2];
    wait(keys);
    x.reset_scores();
    ptx::wgmma_fence();
    x.start_scores(queries(warp), stage_at(keys));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    x.pin_scores();
    give(keys);
    x.template softmax<false>({}, {}, scale, lane, a);
    x.join(a);
#pragma unroll 1
    for (; tiles > 1; --tiles) {
      keys = keys.after(1);
      wait(keys);
      wait(values);
      x.reset_scores();
      ptx::wgmma_fence();
      x.start_scores(queries(warp), stage_at(keys));
      ptx::wgmma_commit();
      x.start_values(stage_at(values));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      x.pin_scores();
      give(keys);
      x.template softmax<false>({}, {}, scale, lane, a);
      x.pin_scores();
      wait(values);  // it is there: a place past which the compiler does not move the softmax
      ptx::wgmma_wait<0>();
      ptx::wgmma_results(x.o);
      give(values);
      values = values.after(1);
      x.join(a);
    }
    wait(values);
    ptx::wgmma_fence();
    x.start_values(stage_at(values));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(x.o);
    give(values);
    keys = keys.after(1);
    values = values.after(1);
  }

  // Any other tile.
  __device__ __forceinline__ void any_tile(const Job& job, int tile) {
    const int lane = opaque(this->lane), warp = opaque(this->warp), first_vector = 16 * warp;
    const bool shared_keys = tile < job.block.prefix, owns = job.owns(tile), slots = job.loads_slots(tile), more = job.loads_more(tile);
    const int warp_rows_begin = heads.quotient(first_vector), warp_rows_end = min(heads.quotient(first_vector + 15) + 1, job.block.rows);
    // f(places of lane's key, row in the group, for kOwnRows rows, group, which vectors) for the groups of 16 positions in which this warp's rows have keys of their own.
    auto each_own = [&](int key, auto first, auto&& f) {
#pragma unroll 1
      for (int g = max(0, (job.own_begin() - tile) / 16); g < 4 && tile + 16 * g < job.block.longest; ++g)
#pragma unroll 1
        for (int r = warp_rows_begin; r < warp_rows_end; r += kOwnRows) {
          RowAddress at[kOwnRows];
          bool mine[kOwnRows][2], any = false;
#pragma unroll
          for (int j = 0; j < kOwnRows; ++j) {
            const int row = r + j, place = row < warp_rows_end ? find_place(p, job, row, row_at(job, row), rest.nodes[row], tile, tile + 16 * g + key) : -1;
            at[j] = place < 0 ? RowAddress{ptx::shared_address(&rest.zeros), -1} : RowAddress{stage_at(first.after(slots ? place / 64 : 0)), place % 64};
            mine[j][0] = local[0] == row;
            mine[j][1] = local[1] == row;
            any |= place >= 0;
          }
          if (__any_sync(~0u, any)) f(g, at, mine);
        }
    };

    if (slots) wait(keys);
    x.reset_scores();
    if (shared_keys) {
      ptx::wgmma_fence();
      x.start_scores(queries(warp), stage_at(keys));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      x.pin_scores();
    }
    if (owns) {
      if (more) wait(keys.after(slots));
      const RowAddress query{queries(warp), first_vector % 64 + lane % 16};
      each_own(lane / 16 * 8 + lane % 8, keys, [&](int g, const RowAddress(&at)[kOwnRows], const bool(&mine)[kOwnRows][2]) { x.score_own(g, query, at, mine, lane); });
    }
    __syncwarp();
    if (slots) give(keys);
    if (more) give(keys.after(slots));

    int low[2], high[2];
    float a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low[i] = rows[i].low(tile);
      high[i] = rows[i].high(tile, kTile);
    }
    x.template softmax<true>(low, high, scale, lane, a);
    x.join(a);

    if (slots) wait(values);
    if (shared_keys) {
      const int groups = owns ? max(0, (job.own_begin() - tile) / 16) : 4;  // the groups of 16 keys that all rows read from the tile
      const int low_seen = job.first_seen - tile, high_seen = owns ? groups * 16 : job.block.prefix - tile;
      if (low_seen > 0 || high_seen < groups * 16) {  // V rows nobody sees may hold NaN: zeros
        for (int i = warp % 4 * 32 + lane; i < kTile * (S::columns / 8); i += 128) {
          const int j = i / (S::columns / 8);
          if (j < low_seen || (j >= high_seen && j < groups * 16))
            *reinterpret_cast<uint4*>(shared + (piece_address(stage_at(values), j, i % (S::columns / 8)) - stages)) = make_uint4(0, 0, 0, 0);
        }
        ptx::async_proxy_fence();
        ptx::named_barrier(2 + warp / 4, 128);
      }
      x.accumulate(stage_at(values), groups);
    }
    if (owns) {
      if (more) wait(values.after(slots));
      each_own(lane % 16, values, [&](int g, const RowAddress(&at)[kOwnRows], const bool(&mine)[kOwnRows][2]) { x.accumulate_own(g, at, mine, lane); });
    }
    __syncwarp();
    if (slots) give(values);
    if (more) give(values.after(slots));
    keys = keys.after(slots + more);
    values = values.after(slots + more);
  }

  __device__ __forceinline__ void chunk(const Job& job, int chunk) {
    // All rows see the positions from first_all to last_all, in common.
    const int first_all = p.window > 0 ? max(0, job.block.longest - p.window) : 0, last_all = min(job.own_begin(), job.block.shortest), end = job.tiles_end(chunk);
    x.reset();
    for (int tile = job.tiles_begin(chunk); tile < end;) {
      const int plain = tile >= first_all ? (min(last_all, (chunk + 1) * kChunk) - tile) / kTile : 0;
      if (plain > 0) {
        plain_tiles(plain);
        tile += plain * kTile;
      } else {
        any_tile(job, tile);
        tile += kTile;
      }
    }
  }

  __device__ __forceinline__ void run(const Job& job, int run) {
    float4* kept = reinterpret_cast<float4*>(shared + S::kept) + warp * S::pieces * 32 + lane;
    float kept_m[2] = {SPECRT_MINUS_INF, SPECRT_MINUS_INF}, kept_l[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int number = job.chunk_begin; number < job.chunk_end; ++number) {
      chunk(job, number);
      // The chunk joins the run.
      if (number == job.chunk_begin) {
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
          sees[i] = rows[i].sees(number * kChunk, kChunk);
          f[i] = {1.0f, 0.0f};
          if (sees[i]) f[i] = fold_factors(kept_m[i], x.m[i]);
          kept_l[i] = sees[i] ? fold_value(kept_l[i], x.l[2 * i], f[i]) : kept_l[i];
        }
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) {
          const float4 v = kept[n * 32];
          const float before[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) x.o[n][e] = sees[e / 2] ? fold_value(before[e], x.o[n][e], f[e / 2]) : before[e];
        }
      }
      if (number + 1 < job.chunk_end)
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) kept[n * 32] = make_float4(x.o[n][0], x.o[n][1], x.o[n][2], x.o[n][3]);
    }
    write(job, run, kept_m, kept_l);
  }

  // O * (1 / l) where a row sees nothing outside of the run, else a partial (m, l, O). Through this warp's part of shared memory (16 vectors of S::columns floats, 16-byte
  // pieces permuted so that writing and reading meet different banks): whole rows go out at once.
  __device__ __forceinline__ void write(const Job& job, int run, const float (&m)[2], const float (&l)[2]) const {
    if (!works(job)) return;
    const int lane = opaque(this->lane);
    float* mine = reinterpret_cast<float*>(shared + S::kept) + warp * 16 * S::columns;
    auto at = [&](int v, int piece) { return mine + v * S::columns + (piece ^ v % 8 * 2) * 4; };
    auto vector_of = [&](int v, int r) { return static_cast<int64_t>(job.block.begin + r) * p.q_heads + job.kv_head * heads.d + heads.remainder(first_vector() + v); };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int v = lane / 4 + 8 * i;
      const bool whole = sees_one_run(rows[i], run), sees = rows[i].sees(job.run_begin, run * kChunk);
      const float r = 1.0f / l[i];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float o0 = x.o[n][2 * i], o1 = x.o[n][2 * i + 1];
        *reinterpret_cast<float2*>(at(v, 2 * n + lane % 4 / 2) + lane % 2 * 2) = whole ? make_float2(o0 * r, o1 * r) : make_float2(o0, o1);
      }
      if (sees && !whole && lane % 4 == 0) *reinterpret_cast<float2*>(Partials(p, vector_of(v, local[i])).ml + 2 * (job.run_begin / kChunk)) = make_float2(m[i], l[i]);
    }
    __syncwarp();
    constexpr int kPieces = D / 4;
#pragma unroll 4
    for (int j = lane; j < 16 * kPieces; j += 32) {
      const int v = j / kPieces, piece = j % kPieces, r = heads.quotient(first_vector() + v);
      const Row row = row_at(job, r);
      if (!row.sees(job.run_begin, run * kChunk)) continue;  // also where there is no row
      const float4 o = *reinterpret_cast<const float4*>(at(v, piece));
      const int64_t vector = vector_of(v, r);
      if (sees_one_run(row, run))
        *reinterpret_cast<uint2*>(static_cast<bf16*>(p.out) + vector * D + piece * 4) =
            make_uint2(to_bf16(o.x).bits | static_cast<uint32_t>(to_bf16(o.y).bits) << 16, to_bf16(o.z).bits | static_cast<uint32_t>(to_bf16(o.w).bits) << 16);
      else
        *reinterpret_cast<float4*>(Partials(p, vector).o + static_cast<int64_t>(job.run_begin / kChunk) * D + piece * 4) = o;
    }
  }
};

template <typename S> __global__ void __launch_bounds__(S::threads, S::blocks_per_sm)
tree_attention_kernel(const __grid_constant__ CUtensorMap k_pages, const __grid_constant__ CUtensorMap v_pages, const __grid_constant__ CUtensorMap k_slots,
                      const __grid_constant__ CUtensorMap v_slots, const __grid_constant__ AttentionParams p, float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Rest<S>& rest = *reinterpret_cast<Rest<S>*>(shared + S::rest);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t stages = ptx::shared_address(shared), full = ptx::shared_address(rest.full), empty = ptx::shared_address(rest.empty);
  if (threadIdx.x == S::consumers)
    for (const CUtensorMap* map : {&k_pages, &v_pages, &k_slots, &v_slots}) ptx::prefetch_tensor_map(map);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, S::warps);
    }
    ptx::mbarrier_init_fence();
    rest.zeros = make_uint4(0, 0, 0, 0);
  }
  const SmallDivisor heads(p.q_heads / p.kv_heads);
  __syncthreads();
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  Share share(p, lane);
  if (share.begin == share.end) return;

  if (warp >= S::warps) {
    ptx::give_registers<S::producer_registers>();
    const int which = warp - S::warps, first = which * S::each;
    if (which > 1) return;
    Producer<S> producer{p, which ? &v_pages : &k_pages, which ? &v_slots : &k_slots, stages + first * S::tile_bytes, full + 8 * first, empty + 8 * first, rest.first_rows[which], lane};
    for (int number = share.begin; number < share.end; ++number) producer.run(Job(p, share.cursor, number));
    return;
  }

  ptx::take_registers<S::consumer_registers>();
  Consumer<S> consumer{p, shared, scale, warp, lane, heads, stages, rest};
  for (int number = share.begin; number < share.end; ++number) {
    const Job job(p, share.cursor, number);
    if (number == share.begin || job.piece == 0) consumer.load(job);
    consumer.run(job, share.cursor.run);
  }
}

template <typename S> void launch_shape(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  const TensorMaps maps(p);
  launch({dim3(tree_ctas(p, shape)), dim3(S::threads), kSharedBytes<S>, stream, 1, true}, tree_attention_kernel<S>, maps.k_pages, maps.v_pages, maps.k_slots, maps.v_slots, p,
         p.scale * kLog2e);
  launch_fold(p, stream);
}

template <int D> void launch_dim(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  shape.vectors == 128 ? launch_shape<Shape<D, 2>>(p, shape, stream) : launch_shape<Shape<D, 1>>(p, shape, stream);
}

}  // namespace

void launch_tree_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  int card = 0, major = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, card));
  if (major != 9) fail("tree_attention: bfloat16 on CUDA needs a Hopper GPU (compute capability 9.0), got " + std::to_string(major) + ".x; use device=\"cpu\" or dtype=\"float32\"");
  const auto s = static_cast<cudaStream_t>(stream);
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.path_depth);
  if (p.head_dim != 64 && p.head_dim != 96 && p.head_dim != 128) fail("tree_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  if (shape.vectors < 64) return launch_decode_attention(p, shape, s);
  switch (p.head_dim) {
    case 64: return launch_dim<64>(p, shape, s);
    case 96: return launch_dim<96>(p, shape, s);
    default: return launch_dim<128>(p, shape, s);
  }
}

}  // namespace specrt
