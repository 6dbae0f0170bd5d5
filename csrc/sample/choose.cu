// sample_exact, row_logprobs, draft_topk: one block a row, a few passes over the row (each reads it once from L2). Rows past *num_rows exit.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "sample/block.cuh"

namespace specrt {
namespace {

__global__ void __launch_bounds__(kThreads, 1) sample_exact_kernel(SampleExactParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const int b = p.row_request[row];
  const float* z = p.z + static_cast<int64_t>(row) * p.vocab;
  const uint64_t best = p.sampling_f[b * kSamplingF + kTemperature] > 0.0f
                            ? block_exact(z, p.vocab, p.seeds[b], p.row_position[row] + 1, kNoiseShared)
                            : block_argmax(z, p.vocab);
  if (threadIdx.x == 0) p.token[row] = max(rank_token(best), 0);
}

__global__ void __launch_bounds__(kThreads, 1) row_logprobs_kernel(RowLogprobsParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  extern __shared__ float stats[];
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const float* z = p.z + static_cast<int64_t>(row) * p.vocab;
  const float lse = block_lse(z, p.vocab, stats);
  if (threadIdx.x == 0) {
    const int32_t token = p.token[row];
    const bool possible = token >= 0 && token < p.vocab && lse != -infinity();
    p.lse[row] = lse;
    p.logprob[row] = possible ? canonical(z[token] - lse) : -infinity();
  }
  const int64_t base = static_cast<int64_t>(row) * p.top;
  block_top(z, p.vocab, p.top, [&](int i, uint64_t rank) {
    const int32_t v = rank_token(rank);
    p.top_token[base + i] = v;
    p.top_logprob[base + i] = v >= 0 ? canonical(z[v] - lse) : -infinity();
  });
}

__global__ void __launch_bounds__(kThreads, 1) draft_topk_kernel(DraftTopkParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  extern __shared__ float stats[];
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const int b = p.row_request[row];
  const float* z = p.z + static_cast<int64_t>(row) * p.vocab;
  float* score = p.perturbed + static_cast<int64_t>(row) * p.vocab;
  const bool noisy = p.noise >= 0 && p.sampling_f[b * kSamplingF + kTemperature] > 0.0f;
  const int64_t seed = p.seeds[b];
  const int32_t position = p.row_position[row] + 1;
  for (int c = threadIdx.x; 4 * c < p.vocab; c += kThreads) {
    uint32_t words[4];
    if (noisy) noise_words(seed, position, p.noise, c, words);
    for (int w = 0; w < 4; ++w) {
      const int v = 4 * c + w;
      if (v < p.vocab) score[v] = noisy ? z[v] + gumbel(words[w]) : z[v];
    }
  }
  __syncthreads();
  const float lse = block_lse(score, p.vocab, stats);
  const int64_t base = static_cast<int64_t>(row) * p.k;
  block_top(score, p.vocab, p.k, [&](int i, uint64_t rank) {
    const int32_t v = rank_token(rank);
    p.token[base + i] = v;
    p.score[base + i] = v >= 0 ? canonical(score[v] - lse) : -infinity();
  });
}

}  // namespace

void launch_sample_exact_cuda(const SampleExactParams& p, void* stream) {
  launch({dim3(p.rows), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, sample_exact_kernel, p);
}

void launch_row_logprobs_cuda(const RowLogprobsParams& p, void* stream) {
  launch({dim3(p.rows), dim3(kThreads), static_cast<int>(lse_shared(p.vocab)), static_cast<cudaStream_t>(stream), 1, true}, row_logprobs_kernel, p);
}

void launch_draft_topk_cuda(const DraftTopkParams& p, void* stream) {
  launch({dim3(p.rows), dim3(kThreads), static_cast<int>(lse_shared(p.vocab)), static_cast<cudaStream_t>(stream), 1, true}, draft_topk_kernel, p);
}

}  // namespace specrt
