// FP8 linear on Hopper's warpgroup tensor cores: the skeleton of linear_bf16.cu with steps of 128 e4m3 columns. A step's sum starts from zero and is promoted to fp32
// registers at once (params.h has the order). K % 16 == 0.
#include "base/launch.h"
#include "base/math.h"
#include "base/tensor_map.h"
#include "gemm/kernels_cuda.h"
#include "ptx/cluster.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_e4m3.cuh"

namespace specrt {
namespace {

constexpr int kStepColumns = kScaleBlock, kRowBytes = kStepColumns;

enum class Ways { kOne, kCluster, kTurn };  // through K: see the top

template <int warpgroups_, int tokens_, int stages_, Ways ways_> struct Tile {
  static constexpr int warpgroups = warpgroups_, tokens = tokens_, stages = stages_;
  static constexpr Ways ways = ways_;
  static constexpr int outputs = 64 * warpgroups, threads = 128 * warpgroups + 32;  // the last warp is the producer
  static constexpr int cluster = ways == Ways::kCluster ? kRanges : 1;
  static constexpr int weight_bytes = outputs * kRowBytes, stage_bytes = weight_bytes + tokens * kRowBytes;
  static constexpr int pitch = outputs + 4;  // floats, of the sums in shared memory
  static constexpr int shared_bytes = stages * stage_bytes + 2 * stages * 8 + 1024;
  static constexpr int slice = outputs / cluster;  // outputs a CTA finishes
  static_assert(tokens * pitch * 4 <= stages * stage_bytes, "the sums reuse the stages");
};

__device__ __forceinline__ int range_begin(int range, int steps) { return range * steps / kRanges; }

// Eight neighbouring outputs of one row: bias, and the one rounding.
__device__ __forceinline__ void write_outputs(const LinearFp8Params& p, int row, int output, float (&sum)[8]) {
  const int64_t at = static_cast<int64_t>(row) * p.out_features + output;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (output + i >= p.out_features) continue;
    const float value = p.bias ? sum[i] + p.bias[output + i] : sum[i];
    if (p.out_dtype == DType::kF32) static_cast<float*>(p.out)[at + i] = value;
    else static_cast<bf16*>(p.out)[at + i] = to_bf16(value);
  }
}

template <typename T> __global__ void __launch_bounds__(T::threads, 1)
linear_fp8_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearFp8Params p) {
  const int rank = T::cluster > 1 ? ptx::cluster_rank() : 0;
  const int first_row = blockIdx.x / T::cluster * T::tokens;
  const int first_output = blockIdx.y * T::outputs;
  if (first_row > 0) {  // the first block of rows always runs, and asks for weights before it knows the number of rows
    ptx::grid_dependency_wait();
    if (first_row >= *p.num_rows) return;  // the whole cluster: its CTAs have the same rows
  }
  extern __shared__ char raw[];
  char* shared = raw + (1024 - (ptx::shared_address(raw) & 1023)) % 1024;
  const uint32_t stages = ptx::shared_address(shared), full = stages + T::stages * T::stage_bytes, empty = full + T::stages * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int all_steps = (p.in_features + kStepColumns - 1) / kStepColumns;
  const int begin = T::ways == Ways::kCluster ? range_begin(rank, all_steps) : 0;
  const int steps = T::ways == Ways::kCluster ? range_begin(rank + 1, all_steps) - begin : all_steps;

  if (threadIdx.x == 0) {
    for (int s = 0; s < T::stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 4 * T::warpgroups);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  float part[T::tokens / 2], sum[T::tokens / 2], total[T::ways == Ways::kTurn ? T::tokens / 2 : 1];
#pragma unroll
  for (int i = 0; i < T::tokens / 2; ++i) sum[i] = 0.0f;
  if (T::ways == Ways::kTurn)
#pragma unroll
    for (int i = 0; i < T::tokens / 2; ++i) total[i] = 0.0f;

  if (warp == 4 * T::warpgroups) {
    if (lane == 0) {
      const uint64_t keep = ptx::evict_last_policy();  // of x: every CTA reads it
      auto copy_weights = [&](int step) {
        const int s = step % T::stages;
        ptx::mbarrier_arrive_expect(full + 8 * s, T::stage_bytes);
        ptx::tma_load(stages + s * T::stage_bytes, &weight_map, (begin + step) * kStepColumns, first_output, full + 8 * s);
      };
      auto copy_tokens = [&](int step) {
        const int s = step % T::stages;
        ptx::tma_load(stages + s * T::stage_bytes + T::weight_bytes, &x_map, (begin + step) * kStepColumns, first_row, full + 8 * s, keep);
      };
      const int ahead = min(steps, T::stages);
      for (int step = 0; step < ahead; ++step) copy_weights(step);
      ptx::grid_dependency_wait();
      for (int step = 0; step < ahead; ++step) copy_tokens(step);
      for (int step = ahead; step < steps; ++step) {
        ptx::mbarrier_wait(empty + 8 * (step % T::stages), (step / T::stages - 1) & 1);
        copy_weights(step);
        copy_tokens(step);
      }
      ptx::launch_dependents();  // not before: the next kernel's weights would only push this one's aside
    }
    __syncwarp();
  } else {
    const int warpgroup = warp / 4, output = first_output + 16 * warp + lane / 4;
    float weight_scale[2] = {0.0f, 0.0f};
    int range = 0;
    ptx::grid_dependency_wait();  // of x_scale
    for (int step = 0; step < steps; ++step) {
      const int s = step % T::stages, block = begin + step;
      if (step == 0 || p.weight_blocks > 1)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (output + 8 * e < p.out_features) weight_scale[e] = p.weight_scale[static_cast<int64_t>(p.weight_blocks > 1 ? block : 0) * p.out_features + output + 8 * e];
      float x_scale[T::tokens / 4];
#pragma unroll
      for (int i = 0; i < T::tokens / 4; ++i) {
        const int row = first_row + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        x_scale[i] = row < p.rows ? p.x_scale[static_cast<int64_t>(row) * all_steps + block] : 0.0f;
      }
      ptx::mbarrier_wait(full + 8 * s, step / T::stages & 1);
      const uint64_t a = ptx::wgmma_descriptor(stages + s * T::stage_bytes + warpgroup * 64 * kRowBytes);
      const uint64_t b = ptx::wgmma_descriptor(stages + s * T::stage_bytes + T::weight_bytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepColumns / 32; ++k) ptx::wgmma_e4m3(part, a + 2 * k, b + 2 * k, k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * s);  // this warp is done with the stage
#pragma unroll
      for (int i = 0; i < T::tokens / 2; ++i) sum[i] = __fmaf_rn(part[i], x_scale[2 * (i / 4) + i % 2] * weight_scale[i / 2 % 2], sum[i]);
      if (T::ways == Ways::kTurn && range_begin(range + 1, all_steps) <= step + 1) {  // a range ends here (empty ranges add zero)
#pragma unroll
        for (int i = 0; i < T::tokens / 2; ++i) {
          total[i] = total[i] + sum[i];
          sum[i] = 0.0f;
        }
        while (range < kRanges - 1 && range_begin(range + 1, all_steps) <= step + 1) ++range;
      }
    }
  }
  __syncthreads();  // every copy into this CTA has landed and been used: the sums, [token][output], take the stages' place

  float* sums = reinterpret_cast<float*>(shared);
  if (warp < 4 * T::warpgroups) {
    const int output = 16 * warp + lane / 4, token = 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < T::tokens / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[(8 * j + token + (e & 1)) * T::pitch + output + 8 * (e >> 1)] = T::ways == Ways::kTurn ? total[T::ways == Ways::kTurn ? 4 * j + e : 0] : sum[4 * j + e];
  }
  if (T::ways == Ways::kCluster) ptx::cluster_sync();
  else __syncthreads();

  ptx::grid_dependency_wait();
  const int count = min(min(*p.num_rows, p.rows) - first_row, T::tokens), own = T::ways == Ways::kCluster ? rank * T::slice : 0;
  constexpr int groups = T::slice / 8;
  for (int i = threadIdx.x; i < count * groups; i += T::threads) {
    const int token = i / groups, output = own + i % groups * 8;
    if (first_output + output >= p.out_features) continue;
    const float* from = sums + token * T::pitch + output;
    float result[8];
    if (T::ways == Ways::kCluster) {
#pragma unroll
      for (int e = 0; e < 8; ++e) result[e] = 0.0f;
#pragma unroll
      for (int range = 0; range < kRanges; ++range) {
        float low[4], high[4];
        ptx::load_shared_of(range, ptx::shared_address(from), low);
        ptx::load_shared_of(range, ptx::shared_address(from + 4), high);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          result[e] = result[e] + low[e];
          result[4 + e] = result[4 + e] + high[e];
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) result[e] = from[e];
    }
    write_outputs(p, first_row + token, first_output + output, result);
  }
  if (T::cluster > 1) ptx::cluster_sync();  // the other CTAs read this one's sums
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T> void launch_tile(const LinearFp8Params& p, cudaStream_t stream) {
  const CUtensorMap weight = tensor_map_e4m3(p.weight, p.out_features, p.in_features, T::outputs);
  const CUtensorMap x = tensor_map_e4m3(p.x, p.rows, p.in_features, T::tokens);
  const int blocks = ceil_div(p.rows, T::tokens), outputs = ceil_div(p.out_features, T::outputs);
  launch({dim3(blocks * T::cluster, outputs), dim3(T::threads), T::shared_bytes, stream, T::cluster, true}, linear_fp8_kernel<T>, weight, x, p);
}

// Blocks of 16 to 128 tokens, as the rows need.
template <int warpgroups, Ways ways> void launch_block(const LinearFp8Params& p, cudaStream_t stream) {
  if (p.rows <= 16) launch_tile<Tile<warpgroups, 16, 8, ways>>(p, stream);
  else if (p.rows <= 64) launch_tile<Tile<warpgroups, 64, 6, ways>>(p, stream);
  else launch_tile<Tile<warpgroups, 128, 5, ways>>(p, stream);
}

}  // namespace

void launch_linear_fp8_cuda(const LinearFp8Params& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const int outputs = ceil_div(p.out_features, 128);
  if (num_ranges(p.out_features) == 1) launch_block<2, Ways::kOne>(p, s);
  else if (p.rows > 256 && outputs * ceil_div(p.rows, 128) >= 128) launch_tile<Tile<2, 128, 5, Ways::kTurn>>(p, s);
  else if (outputs * kRanges >= 128) launch_block<2, Ways::kCluster>(p, s);
  else launch_block<1, Ways::kCluster>(p, s);  // narrower CTAs, so that a small weight still occupies the chip
}

}  // namespace specrt
