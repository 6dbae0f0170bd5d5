// FP8 linear on Hopper's warpgroup tensor cores: the structure of linear_bf16.cu (three ways through K, pipelines, early start) and its epilogues, in steps of
// 128 e4m3 columns. A step's sum starts from zero in the tensor cores and is promoted to fp32 registers at once (params.h has the order). K % 16 == 0.
//
// Few rows come as bfloat16 and every CTA quantises them for itself: four more warps write each step's tokens and their scales where the copies would bring them. A kernel of its own would
// stand between two layers, and cost more than to do the same on every SM. The weights' way is free of all that: the producer never waits for the layer before.
// Bytes: the weights once per block of tokens; x and its scales once per block of weight rows (from L2).
#include <type_traits>

#include "base/launch.h"
#include "base/math.h"
#include "base/tensor_map.h"
#include "gemm/kernels_cuda.h"
#include "gemm/quantize_tokens.cuh"
#include "gemm/staged.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_e4m3.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = kScaleBlock, kRowBytes = kStepColumns;
constexpr int kFewCtas = 90;  // fewer leave too much of the chip idle

enum class Ways { kOne, kTurn, kPair };  // through K, as in linear_bf16.cu: one range, two in turn, a CTA for each of two

// splits: as in linear_bf16.cu. quantizes: x is bfloat16. Activation: of the residual stream and SiLU-mul.
template <int units_, int tokens_, Ways ways, bool splits_ = false, bool quantizes_ = false, typename Activation_ = bf16> struct Tile {
  using Activation = Activation_;
  static constexpr int units = units_, tokens = tokens_;  // of 64 outputs
  static constexpr bool pair = ways == Ways::kPair, turn = ways == Ways::kTurn, splits = splits_, quantizes = quantizes_;
  static constexpr bool many = tokens > 64 || splits, staged = many && std::is_same_v<Activation, bf16>;
  // Few rows: each warpgroup has a unit. Of many there are two, with half of the tokens each or, where tokens are split already or ranges take turns, of the units. The more units a
  // warpgroup has, the fewer loads of the tokens' scales: those wait for the tensor cores, whose operands take nearly all that shared memory gives, and hold them up.
  static constexpr int beside = staged && !splits && !turn ? 2 : 1, warpgroups = staged ? 2 : units, height = units * beside / warpgroups;
  static constexpr int share = !pair && many ? 2 : 1, cluster = pair ? 2 : share;  // CTAs that bring their tokens together, or their weights
  static constexpr int box = splits ? tokens : tokens / share;                     // the tokens a CTA brings
  // Behind the warpgroups: the producer, the warps that make the rows' scales, the quantisers. The first four give registers to warpgroups that need more than an even share.
  static constexpr bool takes = many && height * tokens / beside > 128;
  static constexpr int assistants = takes || tokens > 128 ? 3 : 1;
  static constexpr int even = 168, given = 56, taken = 224;  // registers a thread
  static constexpr int outputs = 64 * units, threads = 128 * warpgroups + 32 + 32 * assistants + (quantizes ? 32 * kQuantizers : 0);
  // Of few rows so few that CTAs of attention find room beside them.
  static constexpr int few_registers = tokens <= 16 ? 64 : tokens <= 32 ? 72 : units > 2 ? 80 : 96;
  static constexpr int registers = many ? even : few_registers;
  static_assert(!takes || given + warpgroups * taken <= (warpgroups + 1) * even);
  static constexpr int weight_bytes = units * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int fragments = tokens / 8, values = tokens / 2 / beside;  // of a unit; of a thread's part of it
  // The tokens in parts, one after the other: registers for the sums of one. 64 at a time cost the tensor cores nothing.
  static constexpr int own_tokens = tokens / beside, part_tokens = units > 3 && !many ? own_tokens / 2 : own_tokens % 80 == 0 ? 80 : own_tokens < 64 ? own_tokens : 64, parts = own_tokens / part_tokens;
  static constexpr int fragment_bytes = 16 * 128 * units;
  // What the other CTA of a pair sends: half of the fragments. Over the stages where it is large.
  static constexpr int inbox_bytes = pair ? fragments / 2 * fragment_bytes : 0;
  static constexpr bool own_inbox = pair && tokens <= 32;
  // Of two ranges in turn, half of the first's sums stays in registers, half goes to shared memory. [kept / 4][thread of the warpgroups] of 4 values
  static constexpr int kept = turn ? values / 2 : 0, kept_bytes = kept * 4 * 128 * warpgroups;

  using Tail = std::conditional_t<staged, StagedShared<warpgroups, tokens, (turn ? 1 : 2)>, EpilogueShared<units, tokens>>;
  using Ending = std::conditional_t<staged, StagedEpilogue<Tail, float>, Epilogue<Tail, Activation, float>>;

  static constexpr int shared_bytes(int stages) {
    return stages * (stage_bytes + tokens * 4) + (own_inbox ? inbox_bytes : kept_bytes) + (quantizes ? kRingBytes : 0) + static_cast<int>(sizeof(Tail)) + (2 * stages + 1) * 8;
  }
};

template <typename T> __global__ void __maxnreg__(T::registers)
linear_fp8_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearFp8Params fp8, int num_stages) {
  constexpr bool pair = T::pair;
  const LinearParams& p = fp8.linear;
  extern __shared__ __align__(1024) char shared[];
  // stages, x's scales of each stage, the inbox where it has a place of its own or the sums that are kept, the quantisers' ring, the epilogue's, barriers
  const int after = num_stages * (T::stage_bytes + T::tokens * 4), ring_at = after + (T::own_inbox ? T::inbox_bytes : T::kept_bytes), tail_at = ring_at + (T::quantizes ? kRingBytes : 0);
  const uint32_t stages = ptx::shared_address(shared), scales = stages + num_stages * T::stage_bytes, inbox = T::own_inbox ? stages + after : stages;
  typename T::Tail& tail = *reinterpret_cast<typename T::Tail*>(shared + tail_at);
  const uint32_t full = stages + tail_at + sizeof(typename T::Tail), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const uint32_t scales_made = ptx::shared_address(&tail.full), scales_read = ptx::shared_address(&tail.empty);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = T::cluster > 1 ? __shfl_sync(0xffffffffu, ptx::cluster_rank(), 0) : 0;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns, middle = all_steps / 2;  // where the second of two ranges begins
  const int begin = pair && rank == 1 ? middle : 0, steps = pair && rank == 0 ? middle : all_steps - begin;
  // A tile: of the cluster. A pair has one. Where the tokens are split, tiles count units: every cluster has the same number of them but for one, and takes them by `units`.
  const int slot = T::share > 1 ? rank : 0, units_all = (p.out_features + 63) / 64, cluster = blockIdx.x / T::cluster, clusters = gridDim.x / T::cluster;
  const int blocks = T::splits ? 1 : (p.rows + T::tokens - 1) / T::tokens;
  const int tiles = T::splits ? units_all * (cluster + 1) / clusters : blocks * ((units_all + T::share * T::units - 1) / (T::share * T::units));
  const int first_tile = T::splits ? units_all * cluster / clusters : cluster, tile_step = T::splits ? T::units : clusters;
  auto row_of = [&](int tile) { return T::splits ? slot * T::tokens : tile % blocks * T::tokens; };
  auto output_of = [&](int tile) { return T::splits ? tile * 64 : (tile / blocks * T::share + slot) * T::outputs; };

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, T::quantizes ? 1 + p.rows : 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups * T::share);
    }
    if (pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(scales_made, 32 * T::assistants);
    ptx::mbarrier_init(scales_read, 4 * T::warpgroups);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (T::share > 1 || T::own_inbox) ptx::cluster_arrive_relaxed();
  if (T::share > 1) ptx::cluster_wait();  // copies go to both

  if (warp >= 4 * T::warpgroups) {
    if constexpr (T::takes) ptx::give_registers<T::given>();
    if (T::quantizes && warp > 4 * T::warpgroups + T::assistants) {
      const Pipeline pipeline{shared + T::weight_bytes, T::stage_bytes, reinterpret_cast<float*>(shared + (scales - stages)), T::tokens, shared + ring_at, full, empty, num_stages};
      quantize_tokens(p, pipeline, begin, steps, (tiles - first_tile + tile_step - 1) / tile_step, warp - 4 * T::warpgroups - T::assistants - 1);
    } else if (warp > 4 * T::warpgroups) {
      constexpr int all = pair ? T::tokens / 2 : T::tokens, each = (all / 8 + T::assistants - 1) / T::assistants * 8;  // whole rounds of eight tokens
      const int first = pair ? rank * all : 0, from = first + (warp - 4 * T::warpgroups - 1) * each;
      assist<typename T::Activation, (T::tokens <= 16 ? 1 : T::many && !T::takes ? 4 : 2)>(p, tail, output_of(first_tile), T::outputs, first_tile, tile_step, tiles, blocks, row_of(0), from,
                                                                               min(from + each, first + all));
    } else if (lane == 0) {
      // Every CTA reads x. Few rows' weights pass once, and would displace from L2 what the next kernels need: their code above all.
      const uint64_t keep = ptx::evict_last_policy(), pass = ptx::evict_first_policy();
      const int pitch = scale_pitch(p.rows);
      bool waited = false;
      int s = 0, parity = 1;  // the stage to fill, over all tiles; of its `empty` barrier, which counts as complete the first time round
      auto advance = [&] {
        if (++s == num_stages) {
          s = 0;
          parity ^= 1;
        }
      };
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int first_row = row_of(tile), first_output = output_of(tile), units_left = (T::splits ? tiles : units_all) - first_output / 64;
        const int units = T::share > 1 ? max(0, min(T::units, units_left)) : min(T::units, units_left), scale_bytes = min(T::tokens, pitch - first_row) * 4;
        const char* weight = static_cast<const char*>(p.weight) + (static_cast<int64_t>(first_output / 64) * all_steps + begin) * kUnitBytes;
        // Loops as they stand: unrolled, the way to the first copy is through cold instructions (epilogue.cuh).
        auto copy_weights = [&](int step, int s) {
          ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + (T::quantizes ? 0 : T::tokens * kRowBytes + scale_bytes));
#pragma unroll 1
          for (int u = T::splits ? slot : 0; u < units; u += T::splits ? 2 : 1) {
            const uint32_t to = stages + s * T::stage_bytes + u * kUnitBytes;
            const char* from = weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes;
            if (T::splits) ptx::bulk_load_to_all(to, from, kUnitBytes, full + 8 * s, 3);
            else if (T::turn || T::tokens > 160 || (T::many && blocks > 1)) ptx::bulk_load(to, from, kUnitBytes, full + 8 * s);
            else ptx::bulk_load(to, from, kUnitBytes, full + 8 * s, pass);
          }
        };
        auto copy_tokens = [&](int step, int s) {
          const int part = T::splits ? 0 : slot * T::box, column = (begin + step) * kStepColumns;
          const uint32_t to = stages + s * T::stage_bytes + T::weight_bytes + part * kRowBytes;
          if constexpr (T::share > 1 && !T::splits) ptx::tma_load_to_all(to, &x_map, column, first_row + part, full + 8 * s, 3, keep);
          else ptx::tma_load(to, &x_map, column, first_row, full + 8 * s, keep);
          ptx::bulk_load(scales + s * T::tokens * 4, fp8.x_scale + static_cast<int64_t>(begin + step) * pitch + first_row, scale_bytes, full + 8 * s);
        };
        int step = 0;
        if (!waited) {
          const int ahead = T::splits || first_row == 0 ? min(steps, num_stages) : 0;  // the first block of rows always runs: weights may come before the number of rows is known
#pragma unroll 1
          for (int i = 0; i < ahead; ++i) copy_weights(i, i);
          if constexpr (!T::quantizes) {
            ptx::grid_dependency_wait();
#pragma unroll 1
            for (int i = 0; i < ahead; ++i) copy_tokens(i, i);
          }
          step = ahead;
          s = ahead % num_stages;
          parity = ahead == num_stages ? 0 : 1;
          waited = true;
        }
        if (!T::splits && first_row > 0 && first_row >= *p.num_rows) continue;
        // The next kernel may start when the last loads are on their way: earlier, it would only hold registers and shared memory.
        const int start = tile + tile_step >= tiles ? max(step, steps - num_stages) : steps + 1;
        auto start_next = [&] {
          if (T::quantizes) ptx::grid_dependency_wait();  // of few steps, no stage may ever have been full: nobody here may have waited yet (ptx/dependency.cuh)
          ptx::launch_dependents();
        };
        if (start == steps) start_next();  // all are on their way
#pragma unroll 1
        for (; step < steps; ++step) {
          ptx::mbarrier_wait(empty + 8 * s, parity);
          if (step == start) start_next();
          copy_weights(step, s);
          if (!T::quantizes) copy_tokens(step, s);
          advance();
        }
      }
      if (T::share > 1)  // the other's last arrivals at these barriers come before this CTA ends
#pragma unroll 1
        for (int i = 0; i < num_stages; ++i) {
          ptx::mbarrier_wait(empty + 8 * s, parity);
          advance();
        }
    }
    __syncwarp();
    if (T::cluster > 1 && !T::own_inbox) ptx::cluster_arrive_relaxed();
    if (T::cluster > 1) ptx::cluster_wait();
  } else {
    if constexpr (T::takes) ptx::take_registers<T::taken>();
    const int warpgroup = __shfl_sync(0xffffffffu, warp / 4, 0), unit = T::beside > 1 ? 0 : warpgroup * T::height, half = T::beside > 1 ? warpgroup : 0;  // half: of the tokens
    int s = 0, parity = 0;  // the stage in use, over all tiles; the parity of its barrier, and in bit 1 that of the scales'
    ptx::grid_dependency_wait();               // nothing is lost: there are no tokens before
    const int rows = __shfl_sync(0xffffffffu, min(*p.num_rows, p.rows), 0);
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const int first_row = row_of(tile), first_output = output_of(tile) + unit * 64;
      if (!T::splits && first_row > 0 && first_row >= rows) continue;
      const int present = T::splits ? min(T::height, tiles - tile - unit) : T::height;  // of this warpgroup's units
      const int output = first_output + warp % 4 * 16 + lane / 4;  // of this thread's fragments, and 8 further on
      int scales_at = fp8.weight_blocks > 1 ? begin * p.out_features : 0;  // of the weights, the next step's
      auto scale_at = [&](int u, int half) { return __ldg(fp8.weight_scale + (scales_at + min(output + 64 * u + 8 * half, p.out_features - 1))); };
      constexpr int part_tokens = T::part_tokens, part_values = part_tokens / 2;
      float next[T::height][2], part[part_values], sum[T::height][T::values], first_sum[T::turn ? T::values - T::kept : 1];
      auto ask_scales = [&] {
#pragma unroll
        for (int u = 0; u < T::height; ++u) {
          next[u][0] = scale_at(u, 0);
          next[u][1] = scale_at(u, 1);
        }
      };
      ask_scales();
      auto kept = [&](int i) -> float4& { return reinterpret_cast<float4*>(shared + after)[i * 32 * T::warpgroups + threadIdx.x]; };
      int step = 0;
#pragma unroll 1
      for (int range = 0; range < (T::turn ? 2 : 1); ++range) {
        if (T::turn && range == 1) {
#pragma unroll
          for (int i = 0; i < T::kept; i += 4) kept(i) = make_float4(sum[0][i], sum[0][i + 1], sum[0][i + 2], sum[0][i + 3]);
#pragma unroll
          for (int i = T::kept; i < T::values; ++i) first_sum[i - T::kept] = sum[0][i];
        }
#pragma unroll
        for (int u = 0; u < T::height; ++u)
#pragma unroll
          for (int i = 0; i < T::values; ++i) sum[u][i] = 0.0f;
        const int range_end = T::turn && range == 0 ? middle : steps;
#pragma unroll 1
        for (; step < range_end; ++step) {
          float scale[T::height][2];
#pragma unroll
          for (int u = 0; u < T::height; ++u) {
            scale[u][0] = next[u][0];
            scale[u][1] = next[u][1];
          }
          if (fp8.weight_blocks > 1 && step + 1 < steps) {
            scales_at += p.out_features;
            ask_scales();
          }
          ptx::mbarrier_wait(full + 8 * s, parity & 1);
          const uint64_t a = ptx::wgmma_descriptor(stages + s * T::stage_bytes + unit * kUnitBytes);
          const uint64_t b = ptx::wgmma_descriptor(stages + s * T::stage_bytes + T::weight_bytes + half * (T::own_tokens * kRowBytes));
          const float2* x_scale = reinterpret_cast<const float2*>(shared + (scales - stages)) + s * T::tokens / 2 + half * (T::own_tokens / 2) + lane % 4;
#pragma unroll
          for (int i = 0; i < T::parts; ++i) {
            float2 x[part_values / 4];  // of many rows loaded before the products
            if (T::many)
#pragma unroll
              for (int j = 0; j < part_values; j += 4) x[j / 4] = x_scale[i * part_values + j];
#pragma unroll
            for (int u = 0; u < T::height; ++u) {
              if (T::splits && u >= present) break;
              ptx::wgmma_fence();
#pragma unroll
              for (int k = 0; k < kStepColumns / 32; ++k) ptx::wgmma_e4m3(part, a + u * (kUnitBytes >> 4) + 2 * k, b + i * (part_tokens * kRowBytes >> 4) + 2 * k, k > 0);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
              ptx::wgmma_results(part);
#pragma unroll
              for (int j = 0; j < part_values; j += 4) {
                if (!T::many) x[j / 4] = x_scale[i * part_values + j];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  float& to = sum[u][i * part_values + j + e];
                  to = __fmaf_rn(part[j + e], (e & 1 ? x[j / 4].y : x[j / 4].x) * scale[u][e >> 1], to);
                }
              }
            }
          }
          __syncwarp();
          if (T::share > 1 && lane < T::share) ptx::mbarrier_arrive_of(lane, empty + 8 * s);  // this warp is done with the stage
          if (T::share == 1 && lane == 0) ptx::mbarrier_arrive(empty + 8 * s);
          if (++s == num_stages) {
            s = 0;
            parity ^= 1;
          }
        }
      }
      if constexpr (T::turn) {
#pragma unroll
        for (int i = 0; i < T::kept; i += 4) add_four(sum[0] + i, kept(i));
#pragma unroll
        for (int i = T::kept; i < T::values; ++i) sum[0][i] = first_sum[i - T::kept] + sum[0][i];
      }
      auto ending = [&](int u) -> typename T::Ending { return {p, tail, warpgroup, first_row, rows, first_output + 64 * u}; };
      if (p.squares) {
        ptx::mbarrier_wait(scales_made, parity >> 1);
        parity ^= 2;
      }
      if constexpr (pair) {
        // Rank 0 has the sum of the first range, rank 1 that of the second. Rank 0 finishes the first half of the tokens.
        constexpr int own = T::fragments / 2, stride = T::warpgroups * T::height / T::beside * 2048;  // stride: between fragments of all units in the inbox
        const int in_use = (min(rows - first_row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int awaited = rank == 0 ? min(in_use, own) : max(in_use - own, 0);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * T::fragment_bytes);
        if (!T::own_inbox) ptx::cluster_arrive_relaxed();  // this CTA is done with its stages
        ptx::cluster_wait();
        const uint32_t bell = ptx::shared_address_of(1 - rank, received);
        auto place = [&](int u) { return (unit + u) * 2048 + threadIdx.x % 128 * 16; };
        if constexpr (T::staged) {  // one warpgroup has what this CTA finishes, the other what it sends
          const uint32_t to = ptx::shared_address_of(1 - rank, inbox + place(0));
          if (half != rank) {
#pragma unroll
            for (int u = 0; u < T::height; ++u)
#pragma unroll
              for (int j = 0; j < own; ++j)
                if (j < in_use - awaited) ptx::store_shared_of(to + j * stride + u * 2048, sum[u][4 * j], sum[u][4 * j + 1], sum[u][4 * j + 2], sum[u][4 * j + 3], bell);
          } else {
            ptx::mbarrier_wait(received, 0);
#pragma unroll
            for (int u = 0; u < T::height; ++u) {
#pragma unroll
              for (int j = 0; j < own; ++j)
                if (j < awaited) add_four(sum[u] + 4 * j, *reinterpret_cast<const float4*>(shared + (inbox - stages) + place(u) + j * stride));
              ending(u).finish(8 * rank * own, sum[u]);
            }
          }
        } else {
          float mine[4 * own], theirs[4 * own];
#pragma unroll
          for (int i = 0; i < 4 * own; ++i) {
            mine[i] = rank == 0 ? sum[0][i] : sum[0][4 * own + i];
            theirs[i] = rank == 0 ? sum[0][4 * own + i] : sum[0][i];
          }
          const uint32_t to = ptx::shared_address_of(1 - rank, inbox + place(0));
          for_each_fragment<1>(theirs, [&](int j, float(&d)[4]) {
            if (j < in_use - awaited) ptx::store_shared_of(to + j * stride, d[0], d[1], d[2], d[3], bell);
          });
          const int first = 8 * rank * own;
          const float4* from = reinterpret_cast<const float4*>(shared + (inbox - stages) + place(0));
          const auto epilogue = ending(0);
          auto stream = epilogue.residual(first);
          ptx::mbarrier_wait(received, 0);
          for_each_fragment<1>(mine, [&](int j, float(&d)[4]) {
            if (j >= awaited) return;
            const auto next = epilogue.residual(first + 8 * (j + 1));
            add_four(d, from[j * (stride / 16)]);
            epilogue.finish(first + 8 * j, d, stream);
            stream = next;
          });
          epilogue.finish_squares(first, first + 8 * own);
        }
      } else if constexpr (T::staged) {
#pragma unroll
        for (int u = 0; u < T::height; ++u)
          if (u < present) ending(u).finish(half * T::own_tokens, sum[u]);
      } else {
        const auto epilogue = ending(0);
        auto stream = epilogue.residual(0);
        for_each_fragment<1>(sum[0], [&](int j, float(&d)[4]) {
          if (first_row + 8 * j >= rows) return;
          const auto next = epilogue.residual(8 * (j + 1));
          epilogue.finish(8 * j, d, stream);
          stream = next;
        });
        epilogue.finish_squares(0, T::tokens);
      }
      __syncwarp();
      if (pair) break;  // one tile: nothing is kept for another
      if (p.squares && lane == 0) ptx::mbarrier_arrive(scales_read);
    }
    if (T::share > 1) {  // the other may still arrive at this CTA's barriers
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  }
}

template <typename T> void launch_tile(const LinearFp8Params& fp8, cudaStream_t stream) {
  const LinearParams& p = fp8.linear;
  const CUtensorMap x = T::quantizes ? CUtensorMap{} : tensor_map_e4m3(p.x, p.rows, p.in_features, T::box);
  const int tiles = T::splits ? ceil_div(p.out_features, 64) : ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::share * T::outputs);
  const int ctas = T::cluster * (T::pair ? tiles : std::min(tiles, num_sms() / T::cluster));
  constexpr int kSmallBytes = 91000;  // 64 rows of a layer that narrows: two an SM (o 8.7 us instead of 9.7)
  const int budget = T::many ? kWholeBytes : T::tokens > 32 && p.out_features <= p.in_features ? kSmallBytes : few_bytes(T::tokens);
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= budget) ++stages;
  // Of one row, each quantiser fills a stage of its own, and a barrier's parity tells one round from the next alone.
  static_assert(!T::quantizes || T::shared_bytes(kQuantizers) <= few_bytes(T::tokens));
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_fp8_kernel<T>, x, fp8, stages);
}

// Blocks of 16 to 64 tokens, as the rows need.
template <int warpgroups, Ways ways> void launch_few(const LinearFp8Params& fp8, cudaStream_t stream) {
  const int rows = fp8.linear.rows;
  static_assert(kSelfQuantizedRows <= 16, "one block of tokens");
  if (fp8.linear.dtype == DType::kBF16) launch_tile<Tile<warpgroups, 16, ways, false, true>>(fp8, stream);
  else if (rows <= 16) launch_tile<Tile<warpgroups, 16, ways>>(fp8, stream);
  else if (rows <= 32) launch_tile<Tile<warpgroups, 32, ways>>(fp8, stream);
  else launch_tile<Tile<ways == Ways::kPair ? warpgroups : 4, 64, ways>>(fp8, stream);  // the tokens' way from L2 begins to count: once for more outputs
}

// float32 activations are for parity checks: one shape of tile, whatever the rows.
template <Ways ways> void launch_f32(const LinearFp8Params& fp8, cudaStream_t stream) { launch_tile<Tile<1, 128, ways, false, false, float>>(fp8, stream); }

}  // namespace

void launch_linear_fp8_cuda(const LinearFp8Params& fp8, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  require_hopper("linear_fp8", "e4m3");
  const LinearParams& p = fp8.linear;
  const bool one_range = num_ranges(p.out_features) == 1;
  const int sms = num_sms();
  auto pairs = [&](int warpgroups) { return ceil_div(p.out_features, 64 * warpgroups) * ceil_div(p.rows, 128); };
  if (p.finish != Finish::kStore && p.out_dtype == DType::kF32) one_range ? launch_f32<Ways::kOne>(fp8, s) : launch_f32<Ways::kPair>(fp8, s);
  else if (one_range) {
    if (p.rows <= 64) launch_few<2, Ways::kOne>(fp8, s);
    else if (p.rows <= 128) launch_tile<Tile<4, 64, Ways::kOne, true>>(fp8, s);
    else if (p.rows <= 160) launch_tile<Tile<4, 80, Ways::kOne, true>>(fp8, s);
    else launch_tile<Tile<2, 256, Ways::kOne>>(fp8, s);
  } else if (p.rows <= 64) {
    // Narrower CTAs, so that a small weight still occupies the chip.
    2 * pairs(2) < kFewCtas ? launch_few<1, Ways::kPair>(fp8, s) : launch_few<2, Ways::kPair>(fp8, s);
  } else if (p.rows > 256 && ceil_div(p.rows, 192) * ceil_div(p.out_features, 128) >= kFewCtas) {
    launch_tile<Tile<2, 192, Ways::kTurn>>(fp8, s);
  } else if (p.rows > 128 && p.rows <= 160 && 2 * ceil_div(p.out_features, 128) <= sms) {  // one block of tokens: the weights once
    2 * ceil_div(p.out_features, 64) <= sms ? launch_tile<Tile<1, 160, Ways::kPair>>(fp8, s) : launch_tile<Tile<2, 160, Ways::kPair>>(fp8, s);
  } else if (2 * pairs(1) <= sms) {
    launch_tile<Tile<1, 128, Ways::kPair>>(fp8, s);
  } else if (2 * pairs(2) <= sms) {
    launch_tile<Tile<2, 128, Ways::kPair>>(fp8, s);
  } else {
    launch_tile<Tile<3, 128, Ways::kPair>>(fp8, s);
  }
}

}  // namespace specrt
