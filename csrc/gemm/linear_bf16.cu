// bfloat16 linear on Hopper's warpgroup tensor cores: 64 or 128 weight rows on the wide side, 16 to 256 tokens on the narrow one.
//
// One kernel, three ways through K (params.h has the order; which way runs, and how deep its pipeline is, changes no bit):
//   one range:            a CTA walks all of K.
//   a cluster of ranges:  the 4 CTAs of a cluster take a range each and add their sums through distributed shared memory in rank order. Few rows: a small
//                         weight still occupies the chip.
//   ranges in turn:       a CTA walks the 4 ranges one after the other and keeps the total beside the running sum. Many rows (prefill).
// A producer thread keeps `stages` steps of 64 columns in flight by bulk tensor copies; weights of the first steps are asked for before the kernel waits for
// its predecessor (programmatic dependent launch), so that the memory never idles between two layers.
// Bytes: the weights once per block of tokens, x once per block of weight rows (from L2).
#include "base/launch.h"
#include "base/math.h"
#include "base/tensor_map.h"
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

// Eight neighbouring outputs of one row: bias, the one rounding, and as few stores as the alignment allows.
__device__ __forceinline__ void write_outputs(const LinearParams& p, int row, int output, float (&sum)[8]) {
  const int count = min(8, p.out_features - output);
  if (p.bias)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) sum[i] = sum[i] + to_float(static_cast<const bf16*>(p.bias)[output + i]);
  const int64_t at = static_cast<int64_t>(row) * p.out_features + output;
  if (p.out_dtype == DType::kF32) {
    float* out = static_cast<float*>(p.out) + at;
    if (p.out_features % 4 == 0 && count == 8) {
      reinterpret_cast<float4*>(out)[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      reinterpret_cast<float4*>(out)[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) out[i] = sum[i];
    }
  } else {
    bf16* out = static_cast<bf16*>(p.out) + at;
    if (p.out_features % 8 == 0) {
      union { bf16 each[8]; uint4 all; } pack;
#pragma unroll
      for (int i = 0; i < 8; ++i) pack.each[i] = to_bf16(sum[i]);
      *reinterpret_cast<uint4*>(out) = pack.all;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) out[i] = to_bf16(sum[i]);
    }
  }
}

template <typename T> __global__ void __launch_bounds__(T::threads, 1)
linear_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ LinearParams p) {
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

  float sum[T::tokens / 2], total[T::ways == Ways::kTurn ? T::tokens / 2 : 1];
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
    const int warpgroup = warp / 4;
    int range = 0;
    for (int step = 0; step < steps; ++step) {
      const int s = step % T::stages;
      ptx::mbarrier_wait(full + 8 * s, step / T::stages & 1);
      const uint64_t a = ptx::wgmma_descriptor(stages + s * T::stage_bytes + warpgroup * 64 * kRowBytes);
      const uint64_t b = ptx::wgmma_descriptor(stages + s * T::stage_bytes + T::weight_bytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepColumns / 16; ++k) ptx::wgmma_bf16(sum, a + 2 * k, b + 2 * k);
      ptx::wgmma_commit();
      if (T::ways == Ways::kTurn && range_begin(range + 1, all_steps) <= step + 1) {  // a range ends here (with fewer steps than ranges some are empty: zero sums)
        ptx::wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < T::tokens / 2; ++i) {
          total[i] = total[i] + sum[i];
          sum[i] = 0.0f;
        }
        while (range < kRanges - 1 && range_begin(range + 1, all_steps) <= step + 1) ++range;
      } else {
        ptx::wgmma_wait<1>();
      }
      if (step > 0 && lane == 0) ptx::mbarrier_arrive(empty + 8 * ((step - 1) % T::stages));  // this warp is done with the stage before
    }
    ptx::wgmma_wait<0>();
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

template <typename T> void launch_tile(const LinearParams& p, cudaStream_t stream) {
  const CUtensorMap weight = tensor_map_bf16(p.weight, p.out_features, p.in_features, T::outputs);
  const CUtensorMap x = tensor_map_bf16(p.x, p.rows, p.in_features, T::tokens);
  const int blocks = ceil_div(p.rows, T::tokens), outputs = ceil_div(p.out_features, T::outputs);
  launch({dim3(blocks * T::cluster, outputs), dim3(T::threads), T::shared_bytes, stream, T::cluster, true}, linear_kernel<T>, weight, x, p);
}

// Blocks of 16 to 256 tokens, as the rows need.
template <int warpgroups, Ways ways> void launch_block(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 16) launch_tile<Tile<warpgroups, 16, 5, ways>>(p, stream);
  else if (p.rows <= 64) launch_tile<Tile<warpgroups, 64, 4, ways>>(p, stream);
  else if (p.rows <= 128 || warpgroups == 1) launch_tile<Tile<warpgroups, 128, 3, ways>>(p, stream);
  else launch_tile<Tile<2, 256, 4, ways>>(p, stream);
}

}  // namespace

void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream) {
  int card = 0, major = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, card));
  if (major != 9) fail("linear: bfloat16 on CUDA needs a Hopper GPU (compute capability 9.0), got " + std::to_string(major) + ".x; use device=\"cpu\" or dtype=\"float32\"");
  const int outputs = ceil_div(p.out_features, 128);
  if (num_ranges(p.out_features) == 1) launch_block<2, Ways::kOne>(p, stream);
  else if (p.rows > 256 && outputs * ceil_div(p.rows, 128) >= 128) launch_tile<Tile<2, 128, 6, Ways::kTurn>>(p, stream);
  else if (outputs * kRanges >= 128) launch_block<2, Ways::kCluster>(p, stream);
  else launch_block<1, Ways::kCluster>(p, stream);  // narrower CTAs, so that a small weight still occupies the chip
}

}  // namespace specrt
