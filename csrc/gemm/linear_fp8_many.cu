// FP8 linear of more rows than 64: in shape as linear_bf16.cu's tiles for many rows (two CTAs share tokens or, where they split them, weights by multicast; a pair walks two ranges of K), in
// arithmetic as linear_fp8.cu, to the same bits. Activations come quantised.
//
// What bounds it is shared memory: operands of products on 64 tokens take all of its 128 bytes a cycle, on 128 tokens three quarters, copies a third more, and each load of tokens' scales
// (64 bits a lane, two cycles) delays them. So products on as many tokens at a time as registers allow, beside as many sums again that are promoted. Alone on an SM two warpgroups take
// 930 cycles for 128 outputs x 128 tokens x 128 columns, of which products are 512.
#include <algorithm>

#include "base/launch.h"
#include "base/tensor_map.h"
#include "gemm/kernels_cuda.h"
#include "gemm/staged.cuh"
#include "gemm/walk.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = kScaleBlock, kRowBytes = kStepColumns;
constexpr int kEnoughCtas = 90;  // fewer leave too much of the chip idle
constexpr int kFirstTurn = 8;    // of the named barriers that give warpgroups their turn

enum class Ways { kOne, kTurn, kPair };  // through K, as in linear_bf16.cu: one range, two in turn, a CTA for each of two

// splits: as in linear_bf16.cu.
template <int units_, int tokens_, Ways ways, bool splits_ = false> struct Tile {
  static constexpr int units = units_, tokens = tokens_;  // of 64 outputs
  static constexpr bool pair = ways == Ways::kPair, turn = ways == Ways::kTurn, splits = splits_;
  // A warpgroup has a unit of outputs; two have half of the tokens of one each where it would be alone: one multiplies while the other promotes.
  static constexpr int beside = units == 1 ? 2 : 1, warpgroups = units * beside;
  static constexpr int cluster = 2, share = pair ? 1 : 2;       // share: CTAs that bring their tokens together, or their weights
  static constexpr bool one_block = pair ? tokens != 128 : ways == Ways::kOne && tokens < 256;  // it never has more rows (the choice at the end of this file)
  static constexpr int box = splits ? tokens : tokens / share;  // the tokens a CTA brings
  // Behind the warpgroups: the producer and the warps that make the rows' scales, who give registers to warpgroups that need more than an even share (of a quarter of the SM's, where every
  // fourth warp lives).
  static constexpr bool takes = tokens > 160 || units > 2;
  // Warpgroups multiply one after the other, and the others promote meanwhile: in small tiles that costs more than it gains (down of the 8B shape at 128 rows 29.0 us instead of 27.1).
  static constexpr bool ordered = takes;
  static constexpr int assistants = takes || tokens > 128 ? 3 : 1;
  static constexpr int even = units > 3 ? 96 : units > 2 ? 128 : 168, given = units > 3 ? 64 : 56, taken = units > 3 ? 104 : units > 2 ? 152 : 224;  // registers a thread
  static_assert(!takes || given + warpgroups * taken <= (warpgroups + 1) * even);
  static constexpr int outputs = 64 * units, threads = 128 * warpgroups + 32 + 32 * assistants;
  static constexpr int weight_bytes = units * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int fragments = tokens / 8, values = tokens / 2 / beside;  // of a tile's unit; of a thread
  static constexpr int parts = units == 2 && tokens > 128 ? 2 : 1;  // of the tokens, one after the other: registers for the sums of one
  // What the other CTA of a pair sends, half of the fragments: over the stages.
  static constexpr int fragment_bytes = 16 * 128 * units;
  // Of two ranges in turn, half of the first's sums stays in registers, half goes to shared memory. [kept / 4][thread of the warpgroups] of 4 values
  static constexpr int kept = turn ? values / 2 : 0, kept_bytes = kept * 4 * 128 * warpgroups;

  using Tail = StagedShared<units, tokens, (splits || turn ? 1 : 2)>;
  using Ending = StagedEpilogue<Tail, float, !splits>;

  static constexpr int shared_bytes(int stages) { return stages * (stage_bytes + tokens * 4) + kept_bytes + static_cast<int>(sizeof(Tail)) + (2 * stages + 1) * 8; }
};

template <typename T> __global__ void __maxnreg__(T::even)
linear_fp8_many_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearFp8Params fp8, int num_stages) {
  constexpr bool pair = T::pair;
  const LinearParams& p = fp8.linear;
  extern __shared__ __align__(1024) char shared[];
  // stages, x's scales of each stage, the sums that are kept, the epilogue's, barriers
  const int after = num_stages * (T::stage_bytes + T::tokens * 4), tail_at = after + T::kept_bytes;
  const uint32_t stages = ptx::shared_address(shared), scales = stages + num_stages * T::stage_bytes;
  typename T::Tail& tail = *reinterpret_cast<typename T::Tail*>(shared + tail_at);
  const uint32_t full = stages + tail_at + sizeof(typename T::Tail), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const uint32_t scales_made = ptx::shared_address(&tail.full), scales_read = ptx::shared_address(&tail.empty);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = __shfl_sync(0xffffffffu, ptx::cluster_rank(), 0);
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns, middle = all_steps / 2;  // where the second of two ranges begins
  const int begin = pair && rank == 1 ? middle : 0, steps = pair && rank == 0 ? middle : all_steps - begin;
  // Tiles (walk.cuh) are the cluster's; a pair has one. Where the tokens are split, they count units: every cluster has the same number of them but for one, and takes them by `units`.
  const int slot = T::share > 1 ? rank : 0, units_all = (p.out_features + 63) / 64, cluster = blockIdx.x / T::cluster, clusters = gridDim.x / T::cluster;
  const int blocks = T::one_block ? 1 : (p.rows + T::tokens - 1) / T::tokens, first_group = T::splits ? units_all * cluster / clusters : cluster / blocks;
  const int end_group = T::splits ? units_all * (cluster + 1) / clusters : (units_all + T::share * T::units - 1) / (T::share * T::units);
  auto walk_of = [&](int rows) -> Walk {
    if (T::one_block) return {first_group, end_group, T::splits ? T::units : clusters, 1};
    if (T::pair) return {cluster, cluster % blocks * T::tokens < max(rows, 1) ? cluster + 1 : 0, 1, blocks};
    return walk_of_rows(cluster, clusters, end_group, blocks, max(1, (rows + T::tokens - 1) / T::tokens));
  };
  auto row_of = [&](int block) { return (T::splits ? slot : block) * T::tokens; };
  auto output_of = [&](int group) { return T::splits ? group * 64 : (group * T::share + slot) * T::outputs; };

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups * T::share);
    }
    if (pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(scales_made, 32 * T::assistants);
    ptx::mbarrier_init(scales_read, 128 * T::warpgroups);  // every lane: see linear_bf16.cu
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (T::share > 1) ptx::cluster_arrive_relaxed();
  if (T::splits) ptx::cluster_wait();  // weights go to both at once

  if (warp >= 4 * T::warpgroups) {
    if constexpr (T::takes) ptx::give_registers<T::given>();
    const bool producer = warp == 4 * T::warpgroups && lane == 0;
    const uint64_t keep = ptx::evict_last_policy(), pass = ptx::evict_first_policy();  // of x, which every CTA reads; of weights that pass once
    const int pitch = scale_pitch(p.rows);
    auto weights_of = [&](int first_output) { return static_cast<const char*>(p.weight) + (static_cast<int64_t>(first_output / 64) * all_steps + begin) * kUnitBytes; };
    auto units_of = [&](int first_output) { return max(0, min(T::units, (T::splits ? end_group : units_all) - first_output / 64)); };
    auto scale_bytes_of = [&](int first_row) { return min(T::tokens, pitch - first_row) * 4; };
    // Loops as they stand: see epilogue.cuh.
    auto copy_weights = [&](const char* weight, int units, int scale_bytes, int step, int s) {
      ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + T::tokens * kRowBytes + scale_bytes);
#pragma unroll 1
      for (int u = T::splits ? slot : 0; u < units; u += T::splits ? 2 : 1) {
        const uint32_t to = stages + s * T::stage_bytes + u * kUnitBytes;
        const char* from = weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes;
        if (T::splits) ptx::bulk_load_to_all(to, from, kUnitBytes, full + 8 * s, 3);
        else if (T::turn || T::tokens > 160 || blocks > 1) ptx::bulk_load(to, from, kUnitBytes, full + 8 * s);
        else ptx::bulk_load(to, from, kUnitBytes, full + 8 * s, pass);
      }
    };
    auto copy_tokens = [&](int first_row, int scale_bytes, int step, int s) {
      const int part = T::splits ? 0 : slot * T::box, column = (begin + step) * kStepColumns;
      const uint32_t to = stages + s * T::stage_bytes + T::weight_bytes + part * kRowBytes;
      if constexpr (T::share > 1 && !T::splits) ptx::tma_load_to_all(to, &x_map, column, first_row + part, full + 8 * s, 3, keep);
      else ptx::tma_load(to, &x_map, column, first_row, full + 8 * s, keep);
      ptx::bulk_load(scales + s * T::tokens * 4, fp8.x_scale + static_cast<int64_t>(begin + step) * pitch + first_row, scale_bytes, full + 8 * s);
    };
    // The first block of rows always runs: its weights may come before the number of rows is known.
    const int ahead = T::one_block || cluster % blocks == 0 ? min(steps, num_stages) : 0;
    if (producer) {
      const int output = output_of(first_group);
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_weights(weights_of(output), units_of(output), scale_bytes_of(row_of(0)), i, i);
      ptx::prefetch_tensor_map(&x_map);
    }
    __syncwarp();
    if (T::share > 1 && !T::splits) ptx::cluster_wait();  // the other's barriers are there
    if (warp > 4 * T::warpgroups) {
      constexpr int all = pair ? T::tokens / 2 : T::tokens, each = (all / 8 + T::assistants - 1) / T::assistants * 8;  // whole rounds of eight tokens
      const int first = pair ? rank * all : 0, from = first + (warp - 4 * T::warpgroups - 1) * each;
      assist<bf16, 4>(p, tail, output_of(first_group), T::outputs, walk_of, row_of(0), from, min(from + each, first + all));
    } else if (producer) {
      ptx::grid_dependency_wait();
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_tokens(row_of(0), scale_bytes_of(row_of(0)), i, i);
      const Walk walk = walk_of(T::one_block ? 0 : min(*p.num_rows, p.rows));
      produce<(T::share > 1)>(walk, ahead, steps, empty, num_stages, [&](int tile) {
        const int output = output_of(tile / walk.blocks), row = row_of(tile % walk.blocks);
        return [&, row, weight = weights_of(output), units = units_of(output), scale_bytes = scale_bytes_of(row)](int step, int s) {
          copy_weights(weight, units, scale_bytes, step, s);
          copy_tokens(row, scale_bytes, step, s);
        };
      });
    }
    __syncwarp();
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    if constexpr (T::takes) ptx::take_registers<T::taken>();
    const int warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0), unit = T::beside > 1 ? 0 : warpgroup, half = T::beside > 1 ? warpgroup : 0;  // half: of the tokens
    Ring ring{0, 0};  // the stage in use, over all tiles; in bit 1 of its parity that of the scales' barrier
    // The first turn is given here, and the last of all to nobody: what has arrived at a barrier when its CTA ends goes with it.
    if (T::ordered && warpgroup == T::warpgroups - 1) ptx::named_barrier_arrive(kFirstTurn, 256);
    ptx::grid_dependency_wait();  // nothing is lost: there are no tokens before
    if (T::share > 1 && !T::splits) ptx::cluster_wait();
    const int rows = __shfl_sync(0xffffffffu, min(*p.num_rows, p.rows), 0);
    const Walk walk = walk_of(rows);
    for (int tile = walk.first; tile < walk.end; tile += walk.step) {
      const int row = row_of(tile % walk.blocks), first_output = output_of(tile / walk.blocks) + unit * 64;
      const bool present = !T::splits || tile + unit < walk.end;  // this warpgroup has outputs
      const int output = first_output + warp % 4 * 16 + lane / 4;  // of this thread's fragments, and 8 further on
      int scales_at = fp8.weight_blocks > 1 ? begin * p.out_features : 0;  // of the weights, the next step's
      auto scale_at = [&](int half) { return __ldg(fp8.weight_scale + (scales_at + min(output + 8 * half, p.out_features - 1))); };
      constexpr int part_tokens = T::tokens / T::beside / T::parts, part_values = T::values / T::parts;
      float next[2] = {scale_at(0), scale_at(1)}, part[part_values], sum[T::values], first_sum[T::turn ? T::values - T::kept : 1];
      auto kept = [&](int i) -> float4& { return reinterpret_cast<float4*>(shared + after)[i * 32 * T::warpgroups + threadIdx.x]; };
      int step = 0;
#pragma unroll 1
      for (int range = 0; range < (T::turn ? 2 : 1); ++range) {
        if (T::turn && range == 1) {
#pragma unroll
          for (int i = 0; i < T::kept; i += 4) kept(i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
#pragma unroll
          for (int i = T::kept; i < T::values; ++i) first_sum[i - T::kept] = sum[i];
        }
#pragma unroll
        for (int i = 0; i < T::values; ++i) sum[i] = 0.0f;
        const int range_end = T::turn && range == 0 ? middle : steps;
#pragma unroll 1
        for (; step < range_end; ++step) {
          const float scale[2] = {next[0], next[1]};
          if (fp8.weight_blocks > 1 && step + 1 < steps) {
            scales_at += p.out_features;
            next[0] = scale_at(0);
            next[1] = scale_at(1);
          }
          ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity & 1);
          const uint64_t a = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + unit * kUnitBytes);
          const uint64_t b = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + T::weight_bytes + half * (part_tokens * kRowBytes));
          const float2* x_scale = reinterpret_cast<const float2*>(shared + (scales - stages)) + ring.stage * T::tokens / 2 + half * (part_tokens / 2) + lane % 4;
          if (!present) {  // its turn passes
            static_assert(!T::splits || T::ordered);
            ptx::named_barrier(kFirstTurn + warpgroup, 256);
            ptx::named_barrier_arrive(kFirstTurn + (warpgroup + 1) % T::warpgroups, 256);
          } else
#pragma unroll
            for (int i = 0; i < T::parts; ++i) {
              if (T::ordered) ptx::named_barrier(kFirstTurn + warpgroup, 256);
              ptx::wgmma_fence();
#pragma unroll
              for (int k = 0; k < kStepColumns / 32; ++k) {
                ptx::wgmma_e4m3(part, a + 2 * k, b + i * (part_tokens * kRowBytes >> 4) + 2 * k, k > 0);
                if (T::ordered && k == kStepColumns / 32 - 2) ptx::wgmma_commit();
              }
              ptx::wgmma_commit();
              if (T::ordered) {  // the next one begins when the last product here has
                ptx::wgmma_wait<1>();
                ptx::named_barrier_arrive(kFirstTurn + (warpgroup + 1) % T::warpgroups, 256);
              }
              ptx::wgmma_wait<0>();
              ptx::wgmma_results(part);
#pragma unroll
              for (int j = 0; j < part_values; j += 4) {
                const int at = i * part_values + j;
                const float2 x = x_scale[at];
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[at + e] = __fmaf_rn(part[j + e], (e & 1 ? x.y : x.x) * scale[e >> 1], sum[at + e]);
              }
            }
          __syncwarp();
          if (T::share > 1 && lane < T::share) ptx::mbarrier_arrive_of(lane, empty + 8 * ring.stage);  // this warp is done with the stage
          if (T::share == 1 && lane == 0) ptx::mbarrier_arrive(empty + 8 * ring.stage);
          ring.advance(num_stages);
        }
      }
      if constexpr (T::turn) {
#pragma unroll
        for (int i = 0; i < T::kept; i += 4) add_four(sum + i, kept(i));
#pragma unroll
        for (int i = T::kept; i < T::values; ++i) sum[i] = first_sum[i - T::kept] + sum[i];
      }
      const typename T::Ending epilogue{p, tail, unit, row, rows, first_output};
      if (p.squares) {
        ptx::mbarrier_wait(scales_made, ring.parity >> 1);
        ring.parity ^= 2;
      }
      if constexpr (pair) {
        // Rank 0 has the sum of the first range, rank 1 that of the second. Rank 0 finishes the first half of the tokens.
        constexpr int own = T::fragments / 2;
        const int in_use = (min(rows - row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int awaited = rank == 0 ? min(in_use, own) : max(in_use - own, 0);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * T::fragment_bytes);
        ptx::cluster_arrive_relaxed();  // this CTA is done with its stages
        ptx::cluster_wait();
        // Two warpgroups side by side: one has what this CTA finishes, the other what it sends.
        const bool keeps = T::beside == 1 || half == rank, sends = T::beside == 1 || half != rank;
        float mine[4 * own], theirs[4 * own];
#pragma unroll
        for (int i = 0; i < 4 * own; ++i) {
          mine[i] = T::beside > 1 || rank == 0 ? sum[i] : sum[T::values - 4 * own + i];
          theirs[i] = T::beside == 1 && rank == 0 ? sum[T::values - 4 * own + i] : sum[i];
        }
        const uint32_t place = ptx::shared_address_of(1 - rank, stages + threadIdx.x % (128 * T::units) * 16), bell = ptx::shared_address_of(1 - rank, received);
        for_each_fragment<own>(theirs, [&](int j, float(&d)[4]) {
          if (sends && j < in_use - awaited) ptx::store_shared_of(place + j * T::fragment_bytes, d[0], d[1], d[2], d[3], bell);
        });
        const int first = 8 * rank * own;
        const float4* from = reinterpret_cast<const float4*>(shared) + threadIdx.x % (128 * T::units);
        auto add_other = [&](int j, float* d) { add_four(d, from[j * (T::fragment_bytes / 16)]); };
        if (keeps) {
          ptx::mbarrier_wait(received, 0);
#pragma unroll
          for (int j = 0; j < own; ++j)
            if (j < awaited) add_other(j, mine + 4 * j);
          epilogue.finish(first, mine);
        }
      } else if (present) {
        epilogue.finish(0, sum);
      }
      if (pair) break;  // one tile: nothing is kept for another
      if (p.squares) ptx::mbarrier_arrive(scales_read);
      __syncwarp();
    }
    if (T::share > 1) {  // the other may still arrive at this CTA's barriers
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  }
}

template <typename T> void launch_tile(const LinearFp8Params& fp8, cudaStream_t stream) {
  const LinearParams& p = fp8.linear;
  const CUtensorMap x = tensor_map_e4m3(p.x, p.rows, p.in_features, T::box);
  const int tiles = T::splits ? ceil_div(p.out_features, 64) : ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::share * T::outputs);
  const int ctas = T::cluster * (T::pair ? tiles : std::min(tiles, multiprocessors() / T::cluster));
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= kWholeBytes) ++stages;
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_fp8_many_kernel<T>, x, fp8, stages);
}

}  // namespace

void linear_fp8_many_cuda(const LinearFp8Params& fp8, cudaStream_t s) {
  const LinearParams& p = fp8.linear;
  const int sms = multiprocessors();
  auto pairs = [&](int units) { return 2 * ceil_div(p.out_features, 64 * units) * ceil_div(p.rows, 128); };
  if (num_ranges(p.out_features) == 1) {
    if (p.rows <= 128) launch_tile<Tile<2, 128, Ways::kOne>>(fp8, s);
    else if (p.rows <= 160) launch_tile<Tile<4, 80, Ways::kOne, true>>(fp8, s);
    else launch_tile<Tile<2, 256, Ways::kOne>>(fp8, s);
  } else if (p.rows > 256 && ceil_div(p.rows, 192) * ceil_div(p.out_features, 128) >= kEnoughCtas) {
    launch_tile<Tile<2, 192, Ways::kTurn>>(fp8, s);
  } else if (p.rows > 128 && p.rows <= 160 && 2 * ceil_div(p.out_features, 128) <= sms) {  // one block of tokens: the weights once
    2 * ceil_div(p.out_features, 64) <= sms ? launch_tile<Tile<1, 160, Ways::kPair>>(fp8, s) : launch_tile<Tile<2, 160, Ways::kPair>>(fp8, s);
  } else if (pairs(1) <= sms) {
    launch_tile<Tile<1, 128, Ways::kPair>>(fp8, s);
  } else if (pairs(2) <= sms) {
    launch_tile<Tile<2, 128, Ways::kPair>>(fp8, s);
  } else {
    launch_tile<Tile<3, 128, Ways::kPair>>(fp8, s);
  }
}

}  // namespace specrt
