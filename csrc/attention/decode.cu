// Decode attention for few requests, bf16, where each has one row: what counts is how soon a row's keys have been seen, not how many vectors share them.
//
// A job is a row, a KV head and a run of chunks (plan.cuh), the query heads of the group the 16 rows of mma.m16n8k16. Keys and values of a tile come by cp.async, each position from its
// own slot, so that a path needs no care; as many tiles are on their way as memory holds. Of a tile's scores each of four warps has 16 keys; of O, the groups of 16 columns w, w + 4.
// Little code: in a forward pass every kernel finds the instruction caches full of others'.
//
// The order is tree.cu's (params.h), and so are the bits: the same products in the same sequence.
#include "attention/combine.cuh"
#include "attention/tree_job.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kHeads = 16;  // kHeads: query heads of a KV head, at most

template <int D> struct DecodeShared {
  static constexpr int pitch = D * 2 + 16, tile_bytes = kTile * pitch, stage_bytes = 2 * tile_bytes;  // K, then V; eight rows lie in different banks
  static constexpr int stages = D == 64 ? 5 : 6, blocks_per_sm = D == 64 ? 2 : 1;  // a chunk and more
  int64_t from[stages - 1][kTile];  // of a tile that is to come: where a position's key, and its value, begins in the pools; -1: nobody sees it. More than one: the first ones
  alignas(16) uint16_t p[kHeads][kTile + 8];  // probabilities
  float top[kWarps][kHeads];      // the greatest score of a warp's keys
};

// The tiles of a CTA's jobs, one after the other.
struct Cursor {
  Job job;
  int tile, end;

  __device__ Cursor(const AttentionParams& p) : job(p) { enter(); }
  __device__ bool done() const { return job.jobs == 0; }
  __device__ void enter() {
    tile = job.jobs ? job.tiles_begin(job.chunk_begin) : 0;
    end = job.jobs ? job.tiles_end(job.chunk_end - 1) : 0;
  }
  __device__ void next(const AttentionParams& p) {
    tile += kTile;
    skip(p);
  }
  // To a job that has tiles: all of one may lie before the window.
  __device__ void skip(const AttentionParams& p) {
    while (job.jobs && tile >= end) {
      if (job.jobs == 1) job.jobs = 0;
      else job.advance(p);
      enter();
    }
  }
};

template <int D> __global__ void __launch_bounds__(kThreads, DecodeShared<D>::blocks_per_sm) decode_attention_kernel(const __grid_constant__ AttentionParams p, float scale) {
  using Shared = DecodeShared<D>;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Shared shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group_heads = p.q_heads / p.kv_heads, shift = __ffs(p.page) - 1;
  const uint32_t stages = ptx::shared_address(memory);
  ptx::launch_dependents();

  // Loads. Where the positions of a tile lie is asked for a tile ahead, by a thread each.
  Cursor coming(p);
  coming.skip(p);
  Cursor now = coming;
  struct Place {
    int slot, page;  // -1: nobody sees it
  };
  auto place_of = [&](int position) {  // of `coming`'s job
    const Block& block = coming.job.block;
    const int d = position - block.prefix;
    Place place{position, -1};
    if (position < coming.job.first_seen || position >= block.longest) return place;
    if (d >= 0) {
      if (p.paths) {
        place.slot = block.prefix + __ldcg(p.paths + static_cast<int64_t>(block.begin) * p.path_depth + d);
      } else {
        uint64_t word = static_cast<uint64_t>(__ldcg(reinterpret_cast<const long long*>(p.ancestors) + block.begin));
#pragma unroll 1
        for (int i = 0; i < d; ++i) word &= word - 1;
        place.slot = block.prefix + __ffsll(static_cast<long long>(word)) - 1;
      }
    }
    place.page = __ldcg(p.block_table + static_cast<int64_t>(block.request) * p.max_pages + (place.slot >> shift));
    return place;
  };
  auto element = [&](const Place& place) {
    return place.page < 0 ? int64_t{-1} : ((static_cast<int64_t>(place.page) * p.kv_heads + coming.job.kv_head) * p.page + (place.slot & (p.page - 1))) * D;
  };
  Place asked{};
  auto ask = [&] {
    if (!coming.done() && threadIdx.x < kTile) asked = place_of(coming.tile + threadIdx.x);
  };
  auto tell = [&] {  // a barrier before load()
    if (!coming.done() && threadIdx.x < kTile) shared.from[0][threadIdx.x] = element(asked);
  };
  int stage = 0;
  auto load = [&](int which) {
    if (!coming.done()) {
      if (coming.tile + kTile > coming.job.block.settled) ptx::grid_dependency_wait();
      constexpr int kPieces = D / 8;  // of a row, 16 bytes
#pragma unroll 2
      for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const int64_t from = shared.from[which][row];
        const uint32_t to = stages + stage * Shared::stage_bytes + row * Shared::pitch + piece * 16;
        const int64_t place = max(from, static_cast<int64_t>(0)) + piece * 8;
        ptx::cp_async_16(to, static_cast<const bf16*>(p.k_pool) + place, from >= 0);
        ptx::cp_async_16(to + Shared::tile_bytes, static_cast<const bf16*>(p.v_pool) + place, from >= 0);
      }
      coming.next(p);
    }
    if (++stage == Shared::stages) stage = 0;
    ptx::cp_async_commit();
  };
  // The first tiles of the first job at once.
  int ahead = 0;  // tiles that are on their way
  if (!coming.done()) {
    const int many = min(Shared::stages - 1, (coming.end - coming.tile + kTile - 1) / kTile);
    constexpr int kRounds = ((Shared::stages - 1) * kTile + kThreads - 1) / kThreads;
    Place places[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) places[i] = place_of(coming.tile + i * kThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int at = i * kThreads + threadIdx.x;
      if (at < many * kTile) shared.from[at / kTile][at % kTile] = element(places[i]);
    }
    __syncthreads();
#pragma unroll 1
    for (; ahead < many; ++ahead) load(ahead);
    ask();
    __syncthreads();
  }

  constexpr int kGroups = (D / 16 + kWarps - 1) / kWarps;  // of columns, a warp
  uint32_t q[D / 16][4];
  float m[2], l[4], o[2 * kGroups][4], run_m[2], run_l[2], run_o[2 * kGroups][4];
  const int g = lane / 4, t = lane % 4;
  bool enters = true, starts = true;  // the tile is the first of a job; of a chunk
  int at = 0;                         // its stage
#pragma unroll 1
  while (true) {
    const Job& job = now.job;
    tell();
    const bool ready = ahead == Shared::stages - 1;
    if (ready) {
      ptx::grid_dependency_wait();
      if (now.done()) return;
    }
    if (ready && enters) {
      run_m[0] = run_m[1] = SPECRT_MINUS_INF;
      run_l[0] = run_l[1] = 0.0f;
#pragma unroll
      for (auto& x : run_o)
#pragma unroll
        for (float& e : x) e = 0.0f;
      const bf16* const from = static_cast<const bf16*>(p.q) + static_cast<int64_t>(job.block.begin * p.q_heads + job.kv_head * group_heads) * D + 2 * t;
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const int head = g + h % 2 * 8;
          q[k][h] = head < group_heads ? *reinterpret_cast<const uint32_t*>(from + head * D + k * 16 + h / 2 * 8) : 0u;
        }
    }
    if (ready && starts) {
      m[0] = m[1] = SPECRT_MINUS_INF;
#pragma unroll
      for (float& x : l) x = 0.0f;
#pragma unroll
      for (auto& x : o)
#pragma unroll
        for (float& e : x) e = 0.0f;
    }
    if (ready) ptx::cp_async_wait<Shared::stages - 2>();
    __syncthreads();  // the tile is there, and the one before has been used
    load(0);
    ask();
    if (!ready) {
      ++ahead;
      __syncthreads();
      continue;
    }

    // Scores of the warp's 16 keys.
    const uint32_t keys = stages + at * Shared::stage_bytes, values = keys + Shared::tile_bytes;
    float s[2][4] = {};
    {
      const uint32_t from = keys + (warp * 16 + lane / 16 * 8 + lane % 8) * Shared::pitch + lane / 8 % 2 * 16;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, from + k * 32);
        ptx::mma_m16n8k16_bf16(s[0], q[k], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(s[1], q[k], b[2], b[3]);
      }
    }
    float top[2] = {SPECRT_MINUS_INF, SPECRT_MINUS_INF};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int position = now.tile + warp * 16 + n * 8 + 2 * t + e % 2;
        if (position < job.first_seen || position >= job.block.longest) s[n][e] = SPECRT_MINUS_INF;
        top[e / 2] = fmaxf(top[e / 2], s[n][e]);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int d = 1; d <= 2; d <<= 1) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], d));
      if (t == 0) shared.top[warp][g + 8 * i] = top[i];
    }
    __syncthreads();

    // Probabilities, to all warps.
    float a[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top[i] = fmaxf(top[i], shared.top[w][g + 8 * i]);
      const float before = m[i];
      m[i] = fmaxf(before, top[i] * scale);
      const float base = m[i] == SPECRT_MINUS_INF ? 0.0f : m[i];
      a[i] = ptx::ex2(before - base);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        *reinterpret_cast<uint32_t*>(&shared.p[g + 8 * i][warp * 16 + n * 8 + 2 * t]) =
            ptx::pack_bf16(ptx::ex2(fma_rn(s[n][2 * i], scale, -base)), ptx::ex2(fma_rn(s[n][2 * i + 1], scale, -base)));
    }
    __syncthreads();

    // O = O a + P V, of the warp's columns.
#pragma unroll
    for (int e = 0; e < 4; ++e) l[e] = l[e] * a[e / 2];
#pragma unroll
    for (auto& x : o)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = x[e] * a[e / 2];
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      constexpr uint32_t kOnes = 0x3f803f80u;
      uint32_t group[4];
      ptx::ldmatrix_x4(group, ptx::shared_address(&shared.p[lane % 16][k * 16 + lane / 16 * 8]));
      ptx::mma_m16n8k16_bf16(l, group, kOnes, kOnes);
#pragma unroll
      for (int c = 0; c < kGroups; ++c) {
        if (D % (16 * kWarps) && warp + c * kWarps >= D / 16) continue;
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, values + (k * 16 + lane % 16) * Shared::pitch + ((warp + c * kWarps) * 2 + lane / 16) * 16);
        ptx::mma_m16n8k16_bf16(o[2 * c], group, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(o[2 * c + 1], group, b[2], b[3]);
      }
    }
    if (++at == Shared::stages) at = 0;

    const bool last = now.tile + kTile >= now.end;
    starts = last || (now.tile + kTile) % kChunk == 0;
    enters = last;
    if (starts) {  // the chunk joins its run
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const FoldFactors f = fold_factors(run_m[i], m[i]);
        run_l[i] = fold_value(run_l[i], l[2 * i], f);
#pragma unroll
        for (int n = 0; n < 2 * kGroups; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) run_o[n][2 * i + c] = fold_value(run_o[n][2 * i + c], o[n][2 * i + c], f);
      }
    }
    if (last) {  // O * (v_scale / l), or a part of it
      const bool whole = job.log_run && job.first_seen >= job.run_begin && job.block.longest <= job.run_begin + kGroup;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (g + 8 * i >= group_heads) continue;
        const int vector = job.block.begin * p.q_heads + job.kv_head * group_heads + g + 8 * i;
        const float r = 1.0f / run_l[i] * p.v_scale;
        const int64_t part = part_of(p, vector, job.run_begin / kChunk);
#pragma unroll
        for (int c = 0; c < kGroups; ++c) {
          const int columns = warp + c * kWarps;
          if (columns >= D / 16) continue;
          const float(&x)[4] = run_o[2 * c], (&y)[4] = run_o[2 * c + 1];
          if (whole) {
            uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + static_cast<int64_t>(vector) * D + columns * 16) + t;
            out[0] = ptx::pack_bf16(x[2 * i] * r, x[2 * i + 1] * r);
            out[4] = ptx::pack_bf16(y[2 * i] * r, y[2 * i + 1] * r);
          } else {
            ptx::store_global(part_pieces(p, part) + columns * 4 + t, make_float4(x[2 * i], x[2 * i + 1], y[2 * i], y[2 * i + 1]), ptx::evict_last_policy());
          }
        }
        if (!whole && warp == 0 && t == 0) *part_sums(p, part) = make_float2(run_m[i], run_l[i]);
      }
    }
    now.next(p);
  }
}

template <int D> void launch_decode(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  constexpr int bytes = DecodeShared<D>::stages * DecodeShared<D>::stage_bytes;
  launch({dim3(static_cast<unsigned>(tree_ctas(p, shape))), dim3(kThreads), bytes, stream, 1, true}, decode_attention_kernel<D>, p, score_factor(p));
  launch_combine<D>(p, stream);
}

}  // namespace

void launch_decode_attention(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_decode<64>(p, shape, stream);
    case 96: return launch_decode<96>(p, shape, stream);
    default: return launch_decode<128>(p, shape, stream);
  }
}

}  // namespace specrt
