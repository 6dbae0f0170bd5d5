// sample_blocks: a block of threads a row. What is read is a thousandth of the logits, and the sum over the blocks is one chain (params.h): the time is a launch's.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "sample/token.h"

namespace specrt {
namespace {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr unsigned kWarp = 0xffffffffu;

// The best rank of the block of threads, by all of them.
__device__ uint64_t row_best(uint64_t rank) {
  __shared__ uint64_t slot[kRowWarps];
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    const uint32_t high = static_cast<uint32_t>(rank >> 32), best = __reduce_max_sync(kWarp, high);
    rank = static_cast<uint64_t>(best) << 32 | __reduce_max_sync(kWarp, high == best ? static_cast<uint32_t>(rank) : 0u);
    if (turn == 1) return rank;
    __syncthreads();  // the slots may still be read
    if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = rank;
    __syncthreads();
    rank = slot[threadIdx.x % kRowWarps];
  }
  return rank;
}

__global__ void __launch_bounds__(kRowThreads) sample_blocks_kernel(SampleBlocksParams p) {
  extern __shared__ float terms[];  // of the sum over the blocks, with p.logprob
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const BlockChoice* choice = p.choice + static_cast<int64_t>(row) * p.blocks;
  uint64_t mine = 0;
  float z = -infinity(), high = -infinity();
  for (int j = threadIdx.x; j < p.blocks; j += kRowThreads) {
    const BlockChoice block = choice[j];
    if (block.rank > mine) mine = block.rank, z = block.z;
    high = block.max > high ? block.max : high;
  }
  const uint64_t best = row_best(mine);
  const float max = key_value(static_cast<uint32_t>(row_best(static_cast<uint64_t>(order_key(high)) << 32) >> 32));
  const RowStatus status = best == kBadRank || max == infinity() ? kStatusNotFinite : !(max > -infinity()) ? kStatusAllMasked : kStatusOk;
  if (threadIdx.x == 0) {
    p.status[row] = status;
    p.token[row] = status == kStatusOk ? ::max(rank_token(best), 0) : 0;
  }
  if (!p.logprob) return;
  if (status != kStatusOk) {
    if (threadIdx.x == 0) p.logprob[row] = -infinity();
    return;
  }
  for (int j = threadIdx.x; j < p.blocks; j += kRowThreads) terms[j] = p.sums[static_cast<int64_t>(row) * p.blocks + j] * exp_rn(choice[j].max - max);
  __syncthreads();
  if (mine != best) return;  // ranks are distinct: one thread's is the best
  float sum = 0.0f;
  for (int j = 0; j < p.blocks; ++j) sum = sum + terms[j];
  p.logprob[row] = canonical(z - canonical(max + log_rn(sum)));
}

}  // namespace

void launch_sample_blocks_cuda(const SampleBlocksParams& p, void* stream) {
  launch({dim3(p.rows), dim3(kRowThreads), p.logprob ? p.blocks * static_cast<int>(sizeof(float)) : 0, static_cast<cudaStream_t>(stream), 1, true}, sample_blocks_kernel, p);
}

}  // namespace specrt
