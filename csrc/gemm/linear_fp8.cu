// FP8 linear of up to 64 rows (of more: linear_fp8_many.cu) on Hopper's warpgroup tensor cores: the structure of linear_bf16.cu (ways through K, pipelines, early start) and its
// epilogues, in steps of 128 e4m3 columns. A step's sum starts from zero in the tensor cores and is promoted to fp32 registers at once (params.h has the order). K % 16 == 0.
//
// Few rows come as bfloat16 and every CTA quantises them for itself: four more warps write each step's tokens and their scales where the copies would bring them. A kernel of its own would
// stand between two layers, and cost more than to do the same on every SM. The weights' way is free of all that: as many as there are stages come before the layer before has ended.
// Bytes: the weights once per block of tokens; x and its scales once per block of weight rows (from L2).
#include <algorithm>

#include "base/launch.h"
#include "base/tensor_map.h"
#include "gemm/epilogue.cuh"
#include "gemm/kernels_cuda.h"
#include "gemm/quantize.cuh"
#include "gemm/walk.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = kScaleBlock, kRowBytes = kStepColumns;
constexpr int kFewCtas = 90;  // fewer leave too much of the chip idle
constexpr int kQuantizers = 4, kAhead = 6;  // warps, and blocks of 128 columns that each has on their way
constexpr int kRingRow = kScaleBlock * 2, kRingBytes = kQuantizers * kAhead * kRingRow;

enum class Ways { kOne, kPair };  // through K, as in linear_bf16.cu: one range, a CTA for each of two

// quantizes: x is bfloat16. Activation: of the residual stream and SiLU-mul.
template <int warpgroups_, int tokens_, Ways ways, bool quantizes_ = false, typename Activation_ = bf16> struct Tile {
  using Activation = Activation_;
  static constexpr int warpgroups = warpgroups_, tokens = tokens_;
  static constexpr bool pair = ways == Ways::kPair, quantizes = quantizes_;
  // Behind the warpgroups: the producer, the warp that makes the rows' scales, the quantisers.
  static constexpr int outputs = 64 * warpgroups, threads = 128 * warpgroups + 64 + (quantizes ? 32 * kQuantizers : 0);
  static constexpr int cluster = pair ? 2 : 1;
  // So few that CTAs of attention find room beside them.
  static constexpr int registers = tokens <= 16 ? 64 : tokens <= 32 ? 72 : tokens > 64 ? 168 : warpgroups > 2 ? 80 : 96;
  static constexpr int weight_bytes = warpgroups * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr bool one_block = tokens <= 64;  // it never has more rows
  static constexpr int values = tokens / 2, fragments = tokens / 8;  // of the tile, a thread
  static constexpr int parts = warpgroups > 2 ? 2 : 1;  // of the tokens, one after the other: registers for the sums of one
  static constexpr int fragment_bytes = 16 * 128 * warpgroups;
  // What the other CTA of a pair sends: half of the fragments. Over the stages where it is large.
  static constexpr int inbox_bytes = pair ? fragments / 2 * fragment_bytes : 0;
  static constexpr bool own_inbox = pair && tokens <= 32;

  using Tail = EpilogueShared<warpgroups, tokens>;
  using Ending = Epilogue<Tail, Activation, float>;

  static constexpr int shared_bytes(int stages) {
    return stages * (stage_bytes + tokens * 4) + (own_inbox ? inbox_bytes : 0) + (quantizes ? kRingBytes : 0) + static_cast<int>(sizeof(Tail)) + (2 * stages + 1) * 8;
  }
};

// Where quantised tokens go: stage s at x + s * stage_bytes, their scales at scale + s * tokens; barriers: one arrival a row. ring: of kRingBytes, for those that are not yet quantised.
struct Pipeline {
  char* x;
  int stage_bytes;
  float* scale;
  int tokens;
  char* ring;
  uint32_t full, empty;
  int stages;
};

// Brings the tokens of one block of rows, `steps` steps of K from `begin` on, `tiles` times over; by kQuantizers warps, which take row after row of step after step in turn, each
// with kAhead of them on their way. Rows past num_rows come along: to know their number would take a load before the loads.
__device__ __forceinline__ void quantize_tokens(const LinearParams& p, const Pipeline& to, int begin, int steps, int tiles, int quantizer) {
  struct Place {  // in the sequence of rows
    int row, step, stage, parity;
  };
  const int lane = threadIdx.x % 32;
  auto advance = [&](Place& at, int rows) {
    at.row += rows;
    while (at.row >= p.rows) {
      at.row -= p.rows;
      if (++at.step == steps) at.step = 0;
      if (++at.stage == to.stages) {
        at.stage = 0;
        at.parity ^= 1;
      }
    }
  };
  Place load{0, 0, 0, 1};  // an `empty` barrier counts as complete the first time round
  advance(load, quantizer);
  Place store = load;
  char* const ring = to.ring + quantizer * (kAhead * kRingRow) + lane * 8;  // a lane reads what it has copied itself
  auto ask = [&](int i) {
    const int column = (begin + load.step) * kStepColumns + 4 * lane;
    const bool present = column < p.in_features;
    ptx::cp_async_8(ptx::shared_address(ring + i * kRingRow), static_cast<const bf16*>(p.x) + static_cast<int64_t>(load.row) * p.in_features + (present ? column : 0), present);
    ptx::cp_async_commit();
    advance(load, kQuantizers);
  };
  ptx::grid_dependency_wait();
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) ask(i);
  int i = 0;
#pragma unroll 1
  for (int left = tiles * steps * p.rows - quantizer; left > 0; left -= kQuantizers) {
    ptx::cp_async_wait<kAhead - 1>();
    const QuantizedFour q = quantize_four(Packed<bf16>{.all = *reinterpret_cast<const uint2*>(ring + i * kRingRow)});
    ask(i);
    if (++i == kAhead) i = 0;
    ptx::mbarrier_wait(to.empty + 8 * store.stage, store.parity);
    const int chunk = lane / 4 ^ store.row % 8;  // the swizzle of ptx/wgmma.cuh
    *reinterpret_cast<uint32_t*>(to.x + store.stage * to.stage_bytes + store.row * kRowBytes + chunk * 16 + lane % 4 * 4) = q.values;
    if (lane == 0) to.scale[store.stage * to.tokens + store.row] = q.scale;
    ptx::async_proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(to.full + 8 * store.stage);
    advance(store, kQuantizers);
  }
  ptx::cp_async_wait<0>();  // nothing is on its way into memory that another block may get
}

template <typename T> __global__ void __maxnreg__(T::registers)
linear_fp8_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearFp8Params fp8, int num_stages) {
  constexpr bool pair = T::pair;
  const LinearParams& p = fp8.linear;
  extern __shared__ __align__(1024) char shared[];
  // stages, x's scales of each stage, the inbox where it has a place of its own, the quantisers' ring, the epilogue's, barriers
  const int after = num_stages * (T::stage_bytes + T::tokens * 4), ring_at = after + (T::own_inbox ? T::inbox_bytes : 0), tail_at = ring_at + (T::quantizes ? kRingBytes : 0);
  const uint32_t stages = ptx::shared_address(shared), scales = stages + num_stages * T::stage_bytes, inbox = T::own_inbox ? stages + after : stages;
  typename T::Tail& tail = *reinterpret_cast<typename T::Tail*>(shared + tail_at);
  const uint32_t full = stages + tail_at + sizeof(typename T::Tail), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const uint32_t scales_made = ptx::shared_address(&tail.full), scales_read = ptx::shared_address(&tail.empty);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = pair ? __shfl_sync(0xffffffffu, ptx::cluster_rank(), 0) : 0;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns, middle = all_steps / 2;  // where the second of two ranges begins
  const int begin = pair && rank == 1 ? middle : 0, steps = pair && rank == 0 ? middle : all_steps - begin;
  const int groups = (p.out_features + T::outputs - 1) / T::outputs, cluster = blockIdx.x / T::cluster, clusters = gridDim.x / T::cluster;  // of a pair: one tile (walk.cuh)
  const int blocks = T::one_block ? 1 : (p.rows + T::tokens - 1) / T::tokens, first_output = cluster / blocks * T::outputs;
  auto walk_of = [&](int rows) -> Walk {
    if (T::one_block) return {cluster, groups, clusters, 1};
    return walk_of_rows(cluster, clusters, groups, blocks, max(1, (rows + T::tokens - 1) / T::tokens));
  };

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, T::quantizes ? 1 + p.rows : 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups);
    }
    if (pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(scales_made, 32);
    ptx::mbarrier_init(scales_read, 128 * T::warpgroups);  // every lane: see linear_bf16.cu
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (pair && T::own_inbox) ptx::cluster_arrive_relaxed();

  if (warp >= 4 * T::warpgroups) {
    if (T::quantizes && warp > 4 * T::warpgroups + 1) {
      const Pipeline pipeline{shared + T::weight_bytes, T::stage_bytes, reinterpret_cast<float*>(shared + (scales - stages)), T::tokens, shared + ring_at, full, empty, num_stages};
      quantize_tokens(p, pipeline, begin, steps, (groups - cluster + clusters - 1) / clusters, warp - 4 * T::warpgroups - 2);
    } else if (warp > 4 * T::warpgroups) {
      const int half = T::tokens / 2;
      assist<typename T::Activation, (T::tokens <= 16 ? 1 : 2)>(p, tail, first_output, T::outputs, walk_of, 0, rank * half, pair ? (rank + 1) * half : T::tokens);
    } else if (lane == 0) {
      // Every CTA reads x. Few rows' weights pass once, and would displace from L2 what the next kernels need: their code above all.
      const uint64_t keep = ptx::evict_last_policy(), pass = ptx::evict_first_policy();
      const int pitch = scale_pitch(p.rows);
      auto weights_of = [&](int output) { return static_cast<const char*>(p.weight) + (static_cast<int64_t>(output / 64) * all_steps + begin) * kUnitBytes; };
      auto units_of = [&](int output) { return min(T::warpgroups, (p.out_features - output + 63) / 64); };
      auto scale_bytes_of = [&](int first_row) { return min(T::tokens, pitch - first_row) * 4; };
      // Loops as they stand: unrolled, the way to the first copy is through cold instructions (epilogue.cuh).
      auto copy_weights = [&](const char* weight, int units, int scale_bytes, int step, int s) {
        ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + (T::quantizes ? 0 : T::tokens * kRowBytes + scale_bytes));
#pragma unroll 1
        for (int u = 0; u < units; ++u) {
          const uint32_t to = stages + s * T::stage_bytes + u * kUnitBytes;
          const char* from = weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes;
          if (T::tokens <= 64) ptx::bulk_load(to, from, kUnitBytes, full + 8 * s, pass);
          else ptx::bulk_load(to, from, kUnitBytes, full + 8 * s);
        }
      };
      auto copy_tokens = [&](int first_row, int scale_bytes, int step, int s) {
        if (T::quantizes) return;
        ptx::tma_load(stages + s * T::stage_bytes + T::weight_bytes, &x_map, (begin + step) * kStepColumns, first_row, full + 8 * s, keep);
        ptx::bulk_load(scales + s * T::tokens * 4, fp8.x_scale + static_cast<int64_t>(begin + step) * pitch + first_row, scale_bytes, full + 8 * s);
      };
      // The first block of rows always runs: its weights may come before the number of rows is known.
      const int ahead = T::one_block || cluster % blocks == 0 ? min(steps, num_stages) : 0;
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_weights(weights_of(first_output), units_of(first_output), scale_bytes_of(0), i, i);
      if (!T::quantizes) ptx::prefetch_tensor_map(&x_map);
      ptx::grid_dependency_wait();
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_tokens(0, scale_bytes_of(0), i, i);
      const Walk walk = walk_of(T::one_block ? 0 : min(*p.num_rows, p.rows));
      produce<false>(walk, ahead, steps, empty, num_stages, [&](int tile) {
        const int output = tile / walk.blocks * T::outputs, row = tile % walk.blocks * T::tokens;
        return [&, row, weight = weights_of(output), units = units_of(output), scale_bytes = scale_bytes_of(row)](int step, int s) {
          copy_weights(weight, units, scale_bytes, step, s);
          copy_tokens(row, scale_bytes, step, s);
        };
      });
    }
    __syncwarp();
    if (pair) {
      if (!T::own_inbox) ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  } else {
    const int warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0);
    Ring ring{0, 0};  // the stage in use, over all tiles; in bit 1 of its parity that of the scales' barrier
    ptx::grid_dependency_wait();  // nothing is lost: there are no tokens before
    const int rows = __shfl_sync(0xffffffffu, min(*p.num_rows, p.rows), 0);
    const Walk walk = walk_of(rows);
    for (int tile = walk.first; tile < walk.end; tile += walk.step) {
      const int first_row = tile % walk.blocks * T::tokens, first_output = tile / walk.blocks * T::outputs + warpgroup * 64;
      const int output = first_output + warp % 4 * 16 + lane / 4;  // of this thread's fragments, and 8 further on
      int scales_at = fp8.weight_blocks > 1 ? begin * p.out_features : 0;  // of the weights, the next step's
      auto scale_at = [&](int half) { return __ldg(fp8.weight_scale + (scales_at + min(output + 8 * half, p.out_features - 1))); };
      float next[2] = {scale_at(0), scale_at(1)}, part[T::values / T::parts], sum[T::values];
#pragma unroll
      for (int i = 0; i < T::values; ++i) sum[i] = 0.0f;
      constexpr int part_tokens = T::tokens / T::parts, part_fragments = T::fragments / T::parts;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const float scale[2] = {next[0], next[1]};
        if (fp8.weight_blocks > 1 && step + 1 < steps) {
          scales_at += p.out_features;
          next[0] = scale_at(0);
          next[1] = scale_at(1);
        }
        ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity & 1);
        const uint64_t a = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + warpgroup * kUnitBytes);
        const uint64_t b = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + T::weight_bytes);
        const float2* x_scale = reinterpret_cast<const float2*>(shared + (scales - stages)) + ring.stage * T::tokens / 2 + lane % 4;
#pragma unroll
        for (int i = 0; i < T::parts; ++i) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < kStepColumns / 32; ++k) ptx::wgmma_e4m3(part, a + 2 * k, b + i * (part_tokens * kRowBytes >> 4) + 2 * k, k > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::wgmma_results(part);
#pragma unroll
          for (int j = 0; j < part_fragments; ++j) {
            const int at = i * part_fragments + j;
            const float2 x = x_scale[4 * at];
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[4 * at + e] = __fmaf_rn(part[4 * j + e], (e & 1 ? x.y : x.x) * scale[e >> 1], sum[4 * at + e]);
          }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty + 8 * ring.stage);  // this warp is done with the stage
        ring.advance(num_stages);
      }
      const typename T::Ending epilogue{p, tail, warpgroup, first_row, rows, first_output};
      if (p.squares) {
        ptx::mbarrier_wait(scales_made, ring.parity >> 1);
        ring.parity ^= 2;
      }
      if constexpr (pair) {
        // Rank 0 has the sum of the first range, rank 1 that of the second. Rank 0 finishes the first half of the tokens.
        constexpr int own = T::fragments / 2;
        const int present = (min(rows - first_row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int awaited = rank == 0 ? min(present, own) : max(present - own, 0);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * T::fragment_bytes);
        if (!T::own_inbox) ptx::cluster_arrive_relaxed();  // this CTA is done with its stages
        ptx::cluster_wait();
        float mine[4 * own], theirs[4 * own];
#pragma unroll
        for (int i = 0; i < 4 * own; ++i) {
          mine[i] = rank == 0 ? sum[i] : sum[4 * own + i];
          theirs[i] = rank == 0 ? sum[4 * own + i] : sum[i];
        }
        const uint32_t place = ptx::shared_address_of(1 - rank, inbox + threadIdx.x * 16), bell = ptx::shared_address_of(1 - rank, received);
        for_each_fragment<1>(theirs, [&](int j, float(&d)[4]) {
          if (j < present - awaited) ptx::store_shared_of(place + j * T::fragment_bytes, d[0], d[1], d[2], d[3], bell);
        });
        const int first = 8 * rank * own;
        const float4* from = reinterpret_cast<const float4*>(shared + (inbox - stages)) + threadIdx.x;
        auto stream = epilogue.residual(first);
        ptx::mbarrier_wait(received, 0);
        for_each_fragment<1>(mine, [&](int j, float(&d)[4]) {
          if (j >= awaited) return;
          const auto next = epilogue.residual(first + 8 * (j + 1));
          add_four(d, from[j * (T::fragment_bytes / 16)]);
          epilogue.finish(first + 8 * j, d, stream);
          stream = next;
        });
        epilogue.finish_squares(first, first + 8 * own);
      } else {
        auto stream = epilogue.residual(0);
        for_each_fragment<1>(sum, [&](int j, float(&d)[4]) {
          if (first_row + 8 * j >= rows) return;
          const auto next = epilogue.residual(8 * (j + 1));
          epilogue.finish(8 * j, d, stream);
          stream = next;
        });
        epilogue.finish_squares(0, T::tokens);
      }
      if (pair) break;  // one tile: nothing is kept for another
      if (p.squares) ptx::mbarrier_arrive(scales_read);
      __syncwarp();
    }
  }
}

template <typename T> void launch_tile(const LinearFp8Params& fp8, cudaStream_t stream) {
  const LinearParams& p = fp8.linear;
  const CUtensorMap x = T::quantizes ? CUtensorMap{} : tensor_map_e4m3(p.x, p.rows, p.in_features, T::tokens);
  const int tiles = ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::outputs), sms = multiprocessors();
  const int ctas = T::pair ? 2 * tiles : std::min(tiles, sms);
  constexpr int kSmallBytes = 91000;  // 64 rows of a layer that narrows: two an SM (o 8.7 us instead of 9.7)
  const int budget = T::tokens > 64 ? kWholeBytes : T::tokens > 32 && p.out_features <= p.in_features ? kSmallBytes : few_bytes(T::tokens);
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= budget) ++stages;
  // Of one row, each quantiser fills a stage of its own, and a barrier's parity tells one round from the next alone.
  static_assert(!T::quantizes || T::shared_bytes(kQuantizers) <= few_bytes(T::tokens));
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_fp8_kernel<T>, x, fp8, stages);
}

// Blocks of 16 to 64 tokens, as the rows need.
template <int warpgroups, Ways ways> void launch_block(const LinearFp8Params& fp8, cudaStream_t stream) {
  const int rows = fp8.linear.rows;
  static_assert(kSelfQuantizedRows <= 16, "one block of tokens");
  if (fp8.linear.dtype == DType::kBF16) launch_tile<Tile<warpgroups, 16, ways, true>>(fp8, stream);
  else if (rows <= 16) launch_tile<Tile<warpgroups, 16, ways>>(fp8, stream);
  else if (rows <= 32) launch_tile<Tile<warpgroups, 32, ways>>(fp8, stream);
  else launch_tile<Tile<ways == Ways::kPair ? warpgroups : 4, 64, ways>>(fp8, stream);  // the tokens' way from L2 begins to count: once for more outputs
}

// float32 activations are for parity checks: one shape of tile, whatever the rows.
template <Ways ways> void launch_f32(const LinearFp8Params& fp8, cudaStream_t stream) { launch_tile<Tile<1, 128, ways, false, float>>(fp8, stream); }

}  // namespace

void launch_linear_fp8_cuda(const LinearFp8Params& fp8, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  require_hopper("linear_fp8", "e4m3");
  const LinearParams& p = fp8.linear;
  const bool one_range = num_ranges(p.out_features) == 1;
  if (p.finish != Finish::kStore && p.out_dtype == DType::kF32) one_range ? launch_f32<Ways::kOne>(fp8, s) : launch_f32<Ways::kPair>(fp8, s);
  else if (p.rows > 64) linear_fp8_many_cuda(fp8, s);
  else if (one_range) launch_block<2, Ways::kOne>(fp8, s);
  else if (2 * ceil_div(p.out_features, 128) >= kFewCtas) launch_block<2, Ways::kPair>(fp8, s);
  else launch_block<1, Ways::kPair>(fp8, s);  // narrower CTAs, so that a small weight still occupies the chip
}

}  // namespace specrt
