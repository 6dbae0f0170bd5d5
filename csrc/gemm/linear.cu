// float32 linear, and the choice by dtype. One thread holds 4 outputs of some tokens, each one fma chain over k; tiles of 16 k pass through
// shared memory. The float32 path on CUDA is for parity checks: it is written to be right at any K and N, not to be near the memory's speed.
#include "base/check.h"
#include "base/math.h"
#include "gemm/kernels_cuda.h"

namespace specrt {
namespace {

constexpr int kDepth = 16, kOutputs = 64;

// 16 x 16 threads: outputs tx + 16 i, tokens ty + 16 j with j < TM.
template <int TM> __global__ void __launch_bounds__(256) linear_f32(LinearParams p) {
  constexpr int tokens = 16 * TM;
  __shared__ float ws[kDepth][kOutputs + 1], xs[kDepth][tokens + 1];  // +1: the transposing stores hit 16 different banks
  const int first_row = blockIdx.x * tokens, first_output = blockIdx.y * kOutputs, num_rows = min(*p.num_rows, p.rows);
  if (first_row >= num_rows) return;
  const float *x = static_cast<const float*>(p.x), *weight = static_cast<const float*>(p.weight), *bias = static_cast<const float*>(p.bias);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[4][TM] = {};
  for (int k0 = 0; k0 < p.in_features; k0 += kDepth) {
    const int depth = min(kDepth, p.in_features - k0);
    for (int i = ty; i < kOutputs; i += 16) {
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
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < TM; ++j) acc[i][j] = fma_rn(xs[k][ty + 16 * j], ws[k][tx + 16 * i], acc[i][j]);
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < TM; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + ty + 16 * j, output = first_output + tx + 16 * i;
      if (row < num_rows && output < p.out_features)
        static_cast<float*>(p.out)[static_cast<int64_t>(row) * p.out_features + output] = bias ? acc[i][j] + bias[output] : acc[i][j];
    }
}

template <int TM> void launch(const LinearParams& p, cudaStream_t stream) {
  const dim3 grid((p.rows + 16 * TM - 1) / (16 * TM), (p.out_features + kOutputs - 1) / kOutputs);
  linear_f32<TM><<<grid, 256, 0, stream>>>(p);
}

}  // namespace

void linear_f32_cuda(const LinearParams& p, cudaStream_t stream) { p.rows <= 32 ? launch<1>(p, stream) : launch<4>(p, stream); }

void launch_linear_cuda(const LinearParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? linear_bf16_cuda(p, s) : linear_f32_cuda(p, s);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt
