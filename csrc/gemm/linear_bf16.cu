// bfloat16 linear on tensor cores: mma.sync with 16 weight rows on its wide side and 8 tokens on its narrow one, cp.async pipelines.
//
// Two kernels, one order (params.h). `few_rows` gives each of the 4 ranges of K to warps of its own: a CTA streams 16..64 weight rows along
// four fronts at once, with no barrier between them until the end. `many_rows` walks the ranges one after the other on a 128 x 128 tile.
// Which of them runs is a function of the shapes and of the card's shared memory; which rows share a tile changes no bit.
// Bytes: the weights once (many_rows: once per 128 rows, mostly from L2), x once per block of weight rows (from L2).
#include "base/check.h"
#include "base/math.h"
#include "gemm/kernels_cuda.h"
#include "tile/mma_tile.cuh"

namespace specrt {
namespace {

using tile::kTileColumns;
using tile::kTileRowBytes;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int range_begin(int range, int tiles) { return static_cast<int>(static_cast<int64_t>(range) * tiles / kRanges); }

// The first of the dynamic shared memory's 128-byte lines (the launch asks for one more).
__device__ __forceinline__ char* aligned_shared() {
  extern __shared__ char raw[];
  return raw + (128 - (ptx::shared_address(raw) & 127)) % 128;
}

__device__ __forceinline__ void write_output(const LinearParams& p, int row, int output, float sum) {
  if (p.bias) sum = sum + to_float(static_cast<const bf16*>(p.bias)[output]);
  const int64_t at = static_cast<int64_t>(row) * p.out_features + output;
  if (p.out_dtype == DType::kF32) static_cast<float*>(p.out)[at] = sum;
  else static_cast<bf16*>(p.out)[at] = to_bf16(sum);
}

// Per range: `warps` warps, each with 16 MT weight rows and all 8 NT tokens of the CTA.
template <int MT_, int warps_, int NT_, int stages_> struct Few {
  static constexpr int MT = MT_, warps = warps_, NT = NT_, stages = stages_;
  static constexpr int range_threads = warps * 32, threads = kRanges * range_threads;
  static constexpr int outputs = 16 * MT * warps, tokens = 8 * NT;
  static constexpr int stage_bytes = (outputs + tokens) * kTileRowBytes, range_bytes = stages * stage_bytes;
  static constexpr int pitch = outputs + 4;  // floats, of the sums in shared memory
  static constexpr int shared_bytes = kRanges * range_bytes + 128;
  static_assert(tokens * pitch * 4 <= range_bytes, "the sums reuse the stages");
};

template <typename C> __global__ void __launch_bounds__(C::threads) few_rows(LinearParams p) {
  const int first_row = blockIdx.x * C::tokens, first_output = blockIdx.y * C::outputs;
  const int num_rows = min(*p.num_rows, p.rows), count = min(num_rows - first_row, C::tokens);
  if (count <= 0) return;
  const int active = ceil_div(count, 8);
  char* shared = aligned_shared();
  const int range = threadIdx.x / C::range_threads, thread = threadIdx.x % C::range_threads, warp = thread / 32;
  const int tiles = ceil_div(p.in_features, kTileColumns);
  const int begin = range_begin(range, tiles), steps = range_begin(range + 1, tiles) - begin;
  const uint32_t buffers = ptx::shared_address(shared) + range * C::range_bytes;

  auto copy_step = [&](int step) {  // weights, then tokens, of one stage
    const uint32_t to = buffers + step % C::stages * C::stage_bytes;
    const int column = (begin + step) * kTileColumns;
    tile::copy_tile<C::range_threads>(to, static_cast<const bf16*>(p.weight), first_output, C::outputs, p.out_features, column, p.in_features, thread);
    tile::copy_tile<C::range_threads>(to + C::outputs * kTileRowBytes, static_cast<const bf16*>(p.x), first_row, active * 8, num_rows, column, p.in_features, thread);
  };

  float acc[C::MT][C::NT][4] = {};
  for (int step = 0; step < C::stages - 1; ++step) {
    if (step < steps) copy_step(step);
    ptx::cp_async_commit();
  }
  // Ranges differ by a step at most: they walk together, so that one barrier serves all.
  const int most = ceil_div(tiles, kRanges);
  for (int step = 0; step < most; ++step) {
    ptx::cp_async_wait<C::stages - 2>();
    __syncthreads();  // this step's tiles are there for all, and all are done with the previous step's buffer, which is filled next
    if (step + C::stages - 1 < steps) copy_step(step + C::stages - 1);
    ptx::cp_async_commit();
    const uint32_t stage = buffers + step % C::stages * C::stage_bytes;
    if (step < steps) tile::multiply_tiles(stage + warp * 16 * C::MT * kTileRowBytes, stage + C::outputs * kTileRowBytes, active, acc);
  }

  // Range sums meet in shared memory, [range][token][output], over the stages: every copy has landed and every warp is done reading.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  tile::store_transposed(acc, active, sums + range * C::tokens * C::pitch + warp * 16 * C::MT, C::pitch);
  __syncthreads();
  for (int i = threadIdx.x; i < count * C::outputs; i += C::threads) {
    const int token = i / C::outputs, output = i % C::outputs;
    if (first_output + output >= p.out_features) continue;
    const float* at = sums + token * C::pitch + output;
    float sum = at[0];
#pragma unroll
    for (int r = 1; r < kRanges; ++r) sum = sum + at[r * C::tokens * C::pitch];
    write_output(p, first_row + token, first_output + output, sum);
  }
}

// 128 weight rows x 128 tokens a CTA; 2 x 4 warps of 64 x 32.
template <int stages_> struct Many {
  static constexpr int MT = 4, NT = 4, threads = 256, stages = stages_;
  static constexpr int outputs = 128, tokens = 128;
  static constexpr int stage_bytes = (outputs + tokens) * kTileRowBytes;
  static constexpr int pitch = outputs + 4;
  static constexpr int shared_bytes = stages * stage_bytes + 128;
  static_assert(tokens * pitch * 4 <= stages * stage_bytes, "the sums reuse the stages");
};

template <typename C> __global__ void __launch_bounds__(C::threads, 1) many_rows(LinearParams p) {
  const int first_row = blockIdx.x * C::tokens, first_output = blockIdx.y * C::outputs;
  const int num_rows = min(*p.num_rows, p.rows), count = min(num_rows - first_row, C::tokens);
  if (count <= 0) return;
  char* shared = aligned_shared();
  const uint32_t buffers = ptx::shared_address(shared);
  const int warp = threadIdx.x / 32, warp_output = warp % 2 * 64, warp_token = warp / 2 * 32;
  const int active = max(0, min(ceil_div(count - warp_token, 8), C::NT));
  const int tiles = ceil_div(p.in_features, kTileColumns);

  auto copy_step = [&](int step) {
    const uint32_t to = buffers + step % C::stages * C::stage_bytes;
    const int column = step * kTileColumns;
    tile::copy_tile<C::threads>(to, static_cast<const bf16*>(p.weight), first_output, C::outputs, p.out_features, column, p.in_features, threadIdx.x);
    tile::copy_tile<C::threads>(to + C::outputs * kTileRowBytes, static_cast<const bf16*>(p.x), first_row, C::tokens, num_rows, column, p.in_features, threadIdx.x);
  };

  float acc[C::MT][C::NT][4] = {}, sum[C::MT][C::NT][4];
  for (int step = 0; step < C::stages - 1; ++step) {
    if (step < tiles) copy_step(step);
    ptx::cp_async_commit();
  }
  int range = 0;
  for (int step = 0;; ++step) {
    for (; range < kRanges && range_begin(range + 1, tiles) == step; ++range) {  // a range ends here (several, where some are empty)
#pragma unroll
      for (int i = 0; i < C::MT; ++i)
#pragma unroll
        for (int j = 0; j < C::NT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[i][j][e] = range == 0 ? acc[i][j][e] : sum[i][j][e] + acc[i][j][e];
            acc[i][j][e] = 0.0f;
          }
    }
    if (step == tiles) break;
    ptx::cp_async_wait<C::stages - 2>();
    __syncthreads();
    if (step + C::stages - 1 < tiles) copy_step(step + C::stages - 1);
    ptx::cp_async_commit();
    const uint32_t stage = buffers + step % C::stages * C::stage_bytes;
    tile::multiply_tiles(stage + warp_output * kTileRowBytes, stage + (C::outputs + warp_token) * kTileRowBytes, active, acc);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  tile::store_transposed(sum, active, sums + warp_token * C::pitch + warp_output, C::pitch);
  __syncthreads();
  for (int i = threadIdx.x; i < count * C::outputs; i += C::threads) {
    const int token = i / C::outputs, output = i % C::outputs;
    if (first_output + output < p.out_features) write_output(p, first_row + token, first_output + output, sums[token * C::pitch + output]);
  }
}

template <typename C> void launch(void (*kernel)(LinearParams), const LinearParams& p, cudaStream_t stream) {
  SPECRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes));
  kernel<<<dim3(ceil_div(p.rows, C::tokens), ceil_div(p.out_features, C::outputs)), C::threads, C::shared_bytes, stream>>>(p);
}

// Wide CTAs read x less often; narrow ones are there so that a small weight still occupies the chip.
template <typename Narrow, typename Wide> void launch_few(const LinearParams& p, cudaStream_t stream) {
  const int64_t wide_ctas = static_cast<int64_t>(ceil_div(p.rows, Wide::tokens)) * ceil_div(p.out_features, Wide::outputs);
  if (wide_ctas >= 128) launch<Wide>(few_rows<Wide>, p, stream);
  else launch<Narrow>(few_rows<Narrow>, p, stream);
}

// The pipelines' depths are what fits the shared memory a block may have; no bit depends on them.
struct Deep {  // 227 KB: sm_90, sm_100
  using Few8 = Few<1, 1, 1, 4>;
  using Few8Wide = Few<1, 4, 1, 3>;
  using Few16 = Few<1, 1, 2, 4>;
  using Few16Wide = Few<1, 4, 2, 3>;
  using Few32 = Few<2, 1, 4, 3>;
  using Few32Wide = Few<2, 2, 4, 4>;
  using Few64 = Few<2, 1, 8, 4>;
  using Few64Wide = Few<2, 2, 8, 3>;
  using Rest = Many<4>;
};
struct Shallow {  // 99 KB: every card since sm_80
  using Few8 = Few<1, 1, 1, 4>;
  using Few8Wide = Few<1, 4, 1, 2>;
  using Few16 = Few<1, 1, 2, 4>;
  using Few16Wide = Few<1, 4, 2, 2>;
  using Few32 = Few<2, 1, 4, 3>;
  using Few32Wide = Few<2, 2, 4, 2>;
  using Few64 = Few<2, 1, 8, 2>;
  using Few64Wide = Few64;
  using Rest = Many<3>;
};

template <typename Set> void launch_by_rows(const LinearParams& p, cudaStream_t stream) {
  using Rest = typename Set::Rest;
  const int64_t rest_ctas = static_cast<int64_t>(ceil_div(p.rows, Rest::tokens)) * ceil_div(p.out_features, Rest::outputs);
  if (p.rows <= 8) launch_few<typename Set::Few8, typename Set::Few8Wide>(p, stream);
  else if (p.rows <= 16) launch_few<typename Set::Few16, typename Set::Few16Wide>(p, stream);
  else if (p.rows <= 32) launch_few<typename Set::Few32, typename Set::Few32Wide>(p, stream);
  else if (p.rows <= 64 || rest_ctas < 128) launch_few<typename Set::Few64, typename Set::Few64Wide>(p, stream);
  else launch<Rest>(many_rows<Rest>, p, stream);
}

}  // namespace

void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream) {
  int card = 0, shared = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, card));
  if (shared >= 227 * 1024) launch_by_rows<Deep>(p, stream);
  else launch_by_rows<Shallow>(p, stream);
}

}  // namespace specrt
