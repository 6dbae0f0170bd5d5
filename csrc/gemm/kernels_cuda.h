// The two CUDA implementations behind launch_linear_cuda.
#pragma once
#include <cuda_runtime.h>

#include "gemm/params.h"

namespace specrt {

constexpr int kRanges = 4;  // ranges of K, whose sums are added ascending (params.h)

void linear_f32_cuda(const LinearParams& p, cudaStream_t stream);
void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream);

}  // namespace specrt
