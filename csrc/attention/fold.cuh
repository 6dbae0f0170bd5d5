// Where tree attention leaves partial results for the fold kernel (fold.cu).
#pragma once
#include "attention/row.cuh"

namespace specrt {

// Where a vector's partial results lie: O [vectors, C, D], then (m, l) [vectors, C, 2].
struct Partials {
  float *o, *ml;
  __device__ Partials(const AttentionParams& p, int64_t vector) {
    const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, vectors = static_cast<int64_t>(p.rows) * p.q_heads;
    o = p.workspace + vector * chunks * p.head_dim;
    ml = p.workspace + vectors * chunks * p.head_dim + vector * chunks * 2;
  }
};

// Does a row see one run of chunks alone? Then whoever computed that has written the output.
__device__ __forceinline__ bool sees_one_run(const Row& row, int run) { return row.len <= (row.first & -(run * kChunk)) + run * kChunk; }

// Folds what the rows see in more than one run, and writes the output; zeros for a row that sees nothing.
void launch_fold(const AttentionParams& p, cudaStream_t stream);

}  // namespace specrt
