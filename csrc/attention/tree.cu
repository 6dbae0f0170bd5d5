// Decode, verify and draft-expansion attention, bf16, on Hopper.
//
// A job is a block of rows of one request, a KV head and a run of chunks of 256 positions (plan.cuh). Rows x query heads stand side by side as the 64 vectors of a
// warpgroup, or the 128 of two, so that K and V are read once for all of them. A producer warp keeps `stages` tiles in flight by tensor copies, one a page. The keys of the
// rows' paths come as tiles of their own, a copy a slot, from which every row's groups of 16 are read at their logical places (row addresses of ldmatrix).
// A run folds its chunks where they are; what is not a row's whole answer goes through the workspace to the combine kernel. Which CTA does what changes no bit.
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
  static constexpr int tiles_at_once = 1;
  static constexpr int stages = warpgroups == 1 ? 4 : 7;  // at least 4: a tile that holds paths takes as many
  static constexpr int producer_registers = 56, consumer_registers = warpgroups == 1 ? 200 : 224;
  static constexpr int tile_bytes = columns / 64 * kBlockBytes;
  // Shared memory: stages; the queries, a tile a warpgroup; O of the run so far, 16 bytes a thread and piece; the rest.
  static constexpr int queries = stages * tile_bytes, kept = queries + warpgroups * tile_bytes, pieces = columns / 8, rest = kept + consumers * pieces * 16;
};

template <typename S> struct Rest {
  uint4 zeros;
  uint64_t full[S::stages], empty[S::stages];
  uint64_t nodes[S::vectors];  // ancestors of a row
  int ids[32];                 // the producer's
  int len[S::vectors];
};

template <typename S> constexpr int kSharedBytes = S::rest + static_cast<int>(sizeof(Rest<S>));

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
  Turn<S::stages> turn{};  // of the next tile
  Row rows[2];
  int local[2];
  Vectors<D> x;

  using At = Turn<S::stages>;
  __device__ __forceinline__ uint32_t stage_at(At at) const { return stages + at.stage * S::tile_bytes; }
  __device__ __forceinline__ void wait(At at) const { ptx::mbarrier_wait(ptx::shared_address(rest.full + at.stage), at.parity); }
  __device__ __forceinline__ void give(At at) const {
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
    At keys = turn;
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
      const At values = keys.after(1);
      keys = keys.after(2);
      wait(keys);
      x.reset_scores();
      ptx::wgmma_fence();
      x.start_scores(queries(warp), stage_at(keys));
      ptx::wgmma_commit();
      wait(values);
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
      x.join(a);
    }
    const At values = keys.after(1);
    wait(values);
    ptx::wgmma_fence();
    x.start_values(stage_at(values));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_results(x.o);
    give(values);
    turn = keys.after(2);
  }

  // Any other tile.
  __device__ __forceinline__ void any_tile(const Job& job, int tile) {
    const int lane = opaque(this->lane), warp = opaque(this->warp), first_vector = 16 * warp;
    const bool shared_keys = tile < job.block.prefix, owns = job.owns(tile), slots = job.loads_slots(tile), more = job.loads_more(tile);
    const int warp_rows_begin = heads.quotient(first_vector), warp_rows_end = min(heads.quotient(first_vector + 15) + 1, job.block.rows);
    // f(places of lane's key, row in the group, for kOwnRows rows, group, which vectors) for the groups of 16 positions in which this warp's rows have keys of their own.
    auto each_own = [&](int key, At first, auto&& f) {
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

    const At keys = turn, values = turn.after(slots + more);
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
    turn = values.after(slots + more);
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
    float4* kept = reinterpret_cast<float4*>(shared + S::kept) + threadIdx.x;
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
          const float4 v = kept[n * S::consumers];
          const float before[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) x.o[n][e] = sees[e / 2] ? fold_value(before[e], x.o[n][e], f[e / 2]) : before[e];
        }
      }
      if (number + 1 < job.chunk_end)
#pragma unroll
        for (int n = 0; n < S::pieces; ++n) kept[n * S::consumers] = make_float4(x.o[n][0], x.o[n][1], x.o[n][2], x.o[n][3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int vector = first_vector() + lane / 4 + 8 * i;
      if (vector < valid(job) && rows[i].sees(job.run_begin, run * kChunk))
        write(static_cast<int64_t>(job.block.begin + local[i]) * p.q_heads + job.kv_head * heads.d + heads.remainder(vector), job.run_begin / kChunk, sees_one_run(rows[i], run),
              kept_m[i], kept_l[i], i);
    }
  }

  // O * (1 / l), or a partial (m, l, O), of a vector; by the four lanes that hold it.
  __device__ __forceinline__ void write(int64_t vector, int slot, bool whole, float m, float l, int i) const {
    if (whole) {
      uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + vector * D) + lane % 4;
      const float r = 1.0f / l;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        out[4 * n] = to_bf16(x.o[n][2 * i] * r).bits | static_cast<uint32_t>(to_bf16(x.o[n][2 * i + 1] * r).bits) << 16;
      return;
    }
    const Partials part(p, vector);
    float* to = part.o + static_cast<int64_t>(slot) * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(x.o[n][2 * i], x.o[n][2 * i + 1]);
    if (lane % 4 == 0) *reinterpret_cast<float2*>(part.ml + 2 * slot) = make_float2(m, l);
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
    if (warp > S::warps) return;
    Producer<S> producer{p, stages, full, empty, rest.ids, lane};
    for (int number = share.begin; number < share.end; ++number) producer.run(Job(p, share.cursor, number), &k_pages, &v_pages, &k_slots, &v_slots);
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

// A warp for each half of a vector.
constexpr int kCombineWarps = 4;

template <int D> __global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32, vector = task / 2;
  const int r = static_cast<int>(vector / p.q_heads);
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (r >= p.rows) return;
  const int rows = *p.num_rows, run = plan_header(p.plan).run;  // all loads at once
  const Row row = describe_row(p, r);
  if (r >= rows || (row.len > 0 && sees_one_run(row, run))) return;  // written where it was computed
  fold_half<D, 2>(p, row, vector, run, task % 2, threadIdx.x % 32);
}

template <typename S> void launch_shape(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  const TensorMaps maps(p);
  launch({dim3(tree_ctas(p, shape)), dim3(S::threads), kSharedBytes<S>, stream, 1, true}, tree_attention_kernel<S>, maps.k_pages, maps.v_pages, maps.k_slots, maps.v_slots, p,
         p.scale * kLog2e);
  const int64_t tasks = static_cast<int64_t>(p.rows) * p.q_heads * 2;
  launch({dim3(static_cast<unsigned>((tasks + kCombineWarps - 1) / kCombineWarps)), dim3(kCombineWarps * 32), 0, stream, 1, true}, combine_kernel<S::dim>, p);
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
