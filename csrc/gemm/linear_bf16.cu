// bfloat16 linear on Hopper's warpgroup tensor cores: 64 or 128 weight rows on the wide side, 16 to 256 tokens on the narrow one.
//
// One kernel, three ways through K (params.h has the order; which way runs, and how deep its pipeline is, changes no bit):
//   one range:       a CTA walks all of K.
//   ranges in turn:  a CTA walks the 4 ranges one after the other and keeps the total beside the running sum. Many rows (prefill).
//   a pair of CTAs:  each walks two of the ranges; for half of the tokens each, the sums go to the other through distributed shared memory. Few rows: a
//                    small weight still occupies the chip.
// In the first two a CTA stays and takes tile after tile. A producer thread keeps `stages` steps of 64 columns in flight by bulk copies, across tiles.
//
// Few rows: the time is the weights' way from memory, and what is lost is lost between kernels. So the next kernel of the stream starts early (programmatic
// dependent launch) and fills its pipeline with weights while this one still works. That needs room, evenly: a kernel that finds room for two of its CTAs on an SM
// leaves other SMs empty. Hence two sizes of pipeline, such that one of each fits an SM but not two of the larger: layers that widen (qkv, gate/up, lm_head)
// take the larger and layers that narrow (o, down) the smaller, which makes neighbours differ.
// Bytes: the weights once per block of tokens, x once per block of weight rows (from L2).
#include <algorithm>

#include "base/launch.h"
#include "base/math.h"
#include "base/tensor_map.h"
#include "gemm/epilogue.cuh"
#include "gemm/kernels_cuda.h"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = 64, kRowBytes = kStepColumns * 2;

enum class Ways { kOne, kTurn, kPair };  // through K: see the top

template <int warpgroups_, int tokens_, Ways ways_> struct Tile {
  static constexpr int warpgroups = warpgroups_, tokens = tokens_;
  static constexpr Ways ways = ways_;
  static constexpr int outputs = 64 * warpgroups, threads = 128 * warpgroups + 64;  // the last two warps: the producer, and who makes the rows' scales
  static constexpr int cluster = ways == Ways::kPair ? 2 : 1;
  static constexpr int weight_bytes = warpgroups * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int values = tokens / 2;  // of the tile, a thread
  // What the other CTA of a pair sends: [2 ranges][values / 8][thread of the warpgroups] of 4 values. Over the stages where it is large.
  static constexpr int inbox_bytes = ways == Ways::kPair ? 2 * values / 2 * 128 * warpgroups * 4 : 0;
  static constexpr bool own_inbox = ways == Ways::kPair && tokens <= 32;
  // Whether the wgmmas of a step overlap with those of the next: worth a stage of memory only where they take long.
  static constexpr int lag = tokens > 128 || ways == Ways::kTurn;
  static constexpr bool many = tokens > 64;  // arithmetic and the tokens' way from L2 count too: deep pipelines gain more than an early start

  using Tail = EpilogueShared<warpgroups, tokens>;

  static constexpr int shared_bytes(int stages) { return stages * stage_bytes + (own_inbox ? inbox_bytes : 0) + static_cast<int>(sizeof(Tail)) + (2 * stages + 1) * 8; }
};

constexpr int kHalfBytes = 113 << 10;  // two CTAs an SM

__device__ __forceinline__ int range_begin(int range, int steps) { return range * steps / kRanges; }

template <typename T> __global__ void __launch_bounds__(T::threads, T::tokens <= 32 ? (T::warpgroups == 1 ? 5 : 3) : T::tokens == 64 ? (T::warpgroups == 1 ? 3 : 2) : 1)
linear_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearParams p, int num_stages) {
  constexpr bool pair = T::ways == Ways::kPair, totals = T::ways != Ways::kOne;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t stages = ptx::shared_address(shared), inbox = T::own_inbox ? stages + num_stages * T::stage_bytes : stages;
  const int tail_at = num_stages * T::stage_bytes + (T::own_inbox ? T::inbox_bytes : 0);
  typename T::Tail& tail = *reinterpret_cast<typename T::Tail*>(shared + tail_at);
  const uint32_t full = stages + tail_at + sizeof(typename T::Tail), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const uint32_t scales_made = ptx::shared_address(&tail.full), scales_read = ptx::shared_address(&tail.empty);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = pair ? ptx::cluster_rank() : 0;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns;
  const int begin = pair ? range_begin(2 * rank, all_steps) : 0, steps = (pair ? range_begin(2 * rank + 2, all_steps) : all_steps) - begin;
  const int blocks = (p.rows + T::tokens - 1) / T::tokens, tiles = blocks * ((p.out_features + T::outputs - 1) / T::outputs);
  const int first_tile = blockIdx.x / T::cluster, tile_step = gridDim.x / T::cluster;  // of a pair: one tile

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups);
    }
    if (pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(scales_made, 1);
    ptx::mbarrier_init(scales_read, 4 * T::warpgroups);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (pair && T::own_inbox) ptx::cluster_arrive();

  if (warp >= 4 * T::warpgroups) {
    if (warp > 4 * T::warpgroups && p.next_weight) {  // from memory: nobody has read it before
      const int output = first_tile / blocks * T::outputs + 16 * lane;
      if (16 * lane < T::outputs && output < p.out_features) ptx::prefetch_l2(static_cast<const bf16*>(p.next_weight) + output);
    }
    if (warp > 4 * T::warpgroups && p.squares) {
      ptx::grid_dependency_wait();
      const int rows = min(*p.num_rows, p.rows), begin = rank * T::tokens / 2, end = pair ? begin + T::tokens / 2 : T::tokens;
      int parity = 1;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int first_row = tile % blocks * T::tokens;
        if (first_row > 0 && first_row >= rows) continue;
        ptx::mbarrier_wait(scales_read, parity);
        make_scales(p, tail.scale, first_row, begin, end, rows);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(scales_made);
        parity ^= 1;
      }
    }
    if (warp == 4 * T::warpgroups && lane == 0) {
      const uint64_t keep = ptx::evict_last_policy();  // of x: every CTA reads it
      bool waited = false;
      int s = 0, parity = 1;  // the stage to fill, over all tiles; of its `empty` barrier, which counts as complete the first time round
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int first_row = tile % blocks * T::tokens, first_output = tile / blocks * T::outputs;
        const int units = min(T::warpgroups, (p.out_features - first_output + 63) / 64);
        const char* weight = static_cast<const char*>(p.weight) + (static_cast<int64_t>(first_output / 64) * all_steps + begin) * kUnitBytes;
        auto copy_weights = [&](int step, int s) {
          ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + T::tokens * kRowBytes);
          for (int u = 0; u < units; ++u)
            ptx::bulk_load(stages + s * T::stage_bytes + u * kUnitBytes, weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes, kUnitBytes, full + 8 * s);
        };
        auto copy_tokens = [&](int step, int s) {
          ptx::tma_load(stages + s * T::stage_bytes + T::weight_bytes, &x_map, (begin + step) * kStepColumns, first_row, full + 8 * s, keep);
        };
        int step = 0;
        if (!waited) {
          const int ahead = first_row == 0 ? min(steps, num_stages) : 0;  // the first block of rows always runs: weights may come before the number of rows is known
          for (int i = 0; i < ahead; ++i) copy_weights(i, i);
          ptx::grid_dependency_wait();
          for (int i = 0; i < ahead; ++i) copy_tokens(i, i);
          step = ahead;
          s = ahead % num_stages;
          parity = ahead == num_stages ? 0 : 1;
          waited = true;
        }
        if (first_row > 0 && first_row >= *p.num_rows) continue;
        // The next kernel may start when the last loads are on their way: earlier, it would only hold registers and shared memory.
        const int start = tile + tile_step >= tiles ? max(step, steps - num_stages) : steps + 1;
        for (; step < steps; ++step) {
          if (step == start) ptx::launch_dependents();
          ptx::mbarrier_wait(empty + 8 * s, parity);
          copy_weights(step, s);
          copy_tokens(step, s);
          if (++s == num_stages) {
            s = 0;
            parity ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if (pair) {
      if (!T::own_inbox) ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  } else {
    const int warpgroup = warp / 4;
    int s = 0, parity = 0, before = 0, scales_parity = 0;  // the stage in use, over all tiles, and the one before it
    ptx::grid_dependency_wait();        // nothing is lost: there are no tokens before
    const int rows = min(*p.num_rows, p.rows);
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const int first_row = tile % blocks * T::tokens, first_output = tile / blocks * T::outputs + warpgroup * 64;
      if (first_row > 0 && first_row >= rows) continue;
      float sum[T::values], total[totals ? T::values : 1];
#pragma unroll
      for (int i = 0; i < T::values; ++i) sum[i] = 0.0f;
      if (totals)
#pragma unroll
        for (int i = 0; i < T::values; ++i) total[i] = 0.0f;
      int range = pair ? 2 * rank : 0, range_end = range_begin(range + 1, all_steps) - begin;
      for (int step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(full + 8 * s, parity);
        const uint64_t a = ptx::wgmma_descriptor(stages + s * T::stage_bytes + warpgroup * kUnitBytes);
        const uint64_t b = ptx::wgmma_descriptor(stages + s * T::stage_bytes + T::weight_bytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStepColumns / 16; ++k) ptx::wgmma_bf16(sum, a + 2 * k, b + 2 * k);
        ptx::wgmma_commit();
        if (totals && range_end <= step + 1) {  // a range ends here (with fewer steps than ranges some are empty: zero sums)
          ptx::wgmma_wait<0>();
          if (!(pair && rank == 1 && step == steps - 1)) {
#pragma unroll
            for (int i = 0; i < T::values; ++i) {
              total[i] = total[i] + sum[i];
              sum[i] = 0.0f;
            }
          }
          while (range < kRanges - 1 && range_end <= step + 1) range_end = range_begin(++range + 1, all_steps) - begin;
        } else {
          ptx::wgmma_wait<T::lag>();
        }
        if ((T::lag == 0 || step > 0) && lane == 0) ptx::mbarrier_arrive(empty + 8 * (T::lag ? before : s));  // this warp is done with that stage
        before = s;
        if (++s == num_stages) {
          s = 0;
          parity ^= 1;
        }
      }
      ptx::wgmma_wait<0>();
      if (T::lag && steps > 0 && lane == 0) ptx::mbarrier_arrive(empty + 8 * before);
      const Epilogue<typename T::Tail> epilogue(p, tail, warpgroup, first_row, rows, first_output);
      if (p.squares) ptx::mbarrier_wait(scales_made, scales_parity);
      scales_parity ^= 1;
      if constexpr (pair) {
        // Rank 0 has the sum of ranges 0 and 1 in total; rank 1 has range 2 in total and range 3 in sum. Rank 0 finishes the first half of the tokens.
        constexpr int fragments = T::values / 4, own = fragments / 2;
        const int present = (min(rows - first_row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int awaited = rank == 0 ? 2 * min(present, own) : max(present - own, 0);
        constexpr int bytes = 16 * 128 * T::warpgroups;
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * bytes);
        if (!T::own_inbox) ptx::cluster_arrive();  // this CTA is done with its stages
        ptx::cluster_wait();
        const uint32_t place = ptx::shared_address_of(1 - rank, inbox + threadIdx.x * 16), bell = ptx::shared_address_of(1 - rank, received);
#pragma unroll
        for (int j = 0; j < own; ++j) {
          if (rank == 0) {
            if (own + j < present) ptx::store_shared_of(place + j * bytes, total[4 * (own + j)], total[4 * (own + j) + 1], total[4 * (own + j) + 2], total[4 * (own + j) + 3], bell);
          } else if (j < present) {
            ptx::store_shared_of(place + 2 * j * bytes, total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3], bell);
            ptx::store_shared_of(place + (2 * j + 1) * bytes, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3], bell);
          }
        }
        float kept[4 * own], last[4 * own];  // the half that stays here: of total, of sum
#pragma unroll
        for (int i = 0; i < 4 * own; ++i) {
          kept[i] = rank == 0 ? total[i] : total[4 * own + i];
          last[i] = sum[4 * own + i];
        }
        const int first = 8 * rank * own, end = min(present - rank * own, own);
        uint2 stream = epilogue.residual(first);
        ptx::mbarrier_wait(received, 0);
        const float4* from = reinterpret_cast<const float4*>(shared + (inbox - stages)) + threadIdx.x;
#pragma unroll 1
        for (int j = 0; j < end; ++j) {
          const uint2 next = epilogue.residual(first + 8 * (j + 1));
          const float4 one = from[0], other = from[rank == 0 ? bytes / 16 : 0];  // rank 0: the third range and the fourth; rank 1: the sum of the first two
          const float theirs[4] = {one.x, one.y, one.z, one.w}, fourth[4] = {other.x, other.y, other.z, other.w};
          from += (rank == 0 ? 2 : 1) * bytes / 16;
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = pick(kept, j, e);
            d[e] = rank == 0 ? x + theirs[e] + fourth[e] : theirs[e] + x + pick(last, j, e);
          }
          epilogue.finish(first + 8 * j, d, stream);
          stream = next;
        }
        epilogue.finish_squares(first, first + 8 * own);
      } else {
        const int end = min((rows - first_row + 7) / 8, T::values / 4);
        uint2 stream = epilogue.residual(0);
#pragma unroll 1
        for (int j = 0; j < end; ++j) {
          const uint2 next = epilogue.residual(8 * (j + 1));
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) d[e] = totals ? pick(total, j, e) : pick(sum, j, e);
          epilogue.finish(8 * j, d, stream);
          stream = next;
        }
        epilogue.finish_squares(0, T::tokens);
      }
      __syncwarp();
      if (p.squares && lane == 0) ptx::mbarrier_arrive(scales_read);
    }
  }
}

template <typename T> void launch_tile(const LinearParams& p, cudaStream_t stream) {
  const CUtensorMap x = tensor_map_bf16(p.x, p.rows, p.in_features, T::tokens);
  const int tiles = ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::outputs), sms = num_sms();
  const int ctas = T::ways == Ways::kPair ? 2 * tiles : std::min(tiles, sms);
  const int budget = T::many ? (ctas <= sms ? kWholeBytes : kHalfBytes) : p.out_features > p.in_features ? kWideBytes : kNarrowBytes;
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= budget) ++stages;
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_kernel<T>, x, p, stages);
}

template <int warpgroups, Ways ways> void launch_few(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 16) launch_tile<Tile<warpgroups, 16, ways>>(p, stream);
  else if (p.rows <= 32) launch_tile<Tile<warpgroups, 32, ways>>(p, stream);
  else if (p.rows <= 64) launch_tile<Tile<warpgroups, 64, ways>>(p, stream);
  else launch_tile<Tile<warpgroups, 128, ways>>(p, stream);
}

}  // namespace

void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream) {
  require_hopper("linear", "bfloat16");
  const int outputs = ceil_div(p.out_features, 128);
  constexpr int kEnoughCtas = 90;  // of 132 SMs: fewer than that read slower, even at 64 outputs a CTA
  if (num_ranges(p.out_features) == 1) {
    if (p.rows <= 128) launch_few<2, Ways::kOne>(p, stream);
    else launch_tile<Tile<2, 256, Ways::kOne>>(p, stream);
  } else if (p.rows > 256 && outputs * ceil_div(p.rows, 128) >= 128) {
    launch_tile<Tile<2, 128, Ways::kTurn>>(p, stream);
  } else if (2 * outputs >= kEnoughCtas) {
    launch_few<2, Ways::kPair>(p, stream);
  } else {
    launch_few<1, Ways::kPair>(p, stream);  // narrower CTAs, so that a small weight still occupies the chip
  }
}

}  // namespace specrt
