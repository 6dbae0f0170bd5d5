// bfloat16 linear on Hopper's warpgroup tensor cores: 64 to 256 weight rows on the wide side, 16 to 256 tokens on the narrow one.
//
// One kernel, three ways through K (params.h has the order; which way runs, who shares what, and how deep the pipeline is, changes no bit):
//   one range:       a CTA walks all of K.
//   ranges in turn:  a CTA walks the two ranges one after the other and keeps the first's sum beside the running one. Many rows (prefill).
//   a pair of CTAs:  each walks one of the ranges; for half of the tokens each, the sum goes to the other through distributed shared memory. Few rows: a small
//                    weight still occupies the chip.
// In the first two a CTA stays and takes tile after tile. A producer thread keeps `stages` steps of 64 columns in flight by bulk copies, across tiles.
//
// Few rows: the time is the weights' way from memory, and what is lost is lost between kernels. So the next kernel of the stream starts (programmatic dependent launch)
// when the last loads of this one are on their way, and fills its pipeline with weights while this one still works. Not sooner: kernels that wait hold registers and shared
// memory that the one before them needs (a decode step of the 8B shape took 6.34 ms with a start at once, 6.02 so). That needs room, evenly: a kernel that finds room for two of its
// CTAs on an SM leaves other SMs empty. So only one fits (tile.cuh): it comes where one of the kernel before has ended, or where there was none. Weights that come to L2 beyond that,
// ahead of the wait, gain nothing: attention, which reads meanwhile, loses as much. The code is short: what lies straight on for every fragment of a tile does not stay in an SM's
// instruction cache, and every kernel would fetch it from memory again.
//
// Many rows: the way from L2 and shared memory counts as much, so two CTAs share what both need. With outputs of their own, each brings half of the tokens and multicasts them to both.
// Or each has half of the tokens, of all outputs, and brings half of the weights: a cluster then takes any number of units of 64 outputs, all clusters the same (161 to 256 rows of
// 28672 outputs: 7 units for each of 64, where tiles of four would be two for some and one for others). Not more than two CTAs: of clusters of four that fill their SMs, the card's uneven
// groups of SMs hold 30 (120 SMs), and o and down of the 8B shape have 32 blocks of 128 outputs. Products on 128 tokens read shared memory faster than it is (160 of 128 bytes a cycle,
// with the copies' writes), on 256 just not.
// Bytes: the weights once per block of tokens, x once per block of weight rows, or per two that share (from L2).
#include <algorithm>
#include <type_traits>

#include "base/launch.h"
#include "base/tensor_map.h"
#include "gemm/choose.cuh"
#include "gemm/kernels_cuda.h"
#include "gemm/staged.cuh"
#include "gemm/walk.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = 64, kRowBytes = kStepColumns * 2;
constexpr int kStepsToL2 = 4;  // of weights, beyond the pipeline, that come to L2 while the first tokens are on their way

enum class Ways { kOne, kTurn, kPair };  // through K: see the top

// splits: of two CTAs that share, each has half of the tokens and all of the outputs, and they share the weights; otherwise each has its outputs, and they share the tokens.
// chooses: the finish is kChoose, of kernels of its own, since it takes shared memory and registers that the others need.
template <int warpgroups_, int tokens_, Ways ways_, bool splits_ = false, bool chooses_ = false> struct Tile {
  static constexpr int warpgroups = warpgroups_, tokens = tokens_;
  static constexpr bool splits = splits_;
  static constexpr Ways ways = ways_;
  static constexpr bool chooses = chooses_;
  static_assert(!chooses || (warpgroups == 2 && ways != Ways::kPair), "a block of 128 outputs");
  static constexpr bool pair = ways == Ways::kPair;
  static constexpr int share = !pair && tokens > 32 ? 2 : 1;  // neighbouring CTAs, of different outputs, that bring their tokens together
  static constexpr int cluster = pair ? 2 : share;
  static constexpr int outputs = 64 * warpgroups, values = tokens / 2, fragments = tokens / 8;  // of the tile, a thread
  // Behind the warpgroups one warp is the producer, and one makes the rows' scales; of many rows three, or products wait for them (160 rows: gate/up 91 us instead of 86). Where the
  // warpgroups need more than an even share of the registers, these four give most of their own.
  static constexpr bool takes = tokens > 192 || (tokens > 128 && ways == Ways::kTurn) || warpgroups > 3;
  static constexpr int assistants = takes || tokens > 128 ? 3 : 1;
  static constexpr int even = warpgroups > 3 ? 96 : 168, given = warpgroups > 3 ? 64 : 56, taken = warpgroups > 3 ? 104 : 224;  // registers a thread: what so many threads can have
  static_assert(!takes || 128 * given + 128 * warpgroups * taken <= (128 + 128 * warpgroups) * even);
  static constexpr int threads = 128 * warpgroups + 32 + 32 * assistants;
  static constexpr bool one_block = pair ? tokens != 128 : ways == Ways::kOne && tokens < 256;  // it never has more rows (the choice at the end of this file)
  static constexpr int box = splits ? tokens : tokens / share;  // the tokens a CTA brings
  static constexpr int weight_bytes = warpgroups * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int own = fragments / 2, fragment_bytes = 16 * 128 * warpgroups;  // of a pair, each finishes half of the fragments of 8 tokens
  // What the other CTA of a pair sends: [own][thread of the warpgroups] of 4 values. Over the stages where it is large.
  static constexpr int inbox_bytes = pair ? own * fragment_bytes : 0;
  static constexpr bool own_inbox = pair && tokens <= 32;
  // Whether the wgmmas of a step overlap with those of the next: worth a stage of memory only where they take long, and less where many warpgroups take turns.
  static constexpr int lag = (tokens > 64 && warpgroups < 4) || ways == Ways::kTurn;
  // So few registers (64, or at most 96) that CTAs of attention find room beside them: as CTAs an SM for the compiler.
  static constexpr int few_registers = splits ? 1 : tokens <= 32 ? (warpgroups == 1 ? 5 : 3) : tokens <= 64 ? (warpgroups == 1 ? 4 : 2) : 1;
  static constexpr bool staged = tokens > 32 && !chooses;  // the way out, by shared memory
  static constexpr bool many = tokens > 64 || splits;    // arithmetic and the tokens' way from L2 count too: deep pipelines gain more than an early start

  // Of two ranges in turn, the first's sum stays in registers, but for so many values of each thread, which go to shared memory. [kept / 4][thread of the warpgroups] of 4 values
  static constexpr int kept = ways == Ways::kTurn && tokens > 192 ? 64 : 0, kept_bytes = kept * 4 * 128 * warpgroups;

  using Plain = std::conditional_t<staged, StagedShared<warpgroups, tokens, (tokens <= 64 || warpgroups > 3 || kept > 0 ? 1 : 2)>, EpilogueShared<warpgroups, tokens>>;
  using Tail = std::conditional_t<chooses, ChooseShared<tokens>, Plain>;
  using PlainEnding = std::conditional_t<staged, StagedEpilogue<Tail, bf16, (tokens > 64 && warpgroups <= 3)>, Epilogue<Tail>>;
  using Ending = std::conditional_t<chooses, ChooseEpilogue<Tail>, PlainEnding>;

  static constexpr int shared_bytes(int stages) { return stages * stage_bytes + (own_inbox ? inbox_bytes : 0) + kept_bytes + static_cast<int>(sizeof(Tail)) + (2 * stages + 1) * 8; }
};

constexpr int kHalfBytes = 113 << 10;  // two CTAs an SM

template <typename T> __global__ void __launch_bounds__(T::threads, T::few_registers)
linear_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearParams p, int num_stages) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t stages = ptx::shared_address(shared), inbox = T::own_inbox ? stages + num_stages * T::stage_bytes : stages;
  const int kept_at = num_stages * T::stage_bytes + (T::own_inbox ? T::inbox_bytes : 0), tail_at = kept_at + T::kept_bytes;
  typename T::Tail& tail = *reinterpret_cast<typename T::Tail*>(shared + tail_at);
  const uint32_t full = stages + tail_at + sizeof(typename T::Tail), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const uint32_t scales_made = ptx::shared_address(&tail.full), scales_read = ptx::shared_address(&tail.empty);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = T::cluster > 1 ? ptx::cluster_rank() : 0, slot = T::share > 1 ? rank : 0;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns, middle = all_steps / 2;  // where the second of two ranges begins
  const int begin = T::pair && rank == 1 ? middle : 0, steps = T::pair && rank == 0 ? middle : all_steps - begin;
  // Tiles (walk.cuh) are the cluster's; a pair has one. Where the tokens are split, they count units: every cluster has the same number of them but for one, and takes them by `warpgroups`.
  const int units_all = (p.out_features + 63) / 64, cluster = blockIdx.x / T::cluster, clusters = gridDim.x / T::cluster;
  const int blocks = T::one_block ? 1 : (p.rows + T::tokens - 1) / T::tokens, first_group = T::splits ? units_all * cluster / clusters : cluster / blocks;
  const int end_group = T::splits ? units_all * (cluster + 1) / clusters : (units_all + T::share * T::warpgroups - 1) / (T::share * T::warpgroups);
  auto walk_of = [&](int rows) -> Walk {
    if (T::one_block) return {first_group, end_group, T::splits ? T::warpgroups : clusters, 1};
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
    if (T::pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(scales_made, 32 * T::assistants);
    ptx::mbarrier_init(scales_read, 128 * T::warpgroups);  // every lane, which racecheck follows: it does not see that __syncwarp lets one speak for all
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (T::share > 1 || T::own_inbox) ptx::cluster_arrive_relaxed();
  if (T::splits) ptx::cluster_wait();  // weights go to both at once

  if (warp >= 4 * T::warpgroups) {
    if constexpr (T::takes) ptx::give_registers<T::given>();
    auto weights_of = [&](int first_output) { return static_cast<const char*>(p.weight) + (static_cast<int64_t>(first_output / 64) * all_steps + begin) * kUnitBytes; };
    auto units_of = [&](int first_output) { return max(0, min(T::warpgroups, (T::splits ? end_group : units_all) - first_output / 64)); };
    // Weights that pass once would displace from L2 what the next kernels need: their code, and what this one writes. Those that two blocks of tokens read must not go first (256 rows
    // so: 7.3 ms instead of 6.9, though the layers by themselves are as fast).
    auto copy_weights = [&](const char* weight, int units, int step, int s) {
      ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + T::tokens * kRowBytes);
#pragma unroll
      for (int u = 0; u < T::warpgroups; ++u)
        if (u < units) {
          const uint32_t to = stages + s * T::stage_bytes + u * kUnitBytes;
          const char* from = weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes;
          if constexpr (T::splits) {
            if (u % 2 == slot) ptx::bulk_load_to_all(to, from, kUnitBytes, full + 8 * s, 3);
          } else if (T::ways == Ways::kTurn || T::tokens > 192 || (T::many && blocks > 1)) {
            ptx::bulk_load(to, from, kUnitBytes, full + 8 * s);
          } else {
            ptx::bulk_load(to, from, kUnitBytes, full + 8 * s, ptx::evict_first_policy());
          }
        }
    };
    const uint64_t keep = ptx::evict_last_policy();  // of x: every CTA reads it
    auto copy_tokens = [&](int first_row, int step, int s) {
      const int part = T::splits ? 0 : slot * T::box, column = (begin + step) * kStepColumns, row = first_row + part;
      const uint32_t to = stages + s * T::stage_bytes + T::weight_bytes + part * kRowBytes;
      if constexpr (T::share > 1 && !T::splits) ptx::tma_load_to_all(to, &x_map, column, row, full + 8 * s, (1 << T::share) - 1, keep);
      else ptx::tma_load(to, &x_map, column, row, full + 8 * s, keep);
    };
    // The first block of rows always runs: its weights may come before the number of rows is known.
    const int ahead = T::one_block || cluster % blocks == 0 ? min(steps, num_stages) : 0, units = units_of(output_of(first_group));
    const char* weight = weights_of(output_of(first_group));
    const bool producer = warp == 4 * T::warpgroups && lane == 0;
    if (producer) {
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_weights(weight, units, i, i);
      ptx::prefetch_tensor_map(&x_map);
    }
    __syncwarp();
    if (T::share > 1 && !T::splits) ptx::cluster_wait();  // the other's barriers are there; by all warps, before one waits for another: racecheck holds them here until all come
    if (warp > 4 * T::warpgroups) {
      constexpr int all = T::pair ? T::tokens / 2 : T::tokens, each = (all / 8 + T::assistants - 1) / T::assistants * 8;  // whole rounds of eight tokens
      const int first = T::pair ? rank * all : 0, begin = first + (warp - 4 * T::warpgroups - 1) * each, end = min(begin + each, first + all);
      if constexpr (T::chooses) assist_choice(p, tail, walk_of, begin, end);
      else assist<bf16, T::many && T::kept == 0 ? 4 : 2>(p, tail, output_of(first_group), T::outputs, walk_of, row_of(0), begin, end);
    }
    ptx::grid_dependency_wait();
    if (producer) {
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) copy_tokens(row_of(0), i, i);
      const int further = ahead ? min(steps - ahead, kStepsToL2) : 0;
#pragma unroll 1
      for (int u = 0; u < units && further > 0; ++u) ptx::bulk_prefetch_l2(weight + (static_cast<int64_t>(u) * all_steps + ahead) * kUnitBytes, further * kUnitBytes);
      const Walk walk = walk_of(T::one_block ? 0 : min(*p.num_rows, p.rows));
      produce<(T::share > 1)>(walk, ahead, steps, empty, num_stages, [&](int tile) {
        const int output = output_of(tile / walk.blocks), row = row_of(tile % walk.blocks), units = units_of(output);
        return [&, row, units, weight = weights_of(output)](int step, int s) {
          copy_weights(weight, units, step, s);
          copy_tokens(row, step, s);
        };
      });
    }
    __syncwarp();
    if (T::cluster > 1 && !T::own_inbox) ptx::cluster_arrive_relaxed();
    if (T::cluster > 1) ptx::cluster_wait();
  } else {
    if constexpr (T::takes) ptx::take_registers<T::taken>();
    const int warpgroup = warp / 4;
    Ring ring{0, 0};  // the stage in use, over all tiles; in bit 1 of its parity that of the scales' barrier
    auto release = [&](int stage) {  // this warp is done with it
      if (T::share > 1 && lane < T::share) ptx::mbarrier_arrive_of(lane, empty + 8 * stage);
      if (T::share == 1 && lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    };
    ptx::grid_dependency_wait();  // nothing is lost: there are no tokens before
    if (T::share > 1 && !T::splits) ptx::cluster_wait();
    const int rows = min(*p.num_rows, p.rows);
    const Walk walk = walk_of(rows);
    for (int tile = walk.first; tile < walk.end; tile += walk.step) {
      constexpr bool turn = T::ways == Ways::kTurn;
      float sum[T::values], first_sum[turn ? T::values - T::kept : 1] = {};  // zeros: or the compiler keeps the last tile's through the epilogue
      float4* const kept = reinterpret_cast<float4*>(shared + kept_at) + threadIdx.x;
#pragma unroll 1
      for (int range = 0; range < (turn ? 2 : 1); ++range) {
        if (turn && range == 1) {
#pragma unroll
          for (int i = 0; i < T::kept; i += 4) kept[i * 32 * T::warpgroups] = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
#pragma unroll
          for (int i = T::kept; i < T::values; ++i) first_sum[i - T::kept] = sum[i];
        }
#pragma unroll
        for (int i = 0; i < T::values; ++i) sum[i] = 0.0f;
        const int range_steps = turn ? (range == 0 ? middle : steps - middle) : steps;
#pragma unroll 1
        for (int step = 0; step < range_steps; ++step) {
          ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity & 1);
          const uint64_t a = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + warpgroup * kUnitBytes);
          const uint64_t b = ptx::wgmma_descriptor(stages + ring.stage * T::stage_bytes + T::weight_bytes);
          if (!T::splits || tile + warpgroup < walk.end) {
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStepColumns / 16; ++k) ptx::wgmma_bf16(sum, a + 2 * k, b + 2 * k);
            ptx::wgmma_commit();
            ptx::wgmma_wait<T::lag>();
          }
          if (T::lag == 0) release(ring.stage);
          else if (step > 0 || (range > 0 && middle > 0)) release((ring.stage == 0 ? num_stages : ring.stage) - 1);
          ring.advance(num_stages);
        }
        ptx::wgmma_wait<0>();
      }
      if (T::lag && steps > 0) release((ring.stage == 0 ? num_stages : ring.stage) - 1);
      const int row = row_of(tile % walk.blocks);
      const int first_output = output_of(tile / walk.blocks) + warpgroup * 64;
      const typename T::Ending epilogue{p, tail, warpgroup, row, rows, first_output};
      if (T::chooses || p.squares) {
        ptx::mbarrier_wait(scales_made, ring.parity >> 1);
        ring.parity ^= 2;
      }
      if constexpr (T::pair) {
        // Rank 0 has the sum of the first range, rank 1 that of the second. Rank 0 finishes the first half of the tokens.
        const int present = (min(rows - row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int lower = min(present, T::own), upper = present - lower, awaited = rank == 0 ? lower : upper, sent = present - awaited;
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * T::fragment_bytes);
        if (!T::own_inbox) ptx::cluster_arrive_relaxed();  // this CTA is done with its stages
        ptx::cluster_wait();
        float mine[4 * T::own], theirs[4 * T::own];
#pragma unroll
        for (int i = 0; i < 4 * T::own; ++i) {
          mine[i] = rank == 0 ? sum[i] : sum[4 * T::own + i];
          theirs[i] = rank == 0 ? sum[4 * T::own + i] : sum[i];
        }
        const uint32_t place = ptx::shared_address_of(1 - rank, inbox + threadIdx.x * 16), bell = ptx::shared_address_of(1 - rank, received);
        for_each_fragment<T::staged ? T::own : 1>(theirs, [&](int j, float (&d)[4]) {
          if (j < sent) ptx::store_shared_of(place + j * T::fragment_bytes, d[0], d[1], d[2], d[3], bell);
        });
        const int half = 8 * rank * T::own;
        const float4* from = reinterpret_cast<const float4*>(shared + (inbox - stages)) + threadIdx.x;
        auto add_other = [&](int j, float* d) { add_four(d, from[j * T::fragment_bytes / 16]); };
        if constexpr (T::staged) {
          ptx::mbarrier_wait(received, 0);
#pragma unroll
          for (int j = 0; j < T::own; ++j)
            if (j < awaited) add_other(j, mine + 4 * j);
          epilogue.finish(half, mine);
        } else {
          uint2 stream = epilogue.residual(half);
          ptx::mbarrier_wait(received, 0);
          for_each_fragment<1>(mine, [&](int j, float (&d)[4]) {
            if (j >= awaited) return;
            const uint2 next = epilogue.residual(half + 8 * (j + 1));
            add_other(j, d);
            epilogue.finish(half + 8 * j, d, stream);
            stream = next;
          });
          epilogue.finish_squares(half, half + 8 * T::own);
        }
      } else {
        if constexpr (turn) {
#pragma unroll
          for (int i = 0; i < T::kept; i += 4) add_four(sum + i, kept[i * 32 * T::warpgroups]);
#pragma unroll
          for (int i = T::kept; i < T::values; ++i) sum[i] = first_sum[i - T::kept] + sum[i];
        }
        if constexpr (T::staged) {
          if (!T::splits || tile + warpgroup < walk.end) epilogue.finish(0, sum);
        } else {
          uint2 stream = epilogue.residual(0);
          for_each_fragment<T::many ? 2 : 1>(sum, [&](int j, float (&d)[4]) {
            if (row + 8 * j >= rows) return;
            const uint2 next = epilogue.residual(8 * (j + 1));
            epilogue.finish(8 * j, d, stream);
            stream = next;
          });
          epilogue.finish_squares(0, T::tokens);
        }
      }
      if (T::chooses || p.squares) ptx::mbarrier_arrive(scales_read);
      __syncwarp();
    }
    if (T::share > 1) {  // the other may still arrive at this CTA's barriers
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
  }
}

template <typename T> void launch_tile(const LinearParams& p, cudaStream_t stream) {
  const CUtensorMap x = tensor_map_bf16(p.x, p.rows, p.in_features, T::box);
  const int tiles = T::splits ? ceil_div(p.out_features, 64) : ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::share * T::outputs), sms = multiprocessors();
  const int ctas = T::cluster * (T::pair ? tiles : std::min(tiles, sms / T::cluster));
  const int budget = T::many ? (ctas <= sms || T::warpgroups > 2 ? kWholeBytes : kHalfBytes) : few_bytes(T::tokens);
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= budget) ++stages;
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_kernel<T>, x, p, stages);
}

template <int warpgroups, Ways ways> void launch_few(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 16) launch_tile<Tile<warpgroups, 16, ways>>(p, stream);
  else if (p.rows <= 32) launch_tile<Tile<warpgroups, 32, ways>>(p, stream);
  else if (p.rows <= 64 || ways == Ways::kOne) launch_tile<Tile<warpgroups, 64, ways>>(p, stream);
  else launch_tile<Tile<warpgroups, 128, Ways::kPair>>(p, stream);
}

void launch_choice(const LinearParams& p, cudaStream_t stream) {
  if (num_ranges(p.out_features) == 2) launch_tile<Tile<2, 32, Ways::kTurn, false, true>>(p, stream);  // a small vocabulary
  else if (p.rows <= 16) launch_tile<Tile<2, 16, Ways::kOne, false, true>>(p, stream);
  else if (p.rows <= 32) launch_tile<Tile<2, 32, Ways::kOne, false, true>>(p, stream);
  else if (p.rows <= 64) launch_tile<Tile<2, 64, Ways::kOne, false, true>>(p, stream);
  else if (p.rows <= 128) launch_tile<Tile<2, 128, Ways::kOne, false, true>>(p, stream);
  else if (p.rows <= 160) launch_tile<Tile<2, 160, Ways::kOne, false, true>>(p, stream);
  else launch_tile<Tile<2, 256, Ways::kOne, false, true>>(p, stream);
}

}  // namespace

void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream) {
  require_hopper("linear", "bfloat16");
  if (p.finish == Finish::kChoose) return launch_choice(p, stream);
  const int sms = multiprocessors();
  auto pairs = [&](int warpgroups) { return ceil_div(p.out_features, 64 * warpgroups) * ceil_div(p.rows, 128); };
  constexpr int kEnoughCtas = 90;  // of 132 SMs: fewer than that read slower, even at 64 outputs a CTA
  if (num_ranges(p.out_features) == 1) {
    if (p.rows <= 64) launch_few<2, Ways::kOne>(p, stream);
    else if (p.rows <= 128) launch_tile<Tile<4, 64, Ways::kOne, true>>(p, stream);
    else if (p.rows <= 160) launch_tile<Tile<4, 80, Ways::kOne, true>>(p, stream);
    else if (p.rows <= 256) launch_tile<Tile<4, 128, Ways::kOne, true>>(p, stream);
    else launch_tile<Tile<2, 256, Ways::kOne>>(p, stream);
  } else if (p.rows > 256 && ceil_div(p.rows, 192) * ceil_div(p.out_features, 128) >= kEnoughCtas) {
    auto time = [&](int tokens) { return ceil_div(ceil_div(p.rows, tokens) * ceil_div(p.out_features, 256), sms / 2) * tokens; };
    time(192) < time(256) ? launch_tile<Tile<2, 192, Ways::kTurn>>(p, stream) : launch_tile<Tile<2, 256, Ways::kTurn>>(p, stream);
  } else if (p.rows > 128 && p.rows <= 160 && 2 * ceil_div(p.out_features, 128) <= sms) {  // one block of tokens: the weights once
    2 * ceil_div(p.out_features, 64) <= sms ? launch_tile<Tile<1, 160, Ways::kPair>>(p, stream) : launch_tile<Tile<2, 160, Ways::kPair>>(p, stream);
  } else if (p.rows <= 64 ? 2 * pairs(2) < kEnoughCtas : 2 * pairs(1) <= sms) {
    launch_few<1, Ways::kPair>(p, stream);  // narrower CTAs, so that a small weight still occupies the chip
  } else if (p.rows <= 64 || 2 * pairs(2) <= sms) {
    launch_few<2, Ways::kPair>(p, stream);
  } else {
    launch_tile<Tile<3, 128, Ways::kPair>>(p, stream);
  }
}

}  // namespace specrt
