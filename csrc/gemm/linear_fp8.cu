// FP8 linear on Hopper's warpgroup tensor cores: the structure of linear_bf16.cu (pairs of CTAs, pipelines of two sizes, early start), in steps of 128
// e4m3 columns. A step's sum starts from zero in the tensor cores and is promoted to fp32 registers at once (params.h has the order). K % 16 == 0.
// Bytes: the weights once per block of tokens; x and its scales once per block of weight rows (from L2).
#include "base/launch.h"
#include "base/math.h"
#include "base/tensor_map.h"
#include "gemm/kernels_cuda.h"
#include "gemm/tile.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_e4m3.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = kScaleBlock, kRowBytes = kStepColumns;
constexpr int kFewCtas = 90;  // fewer leave too much of the chip idle

// pair: two CTAs with half of K each; else one with all of it, which stays and takes tile after tile.
template <int warpgroups_, int tokens_, bool pair_> struct Tile {
  static constexpr int warpgroups = warpgroups_, tokens = tokens_;
  static constexpr bool pair = pair_;
  static constexpr int outputs = 64 * warpgroups, threads = 128 * warpgroups + 32;  // the last warp is the producer
  static constexpr int cluster = pair ? 2 : 1;
  static constexpr int weight_bytes = warpgroups * kUnitBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int values = tokens / 2, fragments = tokens / 8;  // of the tile, a thread
  static constexpr int fragment_bytes = 16 * 128 * warpgroups;
  // What the other CTA of a pair sends: half of the fragments. Over the stages where it is large.
  static constexpr int inbox_bytes = pair ? fragments / 2 * fragment_bytes : 0;
  static constexpr bool own_inbox = pair && tokens <= 32;

  static constexpr int shared_bytes(int stages) { return stages * (stage_bytes + tokens * 4) + (own_inbox ? inbox_bytes : 0) + (2 * stages + 1) * 8; }
};

template <typename T> __global__ void __launch_bounds__(T::threads, T::tokens <= 64 ? 2 : 1)
linear_fp8_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearFp8Params p, int num_stages) {
  constexpr bool pair = T::pair;
  extern __shared__ __align__(1024) char shared[];
  // stages, x's scales of each stage, the inbox where it has a place of its own, barriers
  const uint32_t stages = ptx::shared_address(shared), scales = stages + num_stages * T::stage_bytes, after = scales + num_stages * T::tokens * 4;
  const uint32_t inbox = T::own_inbox ? after : stages, full = after + (T::own_inbox ? T::inbox_bytes : 0), empty = full + num_stages * 8, received = empty + num_stages * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = pair ? ptx::cluster_rank() : 0;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns, middle = all_steps / 2;  // where the second of two ranges begins
  const int begin = pair && rank == 1 ? middle : 0, steps = pair && rank == 0 ? middle : all_steps - begin;
  const int blocks = (p.rows + T::tokens - 1) / T::tokens, tiles = blocks * ((p.out_features + T::outputs - 1) / T::outputs);
  const int first_tile = blockIdx.x / T::cluster, tile_step = gridDim.x / T::cluster;  // of a pair: one tile

  if (threadIdx.x == 0) {
    for (int s = 0; s < num_stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups);
    }
    if (pair) ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (pair && T::own_inbox) ptx::cluster_arrive();
  ptx::launch_dependents();

  if (warp == 4 * T::warpgroups) {
    if (lane == 0) {
      const uint64_t keep = ptx::evict_last_policy();  // of x: every CTA reads it
      const int pitch = scale_pitch(p.rows);
      bool waited = false;
      int s = 0, parity = 1;  // the stage to fill, over all tiles; of its `empty` barrier, which counts as complete the first time round
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        const int first_row = tile % blocks * T::tokens, first_output = tile / blocks * T::outputs;
        const int units = min(T::warpgroups, (p.out_features - first_output + 63) / 64), scale_bytes = min(T::tokens, pitch - first_row) * 4;
        const char* weight = static_cast<const char*>(p.weight) + (static_cast<int64_t>(first_output / 64) * all_steps + begin) * kUnitBytes;
        auto copy_weights = [&](int step, int s) {
          ptx::mbarrier_arrive_expect(full + 8 * s, units * kUnitBytes + T::tokens * kRowBytes + scale_bytes);
          for (int u = 0; u < units; ++u)
            ptx::bulk_load(stages + s * T::stage_bytes + u * kUnitBytes, weight + (static_cast<int64_t>(u) * all_steps + step) * kUnitBytes, kUnitBytes, full + 8 * s);
        };
        auto copy_tokens = [&](int step, int s) {
          ptx::tma_load(stages + s * T::stage_bytes + T::weight_bytes, &x_map, (begin + step) * kStepColumns, first_row, full + 8 * s, keep);
          ptx::bulk_load(scales + s * T::tokens * 4, p.x_scale + static_cast<int64_t>(begin + step) * pitch + first_row, scale_bytes, full + 8 * s);
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
        for (; step < steps; ++step) {
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
    int s = 0, parity = 0;        // the stage in use, over all tiles
    ptx::grid_dependency_wait();  // nothing is lost: there are no tokens before
    const int rows = min(*p.num_rows, p.rows);
    for (int tile = first_tile; tile < tiles; tile += tile_step) {
      const int first_row = tile % blocks * T::tokens, first_output = tile / blocks * T::outputs + warpgroup * 64;
      if (first_row > 0 && first_row >= rows) continue;
      const int output = first_output + warp % 4 * 16 + lane / 4;  // of this thread's fragments, and 8 further on
      const float* weight_scale = p.weight_scale + static_cast<int64_t>(p.weight_blocks > 1 ? begin : 0) * p.out_features;
      auto scale_at = [&](int half) { return __ldg(weight_scale + min(output + 8 * half, p.out_features - 1)); };
      float next[2] = {scale_at(0), scale_at(1)}, part[T::values], sum[T::values];
#pragma unroll
      for (int i = 0; i < T::values; ++i) sum[i] = 0.0f;
      for (int step = 0; step < steps; ++step) {
        const float scale[2] = {next[0], next[1]};
        if (p.weight_blocks > 1 && step + 1 < steps) {
          weight_scale += p.out_features;
          next[0] = scale_at(0);
          next[1] = scale_at(1);
        }
        ptx::mbarrier_wait(full + 8 * s, parity);
        const uint64_t a = ptx::wgmma_descriptor(stages + s * T::stage_bytes + warpgroup * kUnitBytes);
        const uint64_t b = ptx::wgmma_descriptor(stages + s * T::stage_bytes + T::weight_bytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStepColumns / 32; ++k) ptx::wgmma_e4m3(part, a + 2 * k, b + 2 * k, k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        const float2* x_scale = reinterpret_cast<const float2*>(shared + (scales - stages)) + s * T::tokens / 2 + lane % 4;
#pragma unroll
        for (int j = 0; j < T::fragments; ++j) {
          const float2 x = x_scale[4 * j];
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[4 * j + e] = __fmaf_rn(part[4 * j + e], (e & 1 ? x.y : x.x) * scale[e >> 1], sum[4 * j + e]);
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty + 8 * s);  // this warp is done with the stage
        if (++s == num_stages) {
          s = 0;
          parity ^= 1;
        }
      }
      float bias[2] = {0.0f, 0.0f};
      if (p.bias)
#pragma unroll
        for (int half = 0; half < 2; ++half) bias[half] = p.bias[min(output + 8 * half, p.out_features - 1)];
      auto store = [&](int j, float (&d)[4]) {
        if (p.bias)
#pragma unroll
          for (int e = 0; e < 4; ++e) d[e] = d[e] + bias[e >> 1];
        store_quad(p.out, p.out_dtype, p.out_features, rows, quad_of(first_row + 8 * j, first_output, d));
      };
      if constexpr (pair) {
        // Rank 0 has the sum of the first range, rank 1 that of the second. Rank 0 finishes the first half of the tokens.
        constexpr int own = T::fragments / 2;
        const int present = (min(rows - first_row, T::tokens) + 7) / 8;  // fragments with a token in use
        const int awaited = rank == 0 ? min(present, own) : max(present - own, 0);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(received, awaited * T::fragment_bytes);
        if (!T::own_inbox) ptx::cluster_arrive();  // this CTA is done with its stages
        ptx::cluster_wait();
        const uint32_t place = ptx::shared_address_of(1 - rank, inbox + threadIdx.x * 16), bell = ptx::shared_address_of(1 - rank, received);
#pragma unroll
        for (int j = 0; j < own; ++j) {
          const int i = 4 * (own + j);
          if (rank == 0) {
            if (own + j < present) ptx::store_shared_of(place + j * T::fragment_bytes, sum[i], sum[i + 1], sum[i + 2], sum[i + 3], bell);
          } else if (j < present) {
            ptx::store_shared_of(place + j * T::fragment_bytes, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3], bell);
          }
        }
        ptx::mbarrier_wait(received, 0);
        const float4* from = reinterpret_cast<const float4*>(shared + (inbox - stages)) + threadIdx.x;
#pragma unroll
        for (int j = 0; j < own; ++j) {
          if (j >= awaited) break;
          const float4 other = from[j * T::fragment_bytes / 16];
          const float theirs[4] = {other.x, other.y, other.z, other.w};
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) d[e] = rank == 0 ? sum[4 * j + e] + theirs[e] : theirs[e] + sum[4 * (own + j) + e];
          store(rank * own + j, d);
        }
      } else {
#pragma unroll
        for (int j = 0; j < T::fragments; ++j) {
          if (first_row + 8 * j >= rows) break;
          float d[4] = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
          store(j, d);
        }
      }
    }
  }
}

template <typename T> void launch_tile(const LinearFp8Params& p, cudaStream_t stream) {
  const CUtensorMap x = tensor_map_e4m3(p.x, p.rows, p.in_features, T::tokens);
  const int tiles = ceil_div(p.rows, T::tokens) * ceil_div(p.out_features, T::outputs), sms = num_sms();
  const int ctas = T::pair ? 2 * tiles : std::min(tiles, sms);
  const int budget = T::tokens > 64 ? kWholeBytes : p.out_features > p.in_features ? kWideBytes : kNarrowBytes;
  int stages = 1;
  while (T::shared_bytes(stages + 1) <= budget) ++stages;
  launch({dim3(ctas), dim3(T::threads), T::shared_bytes(stages), stream, T::cluster, true}, linear_fp8_kernel<T>, x, p, stages);
}

// Blocks of 16 to 128 tokens, as the rows need.
template <int warpgroups, bool pair> void launch_block(const LinearFp8Params& p, cudaStream_t stream) {
  if (p.rows <= 16) launch_tile<Tile<warpgroups, 16, pair>>(p, stream);
  else if (p.rows <= 32) launch_tile<Tile<warpgroups, 32, pair>>(p, stream);
  else if (p.rows <= 64) launch_tile<Tile<warpgroups, 64, pair>>(p, stream);
  else launch_tile<Tile<warpgroups, 128, pair>>(p, stream);
}

}  // namespace

void launch_linear_fp8_cuda(const LinearFp8Params& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  require_hopper("linear_fp8", "e4m3");
  if (fp8_ranges(p.out_features) == 1) launch_block<2, false>(p, s);
  else if (2 * ceil_div(p.out_features, 128) >= kFewCtas || p.rows > 256) launch_block<2, true>(p, s);
  else launch_block<1, true>(p, s);  // narrower CTAs, so that a small weight still occupies the chip
}

}  // namespace specrt
