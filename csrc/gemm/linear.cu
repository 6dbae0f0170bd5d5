// float32 linear, and the choice by dtype. One thread holds 4 outputs (8 for kChoose) of some tokens, each one fma chain over k; tiles of 16 k pass through
// shared memory. The float32 path on CUDA is for parity checks: it is written to be right at any K and N, not to be near the memory's speed.
#include "base/check.h"
#include "base/math.h"
#include "gemm/choose.cuh"
#include "gemm/kernels_cuda.h"

namespace specrt {
namespace {

constexpr int kDepth = 16;

// One value's way out (params.h, Finish), of lanes that hold 16 outputs side by side; returns the sum of the 16 squares of the residual stream.
__device__ float finish_f32(const LinearParams& p, int row, int output, bool valid, float y) {
  const int64_t at = static_cast<int64_t>(row) * p.out_features + output;
  float* out = static_cast<float*>(p.out);
  if (p.finish == Finish::kStore) {
    if (valid) out[at] = y;
    return 0.0f;
  }
  if (p.finish == Finish::kSilu) {
    const float up = __shfl_xor_sync(0xffffffffu, y, 8);
    if (valid && output % 16 < 8) out[static_cast<int64_t>(row) * (p.out_features / 2) + output / 16 * 8 + output % 8] = y / (1.0f + exp_rn(-y)) * up;
    return 0.0f;
  }
  const float h = valid ? static_cast<const float*>(p.residual)[at] + y : 0.0f;
  if (valid) static_cast<float*>(p.residual_out)[at] = h;
  if (!p.next_weight) return 0.0f;
  if (valid) static_cast<float*>(p.scaled)[at] = h * static_cast<const float*>(p.next_weight)[output];
  float quad[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) quad[e] = __shfl_sync(0xffffffffu, h, threadIdx.x % 32 / 4 * 4 + e);
  float sum = quad_squares(quad);
  sum = sum + __shfl_xor_sync(0xffffffffu, sum, 4);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 8);
}

// 16 x 16 threads: outputs tx + 16 i, tokens ty + 16 j with j < TM. OM: outputs a thread.
template <int TM, int OM> __global__ void __launch_bounds__(256) linear_f32(LinearParams p) {
  constexpr int tokens = 16 * TM, outputs = 16 * OM;
  __shared__ float ws[kDepth][outputs + 1], xs[kDepth][tokens + 1];  // +1: the transposing stores hit 16 different banks
  const int first_row = blockIdx.x * tokens, first_output = blockIdx.y * outputs, num_rows = min(*p.num_rows, p.rows);
  if (first_row >= num_rows) return;
  const float *x = static_cast<const float*>(p.x), *weight = static_cast<const float*>(p.weight), *bias = static_cast<const float*>(p.bias);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[OM][TM] = {};
  for (int k0 = 0; k0 < p.in_features; k0 += kDepth) {
    const int depth = min(kDepth, p.in_features - k0);
    for (int i = ty; i < outputs; i += 16) {
      const bool valid = tx < depth && first_output + i < p.out_features;
      ws[tx][i] = valid ? weight[static_cast<int64_t>(first_output + i) * p.in_features + k0 + tx] : 0.0f;
    }
    for (int j = ty; j < tokens; j += 16) {
      const bool valid = tx < depth && first_row + j < num_rows;
      xs[tx][j] = valid ? x[static_cast<int64_t>(first_row + j) * p.in_features + k0 + tx] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < depth; ++k)
#pragma unroll
      for (int i = 0; i < OM; ++i)
#pragma unroll
        for (int j = 0; j < TM; ++j) acc[i][j] = fma_rn(xs[k][ty + 16 * j], ws[k][tx + 16 * i], acc[i][j]);
    __syncthreads();
  }
  if constexpr (outputs == kLseBlock) {
    __shared__ __align__(16) float z[tokens][outputs];
#pragma unroll
    for (int j = 0; j < TM; ++j)
#pragma unroll
      for (int i = 0; i < OM; ++i) z[ty + 16 * j][tx + 16 * i] = acc[i][j];
    __syncthreads();
    for (int t = threadIdx.x / 32; t < min(tokens, num_rows - first_row); t += 8) {
      float bound = -infinity();
      choose_block(p, Draw(row_choice(p, first_row + t), first_output), bound, first_row + t, first_output, *reinterpret_cast<const float4*>(&z[t][4 * (threadIdx.x % 32)]));
    }
    return;
  }
  if (p.squares) {
    __shared__ float scale[tokens];
    const int warp = threadIdx.x / 32;
    make_scales<4>(p, scale, first_row, warp * tokens / 8, (warp + 1) * tokens / 8, num_rows);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < TM; ++j)
#pragma unroll
      for (int i = 0; i < OM; ++i) acc[i][j] = acc[i][j] * scale[ty + 16 * j];
  }
#pragma unroll
  for (int j = 0; j < TM; ++j) {
    const int row = first_row + ty + 16 * j;
    float squares[OM];
#pragma unroll
    for (int i = 0; i < OM; ++i) {
      const int output = first_output + tx + 16 * i;
      const bool valid = row < num_rows && output < p.out_features;
      const float y = bias && valid ? acc[i][j] + bias[output] : acc[i][j];
      squares[i] = finish_f32(p, row, output, valid, y);
    }
    if (p.next_squares && row < num_rows && tx == 0)
      p.next_squares[static_cast<int64_t>(row) * square_pitch(p.out_features) + first_output / kSquareBlock] = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  }
}

template <int TM, int OM = 4> void launch(const LinearParams& p, cudaStream_t stream) {
  const dim3 grid((p.rows + 16 * TM - 1) / (16 * TM), (p.out_features + 16 * OM - 1) / (16 * OM));
  linear_f32<TM, OM><<<grid, 256, 0, stream>>>(p);
}

}  // namespace

void linear_f32_cuda(const LinearParams& p, cudaStream_t stream) {
  if (p.finish == Finish::kChoose) launch<1, kLseBlock / 16>(p, stream);
  else if (p.rows <= 32) launch<1>(p, stream);
  else launch<4>(p, stream);
}

void launch_linear_cuda(const LinearParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? linear_bf16_cuda(p, s) : linear_f32_cuda(p, s);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt
