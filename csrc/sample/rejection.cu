// accept_rejection: one block walks one slot's tree.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "sample/block.cuh"
#include "sample/rejection.h"

namespace specrt {
namespace {

struct BlockTeam {
  int vocab;
  float* stats;

  __device__ float lse(const float* x) { return block_lse(x, vocab, stats); }
  template <typename F> __device__ int64_t sum(F f) {
    int64_t total = 0;
    for (int v = threadIdx.x; v < vocab; v += kThreads) total += f(v);
    return block_sum(total);
  }
  template <typename F> __device__ void each(F f) {
    __syncthreads();
    for (int v = threadIdx.x; v < vocab; v += kThreads) f(v);
    __syncthreads();
  }
  __device__ void set(float* address, float x) {
    __syncthreads();
    if (threadIdx.x == 0) *address = x;
    __syncthreads();
  }
  __device__ int32_t greedy(const float* x) { return max(rank_token(block_argmax(x, vocab)), 0); }
  __device__ int32_t sample(const float* x, int64_t seed, int32_t position) {
    return max(rank_token(block_exact(x, vocab, seed, position, kNoiseResidual)), 0);
  }
  __device__ bool writer() { return threadIdx.x == 0; }
};

__global__ void __launch_bounds__(kThreads, 1) accept_rejection_kernel(AcceptRejectionParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  extern __shared__ float stats[];
  BlockTeam team{p.vocab, stats};
  walk_rejection(team, p, blockIdx.x);
}

}  // namespace

void launch_accept_rejection_cuda(const AcceptRejectionParams& p, void* stream) {
  launch({dim3(p.slots), dim3(kThreads), static_cast<int>(lse_shared(p.vocab)), static_cast<cudaStream_t>(stream), 1, true}, accept_rejection_kernel, p);
}

}  // namespace specrt
