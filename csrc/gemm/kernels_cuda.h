// The CUDA implementations behind launch_linear_cuda, and behind launch_linear_fp8_cuda that of more than 64 rows, which come quantised.
#pragma once
#include <cuda_runtime.h>

#include "gemm/params.h"

namespace specrt {

// Ranges of K (params.h): a weight of many outputs occupies the chip without them.
constexpr int num_ranges(int out_features) { return out_features > 127 * 128 ? 1 : 2; }

void linear_f32_cuda(const LinearParams& p, cudaStream_t stream);
void linear_bf16_cuda(const LinearParams& p, cudaStream_t stream);
void linear_fp8_many_cuda(const LinearFp8Params& fp8, cudaStream_t stream);

}  // namespace specrt
