// What a thread block of the tree kernels does together.
#pragma once

namespace specrt {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sum of value(i) over i < n, for all threads of the block (whole warps). Integers: the order cannot matter.
template <typename F> __device__ __forceinline__ int block_sum(int n, F&& value) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int mine = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) mine += value(i);
  for (int d = 16; d; d >>= 1) mine += __shfl_xor_sync(kFullWarp, mine, d);
  if (threadIdx.x % 32 == 0 && mine) atomicAdd(&total, mine);
  __syncthreads();
  const int sum = total;
  __syncthreads();  // before the next call clears it
  return sum;
}

}  // namespace specrt
